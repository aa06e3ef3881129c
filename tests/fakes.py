"""An engine that is a dictionary of tensors, with faults to inject."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from miles_spec.sync.digest import digests
from miles_spec.types import Completion, EngineTimes, Request, Role, TensorMeta


class FakeEngine:
    """Holds tensors by role; generates nothing.

    `on_load(role, name, tensor)` sees the served tensor just after a copy and may corrupt it or raise; a name in `drop`
    is not copied; `frozen` ignores all loads.
    """

    def __init__(
        self,
        tensors: Mapping[Role, Mapping[str, Tensor]],
        *,
        name: str = "fake",
        draft_depth: int = 3,
        version: int = 0,
    ) -> None:
        self.name = name
        self.draft_depth = draft_depth
        self.tensors = {role: {n: t.clone() for n, t in named.items()} for role, named in tensors.items()}
        self.served: dict[Role, int] = dict.fromkeys(tensors, version)
        self.open: tuple[Role, ...] = ()
        self.sessions: list[tuple[int, tuple[Role, ...]]] = []
        self.loaded: list[list[str]] = []
        self.drop: set[str] = set()
        self.frozen = False
        self.on_load: Callable[[Role, str, Tensor], None] = lambda role, name, tensor: None

    def generate(
        self, requests: Sequence[Request], on_done: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        raise AssertionError("a fake engine does not generate")

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        pass

    def set_draft_depth(self, depth: int) -> None:
        self.draft_depth = depth

    def versions(self) -> Mapping[Role, int]:
        return dict(self.served)

    def manifest(self) -> Mapping[Role, Mapping[str, TensorMeta]]:
        return {
            role: {n: TensorMeta(shape=tuple(t.shape), dtype=str(t.dtype).split(".")[1]) for n, t in named.items()}
            for role, named in self.tensors.items()
        }

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


def flip_bit(tensor: Tensor, bit: int) -> None:
    """Flips one bit of a contiguous tensor in place."""
    data = tensor.view(-1).view(torch.uint8)
    data[bit // 8] ^= 1 << bit % 8


def flip_bit_of_file(path: Path, bit: int) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
