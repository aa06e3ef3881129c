"""The policy on megatron-core, on a CPU, against Hugging Face's own forward in float64, one sequence at a time."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import megatron_cpu
from conftest import tiny_config
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.logprob import logprob

pytestmark = megatron_cpu.installed

LENGTHS = (5, 9, 3, 12, 8, 4, 11, 6)
"""Packs of all of them have odd rows, which sequence parallelism must pad."""
TEMPERATURE = 0.7
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e3,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 untied": {"tie_word_embeddings": False},
    "qwen3": {},
    "qwen3_moe": {"norm_topk_prob": False},
    "qwen3_moe normalized": {"norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"rms_norm_eps": 1e-3},
    "deepseek_v3 yarn": {
        "q_lora_rank": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 32,
        },
    },
    "glm4_moe": {},
    "glm4_moe ungrouped": {"n_group": 1, "use_qk_norm": False, "attention_bias": False, "num_local_experts": 4},
}


def hf_config(kind: str) -> Any:
    family = {"llama3": "llama", "linear": "llama"}.get(kind.split()[0], kind.split()[0])
    return tiny_config(family, vocab_size=64, **KINDS[kind])


def tensors(config: Any) -> dict[str, Tensor]:
    """Weights by name, the same in every process."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    made = {}
    biases = [(name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, p in [*model.named_parameters(), *biases]:
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        made[name] = 0.25 * noise + ("norm" in name)
    return made


def samples() -> list[tuple[Tensor, Tensor]]:
    """Tokens of each sequence, and the weight of each token's log-probability, 0 for the first."""
    g = torch.Generator().manual_seed(3)
    # Hugging Face gives the padding token, 0, no gradient
    made = [(torch.randint(1, 64, (n,), generator=g), torch.randn(n, generator=g)) for n in LENGTHS]
    return [(tokens, weights.index_fill(0, torch.tensor([0]), 0)) for tokens, weights in made]


@cache
def expected(kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Hidden states of each sequence, and gradients by name."""
    config = hf_config(kind)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    model.load_state_dict(tensors(config), strict=False)
    hidden = []
    for tokens, weights in samples():
        out = model(tokens[None], output_hidden_states=True, use_cache=False)
        logprobs = torch.log_softmax(out.logits[0, :-1] / TEMPERATURE, -1)
        (weights[1:] * logprobs.gather(-1, tokens[1:, None])[:, 0]).sum().backward()
        hidden.append(out.hidden_states[-1][0].detach())
    return hidden, {name: p.grad for name, p in model.named_parameters()}


def step(arguments: Any, kind: str) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """In a worker: hidden states by sample on the last stage, and on rank 0 all gradients."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from miles_spec.train import megatron_model, megatron_weights

    config = hf_config(kind)
    policy = megatron_model.build(config, arguments, torch.float32)
    megatron_weights.load(policy, tensors(config), config)
    model = DistributedDataParallel(policy.config, DistributedDataParallelConfig(), policy)
    tp_group, cp_group = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    own = list(range(len(LENGTHS)))[parallel_state.get_data_parallel_rank() :: arguments.dp]
    cut = len(own) // 2 + 1
    packs = [own[:cut], own[cut:]]
    seen: dict[int, Tensor] = {}

    def forward_step(batches: Any, model: Any) -> Any:
        members = next(batches)
        layout = PackedLayout.make([LENGTHS[i] for i in members], cp_group=cp_group if arguments.cp > 1 else None)
        chosen = [samples()[i] for i in members]
        tokens = layout.shard(torch.cat([t for t, _ in chosen]))
        labels = layout.shard(torch.cat([t.roll(-1) for t, _ in chosen]))
        weights = layout.shard(torch.cat([w.roll(-1) for _, w in chosen]))

        def loss(hidden: Tensor) -> Any:
            parts = layout.unshard(hidden).split([LENGTHS[i] for i in members])
            seen.update(zip(members, parts, strict=True))
            out = logprob(hidden, policy.head_weight(), labels, temperature=TEMPERATURE, group=tp_group)
            return (weights * out.logprob).sum(), torch.ones((), dtype=torch.int), {}

        return model(tokens, layout), loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(packs),
        model=[model],
        num_microbatches=len(packs),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    finalize_model_grads([model])
    exported = megatron_weights.export_values(policy, lambda p: p.main_grad)
    return seen, {name: grad for name, grad in exported if grad is not None}


def check(kind: str, answers: list[Any]) -> None:
    hidden, grads = expected(kind)
    told = {i for seen, _ in answers for i in seen}
    assert told == set(range(len(LENGTHS)))
    for seen, _ in answers:
        for i, states in seen.items():
            assert relative_error(states, hidden[i]) < 1e-5, i
    assert [list(got) for _, got in answers[1:]] == [[] for _ in answers[1:]]
    got = answers[0][1]
    assert list(got) == list(grads)
    errors = {name: relative_error(got[name], grads[name]) for name in grads}
    assert not (wrong := {name: error for name, error in errors.items() if error > 1e-5}), wrong


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_hugging_face(kind: str) -> None:
    check(kind, megatron_cpu.run(step, {}, 1, kind))


SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "moe"]}
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 2, {}),
    ("qwen2", 2, {"tensor_model_parallel_size": 2}),
    ("qwen3", 2, {"tensor_model_parallel_size": 2}),
    ("qwen3", 2, SP),
    ("qwen2", 2, PP | {"deallocate_pipeline_outputs": True}),
    ("llama", 2, PP | FULL),
    ("qwen3", 2, {"context_parallel_size": 2} | SELECTIVE),
    ("qwen3_moe", 2, {"expert_model_parallel_size": 2} | SELECTIVE),
    ("qwen2", 4, PP | SP | SELECTIVE),
    ("qwen3", 4, SP | FULL | {"context_parallel_size": 2}),
    ("qwen3_moe", 4, SP | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    ("mixtral", 4, SP | PP | {"expert_tensor_parallel_size": 2}),
    ("qwen3_moe", 4, PP | FULL | {"expert_model_parallel_size": 2, "context_parallel_size": 2}),
    ("deepseek_v3", 2, SP | {"expert_tensor_parallel_size": 1}),
    ("deepseek_v3", 4, PP | FULL | {"expert_model_parallel_size": 2, "context_parallel_size": 2}),
    ("deepseek_v3 yarn", 4, SP | SELECTIVE | {"context_parallel_size": 2}),
    ("glm4_moe", 4, SP | PP | {"expert_tensor_parallel_size": 2}),
]


