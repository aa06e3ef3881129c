"""Sweeps over a chunk of draft and target logits that lie vocabulary first, `[V, n]`.

Four questions are asked of the two blocks: the sums that values are made of (`stats`, one pass, online), the overlap of
two distributions whose log-sum-exps are known (`overlap`), the gradient in the draft's logits (`gradient`, in place),
and the mass of the target above a border (`mass_above`). Each has plain torch here and Triton in `sweeps_triton`.
Invariant: sums are in float32 whatever the logits are, and all of an output is written.

The parts of a `stats` (slices of the vocabulary, ranks of a tensor-parallel group) merge exactly in any order.

Dimensions: `V` vocabulary of this rank, `n` rows, `m` columns of the target, `P` parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernels import sweeps_triton as fast
from miles_spec.kernels.linear import gather_states

PARTIAL = (
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
"""What a part of the vocabulary says of a row."""
VALUES = (
    "lse_z",
    "lse_t",
    "kl",
    "reverse_kl",
    "entropy",
    "product",
    "t_at_best_z",
    "z_at_best_t",
    "label_z",
    "label_t",
)
"""What all parts together say of it, but for two ids."""
NEGATIVE = -1.0e30
"""Stands for minus infinity, so that zero times it is zero."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stats:
    """Of tempered logits, relative to whatever shift they carry; views `[n]` of `values` and `ids`."""

    values: Tensor
    """`[10, n]` float32: the next ten, `VALUES`."""
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
    ids: Tensor
    """`[2, n]` int64: the next two."""
    best_z: Tensor
    best_t: Tensor
    """Most likely token of draft and target, the lowest id of equals, counted over all ranks."""

    @classmethod
    def empty(cls, count: int, like: Tensor) -> Stats:
        """Memory for `count` rows on the device of `like`."""
        return cls._of(
            like.new_empty(len(VALUES), count, dtype=torch.float32), like.new_empty(2, count, dtype=torch.int64)
        )

    @classmethod
    def _of(cls, values: Tensor, ids: Tensor) -> Stats:
        fields = dict(zip(VALUES, values.unbind(), strict=True))
        return cls(values=values, ids=ids, best_z=ids[0], best_t=ids[1], **fields)

    def part(self, rows: slice) -> Stats:
        """These rows of the same memory."""
        return self._of(self.values[:, rows], self.ids[:, rows])


