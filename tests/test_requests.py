"""Seeds, sampling and the context."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from miles_spec.config import RolloutConfig, RunConfig
from miles_spec.requests import check_context, sampling, seed_of


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
    check_context(256, tiny_model())
    with pytest.raises(
        ValueError, match=r"the context of 257 tokens \(.*\) is longer than the model's 256; lower them"
    ):
        check_context(257, tiny_model())
