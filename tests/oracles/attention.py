"""Attention over a pack and over a draft's chain, one query at a time in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float) -> Tensor:
    """`[D]` for one `query` `[D]` over lists of `[D]`."""
    scores = torch.stack([query @ key * scale for key in keys])
    return torch.softmax(scores, 0) @ torch.stack(list(values))


def chain(
    depths: Sequence[tuple[Tensor, Tensor, Tensor]], rows: Sequence[Sequence[int]], starts: Sequence[int], scale: float
) -> list[Tensor]:
    """`[Hq, Nd, D]` per depth. `depths` holds query `[Hq, Nd, D]`, key and value `[Hk, Nd, D]` of each depth, `rows`
    the rows of each (all for the first), `starts[t]` the first row of row `t`'s segment."""
    base_key, base_value = depths[0][1:]
    groups = depths[0][0].shape[0] // base_key.shape[0]
    outs = []
    for d, (query, _, _) in enumerate(depths):
        heads = []
        for h in range(query.shape[0]):
            g = h // groups
            line = []
            for n, t in enumerate(rows[d]):
                keys = [base_key[g, s] for s in range(starts[t], t + 1)]
                values = [base_value[g, s] for s in range(starts[t], t + 1)]
                for j in range(1, d + 1):
                    at = list(rows[j]).index(t)
                    keys.append(depths[j][1][g, at])
                    values.append(depths[j][2][g, at])
                line.append(attend(query[h, n], keys, values, scale))
            heads.append(torch.stack(line))
        outs.append(torch.stack(heads))
    return outs
