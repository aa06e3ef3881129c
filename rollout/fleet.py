"""Several servers as one engine.

Invariant: all servers that answer one `generate` serve the same verified target, and `generate` is the only place that
sends them requests. Which server gets a request is decided in `dispatch`, what becomes of it in `call`, and which
servers may generate at all in `health`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import aiohttp

from miles_spec.rollout.call import Call, Counts
from miles_spec.rollout.dispatch import Seat, Server
from miles_spec.rollout.engine import check_room
from miles_spec.rollout.health import Health
from miles_spec.types import Completion, EngineTimes, Request, Role, RunError

log = logging.getLogger(__name__)


class Fleet:
    """An `Engine` over servers."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        recover: Callable[[Any], None],
        max_running: int,
        max_context: int,
        releases: bool = False,
        probe_s: float,
        dead_after_s: float,
        start_timeout_s: float,
        request_timeout_s: float,
        name: str = "fleet",
    ) -> None:
        """`recover(server)` pushes the trainer's weights, verified, or raises; it is called in a thread of its own.

        At most `max_running` requests run on each server. `releases` says whether servers can give their memory back. A
        server that answers no probe for `dead_after_s` is dead. `start_timeout_s` is for bringing one server back, and
        for waiting while none generates. A response that takes longer than `request_timeout_s` is made again.
        """
        names = [server.name for server in servers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a fleet needs at least one server, each with a name of its own, not {names}")
        self.name = name
        self.max_running = max_running
        self.max_context = max_context
        self._releases = releases
        self.draft_depth = servers[0].draft_depth
        self._dead_after_s = dead_after_s
        self._request_timeout_s = request_timeout_s
        self._seats = {server.name: Seat(server=server) for server in servers}
        self._health = Health(
            self._seats,
            recover=recover,
            probe_s=probe_s,
            dead_after_s=dead_after_s,
            start_timeout_s=start_timeout_s,
        )
        self._counts = Counts()
        self._call: Call | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.RLock()
        self._asleep = False
        self._seconds, self._tokens = 0.0, 0
        self._told = 0, 0

    @property
    def restarts(self) -> int:
        """Servers that came up again after they had died, since the start."""
        return self._health.restarts

    @property
    def retries(self) -> int:
        """Requests sent again because a server refused them, failed at them or hung up, since the start."""
        return self._counts.retries

    @property
    def requeued(self) -> int:
        """Requests sent again because their server died or was late, since the start."""
        return self._counts.requeued

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts all servers at once. Raises the first error if any does not come up; then none runs on."""
        pool = ThreadPoolExecutor(len(self._seats))
        starts = [pool.submit(seat.server.start) for seat in self._seats.values()]
        try:
            wait(starts, return_when=FIRST_EXCEPTION)
            for start in starts:
                if start.done():
                    start.result()
        except BaseException:
            self.stop()
            pool.shutdown()
            self.stop()  # what came up in between
            raise
        pool.shutdown()

    def stop(self) -> None:
        """Ends all servers that are ours, also those that are being started again."""
        self._health.close()
        self._all(self._seats.values(), lambda seat: seat.server.stop())
        if self._health.join():  # one may have come up in between
            self._all(self._seats.values(), lambda seat: seat.server.stop())

    @staticmethod
    def _all(seats: Collection[Seat], work: Callable[[Seat], None]) -> None:
        """Does `work` for all at once; raises the first error when all are through."""
        with ThreadPoolExecutor(len(seats) or 1) as pool:
            done = [pool.submit(work, seat) for seat in seats]
        for future in done:
            future.result()

    def look(self) -> None:
        """Asks all servers, between two calls of `generate`, whether they are well: one that hangs is noticed only by
        asking, and started again as within a call."""

        async def look() -> None:
            async with self._http() as http:
                await self._health.look(http)

        asyncio.run(look())

    # Engine

    def members(self) -> Sequence[Server]:
        """See `Engine.members`: without those that are dead, being started again, or in doubt; perhaps none.

        A process that has exited is noticed here, too.
        """
        if self._call is None and not self._asleep:
            self._health.notice_exits()
        return [s.server for s in self._seats.values() if s.state in ("serving", "waiting for weights")]

    def versions(self) -> Mapping[Role, int]:
        """See `Engine.versions`: the target's that all who may generate agree on, and the oldest draft of theirs.

        -1 where no server may generate.
        """
        known = [seat.server.versions() for seat in self._health.up()]
        newest = max([v["target"] for v in known], default=-1)
        versions: dict[Role, int] = {"target": newest}
        drafts = [v["draft"] for v in known if v["target"] == newest and "draft" in v]
        if drafts:
            versions["draft"] = min((d for d in drafts if d >= 0), default=-1)
        return versions

    def set_draft_depth(self, depth: int) -> None:
        """See `Engine.set_draft_depth`. Waits for servers that are being started again."""
        self._health.join()
        self._all(self._health.up(), lambda seat: seat.server.set_draft_depth(depth))
        self.draft_depth = depth

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """See `Engine.abort`; from any thread."""
        named = None if request_ids is None else frozenset(request_ids)
        with self._lock:
            if self._call is not None and self._loop is not None:
                self._loop.call_soon_threadsafe(self._call.abort, named)

    def take_times(self) -> EngineTimes:
        """See `Engine.take_times`. Servers do not tell their phases apart: all of `generate`'s time is `other_s`."""
        restarts, requeued = self.restarts - self._told[0], self.requeued - self._told[1]
        taken = EngineTimes(other_s=self._seconds, tokens=self._tokens, restarts=restarts, requeued=requeued)
        self._seconds, self._tokens = 0.0, 0
        self._told = self.restarts, self.requeued
        return taken

    def release(self) -> None:
        """See `Engine.release`, for servers that were started to allow it.

        Waits for servers that are being started again, which would take memory while the trainer has it. One that does
        not give its memory back is ended, and noticed as dead after `wake`.
        """

        def release(seat: Seat) -> None:
            try:
                seat.server.release()
            except (OSError, RunError) as error:
                log.warning("server %r did not release its memory and is ended: %s", seat.server.name, error)
                seat.server.stop()

        if self._releases:
            self._health.join()
            self._asleep = True
            self._all(self._health.up(), release)

    def wake(self) -> None:
        """See `Engine.wake`. A server that does not come back is started anew, and served from again after a push."""

        def wake(seat: Seat) -> None:
            try:
                seat.server.wake()
            except (OSError, RunError) as error:
                self._health.die(seat, f"it did not take its memory again: {error}")

        if self._releases:
            self._asleep = False
            self._health.notice_exits()
            self._all(self._health.up(), wake)

    def generate(
        self, requests: Sequence[Request], on_done: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """See `Engine.generate`. `on_done` is called in the calling thread.

        Raises `RunError` when no server is left, or none has generated for `start_timeout_s`.
        """
        self._check(requests)
        if not requests:
            return []
        started = time.monotonic()
        completions = asyncio.run(self._generate(requests, on_done))
        self._seconds += time.monotonic() - started
        self._tokens += sum(len(c.tokens) for c in completions)
        return completions

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            check_room(request, self.max_context)
            for seat in self._seats.values():
                seat.server.check(request)
        if len({request.id for request in requests}) < len(requests):
            raise ValueError("two requests have the same id; give each its own")

    def _http(self) -> aiohttp.ClientSession:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._dead_after_s)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits)

    async def _generate(
        self, requests: Sequence[Request], on_done: Callable[[Completion], None] | None
    ) -> list[Completion]:
        async with self._http() as http:
            call = Call(
                requests=requests,
                seats=self._seats,
                http=http,
                counts=self._counts,
                on_done=on_done,
                on_trouble=self._health.trouble,
                max_running=self.max_running,
                request_timeout_s=self._request_timeout_s,
                version=self._health.settle(),
            )
            with self._lock:
                assert self._call is None, "a fleet answers one call of generate at a time"
                self._call, self._loop = call, asyncio.get_running_loop()
            try:
                async with self._health.watching(call):
                    return await call.run()
            finally:
                with self._lock:
                    self._call = None
