"""`ChainAttention`: the attention of a draft that is unrolled over a pack.

This is training-time test (EAGLE-3, Li et al., 2025, arXiv 2503.01840, section 3.1). Invariant: at depth `d` the query
of row `t` sees the depth-1 keys of its own segment up to `t` and the keys of row `t` at depths `2..d`, which is what
serving has in its cache. It sees no key of another segment, of a later position, or of another row's chain.

The depth-1 part is one variable-length flash kernel per depth. With its log-sum-exp the chain's few scores are merged
into its output. Backward calls the flash kernel's backward with the merged output and log-sum-exp: a weight is
`exp(score - lse)` and its score's gradient `weight * (dout . v - dout . out)`, and neither depends on anything else but
the final `out` and `lse`. So depth-1 keys are never copied per depth, and no score is stored.

Dimensions: `T` rows of a pack on this rank, `R` rows that deeper depths run, `J` depths of the chain so far (depths
`2..J+1`), `Hq`/`Hk` query/key heads, `G` query heads per key head, `D` head size, `P` depth-1 keys laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_spec.kernels.attention import (
    PackedAttention,
    Spans,
    causal_mask,
    runs,
    takes_flash,
    to_device,
    token_first,
)
from miles_spec.kernels.backend import Backend, jit, tl, triton, use_triton
from miles_spec.kernels.layout import PackedLayout


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- the depth-1 part: plain torch -----------------------------------------------------------------------------------


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """`[Hk, G * n, D]` from `[n, Hq, D]`."""
    return _wide(x).unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_token(x: Tensor, n: int) -> Tensor:
    """`[n, Hq, D]` from `[Hk, G * n, D]`."""
    return x.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2)


def _scores(query: Tensor, key: Tensor, n: int, scale: float) -> Tensor:
    """`[Hk, G * n, m]` of one run, minus infinity where a query does not see a key; by key head."""
    scores = (query @ key.mT * scale).unflatten(1, (-1, n))
    return scores.masked_fill(~causal_mask(n, key.shape[1], key.device), float("-inf")).flatten(1, 2)


def _split(spans: Spans, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(spans.queries) for x in queries), *(x.split(spans.keys) for x in keys), strict=True)


def _base_reference(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    """`[R, Hq, D]` and log-sum-exp `[Hq, R]`, both at least float32. Scores of one run exist at a time."""
    heads = key.shape[1]
    outs, sums = [], []
    for q, k, v in _split(spans, [query], [key, value]):
        n = len(q)
        scores = _scores(_by_key_head(q, heads), _by_key_head(k, heads), n, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        outs.append(_by_token((scores - lse).exp() @ _by_key_head(v, heads), n))
        sums.append(lse.reshape(-1, n))
    return torch.cat(outs), torch.cat(sums, dim=1)


def _base_reference_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `query`, `key` and `value`, given `out` and `lse` of the whole softmax."""
    heads = key.shape[1]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for g, q, o, s, k, v in _split(spans, [grad, query, out, lse.T], [key, value]):
        n = len(q)
        g, q, o, k, v = (_by_key_head(x, heads) for x in (g, q, o, k, v))
        weights = (_scores(q, k, n, scale) - s.T.reshape(heads, -1, 1)).exp()
        d_scores = weights * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale
        parts.append((_by_token(d_scores @ k, n), (d_scores.mT @ q).transpose(0, 1), (weights.mT @ g).transpose(0, 1)))
    d_query, d_key, d_value = (torch.cat(x) for x in zip(*parts, strict=True))
    return d_query, d_key, d_value


# --- the chain: plain torch ------------------------------------------------------------------------------------------


def _grouped(x: Tensor, heads: int) -> Tensor:
    """`[R, Hk, G, D]` from `[R, Hq, D]`."""
    return _wide(x).unflatten(1, (heads, -1))


def _per_row(lse: Tensor, heads: int) -> Tensor:
    """`[R, Hk, G]` from `[Hq, R]`."""
    return lse.T.unflatten(1, (heads, -1))


