"""Does speculation pay here: the same requests through one engine, without a draft and with each of several.

Invariant: all modes decode the same requests with the same seeds on the same engine in one run, turn by turn, so that
what else the machine does falls on all alike; tokens are counted, not assumed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from miles_spec.draft.modules import DraftHead
from miles_spec.rollout.embedded import EmbeddedEngine
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
    """Share of responses equal to those of `plain`, token by token: 1 under the rules `greedy` and `target`, but for
    floating-point ties; under `rejection` only the distribution is the same."""


def compare(
    engine: EmbeddedEngine,
    drafts: Mapping[str, DraftHead],
    requests: Sequence[Request],
    *,
    batches: Sequence[int],
    turns: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Times `requests` in every mode, `plain` and one for each of `drafts`, at every batch size, `turns` times.

    The engine drafts at the depth it is set to, whatever the batch size, and is left with the last draft attached.
    """
    depth, most = engine.draft_depth, engine.max_running
    modes = [PLAIN, *drafts]
    rows: list[Row] = []
    done, total = 0, len(batches) * turns * len(modes)
    try:
        for batch in batches:
            engine.max_running = batch
            rates: dict[str, list[float]] = {m: [] for m in modes}
            outputs: dict[str, list[Completion]] = {}
            for _ in range(turns):
                for mode in modes:
                    if mode in drafts:
                        engine.attach_draft(drafts[mode])
                    engine.set_draft_depth(depth if mode in drafts else 0)
                    engine.generate(requests[:batch])  # buffers are made and caches warm
                    start = time.perf_counter()
                    outputs[mode] = engine.generate(requests)
                    seconds = time.perf_counter() - start
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
                        same_responses=same / len(requests),
                    )
                )
    finally:
        engine.max_running = most
        engine.set_draft_depth(depth)
    return rows


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON values."""
    return [{**asdict(row), "tokens_per_s_turns": list(row.tokens_per_s_turns)} for row in rows]
