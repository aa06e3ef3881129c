"""`miles-spec bench rollout` on a run that has ended."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from miles_spec import bench, cli, tracking
from miles_spec.config import RunConfig
from miles_spec.loop import train


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_finished_run(
    adaptive: bool, finished: RunConfig, rewards: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished.out, tmp_path / "out")
    config, result = replace(finished, out=str(out)), tmp_path / "results" / "rollout.json"
    before = json.loads((out / "summary.json").read_text())
    asked = replace(config, draft=replace(config.draft, adaptive=adaptive))
    rows = bench.rollout(asked, result, batches=(1, 3), turns=2)
    assert [(r.batch, r.mode) for r in rows] == [(b, m) for b in (1, 3) for m in ("plain", "frozen", "cotrained")]
    for row in rows:
        assert row.same_responses == 1.0
        assert row.tokens == rows[0].tokens > 0 and len(row.tokens_per_s_turns) == 2
        assert (row.accept_length is None) == (row.mode == "plain")
    assert [r.speedup for r in rows if r.mode == "plain"] == [1.0, 1.0]
    # acceptance does not depend on the batch size, and the two drafts differ
    assert rows[1].accept_length == rows[4].accept_length != rows[2].accept_length == rows[5].accept_length
    written = json.loads((out / "bench.json").read_text())
    assert [(w["mode"], w["accept_length"]) for w in written] == [(r.mode, r.accept_length) for r in rows]
    assert json.loads((out / "summary.json").read_text()) == {**before, "bench": written}
    assert "same responses" in capsys.readouterr().out

    content = json.loads(result.read_text())
    assert content.keys() >= {"name", "commit", "hardware", "versions", "rows", "checks"}
    assert content["name"] == "rollout" and content["rows"] == written
    for check, batch in zip(content["checks"], (1, 3), strict=True):
        assert check.keys() == {"what", "value", "goal", "holds"} and f"batch {batch}" in check["what"]
        assert check["holds"] == (check["value"] > 1)

    # the finished run keeps its comparison; one that goes on drops it, since its weights are others then
    train(config)
    assert json.loads((out / "summary.json").read_text())["bench"] == written
    train(replace(config, steps=5))
    assert not (out / "bench.json").exists() and "bench" not in json.loads((out / "summary.json").read_text())


def test_a_write_that_fails_leaves_the_comparison_before(
    finished: RunConfig, rewards: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "bench.json").write_text("[]\n")

    def full(descriptor: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(tracking.os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        bench.rollout(replace(finished, out=str(out)), None, batches=(1,), turns=1, requests=1)
    assert (out / "bench.json").read_text() == "[]\n"


def test_report_shows_it(finished: RunConfig, rewards: ModuleType, tmp_path: Path) -> None:
    out = shutil.copytree(finished.out, tmp_path / "out")
    bench.rollout(replace(finished, out=str(out)), None, batches=(2,), turns=1)
    assert cli.main(["report", str(out)]) == 0
    assert "Rollout benchmark" in (out / "report.html").read_text()
