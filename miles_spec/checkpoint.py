"""Checkpoints: one folder per step, written whole or not at all.

`checkpoints/step_000012/` holds tensors in `tensors_00000.safetensors`, and in more such files where they take more
than `FILE_BYTES`, and `state.json` (values, and the checksums of all files). Tensors come one by one, and no more of
them are held than those of the file at hand. A folder is written under a hidden name, flushed to the disk file by file,
and renamed into place.

Invariant: whatever moment the process or the machine dies at, every visible folder is complete, and the checkpoint that
was newest before the write, or the new one, can be loaded.

Hidden names: `.step_000012.tmp` is a write or a removal that has not ended and is swept away by the next `save`;
`.step_000012.old` is a checkpoint about to be replaced by one of the same step, and counts as that as long as it does
not come. Only `save` changes anything: whoever reads may do so while another process writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_spec.stored import Stored

log = logging.getLogger(__name__)

FORMAT = 2
TENSORS, STATE = "tensors_{:05d}.safetensors", "state.json"
FILE_BYTES = 1 << 30
"""Of tensors in one file, or of one that is larger."""
CHUNK_BYTES = 1 << 24

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names in a safetensors header (https://github.com/huggingface/safetensors, section Format)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What `save` was given, read back and checked."""

    path: Path
    step: int
    tensors: Mapping[str, Tensor]
    """On the CPU, bit for bit as saved, read when they are asked for."""
    values: dict[str, Any]
    """As JSON gives them back: tuples are lists, and keys are strings."""


def steps(out: Path) -> list[int]:
    """Steps that have a checkpoint in the run directory `out`, ascending."""
    root = out / "checkpoints"
    if not root.is_dir():
        return []
    names = (re.fullmatch(r"step_(\d{6,})|\.step_(\d{6,})\.old", path.name) for path in root.iterdir())
    return sorted({int(name[1] or name[2]) for name in names if name})


def save(out: Path, step: int, tensors: Iterable[tuple[str, Tensor]], values: Mapping[str, Any], *, keep: int) -> Path:
    """Writes the checkpoint of `step`, removes all but the `keep` newest up to it, and returns its folder.

    Tensors, each with a name of its own, may be on any device, share memory or have strides; those of one file are
    copied at a time. A checkpoint of the same step is replaced; those of later steps are left alone. Raises
    `ValueError` for `keep < 1`, values that JSON cannot hold and dtypes that safetensors has no name for, `OSError`,
    saying what is kept, where the disk is full or fails, and what `tensors` raises.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.keep must be at least 1, not {keep}")
    try:
        content = json.loads(json.dumps({"format": FORMAT, "step": step, "values": dict(values)}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the values of the checkpoint of step {step} cannot be written as JSON: {error}") from error

    root = out / "checkpoints"
    path = root / f"step_{step:06d}"
    temporary, old = root / f".{path.name}.tmp", root / f".{path.name}.old"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sync_folder(out)
        _recover(root)
        temporary.mkdir()
        content["files"] = {}
        for number, part in enumerate(_parts(tensors)):
            name = TENSORS.format(number)
            header, order = _header(part)
            content["files"][name] = _write(temporary / name, chain([header], (_bytes(part[n]) for n in order)))
        content["state_sha256"] = _state_sha256(content)
        _write(temporary / STATE, [json.dumps(content, indent=1).encode()])
        _sync_folder(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _sync_folder(root)
    except Exception as error:
        with suppress(OSError):  # what cannot be swept now is swept by the next save
            _recover(root)
        if not isinstance(error, OSError):
            raise
        kept = steps(out)
        raise OSError(
            f"the checkpoint of step {step} could not be written to {root} ({error.strerror or error}); "
            + (f"the one of step {kept[-1]} is kept" if kept else "there is no earlier one"),
        ) from error
    try:
        _recover(root)
        for other in [s for s in steps(out) if s <= step][:-keep]:
            _remove(root / f"step_{other:06d}")
    except OSError as error:
        log.warning("the checkpoint of step %d is saved, but an older one could not be removed: %s", step, error)
    return path


def load_latest(out: Path) -> Checkpoint | None:
    """The newest checkpoint of the run directory `out`, or None if there is none.

    Raises `ValueError` for a corrupt one, saying what removing it leads to: to go on from an older checkpoint repeats
    steps, so that is the user's to decide.
    """
    found = steps(out)
    if not found:
        return None
    path = out / "checkpoints" / f"step_{found[-1]:06d}"
    if not path.exists():
        path = path.with_name(f".{path.name}.old")
    try:
        return load(path)
    except ValueError as error:
        then = f"resumes from step {found[-2]}" if len(found) > 1 else "starts the run from the beginning"
        raise ValueError(f"{error}; removing {path} {then}") from error


def load(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, every byte checked. Raises `ValueError` that names the file at fault."""
    try:
        content = json.loads((path / STATE).read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(
                f"{path / STATE} is of checkpoint format {content['format']}, and this version reads format {FORMAT}"
            )
        intact = content.pop("state_sha256") == _state_sha256(content)
    except FileNotFoundError as error:
        raise ValueError(f"the checkpoint is corrupt: {path / STATE} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint is corrupt: {path / STATE} cannot be read ({error})") from error
    if not intact:
        raise ValueError(f"the checkpoint is corrupt: {path / STATE} differs from its checksum")

    for name, written in content["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != written["bytes"]:
                raise ValueError(f"the checkpoint is corrupt: {file} has {size} bytes instead of {written['bytes']}")
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != written["sha256"]:
                    raise ValueError(f"the checkpoint is corrupt: {file} differs from its checksum")
        except FileNotFoundError as error:
            raise ValueError(f"the checkpoint is corrupt: {file} is missing") from error
    tensors = Stored([path / name for name in content["files"]])
    return Checkpoint(path=path, step=content["step"], tensors=tensors, values=content["values"])


def _state_sha256(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Those of one file after the other, in the host's memory."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > FILE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().cpu()
        size += tensor.nbytes
    if part:
        yield part


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The head of a safetensors file, and the order of its tensors: wide dtypes first, so that all are aligned."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} of dtype {tensor.dtype} cannot be written to a checkpoint")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries, offset = {}, 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file in one pass and flushes it to the disk; returns its size and checksum."""
    sha, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                sha.update(chunk)
                file.write(chunk)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": sha.hexdigest()}


def _sync_folder(path: Path) -> None:
    """Makes names that were added to or renamed in a folder outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a checkpoint so that no part of it is ever visible."""
    temporary = path.with_name(f".{path.name}.tmp")
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def _recover(root: Path) -> None:
    """Puts back what was to be replaced and was not, and sweeps what a write or a removal left."""
    for old in root.glob(".step_*.old"):
        path = root / old.name.removeprefix(".").removesuffix(".old")
        if path.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, path)
    for temporary in root.glob(".step_*.tmp"):
        shutil.rmtree(temporary)
