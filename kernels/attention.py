"""The attention that Hugging Face models call by the name `miles_spec`.

A model loaded with `attn_implementation=NAME` computes its projections and rotary embedding as always and hands
queries, keys and values to the `attend` callable that came as a keyword of the model's (or layer's) forward. What is
attended to (a pack, a ragged cache, a draft's chain) is the callable's business alone. Invariant: no query ever sees a
key of another segment, or of a later position in its own.

Sliding windows are not applied here: a model that has them is refused where models are loaded.

Dimensions: `B` batch, `q` query tokens, `Hq`/`Hk` query/key heads, `D` head size, `T` packed tokens, `Nd` rows of a
pack at depth `d`, `L` tokens of a segment.
"""

from __future__ import annotations

import logging
from functools import cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from miles_spec.kernels.layout import PackedLayout

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

NAME = "miles_spec"
# torch 2.11 takes grouped heads as they come, later ones want to be told
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if varlen_attn and "enable_gqa" in signature(varlen_attn).parameters else {}
)

log = logging.getLogger(__name__)


class Attend(Protocol):
    """What a forward pass attends to."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query` `[B, Hq, q, D]`, `key` and `value` `[B, Hk, q, D]` of the tokens at hand, rotary applied; returns
        `[B, Hq, q, D]`."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Attend | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    if attend is None:
        raise ValueError(f"attention {NAME!r} needs the keyword `attend` in the model's forward")
    if softcap is not None:
        raise ValueError("attention with soft-capped scores (Gemma 2) is not supported")
    if dropout:
        raise ValueError("attention dropout is not supported: set attention_dropout to 0 in the model's configuration")
    assert attention_mask is None
    out = attend(module.layer_idx, query, key, value, scaling)  # type: ignore[arg-type]
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)


class PackedAttention:
    """Causal attention within each segment of a pack; `B` is 1 and `q` is `T`.

    In half precision on a GPU one variable-length flash kernel; else one `scaled_dot_product_attention` per segment.
    """

    def __init__(self, layout: PackedLayout) -> None:
        self.lengths = [n for n in layout.lengths if n]
        # the kernel's int32 offsets, made once for all layers
        offsets = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        self.offsets = offsets.to(layout.positions.device, non_blocking=True)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert query.shape[0] == 1 and query.shape[2] == sum(self.lengths)
        if not self.lengths:
            return query
        # under autocast the rotary embedding leaves queries and keys in float32; values show the compute dtype
        dtype = value.dtype
        if query.is_cuda:
            if varlen_attn is not None and dtype in (torch.bfloat16, torch.float16):
                return self._varlen(query.to(dtype), key.to(dtype), value, scale)
            _note_slow_path(dtype)
            return self._segments(query, key, value, scale)
        # flash attention's backward in half precision is several times slower on a CPU than in float32
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            return self._segments(query.to(wide), key.to(wide), value.to(wide), scale).to(dtype)

    def _segments(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = zip(*(x.split(self.lengths, dim=2) for x in (query, key, value)), strict=True)
        grouped = query.shape[1] != key.shape[1]
        outs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
            for q, k, v in parts
        ]
        return torch.cat(outs, dim=2)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = max(self.lengths)
        causal = (-1, 0)
        bounds = (self.offsets, self.offsets, longest, longest)
        out = varlen_attn(q, k, v, *bounds, scale=scale, window_size=causal, **_GROUPED)
        return out.transpose(0, 1)[None]


@cache
def _note_slow_path(dtype: torch.dtype) -> None:
    why = "torch has no variable-length attention" if varlen_attn is None else f"it does not take {dtype}"
    log.warning("packed attention on the GPU runs segment by segment: %s", why)


class ChainAttention:
    """Attention of a draft that is unrolled over a pack; one layer, `B` is 1.

    Itself the `Attend` of depth 1, which runs all `T` rows. `at(rows)` gives that of the next depth, which runs a
    subset: row `t` attends to the depth-1 keys of its segment up to `t` and to its own chain's keys at depths `2..d`,
    as serving does. Gradients flow into the keys and values of every depth (training-time test: EAGLE-3, Li et al.,
    2025, arXiv 2503.01840, section 3.1). Scores of one segment exist at a time; backward makes them again.
    """

    def __init__(self, layout: PackedLayout) -> None:
        self.layout = layout
        self.packed = PackedAttention(layout)
        self.base: tuple[Tensor, Tensor] | None = None
        self.chain: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert layer == 0 and self.base is None
        self.base = key[0], value[0]
        return self.packed(layer, query, key, value, scale)

    def at(self, rows: Tensor) -> Attend:
        """The next depth, for `rows` `[Nd]` int64, ascending, at least one, each among the rows of the depth before.
        Copies their count per segment to the host."""
        counts = torch.bincount(self.layout.segments[rows], minlength=len(self.layout.lengths)).tolist()

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            assert layer == 0 and self.base is not None and query.shape[2] == len(rows)
            self.chain.append((rows, key[0], value[0]))
            keys, values = (
                torch.stack([x[i][:, torch.searchsorted(x[0], rows)] for x in self.chain], dim=2) for i in (1, 2)
            )
            groups = query.shape[1] // key.shape[1]
            q = query[0].unflatten(0, (key.shape[1], groups))
            ends = [0, *accumulate(counts)]
            outs = []
            for (start, end), (first, last) in zip(pairwise(self.layout.offsets), pairwise(ends), strict=True):
                if first == last:
                    continue
                part = slice(first, last)
                base_key, base_value = (x[:, start:end] for x in self.base)
                visible = torch.arange(start, end, device=rows.device) <= rows[part, None]
                inputs = (q[:, :, part], base_key, base_value, keys[:, part], values[:, part], visible, scale)
                outs.append(checkpoint(_chain_segment, *inputs, use_reentrant=False, preserve_rng_state=False))
            return torch.cat(outs, dim=2).flatten(0, 1)[None]

        return attend


def _chain_segment(
    query: Tensor, base_key: Tensor, base_value: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """`[Hk, G, n, D]` from `query` of that shape, `base_*` `[Hk, L, D]`, the rows' own chains `keys` and `values`
    `[Hk, n, d - 1, D]`, `visible` `[n, L]` bool. One softmax in float32 over both kinds of keys."""
    size = base_key.shape[1]
    shared = (query.flatten(1, 2) @ base_key.mT).unflatten(1, query.shape[1:3])
    own = torch.einsum("hgnd,hnmd->hgnm", query, keys)
    scores = torch.cat([shared.masked_fill(~visible, float("-inf")), own], dim=-1).float() * scale
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    mixed = (weights[..., :size].flatten(1, 2) @ base_value).unflatten(1, query.shape[1:3])
    return mixed + torch.einsum("hgnm,hnmd->hgnd", weights[..., size:], values)
