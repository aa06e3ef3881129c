"""The draft's part of a training step: its objective on the policy's detached states, its optimizer, its frozen copy.

Invariant: everything it takes from the policy is detached, and it writes to nothing but the draft.

Dimensions: `T` tokens of a micro-batch, `H` hidden size, `V` vocabulary, `D` draft depths.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from miles_spec.config import RunConfig
from miles_spec.draft.acceptance import Replay
from miles_spec.draft.linear_fit import LinearFit
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.objective import DraftObjective, DraftRows, Loss, objective
from miles_spec.models import stored_tensors
from miles_spec.train.optimizer import AdamW
from miles_spec.types import PackedBatch, SpecEstimate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Teacher:
    """What the draft is given of a micro-batch: its rows and, detached, what the policy's forward over it leaves."""

    rows: DraftRows
    """Those of the batch, of the draft's depth."""
    hidden: Tensor
    """`[T, H]` after the final norm, in the dtype of forward passes."""
    states: Tensor
    """`[T, S]` likewise, those that the draft reads."""
    lse: Tensor
    """`[T]` float32 by row: log-sum-exp of the row's tempered logits where it predicts a sampled token, else 0."""
    logprobs: Tensor
    """`[T]` float32 by row: the policy's log-probability of the token that follows, where it was sampled, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTerms:
    """The draft's fields of `LossTerms`, without their prefix."""

    loss: float = 0.0
    by_depth: tuple[float, ...] = ()
    grad_norm: float = 0.0
    seconds: float = 0.0
    acceptance: dict[str, SpecEstimate] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRanks:
    """Whom one replica of the draft shares its work with; None where there is no other rank."""

    rows: dist.ProcessGroup | None = None
    """Ranks with other rows: other packs, or other parts of the same. Gradients and sums are added over it."""
    packs: dist.ProcessGroup | None = None
    """Of those, one for each pack: estimates are of whole packs already."""


