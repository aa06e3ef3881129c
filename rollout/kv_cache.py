"""A ragged KV cache: one row per sequence, each at a length of its own.

Invariant: entry `j` of a row is read only by queries at positions `>= j`, and is written before any such query runs.
So what lies beyond a row's length (rejected drafts, padding) never matters and is simply overwritten.

Dimensions: `B` rows at hand, `q` query tokens a row, `Hq`/`Hk` query/key heads, `D` head size of queries and keys, `E`
that of values, `L` longest length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spec.kernels.attention import Attend


class RaggedCache:
    """Keys `[layers][rows, capacity, Hk, D]` and values `[layers][rows, capacity, Hk, E]` of all sequences."""

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        capacity: int,
        heads: int,
        head_size: int,
        value_size: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`value_size` where it is not `head_size`."""
        shape, last = (rows, capacity, heads), value_size or head_size
        self.keys = [torch.zeros(*shape, head_size, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(*shape, last, dtype=dtype, device=device) for _ in range(layers)]

    def attend(self, rows: slice | Tensor, positions: Tensor, longest: int) -> Attend:
        """What a forward of tokens at `positions` `[B, q]` in `rows` attends to: itself and all before it.

        `rows` is a slice for the running batch (read in place) or `[B]` int64 indices (gathered); `longest` is at least
        the largest position of interest plus one, known on the host.
        """
        batch, count = positions.shape
        device = self.keys[0].device
        index = row_index(rows, device)
        hidden = torch.arange(longest, device=device) > positions[..., None]
        mask = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=device).masked_fill_(hidden, float("-inf"))
        groups: dict[int, Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[index, positions] = key.transpose(1, 2).to(keys.dtype)
            values[index, positions] = value.transpose(1, 2).to(values.dtype)
            heads, group = keys.shape[2], query.shape[1] // keys.shape[2]
            if group not in groups:
                groups[group] = mask[:, None, None].expand(-1, 1, group, -1, -1).reshape(batch, 1, group * count, -1)
            # the query heads that share a key head are more queries of it: no copy of keys per query head
            out = F.scaled_dot_product_attention(
                query.reshape(batch, heads, group * count, -1),
                keys[rows, :longest].transpose(1, 2),
                values[rows, :longest].transpose(1, 2),
                attn_mask=groups[group],
                scale=scale,
            )
            return out.reshape(batch, heads * group, count, -1)

        return attend

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copies the first `length` entries of one row to others."""
        for store in (*self.keys, *self.values):
            store[targets, :length] = store[source, :length]


def row_index(rows: slice | Tensor, device: torch.device) -> Tensor:
    """`[B, 1]` int64 of `rows`, for indexing beside positions `[B, q]`."""
    return (torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows)[:, None]
