"""Which rank holds which token of a pack, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One row of one rank."""

    segment: int
    position: int
    token: int | None
    """Index in the whole pack; None for padding."""


def held(lengths: Sequence[int], sharding: str, cp: int) -> list[list[Held]]:
    """`[cp][T]`: every rank's rows, in order."""
    segments: list[list[Held]] = []
    start = 0
    for s, length in enumerate(lengths):
        segments.append([Held(segment=s, position=i, token=start + i) for i in range(length)])
        start += length
    if cp == 1:
        return [[row for segment in segments for row in segment]]
    if sharding == "zigzag":
        ranks: list[list[Held]] = [[] for _ in range(cp)]
        for segment in segments:
            while len(segment) % (2 * cp):
                _pad(segment)
            size = len(segment) // (2 * cp)
            chunks = [segment[i * size : (i + 1) * size] for i in range(2 * cp)]
            for r in range(cp):
                ranks[r] += chunks[r] + chunks[2 * cp - 1 - r]
        return ranks
    last = next((segment for segment in reversed(segments) if segment), [])
    while sum(map(len, segments)) % cp:
        _pad(last)
    whole = [row for segment in segments for row in segment]
    size = len(whole) // cp
    return [whole[r * size : (r + 1) * size] for r in range(cp)]


def _pad(segment: list[Held]) -> None:
    segment.append(Held(segment=segment[-1].segment, position=segment[-1].position + 1, token=None))


def pieces(rows: Sequence[Held]) -> list[tuple[int, int, int, int]]:
    """Segment, first position, one past the last, and first row, of every run of a rank's rows."""
    out: list[tuple[int, int, int, int]] = []
    for i, row in enumerate(rows):
        if out and out[-1][0] == row.segment and out[-1][2] == row.position:
            segment, start, end, first = out[-1]
            out[-1] = segment, start, end + 1, first
        else:
            out.append((row.segment, row.position, row.position + 1, i))
    return out


def fetched(lengths: Sequence[int], sharding: str, cp: int, halo: int) -> list[list[int]]:
    """`[cp][E]`: the tokens that follow each rank's pieces, ordered by the rank that holds them, then by piece."""
    ranks = held(lengths, sharding, cp)
    owner = {row.token: r for r, rows in enumerate(ranks) for row in rows}
    token = {(row.segment, row.position): row.token for rows in ranks for row in rows}
    out = []
    for rows in ranks:
        wanted = [token.get((s, end + i)) for s, _, end, _ in pieces(rows) for i in range(halo)] if cp > 1 else []
        out.append(sorted((t for t in wanted if t is not None), key=lambda t: owner[t]))
    return out
