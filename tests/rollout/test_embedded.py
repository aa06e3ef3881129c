"""The embedded engine against Hugging Face's own `generate` and forward, and against itself without speculation."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import tiny_config, tiny_model, tiny_tokenizer
from miles_spec.draft import states
from miles_spec.draft.export import tensors_of
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.objective import DraftObjective, objective
from miles_spec.draft.spec import EAGLE, EAGLE3, MIMO, NEXTN, QWEN_MTP, DraftSpec
from miles_spec.kernels.attention import NAME, PackedAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.logprob import logprob
from miles_spec.rollout import embedded
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.engine import Engine
from miles_spec.rollout.rows import Rows
from miles_spec.rollout.verify import reject
from miles_spec.sync.digest import digest
from miles_spec.types import Completion, Request, Sampling, SpecCounts
from oracles.drafts import Numbers, block
from oracles.statistics import fits


def make(
    family: str = "llama",
    *,
    spec: DraftSpec = EAGLE,
    vocab_ids: torch.Tensor | None = None,
    layers: int = 1,
    **settings: object,
) -> EmbeddedEngine:
    """An engine in float64 over the family's tiny model, with a fresh draft, a prefill of 8 tokens at a time; if the
    draft has several `layers`, each one is different."""
    model = tiny_model(family, torch.float64, layers=4 if spec.reads == "aux" else 2)
    g = torch.Generator().manual_seed(0)
    draft = DraftHead.attach(model, spec if layers == 1 else NEXTN, vocab_ids, g, layers)
    with torch.no_grad():
        for parameter in draft.parameters() if layers > 1 else ():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
    defaults = {"eos_ids": (2,), "dtype": torch.float64, "max_context": 96, "prefill_chunk_tokens": 8}
    return EmbeddedEngine(model, draft, **{**defaults, **settings})  # type: ignore[arg-type]


def requests(count: int = 7, **sampling: object) -> list[Request]:
    """Prompts of 1, 8, 15, 22, 29, 1, ... tokens and responses of different lengths."""
    return [
        Request(
            id=str(i),
            tokens=tuple(3 + (7 * i + j) % 50 for j in range(1 + (i % 5) * 7)),
            sampling=Sampling(**{"max_new_tokens": 6 + 4 * i, **sampling}),  # type: ignore[arg-type]
            seed=100 + i,
        )
        for i in range(count)
    ]


def reference(family: str) -> PreTrainedModel:
    """The same tiny model with Hugging Face's own attention."""
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    model.load_state_dict(tiny_model(family, torch.float64).state_dict())
    return model.double().eval()


def test_is_an_engine() -> None:
    assert isinstance(make(), Engine)


@pytest.mark.parametrize("running", [1, 3, 7])
@pytest.mark.parametrize("depth", [0, 1, 3, 5])
def test_greedy_equals_generate_of_transformers(family: str, depth: int, running: int) -> None:
    engine = make(family, depth=depth, max_running=running, rule="greedy")
    model = reference(family)
    for request, got in zip(requests(), engine.generate(requests(temperature=0.0)), strict=True):
        ids = torch.tensor([request.tokens])
        most = request.sampling.max_new_tokens
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most)
        assert got.tokens == tuple(out[0, ids.shape[1] :].tolist())
        assert got.finish == ("stop" if got.tokens[-1] == 2 else "length")


@pytest.mark.parametrize(
    ("kind", "spec", "layers"),
    [
        ("llama", EAGLE3, 1),
        ("qwen3", EAGLE3, 1),
        ("deepseek_v3", EAGLE, 1),
        ("qwen2", MIMO, 1),
        ("glm4_moe", NEXTN, 1),
        ("deepseek_v3", NEXTN, 1),
        ("gemma", QWEN_MTP, 1),
        *(("llama", NEXTN, layers) for layers in (2, 3, 5)),
        ("deepseek_v3", NEXTN, 3),
    ],
)
def test_every_family_leaves_greedy_tokens_as_they_are(kind: str, spec: DraftSpec, layers: int) -> None:
    expected = make(kind, spec=spec, depth=0).generate(requests(temperature=0.0))
    vocabularies = (None, torch.arange(0, 61, 2)) if spec.own_head or layers > 1 else (None,)
    for vocab_ids in vocabularies:
        engine = make(kind, spec=spec, vocab_ids=vocab_ids, layers=layers, depth=3, max_running=3)
        got = engine.generate(requests(temperature=0.0))
        assert [c.tokens for c in got] == [c.tokens for c in expected]
        assert sum(c.spec.verify_steps for c in got) > 0


