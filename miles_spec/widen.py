"""Makes a model dearer without changing what it computes, so that a small one costs what a large one does.

On a large GPU a small model is bound by kernel launches, not by work, and timings made with it say little. A widened
model has a large one's cost and still writes real text.

Invariant: what is added ends in zeros, so logits change by rounding alone. Columns of an MLP are added with zeros on
both sides of their product, so their gradients are 0 too: a widened model trains as the small one does.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MULTIPLE = 256
"""`mlp_width` is a multiple of this, as fast matrix products like it."""


def widen(model: PreTrainedModel, intermediate_size: int) -> PreTrainedModel:
    """A copy of `model` with `intermediate_size` columns in each MLP.

    New rows of the gate projection are normal with the standard deviation of the old ones; those of the up projection
    and new columns of the down projection are 0. Runs on the model's device; the same values each time. Raises
    `ValueError` for a size below the model's own and for layers that are built otherwise.
    """
    _check(model, list(getattr(model.base_model, "layers", ())))
    own = model.config.intermediate_size
    if intermediate_size < own:
        raise ValueError(
            f"intermediate_size is {intermediate_size}, but the model has {own}; a model can only be made larger"
        )
    wide = copy.deepcopy(model)
    wide.config.intermediate_size = intermediate_size
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for layer in wide.base_model.layers:
            _widen_mlp(layer.mlp, intermediate_size - own, generator)
    return wide


def widen_to(model: PreTrainedModel, parameters: float) -> PreTrainedModel:
    """A copy of `model` with about `parameters` parameters (tied ones once), its MLPs widened; see `widen`.

    Raises `ValueError` as `mlp_width` and `widen` do.
    """
    return widen(model, mlp_width(model, parameters))


def mlp_width(model: PreTrainedModel, parameters: float) -> int:
    """The multiple of `MULTIPLE` that brings `model` nearest to `parameters` parameters, or its own width.

    Reads shapes only, so `model` may be on the device `meta`. Raises `ValueError` if the model has more parameters.
    """
    layers = list(getattr(model.base_model, "layers", ()))
    _check(model, layers)
    own = model.num_parameters()
    if parameters < own:
        raise ValueError(f"the model cannot be widened to {parameters:.4g} parameters: it has {own} already")
    mlps = [layer.mlp for layer in layers]
    column = sum(m.gate_proj.in_features + m.up_proj.in_features + m.down_proj.out_features for m in mlps)
    column += sum(p.bias is not None for m in mlps for p in (m.gate_proj, m.up_proj))
    width: int = model.config.intermediate_size
    return max(MULTIPLE * round((width + (parameters - own) / column) / MULTIPLE), width)


def _check(model: PreTrainedModel, layers: list[Any]) -> None:
    """Raises `ValueError` in one sentence for layers that `widen` does not know."""
    kind = model.config.model_type
    linear = [("self_attn", "o_proj"), ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj")]
    for layer in layers:
        for block, projection in linear:
            if not isinstance(getattr(getattr(layer, block, None), projection, None), nn.Linear):
                raise ValueError(
                    f"{model.config.model_type}: a layer has no linear {block}.{projection}, cannot widen it"
                )
    if not layers:
        raise ValueError(f"{kind}: it has no list of decoder layers, so this model cannot be widened")


def _widen_mlp(mlp: Any, columns: int, generator: torch.Generator) -> None:
    """Adds `columns` to the inner size of `mlp`, in place, with no effect on its output."""
    for projection in (mlp.gate_proj, mlp.up_proj):
        weight = projection.weight
        fresh = weight.new_zeros(columns, projection.in_features)
        if projection is mlp.gate_proj:
            fresh.normal_(std=weight.std().item(), generator=generator)
        projection.weight = _grown(weight, fresh, 0)
        if projection.bias is not None:
            projection.bias = _grown(projection.bias, projection.bias.new_zeros(columns), 0)
        projection.out_features += columns
    down = mlp.down_proj
    down.weight = _grown(down.weight, down.weight.new_zeros(down.out_features, columns), 1)
    down.in_features += columns
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = down.in_features


def _grown(old: nn.Parameter, more: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.cat([old, more], dim), requires_grad=old.requires_grad)
