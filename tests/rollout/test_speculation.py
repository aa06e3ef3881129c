"""The cost model against a simulation that takes one step at a time, and its calibration on a tiny engine."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import tiny_model
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.rollout import speculation
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.speculation import Controller, CostModel, calibrate, time_blocks, tokens_per_block
from miles_spec.types import EngineTimes, Request, Sampling


def simulated(cost: CostModel, lengths: list[int], rows: int) -> float:
    """Step by step: rows that are free take the next response, then every row decodes one token."""
    waiting, running, seconds = deque(lengths), [], 0.0
    while waiting or running:
        while waiting and len(running) < rows:
            left = waiting.popleft() - 1  # its first token comes from prefill
            if left > 0:
                running.append(left)
        if running:
            seconds += cost.step_seconds(len(running))
        running = [left - 1 for left in running if left > 1]
    return seconds


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(sorted)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 8), sizes, st.randoms())
def test_decode_seconds(lengths: list[int], rows: int, batches: list[int], random: object) -> None:
    cost = CostModel(step_s=tuple((b, random.uniform(0.1, 2.0)) for b in batches))  # type: ignore[attr-defined]
    expected = simulated(cost, lengths, rows)
    assert cost.decode_seconds(lengths, rows) == pytest.approx(expected, rel=1e-9)


def test_step_seconds_between_and_beyond() -> None:
    cost = CostModel(step_s=((2, 1.0), (4, 2.0), (8, 3.0)))
    assert [cost.step_seconds(b) for b in (1, 2, 3, 4, 6, 8, 16)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 6.0]


def test_fitted_predicts_what_it_was_fitted_to() -> None:
    cost = CostModel(step_s=((1, 0.5), (2, 0.8)), start_s=0.25)
    fitted = cost.fitted(9.0, [4, 2, 3], 2)
    assert fitted.decode_seconds([4, 2, 3], 2) == pytest.approx(9.0)
    factor = 9.0 / cost.decode_seconds([4, 2, 3], 2)
    assert fitted.step_seconds(2) == pytest.approx(0.8 * factor) and fitted.start_s == pytest.approx(0.25 * factor)
    assert fitted.checked(9.0, [4, 2, 3], 2).error == pytest.approx(0.0)
    assert cost.fitted(2.0, [1, 1], 1) == cost


def test_checked() -> None:
    cost = CostModel(step_s=((1, 0.5),))
    assert math.isnan(cost.error)
    assert cost.checked(2.0, [4, 2], 1).error == pytest.approx((3 + 1) * 0.5 / 2.0 - 1)
    # nothing was decoded, so nothing can be said
    assert math.isnan(cost.checked(2.0, [1, 1], 1).error)


def engine(**overrides: int) -> EmbeddedEngine:
    settings = {"max_running": 6, "max_context": 32, **overrides}
    return EmbeddedEngine(tiny_model(), None, eos_ids=tuple(range(61)), **settings)  # type: ignore[arg-type]


def test_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()
    asked: list[tuple[int, int]] = []
    generate = made.generate

    def record(requests: list[Request]) -> object:
        asked.append((len(requests), requests[0].sampling.max_new_tokens))
        return generate(requests)

    monkeypatch.setattr(made, "generate", record)
    times = iter([EngineTimes(verify_s=s, other_s=0.6) for s in range(100)])
    monkeypatch.setattr(made, "take_times", lambda: next(times))
    cost = calibrate(made, (5,) * 50)
    # one turn to warm up; a prompt too long for the context is cut; end-of-sequence tokens do not end it
    assert asked == [(size, 7) for _ in range(4) for size in (1, 2, 4, 6)]
    # two readings a call, of which the second counts: that of the third of four turns is the median, over six steps
    assert cost.step_s == tuple((size, pytest.approx((17 + 2 * i + 0.6) / 6)) for i, size in enumerate((1, 2, 4, 6)))
    assert math.isnan(cost.error)


@pytest.mark.parametrize("context", [3, 4, 7])
def test_calibrate_in_a_context_with_no_room(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(max_context=context, max_running=1)
    monkeypatch.setattr(made, "take_times", lambda: EngineTimes(verify_s=6.0))
    cost = calibrate(made, (5, 6))
    assert cost.step_s == ((1, 6.0 / min(speculation._STEPS, context - 2)),)


def test_calibrate_where_nothing_is_ever_decoded() -> None:
    assert calibrate(engine(max_context=2), (5,)).decode_seconds([1, 1], 2) == 0


def test_calibrate_leaves_the_engine_as_it_was() -> None:
    made = engine()
    calibrate(made, (5, 6))
    assert made.draft_depth == 0 and made.take_times().tokens == 0


def test_calibrate_a_served_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells only whole calls: a step is the difference of two, and the start is a part of the model."""
    made = engine(max_running=2)
    last: list[tuple[int, int]] = []

    def generate(requests: list[Request]) -> None:
        last[:] = [(len(requests), requests[0].sampling.max_new_tokens)]

    def take_times() -> EngineTimes:
        size, tokens = last[0] if last else (0, 0)
        return EngineTimes(other_s=0.5 * size + (0.1 + 0.01 * size) * (tokens - 1))

    monkeypatch.setattr(made, "generate", generate)
    monkeypatch.setattr(made, "take_times", take_times)
    cost = calibrate(made, (5, 6), served=True)
    assert cost.step_s == ((1, pytest.approx(0.11)), (2, pytest.approx(0.12)))
    assert cost.start_s == pytest.approx(0.5)
    assert cost.decode_seconds([3, 1], 2) == pytest.approx(2 * 0.5 + 2 * 0.11)


