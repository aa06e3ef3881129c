"""What is co-training worth once the policy has moved far?

    python benchmarks/cotraining.py                                   # as in the docs, 36 steps
    python benchmarks/cotraining.py --steps 60 --batches 1 4 --draft.updates 4 ...   # with settings on top

The quickstart's run file with more steps and small micro-batches, so that the draft can take several optimizer steps in
one of the policy's. Afterwards the policy as it is at the end is timed without a draft, with the draft of step 1 and
with the one that was trained along.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miles_spec import bench
from miles_spec.processes import COMMAND
from miles_spec.provenance import check, commit, write_result
from miles_spec.settings import load

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples" / "quickstart.toml"
RESULT = ROOT / "benchmarks" / "results" / "cotraining.json"
SETTINGS = ("--train.token-budget", "512", "--draft.updates", "6", "--draft.lr", "3e-5")
REQUESTS = 48
FASTER = 1.25
"""Tokens per second, co-trained over frozen."""
KEPT = ("step", "reward_mean", "entropy", "accept_length", "net_speedup")


def main() -> None:
    """Runs, times, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    options, settings = parser.parse_known_args()
    at = commit()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        own = ["--steps", str(options.steps), "--out", str(out)]
        subprocess.run([*COMMAND, "train", str(RUN_FILE), *SETTINGS, *settings, *own], check=True, cwd=ROOT)
        timed = bench.rollout(load(out / "config.toml"), None, batches=options.batches, requests=REQUESTS)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [{name: line.get(name) for name in KEPT} for line in lines if "step" in line]
    for row in steps:
        print(row)
    more = {"steps": options.steps, "settings": [*SETTINGS, *settings], "by_step": steps}
    rows = [asdict(row) for row in timed]
    write_result(RESULT, "cotraining", rows, checks(rows), commit=at, **more)


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every batch size; all is counted, nothing estimated."""
    found = []
    speed = {(row["mode"], row["batch"]): row["tokens_per_s"] for row in rows}
    for batch in sorted({row["batch"] for row in rows}):
        ratio = speed["cotrained", batch] / speed["frozen", batch]
        what = f"tokens/s, co-trained over frozen, batch {batch}"
        found.append(check(what, ratio, f"at least {FASTER:g}", ratio >= FASTER))
    return found


if __name__ == "__main__":
    main()
