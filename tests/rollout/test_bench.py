"""The comparison of modes: the same requests in each, at the batch sizes asked for, and what it leaves behind."""

from __future__ import annotations

import statistics

import pytest
import torch

from conftest import tiny_model
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.rollout.bench import Row, advice, as_json, compare, embedded_modes
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.types import Request, Sampling


def make(**settings: object) -> tuple[EmbeddedEngine, dict[str, DraftHead], list[Request]]:
    """An engine whose target mostly repeats a token, as draft `a` does; draft `b` always proposes the same one."""
    model = tiny_model("llama", torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    drafts = {name: DraftHead.attach(model, EAGLE) for name in "ab"}
    with torch.no_grad():
        drafts["a"].fc.weight.copy_(torch.eye(32, 64))
        drafts["b"].fc.weight.zero_()
    defaults = {"depth": 2, "max_running": 5, "max_context": 64, "dtype": torch.float64}
    engine = EmbeddedEngine(model, drafts["a"], **{**defaults, **settings})  # type: ignore[arg-type]
    sampling = Sampling(temperature=0.5, max_new_tokens=12, ignore_eos=True)
    requests = [Request(id=str(i), tokens=(3 + i, 5), sampling=sampling, seed=i) for i in range(4)]
    return engine, drafts, requests


def test_rows() -> None:
    engine, drafts, requests = make()
    ticks: list[tuple[int, int]] = []
    with embedded_modes(engine, drafts) as modes:
        rows = compare(modes, requests, batches=(1, 4), turns=3, progress=lambda *tick: ticks.append(tick))
    assert [(r.batch, r.mode) for r in rows] == [(b, m) for b in (1, 4) for m in ("plain", "a", "b")]
    assert ticks == [(i, 18) for i in range(1, 19)]
    speed = {(r.batch, r.mode): r.tokens_per_s for r in rows}
    for row in rows:
        assert row.tokens == 4 * 12
        assert row.tokens_per_s == statistics.median(row.tokens_per_s_turns) and len(row.tokens_per_s_turns) == 3
        assert row.speedup == row.tokens_per_s / speed[row.batch, "plain"]
        assert row.same_responses == 1
        assert (row.accept_length is None) == (row.mode == "plain")
    # the drafts differ, and each was really served
    assert rows[1].accept_length == rows[4].accept_length > rows[2].accept_length == rows[5].accept_length
    assert as_json(rows)[0]["tokens_per_s_turns"] == list(rows[0].tokens_per_s_turns)
    assert (engine.draft_depth, engine.max_running) == (2, 5)


def test_another_sampled_response_is_seen() -> None:
    """Under `rejection` the distribution is the same and the tokens are not."""
    engine, drafts, requests = make(rule="rejection")
    with embedded_modes(engine, drafts) as modes:
        rows = compare(modes, requests, batches=(4,), turns=1)
    assert rows[0].same_responses == 1 and min(r.same_responses for r in rows[1:]) < 1


def test_the_engine_is_left_as_it_was_after_an_error() -> None:
    engine, drafts, requests = make()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), embedded_modes(engine, drafts) as modes:
        compare(modes, requests, batches=(1,), turns=1, progress=stop)
    assert (engine.draft_depth, engine.max_running) == (2, 5)


def test_more_requests_for_larger_batches() -> None:
    engine, drafts, requests = make()
    with embedded_modes(engine, drafts) as modes:
        rows = compare(modes, requests, batches=(1, 2), turns=1, least=1)
    assert [r.tokens for r in rows if r.mode == "plain"] == [2 * 12, 4 * 12]


@pytest.mark.parametrize(
    ("speedups", "says"),
    [
        ({1: 1.5, 8: 1.2, 32: 1.01}, "at every size"),
        ({1: 1.0, 8: 1.2}, "not pay even at the smallest"),
        ({1: 1.5, 8: 1.2, 32: 0.9, 128: 1.1}, "up to 8 sequences together: draft.max_batch = 8"),
    ],
    ids=["all", "none", "some"],
)
def test_up_to_which_size_a_draft_pays(speedups: dict[int, float], says: str) -> None:
    def row(mode: str, batch: int, speedup: float) -> Row:
        turns = {"tokens": 1, "tokens_per_s": 1.0, "tokens_per_s_turns": (1.0,), "accept_length": None}
        return Row(mode=mode, batch=batch, speedup=speedup, same_responses=1.0, **turns)  # type: ignore[arg-type]

    sizes = reversed(speedups.items())
    rows = [row(mode, n, x) for n, speedup in sizes for mode, x in (("frozen", 0.5), ("cotrained", speedup))]
    assert says in advice(rows)
    assert ("time them" in advice(rows, served=True)) == ("draft.max_batch" in says)