def _merge_reference(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Adds the chain to a softmax over other keys.

    `query` `[R, Hq, D]`, `keys` and `values` `[J, R, Hk, D]`, `out` `[R, Hq, D]` and `lse` `[Hq, R]` of the other keys.
    Returns `out` and `lse` of all.
    """
    heads = keys.shape[2]
    scores = torch.einsum("rhgd,jrhd->jrhg", _grouped(query, heads), _wide(keys)) * scale
    before = _per_row(lse, heads)
    total = torch.cat([before[None], scores]).logsumexp(0)
    own = torch.einsum("jrhg,jrhd->rhgd", (scores - total).exp(), _wide(values))
    merged = (before - total).exp()[..., None] * _grouped(out, heads) + own
    return merged.flatten(1, 2), total.flatten(1, 2).T.contiguous()


def _merge_reference_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    d_query: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`d_query` with the chain's part added, and gradients of `keys` and `values`; `out` and `lse` are those of all."""
    heads = keys.shape[2]
    q, g = _grouped(query, heads), _grouped(grad, heads)
    k, v = _wide(keys), _wide(values)
    weights = (torch.einsum("rhgd,jrhd->jrhg", q, k) * scale - _per_row(lse, heads)).exp()
    delta = (g * _grouped(out, heads)).sum(-1)
    d_scores = weights * (torch.einsum("rhgd,jrhd->jrhg", g, v) - delta) * scale
    d_query = d_query + torch.einsum("jrhg,jrhd->rhgd", d_scores, k).flatten(1, 2)
    d_keys = torch.einsum("jrhg,rhgd->jrhd", d_scores, q)
    d_values = torch.einsum("jrhg,rhgd->jrhd", weights, g)
    return d_query, d_keys, d_values


# --- the chain: Triton -----------------------------------------------------------------------------------------------
# One program holds a few rows of one key head with all of its query heads: `[BR, BG, BD]`.


@jit(varying=("rows", "depths"))
def _merge_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    rows,
    depths,
    scale,
    heads,
    G: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    head = tl.program_id(1)
    group = tl.arange(0, BG)
    column = tl.arange(0, BD)
    queries = head * G + group
    see_heads = (row < rows)[:, None] & (group < G)[None, :]
    see_query = see_heads[:, :, None] & (column < D)[None, None, :]
    see_key = (row < rows)[:, None] & (column < D)[None, :]
    at_query = (row[:, None, None] * (heads * G) + queries[None, :, None]) * D + column[None, None, :]
    at_lse = queries.to(tl.int64)[None, :] * rows + row[:, None]

    query = tl.load(query_ptr + at_query, mask=see_query, other=0.0).to(tl.float32) * scale
    top = tl.load(lse_ptr + at_lse, mask=see_heads, other=0.0)
    out = tl.load(out_ptr + at_query, mask=see_query, other=0.0).to(tl.float32)
    # weights are relative to `top`, the largest exponent so far
    total = tl.full([BR, BG], 1.0, tl.float32)
    for j in range(depths):
        at_key = ((row[:, None] + j * rows) * heads + head) * D + column[None, :]
        key = tl.load(key_ptr + at_key, mask=see_key, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + at_key, mask=see_key, other=0.0).to(tl.float32)
        score = tl.sum(query * key[:, None, :], axis=2)
        higher = tl.maximum(top, score)
        keep = tl.exp(top - higher)
        weight = tl.exp(score - higher)
        out = out * keep[:, :, None] + weight[:, :, None] * value[:, None, :]
        total = total * keep + weight
        top = higher
    tl.store(out_ptr + at_query, (out / total[:, :, None]).to(out_ptr.dtype.element_ty), mask=see_query)
    tl.store(lse_ptr + at_lse, top + tl.log(total), mask=see_heads)


@jit(varying=("rows", "depths"))
def _merge_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    d_query_ptr,
    d_key_ptr,
    d_value_ptr,
    rows,
    depths,
    scale,
    heads,
    G: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    head = tl.program_id(1)
    group = tl.arange(0, BG)
    column = tl.arange(0, BD)
    queries = head * G + group
    see_heads = (row < rows)[:, None] & (group < G)[None, :]
    see_query = see_heads[:, :, None] & (column < D)[None, None, :]
    see_key = (row < rows)[:, None] & (column < D)[None, :]
    at_query = (row[:, None, None] * (heads * G) + queries[None, :, None]) * D + column[None, None, :]
    at_lse = queries.to(tl.int64)[None, :] * rows + row[:, None]

    grad = tl.load(grad_ptr + at_query, mask=see_query, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at_query, mask=see_query, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, axis=2)
    query = tl.load(query_ptr + at_query, mask=see_query, other=0.0).to(tl.float32) * scale
    lse = tl.load(lse_ptr + at_lse, mask=see_heads, other=0.0)
    d_query = tl.load(d_query_ptr + at_query, mask=see_query, other=0.0).to(tl.float32)
    for j in range(depths):
        at_key = ((row[:, None] + j * rows) * heads + head) * D + column[None, :]
        key = tl.load(key_ptr + at_key, mask=see_key, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + at_key, mask=see_key, other=0.0).to(tl.float32)
        # where nothing was loaded the weight is 1, and what it multiplies is 0
        weight = tl.exp(tl.sum(query * key[:, None, :], axis=2) - lse)
        d_score = weight * (tl.sum(grad * value[:, None, :], axis=2) - delta)
        d_value = tl.sum(weight[:, :, None] * grad, axis=1)
        d_key = tl.sum(d_score[:, :, None] * query, axis=1)
        d_query += (d_score * scale)[:, :, None] * key[:, None, :]
        tl.store(d_value_ptr + at_key, d_value.to(d_value_ptr.dtype.element_ty), mask=see_key)
        tl.store(d_key_ptr + at_key, d_key.to(d_key_ptr.dtype.element_ty), mask=see_key)
    tl.store(d_query_ptr + at_query, d_query.to(d_query_ptr.dtype.element_ty), mask=see_query)


_ELEMENTS = 2048
"""Elements of a program's `[BR, BG, BD]` block, unless one row alone has more."""


def _launch(kernel: Any, pointers: Sequence[Tensor], keys: Tensor, query_heads: int, scale: float) -> None:
    """Runs a kernel for all rows and key heads; every tensor contiguous."""
    assert all(x.is_contiguous() for x in pointers)
    depths, rows, heads, size = keys.shape
    groups = query_heads // heads
    block_groups, block_size = triton.next_power_of_2(groups), triton.next_power_of_2(size)
    block_rows = max(1, _ELEMENTS // (block_groups * block_size))
    kernel[(triton.cdiv(rows, block_rows), heads)](
        *pointers,
        rows,
        depths,
        scale,
        heads,
        G=groups,
        D=size,
        BR=block_rows,
        BG=block_groups,
        BD=block_size,
        num_warps=4 if block_groups * block_size <= 2 * _ELEMENTS else 8,
    )


def _merge_triton(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `_merge_reference`; overwrites `out` and `lse`."""
    _launch(_merge_kernel, [query, keys, values, out, lse], keys, query.shape[1], scale)
    return out, lse


def _merge_triton_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    d_query: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_merge_reference_backward`; overwrites `d_query`."""
    d_keys, d_values = torch.empty_like(keys), torch.empty_like(values)
    pointers = [grad, query, keys, values, out, lse, d_query, d_keys, d_values]
    _launch(_merge_backward_kernel, pointers, keys, query.shape[1], scale)
    return d_query, d_keys, d_values


# --- both together ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """What stays the same for every depth."""

    spans: Spans
    """Runs of the `R` queries and the prefixes they attend to."""
    scale: float
    """Factor of the scores."""
    flash: bool
    """Whether torch's flash kernels do the depth-1 part."""
    fused: bool
    """Whether Triton does the chain."""


_CAUSAL = {"window_size_left": -1, "window_size_right": 0}


class _Chain(torch.autograd.Function):
    """`[R, Hq, D]` from `query` of that shape, depth-1 `key` and `value` `[P, Hk, D]`, and `chain`: `J` keys, then `J`
    values, `[R, Hk, D]` each. All contiguous."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, query: Tensor, key: Tensor, value: Tensor, *chain: Tensor) -> Tensor:
        depths = len(chain) // 2
        spans, scale = plan.spans, plan.scale
        keys, values = torch.stack(chain[:depths]), torch.stack(chain[depths:])
        if plan.flash:
            out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
                query, key, value, *spans.bounds, 0.0, True, False, scale=scale, **_CAUSAL
            )
            assert lse.shape == (query.shape[1], len(query))
            ctx.state = state
        else:
            out, lse = _base_reference(query, key, value, spans, scale)
        merge = _merge_triton if plan.fused else _merge_reference
        out, lse = merge(query, keys, values, out, lse, scale)
        out = out.to(query.dtype)
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, out, lse, *chain)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        query, key, value, out, lse, *chain = ctx.saved_tensors
        depths = len(chain) // 2
        spans, scale = plan.spans, plan.scale
        keys, values = torch.stack(chain[:depths]), torch.stack(chain[depths:])
        grad = grads[0].contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            if plan.flash:
                d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
                    grad, query, key, value, out, lse, *spans.bounds, 0.0, True, *ctx.state, scale=scale, **_CAUSAL
                )
            else:
                d_query, d_key, d_value = _base_reference_backward(grad, query, key, value, out, lse, spans, scale)
            merge = _merge_triton_backward if plan.fused else _merge_reference_backward
            d_query, d_keys, d_values = merge(grad, query, keys, values, out, lse, d_query, scale)
        d_base = (d_query, d_key, d_value)
        return None, *(x.to(query.dtype) for x in (*d_base, *d_keys.unbind(), *d_values.unbind()))


class ChainAttention:
    """Attention of a draft that is unrolled over a pack; one layer, `B` is 1.

    Itself the `Attend` of depth 1, which runs all `T` rows and is called once. `deeper` is that of every next depth,
    called once per depth in order, for the rows `rows`: of each piece those from a start to its end. Gradients flow
    into the keys and values of every depth, under context parallelism through the one gather of depth 1.
    """

    rows: Tensor
    """`[R]` int64, ascending, the local rows that deeper depths run; at least one of each piece."""

    def __init__(self, layout: PackedLayout, starts: Sequence[int], backend: Backend = "auto") -> None:
        """`starts`: for each of `layout.pieces` the local row from which on it runs at deeper depths; brought into the
        piece, so that any smaller number means all of its rows and any larger one its last row alone."""
        self.packed = PackedAttention(layout, backend)
        first, count = [], []
        for piece, start in zip(layout.pieces, starts, strict=True):
            end = piece.row + piece.end - piece.start
            first.append(min(max(start, piece.row), end - 1))
            count.append(end - first[-1])
        device = layout.positions.device
        self.rows = to_device(runs(np.array(first, dtype=np.int64), np.array(count, dtype=np.int64)), device)
        # the runs end where the pieces do, so the same prefixes serve, aligned at their ends
        self.spans = Spans.make(count, self.packed.spans.keys, device)
        self.backend = backend
        self.base: tuple[Tensor, Tensor] | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert layer == 0 and self.base is None
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = self.packed.lay_out(query, key, value)
            self.base = k.contiguous(), v.contiguous()
            return self.packed.attend(q, k, v, scale)[..., : value.shape[-1]].to(value.dtype)

    def deeper(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The `Attend` of the next depth; `query` `[1, Hq, R, D]`, `key` and `value` `[1, Hk, R, D]` of `rows`."""
        assert layer == 0 and self.base is not None and query.shape[0] == 1 and query.shape[2] == len(self.rows)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (x.contiguous() for x in token_first(query, key, value))
            self.keys.append(k)
            self.values.append(v)
            if not len(self.rows):
                return query[..., : value.shape[-1]]
            plan = _Plan(
                spans=self.spans,
                scale=scale,
                flash=takes_flash(q, self.backend),
                fused=use_triton(self.backend, q) and q.dtype != torch.float64,
            )
            out = _Chain.apply(plan, q, *self.base, *self.keys, *self.values)
            return out.transpose(0, 1)[None, ..., : value.shape[-1]].to(value.dtype)
