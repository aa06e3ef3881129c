"""One AdamW over named float32 parameters, with its clip, its non-finite guard and a state that names every moment.

Parameters, gradients and moments may be sharded (`fsdp.py`); the norm is that of all ranks, and they agree on it.

Invariant: an update is applied whole or not at all; a gradient that is not finite changes neither weights nor moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor, nn

from miles_spec.train import fsdp

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101) on matrices alone, not on norms and biases."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], weight_decay: float, clip: float
    ) -> None:
        """`clip` is the largest gradient norm over all parameters together."""
        self.parameters = dict(parameters)
        self.clip = clip
        self.steps = 0
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)
        # made now and not by the first step, so that a checkpoint has the same tensors at every step
        for p in self.parameters.values():
            self.adamw.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                **{moment: torch.zeros_like(p) for moment in MOMENTS},
            }

    def zero(self) -> None:
        """Forgets gradients, also those that a step that raised left behind."""
        self.adamw.zero_grad(set_to_none=True)

    def step(self, lr: float, divisor: float = 1.0) -> float:
        """Divides the gradients by `divisor`, clips them, updates; returns their norm before clipping.

        A parameter without a gradient counts as one of gradient 0, so all of them have taken `steps` steps. If the norm
        is not finite nothing changes, `steps` included: the caller decides what that means.
        """
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.div_(divisor)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        total = fsdp.full(torch.nn.utils.get_total_norm(grads))
        norm = float(total)
        if isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, total)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.steps += 1
        return norm

    def state(self) -> dict[str, Tensor]:
        """`<parameter>.<moment>` to the moment itself, not a copy."""
        return {f"{name}.{m}": self.adamw.state[p][m] for name, p in self.parameters.items() for m in MOMENTS}

    def set_steps(self, steps: int) -> None:
        """The rest of a loaded state, once the moments of `state` have been filled."""
        self.steps = steps
        for p in self.parameters.values():
            self.adamw.state[p]["step"].fill_(steps)
