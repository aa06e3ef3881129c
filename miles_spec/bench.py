"""`miles-spec bench rollout`: a finished run's own policy and drafts, timed without speculation and with each draft.

Invariant: it changes nothing in the run's directory but `bench.json` and the rows in `summary.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from miles_spec import checkpoint
from miles_spec.assemble import Run, assemble, sampling, seed_of
from miles_spec.config import RunConfig
from miles_spec.live import LiveTable
from miles_spec.provenance import check, write_result
from miles_spec.rollout.bench import PLAIN, Row, as_json, compare
from miles_spec.tracking import write_summary
from miles_spec.types import Request

BATCHES = (1, 2, 4, 8)
TURNS = 3
REQUESTS = 16


def rollout(
    config: RunConfig,
    result: Path | None,
    *,
    batches: Sequence[int] = BATCHES,
    turns: int = TURNS,
    requests: int = REQUESTS,
) -> list[Row]:
    """Prints the comparison for the run that `config` describes, and writes it into the run's directory.

    With `result` it is also written there, as a benchmark's result. Raises `ValueError` if the run has no checkpoint
    to take the weights from, or no draft.
    """
    out = Path(config.out)
    if not config.draft.enabled:
        raise ValueError("bench rollout compares drafts, and draft.enabled is false")
    if not checkpoint.steps(out):
        raise ValueError(f"{out} has no checkpoint to take policy and drafts from; run `miles-spec train` first")
    console = Console()
    with LiveTable(steps=config.steps, console=console) as live:
        run = assemble(config, live)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("timing rollouts", total=None)
        rows = measure(run, batches, turns, requests, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(table(rows))
    (out / "bench.json").write_text(json.dumps(as_json(rows), indent=1) + "\n")
    summary_path = out / "summary.json"
    if summary_path.exists():
        write_summary(out, {**json.loads(summary_path.read_text()), "bench": as_json(rows)})
    if result is not None:
        speed = {r.batch: r.speedup for r in rows if r.mode == "cotrained"}
        checks = [check(f"co-trained over no speculation at batch {b}", s, "above 1", s > 1) for b, s in speed.items()]
        write_result(result, "rollout", as_json(rows), checks, model=config.model.path, depth=config.draft.num_steps)
    return rows


def measure(run: Run, batches: Sequence[int], turns: int, requests: int, progress: Any = None) -> list[Row]:
    """The rows for prompts that come next in the run's data."""
    draft = run.trainer.draft
    assert draft is not None and draft.frozen is not None
    prompts = run.source.take(requests)
    asked = [
        Request(id=str(i), tokens=p.tokens, sampling=sampling(run.config), seed=seed_of(run.config.seed, "bench", i))
        for i, p in enumerate(prompts)
    ]
    drafts = {"frozen": draft.frozen, "cotrained": draft.draft}
    return compare(run.engine, drafts, asked, batches=batches, turns=turns, progress=progress)


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("batch", "draft", "tokens/s", "speed-up", "accept length", "same responses"):
        shown.add_column(head, justify="right")
    for row in rows:
        shown.add_row(
            str(row.batch),
            "none" if row.mode == PLAIN else row.mode,
            f"{row.tokens_per_s:.1f}",
            f"{row.speedup:.2f}x",
            "-" if row.accept_length is None else f"{row.accept_length:.2f}",
            f"{row.same_responses:.0%}",
        )
    return shown
