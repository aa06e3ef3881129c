"""The draft's training objective over one pack: unroll, losses, and what its acceptance was worth.

Invariant: loss and counts are sums over this rank's rows, so packs and ranks add up; whoever calls divides by the
global number of rows. What the host has to know of a pack is found before any model runs (`DraftRows`), so the
objective waits for the device nowhere.

Dimensions: `T` packed tokens, `D` depths, `H` hidden, `V` vocabulary, `n` rows that count, all depths together, `M`
rows of the target that teach them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miles_spec.draft.acceptance import Replay
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.unroll import first_rows, unroll
from miles_spec.kernels.draft_chunks import Part
from miles_spec.kernels.draft_loss import Mix, draft_loss, plan_chunks
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import DraftTargets, draft_targets, extend
from miles_spec.types import SpecEstimate, VerifyRule

Loss = Literal["ce", "kl", "tv", "ramp"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftRows:
    """The rows of a pack that a draft learns from, and all that the host has to know of them. No weight is in it."""

    targets: DraftTargets
    counts: tuple[int, ...]
    """`[D]` rows that count at each depth."""
    starts: tuple[int, ...]
    """The first row of each piece that counts, the number of rows if none does."""
    rows: Tensor
    """`[n]` int64, those that count, blocks side by side, so that their depths share the teacher's logits."""
    depths: Tensor
    """`[n]` int64, of each, from 0."""
    taught: Tensor
    """`[M]` int64 ascending, the rows of `extend(hidden, layout)` that teach."""
    teacher: Tensor
    """`[n]` int64, which of `taught` teaches each."""
    chunks: tuple[Part, ...]
    """How `draft_loss` cuts them."""

    @classmethod
    def make(
        cls,
        layout: PackedLayout,
        tokens: Tensor,
        loss_mask: Tensor,
        *,
        depth: int,
        hidden: int,
        vocab: int,
        dtype: torch.dtype,
    ) -> DraftRows:
        """Of `tokens` `[T]` int64 and `loss_mask` `[T]` bool, for `depth` drafted tokens, a target of size `hidden` and
        an LM head of `vocab` rows, both in `dtype`. Copies to the host a few times."""
        targets = draft_targets(tokens, loss_mask, layout, depth)
        rows, depths = targets.mask.T.nonzero().unbind(1)
        at = targets.teacher[depths, rows]
        reach = layout.tokens + sum(layout.receive_splits)
        read = torch.zeros(reach, dtype=torch.bool, device=tokens.device).index_fill_(0, at, True)
        teacher = (read.cumsum(0) - 1)[at]
        return cls(
            targets=targets,
            counts=tuple(targets.mask.sum(1).tolist()),
            starts=tuple(first_rows(targets.mask[0], layout)),
            rows=rows,
            depths=depths,
            taught=read.nonzero().squeeze(1),
            teacher=teacher,
            chunks=tuple(plan_chunks(depths, teacher, depth=depth, hidden=hidden, vocab=vocab, dtype=dtype)),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftObjective:
    """What one pack adds to the draft's loss and metrics."""

    loss_sum: Tensor
    """Scalar float32, differentiable in the draft alone; divide by the global sum of `rows[0]`."""
    rows: tuple[int, ...]
    """`[D]` rows that count at each depth."""
    loss_by_depth: Tensor
    """`[D]` float32, detached sums over rows of the chosen loss before any row weight."""
    replay: Replay
    """`estimate`, on its way."""

    @property
    def estimate(self) -> SpecEstimate:
        """What serving with this draft would have needed for these responses; of the whole pack, on every rank of it.
        Waits for the device."""
        return self.replay.result()


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
    given: DraftRows | None = None,
) -> DraftObjective:
    """Loss of `head` on a pack that the target has just been run over.

    `hidden` `[T, H]` after the final norm, `states` `[T, S]` that `head` reads, `embed_weight` `[V, H]` and
    `target_head` `[Vd, H]` (`DraftHead.target_rows`): the target's, detached.
    `tokens` `[T]` int64, `loss_mask` `[T]` bool. `lse` and `logprobs` `[T]` float32 by row: log-sum-exp of the row's
    tempered logits, and the target's log-probability of the token that follows. `given` are the pack's `DraftRows`, of
    the same depth, sizes and dtype; left out, they are made here, which waits for the device. Nothing else does, unless
    the draft has experts.

    Row losses are, with weight `1 / D` at every depth: `ce`; `kl`; `tv`, weighted by the row's `end_to_end_weights`,
    so that its gradient is that of the expected accepted tokens (end-to-end TV); `ramp`, which is `(1 - ramp) kl + ramp
    tv`.
    """
    target_head = target_head.detach()
    if given is None:
        vocab, size = target_head.shape
        given = DraftRows.make(
            layout, tokens, loss_mask, depth=depth, hidden=size, vocab=vocab, dtype=target_head.dtype
        )
    targets, rows, depths = given.targets, given.rows, given.depths
    unrolled = unroll(head, embed_weight, states, targets, layout, starts=given.starts)
    share = 0.0 if loss in ("ce", "kl") else 1.0 if loss == "tv" else ramp
    mix = Mix(ce=1) if loss == "ce" else Mix(kl=1 - share, tv=share)
    result = draft_loss(
        unrolled.flat,
        target_head if head.lm_head is None else head.lm_head.weight,
        extend(hidden, layout)[given.taught],
        head.to_draft[targets.labels[depths, rows]],
        mix=mix,
        rule=rule,
        temperature=temperature,
        rows=unrolled.index(depths, rows),
        teacher_rows=given.teacher,
        teacher_head=None if head.lm_head is None else target_head,
        teacher_lse=extend(lse.detach(), layout)[given.taught][given.teacher],
        label_logprob=extend(logprobs.detach(), layout)[given.taught][given.teacher],
        chain=depths,
        depth=depth,
        chunks=given.chunks,
    )

    def by_row(values: Tensor) -> Tensor:
        """`[D, T]` from `[n]`, 0 where no row counts."""
        return values.new_zeros(targets.mask.shape).index_put_((depths, rows), values)

    row_loss = result.ce if loss == "ce" else mix.kl * result.kl + mix.tv * result.tv
    return DraftObjective(
        loss_sum=result.total / depth,
        rows=given.counts,
        loss_by_depth=by_row(row_loss).sum(1),
        replay=Replay(by_row(result.accept), targets.mask, layout),
    )
