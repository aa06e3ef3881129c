"""The torch trainer against Hugging Face's own forward in float64, one sequence at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import isnan
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from conftest import FAMILIES as TARGETS
from conftest import state_of, tiny_model
from miles_spec.config import DraftConfig, RolloutConfig, RunConfig, TrainConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.objective import objective
from miles_spec.draft.spec import EAGLE, EAGLE3, FAMILIES, NEXTN, DraftSpec
from miles_spec.kernels.shift import draft_targets
from miles_spec.models import embed_weight, head_weight
from miles_spec.train import draft_trainer
from miles_spec.train.base import Trainer
from miles_spec.train.packing import pack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import PackedBatch, Sample
from oracles.policy import aggregate, token_loss
from oracles.samples import random_samples
from oracles.samples import sample as make_sample

LENGTHS = [(4, 7), (3, 1), (5, 0), (1, 9), (6, 4)]
ADVANTAGES = [1.0, -0.5, 2.0, 0.25, -1.5]
DRAFTS = [*((family, EAGLE) for family in TARGETS), ("qwen3", EAGLE3), ("glm4_moe", NEXTN)]
with_drafts = pytest.mark.parametrize(("family", "spec"), DRAFTS, ids=[f"{f}-{s.family}" for f, s in DRAFTS])
"""Every target with one family of drafts, and what differs most from it: an LM head of its own, and experts."""


def config(*, rollout: dict[str, Any] | None = None, draft: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    return RunConfig(
        rollout=RolloutConfig(**(rollout or {})),
        draft=DraftConfig(**{"num_steps": 3, "lr": 1e-2, "ramp_steps": 2, "clip": 1e9, **(draft or {})}),
        train=TrainConfig(**{"lr": 1e-2, "clip": 1e9, **train}),
    )


def trainer(
    run: RunConfig,
    *,
    family: str = "llama",
    draft: bool = True,
    spec: DraftSpec = EAGLE,
    dtype: torch.dtype = torch.float32,
) -> TorchTrainer:
    model = tiny_model(family, layers=4 if spec.reads == "aux" else 2)
    head = DraftHead.attach(model, spec, None, torch.Generator().manual_seed(1)) if draft else None
    return TorchTrainer(model, head, run, "cpu", dtype)


def batches(
    samples: Sequence[Sample] | None = None, *, budget: int = 16, aggregation: str = "sequence"
) -> list[PackedBatch]:
    samples = random_samples(LENGTHS) if samples is None else samples
    [out] = pack(
        samples,
        ADVANTAGES[: len(samples)],
        token_budget=budget,
        aggregation=aggregation,
        max_new_tokens=9,
        minibatches=1,
        device="cpu",
    )
    return out


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of all tensors together."""
    assert a.keys() == b.keys() and a
    scale = max(float(x.abs().max()) for x in b.values())
    worst = max((float((a[n].double() - b[n].double()).abs().max()) / scale, n) for n in b)
    assert worst[0] < tolerance, worst


def oracle_model(family: str) -> Any:
    model = tiny_model(family).double()
    model.config._attn_implementation = "eager"
    return model


