"""How weights reach engines: in buckets of a set size, each sent to all members of a session at once.

A member within this process takes tensors as they are (`InProcess`). A remote one is told where they lie: in memory
that both see (`Ipc`), in a file (`Disk`), or in what is broadcast next (`Collective`, in `sync/collective.py`).
`sync/receivers.py` is its half.

Invariant: a bucket's tensors are only read, and need to stay as they are only until `send` returns. What a remote
member reads stays as it is until that member has answered.

A bucket is packed into one of two buffers, or files, in turn, so that packing one overlaps the members' loading of the
other.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from miles_spec.rollout.engine import LocalMember, Member, RemoteMember
from miles_spec.sync.dtypes import dtype_name
from miles_spec.sync.receivers import ALIGN_BYTES, gpu_uuid, map_file, views
from miles_spec.types import Role

Bucket = Sequence[tuple[str, Tensor]]
Command = dict[str, Any]
Answer = Mapping[str, Any] | Exception
Table = list[tuple[str, str, list[int], int]]

IN_TURN = 2
"""Buffers, and buckets on their way at a time."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a member did not get what it was sent."""

    why: str
    by: str = ""
    """The members whose failure caused this one; empty for a failure of its own."""


Faults = dict[str, Fault]
"""By a member's name."""


class Transport(Protocol):
    """A way from the trainer's memory into those of members, one session at a time."""

    def open(self, members: Sequence[Member], role: Role, room_bytes: int) -> Faults:
        """Prepares a session of `role` with buckets of at most `room_bytes`, padding included."""
        ...

    def send(self, members: Sequence[Member], role: Role, bucket: Bucket) -> Faults:
        """Sends one bucket to `members`, those of `open` that have not failed since.

        Tensors have the dtypes that the members serve. Returns the faults that showed since the last call, maybe of a
        bucket before this one.
        """
        ...

    def close(self, members: Sequence[Member], role: Role) -> Faults:
        """Ends the session once every member has answered for every bucket; the faults that showed since."""
        ...

    def stop(self) -> None:
        """Lets go of buffers, files and connections; the next `open` makes new ones."""
        ...


