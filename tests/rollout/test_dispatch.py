"""The queue under any mix of prompts, servers and losses; the pauses of a server that refuses."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spec.rollout.dispatch import BACKOFF_MAX_S, BACKOFF_S, Queue, Seat

prompts = st.lists(st.sampled_from([(1,), (2,), (3, 4)]), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(prompts, st.integers(1, 4), st.integers(1, 6), st.integers(0, 1 << 32))
def test_each_request_once_and_never_too_many(tokens: list[tuple[int, ...]], count: int, most: int, seed: int) -> None:
    """Servers finish, lose and hold back requests at random; each request is finished once, none is on two servers."""
    names, random = [f"s{i}" for i in range(count)], Random(seed)
    queue, finished = Queue(tokens, names, most), []
    for _ in range(1000):
        ready = [n for n in names if random.random() < 0.8]
        while ready and (pick := queue.take(ready)):
            index, name = pick
            assert name in ready and not queue.waits(index)
            assert sum(index in queue.running(n) for n in names) == 1
        assert all(len(queue.running(n)) <= most for n in names)
        name = random.choice(names)
        running = sorted(queue.running(name))
        if running and random.random() < 0.2:
            for index in running:
                queue.leave(index, name)
            queue.back(running)
            queue.forget(name)
        elif running:
            finished.append(random.choice(running))
            queue.leave(finished[-1], name)
    assert sorted(finished) == list(range(len(tokens)))
    assert queue.take(names) is None


@settings(max_examples=100, deadline=None)
@given(prompts, st.integers(1, 4), st.integers(1, 40))
def test_balance(tokens: list[tuple[int, ...]], count: int, most: int) -> None:
    """No server has more than its share, rounded up, while another has room, whatever prompts are equal."""
    names = [f"s{i}" for i in range(count)]
    queue = Queue(tokens, names, most)
    while queue.take(names):
        pass
    loads = [len(queue.running(n)) for n in names]
    assert sum(loads) == min(len(tokens), count * most)
    assert max(loads) <= -(-len(tokens) // count)


def test_equal_prompts_go_together() -> None:
    queue = Queue([(1,)] * 4 + [(2,)] * 4 + [(1,)] * 4 + [(2,)] * 4, ["a", "b"], 16)
    places = dict(iter(lambda: queue.take(["a", "b"]), None))
    assert [places[i] for i in range(16)] == ["a"] * 4 + ["b"] * 4 + ["a"] * 4 + ["b"] * 4


def test_a_full_server_does_not_hold_its_prompts_back() -> None:
    queue = Queue([(1,)] * 3, ["a", "b"], 2)
    assert [queue.take(["a", "b"]) for _ in range(3)] == [(0, "a"), (1, "a"), (2, "b")]


def test_a_dead_server_has_seen_nothing() -> None:
    queue = Queue([(1,), (2,), (2,), (1,), (3,)], ["a", "b"], 2)
    assert [queue.take(["a", "b"]) for _ in range(3)] == [(0, "a"), (1, "b"), (2, "b")]
    queue.leave(0, "a")
    queue.leave(1, "b")
    queue.leave(2, "b")
    queue.back([1])
    queue.forget("b")
    assert queue.take(["a", "b"]) == (1, "a")  # else b, which had seen prompt (2,)


def test_requeued_requests_come_first_and_in_order() -> None:
    queue = Queue([(i,) for i in range(5)], ["a"], 3)
    for _ in range(3):
        queue.take(["a"])
    for index in (0, 1, 2):
        queue.leave(index, "a")
    queue.back([2, 0, 1])
    assert [queue.take(["a"])[0] for _ in range(3)] == [0, 1, 2]  # type: ignore[index]


def test_a_late_request_goes_elsewhere_if_it_can() -> None:
    queue = Queue([(1,)], ["a", "b"], 1)
    for ready, expected in ((["a", "b"], "a"), (["a", "b"], "b"), (["a"], "a")):
        assert queue.take(ready) == (0, expected)
        queue.leave(0, expected)
        queue.late(0, expected)
        queue.back([0])


def test_withdrawn_requests_are_not_sent() -> None:
    queue = Queue([(1,), (2,)], ["a"], 2)
    queue.withdraw(0)
    assert queue.take(["a"]) == (1, "a") and queue.take(["a"]) is None


def seat(version: int = 3) -> Seat:
    server = SimpleNamespace(name="a", versions=lambda: {"target": version})
    return Seat(server=server)  # type: ignore[arg-type]


def test_pauses_double_up_to_a_limit() -> None:
    refused, now, bounds = seat(), 100.0, BACKOFF_S
    for _ in range(20):
        refused.refuse(now, sent_s=now)
        assert bounds / 2 <= refused.free_s - now <= bounds
        now, bounds = refused.free_s, min(2 * bounds, BACKOFF_MAX_S)
    refused.answer(now)
    refused.refuse(now, sent_s=now)
    assert refused.free_s - now <= BACKOFF_S


def test_refusals_of_one_moment_count_once() -> None:
    refused = seat()
    for at in (100.0, 100.001, 100.002):
        refused.refuse(at, sent_s=99.0)
    assert refused.refusals == 1


def test_pauses_differ() -> None:
    seats = [seat() for _ in range(8)]
    for one in seats:
        one.refuse(100.0, sent_s=100.0)
    assert len({one.free_s for one in seats}) > 1


def test_serves() -> None:
    one = seat(version=3)
    assert not one.serves(3)
    one.enter("serving", "it serves version 3")
    assert one.serves(3) and not one.serves(4)


def test_a_state_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    one = seat()
    for why in ("it does not answer", "it still does not answer"):
        one.enter("suspect", why)
    assert [r.getMessage() for r in caplog.records] == [
        "server 'a' was waiting for weights and is now suspect: it does not answer"
    ]
