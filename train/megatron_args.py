"""Makes megatron-core's configuration from a run file's `[megatron]` table and a Hugging Face configuration.

Invariant: what would change the model, or what the run itself decides, is refused by name, and so is what this trainer
was never run with; nothing is left out in silence. Nothing here needs a GPU or a process group, so that a run that
cannot work ends before it costs anything.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_MODEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "deallocate_pipeline_outputs",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "moe_router_dtype",
)
_DDP = (
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "grad_reduce_in_fp32",
    "bucket_size",
    "pad_buckets_for_high_nccl_busbw",
)
_OPTIMIZER = ("use_distributed_optimizer", "adam_eps")
SUPPORTED = tuple(dict.fromkeys((*_MODEL, *_DDP, *_OPTIMIZER)))
"""The names that `[megatron]` may hold."""

_RECOMPUTED = ("core_attn", "mlp", "moe")
_MODEL_PATH = "the model's own configuration (model.path) sets it"
_DTYPE = "model.dtype sets it"
_NO_ENGINE = "Transformer Engine's layers are not used"
_REFUSED = {
    **dict.fromkeys(
        (
            *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "add_qkv_bias"),
            *("ffn_hidden_size", "normalization", "layernorm_epsilon", "qk_layernorm", "gated_linear_unit"),
            *("activation_func", "add_bias_linear", "softmax_scale", "rotary_interleaved", "window_size"),
            *("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax"),
            *("moe_layer_freq", "moe_router_score_function"),
        ),
        _MODEL_PATH,
    ),
    **dict.fromkeys(("fp16", "bf16", "params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast"), _DTYPE),
    **dict.fromkeys(("fp8", "fp4", "tp_comm_overlap", "cpu_offloading", "apply_rope_fusion"), _NO_ENGINE),
    **dict.fromkeys(("transformer_impl", "moe_grouped_gemm", "moe_permute_fusion"), _NO_ENGINE),
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout"), "the policy that is trained must be the one that sampled: it is 0"
    ),
    **dict.fromkeys(
        ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_load_balancing_type"),
        "no auxiliary loss is added to the policy's",
    ),
    **dict.fromkeys(("lr", "min_lr", "decoupled_lr"), "train.lr sets it"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "train.betas sets it"),
    **dict.fromkeys(("mtp_num_layers", "mtp_loss_scaling_factor"), "draft.family trains MTP layers"),
    **dict.fromkeys(("gradient_reduce_div_fusion", "average_in_collective"), "gradients are summed, not averaged"),
    "weight_decay": "train.weight_decay sets it",
    "clip_grad": "train.clip sets it",
    "optimizer": "the policy is trained with AdamW",
    "attention_backend": "attention is this project's own",
    "deterministic_mode": "attention is this project's own, and on a GPU its backward pass adds in any order",
    "cp_comm_type": "attention over context-parallel ranks is this project's own",
    "variable_seq_lengths": "micro-batches differ in length, so it is always true",
    "calculate_per_token_loss": "the run's losses carry their own denominators",
    "virtual_pipeline_model_parallel_size": "pipeline stages are not interleaved; leave it out",
    "overlap_p2p_comm": "it needs interleaved pipeline stages, which are not supported",
    "moe_token_dispatcher_type": "it is alltoall, since ranks hold different numbers of tokens",
    "overlap_param_gather": "the LM head is read outside of its module, so it would still hold the last step's weights",
    "perform_initialization": _MODEL_PATH,
}

_PLAIN: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "sliding_window": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_jitter_noise": 0,
    "rope_interleave": True,
}
"""Settings of Hugging Face configurations that the mapping below reproduces at these values alone."""
_ROPE = ("default", "linear", "llama3")
"""Scalings of the rotary embedding that change its frequencies and nothing else."""
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe")
"""Hugging Face's model types that are mapped to Megatron."""


