"""Goodness of fit with a stated false-alarm rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch

FALSE_ALARM = 1e-6
"""How often a test that uses `fits` fails though nothing is wrong."""


def p_value(observed: Sequence[Hashable], expected: Mapping[Hashable, float]) -> float:
    """Pearson's chi-square test of `observed` draws against the probabilities `expected`, cells under 5 draws pooled.

    0 where something was drawn that has no probability.
    """
    counts = Counter(observed)
    if any(expected.get(cell, 0) == 0 for cell in counts):
        return 0.0
    n = len(observed)
    large = {cell: p for cell, p in expected.items() if n * p >= 5}
    cells = [(counts[cell], n * p) for cell, p in large.items()]
    rest = n * (1 - sum(large.values()))
    if rest > 1e-6 * n:
        cells.append((n - sum(c for c, _ in cells), rest))
    chi2 = sum((o - e) ** 2 / e for o, e in cells)
    half = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(chi2 / 2, dtype=torch.float64)))


def fits(observed: Sequence[Hashable], expected: Mapping[Hashable, float]) -> bool:
    """Whether `observed` can be draws from `expected`, at the false-alarm rate above."""
    return p_value(observed, expected) >= FALSE_ALARM
