"""Does speculation pay here: the same requests without a draft and with each of several.

Invariant: all modes decode the same requests with the same seeds on the same device in one run, turn by turn, so that
what else the machine does falls on all alike; tokens are counted, not assumed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

from miles_spec.draft.modules import DraftHead
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.engine import Engine
from miles_spec.types import Completion, Request, SpecCounts

PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One mode at one batch size."""

    mode: str
    batch: int
    """Sequences decoded together."""
    tokens: int
    """Response tokens of one turn."""
    tokens_per_s: float
    """Median over turns, prefill included."""
    tokens_per_s_turns: tuple[float, ...]
    accept_length: float | None
    """Pooled; None without a draft."""
    speedup: float
    """`tokens_per_s` over that of `plain` at the same batch size."""
    same_responses: float
    """Share of responses equal to those of `plain`, token by token. On the embedded engine 1 under the rules `greedy`
    and `target`, but for floating-point ties; under `rejection`, and where servers sample, only the distribution is the
    same."""


def advice(rows: Sequence[Row], *, served: bool = False) -> str:
    """Up to which of the batch sizes the co-trained draft paid, and the setting for it; `served` by SGLang or not."""
    speedups = sorted((row.batch, row.speedup) for row in rows if row.mode == "cotrained")
    paid = [batch for batch, _ in takewhile(lambda size: size[1] > 1, speedups)]
    if len(paid) == len(speedups):
        return "The draft pays at every size that was timed."
    if not paid:
        return "The draft does not pay even at the smallest size that was timed: train it longer, or go without."
    found = f"The draft pays up to {paid[-1]} sequences together: draft.max_batch = {paid[-1]} goes without it beyond."
    if not served:
        return found
    return f"{found} There a server's steps cost more than those of one that has no draft: time them with that setting."


def compare(
    modes: Mapping[str, Callable[[], Engine]],
    requests: Sequence[Request],
    *,
    batches: Sequence[int],
    turns: int = 3,
    least: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Times requests in every mode, of which `plain` is one, at every batch size, `turns` times.

    A mode is a function that returns the engine, ready to decode in that mode. At batch size `b` the first
    `max(least, 2 * b)` of `requests` are decoded, at most `b` at a time.
    """
    rows: list[Row] = []
    done, total = 0, len(batches) * turns * len(modes)
    for batch in batches:
        asked = requests[: max(least, 2 * batch)]
        warm = [replace(r, sampling=replace(r.sampling, max_new_tokens=2)) for r in asked[:batch]]
        rates: dict[str, list[float]] = {m: [] for m in modes}
        outputs: dict[str, list[Completion]] = {}
        for _ in range(turns):
            for mode, ready in modes.items():
                engine = ready()
                most = engine.max_running
                engine.max_running = batch
                try:
                    engine.generate(warm)  # buffers are made and caches warm
                    start = time.perf_counter()
                    outputs[mode] = engine.generate(asked)
                    seconds = time.perf_counter() - start
                finally:
                    engine.max_running = most
                rates[mode].append(sum(len(c.tokens) for c in outputs[mode]) / seconds)
                done += 1
                if progress is not None:
                    progress(done, total)
        plain = statistics.median(rates[PLAIN])
        for mode in modes:
            counts = sum((c.spec for c in outputs[mode]), SpecCounts())
            same = sum(a.tokens == b.tokens for a, b in zip(outputs[mode], outputs[PLAIN], strict=True))
            rows.append(
                Row(
                    mode=mode,
                    batch=batch,
                    tokens=sum(len(c.tokens) for c in outputs[mode]),
                    tokens_per_s=statistics.median(rates[mode]),
                    tokens_per_s_turns=tuple(rates[mode]),
                    accept_length=counts.accept_length if counts.verify_steps else None,
                    speedup=statistics.median(rates[mode]) / plain,
                    same_responses=same / len(asked),
                )
            )
    return rows


@contextmanager
def embedded_modes(
    engine: EmbeddedEngine, drafts: Mapping[str, DraftHead]
) -> Iterator[Mapping[str, Callable[[], Engine]]]:
    """`plain` and one mode for each of `drafts`, on one engine, at the depth it is set to.

    The engine is left at that depth, with the last draft attached.
    """
    depth = engine.draft_depth

    def ready(draft: DraftHead | None) -> Engine:
        if draft is not None:
            engine.attach_draft(draft)
        engine.set_draft_depth(0 if draft is None else depth)
        return engine

    try:
        yield {PLAIN: partial(ready, None)} | {name: partial(ready, draft) for name, draft in drafts.items()}
    finally:
        engine.set_draft_depth(depth)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON values."""
    return [{**asdict(row), "tokens_per_s_turns": list(row.tokens_per_s_turns)} for row in rows]
