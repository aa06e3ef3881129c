"""A chunk of draft rows at a time: what `draft_loss` does with the memory of one.

Invariant: no more logits exist than those of a chunk's rows and of their teachers, and a drafted block lies in one
chunk, since end-to-end weights need all of its acceptances before any gradient.

Dimensions: as in `draft_loss`; `C` rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernels.linear import add_product, label_logits, vocab_range
from miles_spec.kernels.sweeps import Stats, Sweeps
from miles_spec.kernels.sweeps_triton import ALIGN

if TYPE_CHECKING:
    from miles_spec.types import VerifyRule


def end_to_end_weights(accept: Tensor) -> Tensor:
    """`[D, N]` row weights of end-to-end TV: the derivative of the expected accepted tokens in each acceptance.

    `accept` `[D, N]` float, the expected acceptance `a_d` of each block at each depth, 0 where the row does not count.
    With `L = sum_d prod_{j <= d} a_j`, `dL/da_i = prod_{j < i} a_j * (1 + sum_{d > i} prod_{i < j <= d} a_j)`: what
    reaches depth `i`, times one plus what follows from it. Nothing is divided, so a zero acceptance is exact. Detached.
    """
    a = accept.detach()
    reach = torch.cat([torch.ones_like(a[:1]), a[:-1].cumprod(0)])
    follows = torch.ones_like(a)
    for d in range(a.shape[0] - 2, -1, -1):
        follows[d] = 1 + a[d + 1] * follows[d + 1]
    return reach * follows


SHARE_FROM_HIDDEN = 2048
"""Hidden size from which, on a GPU, depths share a teacher's logits: below, the products saved cost less than sweeping
the columns that no row fills (`benchmarks/results/kernels.json`)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """The arguments of `draft_loss` that carry no gradient; see there."""

    factors: tuple[float, float, float, float]
    """Of ce, kl, reverse kl and tv in a row's loss."""
    rule: VerifyRule
    scale: float
    """One over the temperature."""
    rows: Tensor | None
    labels: Tensor
    teacher: Tensor
    teacher_rows: Tensor | None
    teacher_head: Tensor | None
    """None if `teacher` holds logits."""
    teacher_lse: Tensor | None
    label_logprob: Tensor | None
    weights: Tensor | None
    chain: Tensor | None
    depth: int
    top_p: float
    group: dist.ProcessGroup | None
    triton: bool
    """Whether Triton sweeps the logits."""
    grad: bool
    """Whether the states want a gradient."""
    grad_head: bool
    """Whether the head does."""


