"""Drafts of the families that SGLang runs on a CPU: exported, started, pushed, and accepted just as ours are.

EAGLE's are those of all the other files. The drafts have learned the very responses a little, so that the counts depend
on all that they compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from miles_spec.draft import states
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.objective import objective
from miles_spec.draft.spec import EAGLE3, MIMO, NEXTN, QWEN_MTP, DraftSpec
from miles_spec.kernels import attention
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.logprob import logprob

from .conftest import CONTEXT, DEPTH, VOCAB, Host, Pair

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
GROUPS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **EXPERTS,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "num_hidden_layers": 5},
    "qwen2": {},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, **EXPERTS},
    "glm4_moe": {"head_dim": 16, "use_qk_norm": True, **GROUPS},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "rope_parameters": {  # on a CPU SGLang has no other kind
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 2,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        **GROUPS,
        "moe_intermediate_size": 64,  # two shards of 32
    },
}
EVEN = torch.arange(0, VOCAB, 2)
CASES = {
    "eagle3": (EAGLE3, "llama", None),
    "eagle3 reduced": (EAGLE3, "llama", EVEN),
    "mimo": (MIMO, "qwen2", None),
    "nextn": (NEXTN, "glm4_moe", None),
    "nextn latent": (NEXTN, "deepseek_v3", None),
    "qwen_mtp": (QWEN_MTP, "qwen3_moe", None),
}


def make_target(kind: str) -> PreTrainedModel:
    """Random, but such that the next token depends mostly on the last one."""
    torch.manual_seed(9)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(kind, **{**sizes, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).float().eval()
    # an EAGLE3 draft is to read layers that differ
    layer, head = (0.2, 1.2) if kind == "llama" else (0.09, 0.4)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() >= 2:
                scale = 1.0 if "embed" in name else head if "lm_head" in name else layer
                tensor.copy_(scale * torch.randn_like(tensor))
        _scatter(model)
    return model


def _scatter(module: torch.nn.Module) -> None:
    """Gives routers a bias, which starts as zero."""
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)))


def teach(pair: Pair, requests: Any) -> None:
    """Some steps of cross-entropy on the target's own responses."""
    model, head = pair.model.requires_grad_(False), pair.draft
    made = pair.embedded(0).generate(requests)
    rows = [[*request.tokens, *completion.tokens] for request, completion in zip(requests, made, strict=True)]
    layout = PackedLayout.make([len(row) for row in rows])
    tokens = torch.tensor([token for row in rows for token in row])
    prompts = zip(rows, requests, strict=True)
    mask = torch.cat([torch.arange(len(row)) >= len(request.tokens) for row, request in prompts])
    embed, lm_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    attend = PackedAttention(layout)
    with torch.no_grad():
        hidden, read = states.run(
            model.base_model, head, input_ids=tokens[None], position_ids=layout.positions[None], attend=attend
        )
        scored = logprob(hidden[0], lm_head, tokens.roll(-1), temperature=1.0)
    pack = (embed, head.target_rows(lm_head), hidden[0], read[0], layout, tokens, mask, scored.lse, scored.logprob)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    # fresh EAGLE3 heads know nothing of the newest token, MTP layers most of what there is
    for _ in range(60 if head.vocab_ids is not None else 20 if head.aux_layers else 4):
        result = objective(head, *pack, depth=DEPTH, loss="ce", ramp=0.0, rule="greedy", temperature=1.0)
        optimizer.zero_grad()
        (result.loss_sum / mask.sum()).backward()
        optimizer.step()


def make_family(spec: DraftSpec, kind: str, vocab_ids: Tensor | None, requests: Any) -> Pair:
    model = make_target(kind)
    draft = DraftHead.attach(model, spec, vocab_ids, torch.Generator().manual_seed(0))
    with torch.no_grad():
        _scatter(draft)
    pair = Pair(model, draft)
    teach(pair, requests)
    return pair


@pytest.fixture(scope="module", params=CASES)
def started(
    request: pytest.FixtureRequest, start: Any, requests: Any
) -> Iterator[tuple[Host, Pair, Mapping[str, str]]]:
    """A server of that family, what it started from, and SGLang's checksums of the draft that it read from there."""
    pair = make_family(*CASES[request.param], requests)
    host: Host = start(request.param.replace(" ", "_"), pair, from_folder=True)
    read = drafted(host)
    host.learn()
    yield host, pair, read
    host.server.stop()


