"""One server: its process, its requests and its memory, against the fake of SGLang."""

from __future__ import annotations

import asyncio
import json
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

from fake_sglang import COMMAND, FakeSGLang, serving
from joined import SETTINGS, ask, during, joined, request, serve
from miles_spec.rollout.engine import RemoteMember
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.types import Completion, Request, RunError, Sampling

KEYS = Keys(api="api-secret", admin="admin-secret")


# The process


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SGLangServer]]:
    servers: list[SGLangServer] = []

    def make(settings: ServerSettings = SETTINGS, **more: Any) -> SGLangServer:
        names = ("exit_at_start", "start_s", "unhealthy", "version", "adaptive", "last_words")
        faults = {name: more.pop(name) for name in names if name in more}
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


def test_a_started_server_is_warm_before_its_garbage_collector_leaves_out_what_is_there(
    started: Callable[..., SGLangServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ask = Api.ask

    def recorded(self: Api, path: str, *args: Any, **options: Any) -> str:
        asked.append(path)
        return ask(self, path, *args, **options)

    monkeypatch.setattr(Api, "ask", recorded)
    started().start()
    assert asked[-2:] == ["/generate", "/freeze_gc"]


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
        server = started(last_words="\n" * 100)  # SGLang writes more tracebacks before it ends
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


def test_a_server_that_ended_says_how(started: Callable[..., SGLangServer], caplog: pytest.LogCaptureFixture) -> None:
    server = started()
    server.start()
    assert server._process is not None
    with server._process.log.open("a") as log:
        log.write("an illegal memory access\n")
    os.kill(server._process.pid, signal.SIGKILL)
    until_s = time.monotonic() + 5
    while server.alive() and time.monotonic() < until_s:
        time.sleep(0.01)
    server.explain()
    assert "ended with status -9" in caplog.text and "an illegal memory access" in caplog.text


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


def test_a_server_that_would_draft_for_any_number_of_sequences_is_refused(
    started: Callable[..., SGLangServer], tmp_path: Path
) -> None:
    few = replace(SETTINGS, max_batch=5)
    server = started(few)
    server.start()
    assert json.loads((tmp_path / "logs" / "e0.depths.json").read_text())["6"] == {"candidate_steps": [0]}
    server.set_draft_depth(0)
    with pytest.raises(
        RunError, match=r"at most 5 sequences together and drafts for any number; .*draft\.max_batch = 0"
    ):
        started(few, adaptive=False).start()


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


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("speculative_use_rejection_sampling", 'set rollout.verify to "rejection", or start it without'),
        ("speculative_use_block_verification", "verifies whole blocks"),
        ("speculative_adaptive", "changes its draft depth"),
    ],
)
def test_a_joined_server_that_drafts_otherwise_is_refused(fake: FakeSGLang, key: str, says: str) -> None:
    fake.info[key] = True
    with pytest.raises(RunError, match=says):
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
    for status in (503, 429, 500):
        fake.faults.busy, fake.faults.busy_status = 1, status
        (error,) = ask(server, request())
        assert isinstance(error, aiohttp.ClientResponseError) and error.status == status
        assert "queue is full" in error.message
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
