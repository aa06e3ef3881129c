"""What of a fresh draft needs no gradient: the best linear function of token and state, by least squares.

A fresh decoder layer adds next to nothing to the stream that it works on. Where that stream is to be the target's state
a token later, the best linear start is a ridge regression on the target's own states, in closed form.

- Joining by projection, that function is `fc`.
- Joining in the attention, `fc` is the states' part of it, and the token's part goes through the attention, whose
  queries and keys are set to one projection of the token: a row then attends to itself, almost alone. Values and
  outputs hold as much of that part as their rank allows (reduced-rank regression, Izenman, 1975). What comes out is a
  state behind the target's final norm, so the draft's own only keeps its size.

Invariant: packs may be added in any order, and on any number of ranks.

Dimensions: `T` rows of a pack on this rank, `H` hidden, `S` width of the target's states that the draft reads (`H` or
`3H`), `V` vocabulary, `W` inputs of the function: `H + S`, and one more for a bias.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from miles_spec.draft.fresh import norm_factor, set_norm
from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import draft_targets, shift

RIDGE = 1e-3
"""Added to the diagonal of the inputs' second moments, in units of its own entries: inputs differ in size by orders."""
FLOOR = 1e-6
"""Least of those entries, in units of their mean, for an input that is always 0."""
LOOK = 8.0
"""Attention score of a row with itself, where others' are around 0: over a hundred of them, 0.95 of its weight."""


class LinearFit:
    """`add` each pack, then `finish`."""

    def __init__(self, head: DraftHead) -> None:
        size = head.config.hidden_size
        self._inputs = size + head.width
        width = self._inputs + head.spec.fc_bias
        self._head = head
        # of thousands of inputs in double precision: what they have in common is much larger than what tells them apart
        self._moments = torch.zeros(width, width + size, dtype=torch.float64, device=head.fc.weight.device)

    @torch.no_grad()
    def add(
        self,
        embed_weight: Tensor,
        states: Tensor,
        hidden: Tensor,
        tokens: Tensor,
        layout: PackedLayout,
    ) -> None:
        """All rows of a pack with a token after them, prompts included: `tokens` `[T]` int64, the target's `states`
        `[T, S]` that the draft reads and `hidden` `[T, H]` after the final norm, `embed_weight` `[V, H]`."""
        head = self._head
        targets = draft_targets(tokens, torch.zeros_like(tokens, dtype=torch.bool), layout, 1)
        embed = F.embedding(targets.inputs[0], embed_weight).to(states.dtype)
        if head.spec.joins == "projection":
            x = head.join(embed[None], states[None], targets.positions)[0]
        else:
            x = torch.cat([head.embed_norm(embed), states], dim=1)
        x, after = (part[targets.keys].double() for part in (x, shift(hidden, layout, 1)))
        both = torch.cat([x, x.new_ones(len(x), int(head.spec.fc_bias)), after], dim=1)
        self._moments += both[:, : len(self._moments)].T @ both

    @torch.no_grad()
    def finish(self, group: dist.ProcessGroup | None = None) -> None:
        """Sets the function, that of every depth; `group` are the ranks with other rows. Without any row the draft
        stays as it is."""
        if group is not None:
            dist.all_reduce(self._moments, group=group)
        width = len(self._moments)
        gram, cross = self._moments.split([width, self._moments.shape[1] - width], dim=1)
        sizes = gram.diagonal()[: self._inputs]
        if not sizes.mean() > 0:
            return
        penalty = torch.zeros(width, dtype=gram.dtype, device=gram.device)
        penalty[: self._inputs] = RIDGE * sizes.clamp(min=FLOOR * sizes.mean())  # a bias costs nothing
        solved = torch.linalg.solve(gram + penalty.diag(), cross).T
        if self._head.spec.joins == "attention":
            self._set_attention(solved, gram)
            return
        for part in self._head.parts:
            part.fc.weight.copy_(solved[:, : self._inputs])
            if part.fc.bias is not None:
                part.fc.bias.copy_(solved[:, self._inputs])

    def _set_attention(self, solved: Tensor, gram: Tensor) -> None:
        """From the function `[H, W]`, token first, and the inputs' moments `[W, W]`."""
        head, size = self._head, self._head.config.hidden_size
        token, state = solved.split([size, head.width], dim=1)
        head.fc.weight.copy_(state)
        set_norm(head.norm, norm_factor(head.norm).square().mean().sqrt().expand(size))
        attention = head.layer.self_attn
        width, rows = attention.head_dim, attention.k_proj.out_features
        shared = attention.q_proj.out_features // rows
        """Heads of queries for each of keys and values."""
        rank = min(rows, size)
        main = torch.linalg.eigh(token @ gram[:size, :size] @ token.T).eigenvectors[:, -rank:]
        values, outputs = token.new_zeros(rows, size), token.new_zeros(size, rows)
        values[:rank], outputs[:, :rank] = main.T @ token, main
        draw = torch.randn(rows, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        looks = draw.to(token.device) * (LOOK / (size * width**0.5)) ** 0.5  # tokens have unit RMS here
        grouped = (shared, width)
        reads = {"q_proj": _repeat(looks, *grouped), "k_proj": looks, "v_proj": values}
        for name, weight in reads.items():
            halves = {"embed": weight, "hidden": torch.zeros_like(weight)}
            getattr(attention, name).weight.copy_(torch.cat([halves[half] for half in head.spec.concat], dim=1))
        attention.o_proj.weight.copy_(_repeat(outputs.T, *grouped).T / shared)


def _repeat(rows: Tensor, times: int, width: int) -> Tensor:
    """Each head's `width` rows `times` over, as heads of queries share those of keys."""
    return rows.unflatten(0, (-1, width)).repeat_interleave(times, dim=0).flatten(0, 1)
