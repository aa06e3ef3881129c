"""Attention over a pack and over a draft's chain: a query at a time in float64, and dense with a mask for gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float) -> Tensor:
    """`[D]` for one `query` `[D]` over lists of `[D]`."""
    scores = torch.stack([query @ key * scale for key in keys])
    return torch.softmax(scores, 0) @ torch.stack(list(values))


def chain(
    depths: Sequence[tuple[Tensor, Tensor, Tensor]], rows: Sequence[int], starts: Sequence[int], scale: float
) -> list[Tensor]:
    """Outputs per depth, `[Hq, T, D]` and then `[Hq, R, D]`. `depths` holds query `[Hq, n, D]`, key and value
    `[Hk, n, D]` of each depth, with `n` `T` and then `R`; `rows` `[R]` the rows of the deeper ones; `starts[t]` is the
    first row of row `t`'s segment."""
    base_key, base_value = depths[0][1:]
    groups = depths[0][0].shape[0] // base_key.shape[0]
    outs = []
    for d, (query, _, _) in enumerate(depths):
        heads = []
        for h in range(query.shape[0]):
            g = h // groups
            line = []
            for n, t in enumerate(rows if d else range(len(starts))):
                keys = [base_key[g, s] for s in range(starts[t], t + 1)]
                values = [base_value[g, s] for s in range(starts[t], t + 1)]
                for j in range(1, d + 1):
                    keys.append(depths[j][1][g, n])
                    values.append(depths[j][2][g, n])
                line.append(attend(query[h, n], keys, values, scale))
            heads.append(torch.stack(line))
        outs.append(torch.stack(heads))
    return outs


def dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`[1, Hq, q, D]` from `query` of that shape, `key` and `value` `[1, Hk, k, D]`, and `visible` `[q, k]` bool."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1) @ value


def dense_chain(depths: Sequence[Sequence[Tensor]], rows: Tensor, segments: Tensor, scale: float) -> list[Tensor]:
    """Outputs per depth, as `dense` gives them. `depths` holds query, key and value of each depth, for all `T` rows and
    then for `rows` `[R]`; `segments` `[T]` the segment of each row."""
    row = torch.arange(len(segments))
    visible = (segments == segments[:, None]) & (row <= row[:, None])
    own = torch.eye(len(rows), dtype=torch.bool)
    outs = []
    for d, (query, _, _) in enumerate(depths):
        mask = torch.cat([visible[rows], *[own] * d], dim=1) if d else visible
        key, value = (torch.cat([x[i] for x in depths[: d + 1]], dim=2) for i in (1, 2))
        outs.append(dense(query, key, value, mask, scale))
    return outs