def oracle_logprobs(model: Any, sample: Sample, temperature: float) -> Tensor:
    """Of every token but the first, by a forward of this sample alone."""
    ids = torch.tensor([[*sample.prompt.tokens, *sample.completion.tokens]])
    logits = model(ids, use_cache=False).logits[0, :-1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_packed_logprobs_equal_each_sequence_alone(family: str, temperature: float) -> None:
    subject = trainer(config(rollout={"temperature": temperature}), family=family, draft=False)
    model = oracle_model(family)
    samples = random_samples(LENGTHS)
    [batch] = batches(samples, budget=1000)
    [got] = subject.logprobs([batch])
    by_length = sorted(samples, key=lambda s: -len(s.prompt.tokens) - len(s.completion.tokens))
    parts = got.split(batch.layout.lengths)
    for part, sample in zip(parts, by_length, strict=True):
        assert part[0] == 0
        with torch.no_grad():
            expected = oracle_logprobs(model, sample, temperature or 1.0)
        torch.testing.assert_close(part[1:].double(), expected, atol=2e-5, rtol=1e-5)


def test_a_reference_in_half_precision_keeps_its_rotary_frequencies() -> None:
    subject = trainer(config(kl_coef=0.1), dtype=torch.bfloat16)
    assert subject.reference is not None
    assert next(subject.reference.parameters()).dtype == torch.bfloat16
    ours, theirs = subject.model.model.rotary_emb, subject.reference.model.rotary_emb
    assert torch.equal(ours.inv_freq, theirs.inv_freq) and ours.inv_freq.bfloat16().float().ne(ours.inv_freq).any()


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_loss_and_gradient_of_an_on_policy_step(family: str, aggregation: str) -> None:
    run = config(rollout={"temperature": 0.8}, tis_cap=1.5)
    subject = trainer(run, family=family)
    terms = subject.step(batches(aggregation=aggregation))
    model = oracle_model(family)
    losses: list[list[float]] = []
    objective_terms: list[list[Tensor]] = []
    diffs = []
    for sample, advantage in zip(random_samples(LENGTHS), ADVANTAGES, strict=True):
        p = len(sample.prompt.tokens)
        logp = oracle_logprobs(model, sample, 0.8)[p - 1 :]
        options = dict(ref=None, clip_low=0.2, clip_high=0.2, tis_cap=1.5, kl_coef=0.0)
        rollout = sample.completion.logprobs
        row = [token_loss(x, advantage, r, x, **options) for x, r in zip(logp.tolist(), rollout, strict=True)]
        losses.append(row)
        # REINFORCE: the loss itself is a constant that multiplies the gradient of the log-probability
        objective_terms.append([c * lp for c, lp in zip(row, logp, strict=True)])
        diffs += [abs(x - r) for x, r in zip(logp.tolist(), rollout, strict=True)]
    assert terms.policy == pytest.approx(aggregate(losses, aggregation, 9), rel=1e-4)
    assert terms.rollout_logprob_diff == pytest.approx(max(diffs), rel=1e-4)
    assert (terms.clip_fraction, terms.ref_kl) == (0, 0)
    aggregate(objective_terms, aggregation, 9).backward()  # type: ignore[arg-type, attr-defined]
    expected = gradients(model)
    assert_near(gradients(subject.model), expected, 1e-5)
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert terms.grad_norm == pytest.approx(float(norm), rel=1e-4)


def test_entropy_is_the_mean_over_sampled_tokens() -> None:
    terms = trainer(config(), draft=False).step(batches())
    model = oracle_model("llama")
    values = []
    for sample in random_samples(LENGTHS):
        ids = torch.tensor([[*sample.prompt.tokens, *sample.completion.tokens]])
        p = len(sample.prompt.tokens)
        log_p = torch.log_softmax(model(ids, use_cache=False).logits[0, p - 1 : -1], -1)
        values.append(-(log_p.exp() * log_p).sum(-1))
    assert terms.entropy == pytest.approx(float(torch.cat(values).detach().mean()), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_micro_batches_do_not_matter(aggregation: str) -> None:
    runs = []
    for budget in (1, 16, 1000):
        subject = trainer(config())
        terms = subject.step(batches(budget=budget, aggregation=aggregation))
        runs.append((gradients(subject.model), gradients(subject.draft.draft), terms))
    for policy, draft, terms in runs[:2]:
        assert_near(policy, runs[2][0], 1e-6)
        assert_near(draft, runs[2][1], 1e-6)
        for name in ("policy", "entropy", "rollout_kl", "draft", "draft_by_depth", "draft_grad_norm"):
            assert getattr(terms, name) == pytest.approx(getattr(runs[2][2], name), rel=1e-5), name
        assert terms.acceptance["cotrained"].accept_length == pytest.approx(
            runs[2][2].acceptance["cotrained"].accept_length, rel=1e-5
        )


def test_given_old_and_reference_logprobs_reach_the_right_tokens() -> None:
    plain, given = trainer(config(kl_coef=0.5), draft=False), trainer(config(kl_coef=0.5), draft=False)
    micro = batches()
    pairs = zip(micro, given.logprobs(micro), given.logprobs(micro, reference=True), strict=True)
    with_both = [replace(b, old_logprobs=old, ref_logprobs=ref) for b, old, ref in pairs]
    plain.step(micro)
    terms = given.step(with_both)
    # the policy is its own old self and its own reference: both terms vanish, gradients included
    assert terms.clip_fraction == 0 and terms.ref_kl == pytest.approx(0, abs=1e-9)
    assert_near(gradients(given.model), gradients(plain.model), 1e-5)
    moved = given.step(with_both)
    assert moved.clip_fraction > 0 and moved.ref_kl > 1e-4


def test_reference_stays_at_step_zero() -> None:
    subject = trainer(config(kl_coef=0.1), draft=False)
    [batch] = batches(budget=1000)
    before = subject.logprobs([batch])[0]
    assert torch.equal(subject.logprobs([batch], reference=True)[0], before)
    subject.step([batch])
    assert torch.equal(subject.logprobs([batch], reference=True)[0], before)
    assert not torch.allclose(subject.logprobs([batch])[0], before)
    with pytest.raises(ValueError, match="kl_coef"):
        trainer(config(), draft=False).logprobs([batch], reference=True)


@with_drafts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_is_the_same_bit_for_bit_with_and_without_draft_training(
    family: str, spec: DraftSpec, dtype: torch.dtype
) -> None:
    results = []
    for options, present in (({}, True), ({"train": False}, True), ({}, False)):
        subject = trainer(config(draft=options), family=family, draft=present, spec=spec, dtype=dtype)
        fresh = copies(subject.draft.draft) if subject.draft else {}
        if present:
            subject.freeze_draft()
        for seed in range(3):
            subject.step(batches(random_samples(LENGTHS, seed=seed)))
        results.append((copies(subject.model), gradients(subject.model), subject.optimizer.state()))
        if subject.draft:
            changed = [n for n, p in copies(subject.draft.draft).items() if not torch.equal(p, fresh[n])]
            assert bool(changed) == subject.config.draft.train
            assert subject.draft_version == (3 if subject.config.draft.train else 0)
        assert subject.version == 3
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)


def test_draft_leaves_no_gradient_elsewhere() -> None:
    subject = trainer(config())
    subject.freeze_draft()
    before = copies(subject.model)
    list(subject.warm_draft(batches(), 2))
    assert gradients(subject.model) == {}
    assert gradients(subject.draft.frozen) == {}
    assert_same(copies(subject.model), before)
    assert gradients(subject.draft.draft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_every_parameter_of_a_draft_learns(spec: DraftSpec, dtype: torch.dtype) -> None:
    subject = trainer(config(draft={"loss": "kl"}), family="qwen2", spec=spec, dtype=dtype)
    before = copies(subject.draft.draft)
    for _ in range(2):
        subject.step(batches())
    moved = {n for n, p in copies(subject.draft.draft).items() if not torch.equal(p, before[n])}
    assert moved == before.keys()
    assert ("lm_head.weight" in moved) == spec.own_head
    assert all(g.any() for g in gradients(subject.draft.draft).values())


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_all_of_a_draft_computes_in_the_dtype_of_forwards(spec: DraftSpec) -> None:
    subject = trainer(config(), family="qwen2", spec=spec, dtype=torch.bfloat16)
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, out: Any) -> None:
        parts = out if isinstance(out, tuple) else (out,)
        seen.setdefault(name, set()).update(x.dtype for x in parts if isinstance(x, Tensor))

    for name, module in subject.draft.draft.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: note(name, out))
    subject.step(batches())
    assert any("norm" in name for name in seen) and any("mlp" in name for name in seen)
    assert {dtype for dtypes in seen.values() for dtype in dtypes} == {torch.bfloat16}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in subject.draft.draft.parameters())


