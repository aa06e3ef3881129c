"""Dynamic sampling: which groups are dropped, counted and replaced."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from e2e.conftest import Configure, lines
from miles_spec.assemble import assemble
from miles_spec.live import LiveTable
from miles_spec.loop import train
from miles_spec.sampling import Groups, sample


def groups(configure: Configure, out: Path, **overrides: object) -> Groups:
    config = configure(out, draft__enabled=False, rollout__max_new_tokens=24, **overrides)
    live = LiveTable(steps=config.steps)
    return sample(assemble(config, live), 1, live)


def numbers(sampled: Groups) -> list[int]:
    return [group[0].prompt.metadata["number"] for group in sampled.groups]


def test_groups_without_contrast_are_replaced(configure: Configure, rewards: ModuleType, tmp_path: Path) -> None:
    order = numbers(groups(configure, tmp_path, rollout__prompts_per_step=24))
    sampled = groups(configure, tmp_path, train__dynamic_sampling=True, reward__kind="e2e_rewards:even")
    kept = numbers(sampled)
    # the data's order without the even ones
    assert kept == [n for n in order if n % 2][:4]
    # each round draws as many prompts as are still wanted
    dropped = wanted = cursor = 0
    while (wanted := 4 - sum(n % 2 for n in order[:cursor])) > 0:
        dropped += sum(n % 2 == 0 for n in order[cursor : cursor + wanted])
        cursor += wanted
    assert sampled.metrics["groups_dropped"] == dropped > 0
    assert sampled.metrics["samples"] == 16


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_last_round_of_replacement_keeps_what_it_gets(
    rounds: int, configure: Configure, rewards: ModuleType, tmp_path: Path
) -> None:
    sampled = groups(
        configure, tmp_path, train__dynamic_sampling=True, train__dynamic_rounds=rounds, reward__kind="e2e_rewards:same"
    )
    dropped = 4 * rounds
    assert (sampled.metrics["groups_dropped"], sampled.metrics["samples"]) == (dropped, 16)
    order = numbers(groups(configure, tmp_path, rollout__prompts_per_step=12))
    assert numbers(sampled) == order[dropped : dropped + 4]


def test_without_it_nothing_is_dropped(configure: Configure, rewards: ModuleType, tmp_path: Path) -> None:
    train(configure(tmp_path, steps=1, reward__kind="e2e_rewards:same"))
    (row,) = lines(tmp_path)
    assert (row["groups_dropped"], row["samples"], row["reward_std"]) == (0, 16, 0)
    assert row["grad_norm"] == pytest.approx(0, abs=1e-9)  # no contrast, no gradient


def test_speed_counts_dropped_groups_too(configure: Configure, rewards: ModuleType, tmp_path: Path) -> None:
    train(configure(tmp_path, steps=1, train__dynamic_sampling=True, reward__kind="e2e_rewards:even"))
    (row,) = lines(tmp_path)
    generated = row["tokens_per_s"] * row["seconds_rollout"]
    assert row["groups_dropped"] > 0
    assert generated > row["samples"] * row["response_tokens_mean"]
    assert generated == pytest.approx(round(generated))
