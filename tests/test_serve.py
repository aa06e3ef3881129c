"""The rollout service: keys, what is told, and how servers that died come back; servers are fakes."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fake_server import FakeServer, fleet_of, wait_until
from miles_spec import serve as module
from miles_spec.config import FleetConfig, RolloutConfig, RunConfig
from miles_spec.rollout.launch import ADMIN_KEY, API_KEY
from miles_spec.rollout.sglang_api import Keys
from miles_spec.serve import _until_told, alone, described, serve, watch, write_keys
from miles_spec.types import RunError


class Server:
    """One server as `watch` sees it."""

    def __init__(self, name: str, version: int = 1) -> None:
        self.name, self.url, self.version, self.runs = name, f"http://{name}:1", version, True
        self.draft_depth = 3
        self.features = SimpleNamespace(version="0.5.21")

    def versions(self) -> dict[str, int]:
        return {"target": self.version, "draft": 4}


class Hosted:
    """Servers, pushes to them, and faults of those; `told` is set after `looks` looks, before each of which what
    `then` has for it happens."""

    def __init__(self, *servers: Server, looks: int, then: Any = None) -> None:
        self.servers, self.looks, self.then = servers, looks, then or {}
        self.pushed: list[str] = []
        self.faults: list[Exception] = []
        self.told = threading.Event()

    def look(self) -> None:
        pass

    def members(self) -> list[Server]:
        return [server for server in self.servers if server.runs]

    def push(self, servers: Sequence[Server]) -> None:
        for server in servers:
            if self.faults:
                raise self.faults.pop(0)
            self.pushed.append(server.name)
            server.version = 1

    def watch(self, front: Any = None, start_timeout_s: float = 60.0) -> list[list[str]]:
        """The addresses of each announcement."""
        announced: list[list[str]] = []
        number = 0

        def wait(_: float) -> None:
            nonlocal number
            number += 1
            self.then.get(number, lambda: None)()
            if number == self.looks:
                self.told.set()

        told: Any = SimpleNamespace(is_set=self.told.is_set, wait=wait)
        watch(self, front, start_timeout_s, told, lambda s: announced.append([x.url for x in s]))  # type: ignore[arg-type]
        return announced


def test_what_serves_is_announced_once() -> None:
    hosted = Hosted(Server("a"), Server("b"), looks=5)
    assert hosted.watch() == [["http://a:1", "http://b:1"]]
    assert hosted.pushed == []


def test_a_server_that_started_anew_is_pushed_to_before_it_is_announced() -> None:
    a, b = Server("a"), Server("b")

    def die() -> None:
        a.runs = False

    def back() -> None:
        a.runs, a.version, a.url = True, -1, "http://a:2"

    hosted = Hosted(a, b, looks=6, then={1: die, 3: back})
    assert hosted.watch() == [["http://a:1", "http://b:1"], ["http://a:2", "http://b:1"]]
    assert hosted.pushed == ["a"]


def test_a_server_that_hangs_is_started_again_and_pushed_to() -> None:
    class Started(FakeServer):
        """Answers at another address after each start."""

        @property
        def url(self) -> str:
            return f"http://{self.name}:{self.starts}"

    server = Started("a")
    fleet = fleet_of([server], dead_after_s=0.2)

    class Fleets(Hosted):
        def look(self) -> None:
            fleet.look()

        def members(self) -> list[Any]:
            return list(fleet.members())

    def hang() -> None:
        server.hung = True

    hosted = Fleets(looks=10, then={2: hang, 9: lambda: wait_until(lambda: len(fleet.members()) == 1)})
    assert hosted.watch() == [["http://a:0"], ["http://a:1"]]
    assert hosted.pushed == ["a"] and server.starts == server.explained == 1


def test_a_push_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    hosted = Hosted(Server("a", -1), Server("b"), looks=4)
    hosted.faults = [RunError("not verified"), ConnectionError("gone")]
    assert hosted.watch() == [["http://b:1"], ["http://a:1", "http://b:1"]]
    assert hosted.pushed == ["a"]
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert "not verified" in caplog.text and "gone" in caplog.text


def test_the_router_leads_to_what_serves() -> None:
    a, b = Server("a", -1), Server("b")
    led: list[list[str]] = []
    hosted = Hosted(a, b, looks=3)
    hosted.faults = [RunError("not verified")]
    hosted.watch(front=SimpleNamespace(lead_to=led.append))
    assert led == [["http://b:1"], ["http://a:1", "http://b:1"], ["http://a:1", "http://b:1"]]


def test_without_any_server_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    a = Server("a")
    a.runs = False
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(RunError, match="no server has served for 120 s"):
        Hosted(a, looks=50).watch()


def test_keys_are_the_users_alone(tmp_path: Path) -> None:
    path, keys = tmp_path / "serve" / "keys.json", Keys.random()
    path.parent.mkdir()
    path.write_text("old")
    path.chmod(0o644)
    write_keys(keys, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text()) == {API_KEY: keys.api, ADMIN_KEY: keys.admin}


def test_what_is_told(tmp_path: Path) -> None:
    text = described([Server("a"), Server("b")], SimpleNamespace(url="http://r:3"), tmp_path)  # type: ignore[arg-type, list-item]
    assert "http://a:1  SGLang 0.5.21, drafts 3 tokens, target version 1, draft version 4, verified\n" in text
    assert "http://r:3  router" in text
    assert str(tmp_path / "keys.json") in text
    assert 'rollout.urls = ["http://a:1", "http://b:1"]' in text
    assert "draft.num_steps = 3" in text


def test_settings_of_servers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    config = alone(RunConfig(sglang={"tp-size": 2}))
    assert config.sglang == {"enable_metrics": True, "tp_size": 2, "mem_fraction_static": module.SHARE_OF_MEMORY}
    assert config.fleet.release == "nothing"
    given = {"mem-fraction-static": 0.3, "enable-metrics": False}
    assert alone(RunConfig(sglang=given)).sglang == {"enable_metrics": False, "mem_fraction_static": 0.3}
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    assert alone(RunConfig()).sglang == {"enable_metrics": True}


def test_only_servers_that_it_starts() -> None:
    with pytest.raises(ValueError, match=r'rollout\.engine is "embedded"'):
        serve(RunConfig())
    joined = RolloutConfig(engine="sglang", urls=("http://a:1",))
    with pytest.raises(ValueError, match=r"take rollout\.urls out"):
        serve(RunConfig(rollout=joined))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ended = []
    with _until_told() as told:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
            raise AssertionError("it went on")
        finally:
            ended.append(told.is_set())
            # a second signal is as always, also while the first one's cleaning goes on
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert ended == [True]


def test_what_it_started_has_ended_and_the_keys_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped: list[bool] = []
    seen: list[object] = []

    class Broken:
        def __init__(self, config: RunConfig, policy: Any, folder: Path, max_context: int, keys: Keys) -> None:
            seen.extend([max_context, policy])
            self.keys = folder / "keys.json"

        def start(self) -> None:
            seen.append(self.keys.exists())
            raise RunError("it does not come up")

        def stop(self) -> None:
            stopped.append(True)

    monkeypatch.setattr(module, "Hosted", Broken)
    monkeypatch.setattr(module, "load", lambda config: SimpleNamespace(policy="policy"))
    config = RunConfig(out=str(tmp_path), rollout=RolloutConfig(engine="sglang"), fleet=FleetConfig(engines=2))
    config = replace(config, data=replace(config.data, max_prompt_tokens=10))
    with pytest.raises(RunError, match="it does not come up"):
        serve(config)
    assert seen == [10 + config.rollout.max_new_tokens, "policy", True]
    assert stopped == [True]
    assert not (tmp_path / "serve" / "keys.json").exists()
