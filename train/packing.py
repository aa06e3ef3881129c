"""Packs scored samples into the micro-batches of one or more optimizer steps.

Invariant: how samples fall into micro-batches changes no weight, so the loss of a minibatch is the same under any
token budget.

Dimensions: `T` tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from heapq import heapreplace
from itertools import pairwise
from typing import Literal

import torch

from miles_spec.kernels.layout import PackedLayout
from miles_spec.types import PackedBatch, Sample

Aggregation = Literal["sequence", "token", "constant"]


def pack(
    samples: Sequence[Sample],
    advantages: Sequence[float],
    *,
    token_budget: int,
    aggregation: Aggregation,
    max_new_tokens: int,
    minibatches: int,
    device: torch.device | str,
) -> list[list[PackedBatch]]:
    """Minibatches (one optimizer step each) of micro-batches (one forward each).

    Samples go to minibatches whole and in order, as evenly as they divide; there are fewer minibatches than asked for
    if there are fewer samples. A sample's prompt and response form one segment. A micro-batch holds at most
    `token_budget` tokens, but a longer sample travels alone, behind the others; the others are of like size and of
    samples of all lengths, so that each stands for the minibatch. A sample without response tokens counts as one of its
    minibatch and adds nothing else.

    `aggregation` sets the weight of a response token; `N` is the number of samples of its minibatch:

    - `sequence`: `1 / (n * N)`, `n` the response tokens of its sample (GRPO, arXiv 2402.03300, equation 3).
    - `token`: `1 / response tokens of the minibatch` (DAPO, arXiv 2503.14476, section 3.3).
    - `constant`: `1 / (N * max_new_tokens)` (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Raises `ValueError` for a prompt without tokens, since no row could predict its first response token.
    """
    assert len(samples) == len(advantages), "one advantage per sample"
    for sample in samples:
        if not sample.prompt.tokens:
            raise ValueError(f"prompt {sample.prompt.id!r} has no tokens; give it at least one")
    scored = list(zip(samples, advantages, strict=True))
    count = min(minibatches, len(scored))
    bounds = [i * len(scored) // count for i in range(count + 1)] if count else []
    out = []
    for start, end in pairwise(bounds):
        part = scored[start:end]
        weight = _token_weight([s for s, _ in part], aggregation, max_new_tokens)
        bins = _bins([_length(s) for s, _ in part], token_budget)
        out.append([_batch([part[i] for i in members], weight, device) for members in bins])
    return out


def repack(batches: Sequence[PackedBatch], token_budget: int) -> list[PackedBatch]:
    """The same segments in micro-batches of at most `token_budget` tokens, where a longer one travels alone; all that
    belongs to a token goes with it."""
    names = [f.name for f in fields(PackedBatch) if f.name != "layout" and getattr(batches[0], f.name) is not None]
    parts = {name: [p for b in batches for p in getattr(b, name).split(b.layout.lengths)] for name in names}
    lengths = [len(part) for part in parts["tokens"]]
    return [
        PackedBatch(
            layout=PackedLayout.make([lengths[i] for i in members], batches[0].tokens.device),
            **{name: torch.cat([parts[name][i] for i in members]) for name in names},
        )
        for members in _bins(lengths, token_budget)
    ]


def divide(batches: Sequence[PackedBatch], ranks: int) -> list[list[PackedBatch]]:
    """The micro-batches of each of `ranks` data-parallel ranks, as many for all, since all take part in each one's
    collectives: where packs run out, idle ones of two tokens stand in, which no loss sees.

    By length, the longest first, to the rank with the fewest packs and then the fewest tokens; one rank has them in
    their order. The same on all ranks.
    """
    if ranks == 1:
        return [list(batches)]
    shares: list[list[PackedBatch]] = [[] for _ in range(ranks)]
    order = sorted(range(len(batches)), key=lambda i: (-len(batches[i].tokens), i))
    for i in order:
        least = min(shares, key=lambda share: (len(share), sum(len(b.tokens) for b in share)))
        least.append(batches[i])
    most = max(map(len, shares))
    for share in shares:
        share += [_idle(batches[0]) for _ in range(most - len(share))]
    return shares


def _idle(like: PackedBatch) -> PackedBatch:
    """Two tokens that count for nothing, in a segment of their own."""
    more = [name for name in ("old_logprobs", "ref_logprobs") if getattr(like, name) is not None]
    floats = torch.zeros(2, device=like.tokens.device)
    return PackedBatch(
        layout=PackedLayout.make([2], like.tokens.device),
        tokens=like.tokens[:1].repeat(2),
        loss_mask=torch.zeros(2, dtype=torch.bool, device=like.tokens.device),
        advantages=floats,
        rollout_logprobs=floats,
        weights=floats,
        **dict.fromkeys(more, floats),
    )


def _length(sample: Sample) -> int:
    return len(sample.prompt.tokens) + len(sample.completion.tokens)


def _token_weight(samples: Sequence[Sample], aggregation: Aggregation, max_new_tokens: int) -> Callable[[int], float]:
    """From a sample's number of response tokens (at least 1) to the weight of each of them."""
    n = len(samples)
    if aggregation == "sequence":
        return lambda length: 1 / (length * n)
    if aggregation == "constant":
        return lambda length: 1 / (n * max_new_tokens)
    total = sum(len(s.completion.tokens) for s in samples)
    return lambda length: 1 / total


def _bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices per bin, in as few bins as will do: longest first, each to the bin with the fewest tokens, so that bins
    are of like size and each has samples of all lengths. Longer ones than the budget come last, alone."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    alone = [[i] for i in order if lengths[i] > budget]
    rest = order[len(alone) :]
    fewest = -(-sum(lengths[i] for i in rest) // budget)
    filled = (_fill(rest, lengths, budget, count) for count in range(fewest, len(rest) + 1))
    return [*next(bins for bins in filled if bins is not None), *alone]


def _fill(order: Sequence[int], lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """`count` bins of all in `order`; None if one would overflow."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [(0, number) for number in range(count)]  # a heap of tokens and bins
    for i in order:
        tokens, number = room[0]
        if tokens + lengths[i] > budget:
            return None
        heapreplace(room, (tokens + lengths[i], number))
        bins[number].append(i)
    return bins


def _batch(
    members: Sequence[tuple[Sample, float]], weight: Callable[[int], float], device: torch.device | str
) -> PackedBatch:
    tokens: list[int] = []
    mask: list[bool] = []
    advantages: list[float] = []
    logprobs: list[float] = []
    weights: list[float] = []
    for sample, advantage in members:
        prompt, done = sample.prompt.tokens, sample.completion
        p, n = len(prompt), len(done.tokens)
        tokens += [*prompt, *done.tokens]
        mask += [False] * p + [True] * n
        advantages += [0.0] * p + [advantage] * n
        logprobs += [0.0] * p + list(done.logprobs)
        weights += [0.0] * p + ([weight(n)] * n if n else [])
    assert len(logprobs) == len(tokens), "one log-probability per response token"

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return PackedBatch(
        layout=PackedLayout.make([_length(s) for s, _ in members], device),
        tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
        loss_mask=torch.tensor(mask, dtype=torch.bool, device=device),
        advantages=floats(advantages),
        rollout_logprobs=floats(logprobs),
        weights=floats(weights),
    )
