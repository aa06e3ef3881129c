"""What every rollout engine offers; the loop and the sync session know engines only by this.

Invariant: an engine never changes its weights except between `begin_update` and `end_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from miles_spec.types import Completion, EngineTimes, Request, Role, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Engine(Protocol):
    """Generates, and takes weights as the receiving end of a sync session."""

    name: str
    draft_depth: int
    """Drafted tokens per block; 0 is plain decoding."""

    def generate(
        self, requests: Sequence[Request], on_done: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """One completion per request, in the order of `requests`; `on_done` sees each as it finishes.

        Raises `ValueError` for a request that can never run (empty, or longer than the context), before any runs.
        """
        ...

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """Ends the named requests (all if None) at the next step; they return what they have, finish `abort`."""
        ...

    def set_draft_depth(self, depth: int) -> None:
        """Drafted tokens per block from now on; 0 is plain decoding. Raises `ValueError` without a draft."""
        ...

    def versions(self) -> Mapping[Role, int]:
        """The version of the weights served, by role."""
        ...

    def manifest(self) -> Mapping[Role, Mapping[str, TensorMeta]]:
        """Every tensor it serves, by role and by its name in the exported checkpoint."""
        ...

    def begin_update(self, version: int, roles: Sequence[Role]) -> None:
        """Opens a session. Raises `RuntimeError` while one is open or while requests run."""
        ...

    def load_weights(self, role: Role, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies one bucket. Raises `ValueError` that names a tensor of unknown name or wrong shape."""
        ...

    def end_update(self) -> Mapping[Role, Mapping[str, str]]:
        """Closes the session and returns the digest of every tensor it now serves of the session's roles, by role and
        name, computed from the served memory itself; safe to call after an error."""
        ...

    def take_times(self) -> EngineTimes:
        """Times and tokens since the last call, then starts again from zero."""
        ...
