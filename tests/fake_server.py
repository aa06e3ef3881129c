"""A server without HTTP and without a model, with faults to inject, and fleets of such servers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import aiohttp

from miles_spec.rollout.fleet import Fleet
from miles_spec.types import Completion, Request, Role, Sampling, SpecCounts, VersionSpan

MOST = 4


class FakeServer:
    """Generates `max_new_tokens` times the number 7, a token every `token_s`; faults are set or injected by calls.

    `on_sent(request)` is called in the fleet's loop when a request arrives, before it runs.
    """

    def __init__(self, name: str, *, version: int = 1, joined: bool = False, token_s: float = 0.001) -> None:
        self.name, self.joined, self.token_s = name, joined, token_s
        self.draft_depth = 3
        self.version = version
        self.up = True
        self.hung = False
        self.stubborn = False
        """Answers late even where the caller went away."""
        self.busy: list[int] = []
        """Status of the next answers."""
        self.says = ""
        """What stands in them."""
        self.drops = 0
        """Connections that it will break; their requests go on until they are aborted."""
        self.cut: set[str] = set()
        """Those."""
        self.deaf = 0
        """Aborts that it will not notice."""
        self.start_errors: list[Exception] = []
        self.start_s = 0.0
        self.most = MOST
        self.asleep = False
        self.memory_errors: list[Exception] = []
        self.starts = self.stops = self.explained = 0
        self.sent: list[str] = []
        self.aborts: list[str] = []
        self.left: list[str] = []
        self.running: dict[str, asyncio.Event] = {}
        self.probes = 0
        self.on_sent: Callable[[Request], None] = lambda request: None
        self.on_start: Callable[[], object] = lambda: None

    def start(self) -> None:
        self.starts += 1
        self.on_start()
        time.sleep(self.start_s)
        if self.start_errors:
            raise self.start_errors.pop(0)
        self.up, self.hung, self.version = True, False, -1

    def stop(self) -> None:
        self.stops += 1
        self.up = False

    def alive(self) -> bool:
        return self.up or self.joined

    def explain(self) -> None:
        self.explained += 1

    def check(self, request: Request) -> None:
        if request.sampling.stop:
            raise ValueError(f"request {request.id!r} has a stop string")

    def release(self) -> None:
        if self.memory_errors:
            raise self.memory_errors.pop(0)
        self.asleep = True

    def wake(self) -> None:
        if self.memory_errors:
            raise self.memory_errors.pop(0)
        self.asleep = False

    def versions(self) -> Mapping[Role, int]:
        return {"target": self.version, "draft": self.version}

    def leave(self, reason: str) -> None:
        self.left.append(reason)
        self.version = -1

    def set_draft_depth(self, depth: int) -> None:
        self.draft_depth, self.version = depth, -1

    def die(self) -> None:
        """As kill -9 does: whoever talks to it is cut off at once."""
        self.up = False
        for event in self.running.values():
            event.set()
        for request_id in list(self.cut):
            self._end(request_id)

    async def probe(self, http: aiohttp.ClientSession) -> bool:
        self.probes += 1
        self._reach()
        started = self.starts
        while self.hung or self.starts != started:  # one that has died never answers
            await asyncio.sleep(0.005)
        return True

    async def abort(self, http: aiohttp.ClientSession, request_ids: Iterable[str]) -> None:
        self._reach()
        known = [request_id for request_id in request_ids if request_id in self.running]
        self.aborts += known
        if self.deaf:
            self.deaf -= 1
            return
        for request_id in known:
            self.running[request_id].set()
            if request_id in self.cut:
                self._end(request_id)

    async def complete(self, http: aiohttp.ClientSession, request: Request) -> Completion:
        self._reach()
        assert self.version >= 0, "it serves nothing that was verified"
        self.sent.append(request.id)
        self.on_sent(request)
        self._reach()
        if self.busy:
            raise refusal(self.busy.pop(0), self.says)
        assert request.id not in RUNNING, "a request runs twice"
        assert len(self.running) < self.most, "more requests than may run on one server"
        ended, version = asyncio.Event(), self.version
        self.running[request.id] = ended
        RUNNING[request.id] = self
        if self.drops:
            self.drops -= 1
            self.cut.add(request.id)
            raise aiohttp.ServerDisconnectedError
        try:
            return await self._decode(request, ended, version)
        finally:
            self._end(request.id)

    def _end(self, request_id: str) -> None:
        del self.running[request_id], RUNNING[request_id]
        self.cut.discard(request_id)

    async def _decode(self, request: Request, ended: asyncio.Event, version: int) -> Completion:
        made, finish = 0, "length"
        while made < request.sampling.max_new_tokens:
            try:
                await asyncio.sleep(self.token_s)
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
                made = request.sampling.max_new_tokens
                break
            self._reach()
            if ended.is_set():
                finish = "abort"
                break
            made += not self.hung
        return Completion(
            request_id=request.id,
            tokens=(7,) * made,
            logprobs=(-1.0,) * made,
            accepted=(),
            versions=(VersionSpan(start=0, end=made, target=version, draft=version),),
            spec=SpecCounts(),
            finish=finish,  # type: ignore[arg-type]
            text="",
        )

    def _reach(self) -> None:
        if not self.up:
            key = SimpleNamespace(host=self.name, port=1, ssl=False, is_ssl=False)
            raise aiohttp.ClientConnectorError(key, OSError("refused"))  # type: ignore[arg-type]


RUNNING: dict[str, FakeServer] = {}
"""All requests that run, and where."""
FLEETS: list[Fleet] = []
"""Of the test at hand."""


def refusal(status: int, says: str = "") -> aiohttp.ClientResponseError:
    asked: Any = SimpleNamespace(real_url="http://fake/generate")
    return aiohttp.ClientResponseError(asked, (), status=status, message=says)


def requests(count: int, tokens: int = 5, same: int = 1) -> list[Request]:
    """`count` requests, `same` to each prompt."""
    return [
        Request(id=f"r{i}", tokens=(1, 2 + i // same), sampling=Sampling(max_new_tokens=tokens)) for i in range(count)
    ]


def push(server: Any) -> None:
    """What the assembly does to recover a server."""
    server.version = 1


def fleet_of(servers: Sequence[FakeServer], recover: Callable[[Any], None] = push, **settings: Any) -> Fleet:
    defaults: dict[str, Any] = dict(
        max_running=MOST, max_context=100, probe_s=0.01, dead_after_s=20.0, start_timeout_s=20.0, request_timeout_s=20.0
    )
    FLEETS.append(fleet := Fleet(servers, recover=recover, **defaults | settings))
    return fleet


def leave_nothing() -> None:
    """After a test: no server is being started any more, which would log into the next one, and no request runs."""
    while FLEETS:
        health = FLEETS.pop()._health
        health.close()
        health.join()
    left = dict(RUNNING)
    RUNNING.clear()
    assert not left, "a call left requests running"


def answers(fleet: Fleet, asked: Sequence[Request]) -> list[Completion]:
    """Generates, and checks that each request has one completion, in order, and one call of `on_done`."""
    seen: list[Completion] = []
    done = fleet.generate(asked, seen.append)
    assert [c.request_id for c in done] == [r.id for r in asked]
    assert Counter(c.request_id for c in seen) == Counter(r.id for r in asked)
    return done


def complete(fleet: Fleet, asked: Sequence[Request]) -> list[Completion]:
    """As `answers`, all of them whole."""
    done = answers(fleet, asked)
    assert [len(c.tokens) for c in done] == [r.sampling.max_new_tokens for r in asked]
    assert {c.finish for c in done} == {"length"}
    return done


def wait_until(holds: Callable[[], bool], most_s: float = 10.0) -> None:
    until = time.monotonic() + most_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)
