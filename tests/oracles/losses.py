"""Log-probabilities and draft losses as plain expressions in float64.

`rounding` names the dtype that the logits themselves are rounded to, as a matrix product of that dtype rounds them; the
gradient ignores it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(hidden: Tensor, head: Tensor, rounding: torch.dtype) -> Tensor:
    """`hidden @ head.T`, rounded to `rounding` if that is a half precision."""
    exact = hidden @ head.T
    return exact if rounding == torch.float32 else exact + (exact.to(rounding) - exact).detach()


def logprob(
    hidden: Tensor, head: Tensor, labels: Tensor, temperature: float, rounding: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the labels, entropy and log-sum-exp."""
    logits = product(hidden, head, rounding) / temperature
    logp = torch.log_softmax(logits, -1)
    return logp[torch.arange(len(labels)), labels], -(logp.exp() * logp).sum(-1), torch.logsumexp(logits, -1)


def draft_loss(
    states: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor,
    teacher_lse: Tensor,
    label_logprob: Tensor,
    rule: str,
    temperature: float,
    rounding: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ce`, `kl`, `tv`, `accept`, written one row at a time."""
    out: list[tuple[Tensor, ...]] = []
    for n, label in enumerate(labels.tolist()):
        q = torch.softmax(product(states[n], head, rounding) / temperature, 0)
        p = torch.exp(product(teacher_hidden[n], head, rounding) / temperature - teacher_lse[n])
        zero = q.sum() * 0
        ce = zero if label < 0 else -torch.log(q[label])
        share = p / p.sum()
        kl = (share * torch.log(share / q)).sum()
        if rule == "rejection":
            a = torch.stack([torch.min(pv, qv) for pv, qv in zip(p, q, strict=True)]).sum()
            chance = zero if label < 0 else torch.clamp(q[label] / torch.exp(label_logprob[n]), max=1)
        else:
            a = q[int(p.argmax())] if rule == "greedy" else p @ q
            chance = zero + float(int(q.argmax()) == label)
        out.append((ce, kl, 1 - a, chance.detach()))
    ce, kl, tv, accept = (torch.stack(column) for column in zip(*out, strict=True))
    return ce, kl, tv, accept
