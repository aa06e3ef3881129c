"""The policy's weights into Megatron and out again. That they land where they belong shows in `test_megatron_model`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import megatron_cpu
from conftest import tiny_config
from miles_spec.models import stored_tensors

pytestmark = megatron_cpu.installed

TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 1, {}),
    ("qwen3", 2, TP),
    ("qwen2", 2, PP),
    ("qwen3_moe", 2, {"expert_model_parallel_size": 2}),
    ("qwen2", 4, TP | PP),
    ("llama", 4, PP | {"num_layers_in_first_pipeline_stage": 1, "context_parallel_size": 2}),
    ("mixtral", 4, SP | PP),
    ("qwen3_moe", 4, SP | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    ("mixtral", 4, SP | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    ("deepseek_v3", 4, SP | PP),
    ("deepseek_v3", 2, {"expert_model_parallel_size": 2}),
    ("glm4_moe", 4, SP | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
]


def hf_config(family: str, layers: int = 2) -> Any:
    return tiny_config(family, vocab_size=64, num_hidden_layers=layers, num_local_experts=4)


def model(config: Any) -> nn.Module:
    torch.manual_seed(5)
    made = AutoModelForCausalLM.from_config(config)
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    return made


def round_trip(arguments: Any, config: Any, dtype: torch.dtype) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """In a worker: what differs, and what `metas` says."""
    from miles_spec.train import megatron_model, megatron_weights

    whole = stored_tensors(model(config))
    policy = megatron_model.build(config, arguments, dtype)
    own = stored_tensors(policy)
    for tensor in own.values():
        tensor.fill_(float("nan"))
    megatron_weights.load(policy, whole, config)
    left = [f"{name} is not filled" for name, tensor in own.items() if tensor.isnan().any()]
    first = torch.distributed.get_rank() == 0
    names = []
    for name, tensor in megatron_weights.export(policy, config):
        names.append(name)
        if (tensor is not None) != first:
            left.append(f"{name} on another rank than 0")
        elif tensor is not None:
            kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            if not (tensor.dtype == kept and torch.equal(tensor, whole[name].to(kept))):
                left.append(f"{name} differs")
    others = {p: torch.full_like(p, float("nan"), dtype=torch.float32) for p in policy.parameters()}
    trained = {name: whole[name] for name in megatron_weights.metas(config, buffers=False)}
    megatron_weights.load(policy, trained, config, others.__getitem__, buffers=False)
    for name, tensor in megatron_weights.export_values(policy, others.__getitem__):
        if tensor is not None and not torch.equal(tensor, whole[name]):
            left.append(f"{name} differs beside the parameters")
    if names != list(whole):
        left.append(f"the order is {names}")
    return left, megatron_weights.metas(config)


@pytest.mark.parametrize(("family", "size", "table"), LAYOUTS)
def test_what_was_loaded_is_exported(family: str, size: int, table: dict[str, Any]) -> None:
    config = hf_config(family, layers=3 if "num_layers_in_first_pipeline_stage" in table else 2)
    dtype = torch.bfloat16 if size == 4 else torch.float32
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model(config)).items()}
    for left, metas in megatron_cpu.run(round_trip, table, size, config, dtype):
        assert left == []
        assert list(metas.items()) == list(shapes.items())


def refusals(arguments: Any, config: Any) -> list[str]:
    """In a worker: what `load` says to tensors of another model, and whether it had changed any weight by then."""
    from miles_spec.train import megatron_model, megatron_weights

    whole = {name: p.detach() for name, p in model(config).named_parameters()}
    policy = megatron_model.build(config, arguments, torch.float32)
    megatron_weights.load(policy, {name: torch.zeros_like(x) for name, x in whole.items()}, config)
    last = "model.layers.1.mlp.up_proj.weight"
    changes: list[dict[str, Tensor | None]] = [
        {last: None},
        {last: whole[last].T},
        {"model.layers.2.mlp.up_proj.weight": whole[last]},
    ]
    told = []
    for change in changes:
        given = {name: x for name, x in (whole | change).items() if x is not None}
        try:
            megatron_weights.load(policy, given, config)
        except ValueError as error:
            told.append(str(error))
        told += [f"{name} has changed" for name, p in policy.named_parameters() if p.any()]
    return told


def test_tensors_of_another_model_are_refused() -> None:
    first, second = megatron_cpu.run(refusals, PP, 2, hf_config("llama"))
    assert first == second
    missing, shape, extra = first
    assert missing == "tensor 'model.layers.1.mlp.up_proj.weight' is missing"
    assert shape == "tensor 'model.layers.1.mlp.up_proj.weight' has shape [32, 48], and the model's has [48, 32]"
    assert extra == "the model has no place for tensor 'model.layers.2.mlp.up_proj.weight'"
