"""Scored samples made by hand, as packing takes them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from miles_spec.types import Completion, Prompt, Sample, SpecCounts, VersionSpan


def sample(
    prompt: Sequence[int], response: Sequence[int], *, logprobs: Sequence[float] | None = None, reward: float = 0.0
) -> Sample:
    n = len(response)
    return Sample(
        prompt=Prompt(id=f"p{prompt}", tokens=tuple(prompt), text=""),
        index=0,
        completion=Completion(
            request_id="r",
            tokens=tuple(response),
            logprobs=tuple([-1.0] * n if logprobs is None else logprobs),
            accepted=(False,) * n,
            versions=(VersionSpan(start=0, end=n, target=0, draft=None),) if n else (),
            spec=SpecCounts(),
            finish="length",
            text="",
        ),
        reward=reward,
    )


def random_samples(lengths: Sequence[tuple[int, int]], *, vocab: int = 61, seed: int = 0) -> list[Sample]:
    """One sample per (prompt tokens, response tokens)."""
    rng = random.Random(seed)
    return [
        sample(
            [rng.randrange(3, vocab) for _ in range(p)],
            [rng.randrange(3, vocab) for _ in range(n)],
            logprobs=[-rng.uniform(0.5, 4.0) for _ in range(n)],
        )
        for p, n in lengths
    ]
