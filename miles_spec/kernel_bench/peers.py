"""Public kernels that do what ours do, each as its users call it, with its own default settings.

Invariant: a peer is imported only when it is asked for; one that is missing raises `ImportError`, which says why.

Dimensions: `N` rows, `H` hidden, `V` vocabulary, `T` packed tokens, `S` segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

KlLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Student's states `[N, H]`, teacher's states `[N, H]`, head `[V, H]` to the mean of KL(teacher || student)."""
CeLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""States `[N, H]`, head `[V, H]`, labels `[N]` to the mean cross-entropy."""
Roll = Callable[[Tensor], Tensor]
"""A field `[T]` moved one token ahead within each segment, zeros at the ends."""


def plain_kl(states: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """The expression that the fused kernels replace."""
    with torch.no_grad():
        log_p = torch.log_softmax((teacher @ head.T).float(), -1)
    log_q = torch.log_softmax((states @ head.T).float(), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def eager_kl() -> KlLoss:
    return plain_kl


def compiled_kl() -> KlLoss:
    """`torch.compile` of it, for one shape."""
    torch.compiler.reset()
    return torch.compile(plain_kl)


def fla_kl() -> KlLoss:
    """flash-linear-attention's; without the head's gradient where the head requires none."""
    loss = import_module("fla.modules").FusedKLDivLoss()
    return lambda states, teacher, head: loss(states, teacher, head, head)


def liger_kl() -> KlLoss:
    """Liger's generalised Jensen-Shannon divergence, which is the forward KL at beta 0; likewise."""
    loss = import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda states, teacher, head: loss(states, head, teacher, head, None)


def eager_ce() -> CeLoss:
    return lambda hidden, head, labels: F.cross_entropy((hidden @ head.T).float(), labels)


def liger_ce() -> CeLoss:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, head, labels: loss(head, hidden, labels)


def cut_ce() -> CeLoss:
    """cut-cross-entropy's, which by default leaves out gradients below half precision's resolution."""
    loss: CeLoss = import_module("cut_cross_entropy").linear_cross_entropy
    return loss


def megatron_roll(offsets: Sequence[int], device: torch.device, group: dist.ProcessGroup | None) -> Roll:
    """megatron-core's, which its multi-token prediction calls for every field at every depth.

    `offsets` `[S + 1]`: where each segment starts in the whole pack, padding included, and its end.
    """
    roll: Any = import_module("megatron.core.transformer.multi_token_prediction").roll_tensor
    params: Any = import_module("megatron.core.packed_seq_params").PackedSeqParams
    bounds = torch.tensor(offsets, dtype=torch.int32, device=device)
    packed = params(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    return lambda x: roll(x, shifts=-1, dims=-1, cp_group=group, packed_seq_params=packed)[0]


def plain_roll(offsets: Sequence[int]) -> Roll:
    """A loop of `torch.roll` over the segments, whose bounds lie on the host; for one rank."""

    def roll(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for start, end in pairwise(offsets):
            if start < end:
                out[start:end] = x[start:end].roll(-1, 0)
                out[end - 1] = 0
        return out

    return roll
