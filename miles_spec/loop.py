"""The loop: sample, score, pack, step, sync, report; and what a run does when it is interrupted or fails.

Invariant: a checkpoint holds the state between two steps, never within one, so `n` steps are `k` steps, a resume and
`n - k` steps, bit for bit.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from miles_spec import rundir
from miles_spec.assemble import assemble, follow, join
from miles_spec.config import RunConfig
from miles_spec.live import LiveTable
from miles_spec.metrics import host_gib_peak, summary, sync_metrics, training_metrics
from miles_spec.run import Run
from miles_spec.sampling import Groups, sample
from miles_spec.settings import changes, dump
from miles_spec.sync.session import TargetSyncError
from miles_spec.tracking import Tracker, write_summary
from miles_spec.train.advantages import advantages
from miles_spec.train.memory import TokenBudget
from miles_spec.train.packing import pack
from miles_spec.types import LossTerms, PackedBatch, Receipt, StepReport

EVERY = 20
"""Steps between checkpoints, unless `checkpoint.every` says otherwise."""


def train(config: RunConfig) -> Path:
    """Runs `config` to its last step, or on from its newest checkpoint; returns the run's directory.

    Ctrl-C or SIGTERM ends the run after the step at hand and saves; a second one ends it at once. A step that fails
    before it has changed a weight loses nothing: the state after the last whole step is saved, then the error is
    raised. One that has changed some, with several minibatches or updates of the draft, leaves the last checkpoint
    (`checkpoint.every`).

    In a run of several processes this is what rank 0 does. The others follow it until it ends.
    """
    ranks = join(config)
    if ranks is not None and ranks.rank:
        follow(config, ranks)
        return Path(config.out)
    with LiveTable(steps=config.steps) as live, interruptible() as interrupted, ExitStack() as stack:
        if ranks is not None:
            stack.callback(ranks.end)
        stack.enter_context(logged(Path(config.out)))
        run = assemble(config, live, ranks, interrupted)
        stack.callback(run.stop)
        begun, step, cursor = time.perf_counter() - run.time_s, run.step, run.source.state()
        saved, saving_s = step, 0.0
        budget = TokenBudget(config.train, run.halved_budget)
        stepping, whole = False, (run.trainer.version, run.trainer.draft_version)
        if run.step and step < config.steps:
            now = f", with {'; '.join(other)}" if (other := changes(config, run.out / "config.toml")) else ""
            live.say(f"Going on from step {step} in {run.out}{now}.")
        with Tracker(run.out, config.tracking, dump(config), run.step) as tracker:
            if step < config.steps:
                _forget_results(run.out)
            for number, loss in enumerate(run.warmup_losses, 1):
                tracker.warmup(number, {"draft_loss": loss})
            try:
                while step < config.steps and not interrupted():
                    pushed = time.perf_counter()
                    run.sleep()
                    slept = time.perf_counter()
                    adapted = run.adapt()
                    groups = sample(run, step + 1, live)
                    sampled = time.perf_counter()
                    run.release()
                    beside_training = run.gpu_gib("others")
                    live.phase("training")
                    started, stepping = time.perf_counter(), True
                    terms = optimize(run, groups, budget)
                    trained = time.perf_counter()
                    live.phase("sync")
                    run.wake()
                    beside_rollouts = run.gpu_gib("trainer", "free")
                    awake = time.perf_counter()
                    receipts, refused = _push(run)
                    synced = time.perf_counter()
                    step, cursor = step + 1, run.source.state()
                    stepping, whole = False, (run.trainer.version, run.trainer.draft_version)
                    metrics = {
                        "time_s": synced - begun,
                        **groups.metrics,
                        **adapted,
                        **training_metrics(terms, trained - started, _counted(run, groups.metrics)),
                        **sync_metrics(receipts, synced - awake),
                        "seconds_memory": slept - pushed + started - sampled + awake - trained,
                        "seconds_checkpoint": saving_s,
                        "token_budget": budget.tokens,
                        "host_gib_peak": host_gib_peak(),
                        **beside_training,
                        **beside_rollouts,
                    }
                    if run.controller is not None and "accept_length_cotrained" in metrics:
                        run.controller.accept_length = metrics["accept_length_cotrained"]
                    shown = tuple(groups.samples[: config.tracking.samples])
                    report = StepReport(step=step, metrics=metrics, samples=shown)
                    # before the checkpoint: on resuming, a line too many is dropped, but one too few stays missing
                    tracker.write(report, [run.pieces(s) for s in shown])
                    live.update(report)
                    if refused is not None:
                        raise refused
                    saving_s = 0.0
                    if due(config, step, EVERY):
                        live.phase("saving")
                        saved = step
                        moved = run.trainer.asleep
                        if moved:
                            run.release()
                        run.save(step, cursor, time.perf_counter() - begun, budget.halved)
                        if moved:
                            run.wake()
                            _, refused = _push(run)
                            if refused is not None:
                                raise refused
                        saving_s = time.perf_counter() - synced
            finally:
                # also after an error, unless it came halfway through the optimizer steps
                halfway = stepping and isinstance(sys.exception(), KeyboardInterrupt)
                untouched = whole == (run.trainer.version, run.trainer.draft_version) and not halfway
                if step > saved and untouched:
                    live.phase("saving")
                    if run.trainer.asleep:
                        run.release()
                    run.save(step, cursor, time.perf_counter() - begun, budget.halved)
                elif step > saved:
                    kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was written before"
                    live.say(f"The step that was cut off may have changed weights; {kept}.")
    if step:
        written = rundir.read(run.out)
        write_summary(run.out, summary(written.steps, written.bench))
    if step < config.steps:
        left = f"step {step} is saved in {run.out}, and the same command goes on" if step else "nothing is saved yet"
        live.say(f"Interrupted; {left}.")
    elif step == run.step:
        live.say(f"Nothing to do: {run.out} is at step {step}; with more `steps` it goes on.")
    return run.out


def optimize(run: Run, groups: Groups, budget: TokenBudget) -> list[LossTerms]:
    """Advantages, packing, and the optimizer steps of one rollout; the loss terms of each."""
    config, rules = run.config, run.config.train
    values = advantages([[s.reward for s in group] for group in groups.groups], rules.advantage)
    minibatches = pack(
        groups.samples,
        [a for group in values for a in group],
        token_budget=budget.tokens,
        aggregation=rules.loss_aggregation,
        max_new_tokens=config.rollout.max_new_tokens,
        minibatches=rules.minibatches,
        device=run.trainer.device,
    )
    # log-probabilities of the policy before the first step, and of the reference, while neither has moved
    score = partial(_with_logprobs, run, old=len(minibatches) > 1)
    minibatches = [budget.run(score, batches) for batches in minibatches]
    return [budget.run(run.trainer.step, batches) for batches in minibatches]


def _with_logprobs(run: Run, batches: list[PackedBatch], *, old: bool) -> list[PackedBatch]:
    if old:
        scores = run.trainer.logprobs(batches)
        batches = [replace(b, old_logprobs=s) for b, s in zip(batches, scores, strict=True)]
    if run.config.train.kl_coef:
        scores = run.trainer.logprobs(batches, reference=True)
        batches = [replace(b, ref_logprobs=s) for b, s in zip(batches, scores, strict=True)]
    return batches


def _counted(run: Run, metrics: Mapping[str, Any]) -> float | None:
    """The accept length that the trainer's estimate is held against; None without a draft, and where steps of servers
    that went without it (`draft.max_batch`) are counted too."""
    mixed = run.serving is not None and run.config.draft.max_batch
    return None if mixed else metrics.get("accept_length")


def _push(run: Run) -> tuple[list[Receipt], TargetSyncError | None]:
    """Sends the weights; the receipts, and what ends the run if the target's is bad.

    It is not raised here since the trainer's step is whole: it is recorded and saved first. Servers that do not verify
    do not end the run: they generate nothing before a push to them has verified, which the next rollout tries first.
    """
    try:
        return run.push(), None
    except TargetSyncError as error:
        return list(error.receipts), error if run.serving is None else None


def _forget_results(out: Path) -> None:
    """Removes what an earlier end of the run, or an earlier run, said of weights that are about to change."""
    for name in ("summary.json", "bench.json"):
        (out / name).unlink(missing_ok=True)


def due(config: RunConfig, step: int, default: int) -> bool:
    """Whether `step` ends with a checkpoint, one of every `default` if `checkpoint.every` does not say otherwise."""
    every = default if config.checkpoint.every < 0 else config.checkpoint.every
    return bool(every) and step % every == 0


class _LogFile(logging.FileHandler):
    """Makes its folder with the first record: a run that is refused leaves nothing behind."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # the run finds out by itself that it cannot write there, and says so
        super().emit(record)


@contextmanager
def logged(out: Path) -> Iterator[None]:
    """Keeps what this package logs in `run.log`, with times; warnings go to the terminal as well."""
    logger = logging.getLogger("miles_spec")
    level = logger.level
    handlers: list[logging.Handler] = [_LogFile(out / "run.log", encoding="utf-8", delay=True)]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if not logger.hasHandlers():
        handlers.append(logging.StreamHandler())
        handlers[1].setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop, which the yielded function tells; the second is as
    always."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        asked = True
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone gets signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
