"""Writes what a run measures: `metrics.jsonl`, `samples.jsonl`, `config.toml` and `summary.json` in its directory, and
to TensorBoard, Weights & Biases and trackio where they are asked for.

Invariant: after a run was resumed from step `n`, its files hold each step once, as if it had never stopped: lines of
later steps, and a line that a crash cut off, are dropped before the first new one. JSON is strict: what is not finite
is null.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import tomllib
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from miles_spec.config import TrackingConfig
from miles_spec.types import Sample, StepReport


class _Sink(Protocol):
    """A place that takes numbers by step."""

    def log(self, step: int, scalars: Mapping[str, float], *, warmup: bool) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, module: Any, out: Path, resume_step: int) -> None:
        # from `purge_step` on, viewers forget what an earlier start of the run wrote; so the warm start, whose steps
        # also begin at 1 but do not run again after a resume, has a folder of its own
        self.writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=resume_step + 1)
        self.warmup = None if resume_step else module.SummaryWriter(str(out / "tensorboard" / "warmup"), purge_step=1)

    def log(self, step: int, scalars: Mapping[str, float], *, warmup: bool) -> None:
        writer = self.warmup if warmup else self.writer
        assert writer is not None, "a resumed run has its warm start behind it"
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def close(self) -> None:
        self.writer.close()
        if self.warmup is not None:
            self.warmup.close()


class _Wandb:
    def __init__(self, module: Any, out: Path, project: str, config: Mapping[str, Any], resume_step: int) -> None:
        id_path = out / "wandb_run_id"
        if not resume_step or not id_path.exists():
            write_atomically(id_path, uuid.uuid4().hex)
        self.run = module.init(
            project=project,
            name=out.resolve().name,
            id=id_path.read_text(),
            resume="allow",
            dir=str(out),
            config=dict(config),
        )
        # steps as metrics of their own: wandb's built-in one may neither start again nor repeat
        self.run.define_metric("*", step_metric="step")
        self.run.define_metric("warmup/*", step_metric="warmup_step")

    def log(self, step: int, scalars: Mapping[str, float], *, warmup: bool) -> None:
        self.run.log({"warmup_step" if warmup else "step": step, **scalars})

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, module: Any, out: Path, project: str, config: Mapping[str, Any]) -> None:
        self.run = module.init(project=project, name=out.resolve().name, config=dict(config), resume="allow")

    def log(self, step: int, scalars: Mapping[str, float], *, warmup: bool) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


class Tracker:
    """Opens a run's files, takes its reports, and closes them; a context manager."""

    def __init__(self, out: Path, config: TrackingConfig, run_config_text: str, resume_step: int) -> None:
        """Starts in the directory `out`, made if need be, after step `resume_step`; 0 drops an earlier run's lines.

        `run_config_text` is the run's whole configuration in TOML. Raises `ValueError` for a tracker that is asked for
        and not installed, and for a file whose lines cannot be read, before any file changes; `OSError`, naming the
        directory, where the disk is full or fails.
        """
        values = tomllib.loads(run_config_text)
        tensorboard = _load("torch.utils.tensorboard", "tensorboard") if config.tensorboard else None
        wandb = _load("wandb", "wandb") if config.wandb else None
        trackio = _load("trackio", "trackio") if config.trackio else None
        with ExitStack() as stack:
            paths = (out / "metrics.jsonl", out / "samples.jsonl")
            kept = [_kept_lines(path, resume_step) for path in paths]
            try:
                out.mkdir(parents=True, exist_ok=True)
                for path, text in zip(paths, kept, strict=True):
                    write_atomically(path, text)
                write_atomically(out / "config.toml", run_config_text)
                # without a buffer, which would try again on closing what could not be written
                files = [stack.enter_context(path.open("ab", buffering=0)) for path in paths]
            except OSError as error:
                raise OSError(f"the run's directory {out} cannot be written ({error.strerror or error})") from error
            self._metrics_file, self._samples_file = files
            self._sinks: list[_Sink] = []
            if tensorboard:
                self._add(stack, _TensorBoard(tensorboard, out, resume_step))
            if wandb:
                self._add(stack, _Wandb(wandb, out, config.wandb, values, resume_step))
            if trackio:
                self._add(stack, _Trackio(trackio, out, config.trackio, values))
            self._stack = stack.pop_all()

    def _add(self, stack: ExitStack, sink: _Sink) -> None:
        stack.callback(sink.close)
        self._sinks.append(sink)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def warmup(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step of the draft's warm start, counted from 1: a line with `warmup_step` in `metrics.jsonl`."""
        _append(self._metrics_file, {"warmup_step": step, **metrics})
        self._log(step, {f"warmup/{name}": value for name, value in metrics.items()}, warmup=True)

    def write(self, report: StepReport, pieces: Sequence[Sequence[str]] = ()) -> None:
        """One step: a line in `metrics.jsonl`, and the first `config.samples` of its samples in `samples.jsonl`.

        `pieces[i][j]` is the text of response token `j` of `report.samples[i]`. Raises `OSError`, naming the file,
        where the disk is full or fails.
        """
        for sample, texts in zip(report.samples, pieces, strict=True):
            _append(self._samples_file, _sample_line(report.step, sample, texts))
        _append(self._metrics_file, {"step": report.step, **report.metrics})
        self._log(report.step, report.metrics, warmup=False)

    def _log(self, step: int, metrics: Mapping[str, Any], *, warmup: bool) -> None:
        scalars = _scalars(metrics)
        for sink in self._sinks:
            sink.log(step, scalars, warmup=warmup)


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json` in the run directory, whole or not at all."""
    write_atomically(out / "summary.json", json.dumps(_strict(summary), indent=2, allow_nan=False) + "\n")


def _load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"tracking.{package} needs the package {package!r}, which cannot be imported ({error}); install it with "
            "`pip install 'miles-spec[tracking]'`, or switch the option off"
        ) from error


def _kept_lines(path: Path, last: int) -> str:
    """The lines of a file up to step `last` and, if it is not 0, those of the warm start."""
    if not path.exists():
        return ""
    kept = []
    for number, line in enumerate(io.StringIO(path.read_text(encoding="utf-8"), newline="\n"), 1):
        if not line.endswith("\n"):
            break  # only the last line can lack its end: a crash cut it off
        try:
            values = json.loads(line)
            before = "warmup_step" in values or values["step"] <= last
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not a line of this project's; move the file away to go on without it"
            ) from error
        if last and before:
            kept.append(line)
    return "".join(kept)


def _sample_line(step: int, sample: Sample, pieces: Sequence[str]) -> dict[str, Any]:
    completion = sample.completion
    assert len(pieces) == len(completion.tokens)
    return {
        "step": step,
        "prompt_id": sample.prompt.id,
        "index": sample.index,
        "prompt": sample.prompt.text,
        "response": completion.text,
        "reward": sample.reward,
        "finish": completion.finish,
        "tokens": completion.tokens,
        "pieces": pieces,
        "accepted": completion.accepted,
    }


def _append(file: io.FileIO, line: Mapping[str, Any]) -> None:
    rest = memoryview((json.dumps(_strict(line), allow_nan=False) + "\n").encode())
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise OSError(f"{file.name!s} could not be written ({error.strerror or error})") from error


def _strict(value: Any) -> Any:
    """The same with null for every number that JSON has no name for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Flat and finite numbers: entry `i` of a list becomes `name/i`, and what is not a finite number is left out."""
    scalars: dict[str, float] = {}
    for name, value in metrics.items():
        entries = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list | tuple) else {name: value}
        scalars |= {n: v for n, v in entries.items() if isinstance(v, int | float) and math.isfinite(v)}
    return scalars


def write_atomically(path: Path, text: str) -> None:
    """The whole text or, if that fails, what was there before. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
