"""Fixtures shared by all tests: tiny models of every supported family, built in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # read when a kernel is defined, so before any module of ours is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")  # as in SGLang's processes
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from hypothesis import HealthCheck, settings

from distributed import Ranks

# the same examples everywhere, however slow the machine; `--hypothesis-profile default` draws others
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def state_of(trainer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that resuming needs, the tensors by name; not copies."""
    return dict(trainer.state_tensors()), trainer.state_values()


FAMILIES = ("llama", "qwen2", "qwen3", "gemma")


KINDS: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
    },
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        **(recurrent := dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2)),
        **(sizes := dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)),
    },
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], **recurrent, **sizes},
}
"""What `tiny_config` adds for models whose layers are more than attention and a gated product."""


def tiny_config(family: str, **overrides: object):  # type: ignore[no-untyped-def]
    """Two layers of `family`: hidden 32, 4 query and 2 key heads, vocabulary 61; tied for gemma and qwen2."""
    from transformers import AutoConfig

    shape = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=family in ("gemma", "qwen2"),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = AutoConfig.for_model(family, **{**shape, **KINDS.get(family, {}), **overrides})
    config._experts_implementation = "eager"  # the others know no float64
    return config


@cache
def _weights(family: str, layers: int) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    config = tiny_config(family, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # larger than a fresh initialisation, so that distributions are far from uniform and bugs show
    return {n: p + 0.25 * torch.randn_like(p) for n, p in model.state_dict().items() if "rotary" not in n}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 2):  # type: ignore[no-untyped-def]
    """A fresh copy of the family's tiny random model, calling our attention by name."""
    from transformers import AutoModelForCausalLM

    import miles_spec.kernels.attention as attention

    config = tiny_config(family, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=dtype)
    model.load_state_dict(_weights(family, layers), strict=False)
    return model.to(dtype).eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none. Where there is one, Triton's interpreter, which runs its kernels on
    CPU tensors, is off."""
    gpu, interpreter = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        parameters = getattr(item, "callspec", None)
        if item.get_closest_marker("gpu"):
            if not gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif not interpreter and parameters and parameters.params.get("backend") == "triton":
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes over gloo."""
    workers = Ranks(tmp_path_factory.mktemp("ranks"))
    yield workers
    workers.stop()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn."""
    return request.param


CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + m['role']) }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level tokenizer: pad 0, bos 1, eos 2 as in `tiny_config`, three role tokens, then one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
