"""`miles-spec bench rollout`: a finished run's own policy and drafts, timed without speculation and with each draft.

Invariant: it changes nothing in the run's directory but `bench.json` and the rows in `summary.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from miles_spec import checkpoint
from miles_spec.assemble import assemble, in_one_process
from miles_spec.config import RunConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.live import LiveTable
from miles_spec.provenance import check, write_result
from miles_spec.requests import context_tokens, sampling, seed_of
from miles_spec.rollout.bench import PLAIN, Row, advice, as_json, compare, embedded_modes
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.engine import Engine
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import with_underscores
from miles_spec.run import Run
from miles_spec.serve import Hosted, Reached, load
from miles_spec.settings import changes
from miles_spec.tracking import write_atomically, write_summary
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import Prompt, Request

BATCHES = (1, 2, 4, 8)
SERVED_BATCHES = (1, 8, 32, 128)
TURNS = 3
REQUESTS = 16
SHARE_OF_MEMORY = 0.3
"""Of what is free, for each of two servers on one GPU."""

TIMED = tuple(f"rollout.{name}" for name in ("verify", "temperature", "top_p", "top_k", "max_new_tokens", "stop"))
TIMED += ("draft.num_steps", "model.")
"""Settings that the comparison depends on."""

Modes = Mapping[str, Callable[[], Engine]]


def rollout(
    config: RunConfig,
    result: Path | None,
    *,
    batches: Sequence[int] = (),
    turns: int = TURNS,
    requests: int = REQUESTS,
) -> list[Row]:
    """Prints the comparison for the run that `config` describes, and writes it into the run's directory.

    Without `batches`, `BATCHES` are timed, with SGLang servers `SERVED_BATCHES`. With `result` it is also written
    there, as a benchmark's result. Raises `ValueError` if the run has no checkpoint to take the weights from, or no
    draft, and for numbers below 1.
    """
    if min((turns, requests, *batches)) < 1:
        raise ValueError("batches, turns and requests have to be at least 1")
    out = Path(config.out)
    if not config.draft.enabled:
        raise ValueError("bench rollout compares drafts, and draft.enabled is false")
    if not checkpoint.steps(out):
        raise ValueError(f"{out} has no checkpoint to take policy and drafts from; run `miles-spec train` first")
    served = config.rollout.engine == "sglang"
    if config.rollout.urls:
        raise ValueError("bench rollout starts servers of its own, with and without a draft; take rollout.urls out")
    other = changes(config, out / "config.toml", *TIMED)
    batches = batches or (SERVED_BATCHES if served else BATCHES)
    config = replace(config, draft=replace(config.draft, adaptive=False))  # each size is timed at the full depth
    if served:
        config = _with_two_servers(config, max(batches))
    console = Console()
    with ExitStack() as stack:
        if served:
            reached = load(config, stays=True)
            source = reached.source
            modes = stack.enter_context(_served_modes(config, reached))
        else:
            with LiveTable(steps=config.steps, console=console) as live:
                run = assemble(in_one_process(config), live)
            stack.callback(run.stop)
            source = run.source
            modes = stack.enter_context(_embedded_modes(run))
        asked = _requests(config, source.take(max(requests, 2 * max(batches))))
        bar = stack.enter_context(Progress(console=console, transient=True))
        task = bar.add_task("timing rollouts", total=None)
        rows = compare(
            modes,
            asked,
            batches=batches,
            turns=turns,
            least=requests,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if other:
        console.print(f"Timed with settings that are not the run's: {'; '.join(other)}.", highlight=False)
    console.print(table(rows))
    if not config.draft.max_batch:
        console.print(advice(rows, served=served))
    write_atomically(out / "bench.json", json.dumps(as_json(rows), indent=1) + "\n")
    summary_path = out / "summary.json"
    if summary_path.exists():
        write_summary(out, {**json.loads(summary_path.read_text()), "bench": as_json(rows)})
    if result is not None:
        speed = {r.batch: r.speedup for r in rows if r.mode == "cotrained"}
        checks = [check(f"co-trained over no speculation at batch {b}", s, "above 1", s > 1) for b, s in speed.items()]
        write_result(result, "rollout", as_json(rows), checks, model=config.model.path, depth=config.draft.num_steps)
    return rows


def _with_two_servers(config: RunConfig, batch: int) -> RunConfig:
    """Room for `batch` sequences, and for a second server beside the first."""
    sglang = config.sglang
    if "mem_fraction_static" not in with_underscores(sglang):
        sglang = {**sglang, "mem_fraction_static": SHARE_OF_MEMORY}
    rollout = replace(config.rollout, max_running=max(config.rollout.max_running, batch))
    return replace(config, rollout=rollout, fleet=replace(config.fleet, release="nothing"), sglang=sglang)


def _requests(config: RunConfig, prompts: Sequence[Prompt]) -> list[Request]:
    return [
        Request(id=str(i), tokens=p.tokens, sampling=sampling(config), seed=seed_of(config.seed, "bench", i))
        for i, p in enumerate(prompts)
    ]


def _embedded_modes(run: Run) -> AbstractContextManager[Modes]:
    assert isinstance(run.engine, EmbeddedEngine) and isinstance(run.trainer, TorchTrainer)
    draft = run.trainer.draft
    assert draft is not None and draft.frozen is not None
    return embedded_modes(run.engine, {"frozen": draft.frozen, "cotrained": draft.draft})


@contextmanager
def _served_modes(config: RunConfig, reached: Reached) -> Iterator[Modes]:
    """Servers without a draft beside others, into which each draft is pushed in its turn.

    All are up at the same time, so that modes are timed turn by turn; those that wait cost memory and no time.
    """
    policy, folder, context, keys = reached.policy, Path(config.out), context_tokens(config), Keys.random()
    assert reached.frozen is not None and policy.draft is not None
    alone = replace(config, draft=replace(config.draft, enabled=False))
    plain = Hosted(alone, replace(policy, draft=None, draft_version=None), folder / "serve-plain", context, keys)
    drafted = Hosted(config, policy, folder / "serve", context, keys)

    def serving(draft: DraftHead) -> Engine:
        drafted.weights = replace(policy, draft=draft).weights
        drafted.push(drafted.members())
        return drafted.fleet

    drafts = {"frozen": reached.frozen, "cotrained": policy.draft}
    with ExitStack() as stack:
        for hosted in (plain, drafted):  # one after the other: each takes its share of the memory that it finds free
            stack.callback(hosted.stop)
            hosted.start()
            hosted.push(hosted.members(), self_test=True)
        yield {PLAIN: lambda: plain.fleet} | {name: partial(serving, draft) for name, draft in drafts.items()}


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("batch", "draft", "tokens/s", "speed-up", "accept length", "same responses"):
        shown.add_column(head, justify="right")
    for row in rows:
        shown.add_row(
            str(row.batch),
            "none" if row.mode == PLAIN else row.mode,
            f"{row.tokens_per_s:.1f}",
            f"{row.speedup:.2f}x",
            "-" if row.accept_length is None else f"{row.accept_length:.2f}",
            f"{row.same_responses:.0%}",
        )
    return shown
