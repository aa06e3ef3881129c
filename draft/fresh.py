"""What a draft starts as when there is no checkpoint: the target's own weights where they fit.

Invariant: the same for the same generator state.

- The decoder layer is a copy of the target's last one where shapes allow, with its output projections scaled by 0.01.
  Unscaled, its outputs are sized for the residual stream before the final norm, and start the draft far from the
  target.
- Joining by projection, `fc` mixes 0.7 of the embedding, brought to unit RMS, and 0.3 of the hidden state. So the draft
  starts as a smooth function of the newest token and the target's state, with the target's features at hand.
- Joining in the attention, `fc` is the mean of the target's states, which the copied projections read; the embedding
  starts at what noise lets through. That is far from the target: `LinearFit` is the start that such a draft should
  have.
- The norm before the LM head is the target's final norm, or a constant of its size over states that have been through
  that; those of token and state are 1, but where the copied projections read the state. An LM head of its own is the
  target's.
- A matrix with nothing to copy from is normal noise, of 0.02, a bias 0; and noise of 0.002 lies over `fc`.

Dimensions: `H` hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from miles_spec.draft.modules import DraftHead

NOISE, FRESH, QUIET = 0.002, 0.02, 0.01


@torch.no_grad()
def fill(head: DraftHead, target_model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fills `head`, on the CPU, for `target_model`."""
    spec, trunk = head.spec, target_model.get_decoder()

    def noise(like: Tensor, size: float) -> Tensor:
        return size * torch.randn(like.shape, generator=generator)

    last = trunk.layers[-1]
    theirs = last.state_dict()
    for layer, name, own in ((part.layer, *named) for part in head.parts for named in part.layer.state_dict().items()):
        weight = theirs.get(name)
        if own.dim() == 1 and "norm" in name:
            module = name.removesuffix(".weight")
            fits = weight is not None and weight.shape == own.shape
            factor = norm_factor(last.get_submodule(module)) if fits else torch.ones(len(own))
            set_norm(layer.get_submodule(module), factor)
        elif weight is not None and weight.shape == own.shape:
            own.copy_(weight)
        elif weight is not None and own.dim() == 2 and own.shape == (weight.shape[0], 2 * weight.shape[1]):
            halves = {"embed": noise(weight, NOISE), "hidden": weight.cpu()}
            own.copy_(torch.cat([halves[part] for part in spec.concat], dim=1))
        else:
            own.copy_(noise(own, FRESH) if own.dim() > 1 else torch.zeros(len(own)))
        if name.endswith(OUTPUTS):
            own.mul_(QUIET)
    _fill_norms(head, trunk)
    mix = _mix(head, target_model)
    for part in head.parts:
        part.fc.weight.copy_(mix + noise(mix, NOISE))
        if spec.fc_bias:
            part.fc.bias.zero_()
    if head.lm_head is not None:
        head.lm_head.weight.copy_(head.target_rows(target_model.get_output_embeddings().weight.cpu()))


OUTPUTS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "experts.down_proj")
"""Ends of the names of projections into the residual stream."""


def _fill_norms(head: DraftHead, trunk: Any) -> None:
    spec = head.spec
    if spec.part_norms:
        for norm in (norm for part in head.parts for norm in (part.embed_norm, part.hidden_norm)):
            set_norm(norm, torch.ones(head.config.hidden_size))
    before = getattr(trunk.layers[-1], "input_layernorm", None)  # few targets have none
    if spec.joins == "attention" and before is not None:
        # what the copied projections of the hidden state were made for
        set_norm(head.hidden_norm, norm_factor(before))
    if spec.final_norm:
        factor = norm_factor(trunk.norm)
        if spec.reads == "post_norm":
            # those states have been through it: as large as it makes them is all that is wanted
            factor = factor.square().mean().sqrt().expand_as(factor)
        for part in head.parts:
            set_norm(part.norm, factor)


def norm_factor(norm: Any) -> Tensor:
    """What an RMS norm multiplies by, `[n]` float64 on the CPU."""
    return norm.weight.double().cpu() + _offset(norm)


def set_norm(norm: Any, factor: Tensor) -> None:
    """Makes `norm` multiply by `factor`."""
    norm.weight.copy_(factor - _offset(norm))


def _offset(norm: Any) -> float:
    """1 for a kind of norm that multiplies by one plus its weight, else 0."""
    weight = torch.zeros_like(norm.weight)
    return float(functional_call(norm, {"weight": weight}, torch.ones_like(weight)[None]).any())


def _mix(head: DraftHead, target_model: PreTrainedModel) -> Tensor:
    """`fc`'s weights without noise."""
    eye = torch.eye(head.config.hidden_size)
    if head.spec.joins == "attention":
        return torch.cat([eye / len(head.aux_layers)] * len(head.aux_layers), dim=1)
    embed = target_model.get_input_embeddings().weight.detach().float()
    # a norm of its own brings it to unit RMS
    embed_rms = 1.0 if head.spec.part_norms else float(embed.square().mean().sqrt())
    halves = {"embed": 0.7 / embed_rms * eye, "hidden": 0.3 * eye}
    return torch.cat([halves[name] for name in head.spec.concat], dim=1)
