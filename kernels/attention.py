"""The attention that Hugging Face models call by the name `miles_spec`, and that of a pack.

A model loaded with `attn_implementation=NAME` computes its projections and rotary embedding as always and hands
queries, keys and values to the `attend` callable that came as a keyword of the model's (or layer's) forward. What is
attended to (a pack, a ragged cache, a draft's chain) is the callable's business alone. Invariant: no query ever sees a
key of another segment, or of a later position in its own.

Sliding windows are not applied here: a model that has them is refused where models are loaded.

Dimensions: `B` batch, `q` query tokens, `Hq`/`Hk` query/key heads, `D` head size, `T` rows of a pack on this rank, `C`
context-parallel ranks, `N` pieces, `P` keys of all pieces' prefixes end to end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from miles_spec.kernels.backend import Backend
from miles_spec.kernels.layout import Ints, PackedLayout

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
        `[B, Hq, q, D]`. Values may be narrower, and so is then what it returns."""
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spans:
    """Runs of queries, each with a run of keys; both lie end to end in the same order.

    A run attends causally, aligned at its end: its last query sees all of its keys, the one before all but the last.
    """

    queries: tuple[int, ...]
    """`[N]` queries of each run, at least 1."""
    keys: tuple[int, ...]
    """`[N]` keys of each run, at least as many as queries."""
    query_offsets: Tensor
    """`[N + 1]` int32, where each run of queries starts."""
    key_offsets: Tensor
    """`[N + 1]` int32, where each run of keys starts."""

    @classmethod
    def make(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Spans:
        """From the lengths of the runs; one copy to `device`."""
        assert all(0 < q <= k for q, k in zip(queries, keys, strict=True))
        offsets = to_device(np.array([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=np.int32), device)
        return cls(queries=tuple(queries), keys=tuple(keys), query_offsets=offsets[0], key_offsets=offsets[1])

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """What a variable-length kernel wants to know."""
        return self.query_offsets, self.key_offsets, max(self.queries), max(self.keys)


class PackedAttention:
    """Causal attention within each segment of a pack; `B` is 1 and `q` is `T`.

    In half precision on a GPU one variable-length flash kernel; else, and with `backend="reference"`, one
    `scaled_dot_product_attention` per piece. Under context parallelism the keys and values of all ranks are gathered
    first, in one collective forward and one backward, so all ranks must call it alike. What padding rows return means
    nothing; a zero gradient for it keeps it out of all others.
    """

    def __init__(self, layout: PackedLayout, backend: Backend = "auto") -> None:
        """Raises `ValueError` if the layout's ranks have no group."""
        device = layout.positions.device
        pieces = layout.pieces
        self.spans = Spans.make([p.end - p.start for p in pieces], [p.end for p in pieces], device)
        self.tokens = layout.tokens
        self.prefixes = _prefixes(layout) if layout.cp_size > 1 and pieces else None
        self.backend = backend

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            out = self.attend(*self.lay_out(query, key, value), scale)
            return out[..., : value.shape[-1]].to(value.dtype)

    def lay_out(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[T, Hq, D]`, keys and values `[P, Hk, D]` of each piece's prefix, as `token_first` makes them."""
        assert query.shape[0] == 1 and query.shape[2] == self.tokens
        q, k, v = token_first(query, key, value)
        return (q, *_Gather.apply(k, v, self.prefixes)) if self.prefixes else (q, k, v)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`[1, Hq, T, D]` from what `lay_out` returns."""
        if not self.spans.queries:
            out = query
        elif takes_flash(query, self.backend):
            out = varlen_attn(
                query, key, value, *self.spans.bounds, scale=scale, window_size=_CAUSAL_WINDOW, **_GROUPED
            )
        else:
            spans = self.spans
            parts = zip(query.split(spans.queries), key.split(spans.keys), value.split(spans.keys), strict=True)
            out = torch.cat([_one_span(q, k, v, scale) for q, k, v in parts])
        return out.transpose(0, 1)[None]


_CAUSAL_WINDOW = (-1, 0)
"""Every earlier key, no later one, in the words of the flash kernels."""


def token_first(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """`[q, H, D]` of each `[1, H, q, D]`, in the dtype to compute in; narrower values, as latent attention has them,
    with zeros behind them: kernels know one size."""
    # under autocast the rotary embedding leaves queries and keys in float32; values show the compute dtype
    dtype = value.dtype
    if not value.is_cuda:
        # flash attention's backward in half precision is several times slower on a CPU than in float32
        dtype = torch.promote_types(dtype, torch.float32)
    missing = query.shape[-1] - value.shape[-1]
    assert missing >= 0, "values are wider than keys"
    return [x[0].transpose(0, 1).to(dtype) for x in (query, key, F.pad(value, (0, missing)) if missing else value)]


def takes_flash(query: Tensor, backend: Backend) -> bool:
    """Whether torch's flash kernels run for `query` `[q, Hq, D]`. The log says once why they do not on a GPU."""
    if not query.is_cuda or backend == "reference":
        return False
    size = query.shape[-1]
    if varlen_attn is None:
        why = "torch has no variable-length attention"
    elif query.dtype not in (torch.bfloat16, torch.float16):
        why = f"it does not take {query.dtype}"
    elif size % 8 or size > 256:
        why = f"it does not take heads of size {size}"
    else:
        return True
    _note_slow_path(why)
    return False


@cache
def _note_slow_path(why: str) -> None:
    log.warning("packed attention on the GPU runs piece by piece: %s", why)


def _one_span(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`[n, Hq, D]` of one run of `n` queries and its `m` keys `[m, Hk, D]`."""
    n, m = query.shape[0], key.shape[0]
    # `is_causal` aligns at the start
    mask = None if n == m else causal_mask(n, m, query.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def causal_mask(n: int, m: int, device: torch.device) -> Tensor:
    """`[n, m]` bool, True where a query sees a key; the last query sees all."""
    return torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prefixes:
    """How the gathered keys and values of all ranks become the prefixes of this rank's pieces.

    Gathered rows lie `[C, 2, T]`: rank, key or value, local row. Laid out they are `2 P`: all keys, then all values.
    """

    index: Tensor
    """`[2 P]` int64, the gathered row of each one laid out."""
    inverse: Tensor
    """`[K, 2 C T]` int64, the up to `K` laid out rows that come from each gathered one; `2 P` for none."""
    group: dist.ProcessGroup
    """The ranks."""

    @classmethod
    def make(cls, layout: PackedLayout) -> _Prefixes:
        """Computed on the host; one copy to the layout's device."""
        size, ranks = layout.tokens, layout.cp_size
        every = [(p.segment, p.start, p.end) for r in range(ranks) for p in layout.pieces_of(r)]
        segment, start, end = np.array(every, dtype=np.int64).T
        longest = np.zeros(segment.max() + 1, dtype=np.int64)
        np.maximum.at(longest, segment, end)
        first = longest.cumsum() - longest
        place = np.empty(ranks * size, dtype=np.int64)
        row = np.arange(ranks * size)
        place[runs(first[segment] + start, end - start)] = row + row // size * size
        own, length = np.array([(p.segment, p.end) for p in layout.pieces], dtype=np.int64).T
        key = place[runs(first[own], length)]
        index = np.concatenate([key, key + size])
        # a segment's second piece on this rank sees again what its first one sees
        slot = np.arange(len(own)) - np.searchsorted(own, own)
        inverse = np.full((slot.max() + 1, 2 * ranks * size), len(index))
        inverse[np.tile(slot.repeat(length), 2), index] = np.arange(len(index))
        moved = to_device(np.concatenate([index, inverse.reshape(-1)]), layout.positions.device)
        return cls(index=moved[: len(index)], inverse=moved[len(index) :].view(inverse.shape), group=layout.group())


@lru_cache(maxsize=1)
def _prefixes(layout: PackedLayout) -> _Prefixes:
    """Made once for the policy and its draft, which run over the same layout one after the other."""
    return _Prefixes.make(layout)


class _Gather(torch.autograd.Function):
    """All ranks' `key` and `value` `[T, Hk, D]` to this rank's prefixes `[P, Hk, D]`.

    Backward adds up what each row's copies received, here and then over ranks, in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, prefixes: _Prefixes) -> tuple[Tensor, Tensor]:
        ctx.prefixes = prefixes
        own = torch.cat([key, value])
        every = own.new_empty(own.shape[0] * dist.get_world_size(prefixes.group), *own.shape[1:])
        dist.all_gather_into_tensor(every, own, group=prefixes.group)
        k, v = every.index_select(0, prefixes.index).chunk(2)
        return k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        prefixes: _Prefixes = ctx.prefixes
        # the last row is what gathered rows receive that nobody here sees
        received = torch.cat([*grads, grads[0].new_zeros(1, *grads[0].shape[1:])])
        every = received.index_select(0, prefixes.inverse[0])
        for more in prefixes.inverse[1:]:
            every += received.index_select(0, more)
        group = prefixes.group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if every.is_cuda:
            own = every.new_empty(every.shape[0] // ranks, *every.shape[1:])
            dist.reduce_scatter_tensor(own, every, group=group)
        else:  # not every torch's gloo has a reduce-scatter
            dist.all_reduce(every, group=group)
            own = every.chunk(ranks)[rank]
        key, value = own.chunk(2)
        return key, value, None


def runs(first: Ints, length: Ints) -> Ints:
    """`first[i], first[i] + 1, ...`, `length[i]` of them for each `i`, end to end."""
    before = length.cumsum() - length
    return np.repeat(first - before, length) + np.arange(length.sum())


def to_device(x: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on `device`; the host does not wait for it."""
    host = torch.from_numpy(x)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
