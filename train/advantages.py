"""Advantages of the responses to one prompt, from their rewards alone.

Invariant: a group whose rewards are all equal has advantages of exactly 0, whatever rounding does to its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt
from typing import Literal

AdvantageKind = Literal["grpo", "rloo", "dr_grpo"]

GRPO_EPSILON = 1e-6
"""Added to the standard deviation, so that rewards that differ by rounding alone are not blown up."""


def advantages(rewards: Sequence[Sequence[float]], kind: AdvantageKind) -> list[list[float]]:
    """One advantage per reward; `rewards[g]` holds the rewards of the group of prompt `g`.

    - `grpo`: `(r - mean) / (std + 1e-6)` with the population's standard deviation, divisor `n` (DeepSeekMath, arXiv
      2402.03300, section 4.1.2, which leaves the divisor open).
    - `rloo`: `r` minus the mean of the group's other rewards (REINFORCE leave-one-out; Ahmadian et al., arXiv
      2402.14740).
    - `dr_grpo`: `r - mean` (Liu et al., arXiv 2503.20783, section 3.2).

    Raises `ValueError` for a group of one under `rloo`, which has no others to compare with.
    """
    return [_group(group, kind) for group in rewards]


def informative(rewards: Sequence[float]) -> bool:
    """Whether the group's rewards differ, so that its advantages are not all 0 (DAPO's dynamic sampling, Yu et al.,
    arXiv 2503.14476, section 3.2)."""
    return any(r != rewards[0] for r in rewards)


def _group(rewards: Sequence[float], kind: AdvantageKind) -> list[float]:
    n = len(rewards)
    if kind == "rloo" and n == 1:
        raise ValueError("train.advantage = 'rloo' needs rollout.samples_per_prompt of at least 2")
    if not informative(rewards):
        return [0.0] * n
    mean = fsum(rewards) / n
    if kind == "dr_grpo":
        return [r - mean for r in rewards]
    if kind == "rloo":
        return [(r - mean) * n / (n - 1) for r in rewards]
    std = sqrt(fsum((r - mean) ** 2 for r in rewards) / n)
    return [(r - mean) / (std + GRPO_EPSILON) for r in rewards]
