"""What of a fresh draft needs no gradient: `fc` by least squares.

A fresh decoder layer adds next to nothing to what `fc` makes of token and state. Where that is to be a state of the
target's, a token later, the best `fc` is a ridge regression on the target's own states, in closed form.

Invariant: packs may be added in any order, and on any number of ranks.

Dimensions: `T` rows of a pack on this rank, `H` hidden, `V` vocabulary, `W` inputs of `fc`: `2H`, and one more for a
bias.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.linear import vocab_rows
from miles_spec.kernels.shift import draft_targets, shift

RIDGE = 1e-3
"""Added to the diagonal of the inputs' second moments, in units of its mean."""


class LinearFit:
    """`add` each pack, then `finish`; for a draft that joins by projection."""

    def __init__(self, head: DraftHead) -> None:
        assert head.spec.joins == "projection"
        weight = head.fc.weight
        outputs, inputs = weight.shape
        width = inputs + head.spec.fc_bias
        self._head = head
        # of thousands of inputs in double precision: what they have in common is much larger than what tells them apart
        self._moments = torch.zeros(width, width + outputs, dtype=torch.float64, device=weight.device)

    @torch.no_grad()
    def add(
        self,
        embed_weight: Tensor,
        states: Tensor,
        tokens: Tensor,
        layout: PackedLayout,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """All rows of a pack with a token after them, prompts included: `tokens` `[T]` int64, `states` `[T, H]` the
        target's, `embed_weight` `[V, H]`, or with the TP group `group` this rank's share of it."""
        targets = draft_targets(tokens, torch.zeros_like(tokens, dtype=torch.bool), layout, 1)
        embed = vocab_rows(embed_weight, targets.inputs[0], group)
        x = self._head.join(embed[None].to(states.dtype), states[None], targets.positions)[0]
        x, after = (part[targets.keys].double() for part in (x, shift(states, layout, 1)))
        both = torch.cat([x, x.new_ones(len(x), int(self._head.spec.fc_bias)), after], dim=1)
        self._moments += both[:, : len(self._moments)].T @ both

    @torch.no_grad()
    def finish(self, group: dist.ProcessGroup | None = None) -> None:
        """Sets `fc`, that of every depth; `group` are the ranks with other rows. Without any row it stays as it is."""
        if group is not None:
            dist.all_reduce(self._moments, group=group)
        width = len(self._moments)
        gram, cross = self._moments.split([width, self._moments.shape[1] - width], dim=1)
        inputs = self._head.fc.in_features
        scale = gram.diagonal()[:inputs].mean()
        if not scale > 0:
            return
        penalty = torch.zeros(width, dtype=gram.dtype, device=gram.device)
        penalty[:inputs] = RIDGE * scale  # a bias costs nothing
        solved = torch.linalg.solve(gram + penalty.diag(), cross).T
        for part in self._head.parts:
            part.fc.weight.copy_(solved[:, :inputs])
            if part.fc.bias is not None:
                part.fc.bias.copy_(solved[:, inputs])
