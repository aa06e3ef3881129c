from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distributed import Ranks
from miles_spec.kernels import draft_chunks, sweeps_triton
from miles_spec.kernels.draft_loss import DraftLoss, Mix, draft_loss
from miles_spec.types import VerifyRule
from oracles import losses
from oracles.numbers import relative_error

RULES: tuple[VerifyRule, ...] = ("greedy", "target", "rejection")
FIELDS = ("ce", "kl", "reverse_kl", "tv", "overlap", "chosen", "agree", "entropy", "accept")
MIXES = {
    "ce": Mix(ce=1),
    "kl": Mix(kl=1),
    "reverse_kl": Mix(reverse_kl=1),
    "tv": Mix(tv=1),
    "all": Mix(ce=0.2, kl=0.7, reverse_kl=0.4, tv=1.5),
}
FULL, REDUCED, HIDDEN = 50, 30, 24
VALUES, GRADIENTS = 2e-6, 4e-6
"""Relative distance from float64 that float32 is allowed: processors add up in different orders."""


def _inputs(n: int, *, reduced: bool = False, temperature: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `draft_loss`; a reduced draft vocabulary holds 30 of 50 tokens and misses some labels."""
    g = torch.Generator().manual_seed(100 * n + seed)
    full = 0.4 * torch.randn(FULL, HIDDEN, generator=g)
    teacher = torch.randn(n, HIDDEN, generator=g)
    states = teacher + 0.5 * torch.randn(n, HIDDEN, generator=g)
    tokens = torch.randint(0, FULL, (n,), generator=g)
    size = REDUCED if reduced else FULL
    labels = torch.where(tokens < size, tokens, -1)
    if n and not reduced:  # a row whose draft is right
        labels[0] = tokens[0] = int((states[0] @ full.T).argmax())
    out = {"states": states, "head": full[:size].clone(), "teacher_hidden": teacher, "labels": labels}
    if reduced:
        logits = teacher.double() @ full.double().T / temperature
        lse = torch.logsumexp(logits, -1)
        label_logprob = logits.gather(-1, tokens[:, None]).squeeze(-1) - lse
        out |= {"teacher_lse": lse.float(), "label_logprob": label_logprob.float()}
    return out


def _exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.detach().double() if x.is_floating_point() else x for k, x in inputs.items()}


def _oracle(
    inputs: dict[str, Tensor],
    rule: str,
    temperature: float = 1.0,
    *,
    top_p: float = 1.0,
    rounding: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Every field `[n]` in float64, row by row; all rows, each its own teacher."""
    x = _exact(inputs)
    x["states"].requires_grad_()
    teacher, draft = (losses.product(x[k], x["head"], rounding) / temperature for k in ("teacher_hidden", "states"))
    rows = []
    for i, (label, logits) in enumerate(zip(x["labels"].tolist(), draft, strict=True)):
        optional = {"lse": x.get("teacher_lse"), "label_logprob": x.get("label_logprob")}
        given = {k: v[i] for k, v in optional.items() if v is not None}
        rows.append(losses.draft_row(logits, teacher[i], label, rule, top_p=top_p, **given))
    return {"states": x["states"], **{f: torch.stack([getattr(r, f) for r in rows]) for f in FIELDS}}


def _compare(got: DraftLoss, want: dict[str, Tensor], limit: float) -> None:
    for name in FIELDS:
        value = getattr(got, name)
        assert value.dtype == torch.float32 and not value.requires_grad
        if name == "agree":
            assert torch.equal(value.cpu(), want[name].float())
        else:
            assert relative_error(value.cpu(), want[name]) < limit, name


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_values_and_gradients(backend: Any, rule: VerifyRule, reduced: bool, mix: str) -> None:
    inputs = _inputs(17, reduced=reduced, temperature=0.8)
    inputs["states"].requires_grad_()
    weights = torch.linspace(-1, 2, 17)
    got = draft_loss(
        **inputs, weights=weights, mix=MIXES[mix], rule=rule, temperature=0.8, backend=backend, chunk_rows=7
    )
    want = _oracle(inputs, rule, 0.8)
    _compare(got, want, VALUES)
    total = (weights.double() * losses.mixed(MIXES[mix], want)).sum()
    assert abs(float(got.total.detach() - total.detach())) < 1e-6 * float(
        losses.mixed(MIXES[mix], want).detach().abs().sum()
    )
    (a,) = torch.autograd.grad(3 * got.total, inputs["states"])
    (b,) = torch.autograd.grad(3 * total, want["states"])
    # `p - a` under `target` cancels digits of logits that are not small
    assert relative_error(a, b) < GRADIENTS


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mix", ["kl", "tv", "all"])
def test_gradient_by_finite_differences(rule: VerifyRule, mix: str) -> None:
    inputs = _inputs(6, reduced=True, temperature=0.9)
    states = inputs["states"].requires_grad_()
    got = draft_loss(**inputs, mix=MIXES[mix], rule=rule, temperature=0.9)
    (grad,) = torch.autograd.grad(got.total, states)
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(step: float) -> Tensor:
        moved = {**_exact(inputs), "states": states.detach().double() + step * direction}
        return losses.mixed(MIXES[mix], _oracle(moved, rule, 0.9)).sum().detach()

    slope = float(at(1e-6) - at(-1e-6)) / 2e-6
    moves = grad * direction
    assert abs(float(moves.sum()) - slope) < 1e-6 * float(moves.abs().sum())


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("repeat", "chunk_rows"), [(1, 5), (10, 150)])
def test_end_to_end_weights_of_blocks_that_share_teachers(
    backend: Any, rule: VerifyRule, repeat: int, chunk_rows: int
) -> None:
    """Rows out of order among states, three of a block or fewer, chunks that would cut blocks in two."""
    depths = [3, 3, 1, 2, 3, 3, 2] * repeat
    chain = torch.cat([torch.arange(d) for d in depths])
    teacher_rows = torch.cat([torch.arange(d) + i for i, d in enumerate(depths)])
    n = len(chain)
    source = _inputs(n)
    g = torch.Generator().manual_seed(5)
    rows = torch.randperm(n + 4, generator=g)[:n]
    states = torch.randn(n + 4, HIDDEN, generator=g)
    states[rows] = source["states"]
    states.requires_grad_()
    tokens = torch.randint(0, FULL, (n,), generator=g)
    # a teacher's rows all predict the token that follows it
    full = {**source, "teacher_hidden": source["teacher_hidden"][teacher_rows], "labels": tokens[teacher_rows]}
    got = draft_loss(
        states,
        source["head"],
        source["teacher_hidden"],
        tokens[teacher_rows],
        rows=rows,
        teacher_rows=teacher_rows,
        chain=chain,
        depth=3,
        mix=Mix(kl=0.3, tv=0.7),
        rule=rule,
        backend=backend,
        chunk_rows=chunk_rows,
    )
    want = _oracle(full, rule)
    _compare(got, want, VALUES)
    accepts = (1 - want["tv"]).tolist()
    weights: list[float] = []
    for d in depths:
        weights += losses.block_weights(accepts[len(weights) : len(weights) + d])
    total = (0.3 * want["kl"] + 0.7 * torch.tensor(weights, dtype=torch.float64) * want["tv"]).sum()
    assert abs(float(got.total.detach() - total.detach())) < 1e-5 * repeat
    (a,) = torch.autograd.grad(got.total, states)
    (b,) = torch.autograd.grad(total, want["states"])
    assert relative_error(a[rows], b) < GRADIENTS
    unread = torch.ones(n + 4, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(a[unread], torch.zeros(4, HIDDEN))


def _products(n: int, depth: int, chain: Tensor, teacher_rows: Tensor) -> float:
    """Matrix products of `n` rows that a call takes."""
    source = _inputs(n)
    teacher = source["teacher_hidden"][: int(teacher_rows.max()) + 1]
    rest = {"chain": chain, "depth": depth, "teacher_rows": teacher_rows}
    with FlopCounterMode(display=False) as counter:
        draft_loss(
            source["states"].requires_grad_(),
            source["head"],
            teacher,
            source["labels"],
            mix=Mix(kl=1),
            rule="target",
            **rest,
        )
    return counter.get_total_flops() / (2 * n * FULL * HIDDEN)


def test_depths_share_the_logits_of_a_teacher() -> None:
    chain = torch.arange(3).repeat(40)
    teacher_rows = torch.arange(40).repeat_interleave(3) + chain
    assert _products(120, 3, chain, teacher_rows) == pytest.approx(2 + 1 / 3, rel=0.06)
    # blocks of one row in a run with three depths: sharing would cost more
    assert _products(40, 3, torch.zeros(40, dtype=torch.int64), torch.arange(40)) == 3


def test_two_rows_of_one_depth_may_have_one_teacher() -> None:
    """No draft makes such rows; still no row takes another's place."""
    inputs = _inputs(6)
    teacher_rows = torch.tensor([0, 1, 0, 1, 2, 3])
    chain = torch.tensor([0, 1, 0, 1, 0, 1])
    full = {**inputs, "teacher_hidden": inputs["teacher_hidden"][teacher_rows]}
    got = draft_loss(**inputs, teacher_rows=teacher_rows, chain=chain, depth=2, mix=Mix(kl=1), rule="target")
    _compare(got, _oracle(full, "target"), VALUES)


def test_teacher_rows_far_apart_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the teacher's rows lie, memory stays that of a chunk."""
    inputs = _inputs(8)
    teacher_rows = torch.tensor([7, 0, 6, 1, 5, 2, 4, 3])
    memory: list[int] = []
    monkeypatch.setattr(Tensor, "new_empty", _noting(memory, Tensor.new_empty))
    shared = {**inputs, "teacher_hidden": inputs["teacher_hidden"][teacher_rows.argsort()]}
    got = draft_loss(**shared, teacher_rows=teacher_rows, mix=Mix(kl=1), rule="target", chunk_rows=4)
    assert max(memory) == 4 * FULL
    _compare(got, _oracle(inputs, "target"), VALUES)


def _noting(memory: list[int], real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        out = real(self, *size, **options)
        memory.append(out.numel())
        return out

    return new_empty


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_truncates_the_target(backend: Any, top_p: float) -> None:
    inputs = _inputs(11)
    inputs["states"].requires_grad_()
    got = draft_loss(**inputs, mix=Mix(kl=1, tv=0.5), rule="rejection", top_p=top_p, backend=backend, chunk_rows=4)
    want = _oracle(inputs, "rejection", top_p=top_p)
    kept = [float((losses.nucleus(torch.softmax(x, 0), top_p) > 0).sum()) for x in _teacher(inputs)]
    assert min(kept) < FULL
    for name in ("ce", "kl", "tv", "overlap", "chosen", "entropy"):
        assert relative_error(getattr(got, name), want[name]) < VALUES, name
    assert got.reverse_kl.isinf().all()
    (a,) = torch.autograd.grad(got.total, inputs["states"])
    (b,) = torch.autograd.grad((want["kl"] + 0.5 * want["tv"]).sum(), want["states"])
    assert relative_error(a, b) < GRADIENTS


def _teacher(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["teacher_hidden"] @ inputs["head"].T


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_head_of_the_drafts_own_gets_a_gradient(backend: Any) -> None:
    inputs = _inputs(9)
    own = (
        inputs["head"] + 0.1 * torch.randn(FULL, HIDDEN, generator=torch.Generator().manual_seed(3))
    ).requires_grad_()
    inputs["states"].requires_grad_()
    theirs = inputs.pop("head")
    mix = Mix(kl=1, tv=0.3)
    got = draft_loss(**inputs, head=own, teacher_head=theirs, mix=mix, rule="target", backend=backend, chunk_rows=4)
    a = torch.autograd.grad(2 * got.total, (inputs["states"], own))
    x, w = inputs["states"].detach().double().requires_grad_(), own.detach().double().requires_grad_()
    teacher = inputs["teacher_hidden"].double() @ theirs.double().T
    rows = [losses.draft_row(w @ x[i], teacher[i], int(inputs["labels"][i]), "target") for i in range(9)]
    b = torch.autograd.grad(2 * sum(r.kl + 0.3 * r.tv for r in rows), (x, w))
    assert all(relative_error(p, q) < GRADIENTS for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_strides_do_not_matter(backend: Any) -> None:
    inputs = _inputs(9)
    strided = {k: x.T.contiguous().T if x.dim() == 2 else x.repeat_interleave(2)[::2] for k, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    results = []
    for arguments in (inputs, strided):
        arguments["states"].requires_grad_()
        got = draft_loss(**arguments, mix=Mix(kl=1, ce=1), rule="rejection", backend=backend, chunk_rows=4)
        results.append([got.total.detach(), *torch.autograd.grad(got.total, arguments["states"]), got.accept])
    assert all(relative_error(b, a) < 1e-6 for a, b in zip(*results, strict=True))


def test_logits_of_the_teacher_do_as_well_as_its_states() -> None:
    inputs = _inputs(9)
    want = draft_loss(**inputs, mix=Mix(kl=1), rule="target", chunk_rows=4)
    logits = inputs["teacher_hidden"] @ inputs["head"].T
    got = draft_loss(**{**inputs, "teacher_hidden": logits}, mix=Mix(kl=1), rule="target", chunk_rows=4)
    assert all(relative_error(getattr(got, f), getattr(want, f)) < 1e-6 for f in FIELDS)


def test_the_frozen_head_and_the_teacher_get_no_gradient() -> None:
    inputs = _inputs(8)
    for name in ("states", "teacher_hidden"):
        inputs[name].requires_grad_()
    draft_loss(**inputs, mix=Mix(ce=1, kl=1, tv=1), rule="target").total.backward()
    assert inputs["states"].grad.abs().sum() > 0
    assert inputs["head"].grad is None and inputs["teacher_hidden"].grad is None


@pytest.mark.parametrize("rule", RULES)
def test_without_a_gradient_the_same_values(rule: VerifyRule) -> None:
    inputs = _inputs(9, reduced=True)
    inputs["states"].requires_grad_()
    want = draft_loss(**inputs, mix=Mix(kl=1, tv=1), rule=rule)
    with torch.no_grad():
        got = draft_loss(**inputs, mix=Mix(kl=1, tv=1), rule=rule)
    assert want.total.requires_grad and not got.total.requires_grad
    assert all(relative_error(getattr(got, f), getattr(want, f)) < 1e-7 for f in ("total", *FIELDS))


@pytest.mark.parametrize("rule", RULES)
def test_acceptance_given_the_token_averages_to_the_expected_one(rule: VerifyRule) -> None:
    """Over tokens drawn from the target, `accept` has mean `overlap` for rejection, and `chosen` for the others."""
    inputs = _inputs(1)
    states, teacher = (inputs[k].expand(FULL, -1) for k in ("states", "teacher_hidden"))
    p = torch.softmax(teacher[0] @ inputs["head"].T, -1)
    got = draft_loss(states, inputs["head"], teacher, torch.arange(FULL), mix=Mix(kl=1), rule=rule)
    mean = (p * got.accept).sum()
    torch.testing.assert_close(mean, got.overlap[0] if rule == "rejection" else got.chosen[0])


@pytest.mark.parametrize("rule", RULES)
def test_draft_equal_to_target(rule: VerifyRule) -> None:
    inputs = _inputs(8)
    inputs["states"] = inputs["teacher_hidden"].clone().requires_grad_()
    got = draft_loss(**inputs, mix=Mix(kl=1, reverse_kl=1), rule=rule)
    assert got.kl.abs().max() < 1e-6 and got.reverse_kl.abs().max() < 1e-6 and got.agree.all()
    assert (got.overlap - 1).abs().max() < 1e-6
    if rule == "rejection":
        assert (got.accept > 1 - 1e-5).all()
    (grad,) = torch.autograd.grad(got.total, inputs["states"])
    assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_rows(backend: Any) -> None:
    inputs = _inputs(0, reduced=True)
    inputs["states"].requires_grad_()
    chain = teacher_rows = torch.empty(0, dtype=torch.int64)
    got = draft_loss(
        **inputs,
        mix=Mix(kl=1, tv=1),
        rule="rejection",
        chain=chain,
        depth=3,
        teacher_rows=teacher_rows,
        backend=backend,
    )
    got.total.backward()
    assert got.total == 0 and inputs["states"].grad.shape == (0, HIDDEN) and got.accept.shape == (0,)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: sums that are then taken anew
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rule", RULES)
def test_far_apart_distributions_stay_finite(backend: Any, rule: VerifyRule) -> None:
    inputs = _inputs(8, reduced=True)
    inputs["states"] = (300 * inputs["states"]).requires_grad_()
    inputs["teacher_hidden"] = -300 * inputs["teacher_hidden"]
    # nearly all of the target's probability lies outside the draft's vocabulary
    logits = inputs["teacher_hidden"] @ inputs["head"].T
    inputs |= {"teacher_lse": torch.logsumexp(logits, -1) + 500, "label_logprob": torch.full((8,), -50.0)}
    got = draft_loss(**inputs, mix=Mix(ce=1, kl=1, reverse_kl=1, tv=1), rule=rule, backend=backend)
    got.total.backward()
    assert all(getattr(got, f).isfinite().all() for f in FIELDS) and inputs["states"].grad.isfinite().all()
    want = _oracle(inputs, rule)
    assert relative_error(got.kl, want["kl"]) < VALUES and relative_error(got.ce, want["ce"]) < VALUES


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16(rule: VerifyRule) -> None:
    """Against the exact value of the same bfloat16 inputs, so rounding the logits counts as error; shifted as they are,
    it is much smaller than with logits rounded as a bfloat16 product rounds them."""
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in _inputs(64).items()}
    # tokens that the target samples, as a rollout's are
    p = torch.softmax(_teacher({k: v.float() for k, v in inputs.items()}), -1)
    inputs["labels"] = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    inputs["states"].requires_grad_()
    got = draft_loss(**inputs, mix=MIXES["all"], rule=rule, chunk_rows=24)
    want = _oracle(inputs, rule)
    plain = _oracle(inputs, rule, rounding=torch.bfloat16)
    # `chosen` jumps where two tokens nearly tie
    for name in ("ce", "kl", "reverse_kl", "tv", "overlap", "entropy"):
        value = getattr(got, name)
        assert abs(float(value.double().sum() / want[name].detach().sum()) - 1) < 2e-3, name
        error = relative_error(value, want[name])
        assert error < 5e-3 and error < 0.7 * relative_error(plain[name], want[name]), name
    # rounding moves tokens across `q < p`, so the gradient of TV under rejection is the least exact
    for mix, limit in ((Mix(ce=0.2, kl=0.7, reverse_kl=0.4), 5e-3), (Mix(tv=1), 0.1)):
        (a,) = torch.autograd.grad(draft_loss(**inputs, mix=mix, rule=rule).total, inputs["states"])
        (b,) = torch.autograd.grad(losses.mixed(mix, want).sum(), want["states"], retain_graph=True)
        assert a.dtype == torch.bfloat16 and relative_error(a, b) < limit


def test_autocast_computes_as_bfloat16_inputs_would() -> None:
    inputs = _inputs(8)
    states = inputs["states"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = draft_loss(**inputs, mix=Mix(kl=1), rule="rejection")
        got.total.backward()
    low = {k: v.detach().bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    low["states"].requires_grad_()
    want = draft_loss(**low, mix=Mix(kl=1), rule="rejection")
    want.total.backward()
    assert torch.equal(got.kl, want.kl) and torch.equal(states.grad, low["states"].grad.float())


def _shard(group: dist.ProcessGroup, inputs: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    inputs = {**inputs, "head": inputs["head"].chunk(size)[rank].clone().requires_grad_()}
    inputs["states"].requires_grad_()
    got = draft_loss(**inputs, **options, group=group if size > 1 else None)
    grads = torch.autograd.grad(got.total, (inputs["states"], inputs["head"]))
    return [*(x.detach() for x in grads), got.total.detach(), *(getattr(got, f) for f in FIELDS)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("rule", "top_p"), [("greedy", 1.0), ("target", 0.8), ("rejection", 1.0)])
def test_shards_of_the_vocabulary_give_what_the_whole_does(
    backend: Any, rule: VerifyRule, top_p: float, ranks: Ranks
) -> None:
    inputs = _inputs(13)
    inputs["head"] = inputs["head"][:48].clone()
    inputs["labels"] = inputs["labels"].clamp(max=47)
    mix = Mix(ce=0.3, kl=1, tv=0.5) if top_p < 1 else MIXES["all"]
    options = {"mix": mix, "rule": rule, "top_p": top_p, "temperature": 0.7, "backend": backend, "chunk_rows": 5}
    (whole,) = ranks.run(_shard, 1, inputs, options)
    for size in (2, 4):
        shards = ranks.run(_shard, size, inputs, options)
        head = torch.cat([s[1] for s in shards])
        for shard in shards:
            for name, a, b in zip(
                ("states", "total", *FIELDS), [shard[0], *shard[2:]], [whole[0], *whole[2:]], strict=True
            ):
                assert torch.equal(a, b) if b.isinf().any() else relative_error(a, b) < 1e-6, name
        assert relative_error(head, whole[1]) < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("offset", [0.0, 100.0, -90.0])  # nats from the label's part to the others
def test_parts_of_the_vocabulary_merge(top_p: float, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four programs to a row. With an offset the sums of three overflow unless they are taken anew, or vanish."""
    monkeypatch.setattr(sweeps_triton, "PART", 16)
    inputs = _inputs(9)
    inputs["labels"] = torch.full((9,), 3)
    inputs |= {k: inputs[k].index_fill(1, torch.tensor(0), 1.0) for k in ("states", "teacher_hidden")}
    inputs["head"][16:, 0] = offset
    inputs["states"].requires_grad_()
    results = []
    for backend in ("reference", "triton"):
        got = draft_loss(**inputs, mix=Mix(kl=1, ce=0.1), rule="target", top_p=top_p, backend=backend)
        (grad,) = torch.autograd.grad(got.total, inputs["states"])
        results.append([*(getattr(got, f) for f in FIELDS if f != "reverse_kl"), grad])
    want = _oracle(inputs, "target", top_p=top_p)
    exact = [*(want[f] for f in FIELDS if f != "reverse_kl")]
    for values in results:
        # logits of 100 are less exact than others
        limit = 3e-5 if offset > 0 else GRADIENTS
        assert all(relative_error(a, b) < limit for a, b in zip(values, exact, strict=False))
    assert relative_error(results[1][-1], results[0][-1]) < (3e-4 if offset > 0 else 5e-6)


def test_weights_of_end_to_end_tv() -> None:
    accept = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    accept[2, 3] = 0
    got = draft_chunks.end_to_end_weights(accept)
    for n in range(7):
        torch.testing.assert_close(got[:, n].tolist(), losses.block_weights(accept[:, n].tolist()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix": Mix()}, "all zero"),
        ({"mix": Mix(reverse_kl=1), "top_p": 0.9}, "infinite"),
        ({"top_p": 0.9, "teacher_lse": torch.zeros(4)}, "full vocabulary"),
        ({"teacher_hidden": torch.zeros(4, 7)}, "7 wide"),
        ({"states": torch.zeros(4, HIDDEN, dtype=torch.bfloat16)}, "one dtype"),
    ],
)
def test_mistakes_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**_inputs(4), "mix": Mix(kl=1), "rule": "target", **change}
    with pytest.raises(ValueError, match=message):
        draft_loss(**arguments)
