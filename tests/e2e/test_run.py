"""A whole run on a tiny model: what it writes, what it counts, and that its figures agree with each other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from e2e.conftest import Configure, lines
from miles_spec import cli
from miles_spec.checkpoint import load_latest, steps
from miles_spec.config import RunConfig
from miles_spec.loop import train
from miles_spec.rollout.speculation import Controller

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
ELSEWHERE = {"warmup_step", "draft_max_batch", "gpu_gib_others", "gpu_gib_trainer", "gpu_gib_free"}
"""In other lines or runs, or on a GPU alone."""


def documented(section: str) -> set[str]:
    """Names in the first column of one part of docs/metrics.md: `steps` or `summary`."""
    before, _, after = DOCS.read_text(encoding="utf-8").partition("## `summary.json`")
    cells = re.findall(r"^\| (`.*?`) \|", before if section == "steps" else after, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_metrics_are_those_documented(finished: RunConfig) -> None:
    rows = lines(Path(finished.out))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() == documented("steps") - ELSEWHERE
        assert all(x is not None and math.isfinite(x) for value in row.values() for x in _numbers(value)), row
        assert (row["samples"], row["receipts_verified"], row["receipts_failed"]) == (16, 2, 0)
        assert (row["target_version"], row["draft_version"], row["draft_age"]) == (row["step"], row["step"], 0)
        assert row["accept_length"] == 1 + row["accepted_tokens"] / row["verify_steps"]
        assert row["draft_share"] == pytest.approx(row["seconds_draft"] / (row["seconds_draft"] + row["seconds_train"]))
    assert [row["seconds_checkpoint"] > 0 for row in rows] == [False, False, True, False]
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)


def _numbers(value: object) -> list[float]:
    return value if isinstance(value, list) else [value]  # type: ignore[list-item]


def test_engine_and_trainer_agree(finished: RunConfig) -> None:
    for row in lines(Path(finished.out)):
        assert abs(row["accept_estimate_error"]) < 1e-9
        assert row["verify_steps_cotrained"] == row["verify_steps"]
        assert row["rollout_kl"] < 1e-10 and row["rollout_logprob_diff"] < 1e-4


def test_the_draft_learns(finished: RunConfig) -> None:
    rows = lines(Path(finished.out))
    assert rows[0]["accept_length_cotrained"] == rows[0]["accept_length_frozen"]
    assert rows[-1]["accept_length_cotrained"] > 1.03 * rows[-1]["accept_length_frozen"]
    assert rows[-1]["draft_loss"] < 0.9 * rows[0]["draft_loss"]


def test_summary(finished: RunConfig) -> None:
    summary = json.loads((Path(finished.out) / "summary.json").read_text())
    assert summary.keys() == documented("summary") - {"bench"}
    assert (summary["steps"], summary["receipts_verified"], summary["receipts_failed"]) == (4, 8, 0)
    assert summary["seconds"].keys() == {"rollout", "reward", "train", "draft", "memory", "sync", "checkpoint"}


def test_checkpoints_and_samples(finished: RunConfig) -> None:
    out = Path(finished.out)
    assert steps(out) == [2, 4]
    samples = lines(out, "samples.jsonl")
    assert len(samples) == 4 * 16
    assert any(any(s["accepted"]) for s in samples)
    rewards = {r["step"]: r["reward_mean"] for r in lines(out)}
    for step, mean in rewards.items():
        scores = [s["reward"] for s in samples if s["step"] == step]
        assert mean == pytest.approx(sum(scores) / len(scores))


def test_command_line(run_file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    settings = dict(rollout__temperature=0.0, train__lr=0.0, train__dynamic_sampling=False)
    path = run_file(steps=2, draft__warmup_steps=3, **settings)
    assert cli.main(["train", path, "--seed", "6"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out) and printed[0].startswith("step 1/2  reward 0.")
    rows = lines(out)
    assert [row.get("warmup_step", row.get("step")) for row in rows] == [1, 2, 3, 1, 2]
    assert rows[3]["draft_version"] == 4
    # rule greedy: the estimate is a count there too
    assert all(abs(row["accept_estimate_error"]) < 1e-9 for row in rows[3:])
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert capsys.readouterr().out == f"{out}/report.html\n"
    assert "2 steps" in page and 'id="accept-length"' in page
    # a finished run has nothing left to do, and says the same again
    summary = (out / "summary.json").read_text()
    assert cli.main(["train", path, "--seed", "6"]) == 0
    assert (out / "summary.json").read_text() == summary and lines(out) == rows


def test_without_a_draft(configure: Configure, rewards: ModuleType, tmp_path: Path) -> None:
    train(configure(tmp_path, steps=2, draft__enabled=False))
    speculative = re.compile("draft|accept|verify_steps|plain|speedup")
    names = {n for n in documented("steps") - ELSEWHERE if not speculative.search(n)}
    for row in lines(tmp_path):
        assert row.keys() == names | {"seconds_draft", "rollout_seconds_draft"} | {"rollout_seconds_verify"}
        assert (row["receipts_verified"], row["seconds_draft"]) == (1, 0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    measured = {"tokens_per_s_plain", "reward_last", "rollout_kl_mean"}
    empty = {"accept_length", "accept_length_frozen", "accept_estimate_error_max", "net_speedup", "draft_share"}
    assert all(summary[name] is not None for name in measured)
    assert all(summary[name] is None for name in empty | {"tokens_per_s_speculative"})
    assert cli.main(["report", str(tmp_path)]) == 0


def test_responses_of_one_token(configure: Configure, rewards: ModuleType, tmp_path: Path) -> None:
    """Nothing is decoded and no row is the draft's; the run goes on all the same."""
    train(configure(tmp_path, steps=2, rollout__max_new_tokens=1, train__minibatches=2))
    for row in lines(tmp_path):
        assert row["verify_steps"] == 0 and row["accept_length"] is None and "draft_loss" not in row
        assert row["net_speedup_error"] is None
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.values["trainer"]["draft_version"] == 0


