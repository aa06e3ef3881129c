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
        buffers = _Buffers(hidden, head, chunk_rows, count=2)
        with no_autocast(hidden):
            for rows in chunks(hidden.shape[0], chunk_rows):
                logits, weights = buffers.logits(hidden[rows], head, temperature)
                top = logits.amax(-1, keepdim=True)
                torch.exp(logits.sub_(top), out=weights)
                mass = weights.sum(-1)
                lse[rows] = mass.log() + top[:, 0]
                out[rows] = logits.gather(-1, labels[rows, None])[:, 0] - mass.log()
                entropy[rows] = mass.log() - weights.mul_(logits).sum(-1) / mass
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
        buffers = _Buffers(hidden, head, ctx.chunk_rows, count=1)
        product = torch.empty_like(head) if need_head else None
        with no_autocast(hidden):
            for rows in chunks(hidden.shape[0], ctx.chunk_rows):
                (logits,) = buffers.logits(hidden[rows], head, ctx.temperature)
                scaled = grad[rows, None] / ctx.temperature
                weighted = logits.sub_(lse[rows, None]).exp_().mul_(-scaled)
                weighted.scatter_add_(-1, labels[rows, None], scaled)
                d_logits = buffers.narrow(weighted)
                if d_hidden is not None:
                    d_hidden[rows] = d_logits @ head
                if d_head is not None:
                    d_head += torch.mm(d_logits.T, hidden[rows], out=product)
        return d_hidden, d_head.to(head.dtype) if d_head is not None else None, None, None, None


class _Buffers:
    """Memory for the logits of one chunk, taken once: allocating it anew for every chunk costs a CPU more than the sums
    over it."""

    def __init__(self, hidden: Tensor, head: Tensor, chunk_rows: int, *, count: int) -> None:
        """One buffer in the head's dtype and `count` in float32, each of `chunk_rows` rows at most."""
        shape = (min(chunk_rows, hidden.shape[0]), head.shape[0])
        self._product = hidden.new_empty(shape)
        self._wide = [hidden.new_empty(shape, dtype=torch.float32) for _ in range(count)]

    def logits(self, hidden: Tensor, head: Tensor, temperature: float) -> list[Tensor]:
        """The float32 buffers for these rows, the first of them filled with tempered logits."""
        rows = hidden.shape[0]
        wide = [w[:rows] for w in self._wide]
        wide[0].copy_(torch.mm(hidden, head.T, out=self._product[:rows]))
        if temperature != 1:
            wide[0].div_(temperature)
        return wide

    def narrow(self, values: Tensor) -> Tensor:
        """`values` in the head's dtype."""
        return self._product[: values.shape[0]].copy_(values)


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
