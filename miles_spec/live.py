"""The live table of a run in a terminal, and its plain lines anywhere else.

Invariant: what is shown comes from the step's metrics alone, so a resumed or replayed run shows the same; a metric
that is missing, null or not finite shows as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from miles_spec.types import StepReport

SHOWN_STEPS = 10
BAR_WIDTH = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of a step."""

    metric: str
    """Name in `metrics.jsonl`."""
    head: str
    """Above its column."""
    plain: str
    """The same figure within a plain line; `{}` stands for it."""
    format: str


COLUMNS = (
    Column(metric="reward_mean", head="reward", plain="reward {}", format=".3f"),
    Column(metric="accept_length", head="accept", plain="accept {}", format=".2f"),
    Column(metric="accept_length_frozen", head="frozen", plain="(frozen est. {})", format=".2f"),
    Column(metric="tokens_per_s", head="tok/s", plain="{} tok/s", format=".1f"),
    Column(metric="net_speedup", head="speed-up", plain="{}x", format=".2f"),
    Column(metric="draft_loss", head="draft loss", plain="draft loss {}", format=".3f"),
    Column(metric="rollout_kl", head="KL", plain="KL {}", format=".1e"),
)


class LiveTable:
    """`with LiveTable(steps=...) as table:` shows a run as it goes.

    In a terminal: the last ten steps, overall progress with the remaining time, and the current phase. Elsewhere (a
    pipe, a log file, a dumb terminal): one plain line per step.
    """

    def __init__(self, *, steps: int, done: int = 0, console: Console | None = None) -> None:
        """`steps` of the whole run, of which a resumed run has `done` already."""
        self._steps = steps
        self._done = done
        self._console = console or Console()
        self._reports: tuple[StepReport, ...] = ()
        self._phase: tuple[str, int | None, int | None] | None = None
        self._live: Live | None = None

    def __enter__(self) -> LiveTable:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line above the table, which stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def update(self, report: StepReport) -> None:
        """Shows a finished step."""
        # replaced whole, never changed: the display draws from a thread of its own
        self._reports = (*self._reports, report)[-SHOWN_STEPS:]
        self._done = report.step
        self._phase = None
        if self._live is None:
            self._console.print(self._plain(report), markup=False, highlight=False, soft_wrap=True)

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Shows what the run is doing, and how far it is if `total` is known."""
        self._phase = (name, done, total)

    def remaining_s(self) -> float:
        """Steps to go times the mean time of the steps on show; NaN before the first."""
        known = [s for s in (step_seconds(r.metrics) for r in self._reports) if not math.isnan(s)]
        return (self._steps - self._done) * sum(known) / len(known) if known else float("nan")

    def __rich__(self) -> RenderableType:
        reports = self._reports
        parts: list[RenderableType] = []
        if reports:
            columns = [c for c in COLUMNS if any(not math.isnan(_value(r.metrics, c.metric)) for r in reports)]
            table = Table(box=None, pad_edge=False, header_style="bold")
            for head in ("step", *(c.head for c in columns), "seconds"):
                table.add_column(head, justify="right", no_wrap=True)
            for r in reports:
                cells = [_text(_value(r.metrics, c.metric), c.format) for c in columns]
                table.add_row(str(r.step), *cells, _text(step_seconds(r.metrics), ".1f"))
            parts.append(table)
        progress = Table.grid(padding=(0, 2))
        progress.add_row(
            "run", ProgressBar(total=self._steps, completed=self._done, width=BAR_WIDTH), f"{self._done}/{self._steps}",
            _left(self.remaining_s()),
        )  # fmt: skip
        if self._phase is not None:
            name, done, total = self._phase
            bar = ProgressBar(total=total, completed=done or 0, width=BAR_WIDTH, pulse=total is None)
            count = "" if done is None else f"{done}" if total is None else f"{done}/{total}"
            progress.add_row(name, bar, count, "")
        return Group(*parts, progress)

    def _plain(self, report: StepReport) -> str:
        parts = [f"step {report.step}/{self._steps}"]
        for c in COLUMNS:
            value = _value(report.metrics, c.metric)
            if not math.isnan(value):
                parts.append(c.plain.format(_text(value, c.format)))
        seconds = step_seconds(report.metrics)
        if not math.isnan(seconds):
            parts.append(f"{seconds:.1f} s")
        return "  ".join([*parts, _left(self.remaining_s())]).rstrip()


def step_seconds(metrics: Mapping[str, Any]) -> float:
    """Time of one step, the sum of its phases `seconds_*`; NaN if it recorded none."""
    known = [v for v in (_value(metrics, name) for name in metrics if name.startswith("seconds_")) if not math.isnan(v)]
    return sum(known) if known else float("nan")


def _value(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else float("nan")


def _text(value: float, spec: str) -> str:
    return "-" if math.isnan(value) else format(value, spec)


def _left(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02} left" if hours else f"{minutes}:{s:02} left"
