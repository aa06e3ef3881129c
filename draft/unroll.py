"""Runs a draft over a pack at every depth, feeding it its own states as serving does.

Invariant: the target's hidden states and embedding come in detached, so no gradient can leave the draft.

Dimensions: `T` rows of a pack on this rank, `D` depths, `R` rows that depths from 2 on run, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.attention import Attend, PackedAttention, to_device
from miles_spec.kernels.backend import Backend
from miles_spec.kernels.chain_attention import ChainAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.linear import vocab_rows
from miles_spec.kernels.shift import DraftTargets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unrolled:
    """A draft's states over a pack before the LM head, at every depth."""

    states: list[Tensor]
    """`D` tensors: `[T, H]` at depth 1, `[R, H]` at deeper ones."""
    rows: Tensor
    """`[R]` int64, ascending, the rows that deeper depths run; holds every row of `DraftTargets.mask[1]`. Empty if `D`
    is 1."""
    place: Tensor
    """`[T]` int64, where each row is in `rows`; 0 for those that are not."""

    @property
    def flat(self) -> Tensor:
        """`[T + (D - 1) * R, H]`, the states of all depths, made at each call."""
        return torch.cat(self.states)

    def index(self, depth: Tensor, row: Tensor) -> Tensor:
        """Where in `flat` the state of `row` is at `depth`, 0 to `D - 1`; int64 tensors of one shape, as is the result.

        A row outside `rows` has no deeper state; its index there is that of another row's.
        """
        size, deeper = len(self.place), len(self.rows)
        return torch.where(depth == 0, row, size + (depth - 1) * deeper + self.place[row])


def unroll(
    head: DraftHead,
    embed_weight: Tensor,
    states: Tensor,
    targets: DraftTargets,
    layout: PackedLayout,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
) -> Unrolled:
    """The draft's states at the depths of `targets`; if there are several, copies one number per piece to the host.

    `embed_weight` `[V, H]`, or with the TP group `group` this rank's share of it, and `states` `[T, S]`, the target's
    that `head` reads, must not require a gradient. Depth 1
    runs every row, since prompts serve as keys; a row without a next token in its segment runs on whatever token its
    target names, and only rows that do not count attend to it. Deeper depths run, of each piece, the rows from the
    first that counts to the end: one set for all of them. What rows that do not count return is finite and means
    nothing.
    """
    assert not states.requires_grad and not embed_weight.requires_grad
    depths, size = targets.mask.shape

    def run(depth: int, rows: Tensor | slice, before: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        embed = vocab_rows(embed_weight, targets.inputs[depth, rows], group)
        after, out = head(embed[None], before[None], targets.positions[depth, rows][None], attend)
        return after[0], out[0]

    everywhere = slice(None)
    rows = place = torch.empty(0, dtype=torch.int64, device=states.device)
    if not size:
        outs = [head.enter(states)] * depths
    elif depths == 1:
        _, out = run(0, everywhere, head.enter(states), PackedAttention(layout, backend))
        outs, place = [out], rows.new_zeros(size)
    else:
        chain = ChainAttention(layout, _starts(targets.mask[0], layout), backend)
        rows = chain.rows
        place = rows.new_zeros(size).index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
        state, out = run(0, everywhere, head.enter(states), chain)
        outs, state = [out], state.index_select(0, rows)
        for depth in range(1, depths):
            state, out = run(depth, rows, state, chain.deeper)
            outs.append(out)
    return Unrolled(states=outs, rows=rows, place=place)


def _starts(mask: Tensor, layout: PackedLayout) -> list[int]:
    """The first row of each piece where `mask` `[T]` is True, `T` if there is none; the one copy to the host."""
    size = len(mask)
    first = to_device(np.array([piece.row for piece in layout.pieces]), mask.device)
    row = torch.arange(size, device=mask.device)
    piece = torch.searchsorted(first, row, right=True) - 1
    starts = torch.full_like(first, size)
    return starts.scatter_reduce_(0, piece, torch.where(mask, row, size), "amin").tolist()
