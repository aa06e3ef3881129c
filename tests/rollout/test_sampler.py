from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spec.rollout.sampler import Stream, draw, filtered, uniform
from oracles.statistics import fits


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_uniform_numbers_are_uniform_and_streams_independent() -> None:
    seeds = torch.arange(20_000)
    token = uniform(seeds, torch.full_like(seeds, 5), Stream.TOKEN)
    accept = uniform(seeds, torch.full_like(seeds, 5), Stream.ACCEPT)
    assert token.min() >= 0 and token.max() < 1
    cells = list(zip((token * 8).long().tolist(), (accept * 8).long().tolist(), strict=True))
    assert fits(cells, {(a, b): 1 / 64 for a in range(8) for b in range(8)})


def test_uniform_numbers_along_positions_are_independent() -> None:
    positions = torch.arange(40_001)
    u = uniform(torch.full_like(positions, 3), positions, Stream.TOKEN)
    cells = list(zip((u[:-1] * 8).long().tolist(), (u[1:] * 8).long().tolist(), strict=True))
    # overlapping pairs: every other one, so that the test's draws are independent of each other
    assert fits(cells[::2], {(a, b): 1 / 64 for a in range(8) for b in range(8)})


def test_splitmix64_reference_values() -> None:
    """The first outputs for state 0, as published with the algorithm's reference code."""
    from miles_spec.rollout.sampler import _mix

    expected = 0xE220A8397B1DCDAF
    assert int(_mix(torch.tensor([0]))) % 2**64 == expected


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=700).filter(lambda w: sum(w) > 1e-3),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_draw_inverts_the_cumulated_weights(weights: list[float], u: float) -> None:
    drawn = int(draw(torch.tensor([weights], dtype=torch.float64), torch.tensor([u], dtype=torch.float64)))
    total, before = math.fsum(weights), math.fsum(weights[:drawn])
    assert weights[drawn] > 0
    assert before <= u * total * (1 + 1e-12) + 1e-12
    assert u * total <= (before + weights[drawn]) * (1 + 1e-12) + 1e-12


def test_draw_follows_the_weights() -> None:
    weights = torch.rand(600, generator=torch.Generator().manual_seed(0)) ** 4
    seeds = torch.arange(60_000)
    u = uniform(seeds, torch.zeros_like(seeds), Stream.TOKEN)
    drawn = draw(weights.expand(len(seeds), -1), u).tolist()
    expected = {i: float(w / weights.sum()) for i, w in enumerate(weights)}
    assert fits(drawn, expected)
    wrong = {i: float(w) for i, w in enumerate(weights.roll(1) / weights.sum())}
    assert not fits(drawn, wrong)


@given(st.integers(0, 12), st.floats(0.01, 1.0), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_top_k_and_top_p_against_a_plain_oracle(top_k: int, top_p: float, seed: int) -> None:
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs, _ = filtered(logits, rows(1.0), torch.tensor([top_k]), rows(top_p))
    full = logits[0].softmax(-1).tolist()
    ranked = sorted(range(10), key=lambda i: -full[i])[: top_k or 10]
    mass, kept = sum(full[i] for i in ranked), []
    for i in ranked:
        if kept and sum(full[j] for j in kept) >= top_p * mass - 1e-6:
            break
        kept.append(i)
    expected = [full[i] / sum(full[j] for j in kept) if i in kept else 0.0 for i in range(10)]
    assert probs[0].tolist() == pytest.approx(expected, abs=2e-6)


def test_temperature_is_per_row_and_zero_is_greedy() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]] * 3)
    probs, log_probs = filtered(logits, rows(0.0, 0.5, 1.0), torch.zeros(3, dtype=torch.long), rows(1.0, 1.0, 1.0))
    assert probs[0].tolist() == [0, 1, 0]
    assert torch.allclose(log_probs[0], logits[0].log_softmax(-1))
    assert torch.allclose(probs[1], (logits[1] / 0.5).softmax(-1))
    assert torch.allclose(log_probs[1], (logits[1] / 0.5).log_softmax(-1))
    assert torch.allclose(probs[2], logits[2].softmax(-1))
