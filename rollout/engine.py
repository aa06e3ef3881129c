"""What every rollout engine offers; the loop and the sync session know engines only by this.

An `Engine` generates. Its `members` are what holds weights: an engine within this process is its own only member, a
fleet of servers has one member per server. Invariant: a member never changes its weights except between `begin_update`
and `end_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from miles_spec.types import Completion, EngineTimes, Request, Role, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Member(Protocol):
    """Serves one copy of the weights, as the receiving end of a sync session."""

    name: str
    draft_depth: int
    """Drafted tokens per block; 0 is plain decoding."""

    def set_draft_depth(self, depth: int) -> None:
        """Drafted tokens per block from now on; 0 is plain decoding. Raises `ValueError` without a draft.

        A member that must restart for that serves nothing verified afterwards; `versions` says so.
        """
        ...

    def versions(self) -> Mapping[Role, int]:
        """The version of the weights served, by role; -1 where none was verified since it started."""
        ...

    def manifest(self) -> Mapping[Role, Mapping[str, TensorMeta]]:
        """Every tensor it serves, by role and by its name in the exported checkpoint."""
        ...

    def begin_update(self, version: int, roles: Sequence[Role]) -> None:
        """Opens a session. Raises `RuntimeError` while one is open or while requests run."""
        ...

    def end_update(self) -> Mapping[Role, Mapping[str, str]]:
        """Closes the session and returns the digest of every tensor it now serves of the session's roles, by role and
        name, computed from the served memory itself; safe to call after an error."""
        ...

    def leave(self, reason: str) -> None:
        """Stops generating until a push of the target verifies: what it serves is not what was sent."""
        ...


@runtime_checkable
class LocalMember(Member, Protocol):
    """A member within this process, which takes tensors as they are."""

    def load_weights(self, role: Role, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies one bucket. Raises `ValueError` that names a tensor of unknown name or wrong shape."""
        ...


@runtime_checkable
class RemoteMember(Member, Protocol):
    """A member in other processes, which is told where its tensors lie."""

    ranks: int
    """Processes that hold its weights, each with all of them or a shard."""

    def deliver(self, command: Mapping[str, Any]) -> Mapping[str, Any]:
        """Has every rank obey `command` within the open session; the first rank's answer, or the first fault's.

        Raises `ConnectionError` when a rank is gone and `TimeoutError` when it does not answer.
        """
        ...


@runtime_checkable
class PushMember(Member, Protocol):
    """A member that opens something for a session which the next one of the same push can use too."""

    def begin_push(self, roles: Sequence[Role]) -> None:
        """Sessions of these roles will follow, each any number of times. Does not fail: the first session opens."""
        ...

    def end_push(self) -> None:
        """Closes what sessions have left open, so that it may generate. Raises where that fails: it then serves nothing
        that was verified."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Generates."""

    name: str
    draft_depth: int
    """Drafted tokens per block; 0 is plain decoding."""
    max_running: int
    """Sequences decoded together by one member; may be set between two calls of `generate`."""
    max_context: int
    """Tokens of prompt and response together."""

    def members(self) -> Sequence[Member]:
        """What holds weights and can take a push now."""
        ...

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
        """See `Member.set_draft_depth`, for all members."""
        ...

    def versions(self) -> Mapping[Role, int]:
        """The version of the weights that generate, by role."""
        ...

    def take_times(self) -> EngineTimes:
        """Times and tokens since the last call, then starts again from zero."""
        ...

    def release(self) -> None:
        """Gives back what memory it can until `wake`, for a trainer on the same GPU; without effect elsewhere."""
        ...

    def wake(self) -> None:
        """Takes its memory again, after `release`; its weights must be pushed before it generates."""
        ...


def check_room(request: Request, max_context: int) -> None:
    """Raises `ValueError` for a request that can never run: one without a prompt, or longer than the context."""
    prompt, asked = len(request.tokens), request.sampling.max_new_tokens
    if not prompt:
        raise ValueError(f"request {request.id!r} has an empty prompt")
    if prompt + asked > max_context:
        raise ValueError(
            f"request {request.id!r} has {prompt} prompt tokens and asks for {asked} more, but the context holds "
            f"{max_context}; shorten the prompt, lower rollout.max_new_tokens or raise rollout.max_context"
        )
