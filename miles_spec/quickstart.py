"""`miles-spec quickstart`: a run, a measurement and a report that a newcomer can watch from start to end.

Invariant: what it prints was measured in this very run; a claim that does not hold is printed as not holding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from miles_spec import bench, checkpoint, loop, report
from miles_spec.rollout.bench import Row
from miles_spec.settings import load

RUN_FILE = Path(__file__).resolve().parents[1] / "examples" / "quickstart.toml"
BATCHES = (1, 2, 4)
REQUESTS = 24


def main() -> None:
    """Trains by `examples/quickstart.toml`, times its drafts, writes the report, and prints what came of it."""
    if not RUN_FILE.exists():
        raise ValueError(f"the quickstart runs in a checkout of the project: there is no {RUN_FILE}")
    config = load(RUN_FILE)
    out = Path(config.out)
    console = Console()
    if checkpoint.steps(out):
        console.print(f"{out} holds a finished or interrupted run; going on with it (remove it to start anew)")
    console.print(
        "Reinforcement learning of SmolLM2-135M-Instruct on small sums, its draft trained as it goes\n", soft_wrap=True
    )
    loop.train(config)
    rows = bench.rollout(config, None, batches=BATCHES, requests=REQUESTS)
    page = report.write(out)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    console.print()
    for text in conclusions(summary, rows):
        console.print(text, highlight=False, soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)


def conclusions(summary: dict[str, Any], rows: list[Row]) -> list[str]:
    """The three findings, each marked by whether it holds."""
    first, last = summary["reward_first"], summary["reward_last"]
    co, frozen = summary["accept_length_cotrained"], summary["accept_length_frozen"]
    speed = {r.batch: r.speedup for r in rows if r.mode == "cotrained"}
    faster = ", ".join(f"{s:.2f}x at batch {b}" for b, s in sorted(speed.items()))
    findings = [
        (last > first, f"reward: {first:.3f} at the start, {last:.3f} at the end"),
        (co > frozen, f"accept length at the end: {co:.3f} co-trained, {frozen:.3f} with the draft of step 1"),
        (min(speed.values()) > 1, f"tokens/s with speculation over without: {faster}"),
    ]
    return [f"{'yes' if holds else 'NO '}  {text}" for holds, text in findings]
