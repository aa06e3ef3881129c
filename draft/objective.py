"""The draft's training objective over one pack: unroll, losses, and what its acceptance was worth.

Invariant: the result is a sum over rows, so packs and ranks add up; whoever calls divides by the global number of rows.

Dimensions: `T` packed tokens, `D` depths, `H` hidden, `V` vocabulary, `N` rows that count, all depths together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miles_spec.draft.acceptance import estimate, tv_weights
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.unroll import unroll
from miles_spec.kernels.draft_loss import draft_loss
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import draft_targets
from miles_spec.types import SpecEstimate, VerifyRule

Loss = Literal["ce", "kl", "tv", "ramp"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftObjective:
    """What one pack adds to the draft's loss and metrics."""

    loss_sum: Tensor
    """Scalar float32, differentiable in the draft alone; divide by the global sum of `rows[0]`."""
    rows: tuple[int, ...]
    """`[D]` rows that count at each depth."""
    loss_by_depth: Tensor
    """`[D]` float32, detached sums over rows of the chosen loss before any row weight."""
    estimate: SpecEstimate
    """What serving with this draft would have needed for these responses."""


def objective(
    head: DraftHead,
    embed_weight: Tensor,
    lm_head_weight: Tensor,
    hidden: Tensor,
    layout: PackedLayout,
    tokens: Tensor,
    loss_mask: Tensor,
    lse: Tensor,
    logprobs: Tensor,
    *,
    depth: int,
    loss: Loss,
    ramp: float,
    rule: VerifyRule,
    temperature: float,
) -> DraftObjective:
    """Loss of `head` on a pack that the target has just been run over.

    `hidden` `[T, H]` after the final norm, `embed_weight` and `lm_head_weight` `[V, H]`: the target's, detached.
    `tokens` `[T]` int64, `loss_mask` `[T]` bool. `lse` `[T]` float32: log-sum-exp of the tempered logits of row `i`,
    which predict token `i + 1`. `logprobs` `[T]` float32: the target's log-probability of `tokens[i]`.

    Row losses are, with weight `1 / D` at every depth: `ce`; `kl`; `tv`, weighted by the row's `tv_weights`, so that
    its gradient is that of the expected accepted tokens (end-to-end TV); `ramp`, which is `(1 - ramp) kl + ramp tv`.
    """
    targets = draft_targets(tokens, loss_mask, layout, depth)
    unrolled = unroll(head, embed_weight, hidden, targets, layout)
    rows = torch.cat([r for r, _ in unrolled])
    counts = tuple(len(r) for r, _ in unrolled)
    depths = torch.cat([torch.full_like(r, d) for d, (r, _) in enumerate(unrolled)])
    labels, teacher = targets.labels[depths, rows], targets.teacher[depths, rows]
    result = draft_loss(
        torch.cat([states for _, states in unrolled]),
        head.head_rows(lm_head_weight),
        head.to_draft[labels],
        hidden[teacher],
        lse[teacher],
        logprobs[teacher + 1],
        rule=rule,
        temperature=temperature,
    )

    def by_row(values: Tensor) -> Tensor:
        """`[D, T]` from `[N]`, 0 where no row counts."""
        return values.new_zeros(targets.mask.shape).index_put_((depths, rows), values)

    if loss == "ce":
        row_loss = weighted = result.ce
    else:
        share = {"kl": 0.0, "tv": 1.0, "ramp": ramp}[loss]
        weights = tv_weights(by_row(1 - result.tv.detach()))[depths, rows]
        row_loss = (1 - share) * result.kl + share * result.tv
        weighted = (1 - share) * result.kl + share * weights * result.tv
    return DraftObjective(
        loss_sum=weighted.sum() / depth,
        rows=counts,
        loss_by_depth=torch.stack([part.sum() for part in row_loss.detach().split(counts)]),
        estimate=estimate(by_row(result.accept), targets.mask, layout),
    )
