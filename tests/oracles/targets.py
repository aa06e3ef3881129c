"""The label and mask rules of draft training, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row at one depth. Where a token is not in the row's segment, the segment's last one stands in."""

    input: int
    label: int
    position: int
    teacher: int
    counts: bool
    key: bool


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
                        input=tokens[min(t + d, end - 1)],
                        label=tokens[min(t + d + 1, end - 1)],
                        position=t - start + d - 1,
                        teacher=min(t + d, end - 1),
                        counts=all(i < end and loss_mask[i] for i in wanted),
                        key=t + 1 < end,
                    )
                )
        start = end
    return table


def ahead(lengths: Sequence[int], offset: int) -> list[int | None]:
    """The token `offset` further on in the segment of each; negative offsets look back."""
    out: list[int | None] = []
    start = 0
    for length in lengths:
        out += [t + offset if 0 <= t + offset - start < length else None for t in range(start, start + length)]
        start += length
    return out