class Work:
    """The memory of a chunk, what is done with it, and what is kept of every row."""

    def __init__(self, states: Tensor, head: Tensor, job: Job, parts: Sequence[Part]) -> None:
        self._states, self._head, self._job = states, head, job
        self._first, _ = vocab_range(head.shape[0], job.group)
        assert head.shape[0] * (job.group.size() if job.group else 1) <= 1 << 24, "sweeps keep token ids in float32"
        columns = [(self._whole(p.columns), p.window or self._whole(p.columns)) for p in parts]
        widest = (max(sizes) for sizes in zip(*columns, strict=True)) if parts else (0, 0)
        self._draft, self._target = (states.new_empty(size * head.shape[0]) for size in widest)
        count = job.labels.shape[0]
        self._stats = Stats.empty(count, states)
        self._known = job.labels >= 0
        self._lse_t, self._overlap = states.new_empty(2, count, dtype=torch.float32)
        weights = torch.ones_like(self._lse_t) if job.weights is None else job.weights
        self._factors = torch.stack([weights * x for x in job.factors])
        self._factors[0] *= self._known

    def run(self, part: Part, d_states: Tensor | None, d_head: Tensor | None) -> None:
        """Statistics and gradients of the counting rows of `part`."""
        job, rows = self._job, part.rows
        slots = self._slots(part)
        x = self._take(self._states, rows if job.rows is None else job.rows[rows], slots, part.columns)
        sweeps, shift = self._logits(part, slots, x)
        stats, lse_t = self._stats.part(rows), self._lse_t[rows]
        wide = stats if slots is None else Stats.empty(part.columns, x)
        sweeps.stats(wide, job.group)
        if job.top_p < 1:
            sweeps.border = _nucleus(sweeps, wide.lse_t, job)
            sweeps.stats(wide, job.group)
        if slots is not None:
            stats.values.copy_(wide.values[:, slots])
            stats.ids.copy_(wide.ids[:, slots])
        if job.teacher_lse is None:
            lse_t.copy_(stats.lse_t)
        else:
            torch.sub(job.teacher_lse[rows], shift, out=lse_t)

        def spread(values: Tensor) -> Tensor:
            """`[.., columns]` from `[.., C]`, 0 in slots that no row has."""
            if slots is None:
                return values
            return values.new_zeros(*values.shape[:-1], part.columns).index_copy_(-1, slots, values)

        def collect(values: Tensor) -> Tensor:
            """`[.., C]` from `[.., columns]`, summed over ranks."""
            return self._everywhere(values if slots is None else values[..., slots])

        grad, tv = d_states is not None or d_head is not None, job.factors[3] != 0
        lse = spread(lse_t)
        moved = None
        if not grad or (tv and job.rule == "rejection"):
            self._overlap[rows], moved = collect(sweeps.overlap(wide.lse_z, lse))
        if tv:
            accept = self._accept(rows)
            if job.chain is not None:
                self._factors[3, rows] *= _by_block(accept, job.chain[rows], job.depth)
            summed = moved if job.rule == "rejection" else accept
        if grad:
            least = sweeps.gradient(
                wide,
                lse,
                spread(self._factors[:, rows] * job.scale),
                spread(summed) if tv and summed is not None else None,
                job.rule,
                reverse=job.factors[2] != 0,
            )
            if moved is None:
                self._overlap[rows] = collect(least)
            self._gradients(sweeps.z, part, slots, x, d_states, d_head)

    def results(self) -> tuple[Tensor, ...]:
        """The total, then the fields of `DraftLoss`."""
        job, s = self._job, self._stats
        everything = slice(0, len(job.labels))
        tv = 1 - self._accept(everything)
        ce = torch.where(self._known, s.lse_z - s.label_z, 0)
        reverse_kl = torch.full_like(s.kl, torch.inf) if job.top_p < 1 else s.reverse_kl
        if job.rule == "rejection":
            given = s.label_t - self._lse_t if job.label_logprob is None else job.label_logprob
            accept = torch.where(self._known, (s.label_z - s.lse_z - given).clamp(max=0).exp(), 0)
        else:
            accept = (s.best_z == job.labels).float()
        # a loss that is left out may be infinite
        losses = zip(job.factors, self._factors, (ce, s.kl, s.reverse_kl, tv), strict=True)
        total = torch.stack([(factor * loss).sum() for weight, factor, loss in losses if weight]).sum()
        return (
            total,
            ce,
            s.kl.clone(),
            reverse_kl.clone(),
            tv,
            self._overlap,
            (s.t_at_best_z - self._lse_t).exp(),
            (s.best_z == s.best_t).float(),
            s.entropy.clone(),
            accept,
        )

    def _accept(self, part: slice) -> Tensor:
        """`[C]` expected acceptance under the rule."""
        s = self._stats.part(part)
        if self._job.rule == "rejection":
            return self._overlap[part]
        if self._job.rule == "target":
            return s.product * (s.lse_t - self._lse_t[part]).exp()
        return (s.z_at_best_t - s.lse_z).exp()

    def _slots(self, part: Part) -> Tensor | None:
        """`[C]` the columns of the rows, those of one depth side by side in the order of their teachers, so that the
        target's columns come round again after each depth; None where row `i` is column `i`."""
        job = self._job
        if part.window is None:
            return None
        assert job.chain is not None and job.teacher_rows is not None
        return job.chain[part.rows] * part.window + job.teacher_rows[part.rows] - part.low

    def _logits(self, part: Part, slots: Tensor | None, x: Tensor) -> tuple[Sweeps, Tensor]:
        """Both blocks of logits, and what was subtracted from the target's, tempered, for each row `[C]`."""
        job = self._job
        labels = job.labels[part.rows]
        if job.group is not None:
            labels = labels - self._first
            labels = torch.where((labels >= 0) & (labels < self._head.shape[0]), labels, -1)
        own = labels if slots is None else labels.new_full((part.columns,), -1).index_copy_(0, slots, labels)
        z, _ = self._shifted(x, self._head.detach(), own, self._draft)
        if slots is None:
            source = part.rows if job.teacher_rows is None else job.teacher_rows[part.rows]
            teacher = self._take(job.teacher, source, None, part.columns)
            t, shift = self._shifted(teacher, job.teacher_head, labels, self._target)
            shift = shift[: part.columns]
        else:
            assert part.window is not None and job.teacher_rows is not None
            column = job.teacher_rows[part.rows] - part.low
            # the same token for every row of one teacher; any choice would do
            theirs = labels.new_full((part.window,), -1).index_copy_(0, column, labels)
            teacher = job.teacher[part.low : part.low + part.window]
            missing = part.window - len(teacher)
            teacher = torch.cat([teacher, teacher.new_zeros(missing, teacher.shape[1])]) if missing else teacher
            t, shift = self._shifted(teacher, job.teacher_head, theirs, self._target)
            shift = shift[column]
        sweeps = Sweeps(z, t, own, scale=job.scale, first=self._first, triton=job.triton)
        return sweeps, shift * job.scale

    def _shifted(self, x: Tensor, head: Tensor | None, labels: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`head @ x.T`, or the logits `x` turned over, each column less its label's logit, in `memory`; and what was
        taken off, float32."""
        out = memory[: self._head.shape[0] * len(x)].view(-1, len(x))
        # columns without a label are not shifted: that is as exact as any product in this dtype, and no less right
        if head is None:
            found = x[: len(labels)].gather(1, labels.clamp(min=0)[:, None])[:, 0]
            at_label = x.new_zeros(len(x), dtype=torch.float32)
            at_label[: len(labels)] = torch.where(labels >= 0, found, 0)
        else:
            at_label = label_logits(x, head, labels, use_triton=self._job.triton)
        shift = self._everywhere(at_label).to(x.dtype)
        if head is None:
            torch.sub(x.T, shift, out=out)
        else:
            torch.addmm(-shift, head, x.T, out=out)
        return out, shift.float()

    def _take(self, source: Tensor, rows: slice | Tensor, slots: Tensor | None, columns: int) -> Tensor:
        """`source[rows]`, in their slots, with zeros where no row is and up to whole tiles."""
        size = self._whole(columns)
        if slots is None and isinstance(rows, slice) and size == columns:
            return source[rows]
        out = source.new_zeros(size, source.shape[1])
        out[slice(columns) if slots is None else slots] = source[rows]
        return out

    def _whole(self, columns: int) -> int:
        """Columns in memory: on a GPU a multiple of what matrix products like."""
        return -(-columns // (ALIGN // 2)) * (ALIGN // 2) if self._job.triton else columns

    def _everywhere(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self._job.group is not None:
            dist.all_reduce(values, group=self._job.group)
        return values

    def _gradients(
        self,
        d_logits: Tensor,
        part: Part,
        slots: Tensor | None,
        x: Tensor,
        d_states: Tensor | None,
        d_head: Tensor | None,
    ) -> None:
        rows = part.rows if self._job.rows is None else self._job.rows[part.rows]
        columns = slice(part.columns) if slots is None else slots
        if d_states is not None:
            if isinstance(rows, slice) and slots is None and len(x) == part.columns:
                torch.mm(d_logits.T, self._head, out=d_states[rows])
            else:
                d_states[rows] = torch.mm(d_logits.T, self._head)[columns]
        if d_head is not None:
            # of slots without a row the gradient is 0
            add_product(d_head, d_logits[:, : part.columns], x[: part.columns], first=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A chunk of counting rows."""

    rows: slice
    columns: int
    """Of its block of draft logits."""
    low: int = 0
    """First of the teacher rows that its rows share."""
    window: int | None = None
    """How many columns their logits have; None if each row reads one of its own."""


def chunks_of(
    count: int,
    chunk_rows: int,
    *,
    chain: Tensor | None,
    teacher_rows: Tensor | None,
    depth: int,
    width: int,
    triton: bool,
) -> list[Part]:
    """Chunks of `count` counting rows, at most `chunk_rows` of them in each, none of which splits a block.

    `chain`, `teacher_rows` and `depth` as in `draft_loss`; `width` is that of the teacher's rows. Copies to the host at
    most twice: ends of blocks, and shared teachers.
    """
    if not count:
        return []
    pieces = -(-count // chunk_rows)
    size = -(-count // pieces)
    size = min(chunk_rows, -(-size // _ROUND) * _ROUND)
    ends = list(range(size, count, size))
    if ends and chain is not None:
        row = torch.arange(count, device=chain.device)
        starts = torch.where(chain == 0, row, count).flip(0).cummin(0).values.flip(0)
        ends = starts[size::size].tolist()
    parts = [slice(a, b) for a, b in pairwise([0, *ends, count]) if a < b]
    if teacher_rows is None or chain is None or depth == 1 or (chain.is_cuda and width < SHARE_FROM_HIDDEN):
        return [Part(rows=rows, columns=rows.stop - rows.start) for rows in parts]
    align = ALIGN if triton else 1
    edges = torch.stack([_edges(teacher_rows[rows], chain[rows]) for rows in parts]).tolist()
    return [
        _part(rows, low, high, unique, depth, align) for rows, (low, high, unique) in zip(parts, edges, strict=True)
    ]


def _part(rows: slice, low: int, high: int, unique: int, depth: int, align: int) -> Part:
    """With shared teachers, if that costs less: a column for each depth and teacher, whether a row has it or not."""
    count = rows.stop - rows.start
    window = -(-(high + 1 - low) // align) * align
    if unique and window * (2 * depth + 1) < 3 * count:
        return Part(rows=rows, columns=depth * window, low=low, window=window)
    return Part(rows=rows, columns=count)


def _edges(teacher_rows: Tensor, chain: Tensor) -> Tensor:
    """`[3]`: the least and the largest of `teacher_rows` `[C]`, and 1 if no two rows of one depth share one, else 0."""
    key = (chain * (teacher_rows.amax() + 1) + teacher_rows).sort().values
    unique = (key[1:] != key[:-1]).all()
    return torch.stack([teacher_rows.amin(), teacher_rows.amax(), unique])


def _nucleus(sweeps: Sweeps, lse_t: Tensor, job: Job) -> Tensor:
    """`[C]` float32, the target's logit, before scaling, that the fewest tokens which hold `top_p` reach: the largest
    one at which they do, found bit by bit. Sorts nothing, and works over ranks."""
    bits = 16 if sweeps.t.dtype == torch.bfloat16 else 32  # the rest of a float32's bits are 0
    key = torch.zeros(lse_t.shape, dtype=torch.int64, device=lse_t.device)
    for bit in range(31, 31 - bits, -1):
        trial = key | (1 << bit)
        mass = sweeps.mass_above(_from_key(trial), lse_t)
        if job.group is not None:
            dist.all_reduce(mass, group=job.group)
        key = torch.where(mass >= job.top_p, trial, key)
    return _from_key(key)


def _from_key(key: Tensor) -> Tensor:
    """The float32 numbers whose order is that of `key`, int64 in `0..2^32`."""
    bits = torch.where(key >= 1 << 31, key - (1 << 31), (1 << 32) - 1 - key)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _by_block(accept: Tensor, chain: Tensor, depth: int) -> Tensor:
    """`[C]` weights of end-to-end TV from the acceptances of rows `[C]`, whose `chain` counts through each block."""
    block = (chain == 0).cumsum(0) - 1
    table = accept.new_zeros(depth, len(accept))
    table[chain, block] = accept
    return end_to_end_weights(table)[chain, block]


_ROUND = 256
"""Chunks are multiples of this, where they can be: matrix products like whole tiles."""
_CHUNK_BYTES = 1280 * 2**20
"""Memory for both blocks of logits on a GPU."""


def chunk_size(device: torch.device, dtype: torch.dtype, vocab: int) -> int:
    """As many rows as the memory holds; on a CPU few, since their logits should stay in its cache."""
    if device.type != "cuda":
        return 128
    rows = _CHUNK_BYTES // (2 * vocab * dtype.itemsize)
    return max(_ROUND, rows // _ROUND * _ROUND)
