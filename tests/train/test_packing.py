"""Micro-batches: every token once, within budget, weighted by the rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spec.train.packing import divide, pack, repack
from miles_spec.types import PackedBatch
from oracles.policy import aggregate
from oracles.samples import random_samples, sample

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=9)
DEFAULTS = dict(token_budget=16, aggregation="sequence", max_new_tokens=9, minibatches=1, device="cpu")


def segments(batch: PackedBatch) -> list[tuple[list[int], list[bool], list[float], list[float], list[float]]]:
    columns = (batch.tokens, batch.loss_mask, batch.advantages, batch.rollout_logprobs, batch.weights)
    assert all(c.shape == (batch.layout.tokens,) for c in columns)
    return list(zip(*([x.tolist() for x in c.split(batch.layout.lengths)] for c in columns), strict=True))


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 30), minibatches=st.integers(1, 4), seed=st.integers(0, 9))
@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_every_sample_once_within_budget_and_weighted_by_the_rule(
    aggregation: str, lengths: list[tuple[int, int]], budget: int, minibatches: int, seed: int
) -> None:
    samples = random_samples(lengths, seed=seed)
    advantages = [float(i + 1) for i in range(len(samples))]
    options = {**DEFAULTS, "token_budget": budget, "aggregation": aggregation, "minibatches": minibatches}
    out = pack(samples, advantages, **options)
    assert len(out) == min(minibatches, len(samples))
    sizes = [sum(len(b.layout.lengths) for b in part) for part in out]
    assert sum(sizes) == len(samples) and max(sizes, default=0) - min(sizes, default=0) <= 1
    start = 0
    for part, size in zip(out, sizes, strict=True):
        want = list(range(start, start + size))
        start += size
        seen = []
        for batch in part:
            assert batch.layout.tokens <= budget or len(batch.layout.lengths) == 1
            seen += segments(batch)
        loss = 0.0
        for tokens, mask, advantage, logprobs, weights in seen:
            # empty responses to equal prompts look alike, and any of them will do
            i = next(i for i in want if [*samples[i].prompt.tokens, *samples[i].completion.tokens] == tokens)
            want.remove(i)
            s, a = samples[i], advantages[i]
            p, n = len(s.prompt.tokens), len(s.completion.tokens)
            assert tokens == [*s.prompt.tokens, *s.completion.tokens]
            assert mask == [False] * p + [True] * n
            assert advantage == [0.0] * p + [a] * n
            assert logprobs == pytest.approx([0.0] * p + list(s.completion.logprobs), rel=1e-6)
            assert weights[:p] == [0.0] * p
            loss += sum(w * lp for w, lp in zip(weights, logprobs, strict=True))
        assert not want
        expected = aggregate([s.completion.logprobs for s in samples[start - size : start]], aggregation, 9)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_packs_are_of_like_size_and_of_all_lengths() -> None:
    samples = random_samples([(1, 2), (1, 6), (1, 4), (1, 3), (1, 19)])
    runs = [pack(samples, [1.0] * 5, **{**DEFAULTS, "token_budget": 10}) for _ in range(2)]
    assert [[b.layout.lengths for b in part] for part in runs[0]] == [[(7, 3), (5, 4), (20,)]]
    for a, b in zip(*(r[0] for r in runs), strict=True):
        assert torch.equal(a.tokens, b.tokens)
    [packs] = pack(random_samples([(1, n) for n in range(4, 20)]), [1.0] * 16, **{**DEFAULTS, "token_budget": 55})
    sizes, means = zip(*((b.layout.tokens, b.layout.tokens / len(b.layout.lengths)) for b in packs), strict=True)
    assert len(packs) == 4 and max(sizes) - min(sizes) <= 2 and max(means) - min(means) < 2


def test_only_empty_responses_weigh_nothing() -> None:
    for aggregation in ("sequence", "token", "constant"):
        [[batch]] = pack(random_samples([(3, 0), (2, 0)]), [1.0, 1.0], **{**DEFAULTS, "aggregation": aggregation})
        assert batch.weights.tolist() == [0.0] * 5
        assert not batch.loss_mask.any()


def test_nothing_gives_nothing() -> None:
    assert pack([], [], **DEFAULTS) == []


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        pack([sample([], [4, 5])], [1.0], **DEFAULTS)


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS.filter(len), budget=st.integers(1, 30), ranks=st.integers(1, 5))
def test_ranks_share_the_packs_and_idle_ones_count_for_nothing(
    lengths: list[tuple[int, int]], budget: int, ranks: int
) -> None:
    samples = random_samples(lengths)
    [batches] = pack(samples, [1.0] * len(samples), **{**DEFAULTS, "token_budget": budget})
    batches = [replace(b, ref_logprobs=torch.ones_like(b.weights)) for b in batches]
    shares = divide(batches, ranks)
    assert len(shares) == ranks and {len(share) for share in shares} == {-(-len(batches) // ranks)}
    known = {id(b) for b in batches}
    assert sorted(id(b) for share in shares for b in share if id(b) in known) == sorted(known)
    assert [[len(b.tokens) for b in s] for s in divide(batches, ranks)] == [[len(b.tokens) for b in s] for s in shares]
    for idle in (b for share in shares for b in share if id(b) not in known):
        assert (idle.layout.lengths, idle.layout.tokens, len(idle.tokens)) == ((2,), 2, 2)
        assert not idle.loss_mask.any() and not idle.weights.any() and not idle.advantages.any()
        assert idle.old_logprobs is None and idle.ref_logprobs is not None and len(idle.ref_logprobs) == 2


def test_ranks_get_packs_of_like_size() -> None:
    samples = random_samples([(1, n) for n in (9, 8, 7, 6, 5, 4)])
    [batches] = pack(samples, [1.0] * 6, **{**DEFAULTS, "token_budget": 1})
    assert divide(batches[::-1], 1) == [batches[::-1]]
    for order in (batches, batches[::-1]):
        assert [[b.layout.tokens for b in share] for share in divide(order, 2)] == [[10, 7, 6], [9, 8, 5]]


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS.filter(bool), before=st.integers(1, 30), after=st.integers(1, 30))
def test_packing_again_moves_whole_segments(lengths: list[tuple[int, int]], before: int, after: int) -> None:
    """With all that belongs to their tokens."""
    samples = random_samples(lengths)
    [packed] = pack(samples, [float(i) for i in range(len(samples))], **{**DEFAULTS, "token_budget": before})
    scored = [replace(b, old_logprobs=b.tokens.float(), ref_logprobs=b.tokens * 2.0) for b in packed]
    again = repack(scored, after)
    assert all(b.layout.tokens <= after or len(b.layout.lengths) == 1 for b in again)
    assert sorted(s for b in again for s in segments(b)) == sorted(s for b in packed for s in segments(b))
    for batch in again:
        assert torch.equal(batch.old_logprobs, batch.tokens.float())
        assert torch.equal(batch.ref_logprobs, batch.tokens * 2.0)
    assert repack(packed, after)[0].old_logprobs is None
