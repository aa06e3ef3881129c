"""Which bytes of memory tensors take up, compared exactly whatever their strides.

A *run* is a stretch of bytes without a gap, `[start, end)` in absolute addresses. Runs are int64 `[n, 2]` on the CPU;
*joined* runs are in order, with a gap between any two. Invariant: no memory is read, only addresses are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def runs_of(tensor: Tensor) -> Tensor:
    """`[n, 2]`: where the elements of `tensor` lie; one run if they lie side by side in any order."""
    if tensor.numel() == 0:
        return torch.empty(0, 2, dtype=torch.int64)
    starts, length = torch.tensor([tensor.data_ptr()]), tensor.element_size()
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        step = stride * tensor.element_size()
        if step == length and len(starts) == 1:
            length *= size
        elif size > 1:
            starts = (torch.arange(size)[:, None] * step + starts).view(-1)
    return torch.stack([starts, starts + length], 1)


def joined(runs: Iterable[Tensor]) -> Tensor:
    """`[n, 2]`: the union of all runs, joined."""
    every = torch.cat([torch.empty(0, 2, dtype=torch.int64), *runs])
    if not len(every):
        return every
    every = every[every[:, 0].argsort()]
    ends = every[:, 1].cummax(0).values
    first = torch.ones(len(every), dtype=torch.bool)
    first[1:] = every[1:, 0] > ends[:-1]
    return torch.stack([every[first, 0], ends[first.roll(-1)]], 1)


def covers(union: Tensor, runs: Tensor) -> bool:
    """Whether the joined runs `union` contain every byte of `runs`."""
    index = torch.searchsorted(union[:, 0].contiguous(), runs[:, 0].contiguous(), right=True) - 1
    return bool(((index >= 0) & (_ends(union, index) >= runs[:, 1])).all())


def touches(union: Tensor, runs: Tensor) -> bool:
    """Whether the joined runs `union` contain any byte of `runs`."""
    index = torch.searchsorted(union[:, 0].contiguous(), runs[:, 1].contiguous()) - 1
    return bool(((index >= 0) & (_ends(union, index) > runs[:, 0])).any())


def overlaps(runs: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names with a byte in common; where several share one, each is in a pair but not every pair is named."""
    names = list(runs)
    every = torch.cat([torch.empty(0, 2, dtype=torch.int64), *runs.values()])
    owners = torch.arange(len(names)).repeat_interleave(
        torch.tensor([len(r) for r in runs.values()], dtype=torch.int64)
    )
    if not len(every):
        return []
    order = every[:, 0].argsort(stable=True)
    every, owners = every[order], owners[order]
    ends, longest = every[:, 1].cummax(0)
    before, after = owners[longest[:-1]], owners[1:]
    bad = (every[1:, 0] < ends[:-1]) & (before != after)
    pairs = torch.stack([before, after], 1)[bad].sort(1).values.unique(dim=0)
    return [(names[a], names[b]) for a, b in pairs.tolist()]


def _ends(union: Tensor, index: Tensor) -> Tensor:
    return union[index.clamp(min=0), 1] if len(union) else torch.full_like(index, -1)
