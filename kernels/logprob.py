"""Log-probabilities of given tokens from hidden states and the LM head, without a `[tokens, vocabulary]` tensor.

Invariant: at most `chunk_rows` rows of logits exist at a time, in forward and in backward, which recomputes them.

Dimensions: `N` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogProbs:
    """Of `logits / temperature`, all `[N]` float32, in nats."""

    logprob: Tensor
    """Log-probability of the label; differentiable."""
    entropy: Tensor
    """Entropy of the row's distribution; detached."""
    lse: Tensor
    """Log-sum-exp of the row's tempered logits; detached."""


def logprob(
    hidden: Tensor, head: Tensor, labels: Tensor, *, temperature: float = 1.0, chunk_rows: int = 1024
) -> LogProbs:
    """Log-probability of `labels` `[N]` int64 under `softmax(hidden @ head.T / temperature)`.

    `hidden` `[N, H]` and `head` `[V, H]` in float32, bfloat16 or float16; both get gradients, the head's only if it
    requires one. The product is taken in their own dtype (that of autocast where it is on), everything after it in
    float32. Temperature 0 (greedy) counts as 1.
    """
    hidden, head = autocast_inputs(hidden, head)
    value, entropy, lse = _LogProb.apply(hidden, head, labels, temperature or 1.0, chunk_rows)
    return LogProbs(logprob=value, entropy=entropy, lse=lse)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, temperature: float, chunk_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, entropy, lse = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
        with no_autocast(hidden):
            for rows in chunks(hidden.shape[0], chunk_rows):
                logits = (hidden[rows] @ head.T).float().div_(temperature)
                lse[rows] = torch.logsumexp(logits, -1)
                out[rows] = logits.gather(-1, labels[rows, None]).squeeze(-1) - lse[rows]
                entropy[rows] = lse[rows] - (logits * (logits - lse[rows, None]).exp_()).sum(-1)
        ctx.save_for_backward(hidden, head, labels, lse)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.mark_non_differentiable(entropy, lse)
        return out, entropy, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, labels, lse = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        # a head gradient is a sum over all rows: chunks are added in float32
        d_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
        with no_autocast(hidden):
            for rows in chunks(hidden.shape[0], ctx.chunk_rows):
                logits = (hidden[rows] @ head.T).float().div_(ctx.temperature)
                scaled = grad[rows, None] / ctx.temperature
                d_logits = logits.sub_(lse[rows, None]).exp_().mul_(-scaled)
                d_logits.scatter_add_(-1, labels[rows, None], scaled)
                d_logits = d_logits.to(head.dtype)
                if d_hidden is not None:
                    d_hidden[rows] = d_logits @ head
                if d_head is not None:
                    d_head += d_logits.T @ hidden[rows]
        return d_hidden, d_head.to(head.dtype) if d_head is not None else None, None, None, None


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on for their device, else as they are."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def no_autocast(like: Tensor) -> torch.autocast:
    """Autocast off for the device of `like`: a hand-written forward and backward choose their own dtypes."""
    return torch.autocast(like.device.type, enabled=False)


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `0..rows`."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
