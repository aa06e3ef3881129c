"""How far does a fresh draft of each family get in five minutes on the model's own rollouts?

    python benchmarks/draft_families.py [--model smollm2] [--drafts eagle eagle:8192 eagle3] [--budget-s 300]

A draft is named by its family and, behind a colon, the tokens that its vocabulary is reduced to. Each is trained by the
code of `miles-spec draft train`, its responses sampled from the model included in the time. Then it drafts in the
embedded engine, for prompts that were held out, of the same tasks and of others, under both verify rules that sample:
what is counted there stands beside what the trainer estimates for the same responses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from miles_spec import draft_training, models
from miles_spec.assemble import embedded
from miles_spec.config import DataConfig, DraftConfig, ModelConfig, OfflineConfig, RolloutConfig, RunConfig, TrainConfig
from miles_spec.data import make_source
from miles_spec.draft.load import load
from miles_spec.provenance import check, commit, write_result
from miles_spec.requests import context_tokens, sampling, seed_of
from miles_spec.train.packing import pack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import Request, Sample, SpecCounts

RESULT = Path(__file__).parent / "results" / "draft_families.json"
RULES = ("target", "rejection")
ESTIMATE_GOAL = 0.02
"""Relative distance of the estimate from the count, on the very responses that were counted."""


def main() -> None:
    """Trains, counts, prints and writes the result and its plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--drafts", nargs="+", default=["eagle", "eagle3"])
    parser.add_argument("--prompts", type=int, default=6144)
    parser.add_argument("--judged", type=int, default=192, help="prompts of each kind that are counted")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--running", type=int, default=512)
    parser.add_argument("--budget-s", type=float, default=300.0)
    parser.add_argument("--result", type=Path, default=RESULT, help="beside it the plot")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    seconds = {}
    at = commit()
    with tempfile.TemporaryDirectory() as folder:
        for draft in options.drafts:
            config = run_of(options, draft, Path(folder) / draft)
            begun = time.perf_counter()
            draft_training.train(config)
            seconds[draft] = time.perf_counter() - begun
            curves[draft] = curve(Path(config.out) / "metrics.jsonl")
            rows += [{"draft": draft, **row} for row in judged(config, options.judged)]
            for row in rows[-2 * len(RULES) :]:
                print(row)
            # after each draft, since a later one may not come to its end
            write_result(
                options.result,
                "draft_families",
                rows,
                checks(rows, seconds, options.budget_s),
                commit=at,
                seconds=seconds,
                settings={k: v for k, v in vars(options).items() if k != "result"},
                curves=curves,
            )
            plot(curves, rows, options.result.with_suffix(".svg"))


def checks(rows: list[dict[str, Any]], seconds: dict[str, float], budget_s: float) -> list[dict[str, Any]]:
    """Whether training kept within its time, and estimates are what is counted."""
    found = [
        check(f"{draft}: seconds of training, sampling included", took, f"at most {budget_s:g}", took <= budget_s)
        for draft, took in seconds.items()
    ]
    for row in rows:
        off = row["estimated"] / row["counted"] - 1
        what = f"{row['draft']}, {row['prompts']} tasks, {row['rule']}: estimated over counted accept length, less 1"
        found.append(check(what, off, f"within {ESTIMATE_GOAL}", abs(off) <= ESTIMATE_GOAL))
    return found


def run_of(options: argparse.Namespace, draft: str, out: Path) -> RunConfig:
    """What `miles-spec draft train` is given."""
    family, _, tokens = draft.partition(":")
    return RunConfig(
        out=str(out),
        seed=1,
        model=ModelConfig(path=options.model),
        data=DataConfig(
            source="draft_prompts:prompts",
            options={"tasks": "same", "size": options.prompts},
            max_prompt_tokens=96,
            answer_column="",
        ),
        rollout=RolloutConfig(
            temperature=1.0,
            samples_per_prompt=1,
            max_new_tokens=options.tokens,
            max_running=options.running,
            verify="target",
        ),
        draft=DraftConfig(
            family=family,  # type: ignore[arg-type]
            vocab_size=int(tokens or 0),
            num_steps=3,
            lr=options.lr,
            loss="ramp",
            ramp_steps=options.steps,
        ),
        offline=OfflineConfig(steps=options.steps, batch=options.batch, held_out=0.03),
        train=TrainConfig(token_budget=options.batch * 128),
    )


