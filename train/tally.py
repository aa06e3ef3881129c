"""Sums of a training step, kept on the device until its end."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernels.logprob import LogProbs
from miles_spec.train.losses import PolicyLoss


class Tally:
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
        if total is not None and loss is not None and len(out.logprob):
            self._policy = self._policy + total
            self._clipped = self._clipped + loss.clipped
            self._capped = self._capped + loss.tis_capped
            self._rollout_kl = self._rollout_kl + loss.rollout_kl
            self._rollout_diff = torch.maximum(self._rollout_diff, loss.rollout_diff)
            self._ref_kl = self._ref_kl + loss.ref_kl

    def means(self, group: dist.ProcessGroup | None = None, *, counts: bool = True) -> dict[str, float]:
        """The policy's fields of `LossTerms`; with `group`, of all of its ranks together that have `counts`."""
        sums = [self._policy, self._entropy, self._clipped, self._capped, self._rollout_kl, self._ref_kl]
        values = torch.stack([s.double() for s in sums] + [torch.zeros_like(self._policy).double() + self._tokens])
        diff = self._rollout_diff.double()
        if group is not None:
            values, diff = values * counts, diff * counts
            dist.all_reduce(values, group=group)
            dist.all_reduce(diff, op=dist.ReduceOp.MAX, group=group)
        policy, *rest, tokens = values.tolist()
        n = max(1.0, tokens)
        names = ("entropy", "clip_fraction", "tis_clip_fraction", "rollout_kl", "ref_kl")
        return {"policy": policy, "rollout_logprob_diff": float(diff)} | {
            name: value / n for name, value in zip(names, rest, strict=True)
        }
