"""The ranks of one run: rank 0 leads and the others follow it, call by call.

`Leader` is the trainer that the loop sees. Each call goes to all ranks, runs on all of them at the same time and ends
with every rank's outcome; what it returns is rank 0's. Invariant: when a call has returned, all ranks have made the
same calls with equal arguments in the same order, and stand at the same versions.

Each follower has one TCP connection to rank 0, which may be silent for hours, and whose end tells each that the other
is gone. Collectives are the trainers' own.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.train.messages import Message, Packed, as_bytes, decode, pack, receive
from miles_spec.types import LossTerms, PackedBatch, Role, RunError

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 60.0
"""How long a rank waits for the others once a call has failed on one of them."""
GRACE_S = 20.0
"""How long a follower whose leader is gone may take to end, if it is in the middle of a call."""
JOIN_S = 60.0
"""For all followers to connect, once they have met."""

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")
_GONE = "its process is gone; if it has a log, that may say why"
_KEY_BYTES = 32
_END = object()


class Ranks:
    """This process among those of a run."""

    def __init__(self, rank: int, peers: Mapping[int, Connection], patience_s: float = PATIENCE_S) -> None:
        """`peers` are rank 0's connections by rank, or a follower's only one, to rank 0."""
        self.rank = rank
        self.patience_s = patience_s
        self._peers = dict(peers)
        self._lost: dict[int, str] = {}
        self._lock = threading.RLock()
        self._busy = False
        self._cut = False
        self._streams = count()
        self._dropped: list[tuple[int, Iterator[Any]]] = []
        self.inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        """A follower's messages; None once rank 0 is gone."""
        if rank:
            threading.Thread(target=self._listen, name="listen", daemon=True).start()

    @classmethod
    def join(cls, device: str = "auto", patience_s: float = PATIENCE_S) -> Ranks:
        """Meets the other processes that torchrun's environment names, which is gone from it afterwards: servers that
        are started later must not take it for theirs.

        Makes the default process group (gloo for tensors on the CPU, NCCL for those on GPUs), and takes the GPU of this
        rank unless `device` is "cpu". A follower ignores Ctrl-C and SIGTERM from now on. Raises `ValueError` on all
        ranks of a host with too few GPUs.
        """
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        host = os.environ["MASTER_ADDR"]
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            gpus = torch.cuda.device_count()
            if local > gpus:
                raise ValueError(f"{local} ranks on one host need a GPU each, and it has {gpus}; start fewer")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        for name in [n for n in os.environ if n in _TORCHRUN or n.startswith(_TORCHRUN_PREFIXES)]:
            del os.environ[name]
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # not before all have met: torchrun ends with it who waits
            port, *key = _broadcast([0] * (1 + _KEY_BYTES))
            return cls(rank, {0: _connect(host, port, bytes(key), rank)}, patience_s)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as server:
            server.settimeout(JOIN_S)
            key = list(secrets.token_bytes(_KEY_BYTES))
            _broadcast([server.getsockname()[1], *key])
            peers = dict(_accept(server, bytes(key)) for _ in range(size - 1))
        return cls(rank, peers, patience_s)

    def call(self, message: Message, local: Callable[[], T], state: Callable[[T], list[Any]]) -> T:
        """Rank 0: has all followers act on `message` while `local` runs here; its result.

        `state` of it is compared with what the followers answer. An error that all ranks have in common, or that rank 0
        alone has, is raised as it is, any other as `RunError` that names its ranks. Once a rank is lost, this and every
        later call raises.
        """
        with self._lock:
            if self._lost:
                _raise(None, self._lost)
            if self._cut:
                raise RunError("a call to the other ranks was cut off, so they cannot be called again")
            self._flush()
            packed = pack(message)
            self._busy = self._cut = True
            result: Any = None
            error = None
            try:
                self._send(packed)
                try:
                    result = local()
                except Exception as e:
                    error = e
                answers = self._gather(error is not None)
                self._cut = False
            finally:
                self._busy = False
            _raise(error, {rank: a["error"] for rank, a in answers.items() if a["error"]} | self._lost)
            here = state(result)
            for rank, answer in answers.items():
                if answer["state"] != here:
                    raise RunError(f"the ranks differ by now: rank {rank} is at {answer['state']}, rank 0 at {here}")
            return result

    def stream(
        self, message: Message, local: Callable[[], Iterator[T]], state: Callable[[object], list[Any]]
    ) -> Iterator[T]:
        """Rank 0: what `local` yields; every rank's own generator goes along step by step, and all are closed
        together. Nothing is sent before the first is asked for."""
        number = next(self._streams)
        generator = self.call({**message, "do": "open", "stream": number}, local, state)
        ended = False
        try:
            while True:
                value: Any = self.call(
                    {"do": "next", "stream": number}, lambda: next(generator, _END), lambda v: [*state(v), v is _END]
                )
                if value is _END:
                    ended = True
                    return
                yield value
        finally:
            if not ended:
                self._dropped.append((number, generator))
                if not self._busy:  # else it was collected in the middle of a call, and waits for the next
                    with self._lock:
                        self._flush()

    def end(self) -> None:
        """Rank 0: lets the followers go. One that does not listen ends by itself within `GRACE_S`."""
        self._send(pack({"do": "end"}))
        for peer in self._peers.values():
            peer.close()
        if not self._lost and not self._cut:
            dist.destroy_process_group()

    def answer(self, error: str | None, state: list[Any]) -> None:
        """A follower's outcome. After an error it waits for rank 0 to end the call too, and ends this process if that
        does not come: rank 0 waits in a collective for this rank then, and must see it go."""
        with suppress(OSError):  # rank 0 is gone; so says the inbox
            self._peers[0].send_bytes(json.dumps({"error": error, "state": state}).encode())
        if error is None:
            return
        message: Message | None = {"do": ""}
        while message is not None and message["do"] not in ("go on", "end"):
            try:
                message = self.inbox.get(timeout=self.patience_s)
            except queue.Empty:
                log.error("rank 0 does not end the call, so rank %d ends", self.rank)
                os._exit(1)
        if message is None or message["do"] == "end":
            self.inbox.put(message)

    def _send(self, packed: Packed, ranks: Sequence[int] | None = None) -> None:
        """To `ranks` (None: all) but those that are lost; one that is gone is lost from now on."""
        content, tensors = packed
        to = list(self._peers) if ranks is None else ranks
        self._send_bytes(to, content)
        for tensor in tensors:
            self._send_bytes(to, as_bytes(tensor.detach().cpu().contiguous()))

    def _send_bytes(self, ranks: Sequence[int], data: Any) -> None:
        for rank in ranks:
            if rank not in self._lost:
                try:
                    self._peers[rank].send_bytes(data)
                except OSError:
                    self._lost[rank] = _GONE

    def _gather(self, failed: bool) -> dict[int, Message]:
        """Every rank's answer. The first failure starts the time that the others have left."""
        answers: dict[int, Message] = {}
        waiting: dict[Any, int] = {peer: rank for rank, peer in self._peers.items() if rank not in self._lost}
        deadline = None
        while waiting:
            failed = failed or bool(self._lost) or any(a["error"] for a in answers.values())
            if failed and deadline is None:
                deadline = time.monotonic() + self.patience_s
            ready = wait(list(waiting), None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:
                self._lost |= dict.fromkeys(waiting.values(), f"no answer for {self.patience_s:g} s")
                break
            for peer in ready:
                rank = waiting.pop(peer)
                try:
                    answers[rank] = json.loads(self._peers[rank].recv_bytes())
                except (EOFError, OSError):
                    self._lost[rank] = _GONE
        self._send(pack({"do": "go on"}), [rank for rank, a in answers.items() if a["error"]])
        return answers

    def _flush(self) -> None:
        """Closes on all ranks the generators that were dropped."""
        while self._dropped:
            number, generator = self._dropped.pop()
            self._send(pack({"do": "close", "stream": number}))
            _close(generator)

    def _listen(self) -> None:
        """Fills a follower's inbox until rank 0 lets it go, or is gone: then this process ends, whatever it does."""
        message: Message = {"do": ""}
        while message["do"] != "end":
            try:
                message = receive(self._peers[0])
            except (EOFError, OSError):
                self.inbox.put(None)
                time.sleep(GRACE_S)
                os._exit(1)
            self.inbox.put(message)


class Leader:
    """Rank 0's trainer: a `Trainer` whose calls all ranks make, with what the torch trainer offers beyond it."""

    def __init__(self, build: Callable[[], Any], ranks: Ranks, *arguments: Any) -> None:
        """Every rank builds its trainer at the same time, so constructors may communicate; `arguments` (JSON values and
        tensors) are what the followers build theirs from. Raises what `build` raises, or `RunError` for a follower."""
        self._ranks = ranks
        self._trainer: Any = None
        self._trainer = ranks.call({"do": "build", "arguments": arguments}, build, _versions)

    @property
    def version(self) -> int:
        """See `Trainer`."""
        return self._trainer.version

    @property
    def draft_version(self) -> int:
        """See `Trainer`."""
        return self._trainer.draft_version

    @property
    def device(self) -> torch.device:
        """Of rank 0."""
        return self._trainer.device

    def step(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """See `Trainer`."""
        return self._call("step", batches)

    def logprobs(self, batches: Sequence[PackedBatch], *, reference: bool = False) -> list[Tensor]:
        """See `Trainer`."""
        return self._call("logprobs", batches, reference=reference)

    def fit_draft(self, batches: Sequence[PackedBatch]) -> None:
        """See `Trainer`."""
        self._call("fit_draft", batches)

    def warm_draft(self, batches: Sequence[PackedBatch], steps: int) -> Iterator[LossTerms]:
        """See `Trainer`."""
        return self._stream("warm_draft", batches, steps)

    def train_draft(self, batches: Sequence[PackedBatch], *, lr_scale: float = 1.0) -> LossTerms:
        """See `TorchTrainer`."""
        return self._call("train_draft", batches, lr_scale=lr_scale)

    def estimate_draft(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """See `TorchTrainer`."""
        return self._call("estimate_draft", batches)

    def freeze_draft(self) -> None:
        """See `Trainer`."""
        self._call("freeze_draft")

    def weights(self, role: Role) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`."""
        return self._stream("weights", role)

    def state_values(self) -> dict[str, Any]:
        """See `Trainer`."""
        return self._call("state_values")

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`."""
        return self._stream("state_tensors")

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """See `Trainer`. Followers read `Stored` tensors from the files, and are sent all others."""
        self._call("load_state", tensors, values)

    def trim(self) -> None:
        """See `Trainer`."""
        self._call("trim")

    @property
    def asleep(self) -> bool:
        """See `Trainer`."""
        return self._trainer.asleep

    def sleep(self, tags: Collection[str]) -> None:
        """See `Trainer`."""
        self._call("sleep", list(tags))

    def wake(self, tags: Collection[str] | None = None) -> None:
        """See `Trainer`."""
        self._call("wake", None if tags is None else list(tags))

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        message = {"do": "call", "name": name, "arguments": arguments, "options": options}
        return self._ranks.call(message, lambda: getattr(self._trainer, name)(*arguments, **options), self._state)

    def _stream(self, name: str, *arguments: Any) -> Iterator[Any]:
        message = {"name": name, "arguments": arguments}
        return self._ranks.stream(message, lambda: getattr(self._trainer, name)(*arguments), self._state)

    def _state(self, result: object) -> list[Any]:
        return _versions(self._trainer)


def follow(build: Callable[..., Any], ranks: Ranks) -> None:
    """A follower's work: builds a trainer from `Leader`'s arguments, then makes the calls that rank 0 makes.

    Returns when rank 0 says so. Raises `RunError` if it is gone.
    """
    follower = _Follower(build)
    while True:
        message = ranks.inbox.get()
        if message is None:
            raise RunError("rank 0 is gone, and this rank ends with it")
        if message["do"] == "end":
            dist.destroy_process_group()
            return
        error, state = None, []
        try:
            state = follower.act(message)
        except Exception as e:
            log.exception("%s failed", message.get("name", message["do"]))
            error = _sentence(e)
        if message["do"] != "close":
            ranks.answer(error, state)


class _Follower:
    """A trainer and its generators, as messages make them."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._trainer: Any = None
        self._streams: dict[int, Iterator[Any]] = {}

    def act(self, message: Message) -> list[Any]:
        """Does what it says; what rank 0 compares with its own. Takes the tensors out of it, so that they can go."""
        do, stream = message["do"], message.get("stream", -1)
        device = torch.device("cpu") if self._trainer is None else self._trainer.device
        tensors = [t.to(device) if elsewhere else t for t, elsewhere in message.pop("tensors")]
        arguments, options = (decode(message.get(name), tensors, device) for name in ("arguments", "options"))
        more = []
        if do == "build":
            self._trainer = self._build(*arguments)
        elif do == "call":
            getattr(self._trainer, message["name"])(*arguments, **options)
        elif do == "open":
            self._streams[stream] = getattr(self._trainer, message["name"])(*arguments)
        elif do == "next":
            more = [next(self._streams[stream], _END) is _END]
        if do == "close" or more == [True]:
            _close(self._streams.pop(stream))
        return [*_versions(self._trainer), *more]


def _versions(trainer: Any) -> list[Any]:
    return [trainer.version, trainer.draft_version]


def _sentence(error: Exception) -> str:
    plain = isinstance(error, ValueError | OSError | FloatingPointError | RunError)
    return str(error) if plain and str(error) else f"{type(error).__name__}: {error}"


def _raise(error: Exception | None, others: Mapping[int, str]) -> None:
    """Raises for a call that failed here with `error` or on other ranks; does nothing if it did not fail."""
    if error is not None and all(text == _sentence(error) for text in others.values()):
        raise error
    if others:
        by_text: dict[str, list[str]] = {}
        for rank, text in sorted({**({} if error is None else {0: _sentence(error)}), **others}.items()):
            by_text.setdefault(text, []).append(str(rank))
        named = [f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: {text}" for text, ranks in by_text.items()]
        raise RunError("; ".join(named)) from error


def _close(generator: Iterator[Any]) -> None:
    close = getattr(generator, "close", None)
    if close is not None:
        close()


def _broadcast(numbers: Sequence[int]) -> list[int]:
    """Rank 0's, on every rank."""
    tensor = torch.tensor(numbers)
    dist.broadcast(tensor, 0)
    return tensor.tolist()


def _connect(host: str, port: int, key: bytes, rank: int) -> Connection:
    peer = _connection(socket.create_connection((host, port), JOIN_S))
    answer_challenge(peer, key)
    deliver_challenge(peer, key)
    peer.send_bytes(json.dumps(rank).encode())
    return peer


def _accept(server: socket.socket, key: bytes) -> tuple[int, Connection]:
    """The next follower's rank, and the connection to it."""
    peer = _connection(server.accept()[0])
    deliver_challenge(peer, key)
    answer_challenge(peer, key)
    return json.loads(peer.recv_bytes()), peer


def _connection(made: socket.socket) -> Connection:
    made.settimeout(None)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(made.detach())
