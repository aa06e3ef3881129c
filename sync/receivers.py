"""The engine's half of a transport: opens what the trainer offers and hands out the tensors of each bucket.

A transport sends `{"do": "open", "via": ...}` once or more per session and `{"do": "load", ...}` per bucket:

    receiver = open_receiver(command["via"], rank=rank, device=device, before=receiver)
    with receiver.bucket(command) as named:  # [(name, tensor)]
        ...copy them into the model...
    receiver.close()

Invariant: when the `with` block is left, nothing reads the trainer's memory any more, so the trainer may overwrite it.

A bucket is flat: tensors in one uint8 buffer, each at an offset that is a multiple of `ALIGN_BYTES`; its table has one
row `[name, dtype, shape, offset]` per tensor. Runs inside the engine's process: see CONTRIBUTING.md for what it may
import.
"""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's `__all__`

from miles_spec.sync.dtypes import dtype_of
from miles_spec.sync.group import CUMEM, NO_GROUP, Group

ALIGN_BYTES = 256
"""Offsets are multiples of this, which suits every dtype and wide loads on a GPU."""

Named = list[tuple[str, Tensor]]


class Receiver(Protocol):
    """What one rank of an engine takes buckets from, for one session."""

    def bucket(self, command: Mapping[str, Any]) -> AbstractContextManager[Named]:
        """The tensors of a `load` command, which hold good within the block. Raises an error that says why."""
        ...

    def close(self) -> None:
        """Lets go of the trainer's memory."""
        ...


def open_receiver(
    via: Mapping[str, Any], *, rank: int, device: torch.device, before: Receiver | None = None
) -> Receiver:
    """The receiver for what an `open` command offers. `rank` counts within the engine; `device` is the model's.

    `before` is closed, or returned where it has just that open already, since mapping memory takes time. Raises an
    error, such as `ValueError` or `ConnectionError`, that says why this rank cannot receive that way.
    """
    if isinstance(before, IpcReceiver) and before.has(via, device):
        return before
    if before is not None:
        before.close()
    kind = via["kind"]
    if kind == "ipc":
        return IpcReceiver(via["buffers"], device)
    if kind in ("gloo", "nccl"):
        return CollectiveReceiver(via, rank, device)
    if kind == "disk":
        return DiskReceiver(device)
    raise ValueError(f"no transport is called {kind!r}; trainer and engine need the same version of miles-spec")


def views(flat: Tensor, table: Sequence[Sequence[Any]]) -> Named:
    """The tensors that a bucket's `table` finds in `flat`, without a copy. Raises `ValueError` for one beyond it."""
    named = []
    for name, kind, shape, offset in table:
        dtype = dtype_of(kind)
        end = offset + prod(shape) * dtype.itemsize
        if not 0 <= offset <= end <= flat.numel():
            raise ValueError(f"tensor {name!r} would lie at bytes {offset} to {end} of a bucket of {flat.numel()}")
        named.append((name, flat[offset:end].view(dtype).view(shape)))
    return named


def gpu_uuid(index: int) -> str:
    """The name of a GPU that is the same in every process, whichever devices each of them sees."""
    return str(torch.cuda.get_device_properties(index).uuid)


def map_file(path: str, size_bytes: int) -> Tensor:
    """`[size_bytes]` uint8: a file's bytes, mapped and shared with whoever maps it too. Raises `FileNotFoundError`."""
    if not os.path.exists(path):  # `from_file` would make an empty one
        raise FileNotFoundError(f"{path} is not visible here; use the disk transport if only a file system is shared")
    storage = torch.UntypedStorage.from_file(path, True, size_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]  # torch's stub names a base class