def model_fields(hf_config: Any) -> dict[str, Any]:
    """The fields of Megatron's `TransformerConfig` that a Hugging Face configuration decides.

    Raises `ValueError`, by name, for a family or a setting that Megatron's layers would not reproduce.
    """
    kind = hf_config.model_type
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{kind}: no mapping to Megatron, which has {known}; set train.backend = 'torch'")
    rope, glm, latent = hf_config.rope_parameters, kind == "glm4_moe", kind == "deepseek_v3"
    for name, plain in _PLAIN.items():
        if glm and name == "attention_bias":
            continue
        if (value := getattr(hf_config, name, plain)) != plain:
            raise ValueError(
                f"{kind}: {name} is {value!r}, and only {plain!r} is mapped to Megatron; set train.backend = 'torch'"
            )
    for name, value, plain in (
        ("layer_types", set(getattr(hf_config, "layer_types", None) or ["full_attention"]), ("full_attention",)),
        ("rope_parameters.rope_type", {rope["rope_type"]}, (*_ROPE, "yarn") if latent else _ROPE),
        ("rope_parameters.partial_rotary_factor", {1 if glm else rope.get("partial_rotary_factor", 1)}, (1,)),
    ):
        if other := value - set(plain):
            known = " or ".join(map(repr, plain))
            raise ValueError(f"{kind}: {name} has {other.pop()!r}, and only {known} is mapped to Megatron")
    heads = hf_config.num_attention_heads
    fields: dict[str, Any] = {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        "ffn_hidden_size": hf_config.intermediate_size,
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": kind == "qwen2" or (glm and hf_config.attention_bias),
        "qk_layernorm": kind.startswith("qwen3") or (glm and hf_config.use_qk_norm),
    }
    if kind in ("qwen3_moe", "mixtral"):
        normalized = kind == "mixtral" or hf_config.norm_topk_prob
        fields |= {
            "num_moe_experts": hf_config.num_local_experts,
            "moe_router_topk": hf_config.num_experts_per_tok,
            "moe_ffn_hidden_size": getattr(hf_config, "moe_intermediate_size", hf_config.intermediate_size),
            # softmax over the chosen experts alone is softmax over all of them, normalised
            "moe_router_pre_softmax": not normalized,
            "moe_router_load_balancing_type": "none",
        }
    if latent:
        fields |= _latent_attention(hf_config)
    return fields | _sigmoid_router(hf_config) if latent or glm else fields


