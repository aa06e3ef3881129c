"""The small decisions of putting a run together: seeds, the draft's vocabulary, the context."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_model
from miles_spec.assemble import _check_context, _vocabulary, sampling, seed_of
from miles_spec.config import RolloutConfig, RunConfig
from miles_spec.types import Completion, Prompt, Sample, SpecCounts


def sampled(prompt: tuple[int, ...], response: tuple[int, ...]) -> Sample:
    completion = Completion(
        request_id="", tokens=response, logprobs=(0.0,) * len(response), accepted=(False,) * len(response),
        versions=(), spec=SpecCounts(), finish="stop", text="",
    )  # fmt: skip
    return Sample(prompt=Prompt(id="", tokens=prompt, text=""), index=0, completion=completion, reward=0.0)


tokens = st.lists(st.integers(0, 60), max_size=30).map(tuple)


@given(st.lists(st.tuples(tokens, tokens), max_size=4), st.integers(1, 60))
def test_the_vocabulary_holds_the_most_frequent_tokens(pairs: list[tuple[tuple[int, ...], ...]], size: int) -> None:
    got = _vocabulary([sampled(*pair) for pair in pairs], size, tiny_model())
    assert got is not None and got.dtype == torch.int64
    chosen = got.tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == size and chosen[0] >= 0 and chosen[-1] < 61
    counts = Counter(t for prompt, response in pairs for t in (*prompt, *response))
    left_out = set(range(61)) - set(chosen)
    # what was seen comes before what was not and the frequent before the rare; unseen ones in order of their ids
    assert min(counts[t] for t in chosen) >= max(counts[t] for t in left_out)
    unseen = [t for t in chosen if not counts[t]]
    assert not unseen or all(counts[t] or t > unseen[-1] for t in left_out)


@pytest.mark.parametrize("size", [0, 61, 100])
def test_a_whole_vocabulary_needs_no_choice(size: int) -> None:
    assert _vocabulary([sampled((3, 4), (5,))], size, tiny_model()) is None


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    parts = [(1, "2.1", 0, 0), (2, "2.1", 0, 0), (1, "2.2", 0, 0), (1, "2.1", 1, 0), (1, "2.1", 0, 1), (12, ".1", 0, 0)]
    seeds = [seed_of(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    # the same on every machine and in every process
    assert seed_of(1, "2.1", 0, 0) == seeds[0] == 5770768136284970869
    assert all(0 <= seed_of("x", i) < 2**63 for i in range(1000))
    torch.tensor(seeds)  # fits into int64


def test_sampling_is_the_run_files() -> None:
    rollout = RolloutConfig(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=9, stop=("a",))
    got = sampling(RunConfig(rollout=rollout))
    assert (got.temperature, got.top_p, got.top_k, got.max_new_tokens, got.stop) == (0.5, 0.9, 7, 9, ("a",))
    assert not got.ignore_eos and got.stop_token_ids == ()


def test_context() -> None:
    _check_context(256, tiny_model())
    with pytest.raises(
        ValueError, match=r"the context of 257 tokens \(.*\) is longer than the model's 256; lower them"
    ):
        _check_context(257, tiny_model())
