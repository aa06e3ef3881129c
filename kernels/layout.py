"""`PackedLayout`: where each segment of a packed batch lies.

Made once per batch on the host from segment lengths; its tensors are moved to a device once. Invariant: segments are
contiguous, in order, and cover `0..T`.

Dimensions: `T` tokens, `S` segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayout:
    """Segments of a pack."""

    lengths: tuple[int, ...]
    """`[S]` tokens of each segment, on the host; 0 is allowed."""
    positions: Tensor
    """`[T]` int64, the position within its segment, from 0."""
    segments: Tensor
    """`[T]` int64, the index of the segment."""

    @classmethod
    def make(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedLayout:
        """From segment lengths. Raises `ValueError` for a negative one."""
        if any(n < 0 for n in lengths):
            raise ValueError(f"segment lengths must not be negative: {list(lengths)}")
        sizes = torch.tensor(lengths, dtype=torch.int64)
        segments = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
        starts = torch.cumsum(sizes, 0) - sizes
        positions = torch.arange(int(sizes.sum())) - starts[segments]
        return cls(lengths=tuple(lengths), positions=positions.to(device), segments=segments.to(device))

    @property
    def tokens(self) -> int:
        """`T`."""
        return sum(self.lengths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """`[S + 1]` where each segment starts, and `T`."""
        return (0, *accumulate(self.lengths))

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on `device`."""
        return PackedLayout(
            lengths=self.lengths, positions=self.positions.to(device), segments=self.segments.to(device)
        )
