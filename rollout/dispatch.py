"""Which server gets which request: what a fleet needs of a server, what it knows of it, and the queue.

Invariant: a request waits or runs on one server, never both, and at most `most` run on each. Nothing here waits or
talks to anybody; `rollout/call.py` does what is decided here.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import aiohttp

from miles_spec.rollout.engine import Member
from miles_spec.types import Completion, Request

log = logging.getLogger(__name__)

State = Literal["serving", "suspect", "waiting for weights", "dead", "restarting", "lost"]
"""Of a server. Only `serving` gets requests; `suspect` keeps those it has, the others have none."""

BACKOFF_S = 0.05
"""First pause of a server that refuses; each further refusal doubles it."""
BACKOFF_MAX_S = 5.0


CUT = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError)
"""What `Server.complete` raises where the connection broke. The request may go on at the server until `abort`."""


class Server(Member, Protocol):
    """What a fleet needs of a server."""

    joined: bool
    """It was not started by us: it cannot be restarted."""

    def start(self) -> None:
        """Returns when it answers. Raises `RunError` if it does not come up."""
        ...

    def stop(self) -> None:
        """Ends its processes, if they are ours, at once; safe to call again, and while `start` waits."""
        ...

    def alive(self) -> bool:
        """False once its process has exited; true where it is not ours."""
        ...

    def explain(self) -> None:
        """Has it leave behind what shows how it ended or where it hangs, if it is ours."""
        ...

    def release(self) -> None:
        """Gives GPU memory back until `wake`. Raises `OSError` or `RunError` if it does not."""
        ...

    def wake(self) -> None:
        """Takes its memory again; raises as `release` does."""
        ...

    def check(self, request: Request) -> None:
        """Raises `ValueError` for a request that can never run."""
        ...

    async def probe(self, http: aiohttp.ClientSession) -> bool:
        """Whether it answers, and says that it is well."""
        ...

    async def complete(self, http: aiohttp.ClientSession, request: Request) -> Completion:
        """The response. Raises aiohttp's errors, with `status` where it refused or failed; `CUT` are among them."""
        ...

    async def abort(self, http: aiohttp.ClientSession, request_ids: Iterable[str]) -> None:
        """Ends requests that run on it, those whose `complete` raised one of `CUT` included; the `complete` of others
        returns what they have."""
        ...


@dataclass(slots=True, eq=False)
class Seat:
    """One server, as the fleet sees it."""

    server: Server
    state: State = "waiting for weights"
    why: str = "it has no weights yet"
    """Reason of the state."""
    seen_s: float = 0.0
    """When it last answered anything."""
    started_s: float = 0.0
    """When its process was last started again; what was asked before says nothing about it."""
    free_s: float = 0.0
    """It refused: it gets no request before."""
    refused_s: float = 0.0
    """When the pause that ends at `free_s` began."""
    refusals: int = 0
    """In a row."""
    pushing: bool = False
    """Its weights are being pushed by `recover`."""
    failures: int = 0
    """Of `recover`, in a row."""
    retry_s: float = 0.0
    """`recover` is not tried again before."""

    def enter(self, state: State, why: str) -> None:
        """A change of state, logged once."""
        if state != self.state:
            level = logging.INFO if state == "serving" else logging.WARNING
            log.log(level, "server %r was %s and is now %s: %s", self.server.name, self.state, state, why)
        self.state, self.why = state, why

    def serves(self, version: int) -> bool:
        """Whether it may get requests of a call that is answered by this version of the target."""
        return self.state == "serving" and self.server.versions()["target"] == version

    def refuse(self, now: float, sent_s: float) -> None:
        """A request sent at `sent_s` was refused: pauses, for longer with every refusal.

        Refusals of requests that were sent before the pause began are the same refusal.
        """
        if sent_s < self.refused_s:
            return
        self.refusals += 1
        pause = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (self.refusals - 1))
        self.refused_s, self.free_s = now, now + pause * random.uniform(0.5, 1.0)

    def answer(self, now: float) -> None:
        """It answered a request: it has room again."""
        self.seen_s, self.free_s, self.refusals = now, now, 0


class Queue:
    """The order of requests and the load of servers; decides, but does nothing.

    The first request that waits goes to the least loaded server with room. One with the same prompt tokens as an
    earlier one goes to a server that has seen them, since its prefix cache holds them, while that has less than its
    fair share.
    """

    def __init__(self, prompts: Sequence[tuple[int, ...]], names: Iterable[str], most: int) -> None:
        """At most `most` requests run on each of the servers `names`."""
        self._prompts = prompts
        self._most = most
        self._waiting = deque(range(len(prompts)))
        self._running: dict[str, set[int]] = {name: set() for name in names}
        self._seen: dict[tuple[int, ...], set[str]] = {}
        self._late: dict[int, set[str]] = {}

    def running(self, name: str) -> Collection[int]:
        """Requests that run on a server."""
        return self._running[name]

    def waits(self, index: int) -> bool:
        """Whether a request waits."""
        return index in self._waiting

    def take(self, ready: Sequence[str]) -> tuple[int, str] | None:
        """The next request and the server, one of `ready`, it now runs on; None if nothing waits or nobody has room.

        A request that was late at a server waits for the others, as long as one of them is ready.
        """

        def load(name: str) -> int:
            return len(self._running[name])

        room = [name for name in ready if load(name) < self._most]
        if not self._waiting or not room:
            return None
        share = -(-(len(self._waiting) + sum(map(load, ready))) // len(ready))

        def fit(index: int) -> list[str]:
            late = self._late.get(index, set())
            return room if late.issuperset(ready) else [name for name in room if name not in late]

        index = next(filter(fit, self._waiting), None)
        if index is None:
            return None
        self._waiting.remove(index)
        room = fit(index)
        seen = self._seen.setdefault(self._prompts[index], set())
        name = min([n for n in room if n in seen and load(n) < share] or room, key=load)
        seen.add(name)
        self._running[name].add(index)
        return index, name

    def leave(self, index: int, name: str) -> None:
        """The request no longer runs on the server."""
        self._running[name].remove(index)

    def back(self, indices: Iterable[int]) -> None:
        """Requests that ran wait again, before all others."""
        self._waiting.extendleft(sorted(indices, reverse=True))

    def withdraw(self, index: int) -> None:
        """A request that waits no longer does."""
        self._waiting.remove(index)

    def late(self, index: int, name: str) -> None:
        """The server took too long over the request, or failed at it, so it had better go elsewhere."""
        self._late.setdefault(index, set()).add(name)

    def forget(self, name: str) -> None:
        """The server's prefix cache is gone."""
        for names in self._seen.values():
            names.discard(name)
