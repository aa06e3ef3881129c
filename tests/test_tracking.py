"""Metrics files stay strict and whole over resumes; each tracker gets the same numbers."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miles_spec import tracking
from miles_spec.config import TrackingConfig
from miles_spec.tracking import Tracker, write_summary
from miles_spec.types import Completion, Prompt, Sample, SpecCounts, StepReport, VersionSpan

CONFIG = 'out = "here"\n[train]\nlr = 1e-6\n'


def sample(index: int = 0) -> Sample:
    completion = Completion(
        request_id="r",
        tokens=(5, 6, 7),
        logprobs=(-1.0, -2.0, -3.0),
        accepted=(False, True, False),
        versions=(VersionSpan(start=0, end=3, target=1, draft=1),),
        spec=SpecCounts(),
        finish="stop",
        text="a\u2028b",
    )
    prompt = Prompt(id="p", tokens=(1, 2), text="1+1=")
    return Sample(prompt=prompt, index=index, completion=completion, reward=0.5)


def track(out: Path, steps: range, resume_step: int = 0, config: TrackingConfig | None = None, **metrics: Any) -> None:
    with Tracker(out, config or TrackingConfig(), CONFIG, resume_step) as tracker:
        for step in steps:
            report = StepReport(step=step, metrics={"reward": step / 2, **metrics}, samples=(sample(0),))
            tracker.write(report, [["a", "\u2028", "b"]])


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().split("\n")[:-1]]


def test_a_step_is_a_line_of_strict_json(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    track(out, range(1, 3), nan=math.nan, rates=[0.5, math.inf, (math.nan,)], none=None, name="é")
    rest = {"nan": None, "rates": [0.5, None, [None]], "none": None, "name": "é"}
    assert lines(out / "metrics.jsonl") == [{"step": 1, "reward": 0.5, **rest}, {"step": 2, "reward": 1.0, **rest}]
    assert (out / "config.toml").read_text() == CONFIG
    assert not list(out.glob(".*"))


def test_a_line_is_on_the_disk_before_the_run_ends(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(), CONFIG, 0) as tracker:
        tracker.warmup(1, {"draft_loss": 2.0})
        tracker.write(StepReport(step=1, metrics={}))
        assert lines(tmp_path / "metrics.jsonl") == [{"warmup_step": 1, "draft_loss": 2.0}, {"step": 1}]


def test_samples_are_kept_with_their_accepted_tokens(tmp_path: Path) -> None:
    track(tmp_path, range(1, 3))
    assert lines(tmp_path / "samples.jsonl") == [
        {
            "step": step,
            "prompt_id": "p",
            "index": 0,
            "prompt": "1+1=",
            "response": "a\u2028b",
            "reward": 0.5,
            "finish": "stop",
            "tokens": [5, 6, 7],
            "pieces": ["a", "\u2028", "b"],
            "accepted": [False, True, False],
        }
        for step in (1, 2)
    ]


def test_pieces_must_belong_to_the_samples(tmp_path: Path) -> None:
    report = StepReport(step=1, metrics={}, samples=(sample(),))
    with Tracker(tmp_path, TrackingConfig(), CONFIG, 0) as tracker:
        with pytest.raises(ValueError, match="argument 2 is shorter"):
            tracker.write(report)
        with pytest.raises(AssertionError):
            tracker.write(report, [["too short"]])


def test_a_resumed_run_has_the_files_of_one_that_never_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    track(whole, range(1, 7))
    track(parts, range(1, 6))  # stopped after step 5, with a checkpoint of step 3
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (parts / name).open("a") as file:
            file.write('{"step": 6, "rew')  # a crash in the middle of a line
    track(parts, range(4, 7), resume_step=3)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_the_warm_start_outlasts_a_resume_but_not_a_new_start(tmp_path: Path) -> None:
    for resume_step, expected in (
        (0, [("warmup_step", 1), ("step", 1)]),
        (1, [("warmup_step", 1), ("step", 1)]),
        (0, []),
    ):
        with Tracker(tmp_path, TrackingConfig(), CONFIG, resume_step) as tracker:
            if not resume_step and expected:
                tracker.warmup(1, {"draft_loss": 1.0})
                tracker.write(StepReport(step=1, metrics={}))
        found = [next(iter(line.items())) for line in lines(tmp_path / "metrics.jsonl")]
        assert found == expected


def test_a_crash_while_dropping_lines_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(tracking.os, name, fail)
            Tracker(tmp_path, TrackingConfig(), CONFIG, 2)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ["nonsense", "[1]", "{}", '{"step": null}'])
def test_a_line_that_is_not_ours_is_named_and_kept(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n' + line + '\n{"step": 2}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a line of this project's; move the file away"):
        Tracker(tmp_path, TrackingConfig(), CONFIG, 1)
    assert path.read_text() == text


def test_the_summary_is_strict_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_summary(tmp_path, {"reward": [0.1, math.nan], "checks": {"speedup": math.inf}})
    first = (tmp_path / "summary.json").read_text()
    assert json.loads(first) == {"reward": [0.1, None], "checks": {"speedup": None}}
    assert "NaN" not in first and "Infinity" not in first

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tracking.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_summary(tmp_path, {"other": 1})
    assert (tmp_path / "summary.json").read_text() == first


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_finite_numbers_and_forgets_steps_that_run_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = TrackingConfig(tensorboard=True, samples=0)
    with Tracker(tmp_path, config, CONFIG, 0) as tracker:
        for step in range(1, 6):
            tracker.warmup(step, {"draft_loss": step / 4})
        tracker.write(StepReport(step=1, metrics={"reward": 0.5}))
    track(tmp_path, range(2, 5), resume_step=1, config=config, rates=[0.5, math.nan], nan=math.nan, name="text")
    track(tmp_path, range(3, 5), resume_step=2, config=config, later=1)
    found = read_tensorboard(tmp_path / "tensorboard")
    assert found["reward"] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert found["rates/0"] == [(2, 0.5)]
    assert found["later"] == [(3, 1.0), (4, 1.0)]
    assert found.keys() == {"reward", "rates/0", "later"}
    assert read_tensorboard(tmp_path / "tensorboard" / "warmup") == {
        "warmup/draft_loss": [(i, i / 4) for i in range(1, 6)]
    }


class FakeRun:
    """Records what wandb's and trackio's runs are told."""

    def __init__(self, calls: list[Any], **init: Any) -> None:
        self.calls = calls
        calls.append(("init", init))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", name, step_metric))

    def log(self, metrics: dict[str, float], **step: int) -> None:
        self.calls.append(("log", metrics, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


def fake(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=lambda **init: FakeRun(calls, **init)))
    return calls


def test_wandb_goes_on_in_the_same_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "wandb")
    config = TrackingConfig(wandb="project")
    out = tmp_path / "run-7"
    with Tracker(out, config, CONFIG, 0) as tracker:
        tracker.warmup(1, {"draft_loss": 4.0})
    track(out, range(2, 3), resume_step=1, config=config, nan=math.nan)
    track(out, range(1, 2), resume_step=0, config=config)
    inits = [call[1] for call in calls if call[0] == "init"]
    assert inits[0]["id"] == inits[1]["id"] != inits[2]["id"]
    rest = {"project": "project", "name": "run-7", "resume": "allow", "dir": str(out)}
    assert inits[0] == {"id": inits[0]["id"], "config": {"out": "here", "train": {"lr": 1e-6}}, **rest}
    logged = [call[1:] for call in calls if call[0] == "log"]
    assert logged[:2] == [({"warmup_step": 1, "warmup/draft_loss": 4.0}, {}), ({"step": 2, "reward": 1.0}, {})]
    assert calls.count(("finish",)) == 3
    assert ("define_metric", "*", "step") in calls and ("define_metric", "warmup/*", "warmup_step") in calls


def test_trackio_gets_the_numbers_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "trackio")
    track(tmp_path / "run", range(1, 3), config=TrackingConfig(trackio="project"), rates=[1])
    assert calls == [
        (
            "init",
            {"project": "project", "name": "run", "config": {"out": "here", "train": {"lr": 1e-6}}, "resume": "allow"},
        ),
        ("log", {"reward": 0.5, "rates/0": 1}, {"step": 1}),
        ("log", {"reward": 1.0, "rates/0": 1}, {"step": 2}),
        ("finish",),
    ]


def test_sinks_are_closed_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "wandb")
    with pytest.raises(KeyboardInterrupt), Tracker(tmp_path, TrackingConfig(wandb="p"), CONFIG, 0) as tracker:
        raise KeyboardInterrupt
    assert calls[-1] == ("finish",)
    assert tracker._metrics_file.closed and tracker._samples_file.closed


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    track(tmp_path, range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for module in [m for m in sys.modules if m == "torch.utils.tensorboard" or m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == name:
            raise ImportError(f"No module named {name!r}")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    if name != "tensorboard":
        monkeypatch.setitem(sys.modules, name, None)
    config = TrackingConfig(**{name: True if name == "tensorboard" else "project"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"tracking\.{name} needs the package '{name}'.*miles-spec\[tracking\]"):
        Tracker(tmp_path, config, CONFIG, 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_nothing_optional_is_imported_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    track(tmp_path, range(1, 2))


def test_a_full_disk_is_named_and_leaves_the_lines_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track(tmp_path, range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (
        pytest.raises(OSError, match=r"^/dev/full could not be written \(No space left on device\)$"),
        Tracker(tmp_path, TrackingConfig(), "", 2) as tracker,
    ):
        monkeypatch.setattr(tracker, "_metrics_file", open("/dev/full", "ab", buffering=0))  # noqa: SIM115
        tracker.write(StepReport(step=3, metrics={"reward": 1.0}))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = f"the run's directory {tmp_path} cannot be written (No space left on device)"
    with pytest.raises(OSError, match=re.escape(message)):
        Tracker(tmp_path, TrackingConfig(), "", 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_line_written_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(tmp_path, TrackingConfig(), "", 0) as tracker:
        file = tracker._metrics_file
        monkeypatch.setattr(
            tracker, "_metrics_file", SimpleNamespace(name="x", write=lambda data: file.write(data[:5]))
        )
        tracker.write(StepReport(step=1, metrics={"reward": 1.0}))
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 1.0}]