@pytest.mark.parametrize("loss", ["ce", "kl", "tv", "ramp"])
def test_draft_gradient_is_the_objective_over_the_rows_of_all_micro_batches(loss: str) -> None:
    subject = trainer(config(draft={"loss": loss}))
    [whole] = batches(budget=1000)
    head = DraftHead.attach(subject.model, EAGLE, None, torch.Generator().manual_seed(1))
    sampled = whole.loss_mask.nonzero().squeeze(1)
    with torch.no_grad():
        hidden, states = subject._run(subject.model, subject.draft.draft, whole)
        logits = hidden @ head_weight(subject.model).T
    logprobs = torch.zeros(len(hidden))
    logprobs[sampled] = torch.log_softmax(logits, -1)[sampled - 1, whole.tokens[sampled]]
    direct = objective(
        head,
        embed_weight(subject.model).detach(),
        head_weight(subject.model).detach(),
        hidden,
        states,
        whole.layout,
        whole.tokens,
        whole.loss_mask,
        torch.logsumexp(logits, -1),
        logprobs,
        depth=3,
        loss=loss,
        ramp=0.0,
        rule="target",
        temperature=1.0,
    )
    (direct.loss_sum / direct.rows[0]).backward()
    terms = subject.step(batches(budget=1))
    assert_near(gradients(subject.draft.draft), gradients(head), 1e-5)
    assert terms.draft == pytest.approx(direct.loss_sum.item() / direct.rows[0], rel=1e-5)
    by_depth = (direct.loss_by_depth / torch.tensor(direct.rows)).tolist()
    assert terms.draft_by_depth == pytest.approx(by_depth, rel=1e-5)
    assert terms.draft_seconds > 0


