"""Token losses and their gradients against plain Python."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles_spec.train.losses import policy_loss
from oracles.policy import token_loss

LOGPROB = st.floats(-4, -0.01)
OPTIONS = dict(clip_low=0.2, clip_high=0.28, tis_cap=2.0, kl_coef=0.1)


def vector(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(LOGPROB, LOGPROB, LOGPROB, LOGPROB, st.floats(-2, 2)), min_size=1, max_size=5),
    cap=st.sampled_from([0.0, 1.0, 2.0]),
    reference=st.booleans(),
)
def test_equals_the_oracle(rows: list[tuple[float, ...]], cap: float, reference: bool) -> None:
    logp, old, rollout, ref, advantage = (vector(*column) for column in zip(*rows, strict=True))
    options = {**OPTIONS, "tis_cap": cap}
    got = policy_loss(logp, advantage, rollout, old_logprobs=old, ref_logprobs=ref if reference else None, **options)
    expected = [token_loss(p, a, m, o, ref=r if reference else None, **options) for p, o, m, r, a in rows]
    assert got.losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "clipped"),
    [
        (1.0, 1.5, -1.5, 0),
        (1.27, 1.0, -1.27, 0),
        (1.29, 1.0, 0.0, 1),  # already more likely than allowed: no further push
        (0.5, 1.0, -0.5, 0),  # less likely, though good: pushed back in full
        (0.79, -1.0, 0.0, 1),
        (0.81, -1.0, 0.81, 0),
        (3.0, -1.0, 3.0, 0),
        (3.0, 0.0, 0.0, 0),
    ],
)
def test_clipping(ratio: float, advantage: float, gradient: float, clipped: int) -> None:
    old = -2.0
    logp = vector(old + log(ratio), grad=True)
    options = dict(clip_low=0.2, clip_high=0.28, tis_cap=0, kl_coef=0)
    got = policy_loss(logp, vector(advantage), vector(old), old_logprobs=vector(old), **options)
    got.losses.sum().backward()
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert int(got.clipped) == clipped


def test_on_policy_gradient_is_reinforce() -> None:
    logp = vector(-1.0, -0.3, -2.0, grad=True)
    advantage = vector(1.0, -2.0, 0.5)
    got = policy_loss(logp, advantage, logp.detach(), clip_low=0.2, clip_high=0.2, tis_cap=2, kl_coef=0)
    got.losses.sum().backward()
    assert torch.equal(logp.grad, -advantage)
    assert (float(got.clipped), float(got.tis_capped), float(got.rollout_kl), float(got.rollout_diff)) == (0, 0, 0, 0)


def test_truncated_importance_weight() -> None:
    trainer = vector(log(0.5), log(0.5), log(0.5), grad=True)
    engine = vector(log(0.5), log(0.4), log(0.1))  # true weights 1, 1.25, 5
    options = dict(clip_low=0.2, clip_high=0.2, kl_coef=0)
    got = policy_loss(trainer, vector(1, 1, 1), engine, tis_cap=2, **options)
    got.losses.sum().backward()
    assert trainer.grad.tolist() == pytest.approx([-1, -1.25, -2])  # a constant of the gradient
    assert int(got.tis_capped) == 1
    assert float(got.rollout_diff) == pytest.approx(log(5))
    assert float(got.rollout_kl) == pytest.approx(sum(r - 1 - log(r) for r in (1, 1.25, 5)))
    off = policy_loss(trainer, vector(1, 1, 1), engine, tis_cap=0, **options)
    assert off.losses.tolist() == pytest.approx([-1, -1, -1])
    assert int(off.tis_capped) == 0


def test_a_weight_at_its_cap_is_not_truncated() -> None:
    same = vector(-1.0, -0.3)
    got = policy_loss(same, vector(1, 1), same, clip_low=0.2, clip_high=0.2, tis_cap=1, kl_coef=0)
    assert got.losses.tolist() == [-1, -1] and int(got.tis_capped) == 0


def test_reference_term_pulls_towards_the_reference() -> None:
    logp = vector(-1.0, -2.0, grad=True)
    ref = vector(-2.0, -1.0)
    got = policy_loss(
        logp, vector(0, 0), logp.detach(), ref_logprobs=ref, clip_low=0.2, clip_high=0.2, tis_cap=2, kl_coef=0.5
    )
    got.losses.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0.5 * (1 - exp(-1)), 0.5 * (1 - exp(1))])
    assert float(got.ref_kl) == pytest.approx((exp(-1) - 1 + 1) + (exp(1) - 1 - 1))


def test_no_tokens() -> None:
    none = vector(grad=True)
    got = policy_loss(none, none.detach(), none.detach(), **OPTIONS)
    got.losses.sum().backward()
    assert got.losses.shape == (0,)
    assert [float(x) for x in (got.clipped, got.tis_capped, got.rollout_kl, got.rollout_diff, got.ref_kl)] == [0.0] * 5
