"""Folders that SGLang starts from, and the tensors it must then be sent.

Invariant: a draft's folder holds exactly the tensors of `tensors_of`, and the vocabulary where its family keeps it in
the same file, beside a configuration, and appears whole or not at all. What a server serves afterwards comes from
pushes: `served_tensors` for the draft.

Dimensions: `H` hidden size, `I` intermediate size of an expert, `E` experts, `V` the target's vocabulary, `Vd` the
draft's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES, DraftSpec

ARCHITECTURES = {
    ("eagle", "llama"): "LlamaForCausalLMEagle",
    ("eagle", "mistral"): "LlamaForCausalLMEagle",
    ("eagle", "qwen2"): "Qwen2ForCausalLMEagle",
    ("eagle3", "llama"): "LlamaForCausalLMEagle3",
    ("nextn", "deepseek_v3"): "DeepseekV3ForCausalLMNextN",
    ("nextn", "glm4_moe"): "Glm4MoeForCausalLMNextN",
    ("mimo", "qwen2"): "MiMoMTP",
    ("qwen_mtp", "qwen3_moe"): "Qwen3MoeForCausalLMMTP",
}
"""Family and model type of the draft's layer to the class in SGLang (0.5.17 to 0.5.23) that serves it.

SGLang runs Mistral as Llama. Its `MistralForCausalLMEagle` and `Ernie4_5_MoeForCausalLMMTP` are not here: they keep
norms that no family here has."""

TARGETS = {
    "eagle": ("glm4_moe", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
    "eagle3": ("glm4_moe", "gpt_oss", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
    "nextn": ("deepseek_v3", "glm4_moe"),
    "mimo": ("qwen2",),
    "qwen_mtp": ("qwen3_moe",),
}
"""Family to the model types whose classes in SGLang serve a target of it: they give away embedding and LM head, and for
EAGLE3 capture the outputs of the layers that are asked for, by numbers that mean what they do here. Qwen3-Next's do so
too, but take no push: loading their norms also fills buffers with these plus 1."""

TOKEN_MAP = "token_map.pt"
"""File in a draft's folder for `--speculative-token-map`; there only if the draft's vocabulary is reduced and its
family has no LM head of its own."""

HEAD = "lm_head.weight"
"""Name under which a reduced head is served; a full one is the target's own memory."""

ORIGIN = "miles_spec.json"
"""File in a draft's folder that says what target it is for, which tokens a reduced vocabulary has, and whether the
draft is still as `miles_spec.draft.fresh` leaves it."""


def export(head: DraftHead, folder: Path, *, dtype: torch.dtype, tokenizer: Any = None, fresh: bool = False) -> None:
    """Writes what `--speculative-draft-model-path` names: `config.json`, `model.safetensors`, `ORIGIN`, and maybe
    `TOKEN_MAP`.

    Tensors are cast to `dtype`, the one the server runs in. A folder that is there is replaced. `tokenizer` is the
    target's, which then is the only one that the draft loads for. A draft that is said to be `fresh` starts from least
    squares where it is trained first. Raises `ValueError` for a draft that SGLang has no class for.
    """
    config = draft_config(head, dtype)
    tensors = written_tensors(head, dtype)
    ids = head.vocab_ids
    if ids is not None and head.spec.own_head:
        tensors |= vocabulary_tensors(head)
    with replaced(folder) as partial:
        config.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / ORIGIN).write_text(json.dumps(origin(head, tokenizer, fresh)))
        if ids is not None and not head.spec.own_head:
            # the one file that is not safetensors or JSON: SGLang reads it with torch.load, as a list of integers
            torch.save(ids.tolist(), partial / TOKEN_MAP)


def tensors_of(head: DraftHead) -> dict[str, Tensor]:
    """Every tensor of `head` under its name in a checkpoint, detached: its own memory, each expert's for itself."""
    stored = head.state_dict()
    return dict(per_expert((theirs, stored[ours]) for ours, theirs in head.export_names.items()))


