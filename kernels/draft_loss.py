r"""The draft's losses against the target's own distribution: cross-entropy, KL in both directions, acceptance (TV).

From states before the LM head to the loss, the gradient of the states, and what the draft's proposals are worth, a
bounded chunk of rows at a time. Invariant: no `[N, V]` tensor exists, and the forward makes the gradient too, so there
are three matrix products: both logits and the gradient. `README.md` beside this file derives everything used here.

With `q` the draft's distribution, `p` the target's (its sum `P` over a reduced vocabulary may be below 1), `x` the
realised token, the losses of a row and their gradients in the draft's tempered logits `z_k` are

    ce          -log q_x                 q_k - 1[k = x]
    kl          KL(p / P || q)           q_k - p_k / P
    reverse_kl  KL(q || p / P)           q_k (log q_k - log p_k + log P - reverse_kl)
    tv          1 - a                    -da/dz_k, where `a` is the acceptance that the verify rule gives:
      rejection   a = sum_v min(p_v, q_v)     da/dz_k = q_k (m_k - sum_v m_v q_v),  m_v = 1[q_v < p_v]
      target      a = sum_v p_v q_v           da/dz_k = q_k (p_k - a)
      greedy      a = q_i, i = argmax p       da/dz_k = q_k (1[k = i] - a)

Acceptance rules: Leviathan et al., 2023, arXiv 2211.17192, section 3. Under `target` the draft proposes its argmax,
whose acceptance is not differentiable; `sum p q` is that of a proposal drawn from `q`.

Logits lie vocabulary first, `[V, n]`, in the inputs' dtype, each row less its realised token's logit: a matrix product
can subtract that for free there, and rounding to bfloat16 then costs likely tokens next to nothing.

Dimensions: `N` states, `n` rows of them that count, `M` teacher rows, `H` hidden, `V` the draft's vocabulary, `C` rows
of a chunk, `D` depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from miles_spec.kernels.backend import Backend, use_triton
from miles_spec.kernels.linear import add_product, autocast_inputs, no_autocast, vocab_range
from miles_spec.kernels.sweeps import Stats, Sweeps
from miles_spec.kernels.sweeps_triton import ALIGN, label_logits

if TYPE_CHECKING:
    from miles_spec.types import VerifyRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What the loss of a row is made of: a weighted sum."""

    ce: float = 0.0
    """Hard cross-entropy to the realised token."""
    kl: float = 0.0
    """KL(target || draft), the soft cross-entropy less the target's entropy."""
    reverse_kl: float = 0.0
    """KL(draft || target)."""
    tv: float = 0.0
    """One minus the acceptance of the verify rule."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftLoss:
    """The loss, and per row `[n]` float32, detached, everything that the same sweeps gave."""

    total: Tensor
    """`[]` float32, the weighted sum over rows; differentiable in the states, and in the head if that wants one."""
    ce: Tensor
    """Nats; 0 where the realised token is outside the draft's vocabulary."""
    kl: Tensor
    """Nats, to the target's distribution restricted to the draft's vocabulary."""
    reverse_kl: Tensor
    """Nats, of the same; infinite under `top_p`."""
    tv: Tensor
    """One minus the expected acceptance under the rule."""
    overlap: Tensor
    """`sum_v min(p_v, q_v)`, the acceptance of rejection sampling."""
    chosen: Tensor
    """`p(argmax q)`, the acceptance of a proposed argmax."""
    agree: Tensor
    """1 where draft and target have the same most likely token of the draft's vocabulary, else 0."""
    entropy: Tensor
    """Entropy of the draft's distribution, nats."""
    accept: Tensor
    """Probability that the drafted token was accepted, given the realised one."""


