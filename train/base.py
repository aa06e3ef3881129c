"""What every trainer offers; the loop knows trainers only by this.

Invariant: whether the draft trains or not, the policy's weights after a step are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from miles_spec.types import LossTerms, PackedBatch, Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def check_state(tensors: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """Raises `ValueError` naming the first tensor that does not fit a trainer whose state has the shapes `wanted`."""
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"the checkpoint lacks tensor {name!r}; it is of a run of another configuration")
        if tuple(tensors[name].shape) != tuple(shape):
            shapes = f"{list(tensors[name].shape)} in the checkpoint and {list(shape)} in this run"
            raise ValueError(f"tensor {name!r} has shape {shapes}")
    for name in tensors:
        if name not in wanted and not name.startswith("random."):
            raise ValueError(f"the checkpoint has tensor {name!r}, for which this run's configuration has no place")


class Trainer(Protocol):
    """Owns the policy, its draft and their optimizers."""

    @property
    def device(self) -> torch.device:
        """Of this process's part, and of the micro-batches that it is given."""
        ...

    @property
    def version(self) -> int:
        """Optimizer steps taken on the policy; the version its weights are pushed under."""
        ...

    @property
    def draft_version(self) -> int:
        """Optimizer steps taken on the draft, warm start included."""
        ...

    def step(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """One optimizer step of policy and draft over all micro-batches of one minibatch."""
        ...

    def logprobs(self, batches: Sequence[PackedBatch], *, reference: bool = False) -> list[Tensor]:
        """`[T]` float32 per batch: log-probability of `tokens[i]` given those before it in its segment (0 for a
        segment's first token), at the rollout temperature, without gradient; of the reference model on request."""
        ...

    def fit_draft(self, batches: Sequence[PackedBatch]) -> None:
        """Sets what of a fresh draft needs no gradient, from the policy's states over those of `batches` that
        have a sampled token."""
        ...

    def warm_draft(self, batches: Sequence[PackedBatch], steps: int) -> Iterator[LossTerms]:
        """`steps` optimizer steps of the draft alone, each on one of the micro-batches in turn; taken as they are asked
        for."""
        ...

    def freeze_draft(self) -> None:
        """Keeps a copy of the draft as it is now: the `frozen` one of `LossTerms.acceptance`."""
        ...

    def weights(self, role: Role) -> Iterator[tuple[str, Tensor]]:
        """The tensors an engine serves, by their names in the exported checkpoint; detached, not copied."""
        ...

    def state_values(self) -> dict[str, Any]:
        """What resuming needs beside `state_tensors`, for JSON."""
        ...

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that resuming needs (weights, optimizer moments, frozen draft, random state), each by a name of
        its own; detached, not copied. Those that several ranks hold are gathered one at a time, as they are asked for,
        and are rank 0's alone: on the others their names come with anything."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The reverse of both; every rank is given all of them. Raises `ValueError` naming the first tensor that is
        missing or misshapen."""
        ...

    def trim(self) -> None:
        """Gives the GPU back what a step leaves over: gradients, which nobody reads until the next, and memory that
        holds nothing."""
        ...

    @property
    def asleep(self) -> bool:
        """Whether it has moved anything away with `sleep`. Only `sleep` and `wake` may be called then, and `weights` of
        a role that is here."""
        ...

    def sleep(self, tags: Collection[str]) -> None:
        """Moves to the host's memory what `train.offload` names and `tags` has: "weights", "optimizer", "draft" (its
        weights, moments and frozen copy). Gradients are freed whatever the tags."""
        ...

    def wake(self, tags: Collection[str] | None = None) -> None:
        """The reverse, bit for bit, of `tags` or of all."""
        ...
