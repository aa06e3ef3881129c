"""How draft checkpoints lie in folders: SGLang's layout, SpecForge's, speculators', and MTP layers inside a model.

`find` reads a folder's configuration and the headers of its tensors, no weights, and gives every tensor the name that
SGLang serves it under. `to_specforge` and `to_speculators` write the other two.

Invariant: what a configuration says that no family here computes is refused by name; no field that matters is passed
over.

Dimensions: `H` hidden size, `V` the target's vocabulary, `Vd` the draft's, `N` layers of the target.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from miles_spec.draft.export import ARCHITECTURES, ORIGIN, draft_config, replaced, vocabulary_tensors, written_tensors
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3, FAMILIES, MIMO, NEXTN, QWEN_MTP, DraftSpec

FLOATS = ("BF16", "F16", "F32", "F64")
"""Dtypes of weights, as safetensors names them; all others are quantised."""

DRAFTS = {architecture: FAMILIES[family] for (family, _), architecture in ARCHITECTURES.items()}
"""SGLang's class of a draft to its family."""

MODELS = {
    "DeepseekV3ForCausalLM": (NEXTN, "model.layers.{layer}."),
    "Glm4MoeForCausalLM": (NEXTN, "model.layers.{layer}."),
    "MiMoForCausalLM": (MIMO, "model.mtp_layers.{at}."),
    "Qwen2ForCausalLM": (MIMO, "model.mtp_layers.{at}."),
    "Qwen3MoeForCausalLM": (QWEN_MTP, "mtp."),
    "Qwen3NextForCausalLM": (QWEN_MTP, "mtp."),
}
"""Class of a model to the family of the MTP layers that lie in its checkpoints, and to the prefix of the tensors of
each: `at` counts MTP layers from 0, `layer` goes on from the model's."""

INSIDE = {NEXTN.family: "model.layers.{at}.", MIMO.family: "model.mtp_layers.{at}.", QWEN_MTP.family: "mtp."}
"""Family to the prefix of its tensors in a folder of their own."""

SPECULATORS = {"eagle": EAGLE, "eagle3": EAGLE3}
"""What speculators calls a draft to its family."""