def draft_loss(
    states: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    labels: Tensor,
    *,
    mix: Mix,
    rule: VerifyRule,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    label_logprob: Tensor | None = None,
    weights: Tensor | None = None,
    chain: Tensor | None = None,
    depth: int = 1,
    top_p: float = 1.0,
    group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
    chunk_rows: int | None = None,
) -> DraftLoss:
    """Losses of draft states against the target's rows that they imitate.

    `states` `[N, H]` before the head; `head` `[V, H]`, the rows of the draft's vocabulary, with a gradient only if it
    requires one (a draft that owns its head); `teacher_hidden` `[M, Ht]`, the target's states before its head
    `teacher_head` `[V, Ht]`, which is `head` if left out; or, with no second head, `teacher_hidden` `[M, V]` of the
    target's logits where their width is not `H`. Bfloat16, float16 or float32. Temperature 0 (greedy) counts as 1.

    `rows` `[n]` int64 names the states that count, each once; all if left out. The rest is by counting row, `[n]`:
    `labels` int64 in the draft's vocabulary, -1 outside; `teacher_rows` int64 into `teacher_hidden`, left out for row
    `i`; `teacher_lse` float32, log-sum-exp of the target's tempered logits over its full vocabulary, left out if that
    is the draft's; `label_logprob` float32, the target's log-probability of the realised token, left out likewise;
    `weights` float32 factors of the row's loss.

    `chain` `[n]` int64 below `depth` says that the rows of one drafted block lie side by side, and counts them from 0.
    TV is then end-to-end TV: a row's is weighted by the derivative of the block's expected accepted tokens in its
    acceptance (`end_to_end_weights`). And where blocks lie in the order of their teachers, the logits of a teacher row
    are made once for all depths, `2 + 1 / depth` products in place of three.

    `top_p` below 1 truncates the target to the fewest tokens that hold that much probability, as a rollout with it
    samples; ties at the border stay in. It needs the full vocabulary, so `teacher_lse` must be left out.

    With `group`, `head` and `teacher_head` are this rank's equal share of the vocabulary, in rank order; labels are
    global; every rank returns the same, the head's gradient for its share.

    Raises `ValueError` for a mixture that is all zero, for `reverse_kl` under `top_p`, for `top_p` with `teacher_lse`,
    and for widths or dtypes that do not fit together.
    """
    if not any((mix.ce, mix.kl, mix.reverse_kl, mix.tv)):
        raise ValueError("the mixture of losses is all zero: give ce, kl, reverse_kl or tv a weight")
    if top_p < 1 and mix.reverse_kl:
        raise ValueError("reverse_kl is infinite where top_p cuts the target off: leave one of them out")
    if top_p < 1 and teacher_lse is not None:
        raise ValueError("top_p needs the target's full vocabulary: leave teacher_lse out")
    from_logits = teacher_head is None and teacher_hidden.shape[1] != head.shape[1]
    if from_logits and teacher_hidden.shape[1] != head.shape[0]:
        raise ValueError(
            f"teacher_hidden is {teacher_hidden.shape[1]} wide: neither the head's hidden size {head.shape[1]} nor its "
            f"vocabulary {head.shape[0]}"
        )
    states, head, teacher = autocast_inputs(states, head, teacher_hidden.detach())
    (teacher_head,) = (head.detach(),) if teacher_head is None else autocast_inputs(teacher_head.detach())
    dtypes = {x.dtype for x in (states, head, teacher, teacher_head)}
    if len(dtypes) > 1:
        raise ValueError(f"states, heads and teacher must be of one dtype, not of {sorted(map(str, dtypes))}")
    # kernels walk along rows
    states, head, teacher, teacher_head = (x.contiguous() for x in (states, head, teacher, teacher_head))
    labels = labels.contiguous()
    count = states.shape[0] if rows is None else rows.shape[0]
    assert labels.shape == (count,)
    job = _Job(
        mix=mix,
        rule=rule,
        scale=1 / (temperature or 1.0),
        rows=rows,
        labels=labels,
        teacher=teacher,
        teacher_rows=teacher_rows,
        teacher_head=None if from_logits else teacher_head,
        teacher_lse=teacher_lse,
        label_logprob=label_logprob,
        weights=None if weights is None else weights.detach().float(),
        chain=chain,
        depth=depth,
        top_p=top_p,
        group=group,
        triton=use_triton(backend, states),
        chunk_rows=chunk_rows or _chunk_rows(states, head.shape[0]),
        grad=torch.is_grad_enabled() and states.requires_grad,
        grad_head=torch.is_grad_enabled() and head.requires_grad,
    )
    total, *rest = _DraftLoss.apply(states, head, job)
    names = ("ce", "kl", "reverse_kl", "tv", "overlap", "chosen", "agree", "entropy", "accept")
    return DraftLoss(total=total, **dict(zip(names, rest, strict=True)))


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    """The arguments of `draft_loss` that carry no gradient; see there."""

    mix: Mix
    rule: VerifyRule
    scale: float
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
    chunk_rows: int
    grad: bool
    grad_head: bool


