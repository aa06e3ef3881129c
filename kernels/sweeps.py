"""Sweeps over a chunk of draft and target logits that lie vocabulary first, `[V, n]`.

Four questions are asked of the two blocks: the sums that values are made of (`stats`, one pass, online), the overlap of
two distributions whose log-sum-exps are known (`overlap`), the gradient in the draft's logits (`gradient`, in place),
and the mass of the target above a border (`mass_above`). Each has plain torch and Triton. Invariant: sums are in
float32 whatever the logits are, and every kernel writes all of its output.

The parts of a `stats` (slices of the vocabulary, ranks of a tensor-parallel group) merge exactly in any order.

Dimensions: `V` vocabulary of this rank, `n` rows, `m` teacher rows, `P` parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernels.backend import jit, tl
from miles_spec.kernels.linear import gather_states

FIELDS = (
    "ref_z",  # what exponents of the draft's logits are taken relative to
    "mass_z",  # sum e^(z - ref_z)
    "ref_t",
    "mass_t",
    "cross_t",  # sum e^(t - ref_t) (t - z)
    "self_z",  # sum e^(z - ref_z) z
    "cross_z",  # sum e^(z - ref_z) (z - t)
    "both",  # sum e^(z - ref_z + t - ref_t)
    "best_z",
    "best_z_id",
    "t_at_best_z",
    "best_t",
    "best_t_id",
    "z_at_best_t",
    "label_z",  # 0 outside this part
    "label_t",
)
NEGATIVE = -1.0e30
"""Stands for minus infinity, so that zero times it is zero."""
BLOCK_V, BLOCK_N, WARPS = 16, 64, 4
"""Tile and warps of every kernel; measured on Hopper, the only architecture in the table so far."""
PART = 2048
"""Vocabulary rows of one program."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stats:
    """Of tempered logits, relative to whatever shift they carry; all `[n]` float32, but for the ids, int64."""

    lse_z: Tensor
    lse_t: Tensor
    """Over the vocabulary at hand."""
    kl: Tensor
    reverse_kl: Tensor
    entropy: Tensor
    """Of the draft."""
    product: Tensor
    """`sum_v p_v q_v`, `p` normalised over the vocabulary at hand."""
    t_at_best_z: Tensor
    z_at_best_t: Tensor
    label_z: Tensor
    label_t: Tensor
    best_z: Tensor
    best_t: Tensor
    """Most likely token of draft and target, the lowest id of equals, counted over all ranks."""


STATS = tuple(f.name for f in fields(Stats) if not f.name.startswith("best"))


