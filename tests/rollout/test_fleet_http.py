"""The fleet with servers of its own class, over HTTP and as processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fake_server import MOST, answers, complete, fleet_of, leave_nothing, requests, wait_until
from fake_sglang import COMMAND, FakeLoader, FakeSGLang, serving
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.types import Completion, RunError, TensorMeta

SETTINGS = ServerSettings(model_path="/m", draft_path="/d", context_length=200, max_running=MOST)


@pytest.fixture(autouse=True)
def nothing_runs() -> Any:
    yield
    leave_nothing()


def verified(server: SGLangServer) -> None:
    """A push of nothing under version 1, which the fake's loader takes."""
    server.begin_update(1, ["target"])
    server.end_update()


def joined(fake: FakeSGLang, name: str) -> SGLangServer:
    return SGLangServer(name=name, settings=SETTINGS, keys=Keys(), join=fake.url)


def test_servers_over_http() -> None:
    with (
        serving(ring=FakeLoader()) as a,
        serving(ring=FakeLoader()) as b,
        fleet_of([joined(a, "a"), joined(b, "b")], verified, probe_s=0.1) as fleet,
    ):
        fleet.draft_depth = 3
        a.faults.busy, b.faults.hang_up, a.faults.late_tokens_s = 2, 1, 0.001
        asked = requests(24)
        done = answers(fleet, asked)
        assert all(
            c.tokens == tuple(range(r.tokens[-1] + 1, r.tokens[-1] + 6)) for c, r in zip(done, asked, strict=True)
        )
        assert (
            fleet.retries == 3 and 1 < max(a.most_running, b.most_running) <= MOST and not a.running and not b.running
        )


@pytest.mark.parametrize("within", [True, False])
def test_a_joined_server_that_is_a_new_process_learns_again(within: bool) -> None:
    """Whether it was seen to die, within a call, or nobody looked, between two."""
    first, second = (FakeSGLang(ring=FakeLoader(learned=set())) for _ in range(2))
    server = joined(first.start(), "a")
    fleet = fleet_of([server], verified, probe_s=0.05, start_timeout_s=10.0)

    def restart() -> None:
        first.stop()
        if within:
            wait_until(lambda: fleet._seats["a"].state == "dead")
        second.port = first.port
        second.start()

    with fleet:
        fleet.draft_depth = 3
        server.learn("target", {"w": TensorMeta(shape=(2, 3), dtype="float32")})
        verified(server)
        if within:
            first.faults.late_tokens_s = 0.01
            timer = threading.Timer(0.1, restart)
            timer.start()
            complete(fleet, requests(20, tokens=20))
            timer.join()
        else:
            complete(fleet, requests(4))
            restart()
            with pytest.raises(RunError, match="learn them first"):
                verified(server)
            complete(fleet, requests(4))
        assert server.versions()["target"] == 1 and second.paths().count("/generate") >= 4
    second.stop()


def test_abort_over_http() -> None:
    with serving(ring=FakeLoader()) as fake, fleet_of([joined(fake, "a")], verified, probe_s=0.1) as fleet:
        fake.faults.late_tokens_s = 0.02

        def abort() -> None:
            wait_until(lambda: len(fake.running) == MOST)
            time.sleep(0.2)
            fleet.abort()

        threading.Thread(target=abort).start()
        done = answers(fleet, requests(6, tokens=90))
        assert {c.finish for c in done} == {"abort"} and not fake.running and 0 < len(done[0].tokens) < 90


def test_a_request_whose_connection_broke_is_aborted_before_it_is_sent_again() -> None:
    with serving(ring=FakeLoader()) as fake, fleet_of([joined(fake, "a")], verified, probe_s=0.1) as fleet:
        fleet.draft_depth = 3
        fake.faults.hang_up = 1
        complete(fleet, requests(1))
        calls = [(path, body["rid"]) for _, path, body in fake.calls if path in ("/generate", "/abort_request")]
        first, second = calls[0][1], calls[-1][1]
        assert calls == [("/generate", first), ("/abort_request", first), ("/generate", second)] and first != second
        assert fleet.retries == 1


def test_a_late_answer_over_http() -> None:
    with (
        serving(ring=FakeLoader()) as slow,
        serving(ring=FakeLoader()) as quick,
        fleet_of([joined(slow, "a"), joined(quick, "b")], verified, max_running=1, request_timeout_s=0.3) as fleet,
    ):
        slow.faults.late_s = 30.0
        complete(fleet, requests(6))
        assert fleet.requeued >= 1 and not slow.running


def test_kill_9_in_mid_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SGLANG", json.dumps({"late_tokens_s": 0.02}))
    servers = [
        SGLangServer(name=n, settings=SETTINGS, keys=Keys.random(), launch=COMMAND, folder=tmp_path, draft_depth=2)
        for n in "ab"
    ]
    killed: list[float] = []
    noticed: list[float] = []

    def recover(server: Any) -> None:
        if killed:
            assert server is servers[0] and server.versions()["target"] == -1
            noticed.append(time.monotonic() - killed[0])
        server._versions["target"] = 1  # nobody stands in for the loader in another process

    def kill(completion: Completion) -> None:
        seen.append(completion.request_id)
        if not killed and servers[0]._process is not None and len(servers[0]._running) > 1:
            killed.append(time.monotonic())
            os.kill(servers[0]._process.pid, signal.SIGKILL)

    seen: list[str] = []
    with fleet_of(servers, recover, probe_s=0.2) as fleet:
        for server in servers:
            recover(server)
        asked = requests(60, tokens=40)
        done = fleet.generate(asked, kill)
        assert [c.request_id for c in done] == [r.id for r in asked] and sorted(seen) == sorted(r.id for r in asked)
        assert all(len(c.tokens) == 40 and c.finish == "length" for c in done)
        assert fleet.restarts == 1 and noticed[0] < 30 and fleet.requeued + fleet.retries >= 1
        assert fleet.versions()["target"] == 1 and fleet.members() == servers


@pytest.mark.timeout(60)  # without a warm-up each new process is taken for dead in turn
def test_kernels_are_compiled_before_a_server_counts_as_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SGLANG", json.dumps({"compile_s": 4.0, "late_tokens_s": 0.02}))
    server = SGLangServer(
        name="e0", settings=SETTINGS, keys=Keys.random(), launch=COMMAND, folder=tmp_path, draft_depth=2
    )

    def recover(server: Any) -> None:
        server._versions["target"] = 1

    with fleet_of([server], recover, probe_s=0.1, dead_after_s=2.0) as fleet:
        recover(server)
        complete(fleet, requests(20, tokens=20))
        assert fleet.restarts == 0
