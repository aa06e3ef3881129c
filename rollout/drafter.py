"""Drafts for the rows of the embedded engine.

Invariant. Draft row `t` joins state `h_t` with token `t+1`; in a sequence of `n` tokens a block of depth `k` starts at
row `n-2`, whose state proposes token `n`. A draft with a layer for each depth has rows, keys and states at each: row
`t` of depth `d` joins the state of row `t` of depth `d-1` with token `t+d`, and the last `d-1` rows of a block, whose
token was only guessed, are made again in the next one.

Dimensions: `B` sequences, `k` draft depth, `V` vocabulary, `Vd` that of the draft, `H` its hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from miles_spec.draft.modules import DraftHead
from miles_spec.models import embed_weight, head_weight
from miles_spec.rollout.kv_cache import row_index
from miles_spec.rollout.rows import Rows
from miles_spec.rollout.sampler import Stream, draw, filtered, uniform


class Drafter:
    """A draft beside its target. It may hold rows of the target's LM head: made anew when weights have changed."""

    def __init__(self, draft: DraftHead, target: PreTrainedModel, chunk: int) -> None:
        """`chunk` is the most tokens of one forward that catches up on sequences."""
        target_head = head_weight(target)
        self._draft = draft
        self._embed = embed_weight(target)
        self._head = draft.head_rows(target_head)
        self._vocab = target_head.shape[0]
        self._chunk = chunk

    def prefill(self, rows: Rows, which: Tensor, lengths: list[int]) -> None:
        """Computes all draft rows of prompts of `lengths` tokens, in rows `which` `[B]` int64."""
        for depth in range(1, len(rows.draft_caches) + 1 if max(lengths) > 1 else 1):
            self._extend(rows, depth, which, [0] * len(lengths), [n - 1 for n in lengths])

    def propose(self, rows: Rows, lengths: list[int], depth: int, *, sampled: bool) -> tuple[Tensor, Tensor | None]:
        """`[B, k]` tokens drafted for all running sequences, of `lengths` tokens: the likeliest ones, or if `sampled`
        drawn ones and the `[B, k, V]` distributions that they were drawn from."""
        draft, layers = self._draft, self._draft.layers
        live = slice(0, len(lengths))
        done, stops = [s.draft_rows for s in rows.running], [n - 1 for n in lengths]
        for sequence, stop in zip(rows.running, stops, strict=True):
            sequence.draft_rows = stop
        ends = torch.tensor(lengths, device=rows.ids.device)[:, None]
        tokens: list[Tensor] = []
        proposals: list[Tensor] = []
        for d in range(1, depth + 1):
            if d <= layers:
                # the last rows of the block before read tokens that were only guessed
                state, out = self._extend(rows, d, live, [max(0, row - d + 1) for row in done], stops)
            else:
                place = ends - 2 + d - layers
                attend = rows.draft_caches[-1].attend(live, place, max(lengths) - 1 + d - layers)
                embed = F.embedding(tokens[-1], self._embed)
                state, out = (x[:, 0] for x in draft(embed, state[:, None], place + layers - 1, attend, d))
            logits = out @ self._head.T
            if sampled:
                temperature, seeds = rows.temperature[live], rows.seeds[live]
                probs, _ = filtered(logits, temperature, torch.zeros_like(seeds), torch.ones_like(temperature))
                choice = draw(probs, uniform(seeds, (ends + d - 1)[:, 0], Stream.DRAFT))
                proposals.append(self._full(probs))
            else:
                choice = logits.argmax(-1)
            if draft.vocab_ids is not None:
                choice = draft.vocab_ids[choice]
            tokens.append(choice[:, None])
            if d < min(layers, depth):
                rows.ids[live].scatter_(1, ends + d - 1, choice[:, None])  # the next depth's rows read it
        return torch.cat(tokens, 1), torch.stack(proposals, 1) if proposals else None

    def _extend(
        self, rows: Rows, depth: int, which: slice | Tensor, starts: list[int], stops: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Computes draft rows `start..stop-1` of each sequence at `depth`, from the states that the target or the depth
        before has for them; `[B, H]` twice: what the last one has for the next depth, and for the LM head.

        Shorter ranges are padded at their end; what padding writes lies beyond their rows.
        """
        device, size = rows.ids.device, self._draft.config.hidden_size
        widest = max(b - a for a, b in zip(starts, stops, strict=True))
        width = max(1, self._chunk // len(starts))
        start = torch.tensor(starts, device=device)[:, None]
        last = torch.tensor(stops, device=device)[:, None] - 1
        ids, read = rows.ids[which], rows.states[depth - 1][which]
        ends = torch.empty(2, len(starts), size, dtype=read.dtype, device=device)
        for offset in range(0, widest, width):
            count = min(width, widest - offset)
            positions = (start + offset + torch.arange(count, device=device)).clamp(max=ids.shape[1] - 1 - depth)
            attend = rows.draft_caches[depth - 1].attend(
                which, positions, min(max(starts) + offset + count, ids.shape[1])
            )
            embed = F.embedding(ids.gather(1, positions + depth), self._embed)
            index = positions[..., None].expand(-1, -1, read.shape[-1])
            before = read.gather(1, index)
            if depth == 1:
                before = self._draft.enter(before)
            both = torch.stack(self._draft(embed, before, positions + depth - 1, attend, depth))
            if depth < len(rows.states):
                rows.states[depth][row_index(which, device), positions] = both[0]
            at = last - start - offset
            inside = (at >= 0) & (at < count)
            picked = both.gather(2, at.clamp(0, count - 1)[..., None].expand(2, -1, 1, size))[:, :, 0]
            ends = torch.where(inside, picked, ends)
        return ends[0], ends[1]

    def _full(self, probs: Tensor) -> Tensor:
        """`[B, V]` from `[B, Vd]`: probability 0 outside the draft's vocabulary."""
        if self._draft.vocab_ids is None:
            return probs
        full = probs.new_zeros(len(probs), self._vocab)
        return full.index_copy_(1, self._draft.vocab_ids, probs)
