"""The trainer on megatron-core: tensor, pipeline, context, expert and data parallelism over packed sequences.

Every rank has one, built alike, and calls its methods with the same whole micro-batches at the same time; each takes
its data-parallel share of them and its context-parallel part of each. What a method returns holds on rank 0.

The draft is replicated on the ranks of the last pipeline stage, where its objective runs on the detached states of the
policy's own forward, right after it: Megatron's MTP block and loss are not used, so that nothing of the draft is in the
policy's graph, and the same code trains a draft in every trainer. Tensor-parallel ranks, which all have the states of
the same rows, share these for the draft as context-parallel ranks do, each with the whole embedding and LM head.

Invariants: nothing that the draft does reaches a weight, a gradient or a moment of the policy; how ranks are laid out
changes a step by rounding alone.

Dimensions: `R` rows of a micro-batch on this rank, `H` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import PreTrainedModel

from miles_spec.config import RunConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.linear import whole_vocab
from miles_spec.kernels.logprob import LogProbs, logprob
from miles_spec.models import stored_tensors
from miles_spec.train import megatron_weights
from miles_spec.train.base import check_state
from miles_spec.train.draft_trainer import DraftStep, DraftTerms, DraftTrainer, Teacher
from miles_spec.train.losses import packed_loss
from miles_spec.train.megatron_args import MegatronArguments
from miles_spec.train.megatron_model import build, initialize
from miles_spec.train.megatron_optimizer import STATES, PolicyOptimizer
from miles_spec.train.megatron_parts import Part
from miles_spec.train.megatron_ranks import MegatronRanks
from miles_spec.train.memory import GRADIENTS, Memory, Sleeper, guarded, held_by
from miles_spec.train.packing import divide
from miles_spec.train.tally import Tally
from miles_spec.types import LossTerms, PackedBatch, Role, SpecEstimate

WHICH = ("cotrained", "frozen")
"""Drafts whose acceptance is estimated."""


_Given = tuple[Part, LogProbs, tuple[PackedBatch, Teacher]]
"""A micro-batch, what the policy made of it, and what the draft is given of it."""


class MegatronTrainer(Sleeper):
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
        consume: bool = False,
    ) -> None:
        """`model` and `draft` are equal on all ranks; `model` gives its configuration and weights and is not kept. With
        `consume` it is left without weights, before the optimizer takes memory.

        Without `policy` the model only teaches the draft. With `train.kl_coef` above 0 the reference is what `model`
        holds, in the host's memory. Needs `torch.distributed`. Raises `ValueError` for a model or a layout that is not
        supported.
        """
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.version = 0
        self.draft_version = 0
        self.temperature = config.rollout.temperature or 1.0
        self.hf_config = model.config
        self.arguments = MegatronArguments.make(config.megatron, dist.get_world_size())
        self.arguments.check(model.config)
        if not parallel_state.model_parallel_is_initialized():
            initialize(self.arguments)
        self.ranks = MegatronRanks()
        if draft is not None and draft.aux_layers and self.ranks.stages > 1:
            raise ValueError(
                "a draft that reads states between the layers (EAGLE3) needs them all in one pipeline stage: set "
                "pipeline_model_parallel_size = 1"
            )
        self.policy = build(model.config, self.arguments, dtype).to(self.device)
        megatron_weights.load(self.policy, stored_tensors(model), model.config)
        if consume:
            model.to("meta")
        self.policy.requires_grad_(policy)
        if draft is not None:
            self.policy.tap(draft.aux_layers)
        self.reference = None
        if config.train.kl_coef:
            self.reference = {name: p.detach().to("cpu", copy=True) for name, p in self.policy.named_parameters()}
        self.optimizer = None
        self._model: Any = self.policy
        if policy:
            self.optimizer = PolicyOptimizer(self.policy, self.arguments, config.train, dtype)
            self._model = self.optimizer.model
            # sums, since the losses' weights hold the global denominators already
            self.policy.config.finalize_model_grads_func = lambda model, tokens, **more: finalize_model_grads(
                model, **more
            )
        self.draft = None
        self.has_draft = draft is not None
        if draft is not None:
            owner = DraftTrainer(draft, config, self.device, dtype, self.ranks.of_draft)
            self._draft_shapes = {name: tuple(tensor.shape) for name, tensor in owner.tensors(frozen=True).items()}
            if self.ranks.last_stage:
                self.draft = owner
        self.memory = Memory(config, self.device, self._held)

    @guarded
    def step(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """One optimizer step of policy and draft over all micro-batches of one minibatch.

        Raises `FloatingPointError` if the policy's gradient is not finite; none of its weights has changed then, nor
        has the draft's last update been made. A draft whose gradient is not finite keeps its weights, and
        `draft_grad_norm` says so.
        """
        assert self.optimizer is not None, "this trainer trains no policy"
        train = self.config.train
        chosen = [] if self.draft is None else self.draft.choose(-(-len(batches) // self.ranks.data_size))
        updates = [] if self.draft is None else self.draft.updates(len(chosen))
        vocabulary = self._vocabulary() if self.has_draft else None
        draft = self._begin(vocabulary, train=self.config.draft.train, updates=updates)
        tally = Tally(self.device)
        self.optimizer.zero()
        if any(bool(batch.loss_mask.any()) for batch in batches):

            def work(part: Part, hidden: Tensor, read: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                out = self._logprobs(part, hidden)
                total, loss = packed_loss(part.whole, part.tokens, out.logprob, train)
                tally.add(out, total.detach(), loss)
                if draft is not None and part.taught is not None:
                    self.memory.at("the draft's forward and backward")
                    draft.add(*part.lesson(hidden, read, out, self.dtype))
                self.memory.at("the policy's backward")
                return total, torch.ones((), dtype=torch.int, device=self.device), {}

            self._run(batches, work, train=True, teach=chosen)
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
        """See `Trainer`; whole and in order on every rank. Raises `ValueError` if a reference is asked for and none is
        kept."""
        if reference and self.reference is None:
            raise ValueError("no reference model is kept; set train.kl_coef above 0")
        found = {id(batch): torch.zeros(len(batch.tokens), device=self.device) for batch in batches}

        def work(part: Part, hidden: Tensor, read: Tensor) -> None:
            out = self._logprobs(part, hidden)
            if self.ranks.tensor_rank == 0 and id(part.whole) in found:
                found[id(part.whole)][part.tokens] = out.logprob

        swapped = self._swap(self.reference) if reference and self.reference is not None else None
        try:
            self._run(batches, work, every=True)
        finally:
            if swapped is not None:
                self._swap(swapped)
        for values in found.values():
            dist.all_reduce(values)
        return [found[id(batch)] for batch in batches]

    @guarded
    def fit_draft(self, batches: Sequence[PackedBatch]) -> None:
        """See `Trainer`. Raises `ValueError` without a draft."""
        self._need_draft()
        vocabulary = self._vocabulary()
        given = self._given(batches)
        if self.draft is not None:
            assert vocabulary is not None
            self.draft.fit(vocabulary[0], (lesson for part, _, lesson in given if bool(part.whole.loss_mask.any())))

    def warm_draft(self, batches: Sequence[PackedBatch], steps: int) -> Iterator[LossTerms]:
        """See `Trainer`; a step is on one micro-batch, whose data-parallel rank the others wait for. The policy's
        forward runs once per micro-batch, however many steps there are; the learning rate falls linearly to 0, and the
        loss is KL.

        Raises `ValueError` without a draft, or without a sampled token to learn from.
        """
        self._need_draft()
        self.memory.need()
        taught = [batch for batch in batches if bool(batch.loss_mask.any())]
        if steps and not taught:
            raise ValueError("the draft cannot warm up: none of the responses has a token")
        with self.memory.told():
            given = {id(part.whole): (part, out, lesson) for part, out, lesson in self._given(taught)} if steps else {}
            vocabulary = self._vocabulary()  # once: the policy stays as it is
        for step in range(steps):
            one = given.get(id(taught[step % len(taught)]))
            mine = [] if one is None else [one]
            yield self._draft_step(mine, vocabulary, train=True, warm=True, lr_scale=1 - step / steps)

    @guarded
    def train_draft(self, batches: Sequence[PackedBatch], *, lr_scale: float = 1.0) -> LossTerms:
        """One optimizer step of the draft alone over all micro-batches, at `lr_scale` times `draft.lr` and with
        `draft.loss`; of the terms only the draft's and the entropy are filled in. Raises `ValueError` without a draft.
        """
        self._need_draft()
        return self._draft_step(self._given(batches), self._vocabulary(), train=True, lr_scale=lr_scale)

    @guarded
    def estimate_draft(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """The estimates of `LossTerms.acceptance` on all micro-batches, and the entropy. Raises `ValueError` without a
        draft."""
        self._need_draft()
        return self._draft_step(self._given(batches), self._vocabulary(), train=False)

    @guarded
    def freeze_draft(self) -> None:
        """Keeps a copy of the draft as it is now. Raises `ValueError` without a draft."""
        self._need_draft()
        if self.draft is not None:
            self.draft.freeze()

    def weights(self, role: Role) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`: gathered one at a time, in the dtype of forward passes; on ranks but the first the tensors are
        empty. Raises `ValueError` for `draft` without a draft."""
        self.memory.need("weights" if role == "target" else "draft")
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        if role == "target":
            for name, tensor in megatron_weights.export(self.policy, self.hf_config):
                yield name, nothing if tensor is None else tensor
            return
        self._need_draft()
        tensors = {} if self.draft is None else self.draft.draft.exported()
        yield from self.ranks.from_speaker(list(tensors.items()), self.device)

    @guarded
    def state_values(self) -> dict[str, Any]:
        """See `Trainer`; the same on all ranks."""
        values: dict[str, Any] = {"version": self.version}
        if self.has_draft:
            # told, since after a step that failed halfway only the draft's own ranks know of its updates
            version, frozen_version, warm_steps = 0.0, -1.0, 0.0
            if self.draft is not None:
                version, warm_steps = self.draft.version, self.draft.warm_steps
                if self.draft.frozen_version is not None:
                    frozen_version = self.draft.frozen_version
            told = self.ranks.tell([version, frozen_version, warm_steps], self.device)
            self.draft_version, frozen, warm = map(int, told)
            values |= {
                "draft_version": self.draft_version,
                "draft_frozen_version": None if frozen < 0 else frozen,
                "draft_warm_steps": warm,
            }
        return values

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`: of Hugging Face's names and shapes, so that they can be loaded in another layout or
        backend."""
        self.memory.need()
        nothing = torch.empty(0)
        if self.optimizer is not None:
            for state in STATES:
                # some of Megatron's parameters hold several of the tensors, one after the other
                values = lru_cache(1)(partial(self.optimizer.values, name=state))
                buffers = state == "param"  # which have no moments
                for name, tensor in megatron_weights.export_values(self.policy, values, buffers=buffers):
                    yield _named(name, state), nothing if tensor is None else tensor
        if self.has_draft:
            own = [] if self.draft is None else list(self.draft.tensors().items())
            yield from self.ranks.from_speaker(own, self.device)
        yield "random.cpu", torch.get_rng_state()

    @guarded
    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """See `Trainer`. Also raises for a tensor that this run has no place for; no weight has changed when it
        raises."""
        check_state(tensors, self._wanted(values))
        if self.draft is not None:
            self.draft.check_vocabulary(tensors)
        self.version = values["version"]
        if self.optimizer is not None:
            for state in STATES:
                buffers = state == "param"
                names = megatron_weights.metas(self.hf_config, buffers=buffers)
                part = {name: tensors[_named(name, state)] for name in names}
                # in the host's memory, which has room for as much again
                whole = {p: torch.empty(p.shape) for p in self.policy.parameters()}
                megatron_weights.load(self.policy, part, self.hf_config, whole.__getitem__, buffers=buffers)
                for parameter, value in whole.items():
                    self.optimizer.set_values(parameter, state, value)
            self.optimizer.set_steps(self.version)
        if self.has_draft:
            self.draft_version = values["draft_version"]
        if self.draft is not None:
            self.draft.keep_frozen(values["draft_frozen_version"])
            for name, tensor in self.draft.tensors().items():
                tensor.copy_(tensors[name])
            self.draft.optimizer.set_steps(self.draft_version)
            self.draft.warm_steps = values["draft_warm_steps"]
        torch.set_rng_state(tensors["random.cpu"].cpu())

    def _held(self) -> dict[str, list[Tensor]]:
        """The large tensors; see `Memory`."""
        drafted = [] if self.draft is None else list(self.draft.draft.parameters())
        grads = [p.grad for p in drafted if p.grad is not None]
        moments: list[Tensor] = []
        if self.optimizer is not None:
            grads += self.optimizer.gradients()
            moments = self.optimizer.tensors()
        weights = list(self.policy.parameters())
        return {"weights": weights, GRADIENTS: grads, "optimizer": moments, "draft": held_by(self.draft)}

    def _wanted(self, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a checkpoint of this run."""
        wanted: dict[str, tuple[int, ...]] = {"random.cpu": tuple(torch.get_rng_state().shape)}
        if self.optimizer is not None:
            for state in STATES:
                shapes = megatron_weights.metas(self.hf_config, buffers=state == "param")
                wanted |= {_named(name, state): shape for name, shape in shapes.items()}
        if self.has_draft:
            wanted |= self._draft_shapes
            if values.get("draft_frozen_version") is None:
                wanted = {name: shape for name, shape in wanted.items() if not name.startswith("frozen.")}
        return wanted

    def _need_draft(self) -> None:
        if not self.has_draft:
            raise ValueError("there is no draft to train; set draft.enabled")

    def _begin(self, vocabulary: tuple[Tensor, Tensor] | None, **how: Any) -> DraftStep | None:
        """`DraftTrainer.begin` where the draft is."""
        if self.draft is None:
            return None
        assert vocabulary is not None
        return self.draft.begin(*vocabulary, **how)

    def _vocabulary(self) -> tuple[Tensor, Tensor] | None:
        """`[V, H]` each, embedding and LM head as they are now, where the draft is; every rank calls this."""
        ranks, tied = self.ranks, self.policy.share_embeddings_and_output_weights
        share = None
        if ranks.stages > 1 and not tied:
            share = self._embedding_of_first_stage()
        elif ranks.last_stage:
            share = self.policy.embedding_weight()
        if share is None:
            return None
        embedding = whole_vocab(share, ranks.tensor)
        return embedding, embedding if tied else whole_vocab(self.policy.head_weight(), ranks.tensor)

    def _embedding_of_first_stage(self) -> Tensor | None:
        """`[V / tp, H]` on the last stage; None elsewhere."""
        if not (self.ranks.first_stage or self.ranks.last_stage):
            return None
        if self.ranks.first_stage:
            share = self.policy.embedding_weight().detach().clone()
        else:
            share = torch.empty_like(self.policy.head_weight())
        dist.broadcast(share, parallel_state.get_pipeline_model_parallel_first_rank(), group=self.ranks.embedding)
        return share if self.ranks.last_stage else None

    def _parts(self, batches: Sequence[PackedBatch], *, every: bool) -> list[Part]:
        share = divide(batches, self.ranks.data_size)[self.ranks.data_rank] if batches else []
        halo = 1 + (self.config.draft.num_steps if self.has_draft else 0)
        return [Part.make(batch, self.ranks, self.device, halo=halo, every=every) for batch in share]

    def _run(
        self,
        batches: Sequence[PackedBatch],
        work: Callable[[Part, Tensor, Tensor], Any],
        *,
        train: bool = False,
        every: bool = False,
        teach: Container[int] = (),
    ) -> None:
        """The policy over this rank's share of the micro-batches, in Megatron's schedule; `work` is called on the last
        stage with the hidden states `[R, H]` of each and what the draft reads, and returns what a loss function of
        Megatron's does. From those that `teach` names, in the order of the schedule, the draft is to learn there."""
        parts = self._parts(batches, every=every)
        if (draft := self.draft) is not None:
            parts = [part.taught_to(draft, self.ranks) if i in teach else part for i, part in enumerate(parts)]
        if not parts:
            return

        def forward(parts: Iterator[Part], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            part = next(parts)
            self.memory.at("the policy's forward" if train else "log-probabilities", len(part.batch.tokens))
            output = model(part.batch.tokens, part.batch.layout)
            read = self.policy.tapped(part.batch.layout)

            def finish(hidden: Tensor, non_loss_data: bool = False) -> Any:
                return work(part, hidden, hidden if read is None else read)

            return output, finish

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(parts),
            model=[self._model],
            num_microbatches=len(parts),
            seq_length=1,  # of every micro-batch its own
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    def _logprobs(self, part: Part, hidden: Tensor) -> LogProbs:
        """Of `part.tokens`, from the rows before."""
        return logprob(
            hidden.index_select(0, part.rows),
            self.policy.head_weight(),
            part.whole.tokens[part.tokens],
            temperature=self.temperature,
            group=self.ranks.tensor,
        )

    @torch.no_grad()
    def _given(self, batches: Sequence[PackedBatch]) -> list[_Given]:
        """What the draft learns from, on the last stage; elsewhere nothing."""
        found: list[_Given] = []

        def work(part: Part, hidden: Tensor, read: Tensor) -> None:
            out = self._logprobs(part, hidden)
            found.append((part, out, part.lesson(hidden, read, out, self.dtype)))

        self._run(batches, work, teach=range(len(batches)))
        return found

    @guarded
    def _draft_step(
        self,
        given: Sequence[_Given],
        vocabulary: tuple[Tensor, Tensor] | None,
        *,
        train: bool,
        warm: bool = False,
        lr_scale: float = 1.0,
    ) -> LossTerms:
        draft = self._begin(vocabulary, train=train, warm=warm, lr_scale=lr_scale)
        tally = Tally(self.device)
        for part, out, lesson in given:
            self.memory.at("the draft's forward and backward", len(part.batch.tokens))
            tally.add(out)
            if draft is not None:
                draft.add(*lesson)
        return self._terms(tally, 0.0, draft)

    def _terms(self, tally: Tally, grad_norm: float, draft: DraftStep | None) -> LossTerms:
        """Ends the draft's step, and tells all ranks what came of it."""
        means = tally.means(dist.group.WORLD, counts=self.ranks.last_stage and self.ranks.tensor_rank == 0)
        terms = DraftTerms() if draft is None else draft.finish()
        depth = self.config.draft.num_steps
        taken = 0.0 if self.draft is None else self.draft.version
        numbers: list[float] = [taken, terms.loss, terms.grad_norm, terms.seconds, len(terms.by_depth)]
        numbers += [*terms.by_depth, *[0.0] * (depth - len(terms.by_depth))]
        for which in WHICH:
            found = terms.acceptance.get(which)
            numbers += [0.0, 0.0, 0.0] if found is None else [1.0, found.accepted, found.verify_steps]
        version, loss, norm, seconds, depths, *rest = self.ranks.tell(numbers, self.device)
        self.draft_version = int(version)
        estimates = {
            which: SpecEstimate(accepted=rest[depth + 3 * i + 1], verify_steps=rest[depth + 3 * i + 2])
            for i, which in enumerate(WHICH)
            if rest[depth + 3 * i]
        }
        return LossTerms(
            **means,
            grad_norm=grad_norm,
            draft=loss,
            draft_by_depth=tuple(rest[: int(depths)]),
            draft_grad_norm=norm,
            draft_seconds=seconds,
            acceptance=estimates,
        )

    @torch.no_grad()
    def _swap(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts other weights in the place of the policy's, which it returns, in the host's memory."""
        named = dict(self.policy.named_parameters())
        before = {name: p.detach().to("cpu", copy=True) for name, p in named.items()}
        for name, parameter in named.items():
            parameter.copy_(weights[name])
        return before


def _named(name: str, state: str) -> str:
    """In a checkpoint."""
    return f"policy.{name}" if state == "param" else f"policy_optim.{name}.{state}"
