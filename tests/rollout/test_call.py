"""One call of a fleet: whatever its servers do to a request, it gets one completion."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_server import MOST, FakeServer, answers, complete, fleet_of, leave_nothing, refusal, requests
from miles_spec.types import Completion, Request, RunError, Sampling


@pytest.fixture(autouse=True)
def nothing_runs() -> Any:
    yield
    leave_nothing()


# Without faults


def test_all_servers_share_the_work() -> None:
    servers = [FakeServer("a"), FakeServer("b")]
    fleet = fleet_of(servers)
    complete(fleet, requests(20))
    assert min(len(s.sent) for s in servers) >= 5 and sum(len(s.sent) for s in servers) == 20
    assert (fleet.restarts, fleet.retries, fleet.requeued) == (0, 0, 0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_any_mix(lengths: list[int], count: int, most: int, same: int) -> None:
    servers = [FakeServer(f"s{i}", token_s=0) for i in range(count)]
    for server in servers:
        server.most = most
    asked = [
        Request(id=str(i), tokens=(i // same,), sampling=Sampling(max_new_tokens=n)) for i, n in enumerate(lengths)
    ]
    complete(fleet_of(servers, max_running=most), asked)
    assert Counter(i for s in servers for i in s.sent) == Counter(r.id for r in asked)


def test_equal_prompts_share_a_server() -> None:
    servers = [FakeServer("a"), FakeServer("b")]
    for server in servers:
        server.most = 8
    complete(fleet_of(servers, max_running=8), requests(16, same=4))
    for server in servers:
        assert set(Counter(int(i[1:]) // 4 for i in server.sent).values()) == {4}


def test_no_requests() -> None:
    assert fleet_of([FakeServer("a")]).generate([]) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Request(id="x", tokens=(), sampling=Sampling()), "empty prompt"),
        (Request(id="x", tokens=(1,), sampling=Sampling(max_new_tokens=100)), "the context holds 100"),
        (Request(id="x", tokens=(1,), sampling=Sampling(max_new_tokens=9, stop=("a",))), "has a stop string"),
        (requests(1)[0], "the same id"),
    ],
)
def test_a_request_that_can_never_run_is_refused_before_any_runs(bad: Request, message: str) -> None:
    server = FakeServer("a")
    with pytest.raises(ValueError, match=message):
        fleet_of([server]).generate([*requests(3), bad])
    assert not server.sent


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="name of its own"):
        fleet_of([FakeServer("a"), FakeServer("a")])


def test_from_a_thread_without_a_loop() -> None:
    fleet, done, callers = fleet_of([FakeServer("a")]), [], set()

    def generate() -> None:
        done.extend(fleet.generate(requests(6), lambda _: callers.add(threading.current_thread())))

    thread = threading.Thread(target=generate)
    thread.start()
    thread.join()
    assert len(done) == 6 and callers == {thread}


def test_times_and_tokens_since_the_last_call() -> None:
    fleet = fleet_of([FakeServer("a", token_s=0.01)])
    complete(fleet, requests(3, tokens=4))
    complete(fleet, requests(2, tokens=4))
    times = fleet.take_times()
    assert times.tokens == 20 and 0.08 <= times.total_s == times.other_s
    assert times.restarts == times.requeued == 0
    assert fleet.take_times().tokens == 0 and fleet.take_times().total_s == 0


# Servers that refuse


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_for_a_while(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_spec.rollout.dispatch.BACKOFF_S", 0.002)
    busy, other = FakeServer("a"), FakeServer("b")
    busy.busy = [status] * 10
    fleet = fleet_of([busy, other])
    complete(fleet, requests(40))
    assert fleet.retries == 10 and fleet.requeued == fleet.restarts == 0
    assert len(busy.sent) > 10, "it is asked again"


def test_an_only_server_that_is_busy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_spec.rollout.dispatch.BACKOFF_S", 0.002)
    server = FakeServer("a")
    server.busy = [503] * 6
    fleet = fleet_of([server])
    complete(fleet, requests(3))
    assert fleet.retries == 6


def test_a_server_that_never_has_room_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_spec.rollout.dispatch.BACKOFF_MAX_S", 0.01)
    server = FakeServer("a")
    server.busy = [503] * 10_000
    with pytest.raises(RunError, match=r"no server has generated for 0.2 s"):
        fleet_of([server], start_timeout_s=0.2).generate(requests(3))


def test_a_server_that_fails_at_a_request_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_spec.rollout.dispatch.BACKOFF_S", 0.002)
    server = FakeServer("a")
    server.busy = [500] * 4
    fleet = fleet_of([server])
    complete(fleet, requests(1))
    assert fleet.retries == 4 and fleet.requeued == 0 and len(server.sent) == 5


@pytest.mark.parametrize("status", [500, 502])
def test_a_request_at_which_servers_fail_again_and_again_ends_the_call(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles_spec.rollout.dispatch.BACKOFF_S", 0.002)
    server = FakeServer("a")
    server.busy, server.says = [status] * 1000, "Out of memory even after retracting"
    with pytest.raises(RunError, match=r"'r0' ended in an error of 'a' \(Out of memory .*\), the last of 5 attempts"):
        fleet_of([server]).generate(requests(1))
    assert len(server.sent) == 5


def test_a_request_at_which_a_server_fails_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_spec.rollout.dispatch.BACKOFF_S", 0.0)
    bad, good = FakeServer("a"), FakeServer("b")
    bad.busy = [500] * 1000
    complete(fleet_of([bad, good]), requests(4 * MOST))  # more than the other has room for
    assert max(Counter(bad.sent).values()) == 1


def test_a_connection_that_breaks_is_ended_on_the_server_and_tried_again() -> None:
    server = FakeServer("a")
    server.drops = 2
    fleet = fleet_of([server])
    complete(fleet, requests(4))
    assert fleet.retries == 2 and sorted(server.aborts) == sorted(server.sent[:2])
    assert server.starts == 0


def test_what_the_server_gave_up_by_itself_is_tried_again() -> None:
    server = FakeServer("a")
    given_up: list[str] = []

    def give_up(request: Request) -> None:
        if not given_up:
            given_up.append(request.id)
            asyncio.get_running_loop().call_later(0.003, lambda: server.running[request.id].set())

    server.on_sent = give_up
    fleet = fleet_of([server])
    complete(fleet, requests(4))
    assert fleet.retries == 1 and server.sent.count(given_up[0]) == 2


def test_a_refused_request_ends_the_call_and_stops_the_others() -> None:
    server = FakeServer("a", token_s=0.01)

    def refuse(request: Request) -> None:
        if request.id == "r2":
            raise refusal(400)

    server.on_sent = refuse
    with pytest.raises(aiohttp.ClientResponseError):
        fleet_of([server]).generate(requests(8, tokens=90))
    assert set(server.sent) == {"r0", "r1", "r2", "r3"} and {"r0", "r1", "r3"} <= set(server.aborts)


def test_an_error_of_on_done_ends_the_call() -> None:
    server = FakeServer("a")

    def fail(completion: Completion) -> None:
        raise KeyError(completion.request_id)

    fleet = fleet_of([server])
    with pytest.raises(KeyError):
        fleet.generate(requests(8), fail)
    server.on_sent = lambda request: None
    complete(fleet, requests(8))  # and the fleet goes on


# Servers that are late


def test_a_late_request_is_ended_there_and_answered_elsewhere() -> None:
    slow, quick = FakeServer("a", token_s=0.3), FakeServer("b")
    fleet = fleet_of([slow, quick], request_timeout_s=0.05, max_running=1)
    complete(fleet, requests(5))
    assert fleet.requeued >= 1 and set(slow.sent) <= set(slow.aborts)


def test_a_late_answer_that_comes_with_the_abort_counts() -> None:
    server = FakeServer("a", token_s=0.02)
    server.deaf = 100
    fleet = fleet_of([server], request_timeout_s=0.03)
    complete(fleet, requests(2, tokens=4))
    assert len(server.sent) == 2 and fleet.requeued == 0


def test_a_request_that_is_late_everywhere_ends_the_call() -> None:
    servers = [FakeServer("a", token_s=0.05), FakeServer("b", token_s=0.05)]
    with pytest.raises(RunError, match=r"'r0'.*the last of 5 attempts"):
        fleet_of(servers, request_timeout_s=0.02).generate(requests(1))
    assert servers[0].sent and servers[1].sent


# Abort


def test_abort_all_in_the_middle() -> None:
    server = FakeServer("a", token_s=0.005)
    fleet = fleet_of([server])
    server.on_sent = lambda request: (
        asyncio.get_running_loop().call_later(0.05, fleet.abort) if request.id == "r0" else None
    )
    done = answers(fleet, requests(10, tokens=90))
    assert {c.finish for c in done} == {"abort"} and len(server.sent) == MOST
    assert all(0 < len(c.tokens) < 90 for c in done[:MOST]) and not any(c.tokens for c in done[MOST:])


def test_abort_by_name_from_another_thread() -> None:
    server, began = FakeServer("a", token_s=0.005), threading.Event()
    fleet = fleet_of([server])
    server.on_sent = lambda request: began.set()
    thread = threading.Thread(target=lambda: began.wait(5) and fleet.abort(["r1", "r7", "unknown"]))
    thread.start()
    done = answers(fleet, requests(8, tokens=90))
    thread.join()
    assert [c.finish for c in done] == ["abort" if i in (1, 7) else "length" for i in range(8)]
    assert "r7" not in server.sent and len(done[1].tokens) < 90


def test_abort_that_overtakes_its_request_is_repeated() -> None:
    server = FakeServer("a", token_s=0.005)
    server.deaf = 1
    fleet = fleet_of([server])
    server.on_sent = lambda request: fleet.abort()
    done = answers(fleet, requests(1, tokens=90))
    assert done[0].finish == "abort" and len(done[0].tokens) < 90 and len(server.aborts) >= 2


def test_an_aborted_request_is_not_sent_again_when_its_server_dies() -> None:
    victim = FakeServer("a", token_s=0.01)
    victim.deaf = 1000
    fleet = fleet_of([victim])

    def abort(request: Request) -> None:
        fleet.abort()
        asyncio.get_running_loop().call_later(0.02, victim.die)

    victim.on_sent = abort
    done = answers(fleet, requests(2, tokens=90))
    assert [c.finish for c in done] == ["abort"] * 2 and sorted(victim.sent) == ["r0", "r1"]


def test_abort_between_calls_is_forgotten() -> None:
    fleet = fleet_of([FakeServer("a")])
    fleet.abort()
    complete(fleet, requests(3))