class _DraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, job: _Job) -> tuple[Tensor, ...]:
        d_states = d_head = None
        if job.grad:
            d_states = torch.empty_like(states) if job.rows is None else torch.zeros_like(states)
        if job.grad_head:
            d_head = torch.zeros_like(head, dtype=torch.float32)
        parts = _parts(job)
        work = _Work(states, head, job, parts)
        with no_autocast(states):
            for part in parts:
                work.run(part, d_states, d_head)
        if d_states is not None and job.group is not None:
            wide = d_states.float()  # the ranks' shares are added in float32
            dist.all_reduce(wide, group=job.group)
            d_states = wide.to(d_states.dtype)
        ctx.save_for_backward(d_states, d_head)
        ctx.head_dtype = head.dtype
        ctx.set_materialize_grads(False)
        total, *fields = work.results()
        ctx.mark_non_differentiable(*fields)
        return total, *fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        d_states, d_head = ctx.saved_tensors
        if grad is None:
            return None, None, None
        return (
            # the factor, often one over a count, must not be rounded to half precision
            None if d_states is None else (d_states.float() * grad).to(d_states.dtype),
            None if d_head is None else (d_head * grad).to(ctx.head_dtype),
            None,
        )


class _Work:
    """The memory of a chunk, what is done with it, and what is kept of every row."""

    def __init__(self, states: Tensor, head: Tensor, job: _Job, parts: Sequence[_Part]) -> None:
        self._states, self._head, self._job = states, head, job
        self._first, _ = vocab_range(head.shape[0], job.group)
        columns = [(self._whole(p.columns), p.window or self._whole(p.columns)) for p in parts]
        widest = (max(sizes) for sizes in zip(*columns, strict=True)) if parts else (0, 0)
        self._draft, self._target = (states.new_empty(size * head.shape[0]) for size in widest)
        count = job.labels.shape[0]
        self._stats = Stats.empty(count, states)
        self._known = job.labels >= 0
        self._lse_t, self._overlap = states.new_empty(2, count, dtype=torch.float32)
        weights = torch.ones_like(self._lse_t) if job.weights is None else job.weights
        self._factors = torch.stack([weights * x for x in _weights(job.mix)])
        self._factors[0] *= self._known

    def run(self, part: _Part, d_states: Tensor | None, d_head: Tensor | None) -> None:
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

        grad, tv = d_states is not None or d_head is not None, job.mix.tv != 0
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
                reverse=job.mix.reverse_kl != 0,
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
        losses = zip(_weights(job.mix), self._factors, (ce, s.kl, s.reverse_kl, tv), strict=True)
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

    def _slots(self, part: _Part) -> Tensor | None:
        """`[C]` the columns of the rows, those of one depth side by side in the order of their teachers, so that the
        target's columns come round again after each depth; None where row `i` is column `i`."""
        job = self._job
        if part.window is None:
            return None
        assert job.chain is not None and job.teacher_rows is not None
        return job.chain[part.rows] * part.window + job.teacher_rows[part.rows] - part.low

    def _logits(self, part: _Part, slots: Tensor | None, x: Tensor) -> tuple[Sweeps, Tensor]:
        """Both blocks of logits, and what the target's were lessened by, tempered, for each row `[C]`."""
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
        at_label = x.new_zeros(len(x), dtype=torch.float32)
        # columns without a label are not shifted: that is as exact as any product in this dtype, and no less right
        if head is None:
            found = x[: len(labels)].gather(1, labels.clamp(min=0)[:, None])[:, 0]
            at_label[: len(labels)] = torch.where(labels >= 0, found, 0)
        elif self._job.triton:
            label_logits(x, head, labels, at_label)
        else:
            found = (x[: len(labels)].float() * head[labels.clamp(min=0)].float()).sum(-1)
            at_label[: len(labels)] = torch.where(labels >= 0, found, 0)
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
        part: _Part,
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


