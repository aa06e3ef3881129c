"""What rank 0 says to the others: JSON, after which come its tensors as their bytes. Never a pickle. Of tensors in
files only the files are named.

Invariant: every value arrives as it was sent, bit for bit, but for sequences, which arrive as lists, and for tensors of
a GPU, which arrive on the receiver's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_spec.kernels.layout import PackedLayout
from miles_spec.stored import Stored
from miles_spec.types import PackedBatch

Message = dict[str, Any]
"""`do` says what; `arguments` and `options` may hold tensors and batches."""
Packed = tuple[bytes, list[Tensor]]


def pack(message: Message) -> Packed:
    """A message as it travels: its JSON, and the tensors that follow."""
    tensors: list[Tensor] = []
    content = {key: _encode(value, tensors) for key, value in message.items()}
    kinds = [[str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type != "cpu"] for t in tensors]
    return json.dumps([content, kinds]).encode(), tensors


def receive(peer: Connection) -> Message:
    """A message, still encoded, and its `tensors` on the CPU, each with whether it was elsewhere."""
    message, kinds = json.loads(peer.recv_bytes())
    message["tensors"] = []
    for dtype, shape, elsewhere in kinds:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        peer.recv_bytes_into(as_bytes(tensor))
        message["tensors"].append((tensor, elsewhere))
    return message


def as_bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    """`value` for JSON; its tensors are added to `tensors`. All sequences become lists."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, PackedBatch):
        assert value.layout.cp_size == 1, "a batch travels whole; trainers cut it"
        named = {f.name: _encode(getattr(value, f.name), tensors) for f in fields(value) if f.name != "layout"}
        return {"batch": named, "lengths": list(value.layout.lengths)}
    if isinstance(value, Stored):
        return {"stored": [str(path.absolute()) for path in value.paths]}
    if isinstance(value, Mapping):
        assert all(isinstance(key, str) for key in value), "JSON has no other keys"
        return {"mapping": {key: _encode(item, tensors) for key, item in value.items()}}
    if isinstance(value, Sequence):
        return [_encode(item, tensors) for item in value]
    raise TypeError(f"{type(value).__name__} does not travel between ranks")


def decode(value: Any, tensors: Sequence[Tensor], device: torch.device) -> Any:
    """The reverse of `_encode`; layouts are made on `device`."""
    if isinstance(value, list):
        return [decode(item, tensors, device) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "stored" in value:
        return Stored([Path(path) for path in value["stored"]])
    named = value["batch"] if "batch" in value else value["mapping"]
    parts = {key: decode(item, tensors, device) for key, item in named.items()}
    return PackedBatch(layout=PackedLayout.make(value["lengths"], device), **parts) if "batch" in value else parts
