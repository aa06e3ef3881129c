"""Serving with speculation on a response that is already known, block by block."""

from __future__ import annotations

from collections.abc import Sequence


def walk(accept: Sequence[Sequence[float]], start: int, last: int, depth: int) -> tuple[float, float]:
    """Expected (accepted tokens, verify steps) from a block at row `start` until token `last` is there.

    Follows every outcome of every block: at row `t` the token drafted at depth `d` would be token `t + d + 1`, accepted
    with probability `accept[d - 1][t]`; after a refusal, or after the last drafted token, the target adds one token.
    """
    if start + 2 > last:
        return 0.0, 0.0
    drafted = min(depth, last - start - 1)
    accepted, steps, alive = 0.0, 1.0, 1.0
    for d in range(1, drafted + 2):
        chance = accept[d - 1][start] if d <= drafted else 0.0
        refused = alive * (1 - chance)
        if refused:
            more, further = walk(accept, start + d, last, depth)
            accepted += refused * (d - 1 + more)
            steps += refused * further
        alive *= chance
    return accepted, steps
