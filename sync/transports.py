"""How weights reach one engine: in buckets of a set size, by a `Transport`.

Invariant: a bucket's tensors are only read, and need to stay as they are only until `send` returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from miles_spec.rollout.engine import Engine
from miles_spec.types import Role


class Transport(Protocol):
    """A way from the trainer's memory into an engine's."""

    def send(self, engine: Engine, role: Role, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Delivers one bucket within an open session; when it returns, the engine has its own copy."""
        ...


class InProcess:
    """Trainer and engine in one process: the engine copies out of the trainer's tensors, across devices if need be."""

    def send(self, engine: Engine, role: Role, bucket: Sequence[tuple[str, Tensor]]) -> None:
        engine.load_weights(role, [(name, tensor.detach()) for name, tensor in bucket])


def buckets(named: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Groups tensors, in order, into buckets of at most `bucket_bytes`; a larger tensor travels alone.

    Takes from `named` no further than the bucket at hand and one tensor more. Raises `ValueError` for a size below 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, not {bucket_bytes}")
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
