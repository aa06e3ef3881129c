"""Folders that SGLang starts from, and the tensors it must then be sent.

Invariant: a draft's folder holds exactly the tensors of `DraftHead.export_names` beside a configuration, and appears
whole or not at all. What a server serves afterwards comes from pushes: `served_tensors` for the draft.

Dimensions: `H` hidden size, `V` the target's vocabulary, `Vd` the draft's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, DraftSpec

ARCHITECTURES = {
    "llama": "LlamaForCausalLMEagle",
    "mistral": "LlamaForCausalLMEagle",
    "qwen2": "Qwen2ForCausalLMEagle",
}
"""The target's model type to the class in SGLang (0.5.17 to 0.5.21) that serves a draft of family `eagle` for it.

SGLang runs Mistral targets as Llama. Its `MistralForCausalLMEagle` and `Ernie4_5_MoeForCausalLMMTP` are not here: they
keep norms that this family does not have."""

TOKEN_MAP = "token_map.pt"
"""File in a draft's folder for `--speculative-token-map`; there only if the draft's vocabulary is reduced."""

HEAD = "lm_head.weight"
"""Name under which a reduced head is served; a full one is the target's own memory."""


def export(head: DraftHead, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes what `--speculative-draft-model-path` names: `config.json`, `model.safetensors`, and maybe `TOKEN_MAP`.

    Tensors are cast to `dtype`, the one the server runs in. A folder that is there is replaced. Raises `ValueError` for
    a draft that SGLang has no class for.
    """
    config = _draft_config(head, dtype)
    names = head.export_names
    tensors = {
        names[n]: p.detach().to(device="cpu", dtype=dtype, copy=True).contiguous() for n, p in head.named_parameters()
    }
    with _replaced(folder) as partial:
        config.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if head.vocab_ids is not None:
            # the one file that is not safetensors or JSON: SGLang reads it with torch.load, as a list of integers
            torch.save(head.vocab_ids.tolist(), partial / TOKEN_MAP)


def served_tensors(head: DraftHead, target_head_weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Everything a server needs to serve `head`, detached, each with its name.

    With a reduced vocabulary that includes the draft's rows `[Vd, H]` of the target's LM head `[V, H]`: SGLang copies
    them once when it starts, so they must travel with every push, or the draft proposes by an old head.
    """
    names = head.export_names
    for name, parameter in head.named_parameters():
        yield names[name], parameter.detach()
    if head.vocab_ids is not None:
        yield HEAD, head.head_rows(target_head_weight)


def export_target(model: PreTrainedModel, tokenizer: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes what `--model-path` names together with `--load-format dummy`: configurations and tokenizer, no weights.

    `dtype` is the one the server runs in, whatever `model` is in. A folder that is there is replaced.
    """
    config = _served_config(model.config, [type(model).__name__], dtype)
    with _replaced(folder) as partial:
        config.save_pretrained(partial)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def check_served(model_type: str, spec: DraftSpec) -> None:
    """Raises `ValueError` where SGLang has no class for a draft of that family for a target of that type."""
    if spec != EAGLE:
        raise ValueError(f"SGLang has no class that serves a draft of family {spec.family!r} as it is built here")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"SGLang has no class for an {spec.family} draft of a {model_type} model, only of "
            f"{', '.join(sorted(ARCHITECTURES))}; set draft.enabled = false, or use the embedded engine"
        )


def _draft_config(head: DraftHead, dtype: torch.dtype) -> PretrainedConfig:
    kind = head.config.model_type
    check_served(kind, head.spec)
    # SGLang hands the draft the target's embedding and its head as two tensors; a tied draft has one place for both,
    # so it fails at start, or embeds with the rows of a reduced head
    return _served_config(head.config, [ARCHITECTURES[kind]], dtype, tie_word_embeddings=False)


def _served_config(
    config: PretrainedConfig, architectures: list[str], dtype: torch.dtype, **changes: object
) -> PretrainedConfig:
    """`config` as a server must read it: without traces of how its weights were once stored, or of our attention."""
    values = config.to_dict()
    for trace in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype"):
        values.pop(trace, None)
    plain = str(dtype).removeprefix("torch.")
    return AutoConfig.for_model(**{**values, "architectures": architectures, "dtype": plain, **changes})


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
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