def curve(metrics: Path, pooled: int = 25) -> list[tuple[float, float]]:
    """Seconds of training and the accept length estimated in it, pooled over so many steps."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    points = []
    for start in range(0, len(lines), pooled):
        part = lines[start : start + pooled]
        accepted, steps = (
            sum(line.get(f"{name}_cotrained", 0) for line in part) for name in ("accepted_tokens", "verify_steps")
        )
        points.append((part[-1]["time_s"], 1 + accepted / max(steps, 1)))
    return points


def judged(config: RunConfig, count: int) -> list[dict[str, Any]]:
    """Both kinds of prompts under both rules."""
    loaded = models.load(config.model)
    draft = load(Path(config.out) / "draft", loaded.model, tokenizer=loaded.tokenizer).to(loaded.device)
    rows = []
    for kind in ("same", "other"):
        # another seed than that of training; a prompt that happens to be in both would be in "same" alone
        data = replace(config.data, options={"tasks": kind, "size": count, "seed": 7}, shuffle=False)
        prompts = make_source(data, loaded.tokenizer, config.seed).take(count)
        for rule in RULES:
            run = replace(config, rollout=replace(config.rollout, verify=rule))  # type: ignore[arg-type]
            engine = embedded(run, loaded, context_tokens(run))
            engine.attach_draft(draft)
            engine.set_draft_depth(config.draft.num_steps)
            requests = [
                Request(id=str(i), tokens=p.tokens, sampling=sampling(run), seed=seed_of("judged", i))
                for i, p in enumerate(prompts)
            ]
            completions = engine.generate(requests)
            counted = sum((c.spec for c in completions), SpecCounts())
            samples = [
                Sample(prompt=p, index=0, completion=c, reward=0.0) for p, c in zip(prompts, completions, strict=True)
            ]
            (batches,) = pack(
                samples,
                [0.0] * count,
                token_budget=config.train.token_budget,
                aggregation="token",
                max_new_tokens=config.rollout.max_new_tokens,
                minibatches=1,
                device=loaded.device,
            )
            trainer = TorchTrainer(loaded.model, draft, run, loaded.device, loaded.dtype, policy=False)
            estimate = trainer.estimate_draft(batches).acceptance["cotrained"]
            rows.append(
                {
                    "prompts": kind,
                    "rule": rule,
                    "counted": counted.accept_length,
                    "by_position": list(counted.accept_rates),
                    "estimated": estimate.accept_length,
                    "verify_steps": counted.verify_steps,
                    "response_tokens": sum(len(c.tokens) for c in completions),
                    "parameters": sum(p.numel() for p in draft.parameters()),
                }
            )
            del engine, trainer
            if loaded.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def plot(curves: dict[str, list[tuple[float, float]]], rows: list[dict[str, Any]], out: Path) -> None:
    """Accept length in training by seconds, and where it ended up."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for draft, points in curves.items():
        left.plot([s for s, _ in points], [a for _, a in points], label=draft)
    left.set(xlabel="seconds of training", ylabel="accept length, estimated, k = 3, rule target")
    left.legend()
    groups = [(row["prompts"], row["rule"]) for row in rows if row["draft"] == rows[0]["draft"]]
    width = 0.8 / len(curves)
    for i, draft in enumerate(curves):
        heights = [row["counted"] for row in rows if row["draft"] == draft]
        right.bar([g + i * width for g in range(len(groups))], heights, width, label=draft)
    right.set_xticks(
        [g + 0.4 - width / 2 for g in range(len(groups))], [f"{kind} tasks,\n{rule}" for kind, rule in groups]
    )
    right.set(ylabel="accept length, counted", ylim=(1, None))
    figure.savefig(out)


if __name__ == "__main__":
    main()