def _latent_attention(hf_config: Any) -> dict[str, Any]:
    """Of DeepSeek-V2 (2024, arXiv 2405.04434, section 2.1)."""
    rope = hf_config.rope_parameters
    if rope["rope_type"] == "yarn" and (factor := ROPE_INIT_FUNCTIONS["yarn"](hf_config, None)[1]) != 1:
        raise ValueError(
            f"deepseek_v3: rope_parameters.mscale and mscale_all_dim scale rotated queries and keys by {factor:.3g}, "
            "and only 1 is mapped to Megatron; set train.backend = 'torch'"
        )
    return {
        "num_query_groups": hf_config.num_attention_heads,
        "kv_channels": hf_config.qk_head_dim,
        "q_lora_rank": hf_config.q_lora_rank,
        "kv_lora_rank": hf_config.kv_lora_rank,
        "qk_head_dim": hf_config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf_config.qk_rope_head_dim,
        "v_head_dim": hf_config.v_head_dim,
        # angles are our own; of Megatron's only the factor of the scores is used
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0 if rope["rope_type"] == "default" else rope["factor"],
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


def _sigmoid_router(hf_config: Any) -> dict[str, Any]:
    """Of DeepSeek-V3 (2024, arXiv 2412.19437, section 2.1.2), with its shared experts and first layers without any."""
    kind, top = hf_config.model_type, hf_config.num_experts_per_tok
    limited = hf_config.topk_group < hf_config.n_group
    # Megatron ranks a group by that many experts, transformers by two
    for name, value, known in (
        ("norm_topk_prob", hf_config.norm_topk_prob, top > 1),
        ("num_experts_per_tok // topk_group", top // hf_config.topk_group if limited else 2, 2),
    ):
        if value != known:
            raise ValueError(
                f"{kind}: {name} is {value!r}, and only {known!r} is mapped to Megatron; set train.backend = 'torch'"
            )
    return {
        "num_moe_experts": hf_config.num_local_experts,
        "moe_router_topk": top,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf_config.moe_intermediate_size * hf_config.n_shared_experts,
        "moe_layer_freq": [int(i >= hf_config.first_k_dense_replace) for i in range(hf_config.num_hidden_layers)],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": hf_config.routed_scaling_factor,
        "moe_router_num_groups": hf_config.n_group if limited else None,
        "moe_router_group_topk": hf_config.topk_group if limited else None,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",  # as in transformers
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronArguments:
    """What `[megatron]` says, checked."""

    world_size: int
    """Ranks of the run."""
    model: Mapping[str, Any]
    """Fields of `TransformerConfig`, without the model's own."""
    ddp: Mapping[str, Any]
    """Fields of `DistributedDataParallelConfig`."""
    optimizer: Mapping[str, Any]
    """Fields of `OptimizerConfig`."""

    @classmethod
    def make(cls, table: Mapping[str, Any], world_size: int) -> MegatronArguments:
        """From the run file's table, whose names may have dashes.

        Raises `ValueError` in one sentence for a name that is unknown or not the user's to set, a value of the wrong
        type, and sizes that do not go together.
        """
        given = {name.replace("-", "_"): value for name, value in table.items()}
        for name, value in given.items():
            _check_name(name)
            _check_value(name, value)
        picked = ({name: given[name] for name in names if name in given} for names in (_MODEL, _DDP, _OPTIMIZER))
        arguments = cls(world_size=world_size, **dict(zip(("model", "ddp", "optimizer"), picked, strict=True)))
        arguments._check_sizes()
        return arguments

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return int(self.model.get("tensor_model_parallel_size", 1))

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return int(self.model.get("pipeline_model_parallel_size", 1))

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return int(self.model.get("context_parallel_size", 1))

    @property
    def ep(self) -> int:
        """Expert-parallel ranks."""
        return int(self.model.get("expert_model_parallel_size", 1))

    @property
    def etp(self) -> int:
        """Ranks among which one expert is cut."""
        return int(self.model.get("expert_tensor_parallel_size") or self.tp)

    @property
    def dp(self) -> int:
        """Ranks with the same weights and other micro-batches, context-parallel ones not counted."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms and residuals are cut over the tensor-parallel ranks."""
        return bool(self.model.get("sequence_parallel", False))

    def check(self, hf_config: Any) -> None:
        """Raises `ValueError` in one sentence for a model that cannot be cut this way."""
        fields = model_fields(hf_config)
        experts = fields.get("num_moe_experts")
        dense = not experts or 0 in fields.get("moe_layer_freq", ())
        latent = fields.get("kv_lora_rank", 0) + fields.get("qk_pos_emb_head_dim", 0)
        even_layers = not any(name.startswith("num_layers_in") for name in self.model)
        tensor, expert_tensor = "tensor_model_parallel_size", "expert_tensor_parallel_size"
        for what, count, name, size in (
            ("attention heads", fields["num_attention_heads"], tensor, self.tp),
            ("key-value heads", fields["num_query_groups"], tensor, self.tp),
            ("tokens of the vocabulary", hf_config.vocab_size, tensor, self.tp),
            ("columns of the MLP", fields["ffn_hidden_size"] if dense else 0, tensor, self.tp),
            ("columns of the shared experts", fields.get("moe_shared_expert_intermediate_size", 0), tensor, self.tp),
            ("latent columns of queries", fields.get("q_lora_rank") or 0, tensor, self.tp),
            ("latent columns of keys", latent, tensor, self.tp),
            ("layers", fields["num_layers"] if even_layers else 0, "pipeline_model_parallel_size", self.pp),
            ("experts", experts or 0, "expert_model_parallel_size", self.ep),
            ("columns of an expert", fields["moe_ffn_hidden_size"] if experts else 0, expert_tensor, self.etp),
        ):
            if count % size:
                raise ValueError(f"megatron.{name} is {size}, which does not divide the model's {count} {what}")
        if not experts:
            for name in ("expert_model_parallel_size", "expert_tensor_parallel_size", "moe_router_dtype"):
                if self.model.get(name, 1) != 1:
                    raise ValueError(f"megatron.{name} is set, but {hf_config.model_type} has no experts; leave it out")
        elif self.tp > 1 and not self.sequence_parallel:
            raise ValueError(
                "a model with experts needs megatron.sequence_parallel = true if "
                f"megatron.tensor_model_parallel_size is above 1, and it is {self.tp}"
            )
        self.transformer_config(hf_config, torch.bfloat16)

    def transformer_config(self, hf_config: Any, dtype: torch.dtype) -> Any:
        """Megatron's `TransformerConfig`. Raises `ValueError` for what Megatron refuses."""
        from megatron.core.transformer import MLATransformerConfig, TransformerConfig

        fields = model_fields(hf_config)
        ours = {
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "transformer_impl": "local",
            "perform_initialization": False,
            "variable_seq_lengths": True,
            "moe_token_dispatcher_type": "alltoall",
            "calculate_per_token_loss": True,
            "cuda_graph_modules": [],  # there are none, and the default warns
        }
        try:
            made = MLATransformerConfig if "kv_lora_rank" in fields else TransformerConfig
            return made(**{**fields, **ours, **self.model})
        except (ValueError, AssertionError) as error:
            raise ValueError(f"[megatron]: {str(error) or 'Megatron refuses these settings'}") from error

    def _check_sizes(self) -> None:
        tp, pp, cp, ep, etp = self.tp, self.pp, self.cp, self.ep, self.etp
        if self.world_size % (tp * pp * cp):
            raise ValueError(
                f"the run has {self.world_size} ranks, which tensor_model_parallel_size * pipeline_model_parallel_size "
                f"* context_parallel_size = {tp} * {pp} * {cp} does not divide"
            )
        if self.world_size % (etp * pp * ep):
            raise ValueError(
                f"the run has {self.world_size} ranks, which expert_tensor_parallel_size * "
                f"pipeline_model_parallel_size * expert_model_parallel_size = {etp} * {pp} * {ep} does not divide"
            )
        if self.sequence_parallel and tp == 1:
            raise ValueError("megatron.sequence_parallel needs megatron.tensor_model_parallel_size above 1")


def _check_name(name: str) -> None:
    if name in SUPPORTED:
        return
    if name in _REFUSED:
        raise ValueError(f"megatron.{name} cannot be set: {_REFUSED[name]}")
    if name in _types():
        raise ValueError(f"megatron.{name} cannot be set: this trainer is not tested with it")
    near = difflib.get_close_matches(name, SUPPORTED, n=1, cutoff=0.0)[0]
    raise ValueError(f"Megatron has no argument {name!r}; did you mean {near}?")


def _check_value(name: str, value: Any) -> None:
    if name not in _types():
        raise ValueError(f"the installed megatron-core has no argument {name!r}; another version may have it")
    hint = _types()[name]
    if not _fits(value, hint):
        raise ValueError(f"megatron.{name} must be {_words(hint)}, not {value!r}")
    if name == "use_distributed_optimizer" and not value:
        raise ValueError(f"megatron.{name} has to be true, which it is without being set; leave it out")
    if name == "recompute_modules" and (other := set(value) - set(_RECOMPUTED)):
        known = " and ".join(map(repr, _RECOMPUTED))
        raise ValueError(
            f"megatron.recompute_modules cannot have {other.pop()!r} without Transformer Engine; {known} work"
        )
    if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
        raise ValueError(f"megatron.{name} must be above 0, not {value}")


@cache
def _types() -> dict[str, Any]:
    """The type of every argument of the installed Megatron."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    classes = (OptimizerConfig, DistributedDataParallelConfig, TransformerConfig)
    return {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for one in _alternatives(hint):
        origin = get_origin(one)
        if origin is Literal:
            fits = value in get_args(one)
        elif origin is list:
            fits = isinstance(value, list) and all(_fits(v, get_args(one)[0]) for v in value)
        elif one in (int, float):
            fits = isinstance(value, int if one is int else int | float) and not isinstance(value, bool)
        else:
            fits = isinstance(one, type) and one is not NoneType and isinstance(value, one)
        if fits:
            return True
    return False


def _words(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    found = []
    for one in _alternatives(hint):
        if get_origin(one) is Literal:
            found += [repr(v) for v in get_args(one)]
        elif get_origin(one) is list:
            found.append("a list of texts")
        elif one is not NoneType:
            found.append(names.get(one, str(one)))
    return " or ".join(found)
