"""A draft run as serving runs it: one row, one token at a time, with a growing key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """Keys and values so far; every query sees all of them. One query at a time."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert query.shape[2] == 1
        self.keys.append(key)
        self.values.append(value)
        groups = query.shape[1] // key.shape[1]
        k, v = (torch.cat(x, dim=2).repeat_interleave(groups, dim=1) for x in (self.keys, self.values))
        return torch.softmax(query @ k.mT * scale, dim=-1) @ v


def draft_states(head, embed_weight: Tensor, hidden: Tensor, tokens: Tensor, row: int, depth: int) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """`depth` states `[H]` for the LM head, of the block that starts at `row` of one segment, whose tokens the target
    confirms.

    `hidden` `[L, S]`, what `head` reads, and `tokens` `[L]` of the segment. Rows `0..row` are fed with the target's
    states, then the draft feeds itself.
    """
    cache = Cache()

    def step(token: Tensor, state: Tensor, position: int) -> list[Tensor]:
        both = head(embed_weight[token][None, None], state[None, None], torch.tensor([[position]]), cache)
        return [x[0, 0] for x in both]

    for t in range(row + 1):
        state, out = step(tokens[t + 1], head.enter(hidden[t]), t)
    outs = [out]
    for d in range(1, depth):
        state, out = step(tokens[row + d + 1], state, row + d)
        outs.append(out)
    return outs
