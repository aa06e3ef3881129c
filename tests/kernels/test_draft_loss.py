from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miles_spec.kernels.draft_loss import draft_loss
from miles_spec.types import VerifyRule
from oracles import losses
from oracles.numbers import relative_error

RULES: tuple[VerifyRule, ...] = ("greedy", "target", "rejection")


def _inputs(n: int, reduced: bool, temperature: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Arguments of `draft_loss`; a reduced draft vocabulary holds 30 of 50 tokens and misses some labels."""
    g = torch.Generator().manual_seed(n)
    full = (0.4 * torch.randn(50, 24, generator=g)).to(dtype)
    teacher = torch.randn(n, 24, generator=g).to(dtype)
    states = (teacher + 0.5 * torch.randn(n, 24, generator=g)).to(dtype)
    tokens = torch.randint(0, 50, (n,), generator=g)
    logits = teacher.double() @ full.double().T / temperature
    lse = torch.logsumexp(logits, -1)
    label_logprob = logits.gather(-1, tokens[:, None]).squeeze(-1) - lse
    size = 30 if reduced else 50
    labels = torch.where(tokens < size, tokens, -1)
    if n and not reduced:  # a row whose draft is right
        labels[0] = int((states[0].float() @ full.float().T).argmax())
    return [states, full[:size], labels, teacher, lse.float(), label_logprob.float()]


def _exact(inputs: list[Tensor]) -> list[Tensor]:
    return [x if x.dtype == torch.int64 else x.double() for x in inputs]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("chunk_rows", [4, 1024])
def test_values_and_gradients(
    rule: VerifyRule, reduced: bool, dtype: torch.dtype, limit: float, chunk_rows: int
) -> None:
    temperature = 0.8
    inputs = _inputs(17, reduced, temperature, dtype)
    states = inputs[0].requires_grad_()
    got = draft_loss(*inputs, rule=rule, temperature=temperature, chunk_rows=chunk_rows)
    exact = _exact(inputs)
    exact[0] = exact[0].detach().requires_grad_()
    want = losses.draft_loss(*exact, rule, temperature, dtype)
    for name, a, b in zip(("ce", "kl", "tv"), (got.ce, got.kl, got.tv), want, strict=False):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < limit, name
    if rule == "rejection":
        assert relative_error(got.accept, want[3]) < limit
    else:
        assert torch.equal(got.accept, want[3].float())
    for i, name in enumerate(("ce", "kl", "tv")):
        weight = torch.linspace(-1, 2, 17)
        (a,) = torch.autograd.grad((getattr(got, name) * weight).sum(), states, retain_graph=True)
        (b,) = torch.autograd.grad((want[i] * weight.double()).sum(), exact[0], retain_graph=True)
        assert a.dtype == dtype
        # a second product and its roundings; `p - a` under `target` cancels digits of logits that are not small
        assert relative_error(a, b) < 3 * limit, name


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_sum_of_losses(rule: VerifyRule) -> None:
    inputs = _inputs(9, True, 1.0)
    exact = _exact(inputs)
    for x in (inputs, exact):
        x[0] = x[0].detach().requires_grad_()
    got = draft_loss(*inputs, rule=rule, temperature=0.0)
    want = losses.draft_loss(*exact, rule, 1.0)
    (2 * got.ce.sum() + 3 * got.kl.sum() - got.tv.sum()).backward()
    (2 * want[0].sum() + 3 * want[1].sum() - want[2].sum()).backward()
    assert relative_error(inputs[0].grad, exact[0].grad) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_gradient_of_tv_by_finite_differences(rule: VerifyRule) -> None:
    inputs = _exact(_inputs(6, True, 0.9))
    states = inputs[0].clone().requires_grad_()
    rest = [x.float() if x.is_floating_point() else x for x in inputs[1:]]
    got = draft_loss(states.float(), *rest, rule=rule, temperature=0.9)
    (grad,) = torch.autograd.grad(got.tv.sum(), states)
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(step: float) -> Tensor:
        return losses.draft_loss(states.detach() + step * direction, *inputs[1:], rule, 0.9)[2]

    slope = (at(1e-6) - at(-1e-6)).sum() / 2e-6
    assert abs(float((grad * direction).sum() - slope)) < 1e-5 * float(slope.abs())


@pytest.mark.parametrize("rule", RULES)
def test_acceptance_given_the_token_averages_to_the_expected_one(rule: VerifyRule) -> None:
    """Over tokens drawn from the target, `accept` has mean `1 - tv` for rejection, and `p(argmax q)` for target."""
    states, head, _, teacher, lse, _ = _inputs(1, False, 1.0)
    size = len(head)
    repeat = [x.expand(size, -1) for x in (states, teacher)]
    logp = torch.log_softmax(teacher @ head.T, -1)[0]
    got = draft_loss(repeat[0], head, torch.arange(size), repeat[1], lse.expand(size), logp, rule=rule, temperature=1.0)
    mean = (logp.exp() * got.accept).sum()
    if rule == "rejection":
        torch.testing.assert_close(mean, 1 - got.tv[0])
    else:
        torch.testing.assert_close(mean, logp.exp()[(states[0] @ head.T).argmax()])


@pytest.mark.parametrize("rule", RULES)
def test_draft_equal_to_target(rule: VerifyRule) -> None:
    _, head, labels, teacher, lse, label_logprob = _inputs(8, False, 1.0)
    got = draft_loss(teacher, head, labels, teacher, lse, label_logprob, rule=rule, temperature=1.0)
    assert got.kl.abs().max() < 1e-6
    if rule == "rejection":
        assert got.tv.abs().max() < 1e-6 and (got.accept > 1 - 1e-5).all()


def test_no_rows() -> None:
    inputs = _inputs(0, True, 1.0)
    inputs[0].requires_grad_()
    got = draft_loss(*inputs, rule="rejection", temperature=1.0)
    total = got.ce.sum() + got.kl.sum() + got.tv.sum()
    total.backward()
    assert total == 0 and inputs[0].grad.shape == (0, 24) and got.accept.shape == (0,)


@pytest.mark.parametrize("rule", RULES)
def test_far_apart_distributions_stay_finite(rule: VerifyRule) -> None:
    states, head, labels, teacher, _, _ = _inputs(8, True, 1.0)
    states = (300 * states).requires_grad_()
    teacher = -300 * teacher
    # nearly all of the target's probability lies outside the draft's vocabulary
    lse = torch.logsumexp(teacher @ head.T, -1) + 500
    got = draft_loss(states, head, labels, teacher, lse, torch.full((8,), -50.0), rule=rule, temperature=1.0)
    (got.ce.sum() + got.kl.sum() + got.tv.sum()).backward()
    assert all(x.isfinite().all() for x in (got.ce, got.kl, got.tv, got.accept, states.grad))


def test_only_the_states_get_a_gradient() -> None:
    states, head, labels, teacher, lse, label_logprob = _inputs(8, False, 1.0)
    for x in (states, head, teacher):
        x.requires_grad_()
    got = draft_loss(states, head, labels, teacher, lse, label_logprob, rule="target", temperature=1.0)
    (got.ce + got.kl + got.tv).sum().backward()
    assert states.grad.abs().sum() > 0 and head.grad is None and teacher.grad is None


def test_autocast_computes_as_bfloat16_inputs_would() -> None:
    states, head, *rest = _inputs(8, False, 1.0)
    states.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = draft_loss(states, head, *rest, rule="rejection", temperature=1.0)
        got.kl.sum().backward()
    low = states.detach().bfloat16().requires_grad_()
    rest[1] = rest[1].bfloat16()
    want = draft_loss(low, head.bfloat16(), *rest, rule="rejection", temperature=1.0)
    want.kl.sum().backward()
    assert torch.equal(got.kl, want.kl) and torch.equal(states.grad, low.grad.float())
