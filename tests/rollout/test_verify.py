"""Speculation never changes the policy: the verify rules, against exact probabilities.

The statistical tests fail by chance once in a million runs each (`oracles.statistics.FALSE_ALARM`); each is also shown
to catch a broken verifier.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from miles_spec.rollout.sampler import Stream, draw, uniform
from miles_spec.rollout.verify import match_choice, reject
from oracles.statistics import fits

V, K, N = 4, 2, 60_000


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """A target `p[prefix]` and a draft `q[prefix]` over `V` tokens, for prefixes of up to `K` tokens, far apart."""
    generator = torch.Generator().manual_seed(seed)
    p, q = ((torch.randn(V**K + V + 1, V, generator=generator, dtype=torch.float64) * 1.5).softmax(-1) for _ in "pq")
    return p, q


def row(tokens: Tensor, length: int) -> Tensor:
    """`[N]` where the first `length` of `tokens` `[N, K + 1]` stand in the tables."""
    if length == 0:
        return torch.zeros(len(tokens), dtype=torch.long)
    return 1 + tokens[:, 0] if length == 1 else 1 + V + tokens[:, 0] * V + tokens[:, 1]


def blocks(verify: Callable[..., tuple[Tensor, Tensor]], rule: str, seed: int = 0) -> list[tuple[int, ...]]:
    """`N` times: draft `K` tokens from the tables, verify, and go on plainly until `K + 1` tokens are out."""
    p, q = tables(seed)
    seeds = torch.arange(N)
    at = torch.arange(K + 1).expand(N, -1)
    drafted, proposals, targets = torch.zeros(N, K + 1, dtype=torch.long), [], []
    for d in range(K + 1):
        prefix = row(drafted, d)
        targets.append(p[prefix])
        if d < K:
            proposals.append(q[prefix])
            u = uniform(seeds, at[:, d], Stream.DRAFT)
            drafted[:, d] = draw(q[prefix], u) if rule == "rejection" else q[prefix].argmax(-1)
    target, draft = torch.stack(targets, 1), drafted[:, :K]
    if rule == "rejection":
        tokens, accepted = verify(target, draft, torch.stack(proposals, 1), seeds, at)
    else:
        tokens, accepted = verify(target, draft, seeds, at)
    for length in range(1, K + 1):
        u = uniform(seeds + N, at[:, length], Stream.TOKEN)
        tokens[:, length] = torch.where(accepted + 1 > length, tokens[:, length], draw(p[row(tokens, length)], u))
    return [tuple(line) for line in tokens.tolist()]


def truth(seed: int = 0) -> dict[tuple[int, ...], float]:
    """The target's own probability of every sequence of `K + 1` tokens, by enumeration."""
    p, _ = tables(seed)
    sequences = list(product(range(V), repeat=K + 1))
    tokens = torch.tensor(sequences)
    chance = torch.ones(len(tokens), dtype=torch.float64)
    for length in range(K + 1):
        chance *= p[row(tokens, length), tokens[:, length]]
    return dict(zip(sequences, chance.tolist(), strict=True))


def test_rejection_is_exact() -> None:
    assert fits(blocks(reject, "rejection"), truth())


def test_target_is_exact() -> None:
    assert fits(blocks(match_choice, "target"), truth())


@pytest.mark.parametrize("broken", ["accepts too much", "no residual", "accepts everything"])
def test_a_broken_verifier_is_caught(broken: str) -> None:
    def verify(p: Tensor, drafted: Tensor, q: Tensor, seeds: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        if broken == "accepts too much":
            return reject(p, drafted, q * 0.8, seeds, at)
        tokens, accepted = reject(p, drafted, q, seeds, at)
        rows = torch.arange(len(p))
        if broken == "no residual":
            tokens[rows, accepted] = draw(p[rows, accepted], uniform(seeds, at[rows, accepted], Stream.TOKEN))
            return tokens, accepted
        return torch.cat([drafted, tokens[:, -1:]], 1), torch.full_like(accepted, K)

    assert not fits(blocks(verify, "rejection"), truth())


def test_acceptance_rates_are_those_of_the_rules() -> None:
    p, q = tables(1)
    seeds, at = torch.arange(N), torch.zeros(N, 2, dtype=torch.long) + torch.arange(2)
    target = p[0].expand(N, 2, V)
    best = q[0].argmax().expand(N, 1)
    _, accepted = match_choice(target, best, seeds, at)
    assert float(accepted.double().mean()) == pytest.approx(float(p[0, q[0].argmax()]), abs=0.01)
    drafted = draw(q[0].expand(N, V), uniform(seeds, at[:, 0], Stream.DRAFT))[:, None]
    _, accepted = reject(target, drafted, q[0].expand(N, 1, V), seeds, at)
    assert float(accepted.double().mean()) == pytest.approx(float(torch.minimum(p[0], q[0]).sum()), abs=0.01)


def test_target_choice_does_not_depend_on_the_draft() -> None:
    p, _ = tables(2)
    target = p[:3].expand(5, 3, V)
    at = torch.arange(3).expand(5, -1)
    one, _ = match_choice(target, torch.zeros(5, 2, dtype=torch.long), torch.arange(5), at)
    other, _ = match_choice(target, torch.full((5, 2), 3), torch.arange(5), at)
    assert torch.equal(one, other)


def test_equal_distributions_are_always_accepted() -> None:
    p, _ = tables(3)
    drafted = draw(p[0].expand(500, V), uniform(torch.arange(500), torch.zeros(500, dtype=torch.long), Stream.DRAFT))
    at = torch.arange(2).expand(500, -1)
    _, accepted = reject(p[0].expand(500, 2, V), drafted[:, None], p[0].expand(500, 1, V), torch.arange(500), at)
    assert bool((accepted == 1).all())
