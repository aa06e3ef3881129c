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

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from miles_spec.kernels.backend import Backend, use_triton
from miles_spec.kernels.linear import add_product, autocast_inputs, no_autocast, vocab_range
from miles_spec.kernels.sweeps import Sweeps, merge

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
    `weights` float32 factors of the row's loss. Rows that lie close should read teacher rows that lie close: a chunk
    makes the logits of each once, so the depths of a block share them.

    `chain` `[n]` int64 below `depth` turns TV into end-to-end TV: the rows of one drafted block lie side by side and
    `chain` counts them from 0; a row's TV is then weighted by the derivative of the block's expected accepted tokens
    in the row's acceptance (`end_to_end_weights`).

    `top_p` below 1 truncates the target to the fewest tokens that hold that much probability, as a rollout with it
    samples; ties at the border stay in. It needs the full vocabulary, so `teacher_lse` must be left out.

    With `group`, `head` and `teacher_head` are this rank's equal share of the vocabulary, in rank order; labels are
    global; every rank returns the same, the head's gradient for its share.

    Raises `ValueError` for a mixture that is all zero, for `reverse_kl` under `top_p`, and for `top_p` with
    `teacher_lse`.
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
    if teacher_head is None:
        teacher_head = head.detach()
    else:
        (teacher_head,) = autocast_inputs(teacher_head.detach())
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
        fields = states.new_empty(9, job.labels.shape[0], dtype=torch.float32)
        total = states.new_zeros((), dtype=torch.float32)
        d_states = d_head = None
        if job.grad:
            d_states = torch.empty_like(states) if job.rows is None else torch.zeros_like(states)
        if job.grad_head:
            d_head = torch.zeros_like(head, dtype=torch.float32)
        work = _Work(states, head, job)
        with no_autocast(states):
            for part, window in _parts(job):
                total += work.run(part, window, fields[:, part], d_states, d_head)
        if d_states is not None and job.group is not None:
            wide = d_states.float()  # the ranks' shares are added in float32
            dist.all_reduce(wide, group=job.group)
            d_states = wide.to(d_states.dtype)
        ctx.save_for_backward(d_states, d_head)
        ctx.head_dtype = head.dtype
        ctx.set_materialize_grads(False)
        outputs = fields.unbind()
        ctx.mark_non_differentiable(*outputs)
        return total, *outputs

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
    """The memory of a chunk, and what is done with it."""

    def __init__(self, states: Tensor, head: Tensor, job: _Job) -> None:
        self._states, self._head, self._job = states, head, job
        self._first, _ = vocab_range(head.shape[0], job.group)
        # a chunk ends with a block, so it may be a little longer
        rows = min(job.labels.shape[0], job.chunk_rows + job.depth - 1)
        self._draft, self._target = (states.new_empty(rows * head.shape[0]) for _ in range(2))

    def run(
        self, part: slice, window: slice | None, fields: Tensor, d_states: Tensor | None, d_head: Tensor | None
    ) -> Tensor:
        """Fills `fields` `[9, C]` and the gradients for the counting rows `part`, whose teachers are the rows `window`
        or, without one, each its own; returns the sum of their losses."""
        job, mix = self._job, self._job.mix
        labels = job.labels[part]
        x = self._states[part if job.rows is None else job.rows[part]]
        sweeps, shift = self._logits(part, window, x)
        s = merge(sweeps.stats(self._first), job.group, job.triton)
        if job.top_p < 1:
            sweeps.border = _nucleus(sweeps, s.lse_t, job)
            s = merge(sweeps.stats(self._first), job.group, job.triton)
        lse_t = s.lse_t if job.teacher_lse is None else job.teacher_lse[part].float() - shift
        mass = (s.lse_t - lse_t).exp()
        known = labels >= 0
        weights = torch.ones_like(mass) if job.weights is None else job.weights[part]

        grad = d_states is not None or d_head is not None
        overlap = moved = None
        if not grad or (mix.tv and job.rule == "rejection"):
            overlap, moved = self._everywhere(sweeps.overlap(s.lse_z, lse_t))
        accept = {
            "rejection": overlap,
            "target": s.product * mass,
            "greedy": (s.z_at_best_t - s.lse_z).exp(),
        }[job.rule]
        tv_weights = mix.tv * weights
        if mix.tv and job.chain is not None:
            assert accept is not None
            tv_weights = tv_weights * _by_block(accept, job.chain[part], job.depth)
        if grad:
            zero = torch.zeros_like(mass)
            factors = [
                s.lse_z,
                s.lse_t,
                mass,
                torch.where(known, mix.ce * job.scale * weights, 0),
                mix.kl * job.scale * weights,
                mix.reverse_kl * job.scale * weights,
                s.reverse_kl,
                tv_weights * job.scale,
                moved if job.rule == "rejection" else accept,
            ]
            least = sweeps.gradient(
                torch.stack([zero if f is None else f for f in factors]),
                s.best_t - self._first,
                ce=mix.ce != 0,
                kl=mix.kl != 0,
                reverse=mix.reverse_kl != 0,
                rule=job.rule if mix.tv else "",
            )
            if overlap is None:
                overlap = self._everywhere(least)
            self._gradients(sweeps.z, part, x, d_states, d_head)
        assert overlap is not None
        accept = overlap if accept is None else accept

        if job.rule == "rejection":
            reference = s.label_t - lse_t if job.label_logprob is None else job.label_logprob[part]
            chance = torch.where(known, (s.label_z - s.lse_z - reference).clamp(max=0).exp(), 0)
        else:
            chance = (s.best_z == labels).float()
        ce = torch.where(known, s.lse_z - s.label_z, 0)
        values = (
            ce,
            s.kl,
            torch.full_like(s.kl, torch.inf) if job.top_p < 1 else s.reverse_kl,
            1 - accept,
            overlap,
            (s.t_at_best_z - lse_t).exp(),
            (s.best_z == s.best_t).float(),
            s.entropy,
            chance,
        )
        fields.copy_(torch.stack(values))
        loss = mix.ce * ce + mix.kl * s.kl
        if mix.reverse_kl:
            loss = loss + mix.reverse_kl * s.reverse_kl
        return (weights * loss + tv_weights * (1 - accept)).sum()

    def _logits(self, part: slice, window: slice | None, x: Tensor) -> tuple[Sweeps, Tensor]:
        """Both blocks of logits, and what the target's were lessened by, tempered, for each row `[C]`."""
        job = self._job
        labels = job.labels[part] - self._first
        labels = torch.where((labels >= 0) & (labels < self._head.shape[0]), labels, -1)
        z = self._view(self._draft, len(x))
        self._shifted(x, self._head.detach(), labels, z)
        columns = None
        if window is None:
            own = part if job.teacher_rows is None else job.teacher_rows[part]
            teacher, teacher_labels = job.teacher[own], labels
        else:
            assert job.teacher_rows is not None
            columns = job.teacher_rows[part] - window.start
            teacher = job.teacher[window]
            # the same token for every row of one teacher; any choice would do
            teacher_labels = labels.new_full((len(teacher),), -1).index_copy_(0, columns, labels)
        t = self._view(self._target, len(teacher))
        if job.teacher_head is None:
            shift = self._at_label(teacher, teacher_labels)
            torch.sub(teacher.T, shift.to(teacher.dtype), out=t)
        else:
            shift = self._shifted(teacher, job.teacher_head, teacher_labels, t)
        shift = (shift if columns is None else shift[columns]) * job.scale
        return Sweeps(z, t, labels, scale=job.scale, columns=columns, use_triton=job.triton), shift

    def _view(self, memory: Tensor, columns: int) -> Tensor:
        rows = self._head.shape[0]
        return memory[: rows * columns].view(rows, columns)

    def _shifted(self, x: Tensor, head: Tensor, labels: Tensor, out: Tensor) -> Tensor:
        """`head @ x.T`, each column less its label's logit, in `out`; returns what was taken off, float32."""
        # columns without a label are not shifted: that is as exact as any product in this dtype, and no less right
        at_label = (x.float() * head[labels.clamp(min=0)].float()).sum(-1)
        shift = self._everywhere(torch.where(labels >= 0, at_label, 0)).to(x.dtype)
        torch.addmm(-shift, head, x.T, out=out)
        return shift.float()

    def _at_label(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`[m]` float32, the teacher's logit of the label, 0 without one, in the precision of `logits`."""
        found = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].float()
        return self._everywhere(torch.where(labels >= 0, found, 0)).to(logits.dtype).float()

    def _everywhere(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self._job.group is not None:
            dist.all_reduce(values, group=self._job.group)
        return values

    def _gradients(
        self, d_logits: Tensor, part: slice, x: Tensor, d_states: Tensor | None, d_head: Tensor | None
    ) -> None:
        rows = self._job.rows
        if d_states is not None:
            if rows is None:
                torch.mm(d_logits.T, self._head, out=d_states[part])
            else:
                d_states.index_copy_(0, rows[part], torch.mm(d_logits.T, self._head))
        if d_head is not None:
            add_product(d_head, d_logits, x, first=False)


def _parts(job: _Job) -> Iterator[tuple[slice, slice | None]]:
    """Chunks of counting rows, none of which splits a block, each with the window of teacher rows that it reads, or
    None if its rows shall read one each. Copies to the host at most twice: ends of blocks, and shared teachers."""
    count = job.labels.shape[0]
    if not count:
        return
    pieces = -(-count // job.chunk_rows)
    size = -(-count // pieces)
    size = min(job.chunk_rows, -(-size // _ROUND) * _ROUND)
    ends = list(range(size, count, size))
    device = job.labels.device
    if ends and job.chain is not None:
        row = torch.arange(count, device=device)
        starts = torch.where(job.chain == 0, row, count).flip(0).cummin(0).values.flip(0)
        ends = starts[size::size].tolist()
    bounds = [0, *ends, count]
    parts = [slice(a, b) for a, b in pairwise(bounds) if a < b]
    if job.teacher_rows is None:
        yield from ((part, None) for part in parts)
        return
    edges = [torch.stack([f(job.teacher_rows[part]) for f in (torch.amin, torch.amax)]) for part in parts]
    for part, (low, high) in zip(parts, torch.stack(edges).tolist(), strict=True):
        # a window wider than its rows would cost more than it saves, and more memory than there is
        shared = high + 1 - low < part.stop - part.start
        yield part, slice(low, high + 1) if shared else None


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