class Sweeps:
    """Two blocks of logits and what is asked of them."""

    def __init__(
        self, z: Tensor, t: Tensor, labels: Tensor, *, scale: float, columns: Tensor | None, use_triton: bool
    ) -> None:
        """`z` `[V, n]` of the draft, `t` `[V, m]` of the target, contiguous, one dtype; `columns` `[n]` int64 the
        column of `t` that a row reads, row `i` column `i` without it; `labels` `[n]` int64, below 0 for none here;
        `scale` is one over the temperature."""
        self.z, self.t, self.labels, self.scale, self.columns = z, t, labels, scale, columns
        self.border: Tensor | None = None
        """`[n]` float32: target logits below it, before scaling, have no probability; None for no border."""
        self._triton = use_triton

    def stats(self, first: int) -> Tensor:
        """`[P, 16, n]` of `FIELDS`; `first` is the id of this rank's first token."""
        if not self._triton:
            return _stats_reference(*self._float(), self.labels, first)[None]
        parts, grid = self._grid()
        out = self.z.new_empty(parts, len(FIELDS), self.z.shape[1], dtype=torch.float32)
        _stats_kernel[grid](*self._tensors(), out, *self._sizes(), first, **self._constants())
        return out

    def overlap(self, lse_z: Tensor, lse_t: Tensor) -> Tensor:
        """`[2, n]`: `sum_v min(p_v, q_v)`, and `sum_v q_v` where `q_v < p_v`."""
        if not self._triton:
            z, t = self._float()
            q, p = (z - lse_z).exp_(), (t - lse_t).exp_()
            less = q < p
            return torch.stack([torch.where(less, q, p).sum(0), torch.where(less, q, 0).sum(0)])
        parts, grid = self._grid()
        out = self.z.new_empty(parts, 2, self.z.shape[1], dtype=torch.float32)
        _overlap_kernel[grid](*self._tensors(), lse_z, lse_t, out, *self._sizes(), **self._constants())
        return out.sum(0)

    def gradient(self, factors: Tensor, best_t: Tensor, *, ce: bool, kl: bool, reverse: bool, rule: str) -> Tensor:
        """Puts the loss's gradient in the logits, before scaling, in the place of `z`; returns `sum_v min(p_v, q_v)`
        `[n]`.

        `factors` `[9, n]` float32: log-sum-exps of draft and target over the vocabulary at hand; the target's mass
        there; the factors of ce, of kl, and of reverse kl, and the latter's value; that of tv, and `sum_v m_v q_v` of
        the rule. `best_t` `[n]` int64 is the row of the target's most likely token, outside `0..V` if not here. `rule`
        is that of tv, or empty for no tv; terms that are False or empty are not computed.
        """
        if not self._triton:
            z, t = self._float()
            grad, overlap = _gradient_reference(z, t, factors, self.labels, best_t, ce, kl, reverse, rule)
            self.z.copy_(grad)
            return overlap
        parts, grid = self._grid()
        out = self.z.new_empty(parts, self.z.shape[1], dtype=torch.float32)
        _gradient_kernel[grid](
            *self._tensors(),
            best_t,
            factors,
            out,
            *self._sizes(),
            CE=ce,
            KL=kl,
            REVERSE=reverse,
            RULE=("", "rejection", "target", "greedy").index(rule),
            **self._constants(),
        )
        return out.sum(0)

    def mass_above(self, border: Tensor, lse_t: Tensor) -> Tensor:
        """`[n]`: the target's probability of tokens whose logit, before scaling, is `border` `[n]` or more."""
        if not self._triton:
            _, t = self._float()
            return torch.where(t >= border * self.scale, (t - lse_t).exp_(), 0).sum(0)
        parts, grid = self._grid()
        out = self.z.new_empty(parts, self.z.shape[1], dtype=torch.float32)
        constants = {name: value for name, value in self._constants().items() if name != "BORDER"}
        _mass_kernel[grid](self.t, self._columns(), border, lse_t, out, *self._sizes(), **constants)
        return out.sum(0)

    def _float(self) -> tuple[Tensor, Tensor]:
        """Both blocks tempered in float32, a teacher column for every row, the border applied."""
        z, t = self.z.float() * self.scale, self.t.float() * self.scale
        if self.columns is not None:
            t = t.index_select(1, self.columns)
        if self.border is not None:
            t = t.masked_fill(t < self.border * self.scale, NEGATIVE)
        return z, t

    def _grid(self) -> tuple[int, tuple[int, int]]:
        parts = max(1, -(-self.z.shape[0] // PART))
        return parts, (-(-self.z.shape[1] // BLOCK_N), parts)

    def _columns(self) -> Tensor:
        return self.labels if self.columns is None else self.columns  # not read in the first case

    def _tensors(self) -> tuple[Tensor, ...]:
        border = self.z if self.border is None else self.border  # likewise
        return self.z, self.t, self._columns(), border, self.labels

    def _sizes(self) -> tuple[float, ...]:
        return self.z.shape[0], self.z.shape[1], self.t.shape[1], self.scale * math.log2(math.e)

    def _constants(self) -> dict[str, int]:
        return {
            "SHARED": self.columns is not None,
            "BORDER": self.border is not None,
            "PART": PART,
            "BLOCK_V": BLOCK_V,
            "BLOCK_N": BLOCK_N,
            "num_warps": WARPS,
        }


def merge(parts: Tensor, group: dist.ProcessGroup | None, use_triton: bool) -> Stats:
    """All parts `[P, 16, n]`, and those of all ranks of `group`, as one."""
    parts = gather_states(parts.flatten(1), group).reshape(-1, len(FIELDS), parts.shape[2])
    if use_triton:
        values = parts.new_empty(len(STATS), parts.shape[2])
        ids = parts.new_empty(2, parts.shape[2], dtype=torch.int64)
        _merge_kernel[(-(-parts.shape[2] // BLOCK_N),)](
            parts, values, ids, *parts.shape[::2], BLOCK_N=BLOCK_N, num_warps=1
        )
        return Stats(**dict(zip(STATS, values.unbind(), strict=True)), best_z=ids[0], best_t=ids[1])
    part = dict(zip(FIELDS, parts.unbind(1), strict=True))
    # under a border a part of the target may have no mass; its reference then means nothing
    ref_z, ref_t = (part[f"ref_{x}"].masked_fill(part[f"mass_{x}"] == 0, -torch.inf) for x in "zt")
    top_z, top_t = ref_z.amax(0), ref_t.amax(0)
    by_z, by_t = (ref_z - top_z).exp(), (ref_t - top_t).exp()
    mass_z, mass_t = (part["mass_z"] * by_z).sum(0), (part["mass_t"] * by_t).sum(0)
    lse_z, lse_t = top_z + mass_z.log(), top_t + mass_t.log()
    mean_z = (part["self_z"] * by_z).sum(0) / mass_z
    # parts are in the order of ids, and argmax takes the first of equals
    win_z, win_t = part["best_z"].argmax(0)[None], part["best_t"].argmax(0)[None]
    return Stats(
        lse_z=lse_z,
        lse_t=lse_t,
        kl=(part["cross_t"] * by_t).sum(0) / mass_t - lse_t + lse_z,
        reverse_kl=(part["cross_z"] * by_z).sum(0) / mass_z - lse_z + lse_t,
        entropy=lse_z - mean_z,
        product=(part["both"] * by_z * by_t).sum(0) / (mass_z * mass_t),
        t_at_best_z=part["t_at_best_z"].gather(0, win_z)[0],
        z_at_best_t=part["z_at_best_t"].gather(0, win_t)[0],
        label_z=part["label_z"].sum(0),
        label_t=part["label_t"].sum(0),
        best_z=part["best_z_id"].gather(0, win_z)[0].long(),
        best_t=part["best_t_id"].gather(0, win_t)[0].long(),
    )


def _stats_reference(z: Tensor, t: Tensor, labels: Tensor, first: int) -> Tensor:
    """`[16, n]` from tempered float32 logits."""
    best_z, z_id = z.max(0)
    best_t, t_id = t.max(0)
    ez, et = (z - best_z).exp_(), (t - best_t).exp_()
    here, row = labels >= 0, labels.clamp(min=0)[None]
    return torch.stack(
        [
            best_z,
            ez.sum(0),
            best_t,
            et.sum(0),
            (et * (t - z)).sum(0),
            (ez * z).sum(0),
            (ez * (z - t)).sum(0),
            (ez * et).sum(0),
            best_z,
            (z_id + first).float(),
            t.gather(0, z_id[None])[0],
            best_t,
            (t_id + first).float(),
            z.gather(0, t_id[None])[0],
            torch.where(here, z.gather(0, row)[0], 0),
            torch.where(here, t.gather(0, row)[0], 0),
        ]
    )


def _gradient_reference(
    z: Tensor,
    t: Tensor,
    factors: Tensor,
    labels: Tensor,
    best_t: Tensor,
    ce: bool,
    kl: bool,
    reverse: bool,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """See `Sweeps.gradient`."""
    lse_z, lse_t, mass, c_ce, c_kl, c_reverse, mean, c_tv, summed = factors
    log_q, log_share = z - lse_z, t - lse_t
    q, share = log_q.exp(), log_share.exp()
    p = share * mass
    overlap = torch.minimum(q, p).sum(0)
    ids = torch.arange(z.shape[0], device=z.device)[:, None]
    grad = torch.zeros_like(q)
    if ce:
        grad += c_ce * (q - (ids == labels).float())
    if kl:
        grad += c_kl * (q - share)
    if reverse:
        grad += c_reverse * q * (log_q - log_share - mean)
    if rule:
        moves = {"rejection": lambda: (q < p).float(), "target": lambda: p, "greedy": lambda: (ids == best_t).float()}
        grad -= c_tv * q * (moves[rule]() - summed)
    return grad, overlap


@jit
def _load(z_ptr, t_ptr, ids, cols, t_cols, n, m, border, scale, V, BORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of both blocks, tempered, in units of log 2."""
    inside = (ids < V)[:, None] & (cols < n)[None, :]
    row = ids.to(tl.int64)[:, None]
    z = tl.load(z_ptr + row * n + cols[None, :], mask=inside, other=-1.0e30).to(tl.float32) * scale
    t = tl.load(t_ptr + row * m + t_cols[None, :], mask=inside, other=-1.0e30).to(tl.float32)
    if BORDER:
        t = tl.where(t < border[None, :], -1.0e30, t)
    return z, t * scale, inside


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
    n,
    m,
    scale,
    BORDER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of one part relative to the references, and the best of each lane."""
    zero = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    mass_z, mass_t, cross_t, self_z, cross_z, both = zero, zero, zero, zero, zero, zero
    best_z, best_t = zero - float("inf"), zero - float("inf")
    z_id, t_id = tl.zeros([BLOCK_V, BLOCK_N], tl.int32), tl.zeros([BLOCK_V, BLOCK_N], tl.int32)
    for offset in range(0, tl.minimum(PART, V - start), BLOCK_V):
        ids = start + offset + tl.arange(0, BLOCK_V)
        z, t, _ = _load(z_ptr, t_ptr, ids, cols, t_cols, n, m, border, scale, V, BORDER)
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


@jit
def _columns_of(columns_ptr, cols, n, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    if SHARED:
        return tl.load(columns_ptr + cols, mask=cols < n, other=0)
    return cols.to(tl.int64)


@jit
def _stats_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    t_ptr,
    columns_ptr,
    border_ptr,
    labels_ptr,
    out_ptr,
    V,
    n,
    m,
    scale,
    first,
    SHARED: tl.constexpr,
    BORDER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n
    start = tl.program_id(1) * PART
    t_cols = _columns_of(columns_ptr, cols, n, SHARED)
    border = cols.to(tl.float32)
    if BORDER:
        border = tl.load(border_ptr + cols, mask=inside, other=0.0)
    ref_z = tl.zeros([BLOCK_N], tl.float32)
    ref_t = tl.zeros([BLOCK_N], tl.float32)
    mass_z, mass_t, cross_t, self_z, cross_z, both, lane_z, z_ids, lane_t, t_ids = _sums(
        z_ptr, t_ptr, cols, t_cols, border, ref_z, ref_t, start, V, n, m, scale, BORDER, PART, BLOCK_V, BLOCK_N
    )
    best_z, best_t = tl.max(lane_z, 0), tl.max(lane_t, 0)
    # logits come less an estimate of their largest, so zero is a good reference; where it is not, sum again
    far = tl.maximum(tl.abs(best_z), tl.abs(best_t))
    if tl.max(tl.where(inside, far, 0.0), 0) > 20.0:
        ref_z = best_z
        ref_t = tl.where(best_t > -1.0e29, best_t, 0.0)  # below a border there is nothing to be near to
        mass_z, mass_t, cross_t, self_z, cross_z, both, lane_z, z_ids, lane_t, t_ids = _sums(
            z_ptr, t_ptr, cols, t_cols, border, ref_z, ref_t, start, V, n, m, scale, BORDER, PART, BLOCK_V, BLOCK_N
        )
    none = 2147483647
    best_z_id = tl.min(tl.where(lane_z == best_z[None, :], z_ids, none), 0)
    best_t_id = tl.min(tl.where(lane_t == best_t[None, :], t_ids, none), 0)
    t_at_best = tl.load(t_ptr + best_z_id.to(tl.int64) * m + t_cols, mask=inside, other=0.0).to(tl.float32)
    if BORDER:
        t_at_best = tl.where(t_at_best < border, -1.0e30, t_at_best)
    z_at_best = tl.load(z_ptr + best_t_id.to(tl.int64) * n + cols, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + cols, mask=inside, other=-1)
    here = (label >= start) & (label < start + PART) & inside
    label_z = tl.load(z_ptr + label * n + cols, mask=here, other=0.0).to(tl.float32)
    label_t = tl.load(t_ptr + label * m + t_cols, mask=here, other=0.0).to(tl.float32)
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


@jit
def _merge_kernel(parts_ptr, out_ptr, ids_ptr, P, n, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
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
    tl.store(out + n, lse_t, mask=inside)
    tl.store(out + 2 * n, cross_t / mass_t - lse_t + lse_z, mask=inside)
    tl.store(out + 3 * n, cross_z / mass_z - lse_z + lse_t, mask=inside)
    tl.store(out + 4 * n, lse_z - self_z / mass_z, mask=inside)
    tl.store(out + 5 * n, both / mass_z / mass_t, mask=inside)
    tl.store(out + 6 * n, t_at_best, mask=inside)
    tl.store(out + 7 * n, z_at_best, mask=inside)
    tl.store(out + 8 * n, label_z, mask=inside)
    tl.store(out + 9 * n, label_t, mask=inside)
    tl.store(ids_ptr + cols, z_id.to(tl.int64), mask=inside)
    tl.store(ids_ptr + n + cols, t_id.to(tl.int64), mask=inside)


@jit
def _overlap_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    t_ptr,
    columns_ptr,
    border_ptr,
    labels_ptr,
    lse_z_ptr,
    lse_t_ptr,
    out_ptr,
    V,
    n,
    m,
    scale,
    SHARED: tl.constexpr,
    BORDER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n
    start = tl.program_id(1) * PART
    t_cols = _columns_of(columns_ptr, cols, n, SHARED)
    border = cols.to(tl.float32)
    if BORDER:
        border = tl.load(border_ptr + cols, mask=inside, other=0.0)
    log2e = 1.4426950408889634
    lse_z = tl.load(lse_z_ptr + cols, mask=inside, other=0.0) * log2e
    lse_t = tl.load(lse_t_ptr + cols, mask=inside, other=0.0) * log2e
    least = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    moved = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for offset in range(0, tl.minimum(PART, V - start), BLOCK_V):
        ids = start + offset + tl.arange(0, BLOCK_V)
        z, t, _ = _load(z_ptr, t_ptr, ids, cols, t_cols, n, m, border, scale, V, BORDER)
        q = tl.exp2(z - lse_z[None, :])
        p = tl.exp2(t - lse_t[None, :])
        less = q < p
        least += tl.where(less, q, p)
        moved += tl.where(less, q, 0.0)
    out = out_ptr + tl.program_id(1).to(tl.int64) * 2 * n + cols
    tl.store(out, tl.sum(least, 0), mask=inside)
    tl.store(out + n, tl.sum(moved, 0), mask=inside)


@jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    t_ptr,
    columns_ptr,
    border_ptr,
    labels_ptr,
    best_ptr,
    factors_ptr,
    out_ptr,
    V,
    n,
    m,
    scale,
    CE: tl.constexpr,
    KL: tl.constexpr,
    REVERSE: tl.constexpr,
    RULE: tl.constexpr,
    SHARED: tl.constexpr,
    BORDER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n
    start = tl.program_id(1) * PART
    t_cols = _columns_of(columns_ptr, cols, n, SHARED)
    border = cols.to(tl.float32)
    if BORDER:
        border = tl.load(border_ptr + cols, mask=inside, other=0.0)
    log2e, ln2 = 1.4426950408889634, 0.6931471805599453
    factors = factors_ptr + cols
    lse_z = tl.load(factors, mask=inside, other=0.0) * log2e
    lse_t = tl.load(factors + n, mask=inside, other=0.0) * log2e
    mass = tl.load(factors + 2 * n, mask=inside, other=0.0)
    c_ce = tl.load(factors + 3 * n, mask=inside, other=0.0)
    c_kl = tl.load(factors + 4 * n, mask=inside, other=0.0)
    c_reverse = tl.load(factors + 5 * n, mask=inside, other=0.0)
    mean = tl.load(factors + 6 * n, mask=inside, other=0.0)
    c_tv = tl.load(factors + 7 * n, mask=inside, other=0.0)
    summed = tl.load(factors + 8 * n, mask=inside, other=0.0)
    label = tl.load(labels_ptr + cols, mask=inside, other=-1)
    best = tl.load(best_ptr + cols, mask=inside, other=-1)
    least = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for offset in range(0, tl.minimum(PART, V - start), BLOCK_V):
        ids = start + offset + tl.arange(0, BLOCK_V)
        z, t, mask = _load(z_ptr, t_ptr, ids, cols, t_cols, n, m, border, scale, V, BORDER)
        log_q, log_share = z - lse_z[None, :], t - lse_t[None, :]
        q, share = tl.exp2(log_q), tl.exp2(log_share)
        p = share * mass[None, :]
        least += tl.minimum(q, p)
        grad = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
        if CE:
            grad += c_ce[None, :] * (q - tl.where(ids[:, None] == label[None, :], 1.0, 0.0))
        if KL:
            grad += c_kl[None, :] * (q - share)
        if REVERSE:
            grad += c_reverse[None, :] * q * ((log_q - log_share) * ln2 - mean[None, :])
        if RULE == 1:
            grad -= c_tv[None, :] * q * (tl.where(q < p, 1.0, 0.0) - summed[None, :])
        if RULE == 2:
            grad -= c_tv[None, :] * q * (p - summed[None, :])
        if RULE == 3:
            grad -= c_tv[None, :] * q * (tl.where(ids[:, None] == best[None, :], 1.0, 0.0) - summed[None, :])
        row = ids.to(tl.int64)[:, None]
        tl.store(z_ptr + row * n + cols[None, :], grad.to(z_ptr.dtype.element_ty), mask=mask)
    out = out_ptr + tl.program_id(1).to(tl.int64) * n + cols
    tl.store(out, tl.sum(least, 0), mask=inside)


@jit
def _mass_kernel(  # type: ignore[no-untyped-def]
    t_ptr,
    columns_ptr,
    border_ptr,
    lse_t_ptr,
    out_ptr,
    V,
    n,
    m,
    scale,
    SHARED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n
    start = tl.program_id(1) * PART
    t_cols = _columns_of(columns_ptr, cols, n, SHARED)
    border = tl.load(border_ptr + cols, mask=inside, other=0.0)
    lse_t = tl.load(lse_t_ptr + cols, mask=inside, other=0.0) * 1.4426950408889634
    mass = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for offset in range(0, tl.minimum(PART, V - start), BLOCK_V):
        ids = start + offset + tl.arange(0, BLOCK_V)
        mask = (ids < V)[:, None] & inside[None, :]
        t = tl.load(t_ptr + ids.to(tl.int64)[:, None] * m + t_cols[None, :], mask=mask, other=-1.0e30).to(tl.float32)
        mass += tl.where(mask & (t >= border[None, :]), tl.exp2(t * scale - lse_t[None, :]), 0.0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * n + cols, tl.sum(mass, 0), mask=inside)