def written_tensors(head: DraftHead, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of `tensors_of(head)` as they are written: on the CPU, in `dtype`, a router's bias in float32."""
    router = torch.float32  # engines keep it so, whatever they serve in
    return {
        name: t.to("cpu", router if name.endswith("e_score_correction_bias") else dtype, copy=True).contiguous()
        for name, t in tensors_of(head).items()
    }


def vocabulary_tensors(head: DraftHead) -> dict[str, Tensor]:
    """`d2t` `[Vd]` int64, what is added to a draft's token id to make it the target's, and `t2d` `[V]` bool, which
    tokens the draft has."""
    ids = torch.arange(len(head.to_draft)) if head.vocab_ids is None else head.vocab_ids.cpu()
    return {"d2t": ids - torch.arange(len(ids)), "t2d": (head.to_draft >= 0).cpu()}


def per_expert(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Fused experts `experts.gate_up_proj` `[E, 2I, H]` and `experts.down_proj` `[E, H, I]` expert by expert, as
    checkpoints and engines name them, in views of their memory; all other tensors as they come."""
    for name, tensor in named:
        layer, _, last = name.rpartition(".")
        if not layer.endswith(".experts") or last not in ("gate_up_proj", "down_proj"):
            yield name, tensor
            continue
        for i, expert in enumerate(tensor):
            if last == "down_proj":
                yield f"{layer}.{i}.down_proj.weight", expert
            else:
                gate, up = expert.chunk(2)
                yield f"{layer}.{i}.gate_proj.weight", gate
                yield f"{layer}.{i}.up_proj.weight", up


def served_tensors(head: DraftHead, target_head_weight: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Everything a server needs to serve `head`, detached, each with its name.

    With a reduced vocabulary that includes the draft's rows `[Vd, H]` of the target's LM head `[V, H]`: SGLang copies
    them once when it starts, so they must travel with every push, or the draft proposes by an old head. Without one the
    target's is not asked for.
    """
    yield from tensors_of(head).items()
    if head.vocab_ids is not None and head.lm_head is None:
        assert target_head_weight is not None
        yield HEAD, head.head_rows(target_head_weight)


def served_target(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Everything a server needs to serve `model` as a target, detached, tied weights once."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    # a router's bias moves outside the gradient, so it is a buffer
    named |= {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return as_served(((name, tensor.detach()) for name, tensor in named.items()), model.config.model_type)


def as_served(tensors: Iterator[tuple[str, Tensor]], model_type: str) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors as engines take them, which is as checkpoints name them."""
    # others, such as GPT-OSS, lay their experts out in another way
    return per_expert(tensors) if model_type in SPLIT else tensors


SPLIT = ("deepseek_v3", "glm4_moe", "qwen3_moe", "qwen3_next")
"""Model types whose experts engines take one by one."""

UNSAID = {"deepseek_v3": {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}}
"""Model type to what SGLang reads in its configuration, as checkpoints have it, and transformers, which computes just
this, does not write by itself."""


def export_target(model: PreTrainedModel, tokenizer: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes what `--model-path` names together with `--load-format dummy`: configurations and tokenizer, no weights.

    `dtype` is the one the server runs in, whatever `model` is in. A folder that is there is replaced.
    """
    config = _served_config(model.config, [type(model).__name__], dtype)
    with replaced(folder) as partial:
        config.save_pretrained(partial)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def check_served(model_type: str, spec: DraftSpec, layers: int = 1) -> None:
    """Raises `ValueError` where SGLang cannot serve a draft of that family, with so many layers, for a target of that
    type.

    Read in 0.5.17 to 0.5.23: its `enable_multi_layer_eagle`, a layer for each depth, is for models that no family here
    is of (MiMo-V2, Step-3.5, Inkling; from 0.5.21 also GigaChat-3.5). Of the classes in `ARCHITECTURES`,
    DeepSeek's and GLM-4.5's fail if there is a second layer, and MiMo's loads each over the one before.
    """
    if FAMILIES.get(spec.family) != spec:
        raise ValueError(f"SGLang has no class that serves a draft of family {spec.family!r} as it is built here")
    if model_type not in TARGETS[spec.family]:
        raise ValueError(
            f"SGLang serves drafts of family {spec.family!r} for {', '.join(TARGETS[spec.family])} models, not for "
            f"{model_type}; set draft.enabled = false, or use the embedded engine"
        )
    if layers > 1:
        raise ValueError(
            f"SGLang serves drafts of family {spec.family!r} with one layer, and this one has a layer for each of "
            f"{layers} depths; use the embedded engine"
        )


def algorithm(spec: DraftSpec) -> Literal["EAGLE", "EAGLE3"]:
    """What `--speculative-algorithm` is for a draft of that family."""
    return "EAGLE3" if spec.reads == "aux" else "EAGLE"


def origin(head: DraftHead, tokenizer: Any = None, fresh: bool = False) -> dict[str, Any]:
    """What `ORIGIN` says of `head`."""
    ids = head.vocab_ids
    return {
        "family": head.spec.family,
        "fresh": fresh,
        "target": {
            "model_type": head.target_type,
            "hidden_size": head.config.hidden_size,
            "vocab_size": len(head.to_draft),
            "tokenizer": None if tokenizer is None else fingerprint(tokenizer),
        },
        "vocab_ids": None if ids is None or head.spec.own_head else ids.tolist(),
    }


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 in hexadecimal of the tokenizer's vocabulary: JSON of its tokens and ids, sorted."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def draft_config(head: DraftHead, dtype: torch.dtype) -> PretrainedConfig:
    """What SGLang builds the draft from. Raises `ValueError` as `check_served` does, but for several layers, which a
    folder can hold."""
    spec, kind = head.spec, head.config.model_type
    check_served(head.target_type, spec)
    # SGLang hands the draft the target's embedding and its head as two tensors; a tied draft has one place for both,
    # so it fails at start, or embeds with the rows of a reduced head
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    if spec.reads == "aux":
        read = {"eagle_aux_hidden_state_layer_ids": list(head.aux_layers), "use_aux_hidden_state": True}
        drafted = len(head.to_draft) if head.vocab_ids is None else len(head.vocab_ids)
        changes |= {"draft_vocab_size": drafted, "eagle_config": read, "norm_output": False}
    elif spec.input_norm:  # an MTP layer, of which SGLang asks how many there are
        changes["num_nextn_predict_layers"] = head.layers
    return _served_config(head.config, [ARCHITECTURES[spec.family, kind]], dtype, **changes)


def _served_config(
    config: PretrainedConfig, architectures: list[str], dtype: torch.dtype, **changes: object
) -> PretrainedConfig:
    """`config` as a server must read it: without traces of how its weights were once stored, or of our attention."""
    values = {**UNSAID.get(config.model_type, {}), **config.to_dict()}
    for trace in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype"):
        values.pop(trace, None)
    plain = str(dtype).removeprefix("torch.")
    return AutoConfig.for_model(**{**values, "architectures": architectures, "dtype": plain, **changes})


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `folder` at the end, in place of one that is there."""
    partial, old = (folder.with_name(f".{folder.name}.{what}{os.getpid()}") for what in ("new", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
