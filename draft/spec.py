"""`DraftSpec`: everything that tells one draft family from another, in one value.

Modules, import and export, receipts and tests read the spec; nothing else knows a family by name.

Dimensions: `H` hidden size of the target, `V` its vocabulary, `Vd` the draft's (at most `V`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpec:
    """One draft family."""

    family: str
    layer: Literal["target", "llama", "plain"]
    """Whose decoder layer it has: the target's kind of layer; a Llama's of the target's sizes; or the target's own
    where that is a Llama's, Mistral's or Qwen2's, and a Llama's for all others. The latter two are what engines have
    classes for."""
    reads: Literal["post_norm", "aux"]
    """The target's states that depth 1 starts from: the last ones, after the final norm, `[.., H]`, or those of three
    layers side by side, `[.., 3H]`."""
    joins: Literal["projection", "attention"]
    """Where token and state meet: in a projection `fc` `[H, 2H]` before the layer, or in the layer's attention, whose
    projections take both, while `fc` `[H, 3H]` only brings the target's states to size."""
    concat: tuple[Literal["embed", "hidden"], Literal["embed", "hidden"]]
    """Order of token and state where they meet."""
    fc_bias: bool
    """Whether `fc` has a bias."""
    part_norms: bool
    """Whether token and state each have a norm before they meet."""
    input_norm: bool
    """Whether the decoder layer keeps its input norm. One that joins in its attention has `part_norms` in its place."""
    final_norm: bool
    """Whether the draft has a norm of its own before the LM head."""
    feeds: Literal["pre_norm", "post_norm"]
    """Which of its own states the next depth starts from: before or after that norm."""
    first_embed: bool
    """Whether the row at position 0 reads its token; if not, a zero in its place."""
    own_head: bool
    """Whether the draft has an LM head of its own `[Vd, H]`; if not, the target's is used, detached."""
    layered: bool
    """Whether it may have a layer for each depth; if so, names in a checkpoint number the layers from 0."""
    names: tuple[tuple[str, str], ...]
    """Prefix of tensors here to their prefix in a checkpoint, the first that fits; the rest have the same name."""

    def name_of(self, ours: str) -> str:
        """The name in a checkpoint of the tensor that is called `ours` in the module."""
        if ours.startswith("deeper."):
            _, number, rest = ours.split(".", 2)
            return self.name_of(rest).replace(".0.", f".{int(number) + 1}.", 1)
        for prefix, theirs in self.names:
            if ours.startswith(prefix):
                return theirs + ours.removeprefix(prefix)
        return ours


EAGLE = DraftSpec(
    family="eagle",
    layer="plain",
    reads="post_norm",
    joins="projection",
    concat=("embed", "hidden"),
    fc_bias=True,
    part_norms=False,
    input_norm=False,
    final_norm=False,
    feeds="post_norm",
    first_embed=True,
    own_head=False,
    layered=False,
    names=(("layer.", "layers.0."),),
)
"""EAGLE (Li et al., 2024, arXiv 2401.15077, section 3.1), as SGLang and the public checkpoints lay it out."""

EAGLE3 = DraftSpec(
    family="eagle3",
    layer="llama",
    reads="aux",
    joins="attention",
    concat=("embed", "hidden"),
    fc_bias=False,
    part_norms=True,
    input_norm=False,
    final_norm=True,
    feeds="pre_norm",
    first_embed=True,
    own_head=True,
    layered=False,
    names=(
        ("embed_norm.", "midlayer.input_layernorm."),
        ("hidden_norm.", "midlayer.hidden_norm."),
        ("layer.", "midlayer."),
    ),
)
"""EAGLE-3 (Li et al., 2025, arXiv 2503.01840, section 3), as SGLang and the public checkpoints lay it out."""

NEXTN = DraftSpec(
    family="nextn",
    layer="target",
    reads="post_norm",
    joins="projection",
    concat=("embed", "hidden"),
    fc_bias=False,
    part_norms=True,
    input_norm=True,
    final_norm=True,
    feeds="post_norm",
    first_embed=True,
    own_head=False,
    layered=True,
    names=(
        ("embed_norm.", "model.layers.0.enorm."),
        ("hidden_norm.", "model.layers.0.hnorm."),
        ("fc.", "model.layers.0.eh_proj."),
        ("norm.", "model.layers.0.shared_head.norm."),
        ("layer.", "model.layers.0."),
    ),
)
"""Multi-token prediction of DeepSeek-V3 (2024, arXiv 2412.19437, section 2.2), with the names of its checkpoints and
GLM-4.5's in a folder of its own: within a model's, the layer's number is that of the model's layers."""

MIMO = replace(
    NEXTN,
    family="mimo",
    concat=("hidden", "embed"),
    first_embed=False,
    names=(
        ("embed_norm.", "model.mtp_layers.0.token_layernorm."),
        ("hidden_norm.", "model.mtp_layers.0.hidden_layernorm."),
        ("fc.", "model.mtp_layers.0.input_proj."),
        ("norm.", "model.mtp_layers.0.final_layernorm."),
        ("layer.", "model.mtp_layers.0."),
    ),
)
"""The MTP layer of MiMo (2025, arXiv 2505.07608, section 2), whose decoder layer is Qwen2's."""

QWEN_MTP = replace(
    NEXTN,
    family="qwen_mtp",
    layered=False,
    names=(
        ("embed_norm.", "mtp.pre_fc_norm_embedding."),
        ("hidden_norm.", "mtp.pre_fc_norm_hidden."),
        ("fc.", "mtp.fc."),
        ("norm.", "mtp.norm."),
        ("layer.", "mtp.layers.0."),
    ),
)
"""The MTP layer of Qwen3-Next, and the same over a Qwen3-MoE layer. Norms are of the target's kind: Qwen3-Next's
multiply by one plus their weight."""

FAMILIES = {spec.family: spec for spec in (EAGLE, EAGLE3, NEXTN, MIMO, QWEN_MTP)}
