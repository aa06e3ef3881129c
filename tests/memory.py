"""Memory that shows what nobody wrote."""

from __future__ import annotations

import torch


def poison(gib: float = 4.0) -> None:
    """Leaves the GPU's caching allocator with NaN in what it hands out next, large and small."""
    large = [torch.full((int(gib * 2**26),), torch.nan, device="cuda") for _ in range(4)]
    small = [torch.full((128 << i,), torch.nan, device="cuda") for i in range(14) for _ in range(8)]
    del large, small
