"""Which loss gives the longest accept length, at which depth, under which verify rule?

    python benchmarks/draft_losses.py [--model smollm2] [--family eagle] [--losses kl ramp/target] [--budget-s 540]

One set of responses sampled from the model; for each loss a draft that starts as `miles-spec draft train` starts a
fresh one, the same steps and learning rate for all; those that need to know the verify rule (`tv`, `ramp`) once for
each rule. Every draft is trained on all of the depths 1 to 7 at once, and judged on the same held-out responses at
every depth it may serve with, under every rule. Goes on where an earlier call has ended.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from miles_spec import models
from miles_spec.assemble import embedded
from miles_spec.config import DataConfig, DraftConfig, ModelConfig, OfflineConfig, RolloutConfig, RunConfig, TrainConfig
from miles_spec.draft_data import first, sampled, split
from miles_spec.draft_training import FIT_TOKENS
from miles_spec.first_draft import fresh_draft
from miles_spec.provenance import check, commit, write_result
from miles_spec.requests import context_tokens
from miles_spec.train.packing import pack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import Sample

RESULT = Path(__file__).parent / "results" / "draft_losses.json"
RULES = ("greedy", "target", "rejection")
LOSSES = ("ce", "kl", *(f"{loss}/{rule}" for loss in ("tv", "ramp") for rule in RULES))
"""`tv` alone has no gradient from a cold start (it begins after a third of the steps on KL), `ramp` needs no such
help."""
DEPTH = 7


def main() -> None:
    """Trains, judges, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--family", default="eagle")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--prompts", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--running", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("runs/draft_losses"), help="where the responses are kept")
    parser.add_argument("--budget-s", type=float, default=540.0)
    options = parser.parse_args()
    begun = time.perf_counter()
    study = Study(options)
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    slowest = 0.0
    for loss in options.losses:
        if any(row["loss"] == loss for row in rows):
            continue
        if time.perf_counter() - begun + 1.1 * slowest > options.budget_s:
            print("no time left for", loss)
            continue
        started = time.perf_counter()
        rows += study.rows(loss)
        slowest = max(slowest, time.perf_counter() - started)
        print(loss, {row["rule"]: [round(n, 3) for n in row["accept_length"]] for row in rows[-len(RULES) :]})
        settings = {k: v for k, v in vars(options).items() if k != "work"}
        write_result(RESULT, "draft_losses", rows, checks(rows), commit=study.commit, settings=settings)


class Study:
    """One model with its responses."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.commit = options, commit()
        self.config = RunConfig(
            out=str(options.work),
            seed=1,
            model=ModelConfig(path=options.model),
            data=DataConfig(
                source="draft_prompts:prompts",
                options={"tasks": "same", "size": options.prompts},
                answer_column="",
                max_prompt_tokens=96,
            ),
            rollout=RolloutConfig(
                temperature=1.0, samples_per_prompt=1, max_new_tokens=options.tokens, max_running=options.running
            ),
            draft=DraftConfig(family=options.family, num_steps=DEPTH, lr=options.lr, ramp_steps=options.steps),
            offline=OfflineConfig(batch=options.batch, held_out=0.05),
            train=TrainConfig(token_budget=options.batch * 128),
        )
        self.loaded = models.load(self.config.model)
        self.fresh = fresh_draft(self.config, self.loaded, None)
        lessons = sampled(
            self.config,
            self.loaded,
            options.work / "responses.jsonl",
            lambda: nullcontext(embedded(self.config, self.loaded, context_tokens(self.config))),
            lambda done, total: False,
        )
        assert lessons is not None
        self.seen, held_out = split(lessons, self.config.offline.held_out, self.config.seed)
        self.held_out = self._pack(held_out)
        trainer = self._trainer(self.fresh, "target", "kl")
        trainer.fit_draft(self._pack(first(self.seen, FIT_TOKENS * self.fresh.width)))

    def rows(self, loss: str) -> list[dict[str, Any]]:
        """A draft trained with `loss`, judged: a row for each rule, with the accept length of each depth."""
        kind, _, rule = loss.partition("/")
        trainer = self._trainer(copy.deepcopy(self.fresh), rule or "target", kind)
        options, draw = self.options, random.Random(0)
        begun = time.perf_counter()
        for step in range(options.steps):
            warm = kind == "tv" and 3 * step < options.steps
            assert trainer.draft is not None
            trainer.draft.config = self._config(rule or "target", "kl" if warm else kind, DEPTH)
            trainer.train_draft(self._pack(draw.sample(self.seen, options.batch)), lr_scale=1 - step / options.steps)
        seconds = time.perf_counter() - begun
        return [{"loss": loss, "rule": rule, "seconds": seconds, **self._judged(trainer, rule)} for rule in RULES]

    def _judged(self, trainer: TorchTrainer, rule: str) -> dict[str, Any]:
        lengths = []
        for depth in range(1, DEPTH + 1):
            assert trainer.draft is not None
            trainer.draft.config = self._config(rule, "kl", depth)
            lengths.append(trainer.estimate_draft(self.held_out).acceptance["cotrained"].accept_length)
        return {"accept_length": lengths}

    def _trainer(self, draft: Any, rule: str, kind: str) -> TorchTrainer:
        config = self._config(rule, kind, DEPTH)
        return TorchTrainer(self.loaded.model, draft, config, self.loaded.device, self.loaded.dtype, policy=False)

    def _config(self, rule: str, loss: str, depth: int) -> RunConfig:
        return replace(
            self.config,
            rollout=replace(self.config.rollout, verify=rule),  # type: ignore[arg-type]
            draft=replace(self.config.draft, loss=loss, num_steps=depth),  # type: ignore[arg-type]
        )

    def _pack(self, samples: list[Sample]) -> Any:
        (batches,) = pack(
            samples,
            [0.0] * len(samples),
            token_budget=self.config.train.token_budget,
            aggregation="token",
            max_new_tokens=self.config.rollout.max_new_tokens,
            minibatches=1,
            device=self.loaded.device,
        )
        return batches


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the default loss, told the rule that is served with, is the best there."""
    found = []
    for rule in RULES:
        for depth in (3, DEPTH):
            here = {row["loss"]: row["accept_length"][depth - 1] for row in rows if row["rule"] == rule}
            ours = here.get(f"ramp/{rule}")
            if ours is not None and len(here) > 1:
                best = max(here.values())
                found.append(
                    check(
                        f"ramp over the best loss, rule {rule}, k = {depth}",
                        ours / best,
                        "at least 0.98",
                        ours / best >= 0.98,
                    )
                )
    return found


if __name__ == "__main__":
    main()
