"""What is it worth to draft only while it pays (`draft.adaptive`)?

    python benchmarks/adaptive.py                          # the quickstart's task, 16 and 64 sequences together
    python benchmarks/adaptive.py --running 8 32 --steps 6 ...   # with settings on top

The same short run without a draft, with one for any number of sequences, and with `draft.adaptive`; what their rollouts
made per second. The draft has hardly been trained when a run begins, so that it does not always pay. The policy is
trained alike in all, and responses are the same but for ties.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from miles_spec.processes import call
from miles_spec.provenance import check, commit, write_result

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples" / "quickstart.toml"
RESULT = ROOT / "benchmarks" / "results" / "adaptive.json"
MODES = {"none": ["--draft.no-enabled"], "always": [], "adaptive": ["--draft.adaptive"]}
LEAST = 0.98
"""Tokens per second, with `draft.adaptive` over without a draft."""


def main() -> None:
    """Runs, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup-steps", type=int, default=3, help="of the draft")
    parser.add_argument("--result", type=Path, default=RESULT)
    options, given = parser.parse_known_args()
    settings = ["--steps", str(options.steps), "--draft.warmup-steps", str(options.warmup_steps), *given]
    at, rows = commit(), []
    for running in options.running:
        for mode, own in MODES.items():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                where = ["--rollout.max-running", str(running), "--out", str(out)]
                call("train", str(RUN_FILE), *settings, *own, *where, cwd=ROOT)
                rows.append({"running": running, "mode": mode, **measured(out)})
            print(rows[-1], flush=True)
            write_result(options.result, "adaptive", rows, checks(rows), commit=at, settings=settings)


def measured(out: Path) -> dict[str, Any]:
    """Of all steps of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    tokens = sum(line["tokens_per_s"] * line["seconds_rollout"] for line in steps)
    return {
        "tokens_per_s": tokens / sum(line["seconds_rollout"] for line in steps),
        "by_step": [line["tokens_per_s"] for line in steps],
        "max_batch": [line.get("draft_max_batch") for line in steps],
        "accept_length": [line.get("accept_length_cotrained") for line in steps],
    }


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each number of sequences."""
    speed = {(row["running"], row["mode"]): row["tokens_per_s"] for row in rows}
    found = []
    for running in sorted({row["running"] for row in rows}):
        if (running, "adaptive") in speed:
            for other, goal in (("none", LEAST), ("always", LEAST)):
                ratio = speed[running, "adaptive"] / speed[running, other]
                what = f"tokens/s of rollouts, {running} sequences together, adaptive over {other}"
                found.append(check(what, ratio, f"at least {goal}", ratio >= goal))
    return found


if __name__ == "__main__":
    main()