def test_calibrated_on_a_real_engine() -> None:
    cost = calibrate(engine(), (5, 6, 7))
    assert [size for size, _ in cost.step_s] == [1, 2, 4, 6]
    assert all(0 < seconds < 1 for _, seconds in cost.step_s)


DEPTH, MOST = 3, 32
PLAIN = CostModel(step_s=((1, 1.0), (MOST, 1.0)))
"""Steps of 1 s at any size."""


def seen(depth: int, block_s: dict[int, float]) -> EngineTimes:
    """One block at each of some sizes."""
    return EngineTimes(by_batch={(batch, depth): (1, seconds) for batch, seconds in block_s.items()})


@pytest.mark.parametrize(
    ("block_s", "accept_length", "most"),
    [
        ({1: 1.5, 32: 1.5}, 2.0, 32),  # always
        ({1: 3.0, 32: 3.0}, 2.0, 0),  # never
        ({1: 1.0, 31: 4.0}, 2.05, 11),  # 1 + 0.1 (b - 1) is 2 at 11
        ({1: 1.0, 31: 4.0}, 3.05, 21),
        ({1: 1.0, 8: 1.0, 9: 2.1, 10: 1.0, 16: 1.0, 17: 9.0, 32: 9.0}, 2.0, 15),  # one size that was disturbed
        ({1: 3.0, 32: 3.0}, None, 32),  # nothing is known of the draft
        ({}, 2.0, 32),  # or of its blocks
    ],
)
def test_up_to_which_batch_a_draft_pays(block_s: dict[int, float], accept_length: float | None, most: int) -> None:
    subject = Controller(PLAIN, [DEPTH], MOST, accept_length)
    subject.observe(seen(DEPTH, block_s))
    assert subject.max_batches() == (most,) * DEPTH


@pytest.mark.parametrize("accept_length", [1.0, 1.5, 2.75, 4.0])
def test_tokens_of_shallower_blocks(accept_length: float) -> None:
    one, *more = tokens_per_block(accept_length, DEPTH)
    assert one == 1 and more[-1] == pytest.approx(accept_length)
    accepted = [b - a for a, b in pairwise([one, *more])]
    rates = [b / a for a, b in pairwise([1.0, *accepted]) if a > 1e-6]
    assert rates == pytest.approx([rates[0]] * len(rates), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0.1, 5.0), min_size=DEPTH, max_size=DEPTH), min_size=4, max_size=4), st.floats(1, 4))
def test_each_size_has_the_depth_of_the_least_seconds_per_token(by_size: list[list[float]], length: float) -> None:
    """Up to their order: where the best depths do not fall with the size they are put so."""
    subject = Controller(PLAIN, range(1, DEPTH + 1), len(by_size), length)
    for depth in range(1, DEPTH + 1):
        subject.observe(seen(depth, {size: seconds[depth - 1] for size, seconds in enumerate(by_size, 1)}))
    worth = tokens_per_block(length, DEPTH)
    best = []
    for seconds in by_size:
        (least, depth), (second, _), *_ = sorted(
            (s / w, k) for k, (s, w) in enumerate(zip([1.0, *seconds], worth, strict=True))
        )
        assume(second - least > 1e-9)
        best.append(depth)
    chosen = subject.max_batches()
    assert list(chosen) == sorted(chosen, reverse=True)
    got = [sum(size <= most for most in chosen) for size in range(1, len(by_size) + 1)]
    assert got == sorted(best, reverse=True)


def test_newer_steps_count_more() -> None:
    subject = Controller(PLAIN, [DEPTH], MOST, 2.0)
    subject.observe(seen(DEPTH, {1: 3.0, 32: 3.0}))
    assert subject.max_batches() == (0,) * DEPTH
    for _ in range(4):
        subject.observe(seen(DEPTH, {1: 1.0, 32: 1.0}))
    assert subject.max_batches() == (MOST,) * DEPTH
    subject.observe(EngineTimes(by_batch={(32, 0): (1000, 10.0)}))  # plain steps have become far faster
    assert max(subject.max_batches()) < MOST


def test_steps_are_timed_by_the_number_of_sequences_and_the_depth() -> None:
    model = tiny_model()
    draft = DraftHead.attach(model, EAGLE, None, torch.Generator().manual_seed(1))
    engine = EmbeddedEngine(model, draft, depth=2, max_running=5, max_context=64)
    requests = [Request(id=str(i), tokens=(3, 4), sampling=Sampling(max_new_tokens=9), seed=i) for i in range(5)]
    expected = [c.tokens for c in engine.generate(requests)]
    times = engine.take_times()
    assert all(depth == 2 and 1 <= batch <= 5 for batch, depth in times.by_batch)
    assert sum(seconds for _, seconds in times.by_batch.values()) <= times.total_s
    engine.max_batches = (4, 1)
    assert [c.tokens for c in engine.generate(requests)] == expected
    assert {(batch <= 4) + (batch <= 1) - depth for batch, depth in engine.take_times().by_batch} == {0}
    assert engine.take_times().by_batch == {}
    engine.set_draft_depth(0)  # as for a draft that did not verify: whatever pays, nothing is drafted
    engine.generate(requests)
    assert {depth for _, depth in engine.take_times().by_batch} == {0}
    engine.set_draft_depth(2)
    subject = Controller(CostModel(step_s=((1, 1e-9),)), (1, 2), 5, 1.0)
    assert subject.max_batches() == (5, 5)  # nothing was timed yet
    time_blocks(engine, subject, tuple(range(3, 50)))
    assert engine.max_batches == ()
    assert all({1, 4, 5} <= subject._seen[depth].keys() for depth in (1, 2))
    assert subject.max_batches() == (0, 0)  # a step of a nanosecond is faster than any that was timed
    engine.max_context = 2
    time_blocks(engine, subject, (3,))