@pytest.mark.parametrize(("kind", "size", "table"), LAYOUTS)
def test_every_layout_equals_hugging_face(kind: str, size: int, table: dict[str, Any]) -> None:
    check(kind, megatron_cpu.run(step, table, size, kind))


def faulty_step(arguments: Any, fault: str) -> Any:
    from miles_spec.train import megatron_model

    gather, norm = megatron_model.gather_from_sequence_parallel_region, megatron_model.Norm.__init__

    def unmarked(self: Any, **kwargs: Any) -> None:
        norm(self, **kwargs)
        self.weight.sequence_parallel = False

    if fault == "summed twice":
        megatron_model.gather_from_sequence_parallel_region = lambda x, group, **_: gather(x, True, group)
    else:
        megatron_model.Norm.__init__ = unmarked  # type: ignore[method-assign]
    try:
        return step(arguments, "llama")
    finally:
        megatron_model.gather_from_sequence_parallel_region = gather
        megatron_model.Norm.__init__ = norm  # type: ignore[method-assign]


@pytest.mark.parametrize(("fault", "wrong"), [("summed twice", "q_proj"), ("unmarked", "norm")])
def test_wrong_gradients_under_sequence_parallelism_are_seen(fault: str, wrong: str) -> None:
    with pytest.raises(AssertionError, match=wrong):
        check("llama", megatron_cpu.run(faulty_step, SP, 2, fault))


def halved(arguments: Any, kind: str) -> tuple[torch.dtype, dict[int, Tensor]]:
    from miles_spec.train import megatron_model, megatron_weights

    config = hf_config(kind)
    policy = megatron_model.build(config, arguments, torch.bfloat16)
    megatron_weights.load(policy, tensors(config), config)
    with torch.no_grad():
        layout = PackedLayout.make(LENGTHS)
        hidden = policy(torch.cat([tokens for tokens, _ in samples()]), layout)
    return hidden.dtype, dict(enumerate(hidden.split(LENGTHS)))


@pytest.mark.parametrize("kind", ["qwen3", "deepseek_v3"])
def test_half_precision(kind: str) -> None:
    [(dtype, hidden)] = megatron_cpu.run(halved, {}, 1, kind)
    assert dtype == torch.bfloat16
    assert all(relative_error(hidden[i], x) < 3e-2 for i, x in enumerate(expected(kind)[0]))
