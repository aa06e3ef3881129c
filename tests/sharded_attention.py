"""Attention over a pack, run by every rank of a group on its own rows, over gloo or NCCL.

Not in a test module: processes that are spawned for NCCL must be able to import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.chain_attention import ChainAttention
from miles_spec.kernels.layout import PackedLayout, Sharding
from oracles.numbers import relative_error

SHARDINGS: tuple[Sharding, ...] = ("zigzag", "contiguous")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pack and what is run over it."""

    lengths: Sequence[int]
    begin: Sequence[int]
    """The first position of each segment that counts at deeper depths."""
    sharding: Sharding
    depths: int
    """1 for `PackedAttention` alone."""
    shape: tuple[int, int, int] = (4, 2, 8)
    """Query heads, key heads, head size."""
    dtype: torch.dtype = torch.float32


def run(layout: PackedLayout, case: Case) -> tuple[list[Tensor], float]:
    """For each depth the output and the gradients of query, key and value of the rows that count, in the order of the
    whole pack; and the sum of what padding received."""
    heads, key_heads, size = case.shape
    device = layout.positions.device
    starts = [p.row + max(0, case.begin[p.segment] - p.start) for p in layout.pieces]
    chain = ChainAttention(layout, starts)
    every = torch.arange(layout.tokens, device=device)
    counts = layout.real & (layout.positions >= torch.tensor(case.begin, device=device)[layout.segments])
    depths = []
    total = torch.zeros((), dtype=torch.float64, device=device)
    for d in range(case.depths):
        attend = chain.deeper if d else chain if case.depths > 1 else PackedAttention(layout)
        rows = chain.rows if d else every
        g = torch.Generator().manual_seed(d)
        shapes = [(sum(case.lengths), n, size) for n in (heads, key_heads, key_heads, heads)]
        *made, weight = (torch.randn(s, generator=g).to(device, case.dtype) for s in shapes)
        # padding is as wrong as it can be, except that nobody asks for its gradient
        qkv = [layout.shard(x, fill=1e3)[rows].transpose(0, 1)[None].requires_grad_() for x in made]
        out = attend(0, *qkv, size**-0.5)[0].transpose(0, 1)
        out = (out * layout.shard(weight)[rows]).masked_fill(~(counts if d else layout.real)[rows, None, None], 0)
        total = total + out.double().sum()
        depths.append((rows, out, qkv))
    total.backward()
    seen, leaked = [], 0.0
    for rows, out, qkv in depths:
        for x in (out.detach(), *(x.grad[0].transpose(0, 1) for x in qkv)):
            placed = x.new_zeros(layout.tokens, *x.shape[1:])
            placed[rows] = x
            leaked += float(placed[~layout.real].abs().sum())
            seen.append(layout.unshard(placed))
    return seen, leaked


def run_rank(group: dist.ProcessGroup, case: Case) -> tuple[list[Tensor], float]:
    """`run` on this rank's share."""
    return run(PackedLayout.make(case.lengths, cp_group=group, sharding=case.sharding), case)


def check_on_gpu(group: dist.ProcessGroup, cases: Sequence[Case]) -> None:
    """The ranks together against this one alone; the host must never wait for the device."""
    device = torch.device("cuda", torch.cuda.current_device())
    for case in cases:
        layout = PackedLayout.make(case.lengths, device, cp_group=group, sharding=case.sharding)
        got, leaked = run(layout, case)
        want, _ = run(PackedLayout.make(case.lengths, device), case)
        assert leaked == 0
        limit = 1e-5 if case.dtype == torch.float32 else 1e-2
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert relative_error(a, b) < limit, (case, i)
        heads, key_heads, size = case.shape
        qkv = [
            torch.randn(1, n, layout.tokens, size, device=device, dtype=case.dtype).requires_grad_()
            for n in (heads, key_heads, key_heads)
        ]
        torch.cuda.set_sync_debug_mode("error")
        try:
            chain = ChainAttention(layout, [p.row for p in layout.pieces])
            (chain(0, *qkv, 0.1) + chain.deeper(0, *qkv, 0.1)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