def test_a_frozen_draft_serves_on(configure: Configure, rewards: ModuleType, tmp_path: Path) -> None:
    train(configure(tmp_path, steps=2, draft__train=False))
    for row in lines(tmp_path):
        assert row["accept_length_cotrained"] == row["accept_length_frozen"] and row["draft_version"] == 0
        assert "draft_loss" not in row


def test_the_run_keeps_a_log(finished: RunConfig) -> None:
    text = (Path(finished.out) / "run.log").read_text()
    assert "miles_spec.assemble: the engine serves version 0, verified" in text


def test_how_deep_to_draft_for_how_many_is_chosen_before_every_rollout(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First for none, then for some: what is sampled and learned is the same."""
    train(configure(tmp_path / "plain", steps=2))
    chosen = iter(((0, 0), (16, 2)))
    monkeypatch.setattr(Controller, "max_batches", lambda self: next(chosen))
    train(configure(tmp_path / "adaptive", steps=2, draft__adaptive=True))
    plain, adaptive = lines(tmp_path / "plain"), lines(tmp_path / "adaptive")
    assert [row["draft_max_batch"] for row in adaptive if "step" in row] == [[0, 0], [16, 2]]
    assert [row["verify_steps"] > 0 for row in adaptive if "step" in row] == [False, True]
    assert all("draft_max_batch" not in row for row in plain)
    for ours, theirs in zip(adaptive, plain, strict=True):
        assert ours.get("reward_mean") == theirs.get("reward_mean")
        assert ours.get("response_tokens_mean") == theirs.get("response_tokens_mean")
        assert ours["draft_loss"] == pytest.approx(theirs["draft_loss"], rel=1e-4)
    assert cli.main(["report", str(tmp_path / "adaptive")]) == 0
