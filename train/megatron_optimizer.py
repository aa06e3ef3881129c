"""Megatron's gradient buffers and distributed optimizer over the policy, with our guard, and its state parameter by
parameter.

Invariant: a gradient that is not finite changes neither weights nor moments, on any rank.

`values` and `set_values` speak of whole parameters of this rank, as tensor and expert parallelism cut them; how the
optimizer's shards lie over data-parallel ranks is known here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from miles_spec.config import TrainConfig
from miles_spec.train.megatron_args import MegatronArguments
from miles_spec.train.megatron_model import Policy

STATES = ("param", "exp_avg", "exp_avg_sq")
"""Of each parameter, all float32: the weight itself and AdamW's moments."""


class PolicyOptimizer:
    """AdamW over the shards of one policy."""

    def __init__(self, policy: Policy, arguments: MegatronArguments, train: TrainConfig, dtype: torch.dtype) -> None:
        """`dtype` is that of the policy's weights."""
        sharded = {"use_distributed_optimizer": True}
        self.model = DistributedDataParallel(
            config=policy.config,
            ddp_config=DistributedDataParallelConfig(**{**sharded, "grad_reduce_in_fp32": True, **arguments.ddp}),
            module=policy,
        )
        """What runs forward and backward."""
        # gradients are reduced with the last micro-batch's, however many there are
        policy.config.no_sync_func = self.model.no_sync
        self.config = OptimizerConfig(
            optimizer="adam",
            lr=0.0,  # every step has its own
            weight_decay=train.weight_decay,
            adam_beta1=train.betas[0],
            adam_beta2=train.betas[1],
            clip_grad=train.clip,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            **{**sharded, **arguments.optimizer},
        )
        self.optimizer = get_megatron_optimizer(self.config, [self.model])
        self.steps = 0
        # dense and expert parameters have optimizers of their own
        self._parts = [
            part for part in self.optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)
        ]
        for shard, state in self._shards():
            # made now and not by the first step, so that a checkpoint has the same tensors at every step
            state.update(step=torch.zeros(()), **{name: torch.zeros_like(shard) for name in STATES[1:]})

    def _shards(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for part in self._parts:
            for group in part.optimizer.param_groups:
                yield from ((shard, part.optimizer.state[shard]) for shard in group["params"])

    def gradients(self) -> list[Tensor]:
        """The buffers that gradients are added up in."""
        return [buffer.grad_data for buffer in (*self.model.buffers, *self.model.expert_parallel_buffers)]

    def tensors(self) -> list[Tensor]:
        """This rank's shards of weights, in float32 the model's own memory, and of moments."""
        return [t for shard, state in self._shards() for t in (shard, *(state[name] for name in STATES[1:]))]

    def zero(self) -> None:
        """Forgets gradients, also those that a step that raised left behind."""
        for group in (*self.model.bucket_groups, *self.model.expert_parallel_bucket_groups):
            if len(group.per_param_grad_ready_counts) < len(group.params):  # cut off in its last backward
                group.per_param_grad_ready_counts = {}
            if group.grad_reduce_handle is not None:  # cut off between this group's gradients and another's
                group.grad_reduce_handle.wait()
                group.grad_reduce_handle = None
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, lr: float) -> float:
        """Clips and updates; the norm of all gradients before clipping. Nothing changes if it is not finite."""
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
            self.optimizer.step()
            self.steps += 1
        return norm

    def set_steps(self, steps: int) -> None:
        """The rest of a loaded state, once `set_values` has filled the moments."""
        self.steps = steps
        for _, state in self._shards():
            state["step"].fill_(steps)

    @torch.no_grad()
    def values(self, parameter: nn.Parameter, name: str) -> Tensor:
        """A state of `STATES`, float32 of the parameter's shape: gathered from the data-parallel ranks that share it,
        all of which must ask."""
        part, shard, whole = self._find(parameter)
        out = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if shard is not None:
            out[whole.start : whole.end] = self._state(part, shard, name)
        dist.all_reduce(out, group=part.data_parallel_group)
        return out.view(parameter.shape)

    @torch.no_grad()
    def set_values(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """The reverse, on each rank for itself; weights take effect in the model too."""
        part, shard, whole = self._find(parameter)
        assert value.shape == parameter.shape
        if shard is not None:
            self._state(part, shard, name).copy_(value.reshape(-1)[whole.start : whole.end])
        if name == "param":
            parameter.copy_(value)

    def _state(self, part: Any, shard: Tensor, name: str) -> Tensor:
        state: Tensor = shard if name == "param" else part.optimizer.state[shard][name]
        return state

    def _find(self, parameter: nn.Parameter) -> tuple[Any, Tensor | None, Any]:
        """The optimizer that owns a parameter, this rank's shard of it (None if it has none), and where that lies."""
        part = next(part for part in self._parts if any(parameter in buffer.param_index_map for buffer in part.buffers))
        if parameter not in part.model_param_gbuf_map:
            return part, None, None
        buffer, dtype, bucket = part.model_param_gbuf_map[parameter]
        ranges = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]
        group, order = part.model_param_group_index_map[parameter]
        return part, part.optimizer.param_groups[group]["params"][order], ranges["param"]
