"""What the embedded engine keeps of each running sequence on its device.

Invariant: the running sequences are rows `0..B-1` of every buffer, each at its own length; a hole is closed with the
last row. What lies beyond a row's length is never read before it is written again.

Dimensions: `R` rows, `C` capacity of a row in tokens, `H` the draft's hidden size, `S` width of what the draft reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_spec.draft.modules import DraftHead
from miles_spec.rollout.kv_cache import RaggedCache
from miles_spec.rollout.sequence import Running


class Rows:
    """The running sequences and their buffers, which are made at the first `reserve`."""

    running: list[Running]
    """The sequence of each row in use."""
    ids: Tensor
    """`[R, C]` int64: prompt, committed tokens, and those that a block guesses on from."""
    seeds: Tensor
    """`[R]` int64."""
    temperature: Tensor
    """`[R]` float32."""
    top_k: Tensor
    """`[R]` int64."""
    top_p: Tensor
    """`[R]` float32."""
    cache: RaggedCache
    """The target's."""
    draft_caches: list[RaggedCache]
    """By depth, as many as have a layer of their own and are drafted; none without a draft."""
    states: list[Tensor]
    """What the draft reads, as many: `[R, C, S]` at depth 1, `[R, C, H]` at others."""

    def __init__(self, config: Any, draft: DraftHead | None, dtype: torch.dtype, device: torch.device) -> None:
        """`config` is the target's; `dtype` is that of keys, values and states."""
        self.running = []
        self._config, self._draft = config, draft
        self._place: dict[str, Any] = {"dtype": dtype, "device": device}
        self._count = self._depth = 0

    def reserve(self, count: int, context: int, depth: int) -> None:
        """Makes buffers for `count` sequences of `context` tokens and blocks that draft `depth` of them, unless there
        are some for as many sequences and blocks as deep."""
        assert not self.running
        if count <= self._count and depth <= self._depth:
            return
        self._count, self._depth, draft = count, depth, self._draft
        capacity = context + depth + 2  # a block runs over the end of a sequence, and padding beside it
        room: dict[str, Any] = {"rows": count, "capacity": capacity, **self._place}
        self.cache = RaggedCache(layers=self._config.num_hidden_layers, **_heads(self._config), **room)
        self.draft_caches, self.states = [], []
        if draft is not None:
            depths = max(1, min(draft.layers, depth))
            # a draft from elsewhere may have other heads than the target
            heads = _heads(draft.config)
            self.draft_caches = [RaggedCache(layers=1, **heads, **room) for _ in range(depths)]
            widths = [draft.width] + [draft.config.hidden_size] * (depths - 1)
            self.states = [torch.zeros(count, capacity, width, **self._place) for width in widths]
        device = self._place["device"]
        self.ids = torch.zeros(count, capacity, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self.top_k = torch.zeros(count, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(count, device=device)
        self.top_p = torch.zeros(count, device=device)

    def add(self, sequences: list[Running]) -> slice:
        """Gives sequences the next rows, with their settings; their tokens are for the caller to write."""
        rows = slice(len(self.running), len(self.running) + len(sequences))
        self.running += sequences
        sampling = [s.request.sampling for s in sequences]
        self.seeds[rows] = torch.tensor([s.request.seed for s in sequences])
        self.temperature[rows] = torch.tensor([s.temperature for s in sampling])
        self.top_k[rows] = torch.tensor([s.top_k for s in sampling])
        self.top_p[rows] = torch.tensor([s.top_p for s in sampling])
        return rows

    def remove(self, sequence: Running) -> None:
        """Takes a sequence out and closes the hole with the last row."""
        row, last = self.running.index(sequence), self.running.pop()
        if last is not sequence:
            self.running[row] = last
            self.copy(len(self.running), [row], len(last.tokens))
            for setting in (self.seeds, self.temperature, self.top_k, self.top_p):
                setting[row] = setting[len(self.running)].clone()

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copies all that there is of the first `length` tokens of one row to others."""
        for cache in (self.cache, *self.draft_caches):
            cache.copy(source, targets, length)
        for buffer in (*self.states, self.ids):
            buffer[targets, :length] = buffer[source, :length]


def _heads(config: Any) -> dict[str, Any]:
    """How many heads keys and values have in the layers of a model, and how wide they are."""
    if getattr(config, "kv_lora_rank", None):
        # latent attention: every head has keys and values of its own by the time that they are attended to
        size = config.qk_nope_head_dim + config.qk_rope_head_dim
        return {"heads": config.num_attention_heads, "head_size": size, "value_size": config.v_head_dim}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"heads": config.num_key_value_heads, "head_size": size}
