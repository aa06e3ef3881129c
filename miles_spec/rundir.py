"""Reads what a run left in its directory, for the report.

Invariant: a value that is missing, null or not finite becomes NaN, and nothing else does; a file that cannot be read
is a `ValueError` that names it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAN = float("nan")
SAMPLE_KEYS = {"step", "prompt_id", "prompt", "response", "reward", "finish", "pieces", "accepted"}
BENCH_KEYS = {"mode", "batch", "tokens_per_s", "accept_length", "speedup"}


def check_out(out: Path) -> None:
    """Raises `ValueError` for a folder of something else than a run."""
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model or a draft (config.json); choose another `out`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory's content."""

    name: str
    steps: tuple[Mapping[str, Any], ...]
    """Lines of `metrics.jsonl` with a `step`, in order of step; at least one. A step that ran again after a resume
    counts as it ran last."""
    warmup: tuple[Mapping[str, Any], ...]
    """Lines of `metrics.jsonl` with a `warmup_step`, in order."""
    samples: tuple[Mapping[str, Any], ...]
    """Lines of `samples.jsonl`."""
    config_text: str
    """`config.toml`; "" if there is none."""
    config: Mapping[str, Any]
    """The same, parsed."""
    summary: Mapping[str, Any] | None
    """`summary.json`; None while a run goes on and after it was interrupted."""
    bench: tuple[Mapping[str, Any], ...]
    """Rows of `bench.json`."""
    notes: tuple[str, ...]
    """What a reader must know about the files themselves, a sentence each."""


def read(run_dir: Path) -> Run:
    """The run in `run_dir`. Raises `ValueError` in one sentence for a file that is missing or unreadable."""
    metrics_path = run_dir / "metrics.jsonl"
    lines, torn = _lines(metrics_path)
    steps: dict[int, Mapping[str, Any]] = {}
    warmup: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        table, key = (warmup, "warmup_step") if "warmup_step" in line else (steps, "step")
        if type(line.get(key)) is not int:
            raise ValueError(f"{metrics_path}, line {number}: `step` or `warmup_step` must be a whole number")
        table[line[key]] = line
    if not steps:
        raise ValueError(f"{metrics_path} holds no step yet: report the run once its first step is done")

    samples, samples_torn = _lines(run_dir / "samples.jsonl") if (run_dir / "samples.jsonl").exists() else ([], False)
    for number, line in enumerate(samples, 1):
        if missing := sorted(SAMPLE_KEYS - line.keys()):
            raise ValueError(f"{run_dir / 'samples.jsonl'}, line {number}: missing {', '.join(missing)}")
        if line["accepted"] and len(line["pieces"]) != len(line["accepted"]):
            raise ValueError(f"{run_dir / 'samples.jsonl'}, line {number}: `pieces` and `accepted` differ in length")

    config_text, config = "", {}
    config_path = run_dir / "config.toml"
    if config_path.exists():
        config_text = _text(config_path)
        try:
            config = tomllib.loads(config_text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{config_path} is not valid TOML: {error}") from None

    summary = _json(run_dir / "summary.json", dict) if (run_dir / "summary.json").exists() else None
    bench = _json(run_dir / "bench.json", list) if (run_dir / "bench.json").exists() else []
    for row in bench:
        if not isinstance(row, dict) or not row.keys() >= BENCH_KEYS:
            raise ValueError(f"{run_dir / 'bench.json'}: each row must have {', '.join(sorted(BENCH_KEYS))}")

    notes = []
    planned = config.get("steps")
    if summary is None:
        notes.append(
            f"This run has no summary.json: it is still going, or it was interrupted after step {max(steps)}. "
            "The figures at the top are those of its first and last recorded step."
        )
    elif "accept_length_after" not in summary and isinstance(planned, int) and max(steps) < planned:
        # of `draft train`, whose summary has that, the setting is not the steps
        notes.append(f"This run ended after step {max(steps)} of {planned}.")
    if torn or samples_torn:
        notes.append("The last line of a file was cut off in the middle of a write, and is left out.")
    return Run(
        name=run_dir.resolve().name,
        steps=tuple(steps[i] for i in sorted(steps)),
        warmup=tuple(warmup[i] for i in sorted(warmup)),
        samples=tuple(samples),
        config_text=config_text,
        config=config,
        summary=summary,
        bench=tuple(bench),
        notes=tuple(notes),
    )


def number(value: Any, where: str) -> float:
    """`value` as a float, NaN for null and what is not finite. Raises `ValueError` naming `where` for no number."""
    if value is None:
        return NAN
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {value!r}, not a number")
    return float(value) if math.isfinite(value) else NAN


def column(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """`[lines]` one metric; NaN where it is missing, null or not finite. Raises `ValueError` for anything else."""
    return [number(line.get(name), f"metrics.jsonl: {name}") for line in lines]


def list_column(lines: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """`[entries][lines]` a metric that is a list per line, NaN where a line's list is shorter or missing."""
    rows = []
    for line in lines:
        value = line.get(name)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"metrics.jsonl: {name} is {value!r}, not a list of numbers")
        rows.append([number(x, f"metrics.jsonl: {name}") for x in value or []])
    width = max(map(len, rows), default=0)
    return [[row[i] if i < len(row) else NAN for row in rows] for i in range(width)]


def first(values: Sequence[float]) -> float:
    """The first value that is not NaN; NaN if there is none."""
    return next((v for v in values if not math.isnan(v)), NAN)


def last(values: Sequence[float]) -> float:
    """The last value that is not NaN; NaN if there is none."""
    return first(values[::-1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a JSON {'object' if kind is dict else 'list'}")
    return value


def _lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects in a JSON Lines file, and whether its last line was cut off by an interrupted write."""
    text = _text(path)
    rows = text.split("\n")
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except json.JSONDecodeError:
            # only a write that was cut off leaves a last line without its newline
            if number == len(rows):
                return found, True
            raise ValueError(f"{path}, line {number} is not valid JSON") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object")
        found.append(value)
    return found, False
