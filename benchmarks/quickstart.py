"""What does co-training the draft buy over a short run on a CPU, and is speculation worth it there?

    python benchmarks/quickstart.py

Runs the quickstart from its start (it refuses an unfinished or earlier one), and keeps its figures and its report here.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from miles_spec import quickstart
from miles_spec.checkpoint import steps
from miles_spec.provenance import check, write_result
from miles_spec.settings import load

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs, checks and writes `results/quickstart.json`, with the run's metrics and report beside it."""
    out = Path(load(quickstart.RUN_FILE).out)
    if steps(out):
        raise SystemExit(f"{out} holds an earlier run: remove it, so that the whole run is measured")
    begun = time.perf_counter()
    quickstart.main()
    seconds = time.perf_counter() - begun
    summary = json.loads((out / "summary.json").read_text())
    rows = json.loads((out / "bench.json").read_text())
    co, frozen = summary["accept_length_cotrained"], summary["accept_length_frozen"]
    speed = {(row["mode"], row["batch"]): row["tokens_per_s"] for row in rows}
    checks = [
        check(
            "reward, last over first fifth of the steps",
            summary["reward_last"] / summary["reward_first"],
            "above 1",
            summary["reward_last"] > summary["reward_first"],
        ),
        check("accept length, co-trained over frozen, last fifth", co / frozen, "above 1", co > frozen),
        check("seconds from start to report", seconds, "at most 360", seconds <= 360),
        check(
            "draft training, share of a training step",
            summary["draft_share"],
            "at most 0.05",
            summary["draft_share"] <= 0.05,
        ),
        check("mean train/rollout KL", summary["rollout_kl_mean"], "at most 0.01", summary["rollout_kl_mean"] <= 0.01),
    ]
    for batch in quickstart.BATCHES:
        plain, fixed, moving = (speed[mode, batch] for mode in ("plain", "frozen", "cotrained"))
        checks.append(
            check(f"tokens/s, co-trained over none, batch {batch}", moving / plain, "above 1", moving > plain)
        )
        checks.append(
            check(
                f"tokens/s, co-trained over frozen, batch {batch}",
                moving / fixed,
                "at least 1.25",
                moving / fixed >= 1.25,
            )
        )
    write_result(RESULTS / "quickstart.json", "quickstart", rows, checks, seconds=seconds, summary=summary)
    kept = RESULTS / "quickstart"
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "summary.json", "report.html", "config.toml"):
        shutil.copy(out / name, kept / name)


if __name__ == "__main__":
    main()