def _weights(mix: Mix) -> tuple[float, float, float, float]:
    return mix.ce, mix.kl, mix.reverse_kl, mix.tv


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A chunk of counting rows."""

    rows: slice
    columns: int
    """Of its block of draft logits."""
    low: int = 0
    """First of the teacher rows that its rows share."""
    window: int | None = None
    """How many columns their logits have; None if each row reads one of its own."""


def _parts(job: _Job) -> list[_Part]:
    """Chunks of counting rows, none of which splits a block. Copies to the host at most twice: ends of blocks, and
    shared teachers."""
    count = job.labels.shape[0]
    if not count:
        return []
    pieces = -(-count // job.chunk_rows)
    size = -(-count // pieces)
    size = min(job.chunk_rows, -(-size // _ROUND) * _ROUND)
    ends = list(range(size, count, size))
    if ends and job.chain is not None:
        row = torch.arange(count, device=job.labels.device)
        starts = torch.where(job.chain == 0, row, count).flip(0).cummin(0).values.flip(0)
        ends = starts[size::size].tolist()
    parts = [slice(a, b) for a, b in pairwise([0, *ends, count]) if a < b]
    if job.teacher_rows is None or job.chain is None or job.depth == 1:
        return [_Part(rows=rows, columns=rows.stop - rows.start) for rows in parts]
    align = ALIGN if job.triton else 1
    edges = torch.stack([_edges(job.teacher_rows[rows], job.chain[rows]) for rows in parts]).tolist()
    return [
        _part(rows, low, high, unique, job.depth, align) for rows, (low, high, unique) in zip(parts, edges, strict=True)
    ]


def _part(rows: slice, low: int, high: int, unique: int, depth: int, align: int) -> _Part:
    """With shared teachers, if that costs less: a column for each depth and teacher, whether a row has it or not."""
    count = rows.stop - rows.start
    window = -(-(high + 1 - low) // align) * align
    if unique and window * (2 * depth + 1) < 3 * count:
        return _Part(rows=rows, columns=depth * window, low=low, window=window)
    return _Part(rows=rows, columns=count)


def _edges(teacher_rows: Tensor, chain: Tensor) -> Tensor:
    """`[3]`: the least and the largest of `teacher_rows` `[C]`, and 1 if no two rows of one depth share one, else 0."""
    key = (chain * (teacher_rows.amax() + 1) + teacher_rows).sort().values
    unique = (key[1:] != key[:-1]).all()
    return torch.stack([teacher_rows.amin(), teacher_rows.amax(), unique])


def _nucleus(sweeps: Sweeps, lse_t: Tensor, job: _Job) -> Tensor:
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


def _chunk_rows(states: Tensor, vocab: int) -> int:
    """As many rows as the memory holds; on a CPU few, since their logits should stay in its cache."""
    if not states.is_cuda:
        return 128
    rows = _CHUNK_BYTES // (2 * vocab * states.element_size())
    return max(_ROUND, rows // _ROUND * _ROUND)
