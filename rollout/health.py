"""Who of a fleet's servers may generate: probes, deaths, and how a server comes back.

Invariant: a server serves only while its target is verified and of the version that the whole call is answered by.
`recover` runs only while a call does, where the trainer's weights stand still, and for one server at a time.

States of a server, each change logged once with its reason:

    serving --no answer to a probe--> suspect --answers--> serving
    suspect --no answer for dead_after_s--> dead        any --process has exited--> dead
    dead --ours: a thread stops and starts it--> restarting --it has started--> waiting for weights
    dead --joined: it answers a probe again--> waiting for weights
    restarting --start_timeout_s in vain--> lost
    waiting for weights --recover, or a push between two calls--> serving

A joined server may be another process than before, which has learned nothing, and nobody tells. So before `recover` it
is joined anew, by `start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp

from miles_spec.rollout.call import Call
from miles_spec.rollout.dispatch import Seat, Server
from miles_spec.types import RunError

log = logging.getLogger(__name__)

UP = ("serving", "suspect", "waiting for weights")
"""States of a server whose process runs."""
LOOK_S = 0.1
"""Between looks at the processes."""
MAX_FAILURES = 3
"""Pushes that may fail before a server of ours is restarted."""
PAUSE_MAX_S = 60.0
"""Longest pause between two attempts to bring a server back; the first is `probe_s`, each is twice the one before."""


class Health:
    """Watches over the seats of a fleet and changes their states."""

    def __init__(
        self,
        seats: Mapping[str, Seat],
        *,
        recover: Callable[[Any], None],
        probe_s: float,
        dead_after_s: float,
        start_timeout_s: float,
    ) -> None:
        """See `Fleet`."""
        self.restarts = 0
        """Servers that came up again after they had died, since the start."""
        self._seats = seats
        self._recover = recover
        self._probe_s = probe_s
        self._dead_after_s = dead_after_s
        self._start_timeout_s = start_timeout_s
        self._version = -1
        self._call: Call | None = None
        self._wake = {name: asyncio.Event() for name in seats}
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()

    def up(self) -> list[Seat]:
        """Those whose process runs, as far as is known."""
        return [seat for seat in self._seats.values() if seat.state in UP]

    def notice_exits(self) -> None:
        """Looks whether processes have exited; between two calls."""
        assert self._call is None
        for seat in self.up():
            self._notice_exit(seat)

    async def look(self, http: aiohttp.ClientSession) -> None:
        """Probes all servers once, between two calls; as within one, who answers none for `dead_after_s` is dead."""
        assert self._call is None
        for seat in self.up():
            if seat.state != "suspect":
                seat.seen_s = time.monotonic()  # it was not asked meanwhile
            self._version = max(self._version, seat.server.versions()["target"])
        await asyncio.gather(*(self._ask(seat, http) for seat in self._seats.values() if _asked(seat)))
        self._notice_dead()

    def close(self) -> None:
        """No server is started again from now on."""
        self._closing.set()

    def join(self) -> bool:
        """Waits for servers that are being started again; whether there were any since the start."""
        for thread in list(self._threads):
            thread.join()
        return bool(self._threads)

    def settle(self) -> int:
        """Says who may generate at the start of a call; the version of the target that answers it, -1 if nobody serves
        the newest that was ever served: then the first server that gets its weights decides."""
        for seat in self.up():
            self._notice_exit(seat)
        now, up = time.monotonic(), self.up()
        newest = max([seat.server.versions()["target"] for seat in up], default=-1)
        self._version = max(self._version, newest)
        for seat in up:
            seat.seen_s, seat.failures, seat.retry_s = now, 0, 0.0
            if seat.state != "suspect":
                self._admit(seat, self._version, "it serves")
        return self._version if newest == self._version else -1

    @contextlib.asynccontextmanager
    async def watching(self, call: Call) -> AsyncIterator[None]:
        """Watches over the servers while a call runs; a fault of ours in that ends the call."""
        # events belong to the loop that waits for them first
        self._call, self._wake = call, {name: asyncio.Event() for name in self._seats}
        ended = asyncio.Event()
        recovering = asyncio.create_task(self._recover_all(call, ended))
        watching = [asyncio.create_task(self._watch(call))]
        watching += [asyncio.create_task(self._probe(seat, call)) for seat in self._seats.values()]
        for task in (recovering, *watching):
            task.add_done_callback(lambda task: _pass_on(task, call))
        try:
            yield
        finally:
            self._call = None
            for task in watching:
                task.cancel()
            # a push that is under way is waited for: the weights it reads change after this call
            ended.set()
            await asyncio.gather(recovering, *watching, return_exceptions=True)

    def _admit(self, seat: Seat, version: int, why: str) -> None:
        """Lets a server that runs serve if it may."""
        served = seat.server.versions()["target"]
        if served == version >= 0:
            seat.enter("serving", f"{why} version {version}")
        elif served < 0:
            seat.enter("waiting for weights", "what it serves was not verified")
        else:
            seat.enter("waiting for weights", f"it serves version {served}, not {version}")

    async def _watch(self, call: Call) -> None:
        """Notices dead servers, and when nobody is left to answer."""
        repeat_s = 0.0
        while True:
            now = time.monotonic()
            self._notice_dead()
            if call.runs(self._probe_s):
                call.progress_s = now
            if now >= repeat_s:
                repeat_s = now + self._probe_s
                call.abort_again()
            states = "; ".join(f"{s.server.name!r} is {s.state}: {s.why}" for s in self._seats.values())
            if self._closing.is_set():
                call.fail(RunError("the servers were stopped while they generated"))
            elif all(seat.state == "lost" for seat in self._seats.values()):
                call.fail(RunError(f"no server is left to generate: {states}"))
            elif now - call.progress_s > self._start_timeout_s:
                call.fail(RunError(f"no server has generated for {self._start_timeout_s:g} s: {states}"))
            call.pump()
            await asyncio.sleep(min(LOOK_S, self._probe_s))

    async def _probe(self, seat: Seat, call: Call) -> None:
        """Asks one server, again and again, whether it is well."""
        wake = self._wake[seat.server.name]
        while True:
            if _asked(seat):
                await self._ask(seat, call.http)
            wake.clear()
            await _passes(wake, self._probe_s)

    async def _ask(self, seat: Seat, http: aiohttp.ClientSession) -> None:
        """One probe."""
        why, gone, asked_s = "it says that it is not well", False, time.monotonic()
        try:
            async with asyncio.timeout(self._dead_after_s / 4):
                well = await seat.server.probe(http)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            # where nothing listens there may soon be another process, with other weights
            gone = seat.server.joined and isinstance(error, aiohttp.ClientConnectorError)
            well, why = False, f"it does not answer ({type(error).__name__}: {error})"
        if _asked(seat) and asked_s >= seat.started_s:
            self._hear(seat, well, why, gone)

    def _hear(self, seat: Seat, well: bool, why: str, gone: bool) -> None:
        """Draws the conclusion from a probe."""
        if well:
            seat.seen_s = time.monotonic()
            if seat.state == "suspect":
                self._admit(seat, self._version, "it answers again and serves")
            elif seat.state == "dead":
                seat.enter("waiting for weights", "it answers again")
        elif gone and seat.state != "dead":
            self.die(seat, why)
        elif seat.state in UP:
            seat.enter("suspect", why)

    def trouble(self, seat: Seat) -> None:
        """A request failed there: looks at once."""
        self._notice_exit(seat)
        self._wake[seat.server.name].set()

    def _notice_dead(self) -> None:
        """Those whose process has exited, and those that have not answered for too long."""
        for seat in self._seats.values():
            self._notice_exit(seat)
            silent_s = time.monotonic() - seat.seen_s
            if seat.state == "suspect" and silent_s > self._dead_after_s:
                self.die(seat, f"it has not answered for {silent_s:.3g} s")

    def _notice_exit(self, seat: Seat) -> None:
        if seat.state in UP and not seat.pushing and not seat.server.alive():
            self.die(seat, "its process has exited")

    def die(self, seat: Seat, why: str) -> None:
        """Takes a server for dead: its requests go elsewhere, and it is started again if it is ours."""
        seat.server.leave(why)
        seat.enter("dead", why)
        if self._call is not None:
            self._call.lose(seat)
        if not seat.server.joined and not self._closing.is_set():
            seat.enter("restarting", why)
            thread = threading.Thread(target=self._restart, args=(seat,), daemon=True)
            self._threads.append(thread)
            thread.start()

    # Coming back

    def _restart(self, seat: Seat) -> None:
        """In a thread: starts a dead server until it is up or `start_timeout_s` is over."""
        seat.server.explain()
        pause_s, until_s = self._probe_s, time.monotonic() + self._start_timeout_s
        while not self._closing.is_set():
            try:
                seat.server.stop()
                seat.server.start()
            except Exception as error:  # a server may fail in any way; it is tried again, and the last one is told
                log.warning("server %r did not start: %s", seat.server.name, error)
                if time.monotonic() + pause_s > until_s:
                    seat.enter("lost", f"it did not start again within {self._start_timeout_s:g} s: {error}")
                    return
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
            else:
                self.restarts += 1
                seat.failures, seat.retry_s = 0, 0.0
                seat.seen_s = seat.started_s = time.monotonic()
                seat.enter("waiting for weights", "it has started again")
                return

    async def _recover_all(self, call: Call, ended: asyncio.Event) -> None:
        """Pushes weights to servers that wait for them, one at a time, until the call has ended."""
        while not ended.is_set():
            now = time.monotonic()
            due = [s for s in self._seats.values() if s.state == "waiting for weights" and s.retry_s <= now]
            if due:
                await self._recover_one(min(due, key=lambda seat: seat.retry_s), call)
            else:
                await _passes(ended, min(LOOK_S, self._probe_s))

    def _supply(self, server: Server) -> None:
        """In a thread: pushes weights to a server."""
        if server.joined:
            server.start()
        self._recover(server)

    async def _recover_one(self, seat: Seat, call: Call) -> None:
        fault, seat.pushing = "", True
        try:
            await asyncio.to_thread(self._supply, seat.server)
        except Exception as error:  # whatever it is, the server must not serve; the log says why
            log.warning("server %r did not get its weights", seat.server.name, exc_info=True)
            fault = f"its weights were not pushed: {type(error).__name__}: {error}"
        finally:
            seat.pushing = False
        now, served = time.monotonic(), seat.server.versions()["target"]
        seat.seen_s = now
        if not fault and call.version < 0 <= served:
            call.version = self._version = served
        if not fault and served == call.version >= 0:
            seat.failures = 0
            seat.enter("serving", f"it serves version {served}, verified")
            call.pump()
            return
        if fault:
            seat.server.leave(fault)
        seat.failures += 1
        seat.retry_s = now + min(self._probe_s * 2 ** (seat.failures - 1), PAUSE_MAX_S)
        seat.enter("waiting for weights", fault or f"it serves version {served}, not {call.version}")
        if seat.failures >= MAX_FAILURES and not seat.server.joined:
            self.die(seat, f"{seat.failures} pushes failed; {seat.why}")


def _asked(seat: Seat) -> bool:
    """Whether probes go there: not while a push keeps it busy."""
    return (seat.state in UP and not seat.pushing) or (seat.state == "dead" and seat.server.joined)


async def _passes(event: asyncio.Event, most_s: float) -> None:
    """Returns at the event, at the latest after `most_s`."""
    with contextlib.suppress(TimeoutError):
        # not `wait_for`, which in Python 3.11 loses a cancellation that comes together with the event
        async with asyncio.timeout(most_s):
            await event.wait()


def _pass_on(task: asyncio.Task[None], call: Call) -> None:
    """A fault of ours beside the call ends the call."""
    if not task.cancelled() and isinstance(error := task.exception(), Exception):
        call.fail(error)
