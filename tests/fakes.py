"""Engines that are dictionaries of tensors, in this process or another, with faults to inject."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from miles_spec.sync.digest import digests
from miles_spec.sync.receivers import Receiver, open_receiver
from miles_spec.types import Completion, EngineTimes, Request, Role, TensorMeta


class FakeEngine:
    """Holds tensors by role; generates nothing; its own only member.

    `on_load(role, name, tensor)` sees the served tensor just after a copy and may corrupt it or raise; a name in `drop`
    is not copied; `frozen` ignores all loads. With `restarts`, it forgets what it serves at every change of depth, and
    at depth 0 it has no draft, as a server that must restart for that.
    """

    def __init__(
        self,
        tensors: Mapping[Role, Mapping[str, Tensor]],
        *,
        name: str = "fake",
        draft_depth: int = 3,
        version: int = 0,
        restarts: bool = False,
    ) -> None:
        self.name = name
        self.max_running, self.max_context = 1, 1
        self.restarts = restarts
        self.left: list[str] = []
        self.draft_depth = draft_depth
        self.tensors = {role: {n: t.clone() for n, t in named.items()} for role, named in tensors.items()}
        self.served: dict[Role, int] = dict.fromkeys(tensors, version)
        self.open: tuple[Role, ...] = ()
        self.sessions: list[tuple[int, tuple[Role, ...]]] = []
        self.loaded: list[list[str]] = []
        self.drop: set[str] = set()
        self.frozen = False
        self.on_load: Callable[[Role, str, Tensor], None] = lambda role, name, tensor: None

    def members(self) -> Sequence[FakeEngine]:
        return [self]

    def leave(self, reason: str) -> None:
        self.left.append(reason)
        self.served["target"] = -1

    def generate(
        self, requests: Sequence[Request], on_done: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        raise AssertionError("a fake engine does not generate")

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        pass

    def set_draft_depth(self, depth: int) -> None:
        self.draft_depth = depth
        if self.restarts:
            self.served = dict.fromkeys(("target", "draft") if depth else ("target",), -1)

    def versions(self) -> Mapping[Role, int]:
        return dict(self.served)

    def manifest(self) -> Mapping[Role, Mapping[str, TensorMeta]]:
        return {role: metas(named) for role, named in self.tensors.items() if role in self.served}

    def begin_update(self, version: int, roles: Sequence[Role]) -> None:
        if self.open:
            raise RuntimeError("a session is open")
        self.open = tuple(roles)
        self.sessions.append((version, self.open))

    def load_weights(self, role: Role, tensors: Iterable[tuple[str, Tensor]]) -> None:
        assert role in self.open
        tensors = list(tensors)
        self.loaded.append([name for name, _ in tensors])
        for name, tensor in tensors:
            if not self.frozen and name not in self.drop:
                self.tensors[role][name].copy_(tensor)
                self.on_load(role, name, self.tensors[role][name])

    def end_update(self) -> Mapping[Role, Mapping[str, str]]:
        assert self.open
        version, roles = self.sessions[-1]
        self.served |= dict.fromkeys(roles, version)
        self.open = ()
        return {role: digests(self.tensors[role].items()) for role in roles}

    def take_times(self) -> EngineTimes:
        return EngineTimes()

    def release(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def stop(self) -> None:
        pass


def metas(named: Mapping[str, Tensor]) -> dict[str, TensorMeta]:
    """What an engine says it expects of such tensors."""
    return {n: TensorMeta(shape=tuple(t.shape), dtype=str(t.dtype).split(".")[1]) for n, t in named.items()}


class Refused(Exception):
    """Raised in a rank's process by a fault that a test injects."""


def _serve(
    pipe: Connection, rank: int, tensors: dict[Role, dict[str, Tensor]], faults: dict[str, Any], device: torch.device
) -> None:
    """A rank: obeys commands as the loader in a server does, in a process of its own.

    Faults, by the number of the `load` command (from 1, of the whole life): `die` and `hang` before that bucket is
    received, `refuse` before it is loaded, `late` before it is answered, by `late_s`.
    """
    torch.set_num_threads(1)
    receiver: Receiver | None = None
    role: Role = "target"
    loads = 0
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        answer: dict[str, Any] = {"ok": True}
        try:
            match command["do"]:
                case "begin":
                    role = command["role"]
                case "open":
                    receiver = open_receiver(command["via"], rank=rank, device=device)
                case "load":
                    loads += 1
                    if faults.get("die") == loads:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if faults.get("hang") == loads:
                        time.sleep(1000)
                    assert receiver is not None
                    with receiver.bucket(command) as named:
                        if faults.get("refuse") == loads:
                            raise Refused("no room")
                        for name, tensor in named:
                            tensors[role][name].copy_(tensor)
                    if faults.get("late") == loads:
                        time.sleep(faults["late_s"])
                    answer["loads"] = loads
                case "digest":
                    answer["digests"] = digests(tensors[role].items())
                case "end":
                    assert receiver is not None
                    receiver.close()
        except Exception as error:
            answer = {"fault": f"{type(error).__name__}: {error}"}
        pipe.send(answer)


