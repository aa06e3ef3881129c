"""Policy optimization in plain Python floats: advantages, the clipped surrogate, and how token losses are averaged."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from fractions import Fraction
from math import exp


def grpo(rewards: Sequence[float]) -> list[float]:
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(r - mean) / (std + 1e-6) for r in rewards]


def rloo(rewards: Sequence[float]) -> list[float]:
    out = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j != i]
        out.append(float(Fraction(r) - sum(map(Fraction, others)) / len(others)))
    return out


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    return [float(Fraction(r) - sum(map(Fraction, rewards)) / len(rewards)) for r in rewards]


def token_loss(
    logprob: float,
    advantage: float,
    rollout: float,
    old: float,
    *,
    ref: float | None,
    clip_low: float,
    clip_high: float,
    tis_cap: float,
    kl_coef: float,
) -> float:
    ratio = exp(logprob - old)
    bounded = min(ratio, 1 + clip_high) if advantage >= 0 else max(ratio, 1 - clip_low)
    loss = -bounded * advantage
    if tis_cap:
        loss *= min(exp(old - rollout), tis_cap)
    if ref is not None:
        loss += kl_coef * (exp(ref - logprob) - 1 - (ref - logprob))
    return loss


def aggregate(losses: Sequence[Sequence[float]], kind: str, max_new_tokens: int) -> float:
    """`losses[i][j]` of token `j` of sample `i`; samples may be empty."""
    total = sum(sum(sample) for sample in losses)
    if kind == "token":
        count = sum(len(sample) for sample in losses)
        return total / count if count else 0.0
    if kind == "constant":
        return total / (len(losses) * max_new_tokens)
    return sum(sum(sample) / len(sample) for sample in losses if sample) / len(losses)
