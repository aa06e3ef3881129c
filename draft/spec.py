"""`DraftSpec`: everything that tells one draft family from another, in one value.

Modules, import and export, receipts and tests read the spec; nothing else knows a family by name.

Dimensions: `H` hidden size of the target, `V` its vocabulary, `Vd` the draft's (at most `V`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpec:
    """One draft family."""

    family: str
    concat: tuple[Literal["embed", "hidden"], Literal["embed", "hidden"]]
    """Order of the two halves of the input to the fusing projection `fc`."""
    hidden: Literal["post_norm", "pre_norm"]
    """Which of the target's last states the draft reads: after or before its final norm."""
    fc_bias: bool
    """Whether `fc` has a bias."""
    input_norm: bool
    """Whether the decoder layer keeps its input norm."""
    final_norm: bool
    """Whether the draft has a norm of its own before the LM head."""
    shared_head: bool
    """Whether the target's LM head is used, detached."""
    layer_prefix: str
    """Prefix of the decoder layer's tensors in an exported checkpoint."""


EAGLE = DraftSpec(
    family="eagle",
    concat=("embed", "hidden"),
    hidden="post_norm",
    fc_bias=True,
    input_norm=False,
    final_norm=False,
    shared_head=True,
    layer_prefix="layers.0.",
)
"""EAGLE (Li et al., 2024, arXiv 2401.15077, section 3.1), as SGLang and the public checkpoints lay it out."""

FAMILIES = {spec.family: spec for spec in (EAGLE,)}
