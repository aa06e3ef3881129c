"""Runs a draft over a pack at every depth, feeding it its own states as serving does.

A depth with a layer of its own attends to all rows of its own depth, as in DeepSeek-V3 (2024, arXiv 2412.19437,
equations 21 to 23). Where the last layer is applied again, at depth 2 already if it is the only one, a row attends to
the keys that this layer made of the rows before at its own depth, and to its own chain.

Invariant: the target's hidden states and embedding come in detached, so no gradient can leave the draft.

Dimensions: `T` rows of a pack on this rank, `D` depths, `N` of them with a layer of their own, `R` rows that deeper
ones run, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.attention import Attend, PackedAttention, to_device
from miles_spec.kernels.backend import Backend
from miles_spec.kernels.chain_attention import ChainAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import DraftTargets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unrolled:
    """A draft's states over a pack before the LM head, at every depth."""

    states: list[Tensor]
    """`D` tensors: `[T, H]` at the first `N` depths, `[R, H]` at deeper ones."""
    layers: int
    """`N`, at most `D`."""
    rows: Tensor
    """`[R]` int64, ascending, the rows that depths beyond `N` run; holds every row of `DraftTargets.mask[1]`. Empty if
    there are none."""
    place: Tensor
    """`[T]` int64, where each row is in `rows`; 0 for those that are not."""

    @property
    def flat(self) -> Tensor:
        """`[N * T + (D - N) * R, H]`, the states of all depths, made at each call."""
        return torch.cat(self.states)

    def index(self, depth: Tensor, row: Tensor) -> Tensor:
        """Where in `flat` the state of `row` is at `depth`, 0 to `D - 1`; int64 tensors of one shape, as is the result.

        A row outside `rows` has no deeper state; its index there is that of another row's.
        """
        size, deeper, layers = len(self.place), len(self.rows), self.layers
        again = layers * size + (depth - layers) * deeper + self.place[row]
        return torch.where(depth < layers, depth * size + row, again)


def unroll(
    head: DraftHead,
    embed_weight: Tensor,
    states: Tensor,
    targets: DraftTargets,
    layout: PackedLayout,
    backend: Backend = "auto",
    starts: Sequence[int] | None = None,
) -> Unrolled:
    """The draft's states at the depths of `targets`.

    `embed_weight` `[V, H]` and `states` `[T, S]`, the target's that `head` reads, must not require a gradient. A depth
    with a layer of its own runs every row, since prompts serve as keys; a row without that token in its segment runs on
    whatever token its target names, and only rows that do not count attend to it. Deeper depths run, of each piece, the
    rows from the first that counts to the end: one set for all of them. `starts` are those `first_rows`; left out, they
    are found here, where a layer is applied again. What rows that do not count return is finite and means nothing.
    """
    assert not states.requires_grad and not embed_weight.requires_grad
    depths, size = targets.mask.shape
    layers = min(head.layers, depths)

    def run(depth: int, rows: Tensor | slice, before: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        embed = F.embedding(targets.inputs[depth, rows], embed_weight)
        after, out = head(embed[None], before[None], targets.positions[depth, rows][None], attend, depth + 1)
        return after[0], out[0]

    everywhere = slice(None)
    rows = place = torch.empty(0, dtype=torch.int64, device=states.device)
    if not size:
        outs = [head.enter(states)] * depths
    else:
        chain = None
        if layers < depths:
            starts = first_rows(targets.mask[0], layout) if starts is None else starts
            chain = ChainAttention(layout, list(starts), backend)
        packed = PackedAttention(layout, backend) if chain is None else chain.packed
        state, outs, place = head.enter(states), [], rows.new_zeros(size)
        for depth in range(layers):
            state, out = run(depth, everywhere, state, chain if chain and depth == layers - 1 else packed)
            outs.append(out)
        if chain is not None:
            rows = chain.rows
            place.index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
            state = state.index_select(0, rows)
            for depth in range(layers, depths):
                state, out = run(depth, rows, state, chain.deeper)
                outs.append(out)
    return Unrolled(states=outs, layers=layers, rows=rows, place=place)


def first_rows(mask: Tensor, layout: PackedLayout) -> list[int]:
    """The first row of each piece where `mask` `[T]` is True, `T` if there is none; copied to the host once."""
    size = len(mask)
    first = to_device(np.array([piece.row for piece in layout.pieces]), mask.device)
    row = torch.arange(size, device=mask.device)
    piece = torch.searchsorted(first, row, right=True) - 1
    starts = torch.full_like(first, size)
    return starts.scatter_reduce_(0, piece, torch.where(mask, row, size), "amin").tolist()
