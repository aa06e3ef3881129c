"""Megatron's own way to train a model with MTP layers, to measure ours against: `GPTModel`'s forward from tokens to a
loss, the vocabulary-parallel cross entropy, the MTP block with its loss, and gradients divided by Megatron.

Layers, attention over packs, data parallelism and optimizer are those of `MegatronTrainer`, so that only this differs.
Megatron applies the LM head to all rows of a pack; those that predict no sampled token it then masks out. Its MTP block
runs one layer at every depth, on detached states (`mtp_detach_heads`), as a draft does here. Invariant: MTP layers
learn from tokens of their row's own segment, given that segments begin with as many tokens that were not sampled as
there are depths.

Dimensions: `T` tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MTPLossLoggingHelper,
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from miles_spec.config import RunConfig
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.train.megatron_args import MegatronArguments
from miles_spec.train.megatron_model import Norm, Policy, initialize
from miles_spec.train.megatron_optimizer import PolicyOptimizer
from miles_spec.train.packing import divide
from miles_spec.types import PackedBatch


class StockModel(Policy):
    """The same model, whose forward is `GPTModel`'s."""

    def __init__(self, config: TransformerConfig, hf_config: Any) -> None:
        super().__init__(config, hf_config)
        self._angles: Tensor | None = None
        if not config.mtp_num_layers:
            return
        layer = ModuleSpec(
            module=MultiTokenPredictionLayer,
            submodules=MultiTokenPredictionLayerSubmodules(
                enorm=Norm,
                hnorm=Norm,
                layer_norm=Norm,
                eh_proj=ColumnParallelLinear,
                mtp_model_layer=self.transformer_layer_spec.layer_specs[0],
            ),
        )
        block = ModuleSpec(
            module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
        )
        self.mtp = Block(config=config, spec=block, pg_collection=self.pg_collection)
        self.mtp_process = True

    def forward(self, tokens: Tensor, layout: PackedLayout, labels: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """`[T]` cross entropy of `labels` `[T]`, in float32; `mask` `[T]` are the rows that MTP layers count."""
        angles = layout.positions[:, None] * self.inv_freq
        self._angles = torch.cat([angles, angles], -1)[:, None, None]
        losses: Tensor = super(Policy, self).forward(
            tokens[None],
            layout.positions[None],
            None,
            labels=labels[None],
            loss_mask=mask[None],
            extra_block_kwargs={"attention_bias": PackedAttention(layout)},
        )
        return losses[0]

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        embedded, _, *more = super()._preprocess(*args, **kwargs)
        return embedded, self._angles, *more


class Block(MultiTokenPredictionBlock):
    """Hands the attention of a pack on to its layers, which Megatron's own forgets."""

    def forward(self, *, attention_bias: PackedAttention, **given: Any) -> Tensor:
        """See Megatron's."""
        out: Tensor = super().forward(**given, extra_block_kwargs={"attention_bias": attention_bias})
        return out


class StockTrainer:
    """Steps of a policy that is trained by cross entropy, with MTP layers of `depth` or, at 0, without any; on every
    rank."""

    def __init__(
        self, hf_config: Any, config: RunConfig, world_size: int, device: torch.device, dtype: torch.dtype, depth: int
    ) -> None:
        """Weights are random. `config` gives the optimizer's settings and `[megatron]`.

        Raises `ValueError` for a pipeline, or for packs that are cut: Megatron would cut them another way.
        """
        arguments = MegatronArguments.make(config.megatron, world_size)
        if arguments.pp > 1 or arguments.cp > 1:
            raise ValueError("Megatron's own path is measured without pipeline and context parallelism alone")
        arguments.check(hf_config)
        if not parallel_state.model_parallel_is_initialized():
            initialize(arguments)
        transformer = arguments.transformer_config(hf_config, dtype)
        MTPLossLoggingHelper.tracker.clear()  # it has the depths of the trainer before
        if depth:
            transformer.mtp_num_layers = depth
            transformer.mtp_use_repeated_layer = transformer.mtp_detach_heads = True
        self.lr, self.device, self.arguments = config.train.lr, device, arguments
        self.module = StockModel(transformer, hf_config).to(device)
        self._draw()
        self.optimizer = PolicyOptimizer(self.module, arguments, config.train, dtype)
        transformer.finalize_model_grads_func = finalize_model_grads

    def _draw(self) -> None:
        """Norms of 1, and matrices that tensor-parallel ranks have different parts of."""
        generator = torch.Generator(self.device).manual_seed(parallel_state.get_tensor_model_parallel_rank())
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02, generator=generator)
                else:
                    parameter.fill_(1.0)

    def step(self, batches: Sequence[PackedBatch]) -> float:
        """One optimizer step; the mean loss over sampled tokens of this rank's micro-batches, without MTP's. There must
        be as many packs for each data-parallel rank and, with sequence parallelism, as many tokens of a pack for each
        tensor-parallel one."""
        self.optimizer.zero()
        mine = divide(batches, self.arguments.dp)[parallel_state.get_data_parallel_rank()]
        reported = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(mine),
            model=[self.optimizer.model],
            num_microbatches=len(mine),
            seq_length=1,  # of every micro-batch its own
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step(self.lr)
        losses, tokens = (sum(float(one[i]) for one in (r["loss"] for r in reported)) for i in (0, 1))
        return losses / max(1.0, tokens)


def _forward(batches: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    batch = next(batches)
    labels = batch.tokens.roll(-1)
    # a segment begins with tokens that were not sampled, so no row counts a token of the next
    mask = batch.loss_mask.roll(-1).float()
    mask[-1] = 0
    return model(batch.tokens, batch.layout, labels, mask), partial(_loss, mask)


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    total, tokens = (losses * mask).sum(), mask.sum()
    return total, tokens.int(), {"loss": (total.detach(), tokens)}