def aligned_bytes(tensor_bytes: int) -> int:
    """What a tensor takes of a bucket."""
    return -(-tensor_bytes // ALIGN_BYTES) * ALIGN_BYTES


def buckets(named: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Groups tensors, in order, into buckets of at most `bucket_bytes` with padding; a larger tensor travels alone.

    Takes from `named` no further than the bucket at hand and one tensor more. Raises `ValueError` for a size below 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, not {bucket_bytes}")
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named:
        more = aligned_bytes(tensor.nbytes)
        if bucket and size + more > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += more
    if bucket:
        yield bucket


def table_of(bucket: Bucket) -> tuple[Table, int]:
    """Where each tensor of a bucket lies in its flat form, and that form's bytes."""
    table, offset = [], 0
    for name, tensor in bucket:
        table.append((name, dtype_name(tensor.dtype), list(tensor.shape), offset))
        offset += aligned_bytes(tensor.nbytes)
    return table, offset


class InProcess:
    """Trainer and engine in one process: the engine copies out of the trainer's tensors, across devices if need be."""

    def open(self, members: Sequence[Member], role: Role, room_bytes: int) -> Faults:
        for member in members:
            if not isinstance(member, LocalMember):
                raise ValueError(f"engine {member.name!r} is in another process; choose a transport that goes there")
        return {}

    def send(self, members: Sequence[Member], role: Role, bucket: Bucket) -> Faults:
        faults: Faults = {}
        for member in members:
            assert isinstance(member, LocalMember)
            try:
                member.load_weights(role, [(name, tensor.detach()) for name, tensor in bucket])
            except Exception as error:  # an engine may fail in any way, and the others go on
                faults[member.name] = Fault(why=said(error))
        return faults

    def close(self, members: Sequence[Member], role: Role) -> Faults:
        return {}

    def stop(self) -> None:
        pass


def said(error: BaseException) -> str:
    """An exception as a fault's sentence."""
    return f"{type(error).__name__}: {error}"


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Runs `work` in a thread that ends with the process, unlike those of an executor, which a dead engine could hold
    up."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def each(members: Sequence[Member], work: Callable[[Any], T]) -> dict[str, T | Exception]:
    """What `work` gave for each member, or raised, by name; all members at once, in this thread if there is one."""

    def tried(member: Member) -> T | Exception:
        try:
            return work(member)
        except Exception as error:
            return error

    if len(members) == 1:
        return {members[0].name: tried(members[0])}
    running = {member.name: in_thread(lambda member=member: tried(member)) for member in members}  # type: ignore[misc]
    return {name: future.result() for name, future in running.items()}


def fault_of(answer: Answer) -> str | None:
    """Why a member did not do as it was told, as a sentence; None if it did."""
    if isinstance(answer, Exception):
        return said(answer)
    if answer.get("ok") is True:
        return None
    return str(answer.get("fault") or f"it answered {dict(answer)}")


class Remote(ABC):
    """What the transports to other processes share: one bucket after the other, packed ahead, faults by member.

    `_faults` are those of the session, by name; `_told` the names of which the caller knows.
    """

    def __init__(self) -> None:
        self._members: tuple[RemoteMember, ...] = ()
        self._on_way: deque[Future[None]] = deque()
        self._faults: Faults = {}
        self._told: set[str] = set()
        self._sent = 0

    def open(self, members: Sequence[Member], role: Role, room_bytes: int) -> Faults:
        remote = []
        for member in members:
            if not isinstance(member, RemoteMember):
                raise ValueError(f"engine {member.name!r} is in this process; choose the transport InProcess for it")
            remote.append(member)
        assert not self._on_way, "one session at a time"
        self._members, self._sent = tuple(remote), 0
        self._faults, self._told = {}, set()
        self._faults |= self._open(self._members, role, room_bytes)
        return self._news()

    def send(self, members: Sequence[Member], role: Role, bucket: Bucket) -> Faults:
        while len(self._on_way) >= IN_TURN:
            self._on_way.popleft().result()
        before = self._on_way[-1] if self._on_way else None
        slot = self._sent % IN_TURN
        self._sent += 1
        command, ready = self._pack(bucket, role, slot)

        def fly() -> None:
            if before is not None:
                before.result()
            well = [member for member in self._members if member.name not in self._faults]
            try:
                ready()
                self._faults |= self._deliver(well, command) if well else {}
            except Exception as error:  # on the trainer's side, such as a full disk
                self._faults |= {member.name: Fault(why=said(error)) for member in well}

        self._on_way.append(in_thread(fly))
        return self._news()

    def close(self, members: Sequence[Member], role: Role) -> Faults:
        while self._on_way:
            self._on_way.popleft().result()
        self._members = ()
        return self._news()

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def _open(self, members: Sequence[RemoteMember], role: Role, room_bytes: int) -> Faults: ...

    @abstractmethod
    def _pack(self, bucket: Bucket, role: Role, slot: int) -> tuple[Command, Callable[[], None]]:
        """Takes the bucket's bytes; the command that delivers them, and what waits until they may be read."""

    def _deliver(self, members: Sequence[RemoteMember], command: Command) -> Faults:
        """Has members load one bucket; returns when all of them have, or have failed."""
        return own_faults(each(members, lambda member: member.deliver(command)))

    def _news(self) -> Faults:
        news = {name: fault for name, fault in dict(self._faults).items() if name not in self._told}
        self._told |= news.keys()
        return news


def own_faults(answers: Mapping[str, Answer]) -> Faults:
    """Of members that did not do as they were told, by name, each through its own fault."""
    faults = {name: fault_of(answer) for name, answer in answers.items()}
    return {name: Fault(why=why) for name, why in faults.items() if why is not None}


def fill(bucket: Bucket, buffer: Tensor) -> tuple[Table, int, Callable[[], None]]:
    """Packs a bucket into a buffer; its table, its bytes, and what waits until the copies are done."""
    table, size = table_of(bucket)
    assert size <= buffer.numel(), "the buffers were made for smaller buckets"
    for (_, place), (_, tensor) in zip(views(buffer, table), bucket, strict=True):
        place.copy_(tensor.detach())
    if buffer.device.type != "cuda":
        return table, size, lambda: None
    packed = torch.cuda.Event()
    packed.record(torch.cuda.current_stream(buffer.device))
    return table, size, packed.synchronize


class Ipc(Remote):
    """Members on this machine: they map the trainer's buffers, on a GPU that they see too or in shared memory.

    `device` is where the buffers lie: the trainer's GPU, or the CPU. A file of shared memory has mode 0600 and lies in
    `folder`, by default the machine's shared memory or, where that is too small, its folder for temporary files.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        super().__init__()
        self._device, self._folder = device, folder
        self._buffers: list[Tensor] = []
        self._offers: list[Command] = []
        self._remove: Callable[[], object] = lambda: None

    def stop(self) -> None:
        self._buffers, self._offers = [], []
        self._remove()

    def _open(self, members: Sequence[RemoteMember], role: Role, room_bytes: int) -> Faults:
        if not self._buffers or self._buffers[0].numel() < room_bytes:
            self.stop()
            if self._device.type == "cuda":
                self._buffers = [
                    torch.empty(room_bytes, dtype=torch.uint8, device=self._device) for _ in range(IN_TURN)
                ]
                self._offers = [_export_cuda(buffer) for buffer in self._buffers]
            else:
                paths = [_shared_file(room_bytes, self._folder) for _ in range(IN_TURN)]
                self._remove = weakref.finalize(self, partial(_unlink, paths))
                self._buffers = [map_file(path, room_bytes) for path in paths]
                self._offers = [{"path": path, "bytes": room_bytes} for path in paths]
        command: Command = {"do": "open", "via": {"kind": "ipc", "buffers": self._offers}}
        return own_faults(each(members, lambda member: member.deliver(command)))

    def _pack(self, bucket: Bucket, role: Role, slot: int) -> tuple[Command, Callable[[], None]]:
        table, size, ready = fill(bucket, self._buffers[slot])
        return {"do": "load", "table": table, "bytes": size, "via": {"slot": slot}}, ready


def _unlink(paths: Sequence[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def _shared_file(size_bytes: int, folder: Path | None) -> str:
    """A new file of that size, its room taken, since writing to a mapping without room would kill the process."""
    for place in [Path("/dev/shm"), Path(tempfile.gettempdir())] if folder is None else [folder]:
        if place.is_dir() and shutil.disk_usage(place).free > size_bytes:
            handle, path = tempfile.mkstemp(prefix="miles-spec-", dir=place)
            try:
                os.posix_fallocate(handle, 0, max(size_bytes, 1))
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(handle)
            return path
    raise ValueError(f"no room for a buffer of {size_bytes >> 20} MiB in shared memory; lower fleet.bucket_mb")


def _export_cuda(buffer: Tensor) -> Command:
    """What another process needs to map `buffer`, as JSON. The buffer must outlive every mapping's use."""
    from torch.multiprocessing.reductions import reduce_tensor

    start = buffer.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= start < segment["address"] + segment["total_size"] and segment.get("is_expandable"):
            raise ValueError(
                "memory of expandable segments cannot be shared with other processes; take expandable_segments:True "
                "out of PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF), or use the nccl or the disk transport"
            )
    _, arguments = reduce_tensor(buffer)
    offset, (device, handle, storage_bytes, storage_offset) = arguments[3], arguments[6:10]
    counter, counter_offset, event, event_wait = arguments[11:15]
    return {
        "uuid": gpu_uuid(device),
        "bytes": buffer.numel(),
        "tensor_offset": offset,
        "handle": b64encode(handle).decode(),
        "storage_bytes": storage_bytes,
        "storage_offset": storage_offset,
        "counter": b64encode(counter).decode(),
        "counter_offset": counter_offset,
        "event": b64encode(event).decode(),
        "event_wait": event_wait,
    }


class Disk(Remote):
    """Members that share a folder with the trainer, under the same path: one safetensors file per bucket.

    A file appears under its name only when it is whole and on disk, and goes once every member has read it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._run = secrets.token_hex(4)

    def stop(self) -> None:
        for path in (*self._folder.glob(f"{self._run}-*"), *self._folder.glob(f".{self._run}-*")):
            path.unlink(missing_ok=True)

    def close(self, members: Sequence[Member], role: Role) -> Faults:
        try:
            return super().close(members, role)
        finally:
            self.stop()

    def _open(self, members: Sequence[RemoteMember], role: Role, room_bytes: int) -> Faults:
        self._folder.mkdir(parents=True, exist_ok=True)
        command: Command = {"do": "open", "via": {"kind": "disk"}}
        return own_faults(each(members, lambda member: member.deliver(command)))

    def _pack(self, bucket: Bucket, role: Role, slot: int) -> tuple[Command, Callable[[], None]]:
        table, size = table_of(bucket)
        held = {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in bucket}
        path = self._folder.absolute() / f"{self._run}-{role}-{self._sent}.safetensors"
        return {"do": "load", "table": table, "bytes": size, "via": {"path": str(path)}}, lambda: _write(held, path)

    def _deliver(self, members: Sequence[RemoteMember], command: Command) -> Faults:
        try:
            return super()._deliver(members, command)
        finally:
            Path(command["via"]["path"]).unlink()


def _write(named: Mapping[str, Tensor], path: Path) -> None:
    hidden = path.with_name(f".{path.name}")
    save_file(dict(named), hidden)
    for written in (hidden, path.parent):
        handle = os.open(written, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if written is hidden:
            hidden.rename(path)
