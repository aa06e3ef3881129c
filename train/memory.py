"""What a trainer does about memory: what of its own waits in the host's while others need the GPU, and what it says
and does when there is none left.

Invariant: what was moved away comes back with the same bits into the same storages, so that no view of them notices.
"""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from miles_spec.config import RunConfig, TrainConfig
from miles_spec.train.draft_trainer import DraftTrainer
from miles_spec.train.packing import repack
from miles_spec.types import PackedBatch, RunError

log = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Storages = list[tuple[torch.UntypedStorage, int]]
"""Each with its size in bytes while it is here."""

GRADIENTS = "gradients"
"""What is freed and not moved, since nobody reads it between two steps."""
CHUNK_BYTES = 64 << 20
"""Of pinned memory at a time: torch rounds each up to a power of 2."""


class TrainingMemoryError(RunError):
    """The GPU has no memory left for a part of training; the message names what to set."""

    survivable = True
    """Whether nothing had been written yet, so that the step may be taken again in smaller parts."""


class Memory:
    """Of one trainer. Tags are those of `train.offload`."""

    def __init__(
        self, config: RunConfig, device: torch.device, held: Callable[[], Mapping[str, Iterable[Tensor]]]
    ) -> None:
        """`held` gives all large tensors by tag, and gradients as `GRADIENTS`, in an order of preference for storages
        that are under two."""
        self._config, self._device, self._held = config, device, held
        self._away: dict[str, Storages] = {}
        self._hosts: dict[str, list[Tensor]] = defaultdict(list)
        self._at = "training", 0

    @property
    def asleep(self) -> bool:
        """Whether anything is away."""
        return bool(self._away)

    def sleep(self, tags: Collection[str]) -> None:
        """Moves those of `train.offload` that are among `tags` to the host's memory, and frees the gradients."""
        moving = {t for t in self._config.train.offload if t in tags} | {GRADIENTS}
        for tensor in (t for tag, tensors in self._held().items() if tag in moving for t in tensors):
            if not _local(tensor).untyped_storage().resizable():  # on a CPU it may be a file's, or numpy's as well
                tensor.data = tensor.data.clone()
        found = {tag: storages for tag, storages in self._storages().items() if tag in moving - self._away.keys()}
        for tag in found.keys() - {GRADIENTS}:
            for here, there in self._pieces(tag, found[tag]):
                there.copy_(here, non_blocking=True)
        self._settle()
        for storage, _ in (pair for storages in found.values() for pair in storages):
            storage.resize_(0)
        self._away |= found
        self.trim()

    def wake(self, tags: Collection[str] | None = None) -> None:
        """Brings back what is away, or those of `tags`; gradients, which are 0 then, come with everything only."""
        self.at("taking back what train.offload had moved away", 0)
        with self.told():
            for tag in [tag for tag in self._away if tags is None or tag in tags]:
                for storage, size in self._away[tag]:
                    storage.resize_(size)
                if tag == GRADIENTS:
                    for storage, _ in self._away[tag]:
                        _bytes(storage).zero_()
                else:
                    for here, there in self._pieces(tag, self._away[tag]):
                        here.copy_(there, non_blocking=True)
                del self._away[tag]
            self._settle()

    def trim(self) -> None:
        """Gives memory that holds nothing back to the GPU."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def need(self, *tags: str) -> None:
        """Asserts that `tags`, by default all, are here."""
        away = [tag for tag in self._away if not tags or tag in tags]
        assert not away, f"the trainer sleeps ({', '.join(away)}): wake it first"

    def at(self, phase: str, tokens: int | None = None) -> None:
        """Says what is done from now on, on a micro-batch of so many tokens (0: on none), or on the same as before."""
        self._at = phase, self._at[1] if tokens is None else tokens

    @contextmanager
    def told(self) -> Iterator[None]:
        """Says of an error of memory what is to be done."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            told = TrainingMemoryError(self._sentence())
            told.survivable = self._at[0] != "the optimizer"
            raise told from error

    def _sentence(self) -> str:
        phase, tokens = self._at
        sizes = {tag: sum(size for _, size in storages) for tag, storages in self._storages().items()}
        shown = [f"{size / 2**30:.2f} GiB {tag}" for tag, size in sorted(sizes.items(), key=lambda x: -x[1])]
        used = ""
        if self._device.type == "cuda":
            used = (
                f"{torch.cuda.memory_allocated(self._device) / 2**30:.2f} GiB are allocated and "
                f"{torch.cuda.memory_reserved(self._device) / 2**30:.2f} GiB reserved; "
            )
        train, fleet = self._config.train, self._config.fleet
        advice = []
        if tokens:
            advice.append(f"lower train.token_budget ({train.token_budget})")
            if train.backend == "megatron":
                if not any(name.startswith("recompute") for name in self._config.megatron):
                    advice.append("set recompute_granularity in [megatron]")
            elif not train.gradient_checkpointing:
                advice.append("set train.gradient_checkpointing")
        if self._config.rollout.engine == "sglang":
            advice.append(
                f"have servers on this GPU give back more (fleet.release, now {fleet.release!r}) or take less "
                f"(fleet.margin_gb, now {fleet.margin_gb:g})"
            )
        advice.append(f"train on more ranks (train.ranks, now {train.ranks})")
        where = f"{phase}, with a micro-batch of {tokens} tokens" if tokens else phase
        return f"out of memory in {where}: {used}the trainer holds {', '.join(shown)}; {', or '.join(advice)}"

    def _storages(self) -> dict[str, Storages]:
        """What is here, each storage once."""
        seen: set[int] = set()
        found: dict[str, Storages] = {}
        for tag, tensors in self._held().items():
            storages = {s._cdata: s for s in (_local(tensor).untyped_storage() for tensor in tensors)}
            found[tag] = [(s, s.nbytes()) for key, s in storages.items() if key not in seen and s.nbytes()]
            seen |= storages.keys()
        return found

    def _pieces(self, tag: str, storages: Storages) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes of theirs and the place in the host's memory for them, which is kept for the next time."""
        chunks, at = self._hosts[tag], 0
        for storage, size in storages:
            start = 0
            while start < size:
                chunk, inside = divmod(at, CHUNK_BYTES)
                if chunk == len(chunks):
                    chunks.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._device.type == "cuda"))
                length = min(size - start, CHUNK_BYTES - inside)
                yield _bytes(storage)[start : start + length], chunks[chunk][inside : inside + length]
                start, at = start + length, at + length

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Sleeper:
    """The part of a `Trainer` that is about memory; `memory` is made by the trainer."""

    memory: Memory
    draft: DraftTrainer | None

    def trim(self) -> None:
        """See `Trainer`."""
        # gradients lie in what activations have left, and one keeps a block of hundreds of MB from others
        if self.draft is not None:
            self.draft.optimizer.zero()
        self.memory.trim()

    @property
    def asleep(self) -> bool:
        """See `Trainer`."""
        return self.memory.asleep

    def sleep(self, tags: Collection[str]) -> None:
        """See `Trainer`."""
        self.memory.sleep(tags)

    def wake(self, tags: Collection[str] | None = None) -> None:
        """See `Trainer`."""
        self.memory.wake(tags)


