"""What `bench train` makes of its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from miles_spec.train_rows import STOCK, Row, checks, table, trains


def row(backend: str, depth: int, step_s: float | None, tokens: int = 8192) -> Row:
    return Row(backend=backend, tokens=tokens, depth=depth, micro_batches=2, parameters=1, flops=1.0, step_s=step_s)


def test_checks() -> None:
    rows = [row("megatron", 0, 1.0), row("megatron", 1, 1.04), row(STOCK, 0, 0.9), row(STOCK, 1, 1.0)]
    share, over = checks(rows)
    assert share["value"] == pytest.approx(0.04 / 1.04) and share["holds"]
    assert over["value"] == pytest.approx(0.4) and over["holds"]
    slower = [rows[0], replace(rows[1], step_s=1.2), *rows[2:]]
    assert [c["holds"] for c in checks(slower)] == [False, False]
    assert checks([row("torch", 0, None), row("torch", 1, 1.0)]) == []
    assert checks([row("torch", 0, 1.0), row("torch", 1, 1.1, tokens=32768)]) == []
    two = [replace(row(backend, 0, None), grad_norm=norm) for backend, norm in (("torch", 1.0), ("megatron", 1.06))]
    assert [(c["value"], c["holds"]) for c in checks(two)] == [(pytest.approx(0.06), False)]
    assert checks([two[0], replace(two[1], micro_batches=4)]) == []
    less = checks([*rows, replace(rows[1], share=0.5, step_s=1.02)])
    assert [c["value"] for c in less[:2]] == [share["value"], over["value"]] and len(less) == 3
    assert less[2]["value"] == pytest.approx(0.02 / 1.02) and "0.5 of the micro-batches" in less[2]["what"]
    (*_, reduced) = checks([*rows, replace(rows[1], draft_vocab=32768, step_s=1.06)])
    assert reduced["value"] == pytest.approx(0.06 / 1.06) and reduced["what"].endswith("drafting over 32768 tokens")


def test_table_shows_what_was_not_measured() -> None:
    console = Console(width=150)
    with console.capture() as shown:
        console.print(table([replace(row("torch", 0, None), note="out of memory")]))
    assert " ".join(shown.get().split()).endswith("policy alone 2 x 8192 - - - - - out of memory")


def test_a_row_says_what_trains() -> None:
    assert trains(row("torch", 0, None)) == "policy alone"
    assert trains(row(STOCK, 1, None)) == "with MTP, depth 1"
    less = replace(row("torch", 3, None), share=0.25, draft_vocab=4096)
    assert trains(less) == "with draft, depth 3, share 0.25, 4096 tokens"
