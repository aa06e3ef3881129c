r"""The draft's losses against the target's own distribution: cross-entropy, KL and acceptance (TV).

Draft and teacher share one frozen head, so both logits are recomputed from hidden states. Invariant: at most
`chunk_rows` rows of logits exist at a time; between forward and backward only per-row scalars are kept.

With `q = softmax(z)`, `z` the draft's tempered logits, `p_v = exp(t_v - teacher_lse)` the target's probabilities (their
sum `P` is below 1 over a reduced vocabulary), `x` the realised token, the losses and their gradients in `z_k` are

    ce = -log q_x                       q_k - 1[k = x]
    kl = KL(p / P || q)                 q_k - p_k / P
    tv = 1 - a                          -da/dz_k, where `a` is the acceptance that the verify rule gives:
      rejection   a = sum_v min(p_v, q_v)     da/dz_k = q_k (m_k - sum_v m_v q_v),  m_v = 1[q_v < p_v]
      target      a = sum_v p_v q_v           da/dz_k = q_k (p_k - a)
      greedy      a = q_i, i = argmax p       da/dz_k = q_k (1[k = i] - a)

`min(p, q)` moves with `q` only where `q` is the smaller (a tie takes the side that does not move), and
`dq_v/dz_k = q_v (1[v = k] - q_k)`; sum both over `v`. Under `target` the draft proposes its argmax, whose acceptance is
not differentiable; `sum p q` is the acceptance of a proposal drawn from `q`, which is largest where `q` sits on `p`'s
argmax. Each of these gradients carries a factor `q_k`, which is why TV alone hardly moves from a cold start. Acceptance
rules: Leviathan et al., 2023, arXiv 2211.17192, section 3.

Dimensions: `N` rows, `H` hidden, `Vd` the draft's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_spec.kernels.logprob import autocast_inputs, chunks, no_autocast

if TYPE_CHECKING:
    from miles_spec.types import VerifyRule


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftLossRows:
    """Per row, all `[N]` float32; `ce`, `kl` and `tv` are differentiable in the draft's states."""

    ce: Tensor
    """Nats; 0 where the realised token is outside the draft's vocabulary."""
    kl: Tensor
    """Nats, to the target's distribution restricted to the draft's vocabulary."""
    tv: Tensor
    """One minus the expected acceptance."""
    accept: Tensor
    """Probability that the drafted token was accepted given the realised one; detached."""


def draft_loss(
    states: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor,
    teacher_lse: Tensor,
    label_logprob: Tensor,
    *,
    rule: VerifyRule,
    temperature: float,
    chunk_rows: int = 128,
) -> DraftLossRows:
    """Losses of draft states against the target's rows that they imitate.

    `states` and `teacher_hidden` `[N, H]`, before the head; `head` `[Vd, H]`, the target head's rows of the draft's
    vocabulary, no gradient; `labels` `[N]` int64 in the draft's vocabulary, -1 for a token outside it; `teacher_lse`
    `[N]` float32, log-sum-exp of the target's tempered logits over its full vocabulary; `label_logprob` `[N]` float32,
    the target's log-probability of the realised token. Temperature 0 (greedy) counts as 1.
    """
    states, head, teacher_hidden = autocast_inputs(states, head.detach(), teacher_hidden.detach())
    ce, kl, tv, accept = _DraftLoss.apply(
        states, head, labels, teacher_hidden, teacher_lse, label_logprob, rule, temperature or 1.0, chunk_rows
    )
    return DraftLossRows(ce=ce, kl=kl, tv=tv, accept=accept)


class _DraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor,
        teacher_lse: Tensor,
        label_logprob: Tensor,
        rule: VerifyRule,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, ...]:
        ce, kl, tv, accept, lse = (states.new_empty(states.shape[0], dtype=torch.float32) for _ in range(5))
        with no_autocast(states):
            for rows in chunks(states.shape[0], chunk_rows):
                log_q = (states[rows] @ head.T).float().div_(temperature)
                lse[rows] = torch.logsumexp(log_q, -1)
                log_q -= lse[rows, None]
                log_p = (teacher_hidden[rows] @ head.T).float().div_(temperature).sub_(teacher_lse[rows, None])
                known = labels[rows] >= 0
                label_log_q = log_q.gather(-1, labels[rows, None].clamp(min=0)).squeeze(-1)
                ce[rows] = torch.where(known, -label_log_q, 0)

                log_mass = torch.logsumexp(log_p, -1, keepdim=True)
                kl[rows] = ((log_p - log_mass).exp() * (log_p - log_mass - log_q)).sum(-1)
                if rule == "greedy":
                    a = log_q.gather(-1, log_p.argmax(-1, keepdim=True)).squeeze(-1).exp()
                elif rule == "target":
                    a = (log_p + log_q).exp().sum(-1)
                else:
                    a = torch.minimum(log_p, log_q).exp().sum(-1)
                tv[rows] = 1 - a

                if rule == "rejection":
                    chance = (label_log_q - label_logprob[rows]).clamp(max=0).exp()
                    accept[rows] = torch.where(known, chance, 0)
                else:
                    accept[rows] = (log_q.argmax(-1) == labels[rows]).float()
        ctx.save_for_backward(states, head, labels, teacher_hidden, teacher_lse, lse)
        ctx.rule, ctx.temperature, ctx.chunk_rows = rule, temperature, chunk_rows
        ctx.mark_non_differentiable(accept)
        ctx.set_materialize_grads(False)
        return ce, kl, tv, accept

    @staticmethod
    def backward(
        ctx: Any, g_ce: Tensor | None, g_kl: Tensor | None, g_tv: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        states, head, labels, teacher_hidden, teacher_lse, lse = ctx.saved_tensors
        d_states = torch.empty_like(states)
        with no_autocast(states):
            for rows in chunks(states.shape[0], ctx.chunk_rows):
                q = (states[rows] @ head.T).float().div_(ctx.temperature).sub_(lse[rows, None]).exp_()
                d_z = torch.zeros_like(q)
                if g_ce is not None:
                    g = torch.where(labels[rows] >= 0, g_ce[rows], 0)[:, None]
                    d_z += g * q
                    d_z.scatter_add_(-1, labels[rows, None].clamp(min=0), -g)
                if g_kl is not None or g_tv is not None:
                    log_p = (teacher_hidden[rows] @ head.T).float().div_(ctx.temperature).sub_(teacher_lse[rows, None])
                    if g_kl is not None:
                        d_z += g_kl[rows, None] * (q - torch.softmax(log_p, -1))
                    if g_tv is not None:
                        d_z -= g_tv[rows, None] * _acceptance_gradient(q, log_p, ctx.rule)
                d_states[rows] = d_z.div_(ctx.temperature).to(head.dtype) @ head
        return d_states, None, None, None, None, None, None, None, None


def _acceptance_gradient(q: Tensor, log_p: Tensor, rule: VerifyRule) -> Tensor:
    """`[rows, Vd]` derivative of the acceptance in the draft's tempered logits: `q_k (m_k - sum_v m_v q_v)`."""
    if rule == "greedy":
        moves = torch.zeros_like(q).scatter_(-1, log_p.argmax(-1, keepdim=True), 1)
    elif rule == "target":
        moves = log_p.exp()
    else:
        moves = (q < log_p.exp()).float()
    return q * (moves - (moves * q).sum(-1, keepdim=True))
