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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from miles_spec.kernels.backend import Backend, use_triton
from miles_spec.kernels.draft_chunks import Job, Part, Work, chunk_size, chunks_of
from miles_spec.kernels.linear import autocast_inputs, no_autocast

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
    chunks: Sequence[Part] | None = None,
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

    `chunks` says how the rows are cut, as `plan_chunks` found it; left out, it is found here, for which the host waits
    for the device. Nothing else here does.

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
    job = Job(
        factors=(mix.ce, mix.kl, mix.reverse_kl, mix.tv),
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
        grad=torch.is_grad_enabled() and states.requires_grad,
        grad_head=torch.is_grad_enabled() and head.requires_grad,
    )
    if chunks is None:
        chunks = chunks_of(
            count,
            chunk_rows or chunk_size(states.device, states.dtype, head.shape[0]),
            chain=chain,
            teacher_rows=teacher_rows,
            depth=depth,
            width=teacher.shape[1],
            triton=job.triton,
        )
    total, *rest = _DraftLoss.apply(states, head, job, chunks)
    names = ("ce", "kl", "reverse_kl", "tv", "overlap", "chosen", "agree", "entropy", "accept")
    return DraftLoss(total=total, **dict(zip(names, rest, strict=True)))


def plan_chunks(
    chain: Tensor,
    teacher_rows: Tensor,
    *,
    depth: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
) -> list[Part]:
    """`chunks` of `draft_loss` for these rows, states `hidden` wide of `dtype`, and a head of `vocab` rows on this
    rank. Copies to the host at most twice."""
    return chunks_of(
        len(chain),
        chunk_size(chain.device, dtype, vocab),
        chain=chain,
        teacher_rows=teacher_rows,
        depth=depth,
        width=hidden,
        triton=use_triton("auto", chain),
    )


class _DraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, job: Job, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        d_states = d_head = None
        if job.grad:
            d_states = torch.empty_like(states) if job.rows is None else torch.zeros_like(states)
        if job.grad_head:
            d_head = torch.zeros_like(head, dtype=torch.float32)
        work = Work(states, head, job, parts)
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
            return None, None, None, None
        return (
            # the factor, often one over a count, must not be rounded to half precision
            None if d_states is None else (d_states.float() * grad).to(d_states.dtype),
            None if d_head is None else (d_head * grad).to(ctx.head_dtype),
            None,
            None,
        )
