"""The live table, drawn on a recording console of known size."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from miles_spec.live import BAR_WIDTH, LiveTable
from miles_spec.types import StepReport


def report(step: int, **overrides: Any) -> StepReport:
    metrics = dict(
        reward_mean=0.25, accept_length=2.5, accept_length_frozen=1.75, tokens_per_s=61.25, net_speedup=1.42,
        draft_loss=1.125, rollout_kl=2.1e-4, seconds_rollout=6.0, seconds_train=3.0, seconds_reward=None,
    )  # fmt: skip
    return StepReport(step=step, metrics={**metrics, **overrides})


def terminal(width: int = 80) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=40, record=True, color_system=None, _environ={}
    )


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40, _environ={})


def drawn(table: LiveTable, width: int = 80) -> list[str]:
    """What the table looks like now."""
    console = terminal(width)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_step_becomes_a_row() -> None:
    table = LiveTable(steps=20, console=terminal())
    with table:
        table.update(report(3))
        lines = drawn(table)
    heads = ["step", "reward", "accept", "frozen", "tok/s", "speed-up", "draft loss", "KL", "seconds"]
    assert lines[0].split() == " ".join(heads).split()
    assert lines[1].split() == ["3", "0.250", "2.50", "1.75", "61.2", "1.42", "1.125", "2.1e-04", "9.0"]
    assert max(map(len, lines)) <= 80


def test_the_last_ten_steps_stay() -> None:
    table = LiveTable(steps=20, console=terminal())
    for step in range(1, 13):
        table.update(report(step))
    lines = drawn(table)
    assert [line.split()[0] for line in lines[1:11]] == [str(i) for i in range(3, 13)]
    assert lines[11].startswith("run") and "12/20" in lines[11]


def test_remaining_time_is_the_mean_step_times_the_steps_left() -> None:
    table = LiveTable(steps=20, done=5, console=terminal())
    assert math.isnan(table.remaining_s())
    table.update(report(6, seconds_rollout=57.0))
    table.update(report(7, seconds_rollout=27.0))
    assert table.remaining_s() == 13 * 45.0
    assert "9:45 left" in drawn(table)[-1]


def test_a_resumed_run_starts_where_it_was() -> None:
    assert "5/20" in drawn(LiveTable(steps=20, done=5, console=terminal()))[-1]


def test_a_phase_shows_how_far_it_is_and_ends_with_the_step() -> None:
    table = LiveTable(steps=20, console=terminal())
    table.phase("rollout", 8, 32)
    line = drawn(table)[-1]
    assert line.startswith("rollout") and "8/32" in line
    assert line.count("━") == BAR_WIDTH // 4
    table.phase("rollout", 32, 32)
    assert drawn(table)[-1].count("━") == BAR_WIDTH
    table.phase("sync")
    assert drawn(table)[-1].startswith("sync")
    table.update(report(1))
    assert drawn(table)[-1].startswith("run")


def test_missing_figures_are_dashes_and_figures_never_seen_have_no_column() -> None:
    table = LiveTable(steps=20, console=terminal())
    nothing = dict(accept_length=math.nan, accept_length_frozen=None, net_speedup=None, draft_loss=None)
    table.update(report(1, **nothing))
    assert drawn(table)[0].split() == ["step", "reward", "tok/s", "KL", "seconds"]
    table.update(report(2))
    lines = drawn(table)
    assert lines[1].split() == ["1", "0.250", "-", "-", "61.2", "-", "-", "2.1e-04", "9.0"]
    assert lines[2].split()[2] == "2.50"


def test_in_a_terminal_the_table_is_drawn_and_left_in_place() -> None:
    console = terminal()
    with LiveTable(steps=2, console=console) as table:
        table.update(report(1))
        table.update(report(2))
        table.phase("saving")
    text = console.export_text()
    assert "2/2" in text and "61.2" in text
    assert "saving" not in text.splitlines()[-1]


def test_elsewhere_each_step_is_one_plain_line() -> None:
    console = pipe()
    with LiveTable(steps=20, console=console) as table:
        table.phase("rollout", 1, 2)
        table.update(report(1))
        table.update(report(2, accept_length=None, accept_length_frozen=None, net_speedup=None, draft_loss=math.nan))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert out.splitlines() == [
        "step 1/20  reward 0.250  accept 2.50  (frozen est. 1.75)  61.2 tok/s  1.42x  draft loss 1.125  KL 2.1e-04  "
        "9.0 s  2:51 left",
        "step 2/20  reward 0.250  61.2 tok/s  KL 2.1e-04  9.0 s  2:42 left",
    ]
    assert "\x1b" not in out


def test_an_error_restores_the_terminal() -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), LiveTable(steps=2, console=console):
        raise KeyboardInterrupt
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"
