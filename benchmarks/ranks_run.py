"""Does a whole run of several ranks hold what a run of one does: receipts, acceptance, agreement with its rollouts?

    python benchmarks/ranks_run.py                                 # Megatron, context parallel on 2 GPUs
    python benchmarks/ranks_run.py --train.ranks 2                 # FSDP2 on 2 GPUs

The quickstart's run file with the settings given on top, in processes of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from miles_spec.checkpoint import steps
from miles_spec.processes import COMMAND
from miles_spec.provenance import check, commit, write_result
from miles_spec.settings import load

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples" / "quickstart.toml"
RESULT = ROOT / "benchmarks" / "results" / "ranks_run.json"
MEGATRON = ("--train.backend", "megatron", "--train.ranks", "2", "--context-parallel-size", "2")


def main() -> None:
    """Runs, checks and writes the result."""
    settings = sys.argv[1:] or list(MEGATRON)
    config = load(RUN_FILE, settings)
    out = Path(config.out)
    if steps(out):
        raise SystemExit(f"{out} holds an earlier run: remove it, so that the whole run is measured")
    at, begun = commit(), time.perf_counter()
    subprocess.run([*COMMAND, "train", str(RUN_FILE), *settings], check=True, cwd=ROOT)
    seconds = time.perf_counter() - begun
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step" in line]
    wanted, verified, failed = 2 * len(lines), summary["receipts_verified"], summary["receipts_failed"]
    checks = [
        check("receipts that verified, of as many pushes", verified, f"{wanted}", verified == wanted),
        check("receipts that did not verify", failed, "0", failed == 0),
        check("mean train/rollout KL", summary["rollout_kl_mean"], "at most 0.01", summary["rollout_kl_mean"] <= 0.01),
        check(
            "estimated over counted accept length, largest error of a step",
            summary["accept_estimate_error_max"],
            "at most 0.1",
            summary["accept_estimate_error_max"] <= 0.1,
        ),
    ]
    write_result(RESULT, "ranks_run", lines, checks, seconds=seconds, summary=summary, settings=settings, commit=at)
    shutil.copy(out / "config.toml", RESULT.with_suffix(".toml"))


if __name__ == "__main__":
    main()
