"""The three verify rules: which drafted tokens stand, and the token that follows them.

Invariant: whatever the draft proposes, the tokens that come out are distributed as the target alone would sample
them. Under `greedy` and `target` they are even the same tokens for the same seed.

Dimensions: `B` sequences, `k` drafted tokens, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles_spec.rollout.sampler import Stream, draw, uniform


def match_choice(probs: Tensor, drafted: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rules `greedy` and `target`: the target chooses as if alone; a proposal stands while it equals that choice.

    `probs` `[B, k + 1, V]` (one-hot for greedy), `drafted` `[B, k]`, `seeds` `[B]`, `positions` `[B, k + 1]` of the
    tokens to choose. Returns `tokens` `[B, k + 1]`, of which the first `accepted + 1` are the output, and `accepted`
    `[B]`. With a proposal from argmax q the acceptance is p(argmax q).
    """
    batch, rows, vocab = probs.shape
    u = uniform(seeds[:, None].expand(batch, rows), positions, Stream.TOKEN)
    tokens = draw(probs.reshape(-1, vocab), u.reshape(-1)).view(batch, rows)
    return tokens, _leading(tokens[:, :-1] == drafted)


def match_greedy(logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`match_choice` where every row is greedy, without its distributions: `logits` `[B, k + 1, V]`.

    Returns `tokens`, their log-probabilities at temperature 1, `[B, k + 1]` in float32 or wider, and `accepted`.
    """
    top, tokens = logits.max(-1)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return tokens, top.to(exact.dtype) - exact.logsumexp(-1), _leading(tokens[:, :-1] == drafted)


def reject(probs: Tensor, drafted: Tensor, proposal: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rule `rejection`: a proposal x drawn from q stands with probability min(1, p(x) / q(x)); the first that falls is
    replaced by a draw from the residual max(p - q, 0) (Leviathan et al., 2023, arXiv 2211.17192, algorithm 1).

    As `match_choice`, with `proposal` `[B, k, V]`, the distributions q the drafted tokens were drawn from. The
    acceptance is sum min(p, q).
    """
    batch, depth = drafted.shape
    p = probs[:, :-1].gather(-1, drafted[..., None])[..., 0].double()
    q = proposal.gather(-1, drafted[..., None])[..., 0].double()
    u = uniform(seeds[:, None].expand(batch, depth), positions[:, :-1], Stream.ACCEPT)
    accepted = _leading(u * q < p)
    row = torch.arange(batch, device=probs.device)
    last = probs[row, accepted]
    # after k accepted proposals nothing was rejected, and the next token comes from p itself
    minus = torch.where((accepted < depth)[:, None], proposal[row, accepted.clamp(max=depth - 1)], 0.0)
    residual = (last - minus).clamp(min=0)
    # p equal to q up to rounding leaves no residual; then p is the distribution to draw from
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, last)
    final = draw(residual, uniform(seeds, positions[row, accepted], Stream.TOKEN))
    tokens = torch.cat([drafted, drafted[:, -1:]], 1)
    tokens[row, accepted] = final
    return tokens, accepted


def _leading(stands: Tensor) -> Tensor:
    """`[B]` how many of `stands` `[B, k]` are true before the first that is not."""
    return stands.long().cumprod(-1).sum(-1)
