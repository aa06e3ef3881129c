"""The digest of `miles_spec.sync.digest`, word by word in Python integers."""

from __future__ import annotations

import struct
from functools import cache

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@cache
def weight(index: int, stream: int) -> int:
    return mix((index + 1 + (stream << 40)) * 0x9E3779B97F4A7C15 & MASK) | 1


def digest(dtype: str, shape: list[int], data: bytes, rows: int, columns: int) -> str:
    data += b"\0" * (-len(data) % 4)
    words = struct.unpack(f"<{len(data) // 4}i", data)
    sums: dict[int, int] = {}
    for i, word in enumerate(words):
        chunk, at = divmod(i, rows * columns)
        row, column = divmod(at, columns)
        place = chunk * columns + column
        sums[place] = (sums.get(place, 0) + word * weight(row, 0)) & MASK
    total = sum(mix(column_sum) * weight(place, 1) for place, column_sum in sums.items())
    return f"{dtype}{shape}:{total & MASK:016x}"
