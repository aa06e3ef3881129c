"""Runs a target's trunk and keeps the states that its draft reads.

Invariant: the trunk computes what it computes without a draft; hooks only look on.

Dimensions: `H` hidden size, `S` width of what the draft reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from miles_spec.draft.modules import DraftHead


def run(trunk: Any, head: DraftHead | None, *args: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """`[.., H]` the trunk's states after its final norm, and `[.., S]` what `head` reads at depth 1; without a head, or
    for one that reads just those, they are one tensor."""
    caught: dict[int, Tensor] = {}

    def keep(at: int, layer: Any, inputs: Any, out: Any) -> None:
        # a layer's output may be a tuple; recomputation in a backward pass calls again and changes nothing
        caught.setdefault(at, out[0] if isinstance(out, tuple) else out)

    layers = () if head is None else head.aux_layers
    hooks = [trunk.layers[n].register_forward_hook(partial(keep, at)) for at, n in enumerate(layers)]
    try:
        hidden = trunk(*args, **inputs).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if not layers:
        return hidden, hidden
    return hidden, torch.cat([caught[at] for at in range(len(layers))], dim=-1)
