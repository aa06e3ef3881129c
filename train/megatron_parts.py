"""Which rows of a micro-batch are a rank's in Megatron's layout: for the policy, and for its draft.

Context-parallel ranks have other rows than each other. Tensor-parallel ones all have the same, and share these for the
draft as if they were context-parallel ranks too.

Dimensions: `T` tokens of a micro-batch, `R` rows of it on this rank, `N` of those that predict a sampled token, `r` of
the `R` rows that are this rank's for the draft, `H` hidden size, `S` width of the states that the draft reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miles_spec.draft.objective import DraftRows
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.logprob import LogProbs
from miles_spec.train.draft_trainer import DraftTrainer, Teacher
from miles_spec.train.megatron_ranks import MegatronRanks
from miles_spec.types import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taught:
    """This rank's rows for the draft."""

    batch: PackedBatch
    """With `r` rows, as in `Part`."""
    rows: DraftRows
    take: Tensor | None
    """`[r]` int64, which of the part's rows they are; None for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """This rank's rows of a micro-batch."""

    batch: PackedBatch
    """With `R` rows: a token, and its mask, for each row; nothing of the policy's loss."""
    whole: PackedBatch
    rows: Tensor
    """`[N]` int64, rows whose next token counts."""
    tokens: Tensor
    """`[N]` int64, which token of `whole` that is."""
    taught: Taught | None = None
    """Where the draft is to learn from it."""

    @classmethod
    def make(cls, whole: PackedBatch, ranks: MegatronRanks, device: torch.device, *, halo: int, every: bool) -> Part:
        """Cut for this context-parallel rank; with `every`, all tokens count but the first of each segment."""
        layout = PackedLayout.make(
            whole.layout.lengths,
            device,
            halo=halo,
            cp_group=ranks.context,
            # without a draft too, so that its rows are the same
            divisor=1 if ranks.tensor is None else ranks.tensor.size(),
        )
        after = (layout.source + 1).clamp(max=len(whole.tokens) - 1)
        counts = layout.left > 0
        rows = (counts if every else counts & whole.loss_mask[after]).nonzero().squeeze(1)
        return cls(batch=_rows_of(whole, layout), whole=whole, rows=rows, tokens=after[rows])

    def taught_to(self, draft: DraftTrainer, ranks: MegatronRanks) -> Part:
        """The same, `taught`. Waits for the device, as `DraftTrainer.rows` does."""
        batch, take = self.batch, None
        if ranks.tensor is not None:
            halo = draft.config.draft.num_steps + 1
            layout, take = batch.layout.finer(ranks.tensor_rank, halo=halo, cp_group=ranks.pack)
            batch = _rows_of(self.whole, layout)
        return replace(self, taught=Taught(batch=batch, rows=draft.rows(batch), take=take))

    def lesson(self, hidden: Tensor, read: Tensor, out: LogProbs, dtype: torch.dtype) -> tuple[PackedBatch, Teacher]:
        """What `DraftStep.add` is given, of a part that is `taught`: from the policy's states `[R, H]` after the final
        norm and `[R, S]` that the draft reads, and its log-probabilities at `rows`; states in `dtype`."""
        taught = self.taught
        assert taught is not None, "the draft does not learn from this part"

        def mine(x: Tensor) -> Tensor:
            return x if taught.take is None else x.index_select(0, taught.take)

        states = mine(hidden.detach()).to(dtype)
        return taught.batch, Teacher(
            rows=taught.rows,
            hidden=states,
            states=states if read is hidden else mine(read.detach()).to(dtype),
            lse=mine(self._scatter(out.lse.detach())),
            logprobs=mine(self._scatter(out.logprob.detach())),
        )

    def _scatter(self, values: Tensor) -> Tensor:
        """`[R]` with `values` `[N]` at `rows` and 0 elsewhere."""
        return values.new_zeros(self.batch.layout.tokens).index_copy_(0, self.rows, values)


def _rows_of(whole: PackedBatch, layout: PackedLayout) -> PackedBatch:
    """A token and its mask for each row of `layout`; nothing of the policy's loss."""
    nothing = torch.zeros(layout.tokens, device=layout.source.device)
    return PackedBatch(
        layout=layout,
        tokens=whole.tokens[layout.source],
        loss_mask=whole.loss_mask[layout.source] & layout.real,
        advantages=nothing,
        rollout_logprobs=nothing,
        weights=nothing,
    )
