"""The torch trainer on several ranks against the same trainer on one, both in each worker process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import isnan
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from conftest import state_of, tiny_model
from distributed import Ranks
from miles_spec.config import DraftConfig, RunConfig, TrainConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.objective import objective
from miles_spec.draft.spec import EAGLE, EAGLE3
from miles_spec.models import trunk
from miles_spec.train import draft_trainer, fsdp
from miles_spec.train.packing import divide, pack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import LossTerms, PackedBatch
from oracles.samples import random_samples

LENGTHS = [(4, 7), (3, 1), (5, 0), (1, 9), (6, 4)]
ADVANTAGES = [1.0, -0.5, 2.0, 0.25, -1.5]
SUMS, STEPS = 1e-6, 1e-5
"""Tolerances, relative to the largest entry: of sums in float32 that are taken in another order, and of what follows
from steps on those, since AdamW divides each entry by its own size."""
CASES = [("llama", False, 2), ("qwen2", False, 2), ("qwen3_moe", False, 2), ("llama", True, 4)]
"""Family (qwen2's LM head is tied), whether the draft is EAGLE-3, ranks; none of them divides the vocabulary of 61."""


def config(draft: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    more: dict[str, Any] = {"num_steps": 3, "lr": 1e-2, "ramp_steps": 2, "clip": 0.02, "weight_decay": 0.1}
    return RunConfig(
        draft=DraftConfig(**more | (draft or {})),
        train=TrainConfig(**{"lr": 1e-2, "clip": 0.5, "weight_decay": 0.1, "kl_coef": 0.1, **train}),
    )


def trainer(
    run: RunConfig,
    group: dist.ProcessGroup | None,
    family: str = "llama",
    *,
    aux: bool = False,
    draft: bool = True,
    dtype: torch.dtype = torch.float32,
    model: Any = None,
) -> TorchTrainer:
    model = model or tiny_model(family, layers=4 if aux else 2)
    spec = EAGLE3 if aux else EAGLE
    head = DraftHead.attach(model, spec, None, torch.Generator().manual_seed(1)) if draft else None
    return TorchTrainer(model, head, run, "cpu", dtype, group=group)


def packs(seed: int = 0, *, budget: int = 16, lengths: Sequence[tuple[int, int]] = LENGTHS) -> list[PackedBatch]:
    """Three packs by default, and five with a `budget` of 1, of which one has no sampled token."""
    samples = random_samples(lengths, seed=seed)
    options: Any = dict(aggregation="sequence", max_new_tokens=9, minibatches=1, device="cpu")
    [out] = pack(samples, ADVANTAGES[: len(samples)], token_budget=budget, **options)
    return out


def numbers(terms: LossTerms) -> dict[str, float]:
    """All terms but the time, by name."""
    found = {f.name: getattr(terms, f.name) for f in fields(terms) if f.name not in ("draft_seconds", "acceptance")}
    by_depth = found.pop("draft_by_depth")
    found |= {f"draft_by_depth {d}": value for d, value in enumerate(by_depth)}
    for which, estimate in terms.acceptance.items():  # of nothing it may be there or not
        if estimate.verify_steps:
            found |= {f"{which} accepted": estimate.accepted, f"{which} steps": estimate.verify_steps}
    return found


def tensors(subject: TorchTrainer) -> dict[str, Tensor]:
    """All of the state that has a place, whole, on every rank."""
    return {name: fsdp.full(tensor).clone() for name, tensor in subject._owned().items()}


def gradients(subject: TorchTrainer) -> dict[str, Tensor]:
    """Of all parameters, 0 where there is none; whole, on every rank."""
    modules = {"policy": subject.model, **({} if subject.draft is None else {"draft": subject.draft.draft})}
    return {
        f"{part}.{name}": torch.zeros(p.shape) if p.grad is None else fsdp.full(p.grad).clone()
        for part, module in modules.items()
        for name, p in module.named_parameters()
    }


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, *parts: str) -> None:
    """Tensors of each of `parts`, relative to the largest entry of all of its tensors."""
    assert got.keys() == want.keys()
    for part in parts:
        names = [name for name in want if name.startswith(part)]
        scale = max(float(want[name].abs().max()) for name in names)
        worst = max((float((got[n] - want[n]).abs().max()), n) for n in names)
        assert worst[0] <= tolerance * scale, (worst, scale)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and got
    assert [name for name in got if not torch.equal(got[name], want[name])] == []


def assert_sharded(subject: TorchTrainer) -> None:
    """Nothing of policy and reference stays whole on a rank between two calls."""
    for model in [subject.model, *([] if subject.reference is None else [subject.reference])]:
        parameters = list(model.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        assert sum(p.to_local().numel() for p in parameters) < sum(p.numel() for p in parameters)


def step(subject: TorchTrainer, micro: list[PackedBatch]) -> LossTerms:
    """With a reference, as the loop does."""
    references = subject.logprobs(micro, reference=True)
    return subject.step([replace(b, ref_logprobs=r) for b, r in zip(micro, references, strict=True)])


def _as_one(group: dist.ProcessGroup, family: str, aux: bool) -> dict[str, float]:
    one, many = (trainer(config(), g, family, aux=aux) for g in (None, group))
    assert many.logprobs([]) == []
    micro = packs()
    for reference in (False, True):
        for a, b in zip(
            many.logprobs(micro, reference=reference), one.logprobs(micro, reference=reference), strict=True
        ):
            assert torch.equal(a, b)
    names = [name for name, _ in one.weights("target")]
    assert ("lm_head.weight" in names) == (family != "qwen2")
    assert_same(dict(many.weights("target")), dict(one.weights("target")))
    assert_same(dict(many.weights("draft")), dict(one.weights("draft")))
    warm = list(zip(many.warm_draft(micro, 4), one.warm_draft(micro, 4), strict=True))
    for a, b in warm:
        assert numbers(a) == pytest.approx(numbers(b), rel=STEPS, abs=1e-7)
    # one pack after the other, and then the first again
    entropies = [terms.entropy for terms, _ in warm]
    assert len(set(entropies)) == 3 and entropies[3] == entropies[0]
    for subject in (one, many):
        subject.freeze_draft()
    assert_near(tensors(many), tensors(one), STEPS, "draft.", "frozen.")
    # odd and even, more packs than ranks and fewer, packs and a whole minibatch without sampled tokens
    for seed, minibatch in enumerate((packs(1), packs(2, budget=1), packs(3, budget=99), packs(4, lengths=[(3, 0)]))):
        got, want = step(many, minibatch), step(one, minibatch)
        assert numbers(got) == pytest.approx(numbers(want), rel=STEPS, abs=1e-7)
        assert_near(gradients(many), gradients(one), STEPS if seed else SUMS, "policy", "draft")
        assert_sharded(many)
        assert (many.version, many.draft_version) == (one.version, one.draft_version) == (seed + 1, min(seed, 2) + 5)
    got, want = many.train_draft(micro, lr_scale=0.5), one.train_draft(micro, lr_scale=0.5)
    assert numbers(got) == pytest.approx(numbers(want), rel=STEPS, abs=1e-7)
    got, want = many.estimate_draft(micro), one.estimate_draft(micro)
    assert numbers(got) == pytest.approx(numbers(want), rel=STEPS, abs=1e-7)
    assert_near(tensors(many), tensors(one), STEPS, "policy.", "policy_optim.", "draft.", "draft_optim.")
    assert_sharded(many)
    return numbers(got)


@pytest.mark.parametrize(("family", "aux", "size"), CASES, ids=[f"{f}{'-aux' * a}-{n}" for f, a, n in CASES])
def test_several_ranks_do_what_one_does(ranks: Ranks, family: str, aux: bool, size: int) -> None:
    first, *others = ranks.run(_as_one, size, family, aux)
    assert all(other == first for other in others)


def _isolated(group: dist.ProcessGroup) -> None:
    results = []
    for options, present in (({}, True), ({"train": False}, True), ({}, False)):
        subject = trainer(config(options), group, draft=present)
        if present:
            subject.freeze_draft()
        for seed in range(3):
            step(subject, packs(seed))
        both = tensors(subject) | {f"gradient {name}": grad for name, grad in gradients(subject).items()}
        results.append({name: tensor for name, tensor in both.items() if "policy" in name})
        assert subject.draft_version == (3 if present and not options else 0)
    for other in results[1:]:
        assert_same(other, results[0])


def test_policy_is_the_same_bit_for_bit_with_and_without_draft_training(ranks: Ranks) -> None:
    ranks.run(_isolated, 2)


def _resumed(group: dist.ProcessGroup) -> None:
    """Two ranks, one, two again: each goes on from the other's state, which is the same for both."""

    def saved(subject: TorchTrainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What rank 0 would write, on every rank."""
        found, values = state_of(subject)
        assert found.keys() == (subject._owned() | {"random.cpu": None}).keys()
        kept = {name: tensor.clone() for name, tensor in found.items()}
        for tensor in kept.values():
            dist.broadcast(tensor, group=group, group_src=0)
        return kept, values

    run = config(lr_warmup_steps=3)
    first, one, last, whole = (trainer(run, g) for g in (group, None, group, None))
    for subject in (first, whole):
        list(subject.warm_draft(packs(), 2))
        subject.freeze_draft()
    step(first, packs(1))
    before = saved(first)
    torch.rand(3)
    one.load_state(*before)
    after = saved(one)
    assert_same(after[0], before[0])
    assert after[1] == before[1]
    step(one, packs(2))
    # also a state that is loaded between two uses: nothing whole from before may be left
    last.logprobs(packs())
    last.load_state(*saved(one))
    assert_same(saved(last)[0], saved(one)[0])
    for a, b in zip(last.logprobs(packs(3)), one.logprobs(packs(3)), strict=True):
        assert torch.equal(a, b)
    step(last, packs(3))
    for seed in (1, 2, 3):
        step(whole, packs(seed))
    assert (last.version, last.draft_version) == (whole.version, whole.draft_version) == (3, 5)
    assert_near(tensors(last), tensors(whole), STEPS, "policy.", "policy_optim.", "draft.", "draft_optim.", "frozen.")

    found, values = saved(one)
    name = "policy.model.layers.1.mlp.up_proj.weight"
    kept = tensors(last)
    for broken, message in (
        ({**found, name: found[name][:3]}, "has shape"),
        ({**found, "policy.x": found[name]}, "no place"),
    ):
        with pytest.raises(ValueError, match=message):
            last.load_state(broken, values)
        assert_same(tensors(last), kept)


def test_a_run_resumes_on_another_number_of_ranks(ranks: Ranks) -> None:
    ranks.run(_resumed, 2)


def _not_finite(group: dist.ProcessGroup) -> None:
    subject, healthy = (trainer(config(kl_coef=0.0), group) for _ in range(2))
    before, micro = tensors(subject), packs()
    broken = divide(micro, 2)[1][0]
    bad = [replace(b, advantages=b.advantages * float("inf")) if b is broken else b for b in micro]
    with pytest.raises(FloatingPointError, match="at version 0"):
        subject.step(bad)
    assert_same(tensors(subject), before)
    # what it left behind does not leak into the next step
    assert numbers(subject.step(micro)) == numbers(healthy.step(micro))
    assert_same(tensors(subject), tensors(healthy))

    def nan(*args: Any, **kwargs: Any) -> Any:
        got = objective(*args, **kwargs)
        return replace(got, loss_sum=got.loss_sum * float("nan"))

    draft = {n: t for n, t in tensors(subject).items() if n.startswith("draft")}
    healthy.step(micro)
    if group.rank() == 1:
        draft_trainer.objective = nan
    try:
        terms = subject.step(micro)
    finally:
        draft_trainer.objective = objective
    assert isnan(terms.draft_grad_norm) and (subject.version, subject.draft_version) == (2, 1)
    after = tensors(subject)
    assert_same({n: after[n] for n in draft}, draft)
    policy = [n for n in after if n.startswith("policy")]
    other = tensors(healthy)
    assert_same({n: after[n] for n in policy}, {n: other[n] for n in policy})


def test_a_gradient_that_is_not_finite_on_one_rank_alone_changes_nothing_on_any(ranks: Ranks) -> None:
    ranks.run(_not_finite, 2)


def _checkpointed(group: dist.ProcessGroup) -> None:
    results = []
    for on in (False, True):
        subject = trainer(config(gradient_checkpointing=on), group)
        calls: list[int] = []
        layer = trunk(subject.model).layers[0]  # type: ignore[union-attr]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        subject.step(packs())
        assert len(calls) == 2 * (1 + on)  # of three packs and an idle one, two on each rank
        assert_sharded(subject)
        results.append(gradients(subject))
    assert_near(results[1], results[0], SUMS, "policy", "draft")


def test_gradient_checkpointing_changes_no_gradient_and_does_recompute(ranks: Ranks) -> None:
    ranks.run(_checkpointed, 2)


def _half(group: dist.ProcessGroup) -> None:
    models = [tiny_model() for _ in range(2)]
    for model in models:
        for name, p in model.named_parameters():
            if "layernorm" in name:
                # the only weights of a layer that autocast leaves in float32
                p.data = p.data.bfloat16().float()
    one, many = (
        trainer(config(), g, dtype=torch.bfloat16, model=m) for g, m in zip((None, group), models, strict=True)
    )
    micro = packs()
    for reference in (False, True):
        expected = one.logprobs(micro, reference=reference)
        for a, b in zip(many.logprobs(micro, reference=reference), expected, strict=True):
            assert torch.equal(a, b)
    # the draft's gradient is summed up in another order
    assert numbers(step(many, micro)) == pytest.approx(numbers(step(one, micro)), rel=1e-3, abs=1e-6)
    assert {t.dtype for t in tensors(many).values()} == {torch.float32}
    got, want = gradients(many), gradients(one)
    for name, grad in want.items():
        # of norms in the layers they are rounded
        tolerance = 2**-7 if "layernorm" in name else 1e-4
        assert float((got[name] - grad).abs().max()) <= tolerance * float(grad.abs().max()), name


def test_bfloat16_rounds_nothing_that_one_rank_does_not_but_the_norms_of_layers(ranks: Ranks) -> None:
    ranks.run(_half, 2)


def _updated(group: dist.ProcessGroup) -> None:
    micro = packs(budget=1)
    [subject, alone] = [trainer(config({"updates": n, "lr": 1e-3}, kl_coef=0.0), g) for n, g in ((2, group), (1, None))]
    # of three each, one without a sampled token
    shares = divide(micro, 2)
    expected = [
        alone.train_draft([pack for share in shares for pack in share[start:end]]) for start, end in ((0, 1), (1, 3))
    ]
    terms = subject.step(micro)
    assert subject.draft_version == 2
    learnt, want = ({n: t for n, t in tensors(s).items() if n.startswith("draft")} for s in (subject, alone))
    assert_near(learnt, want, 1e-4, "draft.", "draft_optim.")
    served, first = (t.acceptance["cotrained"] for t in (terms, expected[0]))
    assert served.verify_steps == pytest.approx(first.verify_steps, rel=1e-5)
    assert served.accepted == pytest.approx(first.accepted, rel=1e-5)


def test_updates_of_the_draft_within_a_step_are_on_the_same_parts_on_all_ranks(ranks: Ranks) -> None:
    ranks.run(_updated, 2)
