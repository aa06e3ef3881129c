"""The label and mask rules of draft training, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row at one depth; fields are None where the token is not in the row's segment."""

    input: int | None
    label: int | None
    position: int
    teacher: int | None
    counts: bool


def rows(tokens: Sequence[int], loss_mask: Sequence[bool], lengths: Sequence[int], depth: int) -> list[list[Row]]:
    """`[D][T]`: row `t` at depth `d` sees tokens `t+1..t+d`, predicts token `t+d+1`, and counts if all of these lie in
    the segment and were sampled."""
    table: list[list[Row]] = [[] for _ in range(depth)]
    start = 0
    for length in lengths:
        end = start + length
        for t in range(start, end):
            for d in range(1, depth + 1):
                wanted = range(t + 1, t + d + 2)
                table[d - 1].append(
                    Row(
                        input=tokens[t + d] if t + d < end else None,
                        label=tokens[t + d + 1] if t + d + 1 < end else None,
                        position=t - start + d - 1,
                        teacher=t + d if t + d < end else None,
                        counts=all(i < end and loss_mask[i] for i in wanted),
                    )
                )
        start = end
    return table