@pytest.fixture
def served(started: Any) -> Host:
    """Such a server."""
    host: Host = started[0]
    return host


def drafted(host: Host) -> dict[str, str]:
    """SGLang's checksums of what a draft has for itself."""
    shared = ("embed_tokens.weight",) if host.pair.draft.spec.own_head else ("embed_tokens.weight", "lm_head.weight")
    return {n: c for n, c in host.checksums().items() if n.startswith("draft.") and not n.endswith(shared)}


def counts(completions: Any) -> list[tuple[int, int]]:
    return [(c.spec.verify_steps, sum(c.spec.accepted)) for c in completions]


def test_sglang_reads_the_folder_as_we_push_it(started: Any) -> None:
    """Every tensor that it read by itself is, bit for bit, the one that we put there afterwards."""
    host, first, read = started
    assert len(read) > 5
    for pair, same in ((first.other(3), False), (first, True)):
        assert all(r.verified for r in host.push(pair))
        assert (drafted(host) == read) == same


def test_it_is_accepted_as_ours_is(served: Host, requests: Any) -> None:
    """With the weights it was taught, and with others that are pushed later."""
    roles = [("target", True), ("draft", True)]
    first = served.pair
    second = first.other(1)
    teach(second, requests)
    for pair in (first, second):
        assert [(r.role, r.verified) for r in served.push(pair)] == roles
        ours, theirs = pair.embedded().generate(requests), served.generate(requests)
        assert [c.tokens for c in theirs] == [c.tokens for c in ours]
        assert counts(theirs) == counts(ours)
        # some drafts stand and some fall, or the counts would say nothing
        accepted, steps = sum(a for _, a in counts(ours)), sum(s for s, _ in counts(ours))
        assert 0.15 < accepted / (steps * DEPTH) < 0.98


def test_another_draft_is_accepted_otherwise(served: Host, requests: Any) -> None:
    """The counts are of the draft that was pushed, with the states that it reads."""
    pair = served.pair
    right = counts(pair.embedded().generate(requests))
    other = pair.other(2)
    other.model.load_state_dict(pair.model.state_dict())
    with torch.no_grad():
        other.draft.fc.weight.zero_()
    assert all(r.verified for r in served.push(other))
    wrong = served.generate(requests)
    assert [c.tokens for c in wrong] == [c.tokens for c in pair.embedded(0).generate(requests)]
    assert counts(wrong) == counts(other.embedded().generate(requests)) != right
    served.pair = pair
    if pair.draft.aux_layers:
        other.draft.load_state_dict(pair.draft.state_dict())
        other.draft.aux_layers = tuple(layer + 1 for layer in pair.draft.aux_layers)
        assert counts(other.embedded().generate(requests)) != right


def test_it_is_accepted_as_often_when_tokens_are_sampled(started: Any, sampled: Any) -> None:
    """Under the rule `target` at temperature 1; a false alarm has a chance of 1e-5."""
    served, pair, _ = started
    assert all(r.verified for r in served.push(pair))
    requests = [
        replace(r, id=f"{r.id}.{i}", seed=100 * i + r.seed)
        for i in range(3)
        for r in sampled(temperature=1.0, max_new_tokens=12)
    ]
    rates, errors = [], []
    for completions in (pair.embedded().generate(requests), served.generate(requests)):
        each = torch.tensor(counts(completions), dtype=torch.float64)
        steps, accepted = each.sum(0).tolist()
        rates.append(accepted / steps)
        errors.append(float((each[:, 1] - rates[-1] * each[:, 0]).square().sum().sqrt()) / steps)
    assert rates[0] > 0.1
    assert abs(rates[0] - rates[1]) < 4.5 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5


def test_latent_attention_in_shards(start: Any, requests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks: what is loaded together is whole on each, and each derives from its share of another matrix."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    pair = make_family(NEXTN, "deepseek_v3", None, requests)
    host: Host = start("latent_sharded", pair, tp_size=2)
    host.learn()
    for each in (pair, pair.other(1)):
        assert all(r.verified for r in host.push(each))
        ours, theirs = each.embedded().generate(requests), host.generate(requests)
        assert [c.tokens for c in theirs] == [c.tokens for c in ours]
        assert counts(theirs) == counts(ours)
    host.server.stop()