def test_ramp_counts_from_the_end_of_the_warm_start() -> None:
    subject = trainer(config(draft={"warmup_lr": 1e-3, "ramp_steps": 4}))
    ramps = []
    for _ in subject.warm_draft(batches(), 2):
        ramps.append(subject.draft.ramp)
    for _ in range(3):
        subject.step(batches())
        ramps.append(subject.draft.ramp)
    assert ramps == [0, 0, 0.25, 0.5, 0.75]
    assert (subject.version, subject.draft_version) == (3, 5)


@torch.no_grad()
def greedy_samples(model: Any) -> list[Sample]:
    """What the policy itself answers at temperature 0, twelve tokens to each prompt."""
    out = []
    for prompt in ([3, 4, 5], [9], [20, 8]):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        out.append(make_sample(prompt, ids[len(prompt) :]))
    return out


def test_warm_start_and_training_raise_acceptance_over_the_frozen_draft() -> None:
    subject = trainer(config(lr=0.0, rollout={"temperature": 0.0}, draft={"loss": "kl"}))
    micro = batches(greedy_samples(oracle_model("llama")))
    first, *_, last = subject.warm_draft(micro, 5)
    assert last.draft < first.draft and last.policy == 0 and last.grad_norm == 0
    subject.freeze_draft()
    terms = [subject.step(micro) for _ in range(80)]
    assert terms[0].acceptance["cotrained"] == terms[0].acceptance["frozen"]
    # the policy stands still here, so the frozen draft's estimate does too
    assert len({t.acceptance["frozen"] for t in terms}) == 1
    frozen, cotrained = (terms[-1].acceptance[name].accept_length for name in ("frozen", "cotrained"))
    assert cotrained > frozen + 0.5


def test_without_training_the_draft_is_only_estimated() -> None:
    on, off = trainer(config()), trainer(config(draft={"train": False}))
    a, b = on.step(batches()), off.step(batches())
    assert a.acceptance == b.acceptance
    assert (b.draft, b.draft_by_depth, b.draft_grad_norm) == (0, (), 0)
    assert trainer(config(), draft=False).step(batches()).acceptance == {}


