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


def digest(dtype: str, shape: list[int], data: bytes, row_words: int) -> str:
    data += b"\0" * (-len(data) % 4)
    words = struct.unpack(f"<{len(data) // 4}i", data)
    total = 0
    for row, start in enumerate(range(0, len(words), row_words)):
        row_sum = sum(w * weight(j, 0) for j, w in enumerate(words[start : start + row_words])) & MASK
        total += mix(row_sum) * weight(row, 1)
    return f"{dtype}{shape}:{total & MASK:016x}"
