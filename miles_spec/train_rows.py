"""What `miles-spec bench train` found: its rows, the goals they are held against, and a table of them.

Invariant: a goal that a row misses is in the checks all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from miles_spec.provenance import check

STOCK = "megatron stock"
"""Megatron's own path, which comes with the backend `megatron`."""
DRAFT_SHARE, OVER_MTP, NORM = 0.05, 1.0, 0.05
"""The most that a draft of depth 1 takes of a step, what its time is below in units of Megatron's MTP, and the most
that gradients' norms differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is timed."""

    backend: str
    """Of `BACKENDS`, or `STOCK`."""
    tokens: int
    """Of a micro-batch."""
    depth: int
    """Of the draft, or of Megatron's MTP; 0 for a policy alone."""
    share: float = 1.0
    """`draft.share`."""
    draft_vocab: int = 0
    """`draft.vocab_size`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case; None where it was not measured, or cannot be."""

    backend: str
    tokens: int
    depth: int
    micro_batches: int
    """Of a step, over all ranks."""
    parameters: int
    """Of the policy."""
    flops: float
    """Model FLOPs of a step, over all ranks."""
    share: float = 1.0
    """`draft.share`."""
    draft_vocab: int = 0
    """`draft.vocab_size`."""
    step_s: float | None = None
    """Median."""
    turns: tuple[float, ...] = ()
    """Seconds of each step."""
    tokens_per_s: float | None = None
    """Of all ranks together."""
    utilisation: float | None = None
    """Model FLOP/s over the peak of all GPUs."""
    gpu_peak_bytes: int | None = None
    """Most that tensors took on any rank's GPU while it stepped."""
    host_peak_bytes: int | None = None
    """Most resident memory of any rank's process, from the making of the model on."""
    grad_norm: float | None = None
    """Of the policy, in the first step, which all trainers but Megatron's own path take from the same weights."""
    note: str = ""


def checks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The goals that these rows can be held against, met or not."""
    timed = {(r.backend, r.tokens, r.depth, r.share, r.draft_vocab): r.step_s for r in rows if r.step_s is not None}
    seconds = {(b, tokens, depth): s for (b, tokens, depth, *less), s in timed.items() if less == [1, 0]}
    norms = {(r.backend, r.tokens, r.depth, r.micro_batches): r.grad_norm for r in rows if r.grad_norm is not None}
    found = []
    for (backend, tokens, depth, count), norm in norms.items():
        expected = norms.get(("torch", tokens, depth, count))
        if backend != "torch" and expected is not None:
            off = abs(norm / expected - 1)
            what = f"{tokens} tokens, depth {depth}: norm of the first gradient, Megatron over torch, less 1"
            found.append(check(what, off, f"at most {NORM:g}", off <= NORM))
    for (backend, tokens, depth, share, vocab), with_draft in timed.items():
        alone = seconds.get((backend, tokens, 0))
        if backend == STOCK or depth == 0 or alone is None:
            continue
        more = with_draft - alone
        if depth == 1:
            took, goal = more / with_draft, f"at most {DRAFT_SHARE}"
            what = f"{backend}, {tokens} tokens: the draft's share of the step at one depth"
            what += "" if share == 1 else f", learning from {share:g} of the micro-batches"
            what += f", drafting over {vocab} tokens" if vocab else ""
            found.append(check(what, took, goal, took <= DRAFT_SHARE))
        if share != 1 or vocab:
            continue
        theirs, bare = seconds.get((STOCK, tokens, depth)), seconds.get((STOCK, tokens, 0))
        if backend == "megatron" and theirs is not None and bare is not None and theirs > bare:
            ratio, goal = more / (theirs - bare), f"below {OVER_MTP:g}"
            what = f"{tokens} tokens, depth {depth}: seconds of the draft trained here over Megatron's own MTP path"
            found.append(check(what, ratio, goal, ratio < OVER_MTP))
    return found


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step_s": ("s", lambda x: f"{x:.4f}"),
    "tokens_per_s": ("tokens/s", lambda x: f"{x:,.0f}"),
    "utilisation": ("of the peak", lambda x: f"{x:.1%}"),
    "gpu_peak_bytes": ("GPU, GB", lambda x: f"{x / 1e9:.2f}"),
    "host_peak_bytes": ("host, GB", lambda x: f"{x / 1e9:.2f}"),
}


def table(rows: Sequence[Row]) -> Table:
    """Rows for a terminal."""
    shown = Table(box=None, header_style="bold")
    for head in ("trained by", "what"):
        shown.add_column(head, min_width=16)
    shown.add_column("micro-batches", justify="right")
    for head, _ in COLUMNS.values():
        shown.add_column(head, justify="right", min_width=11)
    shown.add_column("")
    for row in rows:
        values = [(getattr(row, name), text) for name, (_, text) in COLUMNS.items()]
        shown.add_row(
            row.backend,
            trains(row),
            f"{row.micro_batches} x {row.tokens}",
            *("-" if v is None else text(v) for v, text in values),
            row.note,
        )
    return shown


def trains(case: Case | Row) -> str:
    """What trains in it."""
    if not case.depth:
        return "policy alone"
    what = f"with {'MTP' if case.backend == STOCK else 'draft'}, depth {case.depth}"
    what += "" if case.share == 1 else f", share {case.share:g}"
    return what + (f", {case.draft_vocab} tokens" if case.draft_vocab else "")
