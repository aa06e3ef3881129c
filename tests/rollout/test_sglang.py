"""One server: its process, its requests, its memory and its push sessions, against the fake of SGLang."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fake_sglang import COMMAND, FakeLoader, FakeSGLang, serving
from miles_spec.rollout.engine import PushMember, RemoteMember
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.types import Completion, Request, RunError, Sampling, TensorMeta

KEYS = Keys(api="api-secret", admin="admin-secret")
SETTINGS = ServerSettings(model_path="/m", draft_path="/d", context_length=200, max_running=4)
METAS = {"w": TensorMeta(shape=(2, 3), dtype="float32")}


def joined(fake: FakeSGLang, **settings: Any) -> SGLangServer:
    server = SGLangServer(
        name="e0", settings=SETTINGS, keys=Keys(api=fake.api_key, admin=fake.admin_key), join=fake.url, **settings
    )
    server.start()
    return server


def serve(server: SGLangServer, version: int = 1) -> None:
    """Pushes nothing under a version, which the fake takes."""
    server.begin_update(version, ["target"])
    server.end_update()


def request(name: str = "r", tokens: int = 6, **sampling: Any) -> Request:
    return Request(id=name, tokens=(1, 2), sampling=Sampling(max_new_tokens=tokens, **sampling))


def ask(server: SGLangServer, *requests: Request) -> list[Completion | BaseException]:
    async def run() -> list[Completion | BaseException]:
        async with aiohttp.ClientSession() as http:
            return await asyncio.gather(*(server.complete(http, r) for r in requests), return_exceptions=True)

    return asyncio.run(run())


def during(server: SGLangServer, act: Callable[[aiohttp.ClientSession], Any], fake: FakeSGLang) -> list[Any]:
    """What two slow requests return, and `act`, which is called while they run."""

    async def run() -> list[Any]:
        async with aiohttp.ClientSession() as http:
            tasks = [asyncio.create_task(server.complete(http, request(n, 100))) for n in ("r1", "r10")]
            while len(fake.running) < 2:
                await asyncio.sleep(0.01)
            acted = act(http)
            if asyncio.iscoroutine(acted):
                await acted
            return await asyncio.gather(*tasks)

    return asyncio.run(run())


@pytest.fixture(params=["0.5.17", "0.5.21"])
def fake(request: pytest.FixtureRequest) -> Iterator[FakeSGLang]:
    loader = FakeLoader(digests={"w": "right"})
    with serving(version=request.param, api_key="api-secret", admin_key="admin-secret", ring=loader) as fake:
        yield fake


# The process


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SGLangServer]]:
    servers: list[SGLangServer] = []

    def make(settings: ServerSettings = SETTINGS, **more: Any) -> SGLangServer:
        faults = {k: more.pop(k) for k in ("exit_at_start", "start_s", "unhealthy", "version") if k in more}
        monkeypatch.setenv("FAKE_SGLANG", json.dumps(faults))
        given = {"keys": KEYS, "launch": COMMAND, "folder": tmp_path / "logs", "draft_depth": 2} | more
        servers.append(SGLangServer(name=f"e{len(servers)}", settings=settings, **given))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def test_a_started_server_answers_and_serves_nothing_yet(started: Callable[..., SGLangServer]) -> None:
    server = started()
    assert isinstance(server, RemoteMember) and not server.alive() and not server.joined
    server.start()
    assert server.alive() and server.draft_depth == 2 and server.ranks == 1
    assert server.versions() == {"target": -1, "draft": -1} and server.manifest() == {}
    (error,) = ask(server, request())
    assert isinstance(error, RuntimeError) and "no verified target" in str(error)
    server.stop()
    server.stop()
    assert not server.alive()


def test_keys_are_in_no_argument_list_and_no_log(started: Callable[..., SGLangServer]) -> None:
    server = started()
    server.start()
    assert server._process is not None
    command = Path(f"/proc/{server._process.pid}/cmdline").read_text()
    assert "fake_sglang" in command and "secret" not in command
    assert "secret" not in server._process.log.read_text()
    assert stat.S_IMODE(server._process.log.stat().st_mode) == 0o600


def test_a_server_that_exits_is_an_error_with_the_end_of_its_log(started: Callable[..., SGLangServer]) -> None:
    server = started(exit_at_start="CUDA out of memory", start_timeout_s=60.0)
    start = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)'e0' exited with status 3.*e0\.log.*CUDA out of memory"):
        server.start()
    assert time.monotonic() - start < 20 and not server.alive()


def test_a_server_that_is_never_up_is_killed(started: Callable[..., SGLangServer]) -> None:
    server = started(unhealthy=True, start_timeout_s=3.0)
    with pytest.raises(RunError, match=r"(?s)was not up in time.*the fake starts"):
        server.start()
    assert not server.alive()


def test_a_port_that_was_taken_meanwhile_is_tried_again(
    started: Callable[..., SGLangServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from miles_spec.rollout import sglang_process

    with serving() as other:
        ports = iter([other.port, sglang_process.free_port("127.0.0.1")])
        monkeypatch.setattr(sglang_process, "free_port", lambda host: next(ports))
        server = started()
        server.start()
        assert server.alive() and not server.url.endswith(f":{other.port}")


def test_a_killed_server_is_noticed_and_starts_again_without_weights(started: Callable[..., SGLangServer]) -> None:
    server = started()
    server.start()
    assert server._process is not None
    server._versions["target"] = 3
    os.kill(server._process.pid, signal.SIGKILL)
    until_s = time.monotonic() + 5
    while server.alive() and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not server.alive()
    (error,) = ask(server, request())
    assert isinstance(error, aiohttp.ClientConnectionError)
    server.stop()
    server.start()
    assert server.alive() and server.versions()["target"] == -1


def test_another_depth_is_a_restart_without_weights(started: Callable[..., SGLangServer]) -> None:
    server = started()
    server.start()
    first, server._versions["target"] = server.url, 3
    server.set_draft_depth(2)
    assert server.url == first and server.versions()["target"] == 3, "the depth it has"
    server.set_draft_depth(0)
    assert server.draft_depth == 0 and server.versions() == {"target": -1}
    server.set_draft_depth(3)
    assert server.draft_depth == 3 and server.versions() == {"target": -1, "draft": -1}


def test_no_draft_no_depth(started: Callable[..., SGLangServer]) -> None:
    with pytest.raises(ValueError, match="has no draft"):
        started(replace(SETTINGS, draft_path=""), draft_depth=0).set_draft_depth(2)


def test_an_old_version_is_refused_by_name(started: Callable[..., SGLangServer]) -> None:
    server = started(version="0.5.16")
    with pytest.raises(RunError, match=r"0\.5\.16, and 0\.5\.17 is the oldest"):
        server.start()
    assert not server.alive()


def test_a_wrong_setting_is_refused_before_anything_starts(started: Callable[..., SGLangServer]) -> None:
    server = started(replace(SETTINGS, extra={"speculative_accept_threshold_acc": 0.5}))
    with pytest.raises(ValueError, match="would not have sampled"):
        server.start()
    assert server._process is None


def test_stop_ends_what_the_server_started(started: Callable[..., SGLangServer], tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = (
        f"import subprocess, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import fake_sglang\n"
        "if '--flags' not in sys.argv:\n"
        f"  open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '20']).pid))\n"
        "fake_sglang.main()"
    )
    server = started(launch=(sys.executable, "-c", program))
    server.start()
    server.stop()
    stat_file = Path(f"/proc/{child.read_text()}/stat")
    assert not stat_file.exists() or stat_file.read_text().rsplit(")", 1)[1].split()[0] == "Z"


# Joined servers


def test_a_joined_server_says_what_it_is_and_is_not_restarted(fake: FakeSGLang) -> None:
    server = joined(fake)
    assert server.joined and server.alive() and server.draft_depth == 3 and server.log_lines() == ""
    server.set_draft_depth(3)
    with pytest.raises(ValueError, match="--speculative-num-steps 0"):
        server.set_draft_depth(0)
    server.stop()
    assert fake.server is not None


def test_a_joined_server_without_the_loader_is_refused(fake: FakeSGLang) -> None:
    fake.info["custom_weight_loader"] = None
    with pytest.raises(RunError, match=r"'e0'.*--custom-weight-loader"):
        joined(fake)


def test_a_joined_server_that_would_verify_greedily_is_refused(fake: FakeSGLang) -> None:
    fake.info["device"] = "cpu"
    with pytest.raises(RunError, match="greedily"):
        joined(fake)
    fake.depth = 0
    joined(fake)


def test_a_wrong_key_is_refused(fake: FakeSGLang) -> None:
    with pytest.raises(RunError, match="refuses the key"):
        SGLangServer(name="e0", settings=SETTINGS, keys=Keys(api="no", admin="no"), join=fake.url).start()


# Generation


def test_requests_are_answered_with_the_versions_that_served_them(fake: FakeSGLang) -> None:
    server = joined(fake)
    serve(server, 4)
    done = ask(server, *(request(f"r{i}") for i in range(8)))
    assert [d.request_id for d in done if isinstance(d, Completion)] == [f"r{i}" for i in range(8)]
    assert all(d.tokens == (3, 4, 5, 6, 7, 8) and d.spec.verify_steps for d in done if isinstance(d, Completion))
    assert {(d.versions[0].target, d.versions[0].draft) for d in done if isinstance(d, Completion)} == {(4, None)}


def test_a_busy_server_says_so_and_a_broken_one_too(fake: FakeSGLang) -> None:
    server = joined(fake)
    serve(server)
    for status, kind in (
        (503, aiohttp.ClientResponseError),
        (429, aiohttp.ClientResponseError),
        (500, ConnectionError),
    ):
        fake.faults.busy, fake.faults.busy_status = 1, status
        (error,) = ask(server, request())
        assert isinstance(error, kind) and getattr(error, "status", 500) == status and "queue is full" in str(error)
    fake.faults.hang_up = 1
    (error,) = ask(server, request())
    assert isinstance(error, aiohttp.ClientConnectionError)
    assert isinstance(ask(server, request())[0], Completion), "after a failure nothing is left running"


def test_a_missing_counter_stops_the_request(fake: FakeSGLang) -> None:
    server = joined(fake)
    serve(server)
    fake.faults.drop = ("spec_verify_ct",)
    (error,) = ask(server, request())
    assert isinstance(error, RunError) and "spec_verify_ct" in str(error) and fake.version in str(error)


def test_abort_ends_one_request_and_not_those_with_a_longer_name(fake: FakeSGLang) -> None:
    server = joined(fake)
    serve(server)
    fake.faults.late_tokens_s = 0.01
    first, second = during(server, lambda http: server.abort(http, ["r1", "unknown"]), fake)
    assert first.finish == "abort" and len(first.tokens) < 100
    assert second.finish == "length" and len(second.tokens) == 100


def test_abort_of_all(fake: FakeSGLang) -> None:
    server = joined(fake)
    serve(server)
    fake.faults.late_tokens_s = 0.05
    assert [d.finish for d in during(server, lambda http: server.abort(http), fake)] == ["abort", "abort"]


def test_a_request_that_can_never_run_is_refused(fake: FakeSGLang) -> None:
    server = joined(fake)
    server.check(request(tokens=240))
    for bad in (request(tokens=253), Request(id="r", tokens=(1,) * 250, sampling=Sampling(max_new_tokens=1))):
        with pytest.raises(ValueError, match="room for 252"):
            server.check(bad)
    with pytest.raises(ValueError, match="ignore too"):
        server.check(request(ignore_eos=True, stop_token_ids=(5,)))


def probe(server: SGLangServer) -> bool:
    async def run() -> bool:
        async with aiohttp.ClientSession() as http:
            return await server.probe(http)

    return asyncio.run(run())


def test_a_probe_makes_a_token_only_where_that_can_be(fake: FakeSGLang) -> None:
    server = joined(fake)
    server.settings = replace(SETTINGS, release=("weights", "kv_cache"))

    def asked() -> str:
        fake.calls.clear()
        assert probe(server)
        return fake.calls[0][1]

    assert asked() == "/health_generate"
    server.begin_update(1, ["target"])
    assert asked() == "/health"
    server.end_update()
    server.release()
    assert asked() == "/health"
    server.wake()
    assert asked() == "/health_generate"
    fake.faults.unhealthy = True
    assert not probe(server)
    fake.stop()
    with pytest.raises(aiohttp.ClientConnectionError):
        probe(server)


# Memory and pauses


def test_pause_and_resume_use_the_admin_key(fake: FakeSGLang) -> None:
    server = joined(fake)
    server.pause()
    server.resume()
    assert fake.paths() == ["/pause_generation", "/continue_generation"] and fake.refused == 0


def test_memory_is_released_once_idle_and_taken_again(fake: FakeSGLang) -> None:
    server = joined(fake)
    with pytest.raises(ValueError, match=r"fleet\.release"):
        server.release()
    server.settings = replace(SETTINGS, release=("weights", "kv_cache"))
    serve(server)
    fake.calls.clear()
    server.release()
    server.release()
    (error,) = ask(server, request())
    assert isinstance(error, RuntimeError) and "released" in str(error)
    with pytest.raises(RuntimeError, match="wake it before a push"):
        server.begin_update(2, ["target"])
    server.wake()
    server.wake()
    # the prefix cache is not flushed while its memory is away
    assert fake.paths() == ["/flush_cache", "/release_memory_occupation", "/resume_memory_occupation"]
    assert [body["tags"] for _, _, body in fake.calls[1:]] == [["weights", "kv_cache"]] * 2
    server.begin_update(2, ["target"])
    server.end_update()
    assert isinstance(ask(server, request())[0], Completion)


def test_the_cache_alone_can_be_released(fake: FakeSGLang) -> None:
    server = joined(fake)
    server.settings = replace(SETTINGS, release=("kv_cache",))
    serve(server)
    fake.calls.clear()
    server.release()
    server.wake()
    assert [body["tags"] for _, _, body in fake.calls[1:]] == [["kv_cache"]] * 2


# Push sessions


def loader(fake: FakeSGLang) -> FakeLoader:
    assert isinstance(fake.ring, FakeLoader)
    return fake.ring


def bell_body(fake: FakeSGLang) -> dict[str, Any]:
    return [body for _, path, body in fake.calls if path == "/update_weights_from_tensor"][-1]


def test_a_session_rings_delivers_and_ends(fake: FakeSGLang) -> None:
    server = joined(fake)
    for role in ("target", "draft"):
        fake.calls.clear()
        server.begin_update(5, [role])
        assert server.versions()[role] == -1
        assert server.deliver({"do": "load", "bytes": 3}) == {"ok": True}
        assert server.end_update() == {role: {"w": "right"}} and server.versions()[role] == 5
        body = bell_body(fake)
        assert body["flush_cache"] is False and body["load_format"] == "miles_spec.sync.loader.load"
        if fake.version == "0.5.17":
            assert body["disable_draft_model"] is (role == "target") and "selector" not in body
            assert fake.paths() == ["/update_weights_from_tensor", "/flush_cache"]
        else:
            assert body["selector"] == role and "disable_draft_model" not in body
            begin, end = "/begin_weight_update", "/end_weight_update"
            assert sorted(fake.paths()) == sorted([begin, "/update_weights_from_tensor", end, "/flush_cache"])
            assert [body["selector"] for _, path, body in fake.calls if path == begin] == [role]
    assert [c["do"] for _, _, c in loader(fake).commands] == ["load", "digest", "end"] * 2
    assert loader(fake).open == 0


def push_both(server: SGLangServer, version: int) -> None:
    server.begin_push(["target", "draft"])
    for role in ("target", "draft"):
        server.begin_update(version, [role])
        server.deliver({"do": "load"})
        assert server.end_update() == {role: {"w": "right"}}


def test_both_roles_go_by_one_ring(fake: FakeSGLang) -> None:
    server = joined(fake)
    assert isinstance(server, PushMember)
    fake.calls.clear()
    push_both(server, 5)
    assert server.versions() == {"target": 5, "draft": 5}
    (error,) = ask(server, request())
    assert isinstance(error, RuntimeError) and "takes weights" in str(error)
    with pytest.raises(RuntimeError, match="a session is open"):
        server.learn("draft", METAS)
    assert "/flush_cache" not in fake.paths()
    server.end_push()
    paths, begin, end = fake.paths(), "/begin_weight_update", "/end_weight_update"
    assert paths.count("/update_weights_from_tensor") == paths.count("/flush_cache") == 1
    if fake.version != "0.5.17":
        assert paths[0] == begin and paths.count(end) == 1
        assert [body for _, path, body in fake.calls if path == begin] == [{"selector": "all"}]
    commands = [(c["do"], c.get("role")) for _, _, c in loader(fake).commands]
    ask_each = [(do, role) for role in ("target", "draft") for do in ("load", "digest")]
    assert [c for c in commands if c[0] != "end"] == ask_each and commands[-1][0] == "end"
    assert loader(fake).open == 0
    assert isinstance(ask(server, request())[0], Completion)


def test_a_role_that_breaks_off_is_rung_for_again(fake: FakeSGLang) -> None:
    server = joined(fake)
    server.begin_push(["target", "draft"])
    server.begin_update(1, ["target"])
    server.end_update()
    loader(fake).hang_up_at = "load"
    server.begin_update(1, ["draft"])
    with pytest.raises(ConnectionError):
        server.deliver({"do": "load"})
    with pytest.raises(ConnectionError, match="broke off the session at load"):
        server.end_update()
    assert loader(fake).open == 0 and server.versions() == {"target": 1, "draft": -1}
    loader(fake).hang_up_at = ""
    server.begin_update(1, ["draft"])
    assert bell_body(fake).get("selector", "draft") == "draft"
    assert server.end_update() == {"draft": {"w": "right"}}
    server.end_push()
    assert server.versions() == {"target": 1, "draft": 1}


@pytest.mark.parametrize("when", ["before the draft", "at the end"])
def test_a_loader_that_is_gone_between_two_roles(fake: FakeSGLang, when: str) -> None:
    server = joined(fake)
    server.begin_push(["target", "draft"])
    server.begin_update(1, ["target"])
    server.end_update()
    assert server._session is not None
    server._session._connections[0].close()
    if when == "before the draft":
        server.begin_update(1, ["draft"])
        with pytest.raises(ConnectionError):
            server.end_update()
    server.end_push()
    assert server.versions() == {"target": 1, "draft": -1} and loader(fake).open == 0


def test_a_push_that_does_not_end_serves_nothing(fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_spec.rollout import sglang

    server = joined(fake)
    monkeypatch.setattr(sglang, "FLUSH_S", 0.2)
    fake.faults.flush_busy = 1000
    push_both(server, 1)
    with pytest.raises(RunError, match="Pending requests"):
        server.end_push()
    assert server.versions() == {"target": -1, "draft": -1} and loader(fake).open == 0
    fake.faults.flush_busy = 0
    push_both(server, 1)
    server.end_push()
    assert server.versions() == {"target": 1, "draft": 1}


def test_every_rank_obeys_and_all_must_agree(fake: FakeSGLang) -> None:
    fake.info["tp_size"] = 3
    loader(fake).other_digests = {2: {"w": "wrong", "extra": "e"}}
    server = joined(fake)
    assert server.ranks == 3
    server.begin_update(1, ["target"])
    server.deliver({"do": "load"})
    served = server.end_update()["target"]
    assert served["w"] == "rank 0: right, rank 1: right, rank 2: wrong" and "rank 2: e" in served["extra"]
    assert sorted(r for r, _, c in loader(fake).commands if c["do"] == "load") == [0, 1, 2]


def test_learning_makes_the_manifest(fake: FakeSGLang) -> None:
    server = joined(fake)
    serve(server)
    server.learn("target", METAS)
    assert server.manifest() == {"target": METAS}
    assert server.versions()["target"] == -1, "learning fills the served memory with anything"
    loader(fake).faults = {"learn": ["the engine has no place for tensor 'w'", "served tensor 'x' is reached by none"]}
    with pytest.raises(RunError, match="no place for tensor 'w'; served tensor 'x'"):
        server.learn("target", METAS)
    loader(fake).faults = {"learn": "broken"}
    with pytest.raises(RunError, match="cannot take the target: broken"):
        server.learn("target", METAS)


def test_a_fault_is_an_answer_and_the_session_goes_on(fake: FakeSGLang) -> None:
    server = joined(fake)
    loader(fake).faults = {"load": "no tensor 'w'"}
    server.begin_update(1, ["target"])
    assert server.deliver({"do": "load"}) == {"fault": "no tensor 'w'"}
    assert server.end_update() == {"target": {"w": "right"}}


def test_a_loader_that_goes_away_ends_the_session_and_the_next_one_works(fake: FakeSGLang) -> None:
    server = joined(fake)
    loader(fake).hang_up_at = "load"
    server.begin_update(1, ["target"])
    with pytest.raises(ConnectionError):
        server.deliver({"do": "load"})
    with pytest.raises(ConnectionError, match="'e0' broke off the session at load"):
        server.end_update()
    assert server.versions()["target"] == -1
    loader(fake).hang_up_at = ""
    serve(server, 2)
    assert server.versions()["target"] == 2


def test_a_late_loader_is_a_timeout(fake: FakeSGLang) -> None:
    server = joined(fake, push_timeout_s=0.3)
    loader(fake).faults = {"load": 1.0}
    server.begin_update(1, ["target"])
    with pytest.raises(TimeoutError):
        server.deliver({"do": "load"})
    with pytest.raises((ConnectionError, TimeoutError)):
        server.end_update()
    assert server.versions()["target"] == -1


def test_digests_that_cannot_be_read_are_an_error(fake: FakeSGLang) -> None:
    server = joined(fake)
    loader(fake).faults = {"digest": "learn again"}
    server.begin_update(1, ["target"])
    with pytest.raises(RunError, match="learn again"):
        server.end_update()
    assert server.versions()["target"] == -1 and loader(fake).open == 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"no_loader": True}, "without calling the loader"),
        ({"refuse": ("/update_weights_from_tensor",)}, "400.*the fake refuses"),
    ],
)
def test_a_doorbell_that_nobody_hears_is_told_at_once(fake: FakeSGLang, fault: dict[str, Any], says: str) -> None:
    server = joined(fake, push_timeout_s=30.0)
    for name, value in fault.items():
        setattr(fake.faults, name, value)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=says):
        server.begin_update(1, ["target"])
    assert time.monotonic() - start < 5
    with pytest.raises(RuntimeError, match="no session"):
        server.end_update()
    fake.faults.no_loader, fake.faults.refuse = False, ()
    serve(server, 2)


def test_a_cache_that_cannot_be_flushed_is_an_error(fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_spec.rollout import sglang

    server = joined(fake)
    fake.faults.flush_busy = 2
    serve(server, 1)
    assert server.versions()["target"] == 1, "it is tried again"
    monkeypatch.setattr(sglang, "FLUSH_S", 0.2)
    fake.faults.flush_busy = 1000
    with pytest.raises(RunError, match="Pending requests"):
        serve(server, 2)
    assert server.versions()["target"] == -1


def test_sessions_and_requests_keep_out_of_each_others_way(fake: FakeSGLang) -> None:
    server = joined(fake)
    server.begin_update(1, ["target"])
    with pytest.raises(RuntimeError, match="a session is open"):
        server.begin_update(1, ["target"])
    (error,) = ask(server, request())
    assert isinstance(error, RuntimeError) and "takes weights" in str(error)
    server.end_update()
    fake.faults.late_tokens_s = 0.003

    def push(http: aiohttp.ClientSession) -> None:
        with pytest.raises(RuntimeError, match="while 2 requests run"):
            server.begin_update(2, ["target"])

    assert [d.finish for d in during(server, push, fake)] == ["length", "length"]
    serve(server, 2)


def test_an_old_server_gets_its_target_first(fake: FakeSGLang) -> None:
    server = joined(fake)
    if fake.version == "0.5.17":
        with pytest.raises(ValueError, match="target before its draft"):
            server.begin_update(1, ["draft"])
        serve(server)
    server.begin_update(1, ["draft"])
    server.end_update()


def test_a_role_that_is_not_served_is_refused(fake: FakeSGLang) -> None:
    fake.depth = 0
    with pytest.raises(ValueError, match="serves no draft"):
        joined(fake).begin_update(1, ["draft"])


def test_who_leaves_does_not_generate_until_a_push(fake: FakeSGLang, caplog: pytest.LogCaptureFixture) -> None:
    server = joined(fake)
    serve(server, 3)
    with caplog.at_level(logging.WARNING):
        server.leave("its digest differs")
    assert "its digest differs" in caplog.text and server.versions() == {"target": -1, "draft": -1}
    assert isinstance(ask(server, request())[0], RuntimeError)
    serve(server, 3)
    assert isinstance(ask(server, request())[0], Completion)
