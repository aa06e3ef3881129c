"""Tensors in safetensors files, each read when it is asked for.

Invariant: files are mapped, not read, so that what nobody looks at takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class Stored(Mapping[str, Tensor]):
    """The tensors of all of `paths`, on the CPU. Raises `ValueError` for a file that is not there."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._files: dict[str, Any] = {}
        for path in self.paths:
            if not path.is_file():
                raise ValueError(f"{path} is missing here; all ranks of a run have to see its folder")
            file = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        """Its pages are read as they are touched, and copied as they are written to: the file stays as it is."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
