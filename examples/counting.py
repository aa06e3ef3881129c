"""Prompts that ask for a list of numbers: answers of up to 120 tokens that a small model can learn to give."""

from __future__ import annotations

import random
from collections.abc import Iterator


def prompts(size: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`size` records with the columns `prompt` and `answer`."""
    draw = random.Random(seed)
    for _ in range(size):
        first = draw.randint(1, 60)
        last = first + draw.randint(8, 30)
        numbers = ", ".join(str(number) for number in range(first, last + 1))
        yield {"prompt": f"Count from {first} to {last}. Write the numbers separated by commas.", "answer": numbers}
