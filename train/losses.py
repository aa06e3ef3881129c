"""The policy's loss, token by token.

Invariant: everything but the current log-probabilities is a constant of the loss; gradients reach only those.

Dimensions: `N` sampled tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles_spec.config import TrainConfig
from miles_spec.types import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyLoss:
    """Losses of `N` tokens, and statistics of theirs that add up over micro-batches."""

    losses: Tensor
    """`[N]` float32, with gradient; not yet weighted."""
    clipped: Tensor
    """`[]` how many tokens' ratio was clipped, so that the surrogate gives them no gradient."""
    tis_capped: Tensor
    """`[]` how many tokens' importance weight was above its cap."""
    rollout_kl: Tensor
    """`[]` sum of `r - 1 - log r`, `log r` = trainer minus rollout log-probability."""
    rollout_diff: Tensor
    """`[]` largest `|log r|`; combines by maximum."""
    ref_kl: Tensor
    """`[]` sum of the estimate of KL(policy, reference); 0 without a reference."""


def k3(log_ratio: Tensor) -> Tensor:
    """`r - 1 - log r`: with `r = p/q` an unbiased and never negative estimate of `KL(q, p)` on samples of `q`
    (Schulman, "Approximating KL divergence", 2020, the estimator `k3`)."""
    return torch.expm1(log_ratio) - log_ratio


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    rollout_logprobs: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float,
    clip_high: float,
    tis_cap: float,
    kl_coef: float,
) -> PolicyLoss:
    """All tensors `[N]` float32; only `logprobs` carries gradient.

    The loss is PPO's clipped surrogate `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` with `r` = `exp(logprobs -
    old_logprobs)` (Schulman et al., arXiv 1707.06347, equation 7; two bounds: DAPO, arXiv 2503.14476, section 3.1).
    Without `old_logprobs` the step is on-policy: `r` is 1 and the gradient REINFORCE's.

    It is weighted by the truncated importance weight `min(exp(old_logprobs - rollout_logprobs), tis_cap)`, which
    corrects for an engine whose probabilities differ from the trainer's (Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training", 2025; truncation: Ionides, 2008); `tis_cap = 0` leaves it out.

    With `ref_logprobs`, `kl_coef * k3(ref_logprobs - logprobs)` is added (DeepSeekMath, arXiv 2402.03300, equation 4).

    The rollout's statistics, too, compare with `old_logprobs` where given, so that they show how far engine and trainer
    are apart and not what earlier minibatches have learned.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp(logprobs - old)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    outside = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    mismatch = old - rollout_logprobs
    losses = -surrogate
    zero = logprobs.new_zeros(())
    capped = zero
    if tis_cap:
        importance = torch.exp(mismatch)
        losses = losses * importance.clamp(max=tis_cap)
        capped = (importance > tis_cap).sum()
    ref_kl = zero
    if ref_logprobs is not None:
        divergence = k3(ref_logprobs - logprobs)
        losses = losses + kl_coef * divergence
        ref_kl = divergence.detach().sum()
    return PolicyLoss(
        losses=losses,
        clipped=outside.sum(),
        tis_capped=capped,
        rollout_kl=k3(mismatch).sum(),
        rollout_diff=torch.cat([mismatch.abs(), zero[None]]).amax(),
        ref_kl=ref_kl,
    )


def packed_loss(batch: PackedBatch, tokens: Tensor, logprobs: Tensor, train: TrainConfig) -> tuple[Tensor, PolicyLoss]:
    """The weighted sum `[]` over `tokens`, indices `[N]` into the batch, and what it is made of; `logprobs` `[N]` are
    theirs."""
    loss = policy_loss(
        logprobs,
        batch.advantages[tokens],
        batch.rollout_logprobs[tokens],
        old_logprobs=None if batch.old_logprobs is None else batch.old_logprobs[tokens],
        ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[tokens],
        clip_low=train.clip_low,
        clip_high=train.clip_high,
        tis_cap=train.tis_cap,
        kl_coef=train.kl_coef,
    )
    return (batch.weights[tokens] * loss.losses).sum(), loss
