"""The draft's training objective over one pack: unroll, losses, and what its acceptance was worth.

Invariant: loss and counts are sums over this rank's rows, so packs and ranks add up; whoever calls divides by the
global number of rows.

Dimensions: `T` packed tokens, `D` depths, `H` hidden, `V` vocabulary, `n` rows that count, all depths together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.draft.acceptance import estimate
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.unroll import unroll
from miles_spec.kernels.draft_loss import Mix, draft_loss
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import draft_targets, extend
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
    """What serving with this draft would have needed for these responses; of the whole pack, on every rank of it."""


def objective(
    head: DraftHead,
    embed_weight: Tensor,
    target_head: Tensor,
    hidden: Tensor,
    states: Tensor,
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
    group: dist.ProcessGroup | None = None,
) -> DraftObjective:
    """Loss of `head` on a pack that the target has just been run over.

    `hidden` `[T, H]` after the final norm, `states` `[T, S]` that `head` reads, `embed_weight` `[V, H]` and
    `target_head` `[Vd, H]` (`DraftHead.target_rows`): the target's, detached. With `group`, a TP group, the embedding
    is this rank's share of the vocabulary, and so is `target_head` if the draft `shares_head`; all else is the same on
    its ranks, as is what they return.
    `tokens` `[T]` int64, `loss_mask` `[T]` bool. `lse` and `logprobs` `[T]` float32 by row: log-sum-exp of the row's
    tempered logits, and the target's log-probability of the token that follows. Copies to the host a few times.

    Row losses are, with weight `1 / D` at every depth: `ce`; `kl`; `tv`, weighted by the row's `end_to_end_weights`,
    so that its gradient is that of the expected accepted tokens (end-to-end TV); `ramp`, which is `(1 - ramp) kl + ramp
    tv`.
    """
    target_head = target_head.detach()
    targets = draft_targets(tokens, loss_mask, layout, depth)
    unrolled = unroll(head, embed_weight, states, targets, layout, group=group)
    # blocks side by side, so that their depths share the teacher's logits
    rows, depths = targets.mask.T.nonzero().unbind(1)
    teacher = targets.teacher[depths, rows]
    reach = extend(hidden, layout)
    read = torch.zeros(len(reach), dtype=torch.bool, device=hidden.device).index_fill_(0, teacher, True)
    share = 0.0 if loss in ("ce", "kl") else 1.0 if loss == "tv" else ramp
    mix = Mix(ce=1) if loss == "ce" else Mix(kl=1 - share, tv=share)
    result = draft_loss(
        unrolled.flat,
        target_head if head.lm_head is None else head.lm_head.weight,
        reach[read],
        head.to_draft[targets.labels[depths, rows]],
        mix=mix,
        rule=rule,
        temperature=temperature,
        rows=unrolled.index(depths, rows),
        teacher_rows=(read.cumsum(0) - 1)[teacher],
        teacher_head=None if head.lm_head is None else target_head,
        teacher_lse=extend(lse.detach(), layout)[teacher],
        label_logprob=extend(logprobs.detach(), layout)[teacher],
        chain=depths,
        depth=depth,
        group=group if head.shares_head else None,
    )

    def by_row(values: Tensor) -> Tensor:
        """`[D, T]` from `[n]`, 0 where no row counts."""
        return values.new_zeros(targets.mask.shape).index_put_((depths, rows), values)

    row_loss = result.ce if loss == "ce" else mix.kl * result.kl + mix.tv * result.tv
    return DraftObjective(
        loss_sum=result.total / depth,
        rows=tuple(targets.mask.sum(1).tolist()),
        loss_by_depth=by_row(row_loss).sum(1),
        estimate=estimate(by_row(result.accept), targets.mask, layout),
    )
