"""Labels, masks and positions of draft training, derived from a pack by shifting within segments.

Invariant: a row counts at depth `d` only if every token it reads or predicts lies in its own segment and was sampled by
the policy; that is exactly where serving drafts, because drafting starts after the target has sampled one token.

Dimensions: `T` packed tokens, `D` depths. Depth `d = 1..D` is index `d - 1`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles_spec.kernels.layout import PackedLayout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftTargets:
    """What each row of a pack reads and predicts at each depth.

    Where the token meant lies past the end of the pack, an index is clamped to the last token, so that gathering is
    always safe; such entries, and those that reach into the next segment, are False in `mask`.
    """

    inputs: Tensor
    """`[D, T]` int64, the newest token that row `t` reads at depth `d`: `tokens[t + d]`."""
    labels: Tensor
    """`[D, T]` int64, the token it predicts: `tokens[t + d + 1]`."""
    positions: Tensor
    """`[D, T]` int64, rotary position within the segment: that of `t + d - 1`."""
    teacher: Tensor
    """`[D, T]` int64, the row of the pack whose target distribution is the teacher: `t + d`."""
    mask: Tensor
    """`[D, T]` bool, True where the row counts; `mask[d]` implies `mask[d - 1]`."""
    keys: Tensor
    """`[T]` bool, True where token `t + 1` lies in the segment: the rows that have a depth-1 input, prompts included,
    and so serve as keys."""


def draft_targets(tokens: Tensor, loss_mask: Tensor, layout: PackedLayout, depth: int) -> DraftTargets:
    """Shifts a pack for `depth` draft steps; no host synchronisation.

    `tokens` `[T]` int64; `loss_mask` `[T]` bool, True where the policy sampled the token. Raises `ValueError` for a
    depth below 1.
    """
    if depth < 1:
        raise ValueError(f"draft depth must be at least 1, not {depth}")
    size = tokens.shape[0]
    assert loss_mask.shape == (size,) and layout.tokens == size
    row = torch.arange(size, device=tokens.device)
    ahead = row + torch.arange(1, depth + 2, device=tokens.device)[:, None]  # [D + 1, T], t + 1 .. t + D + 1
    index = ahead.clamp(max=size - 1)
    inside = (ahead < size) & (layout.segments[index] == layout.segments)
    sampled = (inside & loss_mask[index]).cumprod(0).bool()
    shifted = tokens[index]
    return DraftTargets(
        inputs=shifted[:-1],
        labels=shifted[1:],
        positions=layout.positions + torch.arange(depth, device=tokens.device)[:, None],
        teacher=index[:-1],
        mask=sampled[1:],
        keys=inside[0],
    )
