"""`miles-spec draft train`: trains a draft offline, with the losses and the code of the loop.

The model runs over the responses of each step, so no hidden state is ever stored. Invariant: the model does not change;
what is held out is never trained on; `n` steps are `k` steps, a resume and `n - k` steps, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from miles_spec import checkpoint, models, rundir
from miles_spec.assemble import embedded, untrained
from miles_spec.config import RunConfig
from miles_spec.draft.export import export
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES
from miles_spec.draft_data import Lesson, first, given, sampled, split
from miles_spec.drafts import check_written
from miles_spec.first_draft import first_draft, given_draft
from miles_spec.live import LiveTable
from miles_spec.loop import due, interruptible, logged
from miles_spec.requests import check_context, context_tokens
from miles_spec.rollout.engine import Engine
from miles_spec.serving import Serving
from miles_spec.settings import dump
from miles_spec.tracking import Tracker, write_summary
from miles_spec.train.packing import pack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import LossTerms, PackedBatch, Sample, SpecEstimate, StepReport

EVERY = 500
"""Steps between checkpoints, unless `checkpoint.every` says otherwise."""
FIT_TOKENS = 32
"""Of responses with their prompts, that the closed form of a fresh draft is of, for each number in a state it reads."""


def train(config: RunConfig, console: Console | None = None) -> Path:
    """Trains the draft of `config`, or goes on from the newest checkpoint; returns the directory `config.out`.

    There `draft/` is what SGLang and `draft.path` take, and `summary.json` has the accept length on what was held out,
    before and after. Ctrl-C ends it after the step at hand and saves, or while it samples keeps the responses that have
    ended; a second one ends it at once. Raises `ValueError` in one sentence for whatever cannot work.
    """
    console = console or Console()
    out = Path(config.out)
    if not (config.draft.enabled and config.draft.train):
        which = "train" if config.draft.enabled else "enabled"
        raise ValueError(f"draft train trains a draft, and draft.{which} is false")
    rundir.check_out(out)
    with interruptible() as interrupted, logged(out):
        torch.manual_seed(config.seed)
        saved = _saved(config, out)
        loaded = models.load(config.model)
        check_context(context_tokens(config), loaded.model)
        draft = given_draft(config, loaded)
        check_written(loaded, FAMILIES[config.draft.fresh_family] if draft is None else draft.spec)
        lessons = _lessons(config, loaded, out, interrupted, console)
        if lessons is None:
            console.print(f"Interrupted; the responses are kept in {out}, and the same command goes on.")
            return out
        training = Training(config, loaded, draft, lessons, saved)
        if not training.run(interrupted, console):
            console.print(f"Interrupted; step {training.step} is saved in {out}, and the same command goes on.")
            return out
        summary = training.finish()
    console.print(table(summary, config))
    return out


class Training:
    """A draft on its way through the responses."""

    def __init__(
        self,
        config: RunConfig,
        loaded: models.Loaded,
        draft: DraftHead | None,
        lessons: Sequence[Lesson],
        saved: checkpoint.Checkpoint | None,
    ) -> None:
        """At its start, with `draft` or a fresh one, or where `saved` stood.

        Raises `ValueError` if there is nothing to learn or to measure on, or `saved` is of other data.
        """
        self.config = config
        self.out = Path(config.out)
        self._tokenizer = loaded.tokenizer
        self._seen, held_out = split(lessons, config.offline.held_out, config.seed)
        self._orders: dict[int, list[int]] = {}
        self._held_out = self._pack(held_out, loaded.device)
        offline = config.offline
        self.steps = offline.steps or math.ceil(offline.epochs * len(self._seen) / offline.batch)
        self._fingerprint = _fingerprint(self._seen, held_out)
        self._sizes = {"responses": len(self._seen), "responses_held_out": len(held_out)}
        if draft is None:
            draft = first_draft(config, loaded, self._seen, None if saved is None else saved.tensors)
        self.trainer = TorchTrainer(loaded.model, draft, config, loaded.device, loaded.dtype, policy=False)
        # again after a resume: depth, rule and temperature may be others than they were
        self.before = self.estimate()
        if not self.before.verify_steps:
            raise ValueError("none of the responses held out has two tokens, so there is nothing to estimate on")
        self.step, self._time_s = 0, 0.0
        if saved is not None:
            if saved.values["data"] != self._fingerprint:
                raise ValueError(
                    f"the data has changed since the checkpoint in {self.out} (other responses, tokenizer, limits or "
                    "share held out): restore it, or choose another `out`"
                )
            self.trainer.load_state(saved.tensors, saved.values["trainer"])
            self.step, self._time_s = saved.step, saved.values["time_s"]
        elif draft.fresh:
            self.trainer.fit_draft(self._pack(first(self._seen, FIT_TOKENS * draft.width), loaded.device))

    def estimate(self) -> SpecEstimate:
        """What serving would have needed for the responses held out, with the draft as it is now."""
        return self.trainer.estimate_draft(self._held_out).acceptance["cotrained"]

    def run(self, interrupted: Callable[[], bool], console: Console) -> bool:
        """Trains to the last step, with a line in `metrics.jsonl` for each; whether it got there."""
        config, trainer = self.config, self.trainer
        assert trainer.draft is not None
        begun, saved = time.perf_counter() - self._time_s, self.step
        stepping, whole = False, trainer.draft.version
        with (
            LiveTable(steps=self.steps, done=self.step, console=console) as live,
            Tracker(self.out, config.tracking, dump(config), self.step) as tracker,
        ):
            if self.step < self.steps:
                (self.out / "summary.json").unlink(missing_ok=True)
            try:
                while self.step < self.steps and not interrupted():
                    live.phase("training")
                    batches = self._pack(self._responses(self.step), trainer.device)
                    started, stepping = time.perf_counter(), True
                    terms = trainer.train_draft(batches, lr_scale=1 - self.step / self.steps)
                    ended = time.perf_counter()
                    self.step, self._time_s = self.step + 1, ended - begun
                    stepping, whole = False, trainer.draft.version
                    report = StepReport(step=self.step, metrics=_metrics(terms, ended - begun, ended - started))
                    tracker.write(report)
                    live.update(report)
                    if due(config, self.step, EVERY):
                        saved = self.step
                        self.save()
            finally:
                # also after an error, unless it came halfway through the optimizer's step
                halfway = stepping and isinstance(sys.exception(), KeyboardInterrupt)
                if self.step > saved and whole == trainer.draft.version and not halfway:
                    live.phase("saving")
                    self.save()
        return self.step >= self.steps

    def save(self) -> Path:
        """Writes the checkpoint of the step at hand: the draft and its optimizer, not the model."""
        trainer, keep = self.trainer, self.config.checkpoint.keep
        values = {"trainer": trainer.state_values(), "data": self._fingerprint, "time_s": self._time_s}
        return checkpoint.save(self.out, self.step, trainer.state_tensors(), values, keep=keep)

    def finish(self) -> dict[str, Any]:
        """Writes the draft's folder and `summary.json`; the latter's content."""
        after = self.estimate()
        assert self.trainer.draft is not None
        draft = self.trainer.draft.draft
        export(draft, self.out / "draft", dtype=self.trainer.dtype, tokenizer=self._tokenizer)
        summary = {
            "steps": self.step,
            **self._sizes,
            "family": draft.spec.family,
            "num_steps": self.config.draft.num_steps,
            "rule": self.config.rollout.rule,
            "temperature": self.config.rollout.temperature,
            "accept_length_before": self.before.accept_length,
            "accept_length_after": after.accept_length,
            "verify_steps_before": self.before.verify_steps,
            "verify_steps_after": after.verify_steps,
            "seconds": self._time_s,
        }
        write_summary(self.out, summary)
        return summary

    def _responses(self, step: int) -> list[Sample]:
        """Those of the step after `step`: each pass over all of them is in an order of its own."""
        count, batch = len(self._seen), self.config.offline.batch
        places = [divmod(i, count) for i in range(step * batch, (step + 1) * batch)]
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch, _ in places}
        return [self._seen[self._orders[epoch][at]] for epoch, at in places]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._seen)))
        random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
        return order

    def _pack(self, samples: Sequence[Sample], device: torch.device) -> list[PackedBatch]:
        (batches,) = pack(
            samples,
            [0.0] * len(samples),
            token_budget=self.config.train.token_budget,
            aggregation="token",
            max_new_tokens=self.config.rollout.max_new_tokens,
            minibatches=1,
            device=device,
        )
        return batches


def table(summary: dict[str, Any], config: RunConfig) -> Table:
    """The outcome for a terminal."""
    shown = Table(box=None, pad_edge=False, show_header=False)
    how = f"{config.draft.num_steps} drafted, rule {summary['rule']}, temperature {summary['temperature']:g}"
    shown.add_row("held out", f"{summary['responses_held_out']} responses; {how}")
    shown.add_row("accept length before", f"{summary['accept_length_before']:.3f} (estimated)")
    shown.add_row("accept length after", f"{summary['accept_length_after']:.3f} (estimated)")
    shown.add_row("draft", f"{Path(config.out) / 'draft'}")
    return shown


def _saved(config: RunConfig, out: Path) -> checkpoint.Checkpoint | None:
    if not config.checkpoint.resume and checkpoint.steps(out):
        raise ValueError(f"{out} holds checkpoints of an earlier run; set checkpoint.resume, or choose another `out`")
    saved = checkpoint.load_latest(out)
    if saved is not None and "data" not in saved.values:
        raise ValueError(f"{out} holds checkpoints of `miles-spec train`; choose another `out`")
    return saved


def _lessons(
    config: RunConfig, loaded: models.Loaded, out: Path, interrupted: Callable[[], bool], console: Console
) -> list[Lesson] | None:
    """The responses, from the data or from the model; None if they were interrupted."""
    if config.offline.response_column:
        return given(config, loaded)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("sampling responses", total=None)

        def progress(done: int, total: int) -> bool:
            bar.update(task, completed=done, total=total)
            return interrupted()

        lessons = sampled(config, loaded, out / "responses.jsonl", lambda: _engine(config, loaded, out), progress)
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # what the engine had
    return lessons


@contextmanager
def _engine(config: RunConfig, loaded: models.Loaded, out: Path) -> Iterator[Engine]:
    """The run's engine with the model and without a draft; it is gone at the end."""
    max_context = context_tokens(config)
    if config.rollout.engine == "embedded":
        yield embedded(config, loaded, max_context)
    else:
        plain = replace(config, draft=replace(config.draft, enabled=False))
        serving = Serving(plain, loaded, out / "serve", max_context, lambda: untrained(loaded))
        try:
            serving.start()
            untrained(loaded).push(serving.syncer, serving.fleet.members(), self_test=True)
            yield serving.fleet
        finally:
            serving.stop()


def _fingerprint(*parts: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps([[s.prompt.tokens, s.completion.tokens] for s in part]).encode())
    return digest.hexdigest()


def _metrics(terms: LossTerms, time_s: float, wall_s: float) -> dict[str, Any]:
    """One line of `metrics.jsonl`, under the names of a run's."""
    metrics: dict[str, Any] = {
        "time_s": time_s,
        "entropy": terms.entropy,
        "seconds_train": wall_s - terms.draft_seconds,
        "seconds_draft": terms.draft_seconds,
    }
    if terms.draft_by_depth:  # else no response of the step had two tokens
        metrics |= {
            "draft_loss": terms.draft,
            "draft_loss_by_depth": list(terms.draft_by_depth),
            "draft_grad_norm": terms.draft_grad_norm,
        }
    if (estimate := terms.acceptance.get("cotrained")) is not None:
        metrics |= {
            "accept_length_cotrained": estimate.accept_length,
            "accepted_tokens_cotrained": estimate.accepted,
            "verify_steps_cotrained": estimate.verify_steps,
        }
    return metrics
