"""The sweeps of `sweeps` in Triton: tiles of the vocabulary by rows, a program for each part of one and block of other.

Invariant: every kernel writes all of its output. Columns beyond the rows at hand reach none of it; the gradient is 0
there.

Exponents are powers of two, which is what the hardware takes: `scale` brings a logit to that unit. `w` and `u` are the
columns that the blocks of draft and target have in memory, `n` the rows, `V` the vocabulary, `P` parts of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_spec.kernels.backend import jit, tl

TILES = {"stats": (16, 64), "overlap": (16, 128), "gradient": (16, 128), "mass": (16, 128), "merge": (1, 64)}
"""Vocabulary and rows of a tile; with `WARPS` and `STAGES` (tiles in flight) measured on Hopper, the only architecture
in the table so far."""
WARPS, STAGES = 4, 4
PART = 2048
"""Vocabulary of one program."""
ALIGN = 128
"""Columns that rows share must be multiples of this, the widest tile; and columns in memory of half of it, for the sake
of matrix products, which are many times slower where rows start at odd addresses."""


@jit
def _load(z_ptr, t_ptr, ids, cols, t_cols, w, u, border, scale, V, BORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of both blocks, tempered, in units of log 2. What lies outside weighs nothing, and is finite, so that
    nothing times its distance is no NaN.

    Whole rows of memory are read, columns that no row has among them: `w` and `u` are known to be multiples of 16,
    which `n` is not, and a mask that may end anywhere makes loads of two bytes."""
    token = (ids < V)[:, None]
    row = ids.to(tl.int64)[:, None]
    z = tl.load(z_ptr + row * w + cols[None, :], mask=token & (cols < w)[None, :], other=-1.0e30).to(tl.float32) * scale
    t = tl.load(t_ptr + row * u + t_cols[None, :], mask=token & (t_cols < u)[None, :], other=-1.0e30).to(tl.float32)
    if BORDER:
        t = tl.where(t < border[None, :], -1.0e30, t)
    return z, t * scale