def test_a_draft_may_have_other_heads_than_its_target() -> None:
    model = tiny_model("llama", torch.float64)
    layer = tiny_config("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=20, intermediate_size=24)
    torch.manual_seed(0)
    draft = DraftHead(EAGLE, model.config, layer_config=layer).double()
    engine = EmbeddedEngine(model, draft, dtype=torch.float64, depth=3, eos_ids=(2,), max_context=96)
    got = engine.generate(requests())
    assert [c.tokens for c in got] == [c.tokens for c in make(depth=0).generate(requests())]


@pytest.mark.parametrize(
    ("kind", "spec", "layers"),
    [
        ("llama", EAGLE, 1),
        ("qwen3", EAGLE3, 1),
        ("qwen2", MIMO, 1),
        ("llama", NEXTN, 1),
        ("glm4_moe", NEXTN, 1),
        ("qwen2", MIMO, 2),
        ("llama", NEXTN, 3),
        ("glm4_moe", NEXTN, 3),
        ("llama", NEXTN, 4),
    ],
)
def test_the_estimate_of_acceptance_is_the_engines_count(kind: str, spec: DraftSpec, layers: int) -> None:
    """At temperature 0 and in float32, at every depth: training unrolls what serving runs. The draft learns a little
    before, so that blocks of every length stand."""
    model = tiny_model(kind, layers=4 if spec.reads == "aux" else 2)
    draft = DraftHead.attach(model, spec, None, torch.Generator().manual_seed(0), layers)
    if spec.feeds == "pre_norm":
        with torch.no_grad():
            # so that what is fed back and what the LM head sees are far apart
            draft.norm.weight.mul_(torch.tensor([1.0, -1.0]).repeat(16))
            draft.lm_head.weight.mul_(torch.tensor([1.0, -1.0]).repeat(16))
    asked = requests(8, temperature=0.0, ignore_eos=True)
    engine = EmbeddedEngine(model, None, max_context=96, prefill_chunk_tokens=8)
    answers = [c.tokens for c in engine.generate(asked)]

    segments = [(r.tokens, a) for r, a in zip(asked, answers, strict=True)]
    layout = PackedLayout.make([len(p) + len(a) for p, a in segments])
    tokens = torch.tensor([t for p, a in segments for t in p + a])
    mask = torch.tensor([sampled for p, a in segments for sampled in [False] * len(p) + [True] * len(a)])
    head = model.get_output_embeddings().weight.detach()
    with torch.no_grad():
        positions, attend = layout.positions[None], PackedAttention(layout)
        out = states.run(model.model, draft, tokens[None], position_ids=positions, attend=attend, use_cache=False)
        hidden, read = (x[0] for x in out)
        scored = logprob(hidden, head, tokens.roll(-1), temperature=1.0)
    pack = (model.get_input_embeddings().weight.detach(), head, hidden, read, layout, tokens, mask)

    def found(rule: str) -> DraftObjective:
        settings: Any = {"depth": 3, "loss": "ce", "ramp": 0.0, "rule": rule, "temperature": 1.0}
        return objective(draft, *pack, scored.lse, scored.logprob, **settings)

    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        got = found("greedy")
        (got.loss_sum / got.rows[0]).backward()
        optimizer.step()
    engine.attach_draft(draft)
    engine.set_draft_depth(3)
    for rule in ("greedy", "target"):
        engine.rule = rule  # type: ignore[assignment]
        completions = engine.generate(asked)
        assert [c.tokens for c in completions] == answers
        counts = sum((c.spec for c in completions), SpecCounts())
        assert min(counts.accepted) > 0 and counts.accept_rates[0] < 0.95
        with torch.no_grad():
            estimate = found(rule).estimate
        assert (estimate.accepted, estimate.verify_steps) == (sum(counts.accepted), counts.verify_steps)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 5, "temperature": 0.7}])