def test_step_without_sampled_tokens_gives_zeros_and_changes_nothing() -> None:
    subject = trainer(config())
    policy, draft = copies(subject.model), copies(subject.draft.draft)
    terms = subject.step(batches(random_samples([(3, 0), (4, 0)])))
    numbers = [terms.policy, terms.entropy, terms.grad_norm, terms.rollout_kl, terms.draft, terms.draft_grad_norm]
    assert numbers == [0.0] * 6
    assert_same(copies(subject.model), policy)
    assert_same(copies(subject.draft.draft), draft)
    assert (subject.version, subject.draft_version) == (1, 0)
    # responses of one token train the policy, but no draft row counts
    terms = subject.step(batches(random_samples([(3, 1), (4, 1)])))
    assert terms.grad_norm > 0 and terms.draft == 0 and subject.draft_version == 0
    assert_same(copies(subject.draft.draft), draft)


def test_gradient_checkpointing_changes_no_gradient_and_does_recompute(family: str) -> None:
    results = []
    for on in (False, True):
        subject = trainer(config(gradient_checkpointing=on), family=family)
        calls: list[int] = []
        # before the forward, since recomputing stops as soon as it has what the backward needs
        subject.model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        subject.step(batches(budget=1000))
        assert len(calls) == 1 + on
        results.append(gradients(subject.model))
    assert_near(results[1], results[0], 1e-6)


def test_bfloat16_is_near_float32_with_float32_weights(family: str) -> None:
    exact, half = (trainer(config(), family=family, dtype=t) for t in (torch.float32, torch.bfloat16))
    micro = batches(budget=1000)
    a, b = exact.logprobs(micro)[0], half.logprobs(micro)[0]
    assert not torch.equal(a, b)
    assert float((a - b).abs().mean()) < 0.05
    one, two = exact.step(micro), half.step(micro)
    assert two.policy == pytest.approx(one.policy, rel=0.1, abs=0.02)
    assert two.draft == pytest.approx(one.draft, rel=0.1, abs=0.02)
    assert {p.dtype for p in (*half.model.parameters(), *half.draft.draft.parameters())} == {torch.float32}
    a, b = (torch.cat([g.flatten() for g in gradients(x.model).values()]) for x in (exact, half))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.98


def test_learning_rate_warms_up() -> None:
    moved = []
    for steps in (0, 4):
        subject = trainer(config(lr_warmup_steps=steps), draft=False)
        before = copies(subject.model)
        subject.step(batches())
        after = copies(subject.model)
        moved.append(max(float((after[n] - before[n]).abs().max()) for n in before))
    # the first step of Adam moves by the learning rate
    assert moved[0] == pytest.approx(1e-2, rel=1e-2) and moved[1] == pytest.approx(2.5e-3, rel=1e-2)


def test_clips_are_separate() -> None:
    subject = trainer(config(clip=1e-3, draft={"clip": 1e-4}))
    terms = subject.step(batches())
    for module, clip, norm in (
        (subject.model, 1e-3, terms.grad_norm),
        (subject.draft.draft, 1e-4, terms.draft_grad_norm),
    ):
        assert norm > 10 * clip
        clipped = torch.cat([g.flatten() for g in gradients(module).values()]).norm()
        assert float(clipped) == pytest.approx(clip, rel=1e-3)


def test_policy_gradient_that_is_not_finite_stops_before_any_weight_changes() -> None:
    subject = trainer(config())
    policy, draft = copies(subject.model), copies(subject.draft.draft)
    micro = batches()
    broken = [replace(micro[0], advantages=micro[0].advantages * float("inf")), *micro[1:]]
    with pytest.raises(FloatingPointError, match="at version 0"):
        subject.step(broken)
    assert_same(copies(subject.model), policy)
    assert_same(copies(subject.draft.draft), draft)
    # and what it left behind does not leak into the next step
    subject.step(micro)
    other = trainer(config())
    other.step(micro)
    assert_same(copies(subject.model), copies(other.model))
    assert_same(copies(subject.draft.draft), copies(other.draft.draft))


