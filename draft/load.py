"""Reads drafts from folders, whoever wrote them.

Invariant: a draft comes back whole, every tensor in its place, or not at all with a sentence that names what does not
fit; what is written again in the same dtype is the same bit for bit.

Dimensions: `H` hidden size, `V` the target's vocabulary, `Vd` the draft's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from miles_spec.draft.export import HEAD, TOKEN_MAP, algorithm, fingerprint, tensors_of
from miles_spec.draft.formats import Found, Stored, find, silent_aux_layers
from miles_spec.draft.modules import DraftHead

log = logging.getLogger(__name__)


def load(folder: Path, model: PreTrainedModel, *, tokenizer: Any = None) -> DraftHead:
    """The draft in `folder` for target `model`, in float32 on the CPU.

    `folder` is one that `export` wrote, an EAGLE, EAGLE3 or MTP folder as SGLang serves it, a checkpoint of SpecForge
    or speculators, or a Hugging Face model folder with an MTP layer inside. With `tokenizer`, the target's, a draft
    that was written for another one is refused. Raises `ValueError` naming the file, field or tensor that does not fit.
    """
    found = find(folder)
    try:
        return _load(found, model, tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _load(found: Found, model: PreTrainedModel, tokenizer: Any) -> DraftHead:
    config: Any = model.config
    _check_target(found, config, tokenizer)
    spec, ids = found.spec, _vocabulary(found)
    aux: tuple[int, ...] = ()
    if spec.reads == "aux":
        aux = silent_aux_layers(config.num_hidden_layers) if found.aux_layers is None else found.aux_layers
    own = config if found.format == "model" else found.layer
    head = DraftHead(spec, config, ids, aux, layer_config=own, layers=found.layers)
    head.fresh = found.origin is not None and found.origin.get("fresh") is True
    places, stored = tensors_of(head), dict(found.tensors)
    if found.target_head and HEAD not in stored:
        with torch.no_grad():
            places.pop(HEAD).copy_(model.get_output_embeddings().weight)
        log.info("%s: no %s of its own; the draft starts with the target's", found.folder, HEAD)
    if "fc.bias" in places and "fc.bias" not in stored and not found.fc_bias:
        places.pop("fc.bias").zero_()
        log.warning("%s: fc has no bias, and engines add one, so it is zero", found.folder)
    _check_tensors(places, stored)
    for name, place in places.items():
        tensor = stored[name].read()
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {stored[name].name!r} holds numbers that are not finite")
        place.copy_(tensor)
    return head


def _check_target(found: Found, config: Any, tokenizer: Any) -> None:
    for what, theirs, wanted in (
        ("hidden size", found.hidden_size, config.hidden_size),
        ("vocabulary", found.vocab_size, config.vocab_size),
    ):
        if theirs != wanted:
            raise ValueError(f"this draft is for a target of {what} {theirs}, and the target's is {wanted}")
    if found.format == "model" and found.layer.num_hidden_layers != config.num_hidden_layers:
        raise ValueError(
            f"the model there has {found.layer.num_hidden_layers} layers, and the target {config.num_hidden_layers}"
        )
    if found.spec.layer == "target" and found.layer.model_type != config.model_type:
        raise ValueError(
            f"this {found.spec.family} draft has a layer of {found.layer.model_type}, and the target is a "
            f"{config.model_type} model"
        )
    for_whom = {} if found.origin is None else found.origin.get("target", {})
    if (kind := for_whom.get("model_type", config.model_type)) != config.model_type:
        raise ValueError(f"this draft is for a {kind} model, and the target is a {config.model_type} model")
    known = for_whom.get("tokenizer")
    if known is not None and tokenizer is not None and (given := fingerprint(tokenizer)) != known:
        raise ValueError(
            f"this draft is for a tokenizer whose vocabulary has the SHA-256 {known[:12]}.., and the target's has "
            f"{given[:12]}..: the same token ids stand for other text"
        )


def _vocabulary(found: Found) -> Tensor | None:
    """`[Vd]` int64 ascending, or None for the whole."""
    size = found.vocab_size
    if not found.spec.own_head:
        ids = None if found.origin is None else found.origin.get("vocab_ids")
        return None if ids is None else torch.tensor(ids, dtype=torch.int64)
    drafted = size if found.drafted is None else found.drafted
    if found.d2t is None:
        if drafted != size:
            raise ValueError(f"draft_vocab_size is {drafted} of {size}, and tensor 'd2t' is missing")
        return None
    if found.d2t.shape != (drafted,) or found.d2t.dtype not in ("I64", "I32"):
        raise ValueError(f"tensor 'd2t' is {_described(found.d2t)}, and draft_vocab_size is {drafted}: I64[{drafted}]")
    ids = found.d2t.read().long() + torch.arange(drafted)
    if ids.min() < 0 or ids.max() >= size or (ids.diff() <= 0).any():
        raise ValueError(f"tensor 'd2t' makes token ids that are not ascending within 0..{size - 1}")
    if found.t2d is not None:
        if found.t2d.shape != (size,):
            raise ValueError(f"tensor 't2d' is {_described(found.t2d)}, and the vocabulary {size}")
        if not torch.equal(found.t2d.read().bool().nonzero()[:, 0], ids):
            raise ValueError("tensors 'd2t' and 't2d' name different tokens")
    return None if drafted == size else ids


def _check_tensors(places: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    for name, place in places.items():
        if name not in stored:
            count = len(places.keys() - stored.keys())
            raise ValueError(f"tensor {name!r} is missing" + (f", and {count - 1} others" if count > 1 else ""))
        if stored[name].shape != tuple(place.shape):
            raise ValueError(f"tensor {stored[name].name!r} is {_described(stored[name])}, not {list(place.shape)}")
    if extra := sorted(stored[name].name for name in stored.keys() - places.keys()):
        raise ValueError(f"tensor {extra[0]!r} has no place in such a draft")


def _described(stored: Stored) -> str:
    return f"{stored.dtype}{list(stored.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `inspect` says of a folder."""

    family: str
    format: str
    """`sglang`, `specforge`, `speculators` or `model`."""
    architectures: tuple[str, ...]
    layers: int
    """How many depths have a layer of their own."""
    hidden: int
    intermediate: int
    """Of each expert where its layer has them."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    draft_vocab: int
    aux_layers: tuple[int, ...]
    """Layers of the target, counted from 0; empty if it reads none, or names none."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """By their names in the folder, those taken from the target aside."""
    parameters: int
    shared: tuple[str, ...]
    """What it takes from its target."""
    algorithm: str
    """What SGLang calls it, once exported."""
    arguments: tuple[str, ...]
    """What SGLang is told beside its depth; empty for a draft that it does not serve."""


def inspect(folder: Path) -> Inspection:
    """What lies in `folder`, by its headers alone. Raises `ValueError` as `load` does for what shows there."""
    found = find(folder)
    layer: Any = found.layer
    origin = found.origin or {}
    reduced = origin.get("vocab_ids")
    drafted = len(reduced) if reduced else found.drafted or found.vocab_size
    told = ["--speculative-algorithm", algorithm(found.spec), "--speculative-draft-model-path", str(folder)]
    if reduced and not found.spec.own_head:
        told += ["--speculative-token-map", str(folder / TOKEN_MAP)]
    if found.layers > 1:
        told = []
    own_head = found.spec.own_head and not found.target_head
    return Inspection(
        family=found.spec.family,
        format=found.format,
        architectures=found.architectures,
        layers=found.layers,
        hidden=found.hidden_size,
        intermediate=_intermediate(layer, found),
        heads=layer.num_attention_heads,
        kv_heads=layer.num_key_value_heads,
        head_dim=getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
        vocab=found.vocab_size,
        draft_vocab=drafted,
        aux_layers=found.aux_layers or (),
        tensors={t.name: (t.dtype, t.shape) for t in found.tensors.values()},
        parameters=sum(torch.Size(t.shape).numel() for t in found.tensors.values()),
        shared=("embedding",) if own_head else ("embedding", "LM head"),
        algorithm=algorithm(found.spec),
        arguments=tuple(told),
    )


def _intermediate(layer: PretrainedConfig, found: Found) -> int:
    experts = any(".experts." in name for name in found.tensors)
    size: int = getattr(layer, "moe_intermediate_size" if experts else "intermediate_size")
    return size