def test_sampled_tokens_do_not_depend_on_depth_batch_or_company(settings: dict[str, object]) -> None:
    asked = requests(**settings)
    expected = [make(depth=0, max_running=1).generate([r])[0].tokens for r in asked]
    for depth, running in product((0, 2, 4), (2, 7)):
        got = make(depth=depth, max_running=running).generate(asked)
        assert [c.tokens for c in got] == expected


@pytest.mark.parametrize(("spec", "layers"), [(EAGLE, 2), (EAGLE3, 4)], ids=["eagle", "eagle3"])
def test_rejection_follows_the_target_exactly(spec: DraftSpec, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sequences of three tokens over a vocabulary of six, by enumeration; fails by chance once in a million runs,
    and catches a broken verifier."""
    torch.manual_seed(1)
    config = tiny_config("llama", vocab_size=6, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    prompt = (5, 3, 4)
    sequences = torch.tensor(list(product(range(6), repeat=3)))
    ids = torch.cat([torch.tensor(prompt).expand(len(sequences), -1), sequences], 1)
    layout = PackedLayout.make([6] * len(ids))
    with torch.no_grad():
        logits = model(ids.view(1, -1), position_ids=layout.positions[None], attend=PackedAttention(layout)).logits
    chances = logits.view(len(ids), 6, 6).log_softmax(-1)[:, 2:5].gather(-1, sequences[..., None]).sum((1, 2)).exp()
    truth = dict(zip(map(tuple, sequences.tolist()), chances.tolist(), strict=True))
    assert sum(truth.values()) == pytest.approx(1)

    sampling = Sampling(max_new_tokens=3, ignore_eos=True)
    asked = [Request(id=str(i), tokens=prompt, sampling=sampling, seed=i) for i in range(8000)]
    draft = DraftHead.attach(model, spec, generator=torch.Generator().manual_seed(0))
    engine = EmbeddedEngine(
        model, draft, dtype=torch.float64, depth=2, max_running=500, rule="rejection", max_context=16
    )
    got = engine.generate(asked)
    rates = sum((c.spec for c in got), SpecCounts()).accept_rates
    assert 0.1 < rates[0] < 0.95
    assert fits([c.tokens for c in got], truth)
    monkeypatch.setattr(embedded, "reject", lambda p, d, q, seeds, at: reject(p, d, 0.5 * q, seeds, at))
    assert not fits([c.tokens for c in engine.generate(asked)], truth)


def test_logprobs_are_those_of_the_full_forward(family: str) -> None:
    model = reference(family)
    for temperature in (0.0, 0.7):
        for request, got in zip(
            requests(), make(family, depth=3).generate(requests(temperature=temperature)), strict=True
        ):
            ids = torch.tensor([request.tokens + got.tokens])
            with torch.no_grad():
                logits = model(ids).logits[0] / (temperature or 1.0)
            rows = torch.arange(len(got.tokens)) + len(request.tokens) - 1
            expected = logits.log_softmax(-1)[rows, torch.tensor(got.tokens)]
            assert got.logprobs == pytest.approx(expected.tolist(), abs=5e-6)


def test_counts_add_up() -> None:
    for rule in ("target", "rejection"):
        for got in make(depth=3, rule=rule).generate(requests(12, ignore_eos=True)):
            spec = got.spec
            assert sum(got.accepted) == sum(spec.accepted)
            # the first token comes from prefill, every block adds one of its own, but perhaps the last
            assert len(got.tokens) - 1 - sum(spec.accepted) in (spec.verify_steps, spec.verify_steps - 1)
            assert all(a <= d for a, d in zip(spec.accepted, spec.drafted, strict=True))
            assert list(spec.accepted) == sorted(spec.accepted, reverse=True)
            assert spec.drafted[0] == spec.verify_steps
            (span,) = got.versions
            assert (span.start, span.end, span.target, span.draft) == (0, len(got.tokens), 0, 0)


def perfect(vocab_ids: torch.Tensor | None = None, **settings: object) -> EmbeddedEngine:
    """An engine whose target repeats a token (its layers do nothing), and whose draft does the same."""
    model = tiny_model("llama", torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.div_(model.model.embed_tokens.weight.pow(2).mean(-1, keepdim=True).sqrt())
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    draft = DraftHead.attach(model, EAGLE, vocab_ids)
    with torch.no_grad():
        draft.fc.weight.copy_(torch.eye(32, 64))
    return EmbeddedEngine(model, draft, dtype=torch.float64, max_context=96, **settings)  # type: ignore[arg-type]


def test_a_perfect_draft_is_always_accepted() -> None:
    got = perfect(depth=3).generate(requests(max_new_tokens=17, temperature=0.0))
    assert {c.spec.accept_length for c in got} == {4.0}
    assert {c.spec.verify_steps for c in got} == {4}


@pytest.mark.parametrize("rule", ["greedy", "target", "rejection"])
def test_reduced_vocabulary_is_lossless(rule: str) -> None:
    few = torch.arange(0, 61, 2)
    temperature = 0.0 if rule == "greedy" else 0.05
    expected = perfect(depth=0).generate(requests(12, temperature=temperature))
    got = perfect(few, depth=3, rule=rule).generate(requests(12, temperature=temperature))
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    drafted = {t for c in got for t, a in zip(c.tokens, c.accepted, strict=True) if a}
    others = {t for c in got for t in c.tokens} - set(few.tolist())
    assert drafted and drafted <= set(few.tolist()) and others


@pytest.mark.parametrize("layers", [1, 3])
def test_speculation_switched_by_batch_size_changes_nothing(layers: int) -> None:
    expected = make(depth=0).generate(requests(9))
    engine = make(depth=3, layers=layers, max_batch=2, max_running=9)
    got = engine.generate(requests(9))
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    # long responses outlive the others, and the draft first catches up on what it has not seen
    assert got[8].spec.verify_steps > 0 and got[0].spec.verify_steps == 0


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_every_drafted_token_is_that_of_the_papers_equations(layers: int) -> None:
    """Accepted or not, in a batch that sequences leave and join."""
    model = tiny_model("qwen2", torch.float64)
    g = torch.Generator().manual_seed(2)
    draft = DraftHead.attach(model, MIMO, None, g, layers)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    engine = EmbeddedEngine(
        model, draft, dtype=torch.float64, depth=4, max_running=3, max_context=64, prefill_chunk_tokens=8
    )
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    drafter: Any = engine._drafter
    propose = drafter.propose

    def watched(rows: Rows, *rest: Any, **how: Any) -> Any:
        drafted, proposal = propose(rows, *rest, **how)
        seen.update((tuple(s.tokens), tuple(d)) for s, d in zip(rows.running, drafted.tolist(), strict=True))
        return drafted, proposal

    drafter.propose = watched
    asked = requests(5, max_new_tokens=7, ignore_eos=True)
    engine.generate([*asked, replace(asked[2], id="same"), replace(asked[3], id="too", seed=9)])
    assert len(seen) > 20
    embed, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    named, numbers = tensors_of(draft), Numbers.of(draft.config)
    for tokens, drafted in seen:
        layout, ids = PackedLayout.make([len(tokens)]), torch.tensor(tokens)
        with torch.no_grad():
            place = {"position_ids": layout.positions[None], "attend": PackedAttention(layout), "use_cache": False}
            read = model.model(ids[None], **place).last_hidden_state[0]
            known = torch.cat([ids, torch.tensor(drafted)])
            outs = block("mimo", named, numbers, embed, read, known, len(tokens) - 2, 4, layers)
        assert tuple(int((head @ out).argmax()) for out in outs) == drafted


def test_drafts_do_not_depend_on_batch_company_or_how_prompts_come() -> None:
    """With a layer for each depth: what is accepted is the same alone and in a batch that sequences leave and join,
    with prompts in chunks and whole, shared and not."""
    asked = [*requests(7, ignore_eos=True), *(replace(r, id=f"{r.id}b") for r in requests(7, ignore_eos=True))]
    alone = [make(depth=4, layers=3, max_running=1).generate([r])[0].spec for r in asked]
    assert any(sum(spec.accepted) for spec in alone)
    for chunk, running in product((3, 512), (3, 14)):
        engine = make(depth=4, layers=3, max_running=running, prefill_chunk_tokens=chunk)
        assert [c.spec for c in engine.generate(asked)] == alone


def test_same_prompts_are_prefilled_once_and_answered_alike() -> None:
    prompt = (4, 8, 15, 16, 23, 42, 5, 6, 7, 9)
    shared = [Request(id=f"a{i}", tokens=prompt, sampling=Sampling(max_new_tokens=20), seed=i) for i in range(5)]
    engine = make(depth=2)
    seen: list[int] = []
    forward = engine._forward
    engine._forward = lambda ids, *rest: seen.append(len(ids)) or forward(ids, *rest)  # type: ignore[func-returns-value]
    got = engine.generate(shared)
    assert seen[:2] == [1, 1]  # ten tokens in chunks of eight, one row
    assert [c.tokens for c in got] == [make(depth=0).generate([r])[0].tokens for r in shared]


def test_stop_tokens_and_strings() -> None:
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=len(tokenizer)), attn_implementation=NAME)
    draft = DraftHead.attach(model.eval(), EAGLE)
    plain = EmbeddedEngine(model, draft, tokenizer=tokenizer, depth=3, max_context=96)
    request = Request(id="0", tokens=(6, 7, 8), sampling=Sampling(max_new_tokens=40), seed=3)
    (full,) = plain.generate([request])
    text = tokenizer.decode(full.tokens)
    stop = next(text[i : i + 2] for i in range(8, 30) if text[i : i + 2].isascii())
    asked = Request(id="0", tokens=(6, 7, 8), sampling=Sampling(max_new_tokens=40, stop=("@@@@", stop)), seed=3)
    (got,) = plain.generate([asked])
    assert got.finish == "stop" and stop in tokenizer.decode(got.tokens)
    assert got.tokens == full.tokens[: len(got.tokens)]
    assert stop not in tokenizer.decode(got.tokens[:-1])
    token = full.tokens[5]
    asked = Request(id="0", tokens=(6, 7, 8), sampling=Sampling(max_new_tokens=40, stop_token_ids=(token,)), seed=3)
    (got,) = plain.generate([asked])
    assert got.finish == "stop" and got.tokens == full.tokens[: full.tokens.index(token) + 1]


@pytest.mark.parametrize("layers", [1, 2])
def test_abort_returns_what_there_is(layers: int) -> None:
    engine = make(depth=2, layers=layers, max_running=3)
    expected = {c.request_id: c for c in engine.generate(requests(7, ignore_eos=True))}
    order: list[str] = []

    def stop_after_two(completion: Completion) -> None:
        order.append(completion.request_id)
        if len(order) == 2:
            engine.abort(["6"])
        if len(order) == 4:
            engine.abort()

    got = engine.generate(requests(7, ignore_eos=True), stop_after_two)
    assert [c.request_id for c in got] == [str(i) for i in range(7)] and sorted(order) == sorted(map(str, range(7)))
    assert got[6].finish == "abort"
    assert {c.finish for c in got} == {"length", "abort"}
    for c in got:
        assert c.tokens == expected[c.request_id].tokens[: len(c.tokens)]
    # nothing is left behind
    assert [c.tokens for c in engine.generate(requests(3))] == [c.tokens for c in make().generate(requests(3))]


def test_requests_that_cannot_run_are_refused_before_any_runs() -> None:
    engine = make()
    good = requests(1)
    with pytest.raises(ValueError, match="'x' has an empty prompt"):
        engine.generate([*good, Request(id="x", tokens=(), sampling=Sampling())])
    with pytest.raises(ValueError, match="has 90 prompt tokens and asks for 10 more, but the context holds 96"):
        engine.generate([*good, Request(id="x", tokens=(3,) * 90, sampling=Sampling(max_new_tokens=10))])
    with pytest.raises(ValueError, match="stop strings, which need a tokenizer"):
        engine.generate([Request(id="x", tokens=(3,), sampling=Sampling(stop=("a",), max_new_tokens=5))])
    assert engine.take_times().tokens == 0
    with pytest.raises(ValueError, match="needs a draft"):
        EmbeddedEngine(tiny_model(), None, depth=2)


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_full_context_can_be_used(layers: int) -> None:
    (got,) = make(depth=5, layers=layers).generate(
        [Request(id="0", tokens=(5,) * 40, sampling=Sampling(max_new_tokens=56, ignore_eos=True))]
    )
    assert len(got.tokens) == 56


def test_weights_change_only_in_a_session_and_versions_follow() -> None:
    engine = make(depth=2)
    before = engine.generate(requests())
    new = {n: torch.randn(m.shape, dtype=torch.float64) * 0.2 for n, m in engine.manifest()["target"].items()}
    with pytest.raises(RuntimeError, match="no update"):
        engine.load_weights("target", new.items())
    engine.begin_update(4, ["target"])
    with pytest.raises(RuntimeError, match="open"):
        engine.generate(requests())
    with pytest.raises(ValueError, match="no target tensor 'nonsense'"):
        engine.load_weights("target", [("nonsense", torch.zeros(1))])
    name = next(iter(new))
    with pytest.raises(ValueError, match=f"{name}.*shape"):
        engine.load_weights("target", [(name, torch.zeros(1))])
    engine.load_weights("target", new.items())
    assert engine.end_update() == {"target": {n: digest(t) for n, t in new.items()}}
    assert engine.versions() == {"target": 4, "draft": 0}
    after = engine.generate(requests())
    assert [c.tokens for c in after] != [c.tokens for c in before]
    assert after[0].versions[0].target == 4
    model = reference("llama")
    model.load_state_dict({**model.state_dict(), **new})
    request, got = requests()[3], after[3]
    with torch.no_grad():
        logits = model(torch.tensor([request.tokens + got.tokens])).logits[0].log_softmax(-1)
    at = len(request.tokens) - 1
    assert got.logprobs[0] == pytest.approx(float(logits[at, got.tokens[0]]), abs=5e-6)


def test_times_cover_the_call_and_start_again() -> None:
    engine = make(depth=2)
    engine.take_times()
    out = engine.generate(requests())
    times = engine.take_times()
    assert times.tokens == sum(len(c.tokens) for c in out)
    assert min(times.prefill_s, times.draft_s, times.verify_s, times.other_s) > 0
    assert engine.take_times().total_s == 0


def test_fewer_may_run_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make(max_running=7)
    expected = subject.generate(requests())
    subject.max_running = 2
    together: list[int] = []
    step = subject._step
    monkeypatch.setattr(subject, "_step", lambda: (together.append(len(subject._rows.running)), step()))
    assert [c.tokens for c in subject.generate(requests())] == [c.tokens for c in expected]
    assert max(together) == 2


@pytest.mark.parametrize("layers", [1, 4])
def test_a_depth_raised_later_finds_room(layers: int) -> None:
    engine = make(depth=0, layers=layers)
    expected = engine.generate(requests())
    engine.set_draft_depth(6)
    assert [c.tokens for c in engine.generate(requests())] == [c.tokens for c in expected]


def test_bfloat16_keeps_rotary_frequencies_exact() -> None:
    model = tiny_model("llama")
    engine = EmbeddedEngine(model, None, dtype=torch.bfloat16)
    assert torch.equal(engine.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert engine.manifest()["target"]["model.norm.weight"].dtype == "bfloat16"
    assert all(math.isfinite(x) for c in engine.generate(requests(3)) for x in c.logprobs)
