"""A line of metrics and a summary: ratios of sums, and nothing said that was not measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from miles_spec.metrics import rollout_metrics, summary, sync_metrics, training_metrics
from miles_spec.rollout.speculation import CostModel
from miles_spec.types import (
    Completion,
    EngineTimes,
    Finish,
    LossTerms,
    Prompt,
    Receipt,
    Sample,
    SpecCounts,
    SpecEstimate,
    VersionSpan,
)

COST = CostModel(step_s=((1, 0.1), (2, 0.2)), error=0.05)
TIMES = EngineTimes(prefill_s=0.5, draft_s=0.25, verify_s=1.0, other_s=0.125, tokens=40)


def sampled(tokens: int, reward: float, steps: int, accepted: tuple[int, ...], finish: Finish = "stop") -> Sample:
    completion = Completion(
        request_id="r", tokens=(7,) * tokens, logprobs=(-1.0,) * tokens, accepted=(False,) * tokens,
        versions=(VersionSpan(start=0, end=tokens, target=0, draft=0),), finish=finish, text="",
        spec=SpecCounts(verify_steps=steps, drafted=(steps,) * len(accepted), accepted=accepted),
    )  # fmt: skip
    return Sample(prompt=Prompt(id="p", tokens=(1,), text=""), index=0, completion=completion, reward=reward)


SAMPLES = [sampled(30, 1.0, 10, (9, 8)), sampled(5, 0.0, 2, (1,), "length")]


def terms(**overrides: Any) -> LossTerms:
    defaults = dict(
        policy=0.5, entropy=2.0, grad_norm=1.0, clip_fraction=0.0, rollout_kl=0.001, rollout_logprob_diff=0.1,
        tis_clip_fraction=0.0, ref_kl=0.0, draft=3.0, draft_by_depth=(2.0, 4.0), draft_grad_norm=5.0, draft_seconds=0.5,
        acceptance={
            "cotrained": SpecEstimate(accepted=30.0, verify_steps=10.0),
            "frozen": SpecEstimate(accepted=10.0, verify_steps=30.0),
        },
    )  # fmt: skip
    return LossTerms(**{**defaults, **overrides})  # type: ignore[arg-type]


def test_rollout_is_pooled() -> None:
    got = rollout_metrics(SAMPLES, TIMES, 2.0, [[30, 5], [5]], COST, 2)
    assert got["accepted_tokens"] == 18 and got["verify_steps"] == 12
    assert got["accept_length"] == 1 + 18 / 12  # not the mean of 2.7 and 1.5
    assert got["accept_rate_by_position"] == [10 / 12, 8 / 10]
    assert (got["samples"], got["reward_mean"], got["reward_std"]) == (2, 0.5, 0.5)
    assert (got["response_tokens_mean"], got["finish_length_fraction"]) == (17.5, 0.5)
    # of all calls, dropped groups included: 4 steps of two and 25 of one, then 4 of one
    plain_s = 0.5 + (4 * 0.2 + 25 * 0.1) + 4 * 0.1
    assert got["tokens_per_s"] == 40 / 2.0
    assert got["tokens_per_s_plain"] == pytest.approx(40 / plain_s)
    assert got["net_speedup"] == pytest.approx(plain_s / 2.0) == pytest.approx(20 / got["tokens_per_s_plain"])
    assert got["net_speedup_error"] == 0.05


def test_a_rollout_in_which_nothing_was_drafted_is_as_fast_as_without_a_draft() -> None:
    """Whatever the cost model says."""
    got = rollout_metrics([sampled(30, 1.0, 0, ()), sampled(5, 0.0, 0, ())], TIMES, 2.0, [[30, 5]], COST, 2)
    assert got["net_speedup"] == 1 and got["tokens_per_s_plain"] == got["tokens_per_s"]


def test_rollout_without_a_draft_claims_nothing_of_speculation() -> None:
    full = rollout_metrics(SAMPLES, TIMES, 2.0, [[30, 5]], COST, 2)
    bare = rollout_metrics(SAMPLES, TIMES, 2.0, [[30, 5]], None, 2, drafting=False)
    assert full.keys() - bare.keys() == {
        "verify_steps", "accepted_tokens", "accept_length", "accept_rate_by_position", "tokens_per_s_plain",
        "net_speedup", "net_speedup_error",
    }  # fmt: skip
    assert all(full[name] == value for name, value in bare.items())


def test_rollout_that_verified_nothing() -> None:
    got = rollout_metrics([sampled(3, 1.0, 0, ())], TIMES, 2.0, [[3]], COST, 2)
    assert math.isnan(got["accept_length"]) and got["accept_rate_by_position"] == []


def test_training_pools_acceptance_and_averages_the_rest() -> None:
    second = terms(
        policy=1.5,
        rollout_logprob_diff=0.05,
        draft_by_depth=(4.0, 6.0),
        acceptance={
            "cotrained": SpecEstimate(accepted=0.0, verify_steps=20.0),
            "frozen": SpecEstimate(accepted=0.0, verify_steps=10.0),
        },
    )
    got = training_metrics([terms(), second], 4.0, 1.75)
    assert (got["policy_loss"], got["rollout_logprob_diff"], got["draft_loss_by_depth"]) == (1.0, 0.1, [3.0, 5.0])
    assert (got["accept_length_cotrained"], got["accept_length_frozen"]) == (1 + 30 / 30, 1 + 10 / 40)
    assert (got["accepted_tokens_cotrained"], got["verify_steps_frozen"]) == (30.0, 40.0)
    assert got["accept_estimate_error"] == 0.25
    assert (got["seconds_draft"], got["seconds_train"], got["draft_share"]) == (1.0, 3.0, 0.25)


def test_a_minibatch_without_draft_rows_does_not_dilute() -> None:
    empty = terms(draft=0.0, draft_by_depth=(), draft_grad_norm=0.0, acceptance={})
    got = training_metrics([terms(), empty], 4.0, 4.0)
    assert (got["draft_loss"], got["draft_loss_by_depth"], got["draft_grad_norm"]) == (3.0, [2.0, 4.0], 5.0)
    assert got["accept_estimate_error"] == 0.0


def test_training_without_a_draft() -> None:
    bare = terms(draft=0.0, draft_by_depth=(), draft_grad_norm=0.0, draft_seconds=0.0, acceptance={})
    got = training_metrics([bare], 4.0, None)
    assert [name for name in got if "draft" in name or "accept" in name] == ["seconds_draft"]
    assert got["seconds_train"] == 4.0


def test_sync() -> None:
    good = Receipt(engine="e", role="target", version=7, tensors=3, mismatched=())
    bad = Receipt(engine="e", role="draft", version=9, tensors=3, mismatched=("x: missing",), attempts=2)
    assert sync_metrics([good, bad], 0.5) == {
        "receipts_verified": 1, "receipts_failed": 1, "seconds_sync": 0.5, "target_version": 7, "draft_version": 9,
    }  # fmt: skip


def line(step: int, **overrides: Any) -> dict[str, Any]:
    defaults = dict(
        step=step, reward_mean=0.1 * step, verify_steps=10, accepted_tokens=10, accept_length=2.0,
        verify_steps_cotrained=10.0, accepted_tokens_cotrained=11.0, verify_steps_frozen=20.0,
        accepted_tokens_frozen=10.0, accept_estimate_error=0.1, tokens_per_s=50.0, tokens_per_s_plain=40.0,
        net_speedup=1.25, net_speedup_error=0.02, rollout_kl=0.001, seconds_rollout=2.0, seconds_reward=0.5,
        seconds_train=3.0, seconds_draft=1.0, seconds_memory=0.5, seconds_sync=0.25, seconds_checkpoint=0.0,
        receipts_verified=2, receipts_failed=0,
    )  # fmt: skip
    return {**defaults, **overrides}


def test_summary_averages_a_fifth_and_pools_acceptance() -> None:
    lines = [{"warmup_step": 1, "draft_loss": 3.0}, *(line(i) for i in range(1, 10))]
    lines.append(
        line(10, verify_steps=30, accepted_tokens=0, accept_length=1.0, accept_estimate_error=-0.4, receipts_failed=1)
    )
    got = summary(lines)
    assert (got["steps"], got["steps_averaged"]) == (10, 2)
    assert (got["reward_first"], got["reward_last"]) == (pytest.approx(0.15), pytest.approx(0.95))
    assert got["accept_length"] == 1 + 10 / 40  # not the mean of 2 and 1
    assert (got["accept_length_cotrained"], got["accept_length_frozen"]) == (2.1, 1.5)
    assert got["accept_estimate_error_max"] == 0.4
    assert (got["receipts_verified"], got["receipts_failed"]) == (20, 1)
    assert got["seconds"] == {
        "rollout": 20.0, "reward": 5.0, "train": 30.0, "draft": 10.0, "memory": 5.0, "sync": 2.5, "checkpoint": 0.0,
    }  # fmt: skip
    assert got["draft_share"] == 0.25
    assert "bench" not in got and summary(lines, [{"mode": "plain"}])["bench"] == [{"mode": "plain"}]


def test_summary_speeds_are_ratios_of_sums() -> None:
    slow = line(2, tokens_per_s=10.0, tokens_per_s_plain=20.0, net_speedup=0.5, seconds_rollout=8.0)
    got = summary([line(1), slow])
    tokens, seconds, plain_s = 50 * 2 + 10 * 8, 2 + 8, 50 * 2 / 40 + 10 * 8 / 20
    assert got["tokens_per_s_speculative"] == pytest.approx(tokens / seconds)
    assert got["tokens_per_s_plain"] == pytest.approx(tokens / plain_s)
    assert got["net_speedup"] == pytest.approx(plain_s / seconds)


def test_summary_without_a_draft() -> None:
    words = ("draft", "accept", "verify", "plain", "net_")
    bare = {k: v for k, v in line(1, seconds_draft=0.0).items() if not any(w in k for w in words)}
    got = summary([{**bare, "seconds_draft": 0.0, "accept_length": None}])
    none = ("accept_length", "accept_length_cotrained", "accept_estimate_error_max", "net_speedup", "draft_share")
    assert all(got[name] is None for name in (*none, "tokens_per_s_speculative", "net_speedup_error"))
    assert got["tokens_per_s_plain"] == 50.0


def test_summary_of_a_draft_whose_servers_cannot_go_without_it() -> None:
    """As joined ones: how fast they would be is not known."""
    words = ("plain", "net_")
    got = summary([{k: v for k, v in line(i).items() if not any(w in k for w in words)} for i in (1, 2)])
    assert got["tokens_per_s_speculative"] == 50.0
    assert got["tokens_per_s_plain"] is None and got["net_speedup"] is None


def test_summary_of_nothing() -> None:
    assert summary([{"warmup_step": 1}]) == {"steps": 0}
