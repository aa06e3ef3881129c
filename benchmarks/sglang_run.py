"""Does a whole run with SGLang servers hold what it should: receipts, acceptance, memory, time?

    python benchmarks/sglang_run.py                                        # examples/sglang.toml
    python benchmarks/sglang_run.py --sglang-attention-backend triton ...  # with settings on top

Runs it from its start (it refuses an unfinished or earlier one), and keeps its figures, metrics and report here.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from miles_spec import loop, report
from miles_spec.checkpoint import steps
from miles_spec.provenance import check, write_result
from miles_spec.settings import load

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples" / "sglang.toml"
RESULTS = ROOT / "benchmarks" / "results"
GROWTH_GIB = 0.5
"""What the memory that servers hold while they have released it may grow by over the run."""


def main() -> None:
    """Runs, checks and writes `results/sglang_run.json`, with the run's metrics and report beside it."""
    config = load(RUN_FILE, sys.argv[1:])
    out = Path(config.out)
    if steps(out):
        raise SystemExit(f"{out} holds an earlier run: remove it, so that the whole run is measured")
    begun = time.perf_counter()
    loop.train(config)
    seconds = time.perf_counter() - begun
    report.write(out)
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step" in line]
    co, frozen = summary["accept_length_cotrained"], summary["accept_length_frozen"]
    wanted = (1 if not config.draft.enabled else 2) * config.fleet.engines * len(lines)
    verified, failed = summary["receipts_verified"], summary["receipts_failed"]
    checks = [
        check("receipts that verified, of as many pushes", verified, f"{wanted}", verified == wanted),
        check("receipts that did not verify", failed, "0", failed == 0),
        check("accept length, co-trained over frozen, last fifth", co / frozen, "above 1", co > frozen),
        check(
            "reward, last over first fifth of the steps",
            summary["reward_last"] / summary["reward_first"],
            "above 1",
            summary["reward_last"] > summary["reward_first"],
        ),
        check("mean train/rollout KL", summary["rollout_kl_mean"], "at most 0.01", summary["rollout_kl_mean"] <= 0.01),
        check("seconds of the command", seconds, "at most 600", seconds <= 600),
        check(
            "draft training, share of a training step",
            summary["draft_share"],
            "at most 0.05",
            summary["draft_share"] <= 0.05,
        ),
    ]
    held = [line["gpu_gib_others"] for line in lines if line.get("gpu_gib_others") is not None]
    if held:
        growth = max(held[len(held) // 2 :]) - max(held[: len(held) // 2])
        what = f"GiB that released servers hold, growth from the first to the second half of {len(held)} cycles"
        checks.append(check(what, growth, f"at most {GROWTH_GIB}", growth <= GROWTH_GIB))
    write_result(RESULTS / "sglang_run.json", "sglang_run", lines, checks, seconds=seconds, summary=summary)
    kept = RESULTS / "sglang_run"
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "summary.json", "report.html", "config.toml"):
        shutil.copy(out / name, kept / name)


if __name__ == "__main__":
    main()
