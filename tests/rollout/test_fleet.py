"""Servers that hang, die, come back or serve the wrong weights: no request is lost or doubled, and none is answered by
what was not verified."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import pytest

from fake_server import MOST, FakeServer, complete, fleet_of, leave_nothing, push, requests, wait_until
from miles_spec.types import Request, RunError


@pytest.fixture(autouse=True)
def nothing_runs() -> Any:
    yield
    leave_nothing()


# Servers that die


@pytest.mark.parametrize("at", [1, 7, 20])
def test_a_server_that_dies_loses_and_doubles_nothing(at: int) -> None:
    victim, other = FakeServer("a"), FakeServer("b")

    def die(request: Request) -> None:
        if victim.starts == 0 and len(victim.sent) + len(other.sent) >= at:
            victim.die()

    victim.on_sent = other.on_sent = die
    fleet = fleet_of([victim, other])
    complete(fleet, requests(40, tokens=20))
    assert victim.starts == 1 and fleet.restarts == 1


def test_a_server_that_dies_at_the_last_request() -> None:
    server = FakeServer("a")
    server.on_sent = lambda request: server.die() if request.id == "r9" and not server.starts else None
    fleet = fleet_of([server])
    complete(fleet, requests(10))
    assert fleet.restarts == 1 and fleet.requeued + fleet.retries >= 1
    times = fleet.take_times()
    assert (times.restarts, times.requeued) == (1, fleet.requeued) and fleet.take_times().restarts == 0


def test_a_server_that_came_back_serves_again_after_its_push() -> None:
    victim, other, pushed = FakeServer("a"), FakeServer("b", token_s=0.02), []

    def recover(server: Any) -> None:
        assert server is victim and server.version == -1 and not server.running
        pushed.append(len(server.sent))
        push(server)

    victim.on_sent = lambda request: victim.die() if len(victim.sent) == 3 else None
    fleet = fleet_of([victim, other], recover)
    complete(fleet, requests(60))
    assert pushed == [3] and len(victim.sent) > 3


def test_a_dead_process_is_noticed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    victim, other = FakeServer("a", token_s=0.05), FakeServer("b")
    died: list[float] = []

    def die(request: Request) -> None:
        died.append(time.monotonic())
        asyncio.get_running_loop().call_later(0.01, victim.die)

    victim.on_sent = die
    seen: list[float] = []
    victim.leave = lambda reason: seen.append(time.monotonic())  # type: ignore[method-assign]
    fleet_of([victim, other]).generate(requests(20, tokens=8))
    assert seen[0] - died[0] < 5  # far below `dead_after_s`


def test_a_server_that_hangs_is_restarted_and_its_late_answers_dropped(caplog: pytest.LogCaptureFixture) -> None:
    victim, other = FakeServer("a"), FakeServer("b")
    victim.stubborn = True

    def hang(request: Request) -> None:
        victim.hung = victim.starts == 0

    victim.on_sent = hang
    fleet = fleet_of([victim, other], dead_after_s=0.4)
    with caplog.at_level(logging.INFO):
        complete(fleet, requests(20))
    # the other may have answered all before it is up again
    assert fleet.restarts <= victim.explained == 1 and 1 <= fleet.requeued <= MOST and not other.explained
    states = [r.getMessage().split(" is now ")[1].split(":")[0] for r in caplog.records if "'a' was" in r.getMessage()]
    assert states[:6] == ["serving", "suspect", "dead", "restarting", "waiting for weights", "serving"][: len(states)]
    assert "it has not answered for " in caplog.text


def test_a_probe_of_the_process_that_died_says_nothing_about_the_next(caplog: pytest.LogCaptureFixture) -> None:
    victim, other = FakeServer("a", token_s=0.02), FakeServer("b", token_s=0.02)

    def die(request: Request) -> None:
        if victim.starts == 0 and not victim.hung:
            victim.hung = True
            asyncio.get_running_loop().call_later(0.1, victim.die)  # its probe is under way until 0.5 s after it began

    victim.on_sent = die
    fleet = fleet_of([victim, other], dead_after_s=2.0)
    with caplog.at_level(logging.INFO):
        complete(fleet, requests(60))
    states = [r.getMessage().split(" is now ")[1].split(":")[0] for r in caplog.records if "'a' was" in r.getMessage()]
    assert states == ["serving", "dead", "restarting", "waiting for weights", "serving"] and fleet.restarts == 1


class Drowsy(FakeServer):
    """Answers nothing for 0.6 s after its start."""

    def start(self) -> None:
        super().start()
        self.hung = True
        threading.Timer(0.6, setattr, (self, "hung", False)).start()


def test_a_server_that_started_again_has_its_time_to_answer() -> None:
    servers = [Drowsy("a"), Drowsy("b")]

    def recover(server: Any) -> None:
        time.sleep(0.8)  # the other waits meanwhile, and is asked
        push(server)

    for server in servers:
        server.start_s = 2.0  # longer than a server may be silent
        server.on_sent = lambda request, server=server: None if server.starts else server.die()  # type: ignore[misc]
    fleet = fleet_of(servers, recover, dead_after_s=1.6)
    complete(fleet, requests(8))
    assert fleet.restarts == 2 and [s.starts for s in servers] == [1, 1]


def test_a_suspect_keeps_its_requests_and_gets_no_new_ones() -> None:
    doubtful, other = FakeServer("a", token_s=0.002), FakeServer("b")
    before: list[int] = []

    def hang(request: Request) -> None:
        if len(doubtful.sent) == MOST and not before:
            doubtful.hung = True
            asyncio.get_running_loop().call_later(0.8, answer)

    def answer() -> None:
        before.append(len(doubtful.sent))
        doubtful.hung = False

    doubtful.on_sent = hang
    fleet = fleet_of([doubtful, other], dead_after_s=2.4)  # suspect after 0.6 s
    complete(fleet, requests(30))
    assert before == [MOST] and fleet.requeued == fleet.restarts == 0


def test_a_server_that_flaps() -> None:
    flapping, steady = FakeServer("a"), FakeServer("b", token_s=0.01)
    flapping.on_sent = lambda request: flapping.die() if len(flapping.sent) in (2, 5, 9) else None
    fleet = fleet_of([flapping, steady])
    complete(fleet, requests(60))
    assert fleet.restarts == flapping.starts == 3


def test_a_request_that_kills_its_servers_ends_the_call() -> None:
    server = FakeServer("a")

    def die(request: Request) -> None:
        if request.id == "r1":
            asyncio.get_running_loop().call_later(0.002, server.die)

    server.on_sent = die
    with pytest.raises(RunError, match=r"may be what stops the servers"):
        fleet_of([server]).generate(requests(2, tokens=50))


def test_a_restart_that_fails_twice_then_works(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer("a")
    server.start_errors = [RunError("no memory"), RunError("still no memory")]
    server.on_sent = lambda request: server.die() if len(server.sent) == 2 else None
    fleet = fleet_of([server])
    complete(fleet, requests(6))
    assert server.starts == 3 and fleet.restarts == 1
    assert "still no memory" in caplog.text


def test_all_dead() -> None:
    servers = [FakeServer("a"), FakeServer("b")]
    for server in servers:
        server.start_errors = [RunError(f"no GPU for {server.name}")] * 1000
        server.on_sent = lambda request: [s.die() for s in servers] and None
    fleet = fleet_of(servers, start_timeout_s=0.1)
    with pytest.raises(RunError, match=r"no server is left.*no GPU for a.*no GPU for b|no server has generated"):
        fleet.generate(requests(8))


def test_one_lost_server_does_not_end_the_call(caplog: pytest.LogCaptureFixture) -> None:
    victim, other = FakeServer("a"), FakeServer("b", token_s=0.01)
    victim.start_errors = [RunError("no GPU")] * 1000
    victim.on_sent = lambda request: victim.die()
    fleet = fleet_of([victim, other], start_timeout_s=0.3)
    complete(fleet, requests(40))
    assert "is now lost: it did not start again within 0.3 s: no GPU" in caplog.text
    assert [s.name for s in fleet.members()] == ["b"]


# Weights


def test_a_push_that_fails_keeps_the_server_out(caplog: pytest.LogCaptureFixture) -> None:
    victim, other, tries = FakeServer("a"), FakeServer("b", token_s=0.01), []

    def recover(server: Any) -> None:
        tries.append(server)
        server.version = 1  # a push that says so and then fails
        raise RunError("the digests differ")

    victim.on_sent = lambda request: victim.die()
    fleet = fleet_of([victim, other], recover)
    complete(fleet, requests(60))
    assert len(victim.sent) == 1 and len(tries) >= 2 and victim.version == -1
    assert fleet.versions() == {"target": 1, "draft": 1}
    assert "the digests differ" in caplog.text


def test_pushes_that_fail_again_and_again_lead_to_a_restart() -> None:
    server = FakeServer("a", version=-1)

    def recover(server: Any) -> None:
        if not server.starts:
            raise ConnectionError("rank 0 is gone")
        push(server)

    fleet = fleet_of([server], recover)
    complete(fleet, requests(4))
    assert server.starts == 1


def test_a_server_that_left_gets_nothing_until_its_push() -> None:
    left, other = FakeServer("a"), FakeServer("b", token_s=0.01)
    left.leave("a push failed")
    released = threading.Event()

    def recover(server: Any) -> None:
        assert server is left and not left.sent
        released.wait(5)
        push(server)

    other.on_sent = lambda request: released.set() if len(other.sent) > 8 else None
    fleet = fleet_of([left, other], recover)
    complete(fleet, requests(40))
    assert left.sent and not set(left.sent) & set(other.sent[:9])


def test_a_server_of_another_version_waits() -> None:
    old, new = FakeServer("a", version=4), FakeServer("b", version=5)
    fleet = fleet_of([old, new], lambda server: None)  # a push that leaves it as it is
    done = complete(fleet, requests(20))
    assert not old.sent and {span.target for c in done for span in c.versions} == {5}
    assert fleet.versions()["target"] == 5


def test_a_version_outlives_the_server_that_served_it() -> None:
    old, new = FakeServer("a", version=4), FakeServer("b", version=5)
    versions = [4]

    def recover(server: Any) -> None:
        server.version = versions[-1]

    fleet = fleet_of([old, new], recover)
    complete(fleet, requests(4))
    new.start_s, versions = 0.3, [5]
    new.die()
    done = complete(fleet, requests(4))
    assert old.sent and {span.target for c in done for span in c.versions} == {5}


def test_a_newer_version_comes_with_the_weights_where_nobody_serves() -> None:
    """After a push that verified nowhere, or the death of all servers while the trainer worked."""
    for fall in (lambda server: server.leave("the push did not verify"), lambda server: server.die()):
        server, newest = FakeServer("a"), [5]
        server.version = 5
        fleet = fleet_of([server], lambda s, n=newest: setattr(s, "version", n[0]), start_timeout_s=5.0)
        complete(fleet, requests(4))
        newest[0] = 6
        fall(server)
        fleet.members()
        complete(fleet, requests(4))
        assert fleet.versions()["target"] == 6


def test_servers_without_weights_are_given_them_one_at_a_time() -> None:
    servers, pushing = [FakeServer(n, version=-1, token_s=0.01) for n in "abc"], []

    def recover(server: Any) -> None:
        pushing.append(server)
        assert len(pushing) == 1
        time.sleep(0.01)
        pushing.remove(server)
        push(server)

    complete(fleet_of(servers, recover), requests(60))
    assert all(server.sent for server in servers)


def test_a_push_under_way_is_waited_for_at_the_end() -> None:
    waiting, other, ended = FakeServer("a", version=-1), FakeServer("b"), []
    began = threading.Event()

    def recover(server: Any) -> None:
        began.set()
        time.sleep(0.3)
        ended.append(True)
        push(server)

    def hold(request: Request) -> None:
        assert began.wait(5)

    fleet = fleet_of([waiting, other], recover)
    other.on_sent = lambda request: asyncio.get_running_loop().call_later(0.05, hold, request) and None
    complete(fleet, requests(3))
    assert ended == [True]


def test_nobody_is_pushed_to_between_calls() -> None:
    server, pushed = FakeServer("a"), []
    fleet = fleet_of([server], lambda s: pushed.append(s) or push(s))
    complete(fleet, requests(3))
    server.start_s = 0.2
    server.die()
    assert fleet.members() == []  # noticed here
    wait_until(lambda: fleet.members() == [server])  # a push of the loop's reaches it as any other
    assert fleet.versions() == {"target": -1, "draft": -1} and not pushed
    push(server)
    complete(fleet, requests(3))
    assert not pushed and fleet.restarts == 1


# Between two calls


def look_until(fleet: Any, holds: Any, most_s: float = 10.0) -> None:
    until = time.monotonic() + most_s
    while not holds():
        assert time.monotonic() < until
        fleet.look()


def test_a_server_that_hangs_between_calls_is_noticed_by_looking(caplog: pytest.LogCaptureFixture) -> None:
    hung, other = FakeServer("a"), FakeServer("b")
    fleet = fleet_of([hung, other], dead_after_s=1.6)
    fleet.look()
    assert fleet.members() == [hung, other]
    hung.hung = True
    began = time.monotonic()
    fleet.look()
    assert fleet.members() == [other] and hung.explained == 0, "in doubt"
    look_until(fleet, lambda: hung.starts)
    assert time.monotonic() - began >= 1.6 and hung.explained == 1 and not other.starts
    look_until(fleet, lambda: len(fleet.members()) == 2)
    assert hung.version == -1 and fleet.restarts == 1
    assert "it has not answered for " in caplog.text


def test_a_suspect_that_answers_the_next_look_is_a_member_again() -> None:
    slow = FakeServer("a")
    fleet = fleet_of([slow], dead_after_s=2.0)
    slow.hung = True
    fleet.look()
    assert fleet.members() == []
    slow.hung = False
    fleet.look()
    assert fleet.members() == [slow] and slow.starts == 0


def test_time_without_a_look_is_not_held_against_a_server() -> None:
    slow = FakeServer("a")
    fleet = fleet_of([slow], dead_after_s=2.0)
    fleet.look()
    time.sleep(2.2)
    slow.hung = True
    fleet.look()
    assert fleet.members() == [] and slow.starts == 0, "one look that was not answered"


# Joined servers


def test_a_joined_server_is_not_restarted_but_taken_back() -> None:
    joined, other = FakeServer("a", joined=True), FakeServer("b", token_s=0.01)
    pushed: list[Any] = []

    def vanish(request: Request) -> None:
        if len(joined.sent) == 3:
            joined.die()
            asyncio.get_running_loop().call_later(0.1, lambda: setattr(joined, "up", True))

    joined.on_sent = vanish
    fleet = fleet_of([joined, other], lambda s: pushed.append(s.version) or push(s))
    complete(fleet, requests(80))
    assert joined.stops == 0 and pushed == [-1] and len(joined.sent) > 3
    assert joined.starts == 1, "it is joined anew, once"


def test_a_joined_server_that_cannot_be_joined_anew_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    joined, other, pushed = FakeServer("a", joined=True, version=-1), FakeServer("b", token_s=0.01), []
    joined.start_errors = [RunError("it drafts by another rule")] * 2
    fleet = fleet_of([joined, other], lambda s: pushed.append(s.starts) or push(s))
    complete(fleet, requests(80))
    assert pushed == [3] and joined.sent
    assert [r.getMessage() for r in caplog.records] == ["server 'a' did not get its weights"] * 2


def test_a_joined_server_that_never_comes_back_ends_the_call() -> None:
    joined = FakeServer("a", joined=True)
    joined.on_sent = lambda request: joined.die()
    with pytest.raises(RunError, match=r"no server has generated for 0.3 s: 'a' is dead: it does not answer"):
        fleet_of([joined], start_timeout_s=0.3).generate(requests(2))
    assert joined.starts == 0


# The fleet as a whole


def test_start_and_stop() -> None:
    servers = [FakeServer("a"), FakeServer("b")]
    together = threading.Barrier(2)
    for server in servers:
        server.on_start = lambda: together.wait(10)
    with fleet_of(servers) as fleet:
        assert fleet.members() == servers
        complete(fleet, requests(4))  # `recover` pushes
    assert [s.stops for s in servers] == [1, 1]


def test_one_that_does_not_start_stops_all() -> None:
    servers = [FakeServer("a"), FakeServer("b")]
    servers[1].start_errors = [RunError("no port")]
    with pytest.raises(RunError, match="no port"):
        fleet_of(servers).start()
    assert not any(s.up for s in servers)


def test_stop_while_one_is_started_again() -> None:
    server = FakeServer("a")
    fleet = fleet_of([server])
    server.die()
    server.start_s = 0.2
    fleet.members()
    fleet.stop()
    assert not server.up and not any(t.is_alive() for t in fleet._health._threads)


def test_stop_ends_a_call() -> None:
    server = FakeServer("a", token_s=0.01)
    fleet = fleet_of([server])
    server.on_sent = lambda request: threading.Timer(0.05, fleet.stop).start()
    with pytest.raises(RunError, match="stopped"):
        fleet.generate(requests(1, tokens=90))


def test_memory_is_released_and_taken_again() -> None:
    servers = [FakeServer("a"), FakeServer("b")]
    fleet = fleet_of(servers, releases=True)
    fleet.release()
    assert all(s.asleep for s in servers)
    fleet.wake()
    assert not any(s.asleep for s in servers) and fleet.members() == servers


def test_memory_is_kept_unless_asked_for() -> None:
    server = FakeServer("a")
    fleet = fleet_of([server])
    fleet.release()
    assert not server.asleep


def test_no_server_is_started_while_the_trainer_has_the_memory() -> None:
    server = FakeServer("a")
    fleet = fleet_of([server], releases=True)
    server.die()
    server.start_s = 0.1
    fleet.members()  # notices, and starts it again
    fleet.release()
    assert server.starts == 1 and server.up and server.asleep
    server.die()
    assert fleet.members() == [server] and server.starts == 1
    fleet.wake()
    wait_until(lambda: server.up)
    assert server.starts == 2


def test_a_server_that_keeps_its_memory_is_ended() -> None:
    server = FakeServer("a")
    server.memory_errors = [TimeoutError("no answer")]
    fleet = fleet_of([server], releases=True)
    fleet.release()
    assert not server.up and server.starts == 0
    fleet.wake()
    complete(fleet, requests(3))
    assert server.starts == 1


def test_a_server_that_dies_at_waking_up_is_started_again() -> None:
    server = FakeServer("a")
    fleet = fleet_of([server], releases=True)
    fleet.release()
    server.memory_errors = [ConnectionError("gone")]
    fleet.wake()
    complete(fleet, requests(3))
    assert server.starts == 1 and server.left == ["it did not take its memory again: gone"]


def test_draft_depth_of_all() -> None:
    servers = [FakeServer("a"), FakeServer("b")]
    fleet = fleet_of(servers)
    fleet.set_draft_depth(2)
    assert fleet.draft_depth == 2 and [s.draft_depth for s in servers] == [2, 2]
    assert fleet.versions()["target"] == -1
    complete(fleet, requests(8))


def test_versions_are_those_of_who_serves() -> None:
    servers = [FakeServer("a", version=3), FakeServer("b", version=4), FakeServer("c", version=4)]
    servers[1].versions = lambda: {"target": 4, "draft": 2}  # type: ignore[method-assign]
    assert fleet_of(servers).versions() == {"target": 4, "draft": 2}
