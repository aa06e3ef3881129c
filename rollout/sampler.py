"""From logits to tokens: counter-based random numbers, temperature, top-k, top-p, and drawing by inverse CDF.

Invariant: a draw depends on the request's seed, the token's position and the purpose of the draw, and on nothing else;
so a response does not depend on what shares its batch, and under the verify rules `greedy` and `target` not on
whether a draft took part.

Dimensions: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 256
"""Tokens whose probabilities are summed before the search for the drawn one goes into detail."""


class Stream(IntEnum):
    """What a random number decides; streams of one position are independent."""

    TOKEN = 0
    """The target's own choice, plain, verified or from the residual."""
    ACCEPT = 1
    """Whether a drafted token is accepted."""
    DRAFT = 2
    """The draft's proposal."""


def uniform(seeds: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """Float64 in [0, 1) for each of `seeds` and `positions` (int64, same shape).

    SplitMix64 (Steele, Lea, Flood 2014, figure 17) applied to seed, position and stream in turn.
    """
    x = _mix(seeds)
    x = _mix(x ^ positions)
    x = _mix(x + int(stream))
    return _shift(x, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = x + -0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical, where `>>` on int64 would carry the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def filtered(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """What rows are sampled from, and what their log-probabilities are measured against.

    `logits` `[R, V]`, the others `[R]`. Returns `probs` `[R, V]`, float32 or wider, after temperature, top-k and top-p
    (one-hot at the maximum where the temperature is 0), and `log_probs` `[R, V]` after temperature alone (1 where it is
    0).
    """
    greedy = temperature == 0
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = (exact / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    probs = log_probs.exp()
    if bool((top_k > 0).any()) or bool((top_p < 1).any()):
        probs = _truncate(probs, top_k, top_p)
    if bool(greedy.any()):
        best = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(probs.dtype)
        probs = torch.where(greedy[:, None], best, probs)
    return probs, log_probs


def _truncate(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keeps the `top_k` likeliest tokens, of those the fewest that together hold `top_p`; rows sum to 1 again."""
    vocab = probs.shape[-1]
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=probs.device)
    ordered = ordered * (rank < torch.where(top_k > 0, top_k, vocab)[:, None])
    before = ordered.cumsum(-1) - ordered
    # the likeliest token always stays, whatever rounding does to the first comparison
    keep = (before < top_p[:, None] * ordered.sum(-1, keepdim=True)) | (rank == 0)
    kept = torch.zeros_like(probs).scatter_(-1, ids, ordered * keep)
    return kept / kept.sum(-1, keepdim=True)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """`[R]` int64: for each row the first token whose cumulated weight exceeds `u` times the row's sum.

    `weights` `[R, V]` not negative and not all zero, not necessarily normalised; `u` `[R]` in [0, 1). A token of weight
    0 is never drawn.
    """
    rows, vocab = weights.shape
    blocks = F.pad(weights, (0, -vocab % _BLOCK)).view(rows, -1, _BLOCK)
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = u[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, goal, right=True).clamp_(max=cdf.shape[1] - 1)
    chosen = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0]
    inner = chosen.double().cumsum(-1)
    rest = goal - torch.where(block > 0, cdf.gather(1, (block - 1).clamp(min=0)), 0.0)
    # the two sums of a block can differ in their last bits; it ends with its last token of any weight
    end = torch.nextafter(inner[:, -1:], torch.zeros_like(inner[:, -1:]))
    index = torch.searchsorted(inner, torch.minimum(rest, end), right=True)
    return (block * _BLOCK + index)[:, 0]
