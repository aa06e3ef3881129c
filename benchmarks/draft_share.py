"""What does a draft lose that learns from a part of the micro-batches or drafts over a part of the vocabulary, and what
do more updates gain?

    python benchmarks/draft_share.py                                      # the cases of the docs
    python benchmarks/draft_share.py --cases 1,1,0 0.5,4,4096 --steps 24 ...   # some, with settings on top

The quickstart's run file with small micro-batches, once for each `draft.share`, `draft.updates` and `draft.vocab_size`
(0: the whole of 49152 tokens), one process after the other. Policy and responses are the same in all: neither depends
on the draft, but where two tokens tie.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from miles_spec.processes import call
from miles_spec.provenance import check, commit, write_result

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples" / "quickstart.toml"
RESULT = ROOT / "benchmarks" / "results" / "draft_share.json"
SETTINGS = ("--train.token-budget", "384")
"""About eight micro-batches a step."""
CASES = ("1,1,0", "1,1,4096", "1,8,4096", "0.5,4,4096", "0.25,2,4096")
SHARE, LOSS = 0.05, 0.02
"""The most that the draft takes of a training step, and of the accept length that a case loses beside the first."""


def main() -> None:
    """Runs, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="SHARE,UPDATES,VOCAB")
    parser.add_argument("--result", type=Path, default=RESULT)
    options, settings = parser.parse_known_args()
    at, rows = commit(), []
    for case in options.cases:
        share, updates, vocab = case.split(",")
        with tempfile.TemporaryDirectory() as folder:
            own = ["--draft.share", share, "--draft.updates", updates, "--draft.vocab-size", vocab]
            own += ["--out", str(Path(folder) / "run")]
            call("train", str(RUN_FILE), *SETTINGS, *settings, *own, cwd=ROOT)
            row = {"share": float(share), "updates": int(updates), "vocab_size": int(vocab)}
            rows.append(row | measured(Path(folder) / "run"))
            shutil.rmtree(Path(folder) / "run")
        print(rows[-1], flush=True)
        write_result(options.result, "draft_share", rows, checks(rows), settings=[*SETTINGS, *settings], commit=at)


def measured(out: Path) -> dict[str, Any]:
    """One run; accept lengths are counted and pooled over the last third of its steps."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step" in line]
    last = lines[-max(1, len(lines) // 3) :]
    blocks = sum(line["verify_steps"] for line in last)
    draft, policy = (sum(line[f"seconds_{part}"] for line in lines) for part in ("draft", "train"))
    return {
        "accept_length": 1 + sum(line["accepted_tokens"] for line in last) / blocks,
        "blocks": blocks,
        "accept_length_by_step": [line["accept_length"] for line in lines],
        "draft_share": draft / (draft + policy),
        "reward_last": sum(line["reward_mean"] for line in last) / len(last),
    }


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every case: what the draft takes of a step, and what it loses beside the first."""
    found = []
    for one in rows:
        took, where = one["draft_share"], _said(one)
        found.append(
            check(f"{where}: draft training, share of a training step", took, f"at most {SHARE}", took <= SHARE)
        )
        if one is not rows[0]:
            lost = 1 - one["accept_length"] / rows[0]["accept_length"]
            what = f"{where}: accept length lost beside {_said(rows[0])}, relative"
            found.append(check(what, lost, f"at most {LOSS}", lost <= LOSS))
    return found


def _said(row: dict[str, Any]) -> str:
    return f"draft.share {row['share']:g}, draft.updates {row['updates']}, draft.vocab_size {row['vocab_size']}"


if __name__ == "__main__":
    main()