_SPECULATORS_EAGLE = (("fusion_fc.", "fc."), ("transformer.", "layers.0."))
_SHARED = ("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")
_DERIVED = ("rotary_emb.inv_freq", "position_ids")
_NOT_THE_LAYERS = (
    "architectures",
    "auto_map",
    "bias",
    "draft_vocab_size",
    "dtype",
    "eagle_config",
    "hot_vocab_size",
    "norm_output",
    "num_nextn_predict_layers",
    "target_hidden_size",
    "torch_dtype",
    "transformers_version",
)
_REFUSED = {
    "norm_before_residual": "its residual starts behind a norm",
    "norm_before_fc": "its states have a norm before fc",
    "fc_norm": "its states have norms before fc",
    "use_aux_norm": "its states have norms before fc",
    "norm_output": "what it feeds on, or was trained to feed on, has been through its last norm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a safetensors file."""

    file: Path
    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """It itself, on the CPU."""
        with safe_open(self.file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name)
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A draft as it lies in a folder."""

    folder: Path
    format: str
    """`sglang`, `specforge`, `speculators` or `model`."""
    spec: DraftSpec
    architectures: tuple[str, ...]
    layer: PretrainedConfig
    """Of its decoder layer; for MTP layers inside a model, the model's."""
    layers: int
    """How many depths have a layer of their own."""
    hidden_size: int
    vocab_size: int
    drafted: int | None
    """`Vd` as the configuration has it; None where it is silent."""
    aux_layers: tuple[int, ...] | None
    """Layers of the target, counted from 0, whose outputs it reads; None: `silent_aux_layers` of `N`."""
    tensors: Mapping[str, Stored]
    """By the name that SGLang serves them under."""
    shared: Mapping[str, Stored]
    """Copies of what a draft takes from its target: embedding and LM head."""
    d2t: Stored | None = None
    t2d: Stored | None = None
    fc_bias: bool = True
    """False if its configuration says that `fc` has none."""
    target_head: bool = False
    """Whether its configuration says that it has the target's LM head, of a family that has its own."""
    origin: Mapping[str, Any] | None = None
    """What `ORIGIN` says."""


def silent_aux_layers(layers: int) -> tuple[int, ...]:
    """What a checkpoint that names no layers reads of a target of `layers`: all public ones have these."""
    return (1, layers // 2 - 1, layers - 4)


def find(folder: Path) -> Found:
    """What lies in `folder`. Raises `ValueError` naming the file, field or tensor that cannot be right or be run."""
    try:
        values = _json(folder / "config.json")
        stored = _stored(folder)
        if "speculators_model_type" in values or "speculators_config" in values:
            return _speculators(folder, values, stored)
        architecture = (values.get("architectures") or [None])[0]
        if architecture in DRAFTS:
            return _draft(folder, values, stored, DRAFTS[architecture])
        if architecture == "LlamaForCausalLM" and "fc.weight" in stored:  # as EAGLE's authors write them
            three = any("midlayer." in name for name in stored)
            return _draft(folder, values, stored, EAGLE3 if three else EAGLE)
        if architecture in MODELS:
            return _inside(folder, values, stored, *MODELS[architecture])
        raise ValueError(
            f"no draft of architecture {architecture!r} is known; known are {', '.join(sorted(DRAFTS))}, speculators' "
            f"{' and '.join(SPECULATORS)}, and MTP layers inside {', '.join(sorted(MODELS))}"
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _draft(folder: Path, values: dict[str, Any], stored: dict[str, Stored], spec: DraftSpec) -> Found:
    """A folder as SGLang serves it, by us or by others."""
    origin = _json(folder / ORIGIN) if (folder / ORIGIN).exists() else None
    rename: Callable[[str], str] = _midlayer if spec.own_head else _same
    eagle = values.get("eagle_config") or {}
    ids = eagle.get("eagle_aux_hidden_state_layer_ids")
    if spec.reads == "aux":
        _refuse(values)
        _refuse(eagle)
        if eagle.get("use_aux_hidden_state") is False:
            raise ValueError(
                "eagle_config.use_aux_hidden_state is false: it reads one state, not those of three layers"
            )
        if values.get("bias"):
            raise ValueError("bias is true: an fc with a bias is not known of this family")
    return _found(
        folder,
        "specforge" if spec is EAGLE3 and origin is None else "sglang",
        spec,
        values,
        {rename(name): tensor for name, tensor in stored.items()},
        aux_layers=None if ids is None else tuple(sorted(ids)),
        fc_bias=values.get("bias") is not False,
        origin=origin,
    )


def _speculators(folder: Path, values: dict[str, Any], stored: dict[str, Stored]) -> Found:
    kind = values.get("speculators_model_type")
    if kind not in SPECULATORS:
        raise ValueError(f"speculators_model_type is {kind!r}, and only {' and '.join(SPECULATORS)} are known")
    spec, layer = SPECULATORS[kind], values.get("transformer_layer_config")
    if not isinstance(layer, dict):
        raise ValueError("config.json has no transformer_layer_config")
    if spec is EAGLE3:
        if "norm_before_residual" not in values:
            raise ValueError("config.json does not say norm_before_residual, which readers take differently")
        _refuse(values)
        rename: Callable[[str], str] = _midlayer
    else:
        if values.get("layernorms"):
            raise ValueError("layernorms is true: it has norms that no family here has")
        if (kind_of_layer := values.get("transformer_layer_architecture", "LlamaDecoderLayer")) != "LlamaDecoderLayer":
            raise ValueError(
                f"transformer_layer_architecture is {kind_of_layer!r}, and only LlamaDecoderLayer is known"
            )

        def rename(name: str) -> str:
            for theirs, ours in _SPECULATORS_EAGLE:
                if name.startswith(theirs):
                    return ours + name.removeprefix(theirs)
            return name

    ids = values.get("eagle_aux_hidden_state_layer_ids")
    silent = LlamaConfig()  # what is a default is not written
    defaults = {"model_type": "llama", "hidden_size": silent.hidden_size, "vocab_size": silent.vocab_size}
    more: dict[str, Any] = {
        n: values[n] for n in ("draft_vocab_size", "target_hidden_size", "quantization_config") if n in values
    }
    return _found(
        folder,
        "speculators",
        spec,
        {**defaults, **layer, "architectures": values.get("architectures"), **more},
        {rename(name): tensor for name, tensor in stored.items()},
        # theirs number states, the embedding's first; layers are one less
        aux_layers=None if ids is None else tuple(sorted(i - 1 for i in ids)),
        fc_bias=bool(values.get("fusion_bias", spec is EAGLE and "fc.bias" in {rename(n) for n in stored})),
    )


def _inside(folder: Path, values: dict[str, Any], stored: dict[str, Stored], spec: DraftSpec, prefix: str) -> Found:
    """The MTP layers in a model's own folder."""
    layers = int(values.get("num_hidden_layers", 0))
    count = _count(values, spec) if spec.layered else 1
    own: dict[str, Stored] = {}
    for at in range(count):
        theirs, ours = (x.format(at=at, layer=layers + at) for x in (prefix, INSIDE[spec.family]))
        own |= {ours + n.removeprefix(theirs): t for n, t in stored.items() if n.startswith(theirs)}
    if not own:
        first = prefix.format(at=0, layer=layers)
        raise ValueError(f"no tensor is called {first}*: this {values['architectures'][0]} has no MTP layer inside")
    for name in sorted(stored):
        numbered = re.match(r"(model\.layers|model\.mtp_layers|mtp\.layers)\.(\d+)\.", name)
        if numbered and (at := int(numbered[2]) - (layers if numbered[1] == "model.layers" else 0)) >= count:
            many = f"num_nextn_predict_layers is {count}" if spec.layered else "drafts of one are known"
            raise ValueError(f"{name!r} is of MTP layer {at + 1}, and {many}")
    values = {**values, "num_nextn_predict_layers": count}
    if values.get("model_type") == "mimo":  # which transformers does not know, and whose layers are Qwen2's
        values["model_type"] = "qwen2"
    return _found(folder, "model", spec, values, own, layers=layers)


def _found(
    folder: Path,
    form: str,
    spec: DraftSpec,
    values: dict[str, Any],
    named: dict[str, Stored],
    *,
    aux_layers: tuple[int, ...] | None = None,
    fc_bias: bool = True,
    origin: Mapping[str, Any] | None = None,
    layers: int = 1,
) -> Found:
    if values.get("quantization_config"):
        raise ValueError("quantization_config is set: quantised drafts are not read")
    if (there := values.get("num_hidden_layers", 1)) != layers:
        raise ValueError(f"num_hidden_layers is {there}: drafts of one layer are known")
    count = _count(values, spec)
    layer = _layer(values, spec)
    if spec.layer != "target" and (spec.family, layer.model_type) not in ARCHITECTURES:
        raise ValueError(f"model_type is {layer.model_type!r}: no {spec.family} draft has such a layer")
    size = values.get("target_hidden_size") or layer.hidden_size
    if size != layer.hidden_size:
        raise ValueError(
            f"target_hidden_size is {size} and hidden_size {layer.hidden_size}: drafts of their target's size are known"
        )
    tensors, shared, vocabulary = {}, {}, {}
    for name, tensor in named.items():
        if name in ("d2t", "t2d") and spec.own_head:
            vocabulary[name] = tensor
        elif name.endswith(_DERIVED):
            continue
        elif name.endswith(_SHARED) and not (name == "lm_head.weight" and spec.own_head):
            shared[name] = tensor
        elif tensor.dtype not in FLOATS:
            raise ValueError(f"tensor {tensor.name!r} is of dtype {tensor.dtype}: quantised drafts are not read")
        else:
            tensors[name] = tensor
    drafted = values.get("draft_vocab_size") if spec.own_head else None
    for tensor in shared.values():
        if tensor.shape != (layer.vocab_size, layer.hidden_size):
            raise ValueError(
                f"tensor {tensor.name!r} is {list(tensor.shape)}; a draft takes it from its target, where it is "
                f"{[layer.vocab_size, layer.hidden_size]}, and one of another shape would be lost"
            )
    return Found(
        folder=folder,
        format=form,
        spec=spec,
        architectures=tuple(values.get("architectures") or ()),
        layer=layer,
        layers=count,
        hidden_size=layer.hidden_size,
        vocab_size=layer.vocab_size,
        drafted=drafted,
        aux_layers=aux_layers,
        tensors=tensors,
        shared=shared,
        d2t=vocabulary.get("d2t"),
        t2d=vocabulary.get("t2d"),
        fc_bias=fc_bias,
        target_head=spec.own_head and "draft_vocab_size" in values and drafted is None,
        origin=origin,
    )


def _count(values: Mapping[str, Any], spec: DraftSpec) -> int:
    """How many layers a draft has; one where the configuration is silent."""
    count = values.get("num_nextn_predict_layers") or 1
    if type(count) is not int or count < 1 or (count > 1 and not spec.layered):
        known = "a number from 1 on is" if spec.layered else "drafts of one are"
        raise ValueError(f"num_nextn_predict_layers is {count}: {known} known")
    return count


def _layer(values: Mapping[str, Any], spec: DraftSpec) -> PretrainedConfig:
    kept = {name: value for name, value in values.items() if name not in _NOT_THE_LAYERS}
    if spec.own_head:  # whose readers pass over it
        kept |= {"attention_bias": False, "mlp_bias": False}
    for name in ("model_type", "hidden_size", "vocab_size"):
        if name not in kept:
            raise ValueError(f"config.json does not say {name}")
    try:
        return AutoConfig.for_model(**kept)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"config.json cannot be read: {' '.join(str(error).split())[:200]}") from None


def _refuse(values: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if values.get(name):
            raise ValueError(f"{name} is {json.dumps(values[name])}: {why}, which no family here does")
    if (count := values.get("num_aux_hidden_states") or 3) != 3:
        raise ValueError(f"num_aux_hidden_states is {count}: drafts that read three states are known")


def _same(name: str) -> str:
    return name


def _midlayer(name: str) -> str:
    """The two ways in which EAGLE3's layer is called, with or without `model.`, as one."""
    name = name.removeprefix("model.")
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor in the folder: of the files of its index if there is one, and of a loose `mtp.safetensors`."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted: Mapping[str, str] = _json(index).get("weight_map", {})
        files = sorted({folder / name for name in wanted.values()} | set(folder.glob("mtp.safetensors")))
    else:
        wanted, files = {}, sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        more = f"; {pickled[0]} is a pickle, which is not read: convert it" if pickled else ""
        raise ValueError(f"there is no safetensors file{more}")
    stored: dict[str, Stored] = {}
    for file in files:
        for tensor in _header(file):
            if tensor.name in stored:
                raise ValueError(f"tensor {tensor.name!r} is both in {stored[tensor.name].file.name} and {file.name}")
            stored[tensor.name] = tensor
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ValueError(f"tensor {missing[0]!r} of {index.name} is in no file")
    return stored


def _header(file: Path) -> list[Stored]:
    try:
        with safe_open(file, "pt") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118  # not a mapping
            return [
                Stored(file=file, name=name, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
                for name, part in slices
            ]
    except FileNotFoundError:
        raise ValueError(f"there is no {file.name}, which the index names") from None
    except SafetensorError as error:
        raise ValueError(f"{file.name} is truncated or no safetensors file: {error}") from None


def to_specforge(head: DraftHead, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes `head` as SpecForge does, with `d2t` and `t2d` whether its vocabulary is reduced or not. A folder that is
    there is replaced. Raises `ValueError` for a family that SpecForge does not have."""
    if head.spec != EAGLE3:
        raise ValueError(f"SpecForge has drafts of the family eagle3, not {head.spec.family}")
    tensors = {**written_tensors(head, dtype), **vocabulary_tensors(head)}
    with replaced(folder) as partial:
        draft_config(head, dtype).save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})


def to_speculators(head: DraftHead, folder: Path, *, dtype: torch.dtype, verifier: PreTrainedModel) -> None:
    """Writes `head`, a draft of `verifier`, as speculators does. A folder that is there is replaced. Raises
    `ValueError` for a family that speculators does not have."""
    kinds = [kind for kind, spec in SPECULATORS.items() if spec == head.spec]
    if not kinds or head.config.model_type != "llama" or (head.spec == EAGLE and head.vocab_ids is not None):
        raise ValueError(
            f"speculators has drafts of the families {' and '.join(SPECULATORS)} with a Llama's layer, eagle over the "
            f"full vocabulary, and this one is of {head.spec.family} with a {head.config.model_type}'s"
        )
    layer = draft_config(head, dtype).to_dict()
    for name in _NOT_THE_LAYERS:
        layer.pop(name, None)
    tensors = written_tensors(head, dtype)
    config: dict[str, Any] = {
        "speculators_model_type": kinds[0],
        "transformer_layer_config": layer,
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": kinds[0],
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {
                "name_or_path": verifier.config.name_or_path or None,
                "architectures": [type(verifier).__name__],
            },
        },
    }
    if head.spec == EAGLE3:
        config |= {
            "architectures": ["Eagle3Speculator"],
            "draft_vocab_size": len(head.to_draft) if head.vocab_ids is None else len(head.vocab_ids),
            "norm_before_residual": False,
            "norm_before_fc": False,
            "fc_norm": False,
            "norm_output": False,
            "target_hidden_size": None,
            # theirs number states, the embedding's first
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in head.aux_layers],
        }
        tensors = {re.sub(r"^midlayer\.", "layers.0.", name): tensor for name, tensor in tensors.items()}
        if head.vocab_ids is not None:
            tensors |= vocabulary_tensors(head)
    else:
        config |= {
            "architectures": ["EagleSpeculator"],
            "transformer_layer_architecture": "LlamaDecoderLayer",
            "layernorms": False,
            "fusion_bias": True,
        }
        for theirs, ours in _SPECULATORS_EAGLE:
            tensors = {re.sub(f"^{re.escape(ours)}", theirs, name): tensor for name, tensor in tensors.items()}
    with replaced(folder) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