def _map_cuda(buffer: Mapping[str, Any]) -> Tensor:
    """`[bytes]` uint8: the trainer's memory on a GPU, in this process's numbering of devices."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    index = next((i for i in range(torch.cuda.device_count()) if gpu_uuid(i) == buffer["uuid"]), None)
    if index is None:
        raise ValueError(f"the trainer's GPU {buffer['uuid']} is not visible here; use the nccl or the disk transport")
    tensor: Tensor = rebuild_cuda_tensor(
        Tensor,
        torch.Size([buffer["bytes"]]),
        (1,),
        buffer["tensor_offset"],
        torch.storage.TypedStorage,
        torch.uint8,
        index,
        b64decode(buffer["handle"]),
        buffer["storage_bytes"],
        buffer["storage_offset"],
        False,
        b64decode(buffer["counter"]),
        buffer["counter_offset"],
        b64decode(buffer["event"]),
        buffer["event_wait"],
    )
    return tensor


def _wait_for(*devices: torch.device) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class IpcReceiver:
    """Reads straight from the trainer's buffers: memory of a GPU, or a file that both map."""

    def __init__(self, buffers: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self._offers, self._device = buffers, device
        self._buffers = [map_file(b["path"], b["bytes"]) if "path" in b else _map_cuda(b) for b in buffers]

    def has(self, via: Mapping[str, Any], device: torch.device) -> bool:
        """Whether it has open what `via` offers."""
        return via["kind"] == "ipc" and via["buffers"] == self._offers and device == self._device

    @contextmanager
    def bucket(self, command: Mapping[str, Any]) -> Iterator[Named]:
        buffer = self._buffers[command["via"]["slot"]]
        try:
            yield views(buffer, command["table"])
        finally:
            _wait_for(self._device, buffer.device)

    def close(self) -> None:
        self._buffers.clear()


class DiskReceiver:
    """Reads one safetensors file per bucket, to the model's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @contextmanager
    def bucket(self, command: Mapping[str, Any]) -> Iterator[Named]:
        path = Path(command["via"]["path"])
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not visible here; give a folder that trainer and engines share")
        with safe_open(path, "pt", device=str(self._device)) as file:
            named = [(name, file.get_tensor(name)) for name, *_ in command["table"]]
            for (name, tensor), (_, kind, shape, _) in zip(named, command["table"], strict=True):
                if tensor.dtype != dtype_of(kind) or list(tensor.shape) != list(shape):
                    raise ValueError(
                        f"{path.name} holds {name!r} as {tensor.dtype}{list(tensor.shape)}, not {kind}{shape}"
                    )
            yield named
            _wait_for(self._device)

    def close(self) -> None:
        pass


_groups: dict[str, Group] = {}
"""Groups this process has joined, by their names; they outlive sessions, since making one is slow."""


class CollectiveReceiver:
    """Takes what the trainer broadcasts to the ranks of all engines."""

    def __init__(self, via: Mapping[str, Any], rank: int, device: torch.device) -> None:
        self._device = torch.device("cpu") if via["kind"] == "gloo" else device
        self._flat = torch.empty(via["bytes"], dtype=torch.uint8, device=self._device)
        for name in [name for name in _groups if name not in via["keep"]]:
            _groups.pop(name).abort()
        name = via["group"]
        if name not in _groups:
            if via["joined"]:
                raise LookupError(f"rank {rank} {NO_GROUP} {name}")
            here = os.environ.get(CUMEM, "")
            if via["kind"] == "nccl" and here != via["cumem"]:
                raise ValueError(
                    f"{CUMEM} is {here!r} here and {via['cumem']!r} in the trainer's process; start both alike, "
                    "or NCCL waits for ever"
                )
            host, port = via["address"]
            timeout_s = via["timeout_s"]
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
            _groups[name] = Group(
                via["kind"],
                store,
                name=name,
                rank=via["rank"] + rank,
                world=via["world"],
                device=self._device,
                timeout_s=timeout_s,
            )
        self._name = name

    @contextmanager
    def bucket(self, command: Mapping[str, Any]) -> Iterator[Named]:
        """As `Receiver.bucket`. A command with an empty table only takes part, so that other engines get theirs."""
        flat = self._flat[: command["bytes"]]
        try:
            _groups[self._name].broadcast(flat)
        except (ConnectionError, TimeoutError):
            _groups.pop(self._name).abort()
            raise
        try:
            yield views(flat, command["table"])
        finally:
            _wait_for(self._device)

    def close(self) -> None:
        self._flat = torch.empty(0)
