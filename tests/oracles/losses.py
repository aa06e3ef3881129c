"""Log-probabilities and draft losses as plain expressions in float64.

`rounding` names the dtype that the logits themselves are rounded to, as a matrix product of that dtype rounds them; the
gradient ignores it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from miles_spec.kernels.draft_loss import Mix


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one draft row is worth; tensors `[]` in float64, differentiable where the loss is."""

    ce: Tensor
    kl: Tensor
    reverse_kl: Tensor
    tv: Tensor
    overlap: Tensor
    chosen: Tensor
    agree: Tensor
    entropy: Tensor
    accept: Tensor


def draft_row(
    logits: Tensor,
    teacher_logits: Tensor,
    label: int,
    rule: str,
    *,
    lse: Tensor | None = None,
    label_logprob: Tensor | None = None,
    top_p: float = 1.0,
) -> Row:
    """From tempered logits `[V]` of draft and target; see `DraftLoss` for the fields."""
    q = torch.softmax(logits, 0)
    p = torch.exp(teacher_logits - (torch.logsumexp(teacher_logits, 0) if lse is None else lse))
    if top_p < 1:
        p = nucleus(p, top_p)
    zero = q.sum() * 0
    # in logarithms, so that neither a far draft nor a target that lies elsewhere underflows
    kept = p > 0 if top_p < 1 else torch.ones_like(p, dtype=torch.bool)
    log_q = torch.log_softmax(logits, 0)
    log_share = torch.log_softmax(teacher_logits.masked_fill(~kept, -torch.inf), 0)
    kl = (log_share[kept].exp() * (log_share[kept] - log_q[kept])).sum()
    reverse = (q * (log_q - log_share)).sum() if bool(kept.all()) else zero + torch.inf
    overlap = torch.stack([torch.min(pv, qv) for pv, qv in zip(p, q, strict=True)]).sum()
    if rule == "rejection":
        a = overlap
        given = p[label] if label_logprob is None else torch.exp(label_logprob)
        accept = zero if label < 0 else torch.clamp(q[label] / given, max=1)
    else:
        a = q[int(p.argmax())] if rule == "greedy" else p @ q
        accept = zero + float(int(q.argmax()) == label)
    return Row(
        ce=zero if label < 0 else -log_q[label],
        kl=kl,
        reverse_kl=reverse,
        tv=1 - a,
        overlap=overlap.detach(),
        chosen=p[int(q.argmax())].detach(),
        agree=zero.detach() + float(int(q.argmax()) == int(p.argmax())),
        entropy=-(q * log_q).sum().detach(),
        accept=accept.detach(),
    )


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """`p` `[V]` cut to the fewest tokens that hold `top_p`, likeliest first, and brought to one again."""
    order = torch.argsort(p, descending=True)
    kept, held = torch.zeros_like(p, dtype=torch.bool), 0.0
    for v in order.tolist():
        if held >= top_p:
            break
        kept[v] = True
        held += float(p[v])
    return torch.where(kept, p, 0) / p[kept].sum()


def block_weights(accepts: Sequence[float]) -> list[float]:
    """Derivative of a block's expected accepted tokens in each acceptance, by its definition."""

    def length(a: Sequence[float]) -> float:
        return sum(math.prod(a[: j + 1]) for j in range(len(a)))

    out = []
    for i in range(len(accepts)):
        up, down = list(accepts), list(accepts)
        up[i], down[i] = 1.0, 0.0  # linear in each, so the difference over 0..1 is the derivative
        out.append(length(up) - length(down))
    return out


def mixed(mix: Mix, fields: Mapping[str, Tensor]) -> Tensor:
    """`[n]` the loss of each row, from its parts."""
    parts = [getattr(mix, n) * fields[n] for n in ("ce", "kl", "reverse_kl", "tv") if getattr(mix, n)]
    return torch.stack(parts).sum(0)
