"""Keys, abort, pause, and servers that die or lose their draft."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from miles_spec.rollout.fleet import Fleet
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.sync.transports import Ipc
from miles_spec.types import RunError

from .conftest import CONTEXT


def test_a_wrong_key_is_refused(host: Any) -> None:
    right, wrong = host.keys, "x" * 32
    tiny = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}}
    for keys in (Keys(), Keys(api=wrong, admin=wrong)):
        api = Api(host.server.url, keys)
        assert api.call("/generate", tiny, timeout_s=30)[0] == 401
        for path in ("/update_weights_from_tensor", "/begin_weight_update", "/flush_cache", "/pause_generation"):
            assert api.call(path, {}, admin=True, timeout_s=30)[0] in (401, 403)
        with pytest.raises(RunError, match="refuses the key"):
            api.features()
    for path in ("/update_weights_from_tensor", "/weights_checker", "/abort_request", "/server_info"):
        api = Api(host.server.url, Keys(api=right.api, admin=right.api))  # the key for generation is not enough
        assert api.call(path, None if path == "/server_info" else {}, admin=True, timeout_s=30)[0] in (401, 403)
    assert Api(host.server.url, right).call("/generate", tiny, timeout_s=30)[0] == 200


def test_keys_stand_in_no_log_and_no_command_line(host: Any) -> None:
    log = host.server._process.log.read_text(errors="replace")
    command = Path(f"/proc/{host.server._process.pid}/cmdline").read_text()
    for key in (host.keys.api, host.keys.admin):
        assert key not in log
        assert key not in command
    assert host.server._process.log.stat().st_mode & 0o77 == 0


def test_a_server_that_hangs_says_where(host: Any) -> None:
    """The process that holds the model too, which has been pushed to."""
    host.server.explain()
    text = host.server._process.log.read_text(errors="replace")
    assert "in event_loop" in text and "in serve" in text
    assert host.server.alive()


def test_abort_returns_what_there_is(host: Any, sampled: Any) -> None:
    requests = sampled(max_new_tokens=200, ignore_eos=True)[:2]

    async def run() -> Any:
        async with aiohttp.ClientSession() as http:
            tasks = [asyncio.create_task(host.server.complete(http, request)) for request in requests]
            await asyncio.sleep(1.5)
            await host.server.abort(http, [requests[0].id])
            return await asyncio.gather(*tasks)

    short, long = asyncio.run(run())
    assert short.finish == "abort"
    assert 0 < len(short.tokens) == len(short.logprobs) < 200
    assert long.finish == "length"
    assert long.tokens[: len(short.tokens)] != short.tokens  # of other prompts
    ours = host.pair.embedded().generate(requests)
    assert short.tokens == ours[0].tokens[: len(short.tokens)]
    assert long.tokens == ours[1].tokens


def test_pause_keeps_requests_and_resume_goes_on(host: Any, sampled: Any) -> None:
    requests = sampled(max_new_tokens=60, ignore_eos=True)[:2]
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(host.generate(requests)))
    thread.start()
    time.sleep(1.0)
    host.server.pause()
    time.sleep(1.5)
    assert thread.is_alive()
    host.server.resume()
    thread.join()
    for ours, theirs in zip(host.pair.embedded().generate(requests), results, strict=True):
        assert theirs.tokens == ours.tokens
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=2e-5)


def fleet_of(host: Any, **overrides: Any) -> Fleet:
    def recover(server: Any) -> None:
        host.learn()
        host.push(version=version)

    version = host.server.versions()["target"]
    settings = {"probe_s": 0.5, "dead_after_s": 60.0, "start_timeout_s": 120.0, "request_timeout_s": 120.0}
    return Fleet([host.server], recover=recover, max_running=4, max_context=CONTEXT, **(settings | overrides))


def test_a_server_killed_while_it_generates_loses_nothing(host: Any, sampled: Any) -> None:
    requests, process = sampled(max_new_tokens=24), host.server._process
    fleet, seen = fleet_of(host), []

    def kill(completion: Any) -> None:
        seen.append(completion.request_id)
        if len(seen) == 2:
            os.killpg(process.pid, signal.SIGKILL)

    completions = fleet.generate(requests, kill)
    assert sorted(seen) == [request.id for request in requests]
    assert fleet.restarts == 1
    assert host.server._process.pid != process.pid
    ours = host.pair.embedded().generate(requests)
    assert [c.tokens for c in completions] == [c.tokens for c in ours]
    assert {span.target for c in completions for span in c.versions} == {host.server.versions()["target"]}


def test_a_late_server_is_suspect_and_serves_on(host: Any, sampled: Any) -> None:
    requests, process = sampled(max_new_tokens=24), host.server._process
    fleet, states = fleet_of(host, dead_after_s=8.0), set()

    def stall() -> None:
        time.sleep(0.7)
        os.killpg(process.pid, signal.SIGSTOP)
        until_s = time.monotonic() + 5
        while time.monotonic() < until_s:
            states.update(seat.state for seat in fleet._seats.values())
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGCONT)

    thread = threading.Thread(target=stall)
    thread.start()
    completions = fleet.generate(requests)
    thread.join()
    assert "suspect" in states
    assert fleet.restarts == 0
    ours = host.pair.embedded().generate(requests)
    assert [c.tokens for c in completions] == [c.tokens for c in ours]


def test_a_draft_that_fails_leaves_a_server_without_speculation(host: Any, sampled: Any) -> None:
    class Broken(Ipc):
        def send(self, members: Any, role: Any, bucket: Any) -> Any:
            if role == "draft":
                bucket = [(name, tensor + 1) for name, tensor in bucket]
            return super().send(members, role, bucket)

    before = host.server._process.pid
    target, draft = host.push(host.pair.other(5), Broken(torch.device("cpu")))
    assert target.verified
    assert not draft.verified
    assert draft.attempts == 2
    assert not host.syncer.drafting(host.server)
    assert host.server.draft_depth == 0
    assert host.server._process.pid != before
    assert "draft" not in host.server.versions()
    assert host.server.versions()["target"] == target.version
    requests = sampled(max_new_tokens=12)
    for ours, theirs in zip(host.pair.embedded(0).generate(requests), host.generate(requests), strict=True):
        assert theirs.tokens == ours.tokens
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=2e-5)
        assert theirs.spec.verify_steps == 0
    for temperature, top_p in ((0.7, 1.0), (1.0, 1.0), (1.0, 0.8), (0.7, 0.8)):
        requests = sampled(temperature=temperature, top_p=top_p, max_new_tokens=12)
        for request, completion in zip(requests, host.generate(requests), strict=True):
            expected = host.reference(request, completion)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=1e-4)