def test_draft_gradient_that_is_not_finite_costs_only_that_draft_step(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, healthy = trainer(config()), trainer(config())
    healthy.step(batches())
    draft = copies(subject.draft.draft)

    def broken(*args: Any, **kwargs: Any) -> Any:
        got = objective(*args, **kwargs)
        return replace(got, loss_sum=got.loss_sum * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(draft_trainer, "objective", broken)
        terms = subject.step(batches())
    assert isnan(terms.draft_grad_norm)
    assert (subject.version, subject.draft_version) == (1, 0)
    assert_same(copies(subject.draft.draft), draft)
    assert_same(copies(subject.model), copies(healthy.model))
    assert subject.step(batches()).draft_grad_norm > 0
    assert subject.draft_version == 1


def test_weights_are_the_named_tensors_that_an_engine_serves(family: str) -> None:
    subject: Trainer = trainer(config(), family=family)
    assert isinstance(subject, TorchTrainer)
    target = dict(subject.weights("target"))
    assert target.keys() == dict(subject.model.named_parameters()).keys()
    tied = subject.model.config.tie_word_embeddings
    assert ("lm_head.weight" in target) == (not tied)
    draft = dict(subject.weights("draft"))
    assert {"fc.weight", "fc.bias", "layers.0.self_attn.q_proj.weight"} <= draft.keys()
    before = {n: t.clone() for n, t in {**target, **draft}.items()}
    assert not any(t.requires_grad for t in (*target.values(), *draft.values()))
    subject.step(batches())
    # the same memory: what was handed out has moved with the step
    assert not torch.equal(target["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(draft["fc.weight"], before["fc.weight"])
    with pytest.raises(ValueError, match=r"draft\.enabled"):
        list(trainer(config(), draft=False).weights("draft"))


def test_what_needs_a_draft_says_so() -> None:
    subject = trainer(config(), draft=False)
    for act in (subject.freeze_draft, lambda: list(subject.warm_draft(batches(), 1))):
        with pytest.raises(ValueError, match=r"set draft\.enabled"):
            act()


@with_drafts
@pytest.mark.parametrize("k", [0, 1, 3])
def test_resume_is_bit_for_bit(family: str, spec: DraftSpec, k: int) -> None:
    steps = [batches(random_samples(LENGTHS, seed=seed)) for seed in range(5)]
    run = config(kl_coef=0.1, lr_warmup_steps=3, weight_decay=0.1, clip=0.5, draft={"clip": 0.5, "weight_decay": 0.1})

    def go(subject: TorchTrainer, part: list[list[PackedBatch]]) -> list[Any]:
        out = []
        for micro in part:
            refs = subject.logprobs(micro, reference=True)
            terms = subject.step([replace(b, ref_logprobs=r) for b, r in zip(micro, refs, strict=True)])
            out.append(replace(terms, draft_seconds=0.0))
        return out

    def warmed() -> TorchTrainer:
        subject = trainer(run, family=family, spec=spec)
        list(subject.warm_draft(steps[0], 1))
        subject.freeze_draft()
        return subject

    whole, first = warmed(), warmed()
    expected = go(whole, steps)
    got = go(first, steps[:k])
    torch.rand(3)
    tensors, values = state_of(first)
    data, text = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()}), json.dumps(values)
    draw = torch.rand(3)
    second = trainer(run, family=family, spec=spec)
    second.load_state(safetensors.torch.load(data), json.loads(text))
    assert torch.equal(torch.rand(3), draw)
    got += go(second, steps[k:])
    assert got == expected
    assert (second.version, second.draft_version) == (5, 6)
    a, b = state_of(whole)[0], state_of(second)[0]
    a.pop("random.cpu"), b.pop("random.cpu")
    assert ("draft_optim.lm_head.weight.exp_avg" in a) == spec.own_head
    assert any(n.startswith("frozen.") for n in a) and "policy_optim.model.norm.weight.exp_avg_sq" in a
    assert_same(a, b)
    assert state_of(whole)[1] == state_of(second)[1]


def test_a_state_without_a_frozen_copy_leaves_none() -> None:
    tensors, values = state_of(trainer(config()))
    subject = trainer(config())
    subject.freeze_draft()
    subject.load_state(tensors, values)
    again, same = state_of(subject)
    assert values == same and tensors.keys() == again.keys() and not any(n.startswith("frozen") for n in again)


def test_load_state_names_what_is_wrong_and_changes_nothing() -> None:
    subject = trainer(config())
    subject.step(batches())
    tensors, values = state_of(subject)
    tensors = {n: t.clone() for n, t in tensors.items()}
    name = "policy.model.layers.1.mlp.up_proj.weight"
    fresh = trainer(config())
    before = copies(fresh.model)
    for broken, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"lacks tensor '{name}'"),
        ({**tensors, name: torch.zeros(2, 3)}, rf"'{name}' has shape \[2, 3\]"),
        ({**tensors, "policy.extra": torch.zeros(1)}, "has tensor 'policy.extra'"),
        ({n: t for n, t in tensors.items() if n != "random.cpu"}, "lacks tensor 'random.cpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh.load_state(broken, values)
        assert_same(copies(fresh.model), before)
    with pytest.raises(ValueError, match=r"has tensor 'draft\."):
        trainer(config(), draft=False).load_state(tensors, values)


def test_load_state_refuses_another_draft_vocabulary() -> None:
    def over(ids: list[int]) -> TorchTrainer:
        model = tiny_model()
        head = DraftHead.attach(model, EAGLE, torch.tensor(ids), torch.Generator().manual_seed(1))
        return TorchTrainer(model, head, config(), "cpu")

    tensors, values = state_of(over([1, 2, 5]))
    over([1, 2, 5]).load_state(tensors, values)
    with pytest.raises(ValueError, match=r"draft\.vocab_ids.*another vocabulary"):
        over([1, 2, 6]).load_state(tensors, values)


def test_engine_probabilities_that_differ_are_reported_and_capped() -> None:
    subject = trainer(config(tis_cap=2.0), draft=False)
    samples = random_samples([(3, 4)])
    [batch] = batches(samples, budget=1000)
    own = subject.logprobs([batch])[0]
    shift = torch.tensor([0.0, 0.1, -0.1, 1.0])
    wrong = torch.zeros_like(own)
    wrong[3:] = own[3:] - shift
    terms = subject.step([replace(batch, rollout_logprobs=wrong)])
    assert terms.tis_clip_fraction == 0.25
    assert terms.rollout_logprob_diff == pytest.approx(1.0, abs=1e-5)
    assert terms.rollout_kl == pytest.approx(float((shift.exp() - 1 - shift).mean()), rel=1e-4)
    assert subject.version == 1


def test_a_fitted_draft_is_nearer_to_the_policy_than_a_fresh_one() -> None:
    fitted, fresh = trainer(config()), trainer(config())
    before = {name: t.clone() for name, t in state_of(fitted)[0].items()}
    fitted.fit_draft(batches())
    after = state_of(fitted)[0]
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed == {"draft.fc.weight", "draft.fc.bias"} and fitted.draft_version == 0
    losses = [next(iter(subject.warm_draft(batches(), 1))).draft for subject in (fitted, fresh)]
    assert losses[0] < 0.8 * losses[1], losses


def test_the_learning_rate_of_the_draft_rises_from_the_first_step_on() -> None:
    moved = []
    for warmup in (0, 4):
        subject = trainer(config(draft={"lr": 1e-3, "lr_warmup_steps": warmup}))
        assert subject.draft is not None
        before = {n: p.detach().clone() for n, p in subject.draft.draft.named_parameters()}
        subject.train_draft(batches())
        now = dict(subject.draft.draft.named_parameters())
        moved.append(max(float((now[n] - t).detach().abs().max()) for n, t in before.items()))
    # Adam's first step is the learning rate, whatever the gradient
    assert moved[0] == pytest.approx(1e-3, rel=1e-3) and moved[1] == pytest.approx(0.25e-3, rel=1e-3)


def test_a_share_of_the_micro_batches_teaches_the_draft_and_leaves_the_policy_as_it_is() -> None:
    packs = batches()
    assert len(packs) >= 3
    whole, part, alone = (trainer(config(draft={"share": share})) for share in (1.0, 0.5, 1.0))
    assert part.draft is not None and whole.draft is not None
    taught = [pack for pack in packs if pack.loss_mask.any()]
    chosen = part.draft.choose(len(taught))
    assert len(chosen) == math.ceil(len(taught) / 2) and whole.draft.choose(len(taught)) == list(range(len(taught)))
    terms = part.step(packs)
    expected = alone.train_draft([taught[i] for i in chosen])
    assert terms.draft == pytest.approx(expected.draft, rel=1e-6)
    assert terms.acceptance["cotrained"].verify_steps == expected.acceptance["cotrained"].verify_steps
    whole.step(packs)
    after, only, every = (state_of(subject)[0] for subject in (part, alone, whole))
    learnt = (dict((n, t) for n, t in tensors.items() if n.startswith("draft.")) for tensors in (after, only))
    assert_near(*learnt, 1e-6)
    assert all(torch.equal(after[n], t) for n, t in every.items() if n.startswith("policy"))
    assert part.draft.choose(64) != chosen and part.draft.choose(64) == part.draft.choose(64)


@pytest.mark.parametrize(("updates", "cuts"), [(2, (0, 2, 4)), (3, (0, 1, 2, 4)), (9, (0, 1, 2, 3, 4))])
def test_updates_of_the_draft_within_a_step_are_steps_of_its_own(updates: int, cuts: tuple[int, ...]) -> None:
    draft = {"ramp_steps": 3, "lr_warmup_steps": 3, "lr": 1e-3}
    packs = [pack for pack in batches(budget=1) if pack.loss_mask.any()]
    assert len(packs) == 4
    sampled = {"verify": "rejection"}
    subject, alone, once = (trainer(config(rollout=sampled, draft=draft | {"updates": n})) for n in (updates, 1, 1))
    for one in (subject, alone):
        one.freeze_draft()
        assert one.draft is not None and one.draft.frozen is not None
        with torch.no_grad():
            one.draft.frozen.fc.weight.mul_(0.5)
        one.draft.frozen_version = -1  # another than the one that serves
    expected = [alone.train_draft(packs[start:end]) for start, end in pairwise(cuts)]
    terms = subject.step(packs)
    once.step(packs)
    # the draft moves by each part, at the learning rate and the ramp of that step
    after, steps, whole = (state_of(one)[0] for one in (subject, alone, once))
    learnt = (dict((n, t) for n, t in tensors.items() if n.startswith("draft.")) for tensors in (after, steps))
    assert_near(*learnt, 1e-5)
    assert subject.draft_version == alone.draft_version > 1
    # the policy does not
    assert all(torch.equal(after[n], t) for n, t in whole.items() if n.startswith("policy"))
    # what is estimated is the draft that served
    assert terms.acceptance.keys() == expected[0].acceptance.keys() == {"cotrained", "frozen"}
    for which, estimate in terms.acceptance.items():
        assert estimate.accepted == pytest.approx(expected[0].acceptance[which].accepted, rel=1e-5)
        assert estimate.verify_steps == pytest.approx(expected[0].acceptance[which].verify_steps, rel=1e-5)
    assert terms.acceptance["cotrained"] != terms.acceptance["frozen"]
    counts = [int(draft_targets(p.tokens, p.loss_mask, p.layout, 1).mask.sum()) for p in packs]
    rows = [sum(counts[start:end]) for start, end in pairwise(cuts)]
    mean = sum(n * one.draft for n, one in zip(rows, expected, strict=True)) / sum(rows)
    assert terms.draft == pytest.approx(mean, rel=1e-5)
    assert terms.draft_grad_norm == pytest.approx(max(one.draft_grad_norm for one in expected), rel=1e-4)


def test_an_error_after_an_update_of_the_draft_shows_in_its_version() -> None:
    subject = trainer(config(draft={"updates": 2}))
    packs = [replace(pack, advantages=pack.advantages * float("inf")) for pack in batches()]
    with pytest.raises(FloatingPointError):
        subject.step(packs)
    assert (subject.version, subject.draft_version) == (0, 1)
