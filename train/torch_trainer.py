"""The trainer of a Hugging Face policy and its draft, on one GPU, a CPU, or several ranks that share its work.

Weights and moments are float32; forwards run under autocast where the run's dtype is bfloat16. The draft learns from
detached states of the policy's own training forward, after the policy's backward, with an optimizer of its own.

On several ranks the policy is sharded (`fsdp.py`), the draft is replicated, and each rank takes its share of the
micro-batches (`packing.divide`). Every rank has a trainer, built alike, and calls its methods with the same whole
micro-batches at the same time.

Invariants: nothing that the draft does reaches a weight, a gradient or a moment of the policy; how many ranks there are
changes a step by rounding alone.

Dimensions: `T` tokens of a micro-batch, `N` of them sampled, `H` hidden size, `V` vocabulary, `D` draft depths.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from miles_spec.config import RunConfig
from miles_spec.draft import states
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.objective import DraftRows
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.logprob import LogProbs, logprob
from miles_spec.models import cast, embed_weight, head_weight, stored_tensors, trunk
from miles_spec.train import fsdp
from miles_spec.train.base import check_state
from miles_spec.train.draft_trainer import (
    DraftRanks,
    DraftStep,
    DraftTerms,
    DraftTrainer,
    Teacher,
    autocast,
)
from miles_spec.train.losses import packed_loss
from miles_spec.train.memory import GRADIENTS, Memory, Sleeper, guarded, held_by
from miles_spec.train.optimizer import AdamW
from miles_spec.train.packing import divide
from miles_spec.train.tally import Tally
from miles_spec.types import LossTerms, PackedBatch, Role

_Lesson = tuple[PackedBatch, LogProbs, Teacher]


class TorchTrainer(Sleeper):
    """Implements `Trainer`. Without a draft it trains the policy alone; with `draft.train = false` it only estimates
    the draft's acceptance."""

    def __init__(
        self,
        model: PreTrainedModel,
        draft: DraftHead | None,
        config: RunConfig,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        *,
        policy: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Takes over `model` and `draft` and moves them to `device` in float32; `dtype` is that of forward passes.

        `group` are the ranks that share the work; `model` and `draft` are equal on all of them. A GPU that `model` does
        not fit may still hold its share: then it comes on the CPU.

        Without `policy` the model only teaches the draft: there is no `step`, and the state does not hold it.

        With `train.kl_coef` above 0 the reference is a copy of `model` as it comes, so `model` must be the run's
        initial one, also on resuming: the state of a trainer does not hold the reference.
        """
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.version = 0
        self.temperature = config.rollout.temperature or 1.0
        self.group = group if group is not None and group.size() > 1 else None
        # never in training mode: the log-probabilities of a policy with dropout are not those its rollouts came from
        whole = self.device if self.group is None else None
        self.model = model.to(device=whole, dtype=torch.float32).eval().requires_grad_(policy)
        self.reference = None
        if config.train.kl_coef:
            self.reference = cast(copy.deepcopy(self.model), dtype).requires_grad_(False)
        if config.train.gradient_checkpointing:
            # transformers is renaming it: older versions lack the new name and newer ones warn of the old
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            getattr(self.model, new if hasattr(self.model, new) else old)({"use_reentrant": False})
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    # its own flag alone, without which it does not checkpoint; its children stay in eval mode
                    module.training = True
        if self.group is not None:
            fsdp.shard(self.model, self.group, self.device, dtype)
            if self.reference is not None:
                fsdp.shard(self.reference, self.group, self.device, dtype)
        train = config.train
        self.optimizer = None
        if policy:
            self.optimizer = AdamW(
                dict(self.model.named_parameters()), betas=train.betas, weight_decay=train.weight_decay, clip=train.clip
            )
        ranks = DraftRanks(rows=self.group, packs=self.group)
        self.draft = None if draft is None else DraftTrainer(draft, config, self.device, dtype, ranks)
        self.memory = Memory(config, self.device, self._held)

    @property
    def draft_version(self) -> int:
        """Optimizer steps of the draft, those of an unfinished step of the policy included; 0 without a draft."""
        return 0 if self.draft is None else self.draft.version

    @guarded
    def step(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """One optimizer step of policy and draft over all micro-batches of one minibatch.

        One rank skips a micro-batch without sampled tokens; without any at all the policy's gradient is 0. The draft
        learns from `draft.share` of them, in `draft.updates` optimizer steps. The terms' `draft_seconds` include the
        estimate of the frozen draft.

        Raises `FloatingPointError` if the policy's gradient is not finite; none of its weights has changed then, nor
        has the draft's last update been made. A draft whose gradient is not finite keeps its weights, and
        `draft_grad_norm` says so.
        """
        assert self.optimizer is not None, "this trainer trains no policy"
        train = self.config.train
        sampled = list(self._sampled(batches))
        draft, rows = None, dict[int, DraftRows]()
        if self.draft is not None:
            chosen = self.draft.choose(len(sampled))
            rows = {at: self.draft.rows(sampled[at][0]) for at in chosen}
            updates = self.draft.updates(len(chosen))
            draft = self.draft.begin(*self._vocabulary(), train=self.config.draft.train, updates=updates)
        self.optimizer.zero()
        tally = Tally(self.device)
        for at, (batch, tokens) in enumerate(sampled):
            self.memory.at("the policy's forward", len(batch.tokens))
            hidden, read, out = self._forward(self.model, self._head, batch, tokens)
            total, loss = packed_loss(batch, tokens, out.logprob, train)
            self.memory.at("the policy's backward")
            total.backward()
            tally.add(out, total.detach(), loss)
            if draft is not None and at in rows:
                self.memory.at("the draft's forward and backward")
                draft.add(batch, _teacher(rows[at], hidden, read, out, tokens) if len(tokens) else None)
        self.memory.at("the optimizer", 0)
        warmup = min(1.0, (self.version + 1) / max(1, train.lr_warmup_steps))
        norm = self.optimizer.step(train.lr * warmup)
        if not isfinite(norm):
            raise FloatingPointError(
                f"the policy's gradient norm is {norm} at version {self.version}; its weights are unchanged. Look for "
                "broken rewards or log-probabilities in this step, or lower train.lr"
            )
        self.version = self.optimizer.steps
        return self._terms(tally, norm, draft)

    @guarded
    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch], *, reference: bool = False) -> list[Tensor]:
        """See `Trainer`; the same on every rank. Raises `ValueError` if a reference is asked for and none is kept."""
        model = self.reference if reference else self.model
        if model is None:
            raise ValueError("no reference model is kept; set train.kl_coef above 0")
        found = {}
        once = {id(batch): batch for batch in batches}
        for batch in self._share(list(once.values())):
            tokens = batch.layout.positions.nonzero().squeeze(1)
            self.memory.at("log-probabilities", len(batch.tokens))
            _, _, out = self._forward(model, None, batch, tokens)
            found[id(batch)] = _scatter(out.logprob, tokens, batch.layout.tokens)
        if self.group is not None:
            sizes = {key: batch.layout.tokens for key, batch in once.items()}
            # those of other ranks are 0 here
            parts = [found.get(key, torch.zeros(size, device=self.device)) for key, size in sizes.items()]
            flat = torch.cat([torch.zeros(0, device=self.device), *parts])
            dist.all_reduce(flat, group=self.group)
            found = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        return [found[id(batch)] for batch in batches]

    @guarded
    def fit_draft(self, batches: Sequence[PackedBatch]) -> None:
        """See `Trainer`. Raises `ValueError` without a draft."""
        draft = self._need_draft()
        embed, _ = self._vocabulary()
        draft.fit(embed, ((batch, teacher) for batch, _, teacher in self._taught(batches)))

    def warm_draft(self, batches: Sequence[PackedBatch], steps: int) -> Iterator[LossTerms]:
        """See `Trainer`. The policy's forward runs once per micro-batch, however many steps there are; the learning
        rate falls linearly to 0, the loss is KL whatever `draft.loss` is, and the terms are as in `train_draft`. A step
        is on one micro-batch however many ranks there are: all but one wait.

        Raises `ValueError` without a draft, or without a sampled token to learn from.
        """
        self.memory.need()
        with self.memory.told():
            lessons = {id(lesson[0]): lesson for lesson in self._taught(batches)}
        turns = [id(batch) for batch in batches if batch.loss_mask.any()]
        if steps and not turns:
            raise ValueError("the draft cannot warm up: none of the responses has a token")
        for step in range(steps):
            mine = lessons.get(turns[step % len(turns)])
            lr_scale = 1 - step / steps
            yield self._draft_step([] if mine is None else [mine], train=True, warm=True, lr_scale=lr_scale)

    @guarded
    def train_draft(self, batches: Sequence[PackedBatch], *, lr_scale: float = 1.0) -> LossTerms:
        """One optimizer step of the draft alone over all micro-batches, at `lr_scale` times `draft.lr` and with
        `draft.loss`; of the terms only the draft's and the entropy are filled in. Raises `ValueError` without a draft.
        """
        return self._draft_step(self._taught(batches), train=True, lr_scale=lr_scale)

    @guarded
    def estimate_draft(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """The estimates of `LossTerms.acceptance` on all micro-batches, and the entropy. Raises `ValueError` without a
        draft."""
        return self._draft_step(self._taught(batches), train=False)

    @guarded
    def freeze_draft(self) -> None:
        """Keeps a copy of the draft as it is now. Raises `ValueError` without a draft."""
        self._need_draft().freeze()

    def weights(self, role: Role) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`; tied weights come once. Raises `ValueError` for `draft` without a draft.

        On several ranks all ask for one tensor after the other together, and each gets copies of the whole target.
        """
        self.memory.need("weights" if role == "target" else "draft")
        if role == "target":
            for name, tensor in stored_tensors(self.model).items():
                yield name, fsdp.full(tensor)
            return
        yield from self._need_draft().draft.exported().items()

    @guarded
    def state_values(self) -> dict[str, Any]:
        """See `Trainer`."""
        values: dict[str, Any] = {"version": self.version}
        if self.draft is not None:
            values |= {
                "draft_version": self.draft_version,
                "draft_frozen_version": self.draft.frozen_version,
                "draft_warm_steps": self.draft.warm_steps,
            }
        return values

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`. On several ranks each gets copies of the whole, one at a time."""
        self.memory.need()
        for name, tensor in self._owned().items():
            yield name, fsdp.full(tensor.detach())
        yield "random.cpu", torch.get_rng_state()
        if self.device.type == "cuda":
            yield "random.cuda", torch.cuda.get_rng_state(self.device)

    @guarded
    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """See `Trainer`. Also raises for a tensor that this run has no place for, such as a draft's in a run without,
        and for a draft over another vocabulary; no weight has changed when it raises. The random state of a GPU is
        taken up where there is one. The state may be of a run on any number of ranks."""
        frozen = values.get("draft_frozen_version")
        wanted = {**self._owned(frozen=frozen is not None), "random.cpu": torch.get_rng_state()}
        check_state(tensors, {name: tensor.shape for name, tensor in wanted.items()})
        if self.draft is not None:
            self.draft.check_vocabulary(tensors)
            self.draft.keep_frozen(frozen)
        for name, tensor in self._owned().items():
            fsdp.fill(tensor, tensors[name])
        self.version = values["version"]
        if self.optimizer is not None:
            self.optimizer.set_steps(self.version)
        if self.draft is not None:
            self.draft.optimizer.set_steps(values["draft_version"])
            self.draft.warm_steps = values["draft_warm_steps"]
        torch.set_rng_state(tensors["random.cpu"].cpu())
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"].cpu(), self.device)

    def trim(self) -> None:
        """See `Trainer`."""
        if self.optimizer is not None:
            self.optimizer.zero()
        super().trim()

    def _held(self) -> dict[str, list[Tensor]]:
        """The large tensors; see `Memory`."""
        models = [self.model, *([] if self.reference is None else [self.reference])]
        weights = [p for model in models for p in model.parameters()]
        moments = [] if self.optimizer is None else list(self.optimizer.state().values())
        drafted = [] if self.draft is None else list(self.draft.draft.parameters())
        grads = [p.grad for p in [*weights, *drafted] if p.grad is not None]
        return {"weights": weights, GRADIENTS: grads, "optimizer": moments, "draft": held_by(self.draft)}

    def _owned(self, *, frozen: bool | None = None) -> dict[str, Tensor]:
        """Every tensor of the state that has a fixed place in memory, or this rank's share of it, by its name in a
        checkpoint; `frozen` as in `DraftTrainer.tensors`."""
        parts: dict[str, dict[str, Tensor]] = {}
        if self.optimizer is not None:
            parts = {"policy": stored_tensors(self.model), "policy_optim": self.optimizer.state()}
        owned = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        return owned if self.draft is None else owned | self.draft.tensors(frozen=frozen)

    def _share(self, batches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """This rank's micro-batches, as many as every other rank's."""
        if self.group is None or not batches:
            return batches
        return divide(batches, self.group.size())[self.group.rank()]

    def _sampled(self, batches: Sequence[PackedBatch]) -> Iterator[tuple[PackedBatch, Tensor]]:
        """This rank's micro-batches and the indices `[N]` of their sampled tokens. Those that have none are left out,
        but on several ranks, where each micro-batch of one is run beside one of every other."""
        for batch in self._share(batches):
            tokens = batch.loss_mask.nonzero().squeeze(1)
            if len(tokens) or self.group is not None:
                yield batch, tokens

    def _taught(self, batches: Sequence[PackedBatch]) -> Iterator[_Lesson]:
        """What the draft learns from this rank's micro-batches that have a sampled token, without a gradient of the
        policy."""
        draft = self._need_draft()
        for batch, tokens in self._sampled(batches):
            rows = draft.rows(batch)
            self.memory.at("the policy's forward", len(batch.tokens))
            with torch.no_grad():
                hidden, read, out = self._forward(self.model, self._head, batch, tokens)
            if len(tokens):
                yield batch, out, _teacher(rows, hidden, read, out, tokens)

    @guarded
    def _draft_step(
        self, lessons: Iterable[_Lesson], *, train: bool, warm: bool = False, lr_scale: float = 1.0
    ) -> LossTerms:
        draft = self._need_draft().begin(*self._vocabulary(), train=train, warm=warm, lr_scale=lr_scale)
        tally = Tally(self.device)
        for batch, out, teacher in lessons:
            self.memory.at("the draft's forward and backward", len(batch.tokens))
            tally.add(out)
            draft.add(batch, teacher)
        return self._terms(tally, 0.0, draft)

    def _need_draft(self) -> DraftTrainer:
        if self.draft is None:
            raise ValueError("there is no draft to train; set draft.enabled")
        return self.draft

    @property
    def _head(self) -> DraftHead | None:
        return None if self.draft is None else self.draft.draft

    def _vocabulary(self) -> tuple[Tensor, Tensor]:
        """The policy's embedding and LM head, whole, detached and in the compute dtype, in which they are gathered."""
        weights = embed_weight(self.model), head_weight(self.model)
        embed, head = (fsdp.full(weight.detach().to(self.dtype)) for weight in weights)
        return embed, head

    def _forward(
        self, model: PreTrainedModel, head: DraftHead | None, batch: PackedBatch, tokens: Tensor
    ) -> tuple[Tensor, Tensor, LogProbs]:
        """What `_run` gives, detached, and of it the log-probabilities, the only way from a loss to the weights."""

        def act() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            hidden, read = self._run(model, head, batch)
            out = self._logprobs(model, hidden, batch, tokens)
            return hidden.detach(), read.detach(), {f.name: getattr(out, f.name) for f in fields(out)}

        hidden, read, out = fsdp.run(model, act)
        return hidden, read, LogProbs(**out)

    def _run(self, model: PreTrainedModel, head: DraftHead | None, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Of `model`: `[T, H]` after the final norm and `[T, S]` that `head` reads, in the compute dtype."""
        layout = batch.layout
        with autocast(self.device, self.dtype):
            hidden, read = states.run(
                trunk(model),
                head,
                batch.tokens[None],
                position_ids=layout.positions[None],
                attend=PackedAttention(layout),
                use_cache=False,
            )
        last = hidden[0].to(self.dtype)
        return last, last if read is hidden else read[0].to(self.dtype)

    def _logprobs(self, model: PreTrainedModel, hidden: Tensor, batch: PackedBatch, tokens: Tensor) -> LogProbs:
        """Of `tokens`, indices `[N]` into the batch, none the first of its segment; from the row before each."""
        return logprob(
            hidden.index_select(0, tokens - 1),
            head_weight(model).to(self.dtype),
            batch.tokens[tokens],
            temperature=self.temperature,
        )

    def _terms(self, tally: Tally, grad_norm: float, draft: DraftStep | None) -> LossTerms:
        """Ends the draft's step and puts all terms together."""
        terms = DraftTerms() if draft is None else draft.finish()
        return LossTerms(
            **tally.means(self.group),
            grad_norm=grad_norm,
            draft=terms.loss,
            draft_by_depth=terms.by_depth,
            draft_grad_norm=terms.grad_norm,
            draft_seconds=terms.seconds,
            acceptance=terms.acceptance,
        )


def _teacher(rows: DraftRows, hidden: Tensor, read: Tensor, out: LogProbs, tokens: Tensor) -> Teacher:
    return Teacher(
        rows=rows,
        hidden=hidden,
        states=read,
        lse=_scatter(out.lse, tokens - 1, len(hidden)),
        logprobs=_scatter(out.logprob.detach(), tokens - 1, len(hidden)),
    )


def _scatter(values: Tensor, index: Tensor, size: int) -> Tensor:
    """`[size]` with `values` `[N]` at `index` `[N]` and 0 elsewhere."""
    return values.new_zeros(size).index_copy_(0, index, values)