def _nurse(address: str) -> None:
    """Forks a process for every rank asked for. It has no threads, which a fork of the test's own process would miss:
    what is collected in a child joins them, and waits for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    orders = Client(address)
    while True:
        try:
            rank, named, faults, device = orders.recv()
        except EOFError:
            return
        if os.fork() == 0:
            orders.close()
            pipe = Client(address)
            pipe.send(os.getpid())
            at = torch.device(device)
            tensors = {role: {n: t.to(at).clone() for n, t in load(data).items()} for role, data in named.items()}
            _serve(pipe, rank, tensors, faults, at)
            os._exit(0)


@cache
def _nursery() -> tuple[Listener, Connection]:
    listener = Listener(family="AF_UNIX")
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(here.parent), str(here)]}; import fakes; fakes._nurse(sys.argv[1])"
    subprocess.Popen([sys.executable, "-c", code, listener.address])
    return listener, listener.accept()


class RemoteFake:
    """A member whose ranks, each with all weights, are processes of their own. `start` makes them, anew if need be.

    `on_command` sees each command before it is sent. Faults are those of `_serve`, of the last rank alone.
    `timeout_s`, for an answer, is longer than a broadcast may take, as with servers: a rank that waits for a dead one's
    says so before.
    """

    def __init__(
        self,
        tensors: Mapping[Role, Mapping[str, Tensor]],
        *,
        name: str = "remote",
        ranks: int = 1,
        timeout_s: float = 60.0,
        devices: Sequence[str] = ("cpu",),
        **faults: Any,
    ) -> None:
        self.name, self.ranks, self.timeout_s, self.devices, self.faults = name, ranks, timeout_s, devices, faults
        self.draft_depth = 3
        self.tensors = {role: dict(named) for role, named in tensors.items()}
        self.left: list[str] = []
        self.commands: list[Mapping[str, Any]] = []
        self.on_command: Callable[[Mapping[str, Any]], object] = lambda command: None
        self._workers: list[tuple[int, Connection]] = []
        self.start()

    def start(self) -> None:
        self.stop()
        self.served: dict[Role, int] = dict.fromkeys(self.tensors, -1)
        named = {r: save({n: t.cpu().contiguous() for n, t in of.items()}) for r, of in self.tensors.items()}
        listener, orders = _nursery()
        for rank in range(self.ranks):
            faults = self.faults if rank == self.ranks - 1 else {}
            orders.send((rank, named, faults, self.devices[rank % len(self.devices)]))
            pipe = listener.accept()
            self._workers.append((pipe.recv(), pipe))

    def stop(self) -> None:
        for pid, pipe in self._workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            pipe.close()
        self._workers.clear()

    def kill(self) -> None:
        """Ends one rank as `kill -9` does; the member stays with what is left."""
        os.kill(self._workers[-1][0], signal.SIGKILL)

    def deliver(self, command: Mapping[str, Any]) -> Mapping[str, Any]:
        self.commands.append(command)
        self.on_command(command)
        try:
            for _, pipe in self._workers:
                pipe.send(command)
            answers = []
            for rank, (_, pipe) in enumerate(self._workers):
                if not pipe.poll(self.timeout_s):
                    raise TimeoutError(f"rank {rank} of {self.name} gave no answer in {self.timeout_s:g} s")
                answers.append(pipe.recv())
        except (EOFError, ConnectionError) as error:
            raise ConnectionError(f"a rank of {self.name} is gone") from error
        return next((answer for answer in answers if "fault" in answer), answers[0])

    def begin_update(self, version: int, roles: Sequence[Role]) -> None:
        (self._role,) = roles
        self._version = version
        self.deliver({"do": "begin", "role": self._role})

    def end_update(self) -> Mapping[Role, Mapping[str, str]]:
        answer = self.deliver({"do": "digest"})
        self.deliver({"do": "end"})
        self.served[self._role] = self._version
        return {self._role: answer["digests"]}

    def leave(self, reason: str) -> None:
        self.left.append(reason)
        self.served["target"] = -1

    def set_draft_depth(self, depth: int) -> None:
        self.draft_depth = depth

    def versions(self) -> Mapping[Role, int]:
        return dict(self.served)

    def manifest(self) -> Mapping[Role, Mapping[str, TensorMeta]]:
        return {role: metas(named) for role, named in self.tensors.items()}


def flip_bit(tensor: Tensor, bit: int) -> None:
    """Flips one bit of a contiguous tensor in place."""
    data = tensor.view(-1).view(torch.uint8)
    data[bit // 8] ^= 1 << bit % 8


def flip_bit_of_file(path: Path, bit: int) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