def guarded(method: F) -> F:
    """A `Sleeper`'s method that needs all of it awake, and raises `TrainingMemoryError` when memory runs out."""

    @wraps(method)
    def call(self: Sleeper, *args: Any, **options: Any) -> Any:
        self.memory.need()
        self.memory.at(f"`{method.__name__}`", 0)
        with self.memory.told():
            return method(self, *args, **options)

    return cast(F, call)


class TokenBudget:
    """Most tokens of a micro-batch: `train.token_budget`, which with `train.oom_retry` is halved for the rest of the
    run when training first runs out of memory."""

    def __init__(self, train: TrainConfig, halved: Sequence[int] | None = None) -> None:
        """With what `halved` said when the run that is resumed ended, if the setting is still the same."""
        self._set, self._retry = train.token_budget, train.oom_retry
        self._halved = halved is not None and halved[0] == self._set
        self.tokens = halved[1] if halved is not None and self._halved else self._set

    @property
    def halved(self) -> list[int] | None:
        """`train.token_budget` and what became of it; None as long as it holds."""
        return [self._set, self.tokens] if self._halved else None

    def run(self, work: Callable[[list[PackedBatch]], T], batches: list[PackedBatch]) -> T:
        """`work` on the micro-batches of one minibatch, cut smaller once that had to be. `work` leaves nothing behind
        when it raises a `TrainingMemoryError` that is survivable."""
        try:
            return work(repack(batches, self.tokens) if self._halved else batches)
        except TrainingMemoryError as error:
            if not (self._retry and error.survivable) or self._halved:
                raise
            self._halved, self.tokens = True, max(1, self.tokens // 2)
            # as text: the error itself would keep all that its frames hold
            log.warning("%s. The run goes on with train.token_budget = %d", str(error), self.tokens)
        gc.collect()
        torch.cuda.empty_cache()
        return self.run(work, batches)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of it."""
    whole: Any = tensor.detach()
    return whole.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def held_by(draft: Any) -> list[Tensor]:
    """The large tensors of a `DraftTrainer`; none of None."""
    if draft is None:
        return []
    modules = [draft.draft, *([] if draft.frozen is None else [draft.frozen])]
    return [*(t for m in modules for t in (*m.parameters(), *m.buffers())), *draft.optimizer.state().values()]
