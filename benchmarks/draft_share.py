"""What does a draft lose that learns from a part of the micro-batches, and how much time does that save?

    python benchmarks/draft_share.py                                  # shares 1, 0.5 and 0.25 of each step
    python benchmarks/draft_share.py --shares 1 0.5 --steps 24 ...    # with settings on top

The quickstart's run file with small micro-batches, once for each `draft.share`, one process after the other. Policy and
responses are the same in all: neither depends on the draft, but where two tokens tie.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from miles_spec.processes import COMMAND
from miles_spec.provenance import check, commit, write_result

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples" / "quickstart.toml"
RESULT = ROOT / "benchmarks" / "results" / "draft_share.json"
SETTINGS = ("--train.token-budget", "384")
"""About eight micro-batches a step."""
SHARE, LOSS = 0.05, 0.02
"""The most that the draft takes of a training step, and of the accept length that a smaller share loses."""


def main() -> None:
    """Runs, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    options, settings = parser.parse_known_args()
    at, rows = commit(), []
    for share in options.shares:
        with tempfile.TemporaryDirectory() as folder:
            own = ["--draft.share", str(share), "--out", str(Path(folder) / "run")]
            subprocess.run([*COMMAND, "train", str(RUN_FILE), *SETTINGS, *settings, *own], check=True, cwd=ROOT)
            rows.append(row(share, Path(folder) / "run"))
            shutil.rmtree(Path(folder) / "run")
        print(rows[-1])
        write_result(RESULT, "draft_share", rows, checks(rows), settings=[*SETTINGS, *settings], commit=at)


def row(share: float, out: Path) -> dict[str, Any]:
    """One run; accept lengths are counted and pooled over the last third of its steps."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step" in line]
    last = lines[-max(1, len(lines) // 3) :]
    blocks = sum(line["verify_steps"] for line in last)
    draft, policy = (sum(line[f"seconds_{part}"] for line in lines) for part in ("draft", "train"))
    return {
        "share": share,
        "accept_length": 1 + sum(line["accepted_tokens"] for line in last) / blocks,
        "blocks": blocks,
        "accept_length_by_step": [line["accept_length"] for line in lines],
        "draft_share": draft / (draft + policy),
        "reward_last": sum(line["reward_mean"] for line in last) / len(last),
    }


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every share: what the draft takes of a step, and what it loses beside the first share."""
    found = []
    for one in rows:
        took, where = one["draft_share"], f"draft.share {one['share']:g}"
        found.append(
            check(f"{where}: draft training, share of a training step", took, f"at most {SHARE}", took <= SHARE)
        )
        if one is not rows[0]:
            lost = 1 - one["accept_length"] / rows[0]["accept_length"]
            what = f"{where}: accept length lost beside draft.share {rows[0]['share']:g}, relative"
            found.append(check(what, lost, f"at most {LOSS}", lost <= LOSS))
    return found


if __name__ == "__main__":
    main()
