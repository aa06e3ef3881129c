"""Does a whole run with SGLang servers hold what it should: receipts, acceptance, agreement, memory, time?

    python benchmarks/whole_run.py                                         # examples/sglang.toml on one GPU
    python benchmarks/whole_run.py --sglang-attention-backend triton ...   # with settings on top
    python benchmarks/whole_run.py --name sglang_run_nccl --fleet.gpus 1   # the server on the second GPU
    python benchmarks/whole_run.py --name sglang_run_megatron --train.backend megatron --train.ranks 2 \
        --context-parallel-size 2 --model.widen 0                          # the trainer on two

Runs it from its start (it refuses an unfinished or earlier one), and keeps its figures here; under the default name
its metrics and report too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from miles_spec import report
from miles_spec.checkpoint import steps
from miles_spec.config import RunConfig
from miles_spec.processes import call
from miles_spec.provenance import check, commit, write_result
from miles_spec.settings import load

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples" / "sglang.toml"
RESULTS = ROOT / "benchmarks" / "results"
NAME = "sglang_run"
HELD = {
    "gpu_gib_others": "others hold while the trainer works",
    "gpu_gib_trainer": "the trainer holds while responses are made",
}
"""Of the trainer's GPU."""
GROWTH_GIB = 0.5
"""What each may grow by over the run."""
ESTIMATE = 0.1
"""Accept length, estimated less counted, in any step."""


def main() -> None:
    """Runs, checks and writes `results/NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default=NAME, help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for it")
    options, settings = parser.parse_known_args()
    config = load(RUN_FILE, settings)
    out = Path(config.out)
    if steps(out):
        raise SystemExit(f"{out} holds an earlier run: remove it, so that the whole run is measured")
    at, begun = commit(), time.perf_counter()
    call("train", str(RUN_FILE), *settings, cwd=ROOT)
    seconds = time.perf_counter() - begun
    page = report.write(out)
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step" in line]
    write_result(
        options.results / f"{options.name}.json",
        options.name,
        lines,
        checks(config, lines, summary, seconds),
        commit=at,
        settings=settings,
        seconds=seconds,
        summary=summary,
    )
    if options.name == NAME:
        kept = options.results / NAME
        kept.mkdir(parents=True, exist_ok=True)
        for path in (out / "metrics.jsonl", out / "summary.json", out / "config.toml", page):
            shutil.copy(path, kept / path.name)


def checks(
    config: RunConfig, lines: list[dict[str, Any]], summary: dict[str, Any], seconds: float
) -> list[dict[str, Any]]:
    """What the run is held against, met or not."""
    pushes = 2 * config.fleet.engines * len(lines)
    verified, failed = summary["receipts_verified"], summary["receipts_failed"]
    gain = summary["accept_length_cotrained"] / summary["accept_length_frozen"]
    rise = summary["reward_last"] / max(summary["reward_first"], 1e-9)
    kl, off, share = (summary[name] for name in ("rollout_kl_mean", "accept_estimate_error_max", "draft_share"))
    speedups = [line["net_speedup"] for line in lines if line.get("net_speedup") is not None]
    found = [
        check("receipts that verified, of as many pushes", verified, f"{pushes}", verified == pushes),
        check("receipts that did not verify", failed, "0", failed == 0),
        check("accept length, co-trained over frozen, last fifth", gain, "above 1", gain > 1),
        check("reward, last over first fifth of the steps", rise, "above 1", rise > 1),
        check("mean train/rollout KL", kl, "at most 0.01", kl <= 0.01),
        check("seconds of the command", seconds, "at most 600", seconds <= 600),
        check("draft training, share of a training step", share, "at most 0.05", share <= 0.05),
    ]
    if off is not None:  # not with draft.max_batch
        what = "accept length, estimated less counted, most in a step"
        found.append(check(what, off, f"at most {ESTIMATE}", off <= ESTIMATE))
    if speedups:
        least = min(speedups)
        found.append(check("net speed-up of the rollouts, least of a step", least, "at least 0.98", least >= 0.98))
    for name, whose in HELD.items():
        held = [line[name] for line in lines if line.get(name) is not None]
        if len(held) > 1:
            growth = max(held[len(held) // 2 :]) - max(held[: len(held) // 2])
            what = f"GiB that {whose}, growth from the first to the second half of {len(held)} cycles"
            found.append(check(what, growth, f"at most {GROWTH_GIB}", growth <= GROWTH_GIB))
    return found


if __name__ == "__main__":
    main()
