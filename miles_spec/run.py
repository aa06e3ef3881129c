"""A run with all its parts, and what it does with several of them: weights to the engine, memory from one to the other.

Invariant: what `weights` gives is the trainer's state between two steps, whoever holds it and wherever it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_spec import checkpoint
from miles_spec.config import RunConfig
from miles_spec.data import PromptSource
from miles_spec.draft.export import as_served, served_tensors
from miles_spec.draft.modules import DraftHead
from miles_spec.rewards import Scorer
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.engine import Engine
from miles_spec.rollout.speculation import Controller, CostModel
from miles_spec.serving import Serving, Weights
from miles_spec.sync.session import Gathered, Syncer
from miles_spec.sync.session import Weights as Sent
from miles_spec.train.base import Trainer
from miles_spec.train.ranks import Leader
from miles_spec.types import Receipt, Role, Sample

NOT_PUSHED = ("optimizer",)
"""What of `train.offload` no push needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All parts of a run."""

    config: RunConfig
    out: Path
    tokenizer: Any
    source: PromptSource
    scorer: Scorer
    trainer: Trainer
    draft: DraftHead | None
    """What `trainer` trains, or, where that has it on other ranks, a copy that `weights` brings up to date."""
    engine: Engine
    serving: Serving | None
    """The servers behind `engine`; None for the embedded engine."""
    model_type: str
    head_name: str
    """Of the policy: transformers' name of its kind, and of the weight that is its LM head."""
    shapes: Mapping[Role, Mapping[str, tuple[int, ...]]]
    """Of all that the engine takes."""
    syncer: Syncer
    cost: CostModel | None
    """Of the engine without speculation; None in a run without a draft, which has none to compare with, and of joined
    servers."""
    controller: Controller | None
    """Of `draft.adaptive`; None without."""
    step: int
    """Steps done before, by the run that is resumed."""
    halved_budget: Sequence[int] | None
    """`TokenBudget.halved` of that run."""
    time_s: float
    """Wall time they took."""
    warmup_losses: tuple[float, ...]
    """The draft's loss at each step of its warm start; empty when resumed."""

    def save(self, step: int, cursor: dict[str, Any], time_s: float, halved: Sequence[int] | None) -> Path:
        """Writes the checkpoint of `step`, reached in `time_s`, after which the data goes on at `cursor`; `halved` is
        that of the `TokenBudget`."""
        trainer, keep = self.trainer, self.config.checkpoint.keep
        values = {"trainer": trainer.state_values(), "source": cursor, "time_s": time_s, "halved_budget": halved}
        return checkpoint.save(self.out, step, trainer.state_tensors(), values, keep=keep)

    def pieces(self, sample: Sample) -> list[str]:
        """The text of each response token."""
        return [self.tokenizer.decode([token]) for token in sample.completion.tokens]

    def weights(self) -> Weights:
        """What the engine is to serve: the trainer's weights. Those that several ranks hold are gathered as they are
        sent, a few at a time. They are brought back if a server needs them while responses are made."""
        if self.trainer.asleep:
            self.trainer.wake([tag for tag in self.config.train.offload if tag not in NOT_PUSHED])
        if self.draft is not None:
            self._refresh(self.draft)
        target: Sent
        draft: Sent | None
        if isinstance(self.trainer, Leader):
            target, draft = self._gathered()
        else:
            target = whole = dict(self._target())
            draft = None if self.draft is None else self.draft_weights(self.draft, whole)
        return Weights(
            version=self.trainer.version,
            target=target,
            draft_version=None if draft is None else self.trainer.draft_version,
            draft=draft,
        )

    def _gathered(self) -> tuple[Gathered, Gathered | None]:
        """Target and draft of all ranks, which come when they are sent, the target first."""
        kept: dict[str, Tensor] = {}

        def target() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self._target():
                if name == self.head_name and self.draft is not None and self.draft.vocab_ids is not None:
                    kept[name] = tensor  # of which the draft's rows are pushed after it
                yield name, tensor

        def draft() -> Iterable[tuple[str, Tensor]]:
            assert self.draft is not None
            return self.draft_weights(self.draft, kept).items()

        drafted = None if self.draft is None else Gathered(shapes=self.shapes["draft"], tensors=draft)
        return Gathered(shapes=self.shapes["target"], tensors=target), drafted

    def _target(self) -> Iterator[tuple[str, Tensor]]:
        """As the engine takes it."""
        target = self.trainer.weights("target")
        return target if self.serving is None else as_served(target, self.model_type)

    def draft_weights(self, draft: DraftHead, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the engine needs to serve `draft` beside `target`."""
        if self.serving is not None:
            return dict(served_tensors(draft, target.get(self.head_name)))
        return draft.exported()

    @torch.no_grad()
    def _refresh(self, draft: DraftHead) -> None:
        """Gives it the trained weights, unless they are its own."""
        own = draft.exported()
        for name, tensor in self.trainer.weights("draft"):
            if own[name].data_ptr() != tensor.data_ptr():
                own[name].copy_(tensor)

    def adapt(self) -> dict[str, list[int]]:
        """Sets how deep the engine drafts for how many sequences together in the next rollout, as a metric; none
        without `draft.adaptive`."""
        if self.controller is None:
            return {}
        assert isinstance(self.engine, EmbeddedEngine)
        self.engine.max_batches = self.controller.max_batches()
        return {"draft_max_batch": list(self.engine.max_batches)}

    def push(self, *, self_test: bool = False) -> list[Receipt]:
        """Sends the trainer's weights to the engine; the receipts. With `self_test`, see `Syncer.self_test`.

        There are none where all servers are being started anew: they are sent the weights before they generate.
        """
        members = self.engine.members()
        return self.weights().push(self.syncer, members, self_test=self_test) if members else []

    def release(self) -> None:
        """Gives the trainer the memory: what the engine can spare, and then all that the trainer had moved away."""
        self.engine.release()
        if self.trainer.asleep:
            self.trainer.wake()

    def sleep(self) -> None:
        """Has the trainer move away what it does not need while responses are made; the push must be over."""
        if self.config.train.offload:
            self.trainer.sleep(self.config.train.offload)

    def wake(self) -> None:
        """Gives the engine its memory back after training, less of it the trainer's by what no push needs; a push must
        follow."""
        self.trainer.trim()
        if self.config.train.offload:
            self.trainer.sleep(NOT_PUSHED)
        self.engine.wake()

    def gpu_gib(self, *of: str) -> dict[str, float]:
        """Metrics of the memory of the trainer's GPU, in GiB: what of it is the "trainer"'s, is that of "others" there,
        and is "free"; none on a CPU."""
        if self.trainer.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self.trainer.device)
        own = torch.cuda.memory_reserved(self.trainer.device)
        parts = {"trainer": own, "others": total - free - own, "free": free}
        return {f"gpu_gib_{part}": parts[part] / 2**30 for part in of}

    def stop(self) -> None:
        """Ends what runs outside this process."""
        if self.serving is not None:
            self.serving.stop()
