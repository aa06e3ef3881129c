"""Runs a draft over a pack at every depth, feeding it its own states as serving does.

Invariant: the target's hidden states and embedding come in detached, so no gradient can leave the draft.

Dimensions: `T` packed tokens, `D` depths, `Nd` rows that count at depth `d`, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.attention import Attend, ChainAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import DraftTargets


def unroll(
    head: DraftHead, embed_weight: Tensor, hidden: Tensor, targets: DraftTargets, layout: PackedLayout
) -> list[tuple[Tensor, Tensor]]:
    """`D` pairs of `rows` `[Nd]` int64, ascending, and the draft's `states` `[Nd, H]` there.

    `embed_weight` `[V, H]` and `hidden` `[T, H]` (after the target's final norm) must not require a gradient. Depth 1
    runs every row, since prompts serve as keys; a segment's last row has no next token and runs on whatever token
    follows in the pack, which nothing attends to. Deeper rows run only where they count.
    """
    assert not hidden.requires_grad and not embed_weight.requires_grad
    chain = ChainAttention(layout)

    def run(depth: int, rows: Tensor | slice, states: Tensor, attend: Attend) -> Tensor:
        embed = F.embedding(targets.inputs[depth, rows], embed_weight)
        return head(embed[None], states[None], targets.positions[depth, rows][None], attend)[0]

    rows = targets.mask[0].nonzero().squeeze(-1)
    states = run(0, slice(None), hidden, chain) if len(hidden) else hidden
    out = [(rows, states[rows])]
    for depth in range(1, targets.mask.shape[0]):
        before, states = out[-1]
        rows = targets.mask[depth].nonzero().squeeze(-1)
        states = states[torch.searchsorted(before, rows)]
        out.append((rows, run(depth, rows, states, chain.at(rows)) if len(rows) else states))
    return out
