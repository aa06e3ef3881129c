"""What is co-training worth once the policy has moved far?

    python benchmarks/cotraining.py                                   # the quickstart's task, 36 steps, on a CPU
    python benchmarks/cotraining.py --steps 60 --batches 1 4 --draft.updates 4 ...   # with settings on top
    python benchmarks/cotraining.py --run-file examples/sglang.toml --general 300 --batches 1 8 32 128 \
        --name cotraining_general                                     # SGLang, and a draft from other prompts

A run whose micro-batches are small, so that the draft takes several optimizer steps in one of the policy's. Afterwards
the policy as it is at the end is timed without a draft, with the draft of step 1 and with the one that was trained
along.

Where a run begins, its draft is what its own warm start makes of its prompts. With `--general N` it is instead one
that was trained for N steps on the model's responses to other tasks (`draft_prompts.py`: stories, code, sums), as
drafts from elsewhere are. With `--folder` what has been done there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from miles_spec import bench
from miles_spec.config import DataConfig, OfflineConfig, RunConfig
from miles_spec.processes import call
from miles_spec.provenance import check, commit, write_result
from miles_spec.settings import dump, load

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples" / "quickstart.toml"
RESULTS = ROOT / "benchmarks" / "results"
SETTINGS = ("--train.token-budget", "512", "--draft.updates", "6", "--draft.lr", "3e-5")
"""For the quickstart's run file."""
REQUESTS = 48
FASTER = 1.25
"""Tokens per second, co-trained over frozen."""
DRAFTS = ("cotrained", "frozen")
COUNTS = tuple(f"{count}_{draft}" for draft in DRAFTS for count in ("accepted_tokens", "verify_steps"))
"""What a run estimates of each draft."""
SPEED = ("seconds_rollout", "tokens_per_s", "net_speedup", "net_speedup_error")
KEPT = ("step", "reward_mean", "entropy", "accept_length", *SPEED, "draft_share", "gpu_gib_trainer", *COUNTS)


def main() -> None:
    """Runs, times, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-file", type=Path, default=RUN_FILE)
    parser.add_argument("--name", default="cotraining", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for it")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--general", type=int, default=0, metavar="N")
    parser.add_argument("--folder", type=Path, help="for the runs; a temporary one if left out")
    options, given = parser.parse_known_args()
    settings = [*(SETTINGS if options.run_file == RUN_FILE else ()), *given]
    at = commit()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        out = folder / "run"
        own = ["--steps", str(options.steps), "--out", str(out), "--checkpoint.every", "0"]
        begins: float | None = None
        if options.general:
            draft, begins = general(load(options.run_file, settings), folder, options.general)
            own += ["--draft.path", str(draft), "--draft.warmup-steps", "0", "--draft.vocab-size", "0"]
        call("train", str(options.run_file), *settings, *own, cwd=ROOT)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [{name: line.get(name) for name in KEPT} for line in lines if "step" in line]
        for row in steps:
            print(row)
        more = {"general": options.general, "general_accept_length": begins}
        more |= {"settings": settings, "by_step": steps, "commit": at}
        result = options.results / f"{options.name}.json"
        write_result(result, options.name, [], checks([], steps), left_out=["tokens/s: not timed yet"], **more)
        timed = bench.rollout(load(out / "config.toml"), None, batches=options.batches, requests=REQUESTS)
    rows = [asdict(row) for row in timed]
    write_result(result, options.name, rows, checks(rows, steps), **more)


def general(config: RunConfig, folder: Path, steps: int) -> tuple[Path, float]:
    """Folder of a draft that never saw the run's prompts, and its accept length on those that it is for."""
    data = DataConfig(
        source="benchmarks.draft_prompts:prompts",
        options={"tasks": "other", "size": 8 * steps},
        max_prompt_tokens=96,
        answer_column="",
    )
    offline = replace(
        config,
        out=str(folder / "general"),
        data=data,
        rollout=replace(config.rollout, engine="embedded", max_running=512),
        draft=replace(config.draft, lr=config.draft.warmup_lr or config.draft.lr, ramp_steps=steps, updates=1),
        offline=OfflineConfig(steps=steps, batch=32, held_out=0.03),
    )
    run_file = folder / "general.toml"
    folder.mkdir(parents=True, exist_ok=True)
    run_file.write_text(dump(offline))
    call("draft", "train", str(run_file), cwd=ROOT)
    summary = json.loads((folder / "general" / "summary.json").read_text())
    return folder / "general" / "draft", summary["accept_length_after"]


def checks(rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the run estimated of both drafts as it went, and of every batch size what was timed and counted."""
    found = []
    for what, part in (("all steps", steps), ("last fifth", steps[-max(1, len(steps) // 5) :])):
        co, frozen = (
            1 + sum(row[f"accepted_tokens_{draft}"] for row in part) / sum(row[f"verify_steps_{draft}"] for row in part)
            for draft in DRAFTS
        )
        where = f"accept length, estimated, co-trained over frozen, {what}"
        found.append(check(where, co / frozen, f"at least {FASTER:g}", co / frozen >= FASTER))
    speed = {(row["mode"], row["batch"]): row["tokens_per_s"] for row in rows}
    for batch in sorted({row["batch"] for row in rows}):
        ratio = speed["cotrained", batch] / speed["frozen", batch]
        what = f"tokens/s, co-trained over frozen, batch {batch}"
        found.append(check(what, ratio, f"at least {FASTER:g}", ratio >= FASTER))
    return found


if __name__ == "__main__":
    main()
