"""A policy sharded over data-parallel ranks by torch's `fully_shard` (FSDP2; Zhao et al., arXiv 2304.11277).

Each rank keeps its share of every parameter, gradient and moment. A decoder layer is whole while it runs. Embedding,
final norm and LM head make up the root, which is whole from the start of a forward to the end of its backward.

Invariant: gradients are summed over ranks, never averaged, since the losses' weights hold the global denominators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from miles_spec.models import trunk

T = TypeVar("T")


def shard(model: PreTrainedModel, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype) -> None:
    """Leaves each rank its share of `model`, equal on all of them and on any device, and moves that to `device`, the
    current one of its kind. `dtype` is that of forward passes, which stay under autocast.

    Layers are gathered in `dtype`: autocast's own copies of float32 weights would stay in memory until the backward.
    That rounds the weights of their norms too, and those alone, for all others autocast rounds as well. The root is
    gathered in float32, so that the residual stream stays that. Gradients are reduced and summed up in float32.
    """
    mesh = DeviceMesh.from_group(group, device.type)
    layers = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in trunk(model).layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, mp_policy=layers)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(), reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else NCCL multiplies by the factor, which gloo cannot
    setattr(model, "run_whole", lambda act: act())  # noqa: B010
    register_fsdp_forward_method(model, "run_whole")


def run(model: Any, act: Callable[[], T]) -> T:
    """`act()`, in which a sharded `model` runs forward and its embedding and LM head are whole; all ranks take part.

    `act` returns tensors in tuples and dicts. A loss depends on the weights through those alone, and where one rank
    differentiates it, all do.
    """
    if not isinstance(model, FSDPModule):
        return act()
    out: T = model.run_whole(act)  # type: ignore[attr-defined]
    if not torch.is_grad_enabled():  # no backward will follow that ends with this
        model.reshard()
    return out


def full(tensor: Tensor) -> Tensor:
    """`tensor` itself, or all of one that is sharded, which its ranks gather together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copies `values`, which is whole on every rank, into `tensor`, or this rank's share into its share."""
    if isinstance(tensor, DTensor):
        whole = values.to(tensor.device)
        values = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
