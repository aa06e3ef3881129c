"""The trainer for one process: a Hugging Face policy and its draft, on one GPU or a CPU.

Weights and moments are float32; forwards run under autocast where the run's dtype is bfloat16. The draft learns from
detached states of the policy's own training forward, after the policy's backward, with an optimizer of its own.
Invariant: nothing that the draft does reaches a weight, a gradient or a moment of the policy.

Dimensions: `T` tokens of a micro-batch, `N` of them sampled, `H` hidden size, `V` vocabulary, `D` draft depths.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from miles_spec.config import RunConfig
from miles_spec.draft import states
from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.logprob import LogProbs, logprob
from miles_spec.models import embed_weight, head_weight, trunk
from miles_spec.train.draft_trainer import DraftStep, DraftTerms, DraftTrainer, Teacher, autocast
from miles_spec.train.losses import PolicyLoss, policy_loss
from miles_spec.train.optimizer import AdamW
from miles_spec.types import LossTerms, PackedBatch, Role

_Lesson = tuple[PackedBatch, LogProbs, Teacher]


class TorchTrainer:
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
    ) -> None:
        """Takes over `model` and `draft` and moves them to `device` in float32; `dtype` is that of forward passes.

        Without `policy` the model only teaches the draft: there is no `step`, and the state does not hold it.

        With `train.kl_coef` above 0 the reference is a copy of `model` as it comes, so `model` must be the run's
        initial one, also on resuming: the state of a trainer does not hold the reference.
        """
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.version = 0
        self.draft_version = 0
        self.temperature = config.rollout.temperature or 1.0
        # never in training mode: the log-probabilities of a policy with dropout are not those its rollouts came from
        self.model = model.to(device=self.device, dtype=torch.float32).eval().requires_grad_(policy)
        self.reference = None
        if config.train.kl_coef:
            self.reference = copy.deepcopy(self.model).to(dtype).requires_grad_(False)
        if config.train.gradient_checkpointing:
            # transformers is renaming it: older versions lack the new name and newer ones warn of the old
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            getattr(self.model, new if hasattr(self.model, new) else old)({"use_reentrant": False})
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    # its own flag alone, without which it does not checkpoint; its children stay in eval mode
                    module.training = True
        train = config.train
        self.optimizer = None
        if policy:
            self.optimizer = AdamW(
                dict(self.model.named_parameters()), betas=train.betas, weight_decay=train.weight_decay, clip=train.clip
            )
        self.draft = None if draft is None else DraftTrainer(draft, config, self.device, dtype)

    def step(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """One optimizer step of policy and draft over all micro-batches of one minibatch.

        A micro-batch without sampled tokens is skipped; without any at all the policy's gradient is 0. The terms'
        `draft_seconds` include the estimate of the frozen draft.

        Raises `FloatingPointError` if the policy's gradient is not finite; no weight has changed then. A draft whose
        gradient is not finite keeps its weights, and `draft_grad_norm` says so.
        """
        assert self.optimizer is not None, "this trainer trains no policy"
        train = self.config.train
        draft = None
        if self.draft is not None:
            weights = embed_weight(self.model), head_weight(self.model)
            draft = self.draft.begin(*weights, train=self.config.draft.train)
        self.optimizer.zero()
        tally = _Tally(self.device)
        for batch in batches:
            tokens = batch.loss_mask.nonzero().squeeze(1)
            if not len(tokens):
                continue
            hidden, read = self._states(batch)
            out = self._logprobs(self.model, hidden, batch, tokens)
            loss = policy_loss(
                out.logprob,
                batch.advantages[tokens],
                batch.rollout_logprobs[tokens],
                old_logprobs=None if batch.old_logprobs is None else batch.old_logprobs[tokens],
                ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[tokens],
                clip_low=train.clip_low,
                clip_high=train.clip_high,
                tis_cap=train.tis_cap,
                kl_coef=train.kl_coef,
            )
            total = (batch.weights[tokens] * loss.losses).sum()
            total.backward()
            tally.add(out, total.detach(), loss)
            if draft is not None:
                draft.add(batch, _teacher(hidden, read, out, tokens))
        warmup = min(1.0, (self.version + 1) / max(1, train.lr_warmup_steps))
        norm = self.optimizer.step(train.lr * warmup)
        if not isfinite(norm):
            raise FloatingPointError(
                f"the policy's gradient norm is {norm} at version {self.version}; its weights are unchanged. Look for "
                "broken rewards or log-probabilities in this step, or lower train.lr"
            )
        self.version = self.optimizer.steps
        return self._terms(tally, norm, draft)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch], *, reference: bool = False) -> list[Tensor]:
        """See `Trainer`. Raises `ValueError` if a reference is asked for and none is kept."""
        model = self.reference if reference else self.model
        if model is None:
            raise ValueError("no reference model is kept; set train.kl_coef above 0")
        result = []
        for batch in batches:
            tokens = batch.layout.positions.nonzero().squeeze(1)
            hidden, _ = self._run(model, None, batch)
            out = self._logprobs(model, hidden, batch, tokens)
            result.append(_scatter(out.logprob, tokens, batch.layout.tokens))
        return result

    def warm_draft(self, batches: Sequence[PackedBatch], steps: int) -> Iterator[LossTerms]:
        """See `Trainer`. The policy's forward runs once per micro-batch, however many steps there are; the learning
        rate falls linearly to 0, the loss is KL whatever `draft.loss` is, and the terms are as in `train_draft`.

        Raises `ValueError` without a draft, or without a sampled token to learn from.
        """
        lessons = list(self._taught(batches))
        if steps and not lessons:
            raise ValueError("the draft cannot warm up: none of the responses has a token")
        for step in range(steps):
            yield self._draft_step([lessons[step % len(lessons)]], train=True, warm=True, lr_scale=1 - step / steps)

    def train_draft(self, batches: Sequence[PackedBatch], *, lr_scale: float = 1.0) -> LossTerms:
        """One optimizer step of the draft alone over all micro-batches, at `lr_scale` times `draft.lr` and with
        `draft.loss`; of the terms only the draft's and the entropy are filled in. Raises `ValueError` without a draft.
        """
        return self._draft_step(self._taught(batches), train=True, lr_scale=lr_scale)

    def estimate_draft(self, batches: Sequence[PackedBatch]) -> LossTerms:
        """The estimates of `LossTerms.acceptance` on all micro-batches, and the entropy. Raises `ValueError` without a
        draft."""
        return self._draft_step(self._taught(batches), train=False)

    def freeze_draft(self) -> None:
        """Keeps a copy of the draft as it is now. Raises `ValueError` without a draft."""
        if self.draft is None:
            raise ValueError("there is no draft to freeze; set draft.enabled")
        self.draft.freeze()

    def weights(self, role: Role) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`; tied weights come once. Raises `ValueError` for `draft` without a draft."""
        if role == "target":
            yield from _tensors(self.model).items()
            return
        if self.draft is None:
            raise ValueError("there is no draft to export; set draft.enabled")
        names = self.draft.draft.export_names
        for name, parameter in self.draft.draft.named_parameters():
            yield names[name], parameter.detach()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `Trainer`. Tensors are the trainer's own, not copies: write them out before the next step."""
        values: dict[str, Any] = {"version": self.version}
        if self.draft is not None:
            values |= {
                "draft_version": self.draft_version,
                "draft_frozen_version": self.draft.frozen_version,
                "draft_warm_steps": self.draft.warm_steps,
            }
        random = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return {**self._owned(), **random}, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """See `Trainer`. Also raises for a tensor that this run has no place for, such as a draft's in a run without,
        and for a draft over another vocabulary; no weight has changed when it raises. The random state of a GPU is
        taken up where there is one."""
        if self.draft is not None and values.get("draft_frozen_version") is not None and self.draft.frozen is None:
            self.draft.freeze()
        owned = self._owned()
        for name, tensor in {**owned, "random.cpu": torch.get_rng_state()}.items():
            if name not in tensors:
                raise ValueError(f"the checkpoint lacks tensor {name!r}; it is of a run of another configuration")
            loaded = tensors[name]
            if loaded.shape != tensor.shape:
                shapes = f"{list(loaded.shape)} in the checkpoint and {list(tensor.shape)} in this run"
                raise ValueError(f"tensor {name!r} has shape {shapes}")
            # other tensors of the draft were derived from its vocabulary when it was made
            if name.endswith(".vocab_ids") and not torch.equal(loaded.to(tensor.device), tensor):
                raise ValueError(f"{name!r} differs: the checkpoint's draft is over another vocabulary than this run's")
        for name in tensors:
            if name not in owned and not name.startswith("random."):
                raise ValueError(f"the checkpoint has tensor {name!r}, for which this run's configuration has no place")
        for name, tensor in owned.items():
            tensor.copy_(tensors[name])
        self.version = values["version"]
        if self.optimizer is not None:
            self.optimizer.set_steps(self.version)
        if self.draft is not None:
            self.draft_version = values["draft_version"]
            self.draft.optimizer.set_steps(self.draft_version)
            self.draft.frozen_version = values["draft_frozen_version"]
            self.draft.warm_steps = values["draft_warm_steps"]
        torch.set_rng_state(tensors["random.cpu"].cpu())
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"].cpu(), self.device)

    def _owned(self) -> dict[str, Tensor]:
        """Every tensor of the state that has a fixed place in memory, by its name in a checkpoint."""
        parts: dict[str, dict[str, Tensor]] = {}
        if self.optimizer is not None:
            parts |= {"policy": _tensors(self.model), "policy_optim": self.optimizer.state()}
        if self.draft is not None:
            parts |= {"draft": _tensors(self.draft.draft), "draft_optim": self.draft.optimizer.state()}
            if self.draft.frozen is not None:
                parts["frozen"] = _tensors(self.draft.frozen)
        return {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}

    def _taught(self, batches: Iterable[PackedBatch]) -> Iterator[_Lesson]:
        """What the draft learns from the batches that have a sampled token, without a gradient of the policy."""
        for batch in batches:
            tokens = batch.loss_mask.nonzero().squeeze(1)
            if len(tokens):
                with torch.no_grad():
                    hidden, read = self._states(batch)
                    out = self._logprobs(self.model, hidden, batch, tokens)
                yield batch, out, _teacher(hidden, read, out, tokens)

    def _draft_step(
        self, lessons: Iterable[_Lesson], *, train: bool, warm: bool = False, lr_scale: float = 1.0
    ) -> LossTerms:
        if self.draft is None:
            raise ValueError("there is no draft to train; set draft.enabled")
        weights = embed_weight(self.model), head_weight(self.model)
        draft = self.draft.begin(*weights, train=train, warm=warm, lr_scale=lr_scale)
        tally = _Tally(self.device)
        for batch, out, teacher in lessons:
            tally.add(out)
            draft.add(batch, teacher)
        return self._terms(tally, 0.0, draft)

    def _states(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Of the policy: `[T, H]` after the final norm and `[T, S]` that the draft reads, in the compute dtype."""
        return self._run(self.model, None if self.draft is None else self.draft.draft, batch)

    def _run(self, model: PreTrainedModel, head: DraftHead | None, batch: PackedBatch) -> tuple[Tensor, Tensor]:
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

    def _terms(self, tally: _Tally, grad_norm: float, draft: DraftStep | None) -> LossTerms:
        """Ends the draft's step and puts all terms together."""
        terms = DraftTerms() if draft is None else draft.finish()
        self.draft_version = 0 if self.draft is None else self.draft.version
        return LossTerms(
            **tally.means(),
            grad_norm=grad_norm,
            draft=terms.loss,
            draft_by_depth=terms.by_depth,
            draft_grad_norm=terms.grad_norm,
            draft_seconds=terms.seconds,
            acceptance=terms.acceptance,
        )


class _Tally:
    """Sums over the sampled tokens of a step, on the device until the end."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), device=device)
        self._tokens = 0
        self._policy = self._entropy = self._clipped = self._capped = zero
        self._rollout_kl = self._rollout_diff = self._ref_kl = zero

    def add(self, out: LogProbs, total: Tensor | None = None, loss: PolicyLoss | None = None) -> None:
        """One micro-batch; `total` `[]` is the sum of the weighted `loss`, and a warm start has neither."""
        self._tokens += len(out.logprob)
        self._entropy = self._entropy + out.entropy.sum()
        if total is not None and loss is not None:
            self._policy = self._policy + total
            self._clipped = self._clipped + loss.clipped
            self._capped = self._capped + loss.tis_capped
            self._rollout_kl = self._rollout_kl + loss.rollout_kl
            self._rollout_diff = torch.maximum(self._rollout_diff, loss.rollout_diff)
            self._ref_kl = self._ref_kl + loss.ref_kl

    def means(self) -> dict[str, float]:
        """The policy's fields of `LossTerms`."""
        n = max(1, self._tokens)
        return {
            "policy": float(self._policy),
            "entropy": float(self._entropy) / n,
            "clip_fraction": float(self._clipped) / n,
            "tis_clip_fraction": float(self._capped) / n,
            "rollout_kl": float(self._rollout_kl) / n,
            "rollout_logprob_diff": float(self._rollout_diff),
            "ref_kl": float(self._ref_kl) / n,
        }


def _teacher(hidden: Tensor, read: Tensor, out: LogProbs, tokens: Tensor) -> Teacher:
    return Teacher(
        hidden=hidden.detach(),
        states=read.detach(),
        lse=_scatter(out.lse, tokens - 1, len(hidden)),
        logprobs=_scatter(out.logprob.detach(), tokens - 1, len(hidden)),
    )


def _scatter(values: Tensor, index: Tensor, size: int) -> Tensor:
    """`[size]` with `values` `[N]` at `index` `[N]` and 0 elsewhere."""
    return values.new_zeros(size).index_copy_(0, index, values)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a checkpoint keeps; detached, not copied."""
    kept = module.state_dict().keys()
    buffers = {name: b for name, b in module.named_buffers() if name in kept}
    return {name: t.detach() for name, t in [*module.named_parameters(), *buffers.items()]}