class DraftTrainer:
    """Owns one draft, its optimizer, and the copy that stays as it was.

    On several ranks each has a replica, and all take the same steps.
    """

    def __init__(
        self,
        draft: DraftHead,
        config: RunConfig,
        device: torch.device,
        dtype: torch.dtype,
        ranks: DraftRanks | None = None,
    ) -> None:
        """Takes over `draft`, alike on all ranks, and moves it to `device` in float32; `dtype` is that of forward
        passes."""
        self.config = config
        self.ranks = ranks or DraftRanks()
        self.device = device
        self.dtype = dtype
        self.draft = draft.to(device=device, dtype=torch.float32).eval().requires_grad_(True)
        self.optimizer = AdamW(
            dict(draft.named_parameters()),
            betas=config.train.betas,
            weight_decay=config.draft.weight_decay,
            clip=config.draft.clip,
        )
        self.frozen: DraftHead | None = None
        self.frozen_version: int | None = None
        self.warm_steps = 0
        """How many of the optimizer's steps were warm-start steps."""

    @property
    def version(self) -> int:
        """Optimizer steps taken, warm start included."""
        return self.optimizer.steps

    @property
    def ramp(self) -> float:
        """How far the loss `ramp` is on its way from KL (0) to end-to-end TV (1); a warm start does not count."""
        return min(1.0, (self.version - self.warm_steps) / max(1, self.config.draft.ramp_steps))

    def freeze(self) -> None:
        """Keeps a copy of the draft as it is now, in place of the last one."""
        self.frozen = copy.deepcopy(self.draft).requires_grad_(False)
        self.frozen_version = self.version

    def keep_frozen(self, version: int | None) -> None:
        """Has room for a frozen copy of that version, or none, as a checkpoint with it needs."""
        if version is None:
            self.frozen = None
        elif self.frozen is None:
            self.freeze()
        self.frozen_version = version

    def tensors(self, *, frozen: bool | None = None) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by its name there, not copies; with the frozen copy if there is one. `frozen`
        asks for names and shapes as if there were one, or were none."""
        found = {f"draft.{name}": tensor for name, tensor in stored_tensors(self.draft).items()}
        found |= {f"draft_optim.{name}": tensor for name, tensor in self.optimizer.state().items()}
        if frozen or (frozen is None and self.frozen is not None):
            kept = stored_tensors(self.draft if self.frozen is None else self.frozen)
            found |= {f"frozen.{name}": tensor for name, tensor in kept.items()}
        return found

    def check_vocabulary(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises `ValueError` for a checkpoint of a draft over another vocabulary, from which other tensors of this one
        were derived when it was made."""
        for name, tensor in self.tensors(frozen=False).items():
            if name.endswith(".vocab_ids") and not torch.equal(tensors[name].to(tensor.device), tensor):
                raise ValueError(f"{name!r} differs: the checkpoint's draft is over another vocabulary than this run's")

    def fit(self, embed_weight: Tensor, lessons: Iterable[tuple[PackedBatch, Teacher]]) -> None:
        """Starts a fresh draft from the best linear function of token and state (`LinearFit`); `embed_weight` `[V, H]`.
        All ranks call it, with their own lessons."""
        found = LinearFit(self.draft)
        for batch, teacher in lessons:
            states, hidden = teacher.states.float(), teacher.hidden.float()
            found.add(embed_weight.detach(), states, hidden, batch.tokens, batch.layout)
        found.finish(self.ranks.rows)

    def choose(self, count: int) -> list[int]:
        """Which of `count` micro-batches of a rank the next step is on (`draft.share`), in order; the same on all
        ranks."""
        most = math.ceil(self.config.draft.share * count)
        return sorted(random.Random(f"{self.config.seed}/{self.version}").sample(range(count), most))

    def rows(self, batch: PackedBatch) -> DraftRows:
        """What `Teacher` holds of it. Waits for the device: call it before anything is queued there."""
        draft = self.draft
        return DraftRows.make(
            batch.layout,
            batch.tokens,
            batch.loss_mask,
            depth=self.config.draft.num_steps,
            hidden=draft.config.hidden_size,
            vocab=len(draft.to_draft) if draft.vocab_ids is None else len(draft.vocab_ids),
            dtype=self.dtype,
        )

    def begin(
        self,
        embed_weight: Tensor,
        head_weight: Tensor,
        *,
        train: bool,
        warm: bool = False,
        lr_scale: float = 1.0,
        updates: Sequence[int] = (),
    ) -> DraftStep:
        """One step on the policy whose embedding and LM head `[V, H]` are given; they must not change before it ends.
        All ranks take it, however many micro-batches each has.

        The optimizer is updated at the end, and before that once so many micro-batches were added as `updates` says,
        ascending and the same on all ranks. Without `train` the step only estimates acceptance. A `warm` step is on KL
        to the policy's distribution whatever `draft.loss` says, since TV has no gradient while the two barely overlap.
        """
        self.optimizer.zero()
        # cast once for all micro-batches
        weights = embed_weight.detach().to(self.dtype), head_weight.detach().to(self.dtype)
        return DraftStep(self, *weights, train=train, warm=warm, lr_scale=lr_scale, updates=updates)

    def updates(self, count: int) -> list[int]:
        """After how many of `count` micro-batches the optimizer is updated, but for the last time (`draft.updates`)."""
        parts = min(self.config.draft.updates, count)
        return [count * part // parts for part in range(1, parts)]

    def lr(self, *, warm: bool) -> float:
        """The learning rate of the next update."""
        config = self.config.draft
        lr = (config.warmup_lr or config.lr) if warm else config.lr
        return lr * min(1.0, (self.version + 1) / max(1, config.lr_warmup_steps))


class DraftStep:
    """One step: `add` each micro-batch, then `finish`.

    Acceptance is estimated on the micro-batches before the first update, with the draft that served.
    """

    def __init__(
        self,
        owner: DraftTrainer,
        embed: Tensor,
        head: Tensor,
        *,
        train: bool,
        warm: bool,
        lr_scale: float,
        updates: Sequence[int],
    ) -> None:
        self._owner, self._embed = owner, embed
        self._head = owner.draft.target_rows(head)
        self._train, self._warm, self._lr_scale = train, warm, lr_scale
        self._watch = Stopwatch(owner.device)
        self._kind: Loss = "kl" if warm else owner.config.draft.loss
        self._updates, self._added = list(updates), 0
        self._served = owner.version
        depth = owner.config.draft.num_steps
        self._rows, self._sums = [0] * depth, torch.zeros(1 + depth, device=owner.device)
        """Since the last update: rows that count at each depth; the loss, and that of each depth."""
        self._all_rows, self._all_sums = [0] * depth, torch.zeros(1 + depth, device=owner.device)
        """The same, of all updates and ranks."""
        self._norms: list[float] = []
        self._replays: list[tuple[str, Replay]] = []
        """Estimates on their way, of which draft each is."""
        self._acceptance: dict[str, SpecEstimate] = {}

    def add(self, batch: PackedBatch, teacher: Teacher | None) -> None:
        """Objective and backward of one micro-batch, and the estimates of both drafts on it. None stands for a
        micro-batch of which this rank has nothing, while others may."""
        self._added += 1
        earlier, self._replays = self._replays, []
        with self._watch.running():
            if teacher is not None:
                self._learn(batch, teacher)
            # those of the micro-batch before, which a GPU has long done with: it is never left without work for them
            self._read(earlier)
            if self._train and self._added in self._updates:
                self._update()
                self._owner.optimizer.zero()

    def _learn(self, batch: PackedBatch, teacher: Teacher) -> None:
        owner = self._owner
        with torch.set_grad_enabled(self._train):
            got = self._objective(owner.draft, batch, teacher)
        if self._train:
            # the sum, since how many rows all micro-batches have together is known only in the end
            # the other ranks of a pack that is cut wait for this one, whether or not it has rows that count
            if got.rows[0] or batch.layout.cp_size > 1:
                got.loss_sum.backward()
            self._rows = [a + b for a, b in zip(self._rows, got.rows, strict=True)]
            self._sums += torch.cat([got.loss_sum.detach()[None], got.loss_by_depth])
        if owner.version != self._served:
            return
        self._replays.append(("cotrained", got.replay))
        if owner.frozen is not None:
            if owner.frozen_version != owner.version:
                with torch.no_grad():
                    got = self._objective(owner.frozen, batch, teacher)
            self._replays.append(("frozen", got.replay))

    def finish(self) -> DraftTerms:
        """The last update. The loss is the mean over all of them, the norm the largest."""
        with self._watch.running():
            self._read(self._replays)
            self._share_estimates()
            if self._train:
                self._update()
        if not self._norms:
            return DraftTerms(seconds=self._watch.seconds, acceptance=self._acceptance)
        loss, *sums = self._all_sums.tolist()
        return DraftTerms(
            loss=loss / self._all_rows[0],
            by_depth=tuple(s / n if n else 0.0 for s, n in zip(sums, self._all_rows, strict=True)),
            grad_norm=math.nan if any(map(math.isnan, self._norms)) else max(self._norms),
            seconds=self._watch.seconds,
            acceptance=self._acceptance,
        )

    def _update(self) -> None:
        """An optimizer step, unless no row counted. A gradient that is not finite leaves the draft as it is and shows
        as a norm of NaN: a draft's fault costs speed, never the run."""
        owner = self._owner
        if (group := owner.ranks.rows) is not None:
            self._add_up(group)
        if not self._rows[0]:
            return
        norm = owner.optimizer.step(self._lr_scale * owner.lr(warm=self._warm), divisor=self._rows[0])
        owner.warm_steps += self._warm and math.isfinite(norm)
        self._norms.append(norm if math.isfinite(norm) else math.nan)
        self._all_rows = [a + b for a, b in zip(self._all_rows, self._rows, strict=True)]
        self._all_sums += self._sums
        self._rows = [0] * len(self._rows)
        self._sums.zero_()

    def _share_estimates(self) -> None:
        owner = self._owner
        if (group := owner.ranks.packs) is None:
            return
        for which in ("cotrained", *(["frozen"] if owner.frozen is not None else [])):
            mine = self._acceptance.get(which, SpecEstimate(accepted=0.0, verify_steps=0.0))
            sums = torch.tensor([mine.accepted, mine.verify_steps], dtype=torch.float64, device=owner.device)
            dist.all_reduce(sums, group=group)
            accepted, steps = sums.tolist()
            if which in self._acceptance or steps:
                self._acceptance[which] = SpecEstimate(accepted=accepted, verify_steps=steps)

    def _add_up(self, group: dist.ProcessGroup) -> None:
        """Gradients, rows and sums since the last update, over ranks."""
        owner, depth = self._owner, len(self._rows)
        parameters = list(owner.draft.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        counts = torch.tensor(self._rows, dtype=torch.float64, device=owner.device)
        sums = torch.cat([counts, self._sums.double()])
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        for tensor in (sums, flat):
            dist.all_reduce(tensor, group=group)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)
        self._rows = [round(n) for n in sums[:depth].tolist()]
        self._sums = sums[depth:].to(self._sums)

    def _objective(self, head: DraftHead, batch: PackedBatch, teacher: Teacher) -> DraftObjective:
        owner, config = self._owner, self._owner.config
        given = (self._embed, self._head, teacher.hidden, teacher.states, batch.layout, batch.tokens, batch.loss_mask)
        how = {
            "depth": config.draft.num_steps,
            "loss": self._kind,
            "ramp": owner.ramp,
            "rule": config.rollout.rule,
            "temperature": config.rollout.temperature or 1.0,
            "given": teacher.rows,
        }
        arguments = (*given, teacher.lse, teacher.logprobs)
        # all of the draft in that dtype, as it is served: autocast would leave norms, and all between them, in float32
        weights = {f"head.{name}": weight.to(owner.dtype) for name, weight in head.named_parameters()}
        found: DraftObjective = functional_call(_Objective(head), weights, arguments, how)
        return found

    def _read(self, replays: Sequence[tuple[str, Replay]]) -> None:
        for which, replay in replays:
            before, estimate = self._acceptance.get(which), replay.result()
            self._acceptance[which] = estimate if before is None else before + estimate


class _Objective(nn.Module):
    """`objective` of one draft, as a module, whose parameters can stand aside for others."""

    def __init__(self, head: DraftHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, *arguments: Any, **how: Any) -> DraftObjective:
        return objective(self.head, *arguments, **how)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Forward passes in `dtype`; in float32 they are left alone."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class Stopwatch:
    """Seconds of work, summed over pieces. A GPU's time is measured by the GPU, without waiting before `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds what happens inside."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    @property
    def seconds(self) -> float:
        """The sum so far; waits for the GPU."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1e3
        self._events.clear()
        return self._seconds
