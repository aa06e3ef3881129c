"""`[megatron]` to megatron-core's configuration, without a GPU or a process group."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

import megatron_cpu
from conftest import tiny_config
from miles_spec.train.megatron_args import FAMILIES, SUPPORTED, MegatronArguments, model_fields

pytestmark = megatron_cpu.installed

TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}


def config(family: str = "llama", **overrides: Any) -> Any:
    return tiny_config(family, **{"vocab_size": 64, **overrides})


def test_names_go_where_megatron_has_them() -> None:
    table = {"tensor-model-parallel-size": 2, "context_parallel_size": 2, "use-distributed-optimizer": True}
    arguments = MegatronArguments.make(table, 8)
    assert (arguments.tp, arguments.pp, arguments.cp, arguments.ep, arguments.etp, arguments.dp) == (2, 1, 2, 1, 2, 2)
    assert dict(arguments.model) == {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    assert arguments.ddp == arguments.optimizer == {"use_distributed_optimizer": True}
    made = arguments.transformer_config(config(), torch.bfloat16)
    assert (made.tensor_model_parallel_size, made.bf16, made.params_dtype) == (2, True, torch.bfloat16)
    assert (made.hidden_dropout, made.attention_dropout, made.moe_aux_loss_coeff) == (0, 0, 0)


def test_every_supported_name_is_one_of_megatrons() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    known = {f.name for cls in (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig) for f in fields(cls)}
    assert set(SUPPORTED) <= known


@pytest.mark.parametrize(
    ("table", "size", "said"),
    [
        ({"tensor_model_paralel_size": 2}, 2, "no argument 'tensor_model_paralel_size'; did you mean tensor_model_pa"),
        ({"fp8": "hybrid"}, 1, "megatron.fp8 cannot be set: Transformer Engine's layers are not used"),
        ({"lr": 1e-5}, 1, "megatron.lr cannot be set: train.lr sets it"),
        ({"num-layers": 2}, 1, r"megatron.num_layers cannot be set: .*model.path"),
        ({"virtual_pipeline_model_parallel_size": 2}, 4, "pipeline stages are not interleaved"),
        ({"overlap_param_gather": True}, 1, "the last step's weights"),
        ({"cuda_graph_impl": "local"}, 1, "megatron.cuda_graph_impl cannot be set: this trainer is not tested with it"),
        ({"tensor_model_parallel_size": "2"}, 2, "must be a whole number, not '2'"),
        ({"tensor_model_parallel_size": True}, 2, "must be a whole number, not True"),
        ({"tensor_model_parallel_size": 0}, 2, "must be above 0, not 0"),
        ({"sequence_parallel": 1}, 2, "must be true or false, not 1"),
        ({"use_distributed_optimizer": False}, 2, "megatron.use_distributed_optimizer has to be true"),
        ({"recompute_granularity": "most"}, 1, "must be 'full' or 'selective', not 'most'"),
        ({"recompute_modules": "mlp"}, 1, "must be a list of texts, not 'mlp'"),
        ({"recompute_modules": ["layernorm"]}, 1, "cannot have 'layernorm' without Transformer Engine"),
        ({"sequence_parallel": True}, 2, "sequence_parallel needs megatron.tensor_model_parallel_size above 1"),
        (TP | PP, 6, r"has 6 ranks, which .* = 2 \* 2 \* 1 does not divide"),
        ({"expert_model_parallel_size": 4}, 2, r"has 2 ranks, which expert_.* = 1 \* 1 \* 4 does not divide"),
    ],
)
def test_tables_that_are_refused(table: dict[str, Any], size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MegatronArguments.make(table, size)


@pytest.mark.parametrize(
    ("table", "family", "overrides", "said"),
    [
        (TP, "llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "not divide the model's 1 attention heads"),
        (TP, "llama", {"num_key_value_heads": 1}, "not divide the model's 1 key-value heads"),
        (TP, "llama", {"vocab_size": 61}, "not divide the model's 61 tokens of the vocabulary"),
        (TP, "llama", {"intermediate_size": 49}, "not divide the model's 49 columns of the MLP"),
        (PP, "llama", {"num_hidden_layers": 3}, "not divide the model's 3 layers"),
        (
            PP | {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1},
            *("llama", {"num_hidden_layers": 3}, r"\[megatron\]: .*1 middle layers remaining"),
        ),
        ({"expert_model_parallel_size": 2}, "llama", {}, "llama has no experts"),
        ({"expert_model_parallel_size": 2}, "qwen3_moe", {"num_local_experts": 3}, "not divide the model's 3 experts"),
        (TP, "qwen3_moe", {}, "needs megatron.sequence_parallel = true"),
        (
            {"expert_tensor_parallel_size": 2},
            *("qwen3_moe", {"moe_intermediate_size": 25}, "not divide the model's 25 columns of an expert"),
        ),
        ({"recompute_granularity": "full"}, "llama", {}, r"\[megatron\]: .*recompute_method must be"),
        ({}, "gemma", {}, "gemma: no mapping to Megatron, which has llama, qwen2"),
        ({}, "qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64"),
        ({}, "llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' is mapped"),
        ({}, "llama", {"attention_bias": True}, "attention_bias is True"),
        ({}, "qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({}, "deepseek_v3", {"rope_interleave": False}, "rope_interleave is False, and only True is mapped"),
        ({}, "deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob is False, and only True is mapped"),
        ({}, "glm4_moe", {"num_experts_per_tok": 3}, "num_experts_per_tok // topk_group is 3, and only 2 is mapped"),
        ({}, "deepseek_v3", {"rope_parameters": YARN}, "mscale_all_dim scale rotated queries and keys by 1.07"),
        ({}, "glm4_moe", {"rope_parameters": YARN}, "rope_type has 'yarn'"),
        (SP, "deepseek_v3", {"intermediate_size": 49}, "not divide the model's 49 columns of the MLP"),
        (SP, "deepseek_v3", {"q_lora_rank": 11}, "not divide the model's 11 latent columns of queries"),
        (SP, "deepseek_v3", {"kv_lora_rank": 15}, "not divide the model's 23 latent columns of keys"),
        (
            {},
            *("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
            "rope_type has 'yarn', and only 'default' or 'linear' or 'llama3' is mapped",
        ),
    ],
)
def test_models_that_are_refused(table: dict[str, Any], family: str, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MegatronArguments.make(table, 2).check(config(family, **overrides))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_cut(family: str) -> None:
    table = TP | PP | {"sequence_parallel": True, "context_parallel_size": 2}
    model = config(family, num_local_experts=4)
    MegatronArguments.make(table, 16).check(model)
    assert model_fields(model)["num_layers"] == 2
