"""One `generate` call of a fleet: sends its requests to servers, and makes good what goes wrong there.

Invariant: every request gets exactly one completion. It waits or is in one attempt on one server, and what comes of an
attempt counts only while the attempt is the request's own. An attempt that is given up is ended on its server, if that
answers, before the request waits again: nothing runs twice.

Runs in one event loop and is not safe to call from other threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

from miles_spec.rollout.dispatch import CUT, Queue, Seat
from miles_spec.types import Completion, Request, RunError, SpecCounts

log = logging.getLogger(__name__)

ABORT_S = 5.0
"""For a server to end a request that was aborted; then its answer is no longer waited for."""
MAX_ATTEMPTS = 5
"""Attempts of one request that may end because their server died, was late, or failed at it. A request that kills its
server would otherwise keep the run from ever ending."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One request on its way through one server."""

    index: int
    seat: Seat
    sent_s: float
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class Counts:
    """What went wrong and was made good, since the start of the fleet."""

    retries: int = 0
    """Requests sent again because a server refused them, failed at them or hung up."""
    requeued: int = 0
    """Requests sent again because their server died or was late."""


@dataclass(slots=True)
class Call:
    """The requests of one `generate`, from the first sent to the last answered.

    `version` is the target's that all of it is answered by, -1 until a server serves one.
    """

    requests: Sequence[Request]
    seats: Mapping[str, Seat]
    http: aiohttp.ClientSession
    counts: Counts
    on_done: Callable[[Completion], None] | None
    on_trouble: Callable[[Seat], None]
    """Told that a server hung up, failed or was late."""
    max_running: int
    request_timeout_s: float
    version: int
    progress_s: float = field(default_factory=time.monotonic)
    """When a request was last answered, or known to run."""
    done: list[Completion | None] = field(init=False)
    _queue: Queue = field(init=False)
    _attempts: dict[int, Attempt] = field(init=False, default_factory=dict)
    _spent: list[int] = field(init=False)
    _aborted: set[int] = field(init=False, default_factory=set)
    _side: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _over: asyncio.Future[None] = field(init=False)
    _left: int = field(init=False)

    def __post_init__(self) -> None:
        self._queue = Queue([r.tokens for r in self.requests], self.seats, self.max_running)
        self.done = [None] * len(self.requests)
        self._spent = [0] * len(self.requests)
        self._left = len(self.requests)
        self._over = asyncio.get_running_loop().create_future()

    async def run(self) -> list[Completion]:
        """All completions, in the order of requests. Raises what `fail` was given; nothing runs on afterwards."""
        try:
            self.pump()
            await self._over
        finally:
            await self._end()
        assert not self._left
        return [c for c in self.done if c is not None]

    def pump(self) -> None:
        """Sends what can be sent now."""
        if self._over.done():
            return
        now = time.monotonic()
        able = [seat for seat in self.seats.values() if seat.serves(self.version)]
        ready = [seat.server.name for seat in able if seat.free_s <= now]
        while ready and (pick := self._queue.take(ready)) is not None:
            index, name = pick
            attempt = Attempt(index=index, seat=self.seats[name], sent_s=now)
            assert index not in self._attempts and self.done[index] is None
            self._attempts[index] = attempt
            attempt.task = asyncio.get_running_loop().create_task(self._try(attempt))

    def lose(self, seat: Seat) -> None:
        """The server is dead: what ran there waits again."""
        gone = [self._attempts[i] for i in sorted(self._queue.running(seat.server.name))]
        self._queue.forget(seat.server.name)
        self._give_up(gone, f"was lost with server {seat.server.name!r} ({seat.why})")
        for attempt in gone:
            assert attempt.task is not None
            attempt.task.cancel()
        self.pump()

    def abort(self, request_ids: Collection[str] | None) -> None:
        """Ends the named requests, all if None: those that wait at once, those that run on their servers."""
        names: dict[str, list[str]] = {}
        for index, request in enumerate(self.requests):
            if self.done[index] is not None or (request_ids is not None and request.id not in request_ids):
                continue
            self._aborted.add(index)
            if self._queue.waits(index):
                self._queue.withdraw(index)
                self._finish(index, _nothing(request))
            else:
                names.setdefault(self._attempts[index].seat.server.name, []).append(request.id)
        for name, ids in names.items():
            self._aside(self._abort_on(self.seats[name], ids))

    def abort_again(self) -> None:
        """Repeats aborts: one that overtook its request was without effect."""
        late: dict[str, list[str]] = {}
        for index in self._aborted & self._attempts.keys():
            late.setdefault(self._attempts[index].seat.server.name, []).append(self.requests[index].id)
        for name, ids in late.items():
            self._aside(self._abort_on(self.seats[name], ids))

    def fail(self, error: Exception) -> None:
        """Ends the call with an error."""
        if not self._over.done():
            self._over.set_exception(error)

    def runs(self, for_s: float) -> bool:
        """Whether a request has run for so long."""
        now = time.monotonic()
        return any(now - attempt.sent_s >= for_s for attempt in self._attempts.values())

    # One attempt

    async def _try(self, attempt: Attempt) -> None:
        request, seat = self.requests[attempt.index], attempt.seat
        answer = asyncio.ensure_future(seat.server.complete(self.http, request))
        try:
            await asyncio.wait({answer}, timeout=self.request_timeout_s)
            late = not answer.done()
            if late:
                # an answer that comes with the abort, or just before it, is as good as any
                await self._abort_on(seat, [request.id])
                await asyncio.wait({answer}, timeout=ABORT_S)
                if not answer.done():
                    answer.cancel()
                    await asyncio.wait({answer})
            if not self._stands(attempt):
                return
            if answer.cancelled() or (late and _aborted(answer) and attempt.index not in self._aborted):
                self.on_trouble(seat)
                if self._stands(attempt):
                    self._queue.late(attempt.index, seat.server.name)
                    limit = f"{self.request_timeout_s:g} s (fleet.request_timeout_s)"
                    self._give_up([attempt], f"was not answered by {seat.server.name!r} in {limit}")
            elif (error := answer.exception()) is not None:
                await self._failed(attempt, error)
            else:
                self._answered(attempt, answer.result())
            self.pump()
        except Exception as error:  # of ours
            self.fail(error)
        finally:
            answer.cancel()
            answer.add_done_callback(_unheard)

    def _stands(self, attempt: Attempt) -> bool:
        return self._attempts.get(attempt.index) is attempt and not self._over.done()

    def _answered(self, attempt: Attempt, completion: Completion) -> None:
        now, request = time.monotonic(), self.requests[attempt.index]
        assert completion.request_id == request.id
        assert all(span.target == self.version for span in completion.versions)
        if completion.finish == "abort" and attempt.index not in self._aborted:
            # the server gave it up by itself, for want of memory or at a pause
            self._retry(attempt, "gave it up")
            return
        attempt.seat.answer(now)
        self._drop(attempt)
        self._finish(attempt.index, completion)

    async def _failed(self, attempt: Attempt, error: BaseException) -> None:
        """Sends it again if the server may answer next time; anything else ends the call."""
        if isinstance(error, aiohttp.ClientResponseError) and error.status in (429, 503):
            self._retry(attempt, f"refused with status {error.status}")
        elif isinstance(error, aiohttp.ClientResponseError) and error.status >= 500:
            self.on_trouble(attempt.seat)
            if self._stands(attempt):
                name = attempt.seat.server.name
                self._spend(attempt, f"ended in an error of {name!r} ({error.message})")
                self._queue.late(attempt.index, name)
                self._retry(attempt, f"failed with status {error.status}")
        elif isinstance(error, CUT):
            self.on_trouble(attempt.seat)
            if self._stands(attempt):  # the server lives, and so may the request
                await self._abort_on(attempt.seat, [self.requests[attempt.index].id])
            if self._stands(attempt):
                self._retry(attempt, f"hung up ({type(error).__name__}: {error})")
        else:
            assert isinstance(error, Exception), error
            self.fail(error)

    def _retry(self, attempt: Attempt, what: str) -> None:
        request, seat = self.requests[attempt.index], attempt.seat
        log.debug("server %r %s: request %r is sent again", seat.server.name, what, request.id)
        seat.refuse(time.monotonic(), attempt.sent_s)
        asyncio.get_running_loop().call_later(max(0.0, seat.free_s - time.monotonic()), self.pump)
        self._drop(attempt)
        self.counts.retries += 1
        self._wait_again([attempt.index])

    def _give_up(self, attempts: Sequence[Attempt], what: str) -> None:
        for attempt in attempts:
            self._drop(attempt)
            self._spend(attempt, what)
        self.counts.requeued += len(attempts)
        self._wait_again([a.index for a in attempts])

    def _spend(self, attempt: Attempt, what: str) -> None:
        """Counts an attempt that the request may have spoilt; the last one ends the call."""
        self._spent[attempt.index] += 1
        if self._spent[attempt.index] >= MAX_ATTEMPTS:
            name = self.requests[attempt.index].id
            self.fail(
                RunError(
                    f"request {name!r} {what}, the last of {MAX_ATTEMPTS} attempts; it may be what stops the servers"
                )
            )

    def _wait_again(self, indices: Sequence[int]) -> None:
        for index in self._aborted.intersection(indices):
            self._finish(index, _nothing(self.requests[index]))
        self._queue.back(i for i in indices if i not in self._aborted)

    def _drop(self, attempt: Attempt) -> None:
        del self._attempts[attempt.index]
        self._queue.leave(attempt.index, attempt.seat.server.name)

    def _finish(self, index: int, completion: Completion) -> None:
        if self._over.done():
            return
        assert self.done[index] is None
        self.done[index] = completion
        self.progress_s = time.monotonic()
        self._left -= 1
        try:
            if self.on_done is not None:
                self.on_done(completion)
        except Exception as error:  # the caller's to see
            self.fail(error)
        if not self._left and not self._over.done():
            self._over.set_result(None)

    # On the servers

    async def _abort_on(self, seat: Seat, request_ids: Sequence[str]) -> None:
        """Ends requests on their server, if it answers."""
        try:
            async with asyncio.timeout(ABORT_S):
                await seat.server.abort(self.http, request_ids)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.debug("server %r did not take an abort: %s: %s", seat.server.name, type(error).__name__, error)

    def _aside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._side.add(task)
        task.add_done_callback(self._put_aside)

    def _put_aside(self, task: asyncio.Task[None]) -> None:
        self._side.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.fail(error)

    async def _end(self) -> None:
        """Ends what still runs after an error, here and on the servers."""
        if not self._over.done():
            self._over.cancel()
        names: dict[str, list[str]] = {}
        for attempt in self._attempts.values():
            names.setdefault(attempt.seat.server.name, []).append(self.requests[attempt.index].id)
        tasks = [a.task for a in self._attempts.values() if a.task is not None]
        try:
            await asyncio.gather(*(self._abort_on(self.seats[n], ids) for n, ids in names.items()))
        finally:
            for task in (*tasks, *self._side):
                task.cancel()
        await asyncio.gather(*tasks, *self._side, return_exceptions=True)


def _aborted(answer: asyncio.Future[Completion]) -> bool:
    return answer.exception() is None and answer.result().finish == "abort"


def _unheard(answer: asyncio.Future[Completion]) -> None:
    """What comes of an attempt that was given up is nobody's to see."""
    if not answer.cancelled():
        answer.exception()


def _nothing(request: Request) -> Completion:
    return Completion(
        request_id=request.id,
        tokens=(),
        logprobs=(),
        accepted=(),
        versions=(),
        spec=SpecCounts(),
        finish="abort",
        text="",
    )
