"""Offline training on responses from a real server: `miles-spec draft train` with `rollout.engine = "sglang"`."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from miles_spec.draft_training import train

from .test_run import config, work

__all__ = ["work"]  # the fixture


def responses(out: Path) -> dict[str, list[int]]:
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()[1:]]
    return {row["id"]: row["tokens"] for row in rows}


def test_greedy_responses_are_those_of_the_embedded_engine(work: Path, tmp_path: Path) -> None:
    given = ["--offline.prompts", "6", "--offline.steps", "2"]
    first = train(config(work, tmp_path / "first", *given, "--rollout.engine", "embedded"), Console(quiet=True))
    served = train(config(work, tmp_path / "served", *given), Console(quiet=True))
    assert responses(served) == responses(first) and len(responses(served)) == 6
    summary = json.loads((served / "summary.json").read_text())
    assert summary["rule"] == "greedy" and summary["accept_length_after"] >= 1