class Sweeps:
    """Two blocks of logits and what is asked of them."""

    def __init__(self, z: Tensor, t: Tensor, labels: Tensor, *, scale: float, first: int, triton: bool) -> None:
        """`z` `[V, >= n]` of the draft, `t` `[V, m]` of the target, contiguous, one dtype; what lies in columns of `z`
        beyond `n` is not used, and `gradient` may make it 0. Row `i` reads column `i % m` of `t`; for Triton an `m`
        below `n` must be a multiple of `ALIGN`. `labels` `[n]` int64, below 0 for none here; `scale` is one over the
        temperature; `first` the id of this rank's first token."""
        self.z, self.t, self.labels, self.scale, self.first = z, t, labels, scale, first
        self.border: Tensor | None = None
        """`[n]` float32: target logits below it, before scaling, have no probability; None for no border."""
        self._triton = triton
        self._log2 = scale * math.log2(math.e)

    def stats(self, out: Stats, group: dist.ProcessGroup | None) -> None:
        """Fills `out`; with `group`, of the logits of all its ranks."""
        if self._triton:
            parts = fast.stats(*self._blocks(), self.labels, self._log2, self.first)
        else:
            parts = _stats(*self._float(), self.labels, self.first)[None]
        parts = gather_states(parts.flatten(1), group).reshape(-1, *parts.shape[1:])
        if self._triton:
            fast.merge(parts, out.values, out.ids)
        else:
            _merge(parts, out.values, out.ids)

    def overlap(self, lse_z: Tensor, lse_t: Tensor) -> Tensor:
        """`[2, n]`: `sum_v min(p_v, q_v)`, and `sum_v q_v` where `q_v < p_v`."""
        if self._triton:
            return fast.overlap(*self._blocks(), lse_z, lse_t, self._log2).sum(0)
        z, t = self._float()
        q, p = (z - lse_z).exp_(), (t - lse_t).exp_()
        less = q < p
        return torch.stack([torch.where(less, q, p).sum(0), torch.where(less, q, 0).sum(0)])

    def gradient(
        self, stats: Stats, lse_t: Tensor, factors: Tensor, summed: Tensor | None, rule: str, *, reverse: bool
    ) -> Tensor:
        """Puts the loss's gradient in the logits, before scaling, in the place of `z`; returns `sum_v min(p_v, q_v)`
        `[n]`, of this rank.

        `lse_t` `[n]` is the target's log-sum-exp over its full vocabulary. `factors` `[4, n]` float32 are those of ce,
        kl, reverse kl (read only if `reverse`) and tv; `summed` `[n]` is `sum_v m_v q_v` of tv's `rule`, None for no
        tv.
        """
        kind = 0 if summed is None else 1 + ("rejection", "target", "greedy").index(rule)
        summed = stats.lse_z if summed is None else summed
        if self._triton:
            more = stats.values, stats.ids, lse_t, factors, summed
            return fast.gradient(*self._blocks(), self.labels, *more, self._log2, self.first, reverse, kind).sum(0)
        z, t = self._float()
        labels, best = self.labels, stats.best_t - self.first
        grad, overlap = _gradient(z, t, labels, best, stats, lse_t, factors, summed, kind, reverse)
        self.z[:, : grad.shape[1]].copy_(grad)
        return overlap

    def mass_above(self, border: Tensor, lse_t: Tensor) -> Tensor:
        """`[n]`: the target's probability of tokens whose logit, before scaling, is `border` `[n]` or more."""
        if self._triton:
            return fast.mass_above(self.t, border, lse_t, self._log2).sum(0)
        _, t = self._float()
        return torch.where(t >= border * self.scale, (t - lse_t).exp_(), 0).sum(0)

    def _float(self) -> tuple[Tensor, Tensor]:
        """Both blocks tempered in float32, a teacher column for every row, the border applied."""
        count = len(self.labels)
        z, t = (x[:, :count].float() * self.scale for x in (self.z, self.t))
        t = t.repeat(1, -(-count // t.shape[1]))[:, :count]
        return z, t if self.border is None else t.masked_fill(t < self.border * self.scale, NEGATIVE)

    def _blocks(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.z, self.t, self.border


def _merge(parts: Tensor, values: Tensor, ids: Tensor) -> None:
    """Fills the memory of a `Stats` from `parts` `[P, 16, n]`."""
    part = dict(zip(PARTIAL, parts.unbind(1), strict=True))
    # under a border a part of the target may have no mass; its reference then means nothing
    ref_z, ref_t = (part[f"ref_{x}"].masked_fill(part[f"mass_{x}"] == 0, -torch.inf) for x in "zt")
    top_z, top_t = ref_z.amax(0), ref_t.amax(0)
    by_z, by_t = (ref_z - top_z).exp(), (ref_t - top_t).exp()
    mass_z, mass_t = (part["mass_z"] * by_z).sum(0), (part["mass_t"] * by_t).sum(0)
    lse_z, lse_t = top_z + mass_z.log(), top_t + mass_t.log()
    # parts are in the order of ids, and argmax takes the first of equals
    win_z, win_t = part["best_z"].argmax(0)[None], part["best_t"].argmax(0)[None]
    found = [
        lse_z,
        lse_t,
        (part["cross_t"] * by_t).sum(0) / mass_t - lse_t + lse_z,
        (part["cross_z"] * by_z).sum(0) / mass_z - lse_z + lse_t,
        lse_z - (part["self_z"] * by_z).sum(0) / mass_z,
        (part["both"] * by_z * by_t).sum(0) / (mass_z * mass_t),
        part["t_at_best_z"].gather(0, win_z)[0],
        part["z_at_best_t"].gather(0, win_t)[0],
        part["label_z"].sum(0),
        part["label_t"].sum(0),
    ]
    values.copy_(torch.stack(found))
    ids.copy_(torch.cat([part["best_z_id"].gather(0, win_z), part["best_t_id"].gather(0, win_t)]))


def _stats(z: Tensor, t: Tensor, labels: Tensor, first: int) -> Tensor:
    """`[16, n]`, the whole as one part, from tempered float32 logits."""
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


def _gradient(
    z: Tensor,
    t: Tensor,
    labels: Tensor,
    best_t: Tensor,
    stats: Stats,
    lse_t: Tensor,
    factors: Tensor,
    summed: Tensor,
    kind: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient in tempered logits `[V, n]` and the overlap `[n]`; see `Sweeps.gradient`."""
    log_q, log_share = z - stats.lse_z, t - stats.lse_t
    q, share = log_q.exp(), log_share.exp()
    p = share * (stats.lse_t - lse_t).exp()
    overlap = torch.minimum(q, p).sum(0)
    ids = torch.arange(z.shape[0], device=z.device)[:, None]
    ce, kl, reverse_kl, tv = factors
    grad = (ce + kl) * q - ce * (ids == labels).float() - kl * share
    if reverse:
        grad += reverse_kl * q * (log_q - log_share - stats.reverse_kl)
    if kind:
        moves = (q < p).float() if kind == 1 else p if kind == 2 else (ids == best_t).float()
        grad -= tv * q * (moves - summed)
    return grad, overlap