@jit
def _columns(border_ptr, n, u, BORDER: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's rows, whether they exist, the target's columns that they read, and their borders. The target's
    columns come round again after `u`, which is a multiple of the block, or more than there are rows."""
    first = tl.program_id(0) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    inside = cols < n
    # told, since the compiler loses it in the remainder: without, loads are of two bytes
    t_cols = tl.multiple_of(first % u, BLOCK_N) + tl.arange(0, BLOCK_N)
    border = cols.to(tl.float32)
    if BORDER:
        border = tl.load(border_ptr + cols, mask=inside, other=0.0)
    return cols, inside, t_cols, border


@jit
def _sums(  # type: ignore[no-untyped-def]
    z_ptr,
    t_ptr,
    cols,
    t_cols,
    border,
    ref_z,
    ref_t,
    start,
    V,
    w,
    u,
    scale,
    BORDER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums of one part relative to the references, and the best of each lane."""
    zero = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    mass_z, mass_t, cross_t, self_z, cross_z, both = zero, zero, zero, zero, zero, zero
    best_z, best_t = zero - float("inf"), zero - float("inf")
    z_id, t_id = tl.zeros([BLOCK_V, BLOCK_N], tl.int32), tl.zeros([BLOCK_V, BLOCK_N], tl.int32)
    for offset in tl.range(0, tl.minimum(PART, V - start), BLOCK_V, num_stages=STAGES):
        ids = start + offset + tl.arange(0, BLOCK_V)
        z, t = _load(z_ptr, t_ptr, ids, cols, t_cols, w, u, border, scale, V, BORDER)
        ez = tl.exp2(z - ref_z[None, :])
        et = tl.exp2(t - ref_t[None, :])
        mass_z += ez
        mass_t += et
        cross_t += et * (t - z)
        self_z += ez * z
        cross_z += ez * (z - t)
        both += ez * et
        more_z, more_t = z > best_z, t > best_t
        best_z = tl.where(more_z, z, best_z)
        best_t = tl.where(more_t, t, best_t)
        z_id = tl.where(more_z, ids[:, None], z_id)
        t_id = tl.where(more_t, ids[:, None], t_id)
    return (
        tl.sum(mass_z, 0),
        tl.sum(mass_t, 0),
        tl.sum(cross_t, 0),
        tl.sum(self_z, 0),
        tl.sum(cross_z, 0),
        tl.sum(both, 0),
        best_z,
        z_id,
        best_t,
        t_id,
    )


@jit(varying=("labels_ptr", "n"))
def _stats_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    t_ptr,
    border_ptr,
    labels_ptr,
    out_ptr,
    V,
    n,
    w,
    u,
    scale,
    first,
    BORDER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols, inside, t_cols, border = _columns(border_ptr, n, u, BORDER, BLOCK_N)
    start = tl.program_id(1) * PART
    ref_z = tl.zeros([BLOCK_N], tl.float32)
    ref_t = tl.zeros([BLOCK_N], tl.float32)
    mass_z, mass_t, cross_t, self_z, cross_z, both, lane_z, z_ids, lane_t, t_ids = _sums(
        z_ptr,
        t_ptr,
        cols,
        t_cols,
        border,
        ref_z,
        ref_t,
        start,
        V,
        w,
        u,
        scale,
        BORDER,
        PART,
        BLOCK_V,
        BLOCK_N,
        STAGES,
    )
    best_z, best_t = tl.max(lane_z, 0), tl.max(lane_t, 0)
    # logits come less an estimate of their largest, so zero is a good reference unless sums overflow or vanish; then
    # they are taken again. Below a border there is nothing to be near to.
    some_t = best_t > -1.0e29
    far_z, far_t = (best_z > 20.0) | (best_z < -60.0), ((best_t > 20.0) | (best_t < -60.0)) & some_t
    if tl.max(tl.where(inside & (far_z | far_t), 1, 0), 0) > 0:
        ref_z = best_z
        ref_t = tl.where(some_t, best_t, 0.0)
        mass_z, mass_t, cross_t, self_z, cross_z, both, lane_z, z_ids, lane_t, t_ids = _sums(
            z_ptr,
            t_ptr,
            cols,
            t_cols,
            border,
            ref_z,
            ref_t,
            start,
            V,
            w,
            u,
            scale,
            BORDER,
            PART,
            BLOCK_V,
            BLOCK_N,
            STAGES,
        )
    none = 2147483647
    best_z_id = tl.min(tl.where(lane_z == best_z[None, :], z_ids, none), 0)
    best_t_id = tl.min(tl.where(lane_t == best_t[None, :], t_ids, none), 0)
    t_at_best = tl.load(t_ptr + best_z_id.to(tl.int64) * u + t_cols, mask=inside, other=0.0).to(tl.float32)
    if BORDER:
        t_at_best = tl.where(t_at_best < border, -1.0e30, t_at_best)
    z_at_best = tl.load(z_ptr + best_t_id.to(tl.int64) * w + cols, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + cols, mask=inside, other=-1)
    here = (label >= start) & (label < start + PART) & inside
    label_z = tl.load(z_ptr + label * w + cols, mask=here, other=0.0).to(tl.float32)
    label_t = tl.load(t_ptr + label * u + t_cols, mask=here, other=0.0).to(tl.float32)
    if BORDER:
        label_t = tl.where(here & (label_t < border), -1.0e30, label_t)
    ln2 = 0.6931471805599453
    out = out_ptr + tl.program_id(1).to(tl.int64) * 16 * n + cols
    tl.store(out, ref_z * ln2, mask=inside)
    tl.store(out + n, mass_z, mask=inside)
    tl.store(out + 2 * n, ref_t * ln2, mask=inside)
    tl.store(out + 3 * n, mass_t, mask=inside)
    tl.store(out + 4 * n, cross_t * ln2, mask=inside)
    tl.store(out + 5 * n, self_z * ln2, mask=inside)
    tl.store(out + 6 * n, cross_z * ln2, mask=inside)
    tl.store(out + 7 * n, both, mask=inside)
    tl.store(out + 8 * n, best_z * ln2, mask=inside)
    tl.store(out + 9 * n, (best_z_id + first).to(tl.float32), mask=inside)
    tl.store(out + 10 * n, t_at_best * scale * ln2, mask=inside)
    tl.store(out + 11 * n, best_t * ln2, mask=inside)
    tl.store(out + 12 * n, (best_t_id + first).to(tl.float32), mask=inside)
    tl.store(out + 13 * n, z_at_best * scale * ln2, mask=inside)
    tl.store(out + 14 * n, label_z * scale * ln2, mask=inside)
    tl.store(out + 15 * n, label_t * scale * ln2, mask=inside)


@jit(varying=("out_ptr", "ids_ptr", "n", "out_step", "ids_step"))
def _merge_kernel(parts_ptr, out_ptr, ids_ptr, P, n, out_step, ids_step, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n
    zero = tl.zeros([BLOCK_N], tl.float32)
    low = zero - 3.0e38
    ref_z, ref_t, best_z, best_t = low, low, low, low
    mass_z, mass_t, cross_t, self_z, cross_z, both = zero, zero, zero, zero, zero, zero
    z_id, t_id, t_at_best, z_at_best, label_z, label_t = zero, zero, zero, zero, zero, zero
    at = parts_ptr + cols
    for _ in range(0, P):
        own_z = tl.load(at + n, mask=inside, other=1.0)
        own_t = tl.load(at + 3 * n, mask=inside, other=1.0)
        # under a border a part of the target may have no mass; its reference then means nothing
        own_ref_z = tl.load(at, mask=inside, other=0.0)
        own_ref_t = tl.where(own_t > 0.0, tl.load(at + 2 * n, mask=inside, other=0.0), -3.0e38)
        top_z, top_t = tl.maximum(ref_z, own_ref_z), tl.maximum(ref_t, own_ref_t)
        keep_z, keep_t = tl.exp(ref_z - top_z), tl.exp(ref_t - top_t)
        by_z, by_t = tl.exp(own_ref_z - top_z), tl.exp(own_ref_t - top_t)
        ref_z, ref_t = top_z, top_t
        mass_z = mass_z * keep_z + own_z * by_z
        mass_t = mass_t * keep_t + own_t * by_t
        cross_t = cross_t * keep_t + tl.load(at + 4 * n, mask=inside, other=0.0) * by_t
        self_z = self_z * keep_z + tl.load(at + 5 * n, mask=inside, other=0.0) * by_z
        cross_z = cross_z * keep_z + tl.load(at + 6 * n, mask=inside, other=0.0) * by_z
        both = both * keep_z * keep_t + tl.load(at + 7 * n, mask=inside, other=0.0) * by_z * by_t
        own_best_z = tl.load(at + 8 * n, mask=inside, other=0.0)
        own_best_t = tl.load(at + 11 * n, mask=inside, other=0.0)
        # parts are in the order of ids, so the first of equals stays
        more_z, more_t = own_best_z > best_z, own_best_t > best_t
        best_z, best_t = tl.maximum(best_z, own_best_z), tl.maximum(best_t, own_best_t)
        z_id = tl.where(more_z, tl.load(at + 9 * n, mask=inside, other=0.0), z_id)
        t_at_best = tl.where(more_z, tl.load(at + 10 * n, mask=inside, other=0.0), t_at_best)
        t_id = tl.where(more_t, tl.load(at + 12 * n, mask=inside, other=0.0), t_id)
        z_at_best = tl.where(more_t, tl.load(at + 13 * n, mask=inside, other=0.0), z_at_best)
        label_z += tl.load(at + 14 * n, mask=inside, other=0.0)
        label_t += tl.load(at + 15 * n, mask=inside, other=0.0)
        at += 16 * n
    lse_z, lse_t = ref_z + tl.log(mass_z), ref_t + tl.log(mass_t)
    out = out_ptr + cols
    tl.store(out, lse_z, mask=inside)
    tl.store(out + out_step, lse_t, mask=inside)
    tl.store(out + 2 * out_step, cross_t / mass_t - lse_t + lse_z, mask=inside)
    tl.store(out + 3 * out_step, cross_z / mass_z - lse_z + lse_t, mask=inside)
    tl.store(out + 4 * out_step, lse_z - self_z / mass_z, mask=inside)
    tl.store(out + 5 * out_step, both / mass_z / mass_t, mask=inside)
    tl.store(out + 6 * out_step, t_at_best, mask=inside)
    tl.store(out + 7 * out_step, z_at_best, mask=inside)
    tl.store(out + 8 * out_step, label_z, mask=inside)
    tl.store(out + 9 * out_step, label_t, mask=inside)
    tl.store(ids_ptr + cols, z_id.to(tl.int64), mask=inside)
    tl.store(ids_ptr + ids_step + cols, t_id.to(tl.int64), mask=inside)


@jit(varying=("lse_z_ptr", "lse_t_ptr", "n"))
def _overlap_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    t_ptr,
    border_ptr,
    lse_z_ptr,
    lse_t_ptr,
    out_ptr,
    V,
    n,
    w,
    u,
    scale,
    BORDER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols, inside, t_cols, border = _columns(border_ptr, n, u, BORDER, BLOCK_N)
    start = tl.program_id(1) * PART
    log2e = 1.4426950408889634
    lse_z = tl.load(lse_z_ptr + cols, mask=inside, other=0.0) * log2e
    lse_t = tl.load(lse_t_ptr + cols, mask=inside, other=0.0) * log2e
    least = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    moved = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for offset in tl.range(0, tl.minimum(PART, V - start), BLOCK_V, num_stages=STAGES):
        ids = start + offset + tl.arange(0, BLOCK_V)
        z, t = _load(z_ptr, t_ptr, ids, cols, t_cols, w, u, border, scale, V, BORDER)
        q = tl.exp2(z - lse_z[None, :])
        p = tl.exp2(t - lse_t[None, :])
        less = q < p
        least += tl.where(less, q, p)
        moved += tl.where(less, q, 0.0)
    out = out_ptr + tl.program_id(1).to(tl.int64) * 2 * n + cols
    tl.store(out, tl.sum(least, 0), mask=inside)
    tl.store(out + n, tl.sum(moved, 0), mask=inside)


@jit(
    varying=(
        "labels_ptr",
        "values_ptr",
        "ids_ptr",
        "lse_t_ptr",
        "summed_ptr",
        "n",
        "values_step",
        "ids_step",
        "factors_step",
    )
)
def _gradient_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    t_ptr,
    border_ptr,
    labels_ptr,
    values_ptr,
    ids_ptr,
    lse_t_ptr,
    factors_ptr,
    summed_ptr,
    out_ptr,
    V,
    n,
    w,
    u,
    scale,
    first,
    values_step,
    ids_step,
    factors_step,
    REVERSE: tl.constexpr,
    RULE: tl.constexpr,
    BORDER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols, inside, t_cols, border = _columns(border_ptr, n, u, BORDER, BLOCK_N)
    start = tl.program_id(1) * PART
    log2e, ln2 = 1.4426950408889634, 0.6931471805599453
    lse_z = tl.load(values_ptr + cols, mask=inside, other=0.0) * log2e
    lse_share = tl.load(values_ptr + values_step + cols, mask=inside, other=0.0) * log2e
    mean = tl.load(values_ptr + 3 * values_step + cols, mask=inside, other=0.0)
    mass = tl.exp2(lse_share - tl.load(lse_t_ptr + cols, mask=inside, other=0.0) * log2e)
    ce = tl.load(factors_ptr + cols, mask=inside, other=0.0)
    kl = tl.load(factors_ptr + factors_step + cols, mask=inside, other=0.0)
    reverse = tl.load(factors_ptr + 2 * factors_step + cols, mask=inside, other=0.0)
    tv = tl.load(factors_ptr + 3 * factors_step + cols, mask=inside, other=0.0)
    summed = tl.load(summed_ptr + cols, mask=inside, other=0.0)
    label = tl.load(labels_ptr + cols, mask=inside, other=-1)
    best = tl.load(ids_ptr + ids_step + cols, mask=inside, other=-1) - first
    least = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for offset in tl.range(0, tl.minimum(PART, V - start), BLOCK_V, num_stages=STAGES):
        ids = start + offset + tl.arange(0, BLOCK_V)
        z, t = _load(z_ptr, t_ptr, ids, cols, t_cols, w, u, border, scale, V, BORDER)
        log_q, log_share = z - lse_z[None, :], t - lse_share[None, :]
        q, share = tl.exp2(log_q), tl.exp2(log_share)
        p = share * mass[None, :]
        least += tl.minimum(q, p)
        grad = (ce + kl)[None, :] * q - kl[None, :] * share
        grad -= tl.where(ids[:, None] == label[None, :], ce[None, :], 0.0)
        if REVERSE:
            grad += reverse[None, :] * q * ((log_q - log_share) * ln2 - mean[None, :])
        if RULE == 1:
            grad -= tv[None, :] * q * (tl.where(q < p, 1.0, 0.0) - summed[None, :])
        if RULE == 2:
            grad -= tv[None, :] * q * (p - summed[None, :])
        if RULE == 3:
            grad -= tv[None, :] * q * (tl.where(ids[:, None] == best[None, :], 1.0, 0.0) - summed[None, :])
        at = z_ptr + ids.to(tl.int64)[:, None] * w + cols[None, :]
        grad = tl.where(inside[None, :], grad, 0.0).to(z_ptr.dtype.element_ty)
        tl.store(at, grad, mask=(ids < V)[:, None] & (cols < w)[None, :])
    out = out_ptr + tl.program_id(1).to(tl.int64) * n + cols
    tl.store(out, tl.sum(least, 0), mask=inside)


@jit(varying=("lse_t_ptr", "n"))
def _mass_kernel(  # type: ignore[no-untyped-def]
    t_ptr,
    border_ptr,
    lse_t_ptr,
    out_ptr,
    V,
    n,
    u,
    scale,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols, inside, t_cols, border = _columns(border_ptr, n, u, True, BLOCK_N)
    start = tl.program_id(1) * PART
    lse_t = tl.load(lse_t_ptr + cols, mask=inside, other=0.0) * 1.4426950408889634
    mass = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for offset in tl.range(0, tl.minimum(PART, V - start), BLOCK_V, num_stages=STAGES):
        ids = start + offset + tl.arange(0, BLOCK_V)
        mask = (ids < V)[:, None] & (t_cols < u)[None, :]
        t = tl.load(t_ptr + ids.to(tl.int64)[:, None] * u + t_cols[None, :], mask=mask, other=-1.0e30).to(tl.float32)
        mass += tl.where(mask & (t >= border[None, :]), tl.exp2(t * scale - lse_t[None, :]), 0.0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * n + cols, tl.sum(mass, 0), mask=inside)


def stats(z: Tensor, t: Tensor, border: Tensor | None, labels: Tensor, scale: float, first: int) -> Tensor:
    """`[P, 16, n]` of `sweeps.PARTIAL`."""
    out = _output(z, 16, labels)
    _launch(_stats_kernel, "stats", z, t, border, labels, out, *_sizes(z, t, labels), scale, first)
    return out


def merge(parts: Tensor, values: Tensor, ids: Tensor) -> None:
    """Fills `values` `[10, n]` and `ids` `[2, n]` of a `sweeps.Stats`."""
    count = parts.shape[2]
    sizes = parts.shape[0], count, values.stride(0), ids.stride(0)
    block = TILES["merge"][1]
    _merge_kernel[(-(-count // block),)](parts, values, ids, *sizes, BLOCK_N=block, num_warps=1)


def overlap(
    z: Tensor,
    t: Tensor,
    border: Tensor | None,
    lse_z: Tensor,
    lse_t: Tensor,
    scale: float,
) -> Tensor:
    """`[P, 2, n]`; see `Sweeps.overlap`."""
    out = _output(z, 2, lse_z)
    _launch(_overlap_kernel, "overlap", z, t, border, lse_z, lse_t, out, *_sizes(z, t, lse_z), scale)
    return out


def gradient(
    z: Tensor,
    t: Tensor,
    border: Tensor | None,
    labels: Tensor,
    values: Tensor,
    ids: Tensor,
    lse_t: Tensor,
    factors: Tensor,
    summed: Tensor,
    scale: float,
    first: int,
    reverse: bool,
    rule: int,
) -> Tensor:
    """`[P, n]`; see `Sweeps.gradient`. `rule` counts from 1, 0 is no tv."""
    out = _output(z, 1, labels)[:, 0]
    steps = values.stride(0), ids.stride(0), factors.stride(0)
    tensors = z, t, border, labels, values, ids, lse_t, factors, summed, out
    _launch(
        _gradient_kernel, "gradient", *tensors, *_sizes(z, t, labels), scale, first, *steps, REVERSE=reverse, RULE=rule
    )
    return out


def mass_above(t: Tensor, border: Tensor, lse_t: Tensor, scale: float) -> Tensor:
    """`[P, n]`; see `Sweeps.mass_above`."""
    out = _output(t, 1, lse_t)[:, 0]
    sizes = t.shape[0], len(lse_t), t.shape[1]
    grid, shape = _shape("mass", t, lse_t)
    _mass_kernel[grid](t, border, lse_t, out, *sizes, scale, **shape)
    return out


def _output(block: Tensor, fields: int, rows: Tensor) -> Tensor:
    return block.new_empty(max(1, -(-block.shape[0] // PART)), fields, len(rows), dtype=torch.float32)


def _sizes(z: Tensor, t: Tensor, rows: Tensor) -> tuple[int, ...]:
    return z.shape[0], len(rows), z.shape[1], t.shape[1]


def _shape(name: str, block: Tensor, rows: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel over `block` `[V, >= n]` and `rows` `[n]`."""
    tall, wide = TILES[name]
    grid = -(-len(rows) // wide), max(1, -(-block.shape[0] // PART))
    return grid, {"PART": PART, "BLOCK_V": tall, "BLOCK_N": wide, "STAGES": STAGES, "num_warps": WARPS}


def _launch(
    kernel: Any,
    name: str,
    z: Tensor,
    t: Tensor,
    border: Tensor | None,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Of a kernel whose first argument after these holds a number per row."""
    grid, shape = _shape(name, z, arguments[0])
    # without a border there is nothing to read: any pointer does
    tensors = z, t, z if border is None else border
    kernel[grid](*tensors, *arguments, BORDER=border is not None, **constants, **shape)
