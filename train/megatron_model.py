"""The policy on megatron-core: one pipeline stage of a Hugging Face model, over this project's attention.

It is a `GPTModel`, which Megatron deprecates in favour of `HybridModel`, because checkpoints and bridges speak its
names. Invariant: hidden states are those of the Hugging Face model, however the ranks are cut; the gradient that enters
them has to be whole on every tensor-parallel rank, as `kernels.logprob` gives it.

Dimensions: `T` rows of a pack on this context-parallel rank, `s` rows between layers: `T`, or with sequence parallelism
this rank's part of `T` made divisible; `H` hidden, `D` head size, `V` vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    model_parallel_cuda_manual_seed,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.layout import PackedLayout
from miles_spec.train.megatron_args import MegatronArguments


def initialize(arguments: MegatronArguments) -> None:
    """Makes Megatron's process groups; all ranks of the default group together. Raises `ValueError` without a GPU."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        context_parallel_size=arguments.cp,
        expert_model_parallel_size=arguments.ep,
        expert_tensor_parallel_size=arguments.etp,
    )
    # sequence parallelism and recomputation ask for named generators, though nothing here draws from them
    try:
        model_parallel_cuda_manual_seed(0)
    except (AssertionError, RuntimeError) as error:
        if torch.cuda.is_available():
            raise
        raise ValueError('Megatron needs a GPU, and torch sees none here; set train.backend = "torch"') from error


def build(hf_config: Any, arguments: MegatronArguments, dtype: torch.dtype) -> Policy:
    """This rank's part of the model on its GPU, with weights in `dtype` that are yet to be loaded.

    Raises `ValueError` in one sentence for a model that is not mapped, or that cannot be cut this way.
    """
    arguments.check(hf_config)
    # its one warning is that of the module's docstring
    logging.getLogger(GPTModel.__module__).setLevel(logging.ERROR)
    policy = Policy(arguments.transformer_config(hf_config, dtype), hf_config)
    # some of Megatron's weights are made on the host
    return cast(Policy, policy.cuda(torch.cuda.current_device()))


class Policy(GPTModel):
    """One pipeline stage. The LM head is never applied: losses take its weight. Unlike in Hugging Face's model, the
    embedding of the padding token learns where it occurs."""

    inv_freq: Tensor

    def __init__(self, config: TransformerConfig, hf_config: Any) -> None:
        first = get_transformer_layer_offset(config)
        layers = range(first, first + get_num_layers_to_build(config, None))
        specs = [_layer(config, experts=_has_experts(config, layer)) for layer in layers]
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm),
            vocab_size=hf_config.vocab_size,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="none",
        )
        self.hf_config = hf_config
        self._tapping, self._tapped = False, dict[int, Tensor]()
        self.register_buffer("inv_freq", _inverse_frequencies(hf_config), persistent=False)
        for module in self.modules():
            if isinstance(module, TopKRouter):
                module.frozen_expert_bias = True  # as in the torch trainer

    def tap(self, layers: Sequence[int]) -> None:
        """Has each forward keep the states after these layers of this stage, counted from 0, until `tapped`."""
        for index, layer in enumerate(layers):
            self.decoder.layers[layer].register_forward_hook(partial(self._keep, index))

    def _keep(self, index: int, layer: nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> None:
        if self._tapping:  # not when a layer is run again for its gradient
            self._tapped[index] = outputs[0].detach()

    def tapped(self, layout: PackedLayout) -> Tensor | None:
        """`[T, n H]`, detached: the states that the last forward, over `layout`, had after the `n` tapped layers, side
        by side and whole on every tensor-parallel rank; None if there are none. They are kept no longer."""
        if not self._tapped:
            return None
        states = [self._tapped[index] for index in range(len(self._tapped))]
        self._tapped.clear()
        if self.config.sequence_parallel:
            with torch.no_grad():
                states = [gather_from_sequence_parallel_region(x, group=self.pg_collection.tp) for x in states]
        return torch.cat([x[: layout.tokens, 0] for x in states], dim=-1)

    def forward(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        """`[T, H]` after the final norm on the last stage, the same on every tensor-parallel rank; elsewhere what the
        next stage takes, `[s, 1, H]`. `tokens` `[T]` int64 are this context-parallel rank's. A stage that is not the
        first reads what `set_input_tensor` was given."""
        rows = layout.tokens
        extra = -rows % self.config.tensor_model_parallel_size if self.config.sequence_parallel else 0
        hidden = None
        if self.pre_process:
            hidden = self.embedding(F.pad(tokens, (0, extra))[None], None)
        assert self.inv_freq.dtype == torch.float32, "rotary frequencies must not be rounded"
        self._tapping = True
        angles = F.pad(layout.positions, (0, extra))[:, None] * self.inv_freq
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=torch.cat([angles, angles], -1)[:, None, None],
            # of all that reaches attention, this is what Megatron's checkpoints keep for recomputation as it is
            attention_bias=PackedAttention(layout),
        )
        self._tapping = False
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # not summed backward: each rank has the whole gradient
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden[:rows, 0]

    def head_weight(self) -> Tensor:
        """`[V / tp, H]`, this tensor-parallel rank's part of the LM head, in the order of ranks; on the last stage."""
        assert self.post_process
        tied = self.share_embeddings_and_output_weights
        return cast(Tensor, self.shared_embedding_or_output_weight() if tied else self.output_layer.weight)

    def embedding_weight(self) -> Tensor:
        """`[V / tp, H]`, this tensor-parallel rank's part of the input embedding, on the first stage; of a model with
        tied weights also on the last."""
        assert self.pre_process or (self.post_process and self.share_embeddings_and_output_weights)
        return cast(Tensor, self.shared_embedding_or_output_weight())


class Norm(nn.Module):
    """RMSNorm; Megatron's own without Transformer Engine knows no sequence parallelism."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # Megatron then sums its gradient over the tensor-parallel ranks, which see different rows
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class CoreAttention(MegatronModule):
    """Hands queries, keys and values of this rank's heads to the `PackedAttention` that came with the micro-batch."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.layer = layer_number - 1
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType,
        attention_bias: PackedAttention,
        packed_seq_params: None,
    ) -> Tensor:
        """`[rows, 1, heads * D]` from `[rows, 1, heads, D]`; rows beyond the layout's are padding and give 0."""
        rows = attention_bias.tokens
        q, k, v = (x[:rows].permute(1, 2, 0, 3) for x in (query, key, value))
        out = attention_bias(self.layer, q, k, v, self.scale)
        return F.pad(out.permute(2, 0, 1, 3).flatten(2), (0, 0, 0, 0, 0, len(query) - rows))


class LatentAttention(MLASelfAttention):
    """Multi-head latent attention over a pack (DeepSeek-V2, 2024, arXiv 2405.04434, section 2.1), the projections cut
    as in Megatron's own. That one counts positions itself, takes no bias, and without Transformer Engine never sums the
    gradient of the key that all heads share over tensor-parallel ranks."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        # Megatron's demands that the queries' norm be fused where they are not compressed
        linears = dict.fromkeys(("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj"), ColumnParallelLinear)
        return {**linears, "q_layernorm": _latent_norm, "kv_layernorm": _latent_norm}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None,
        rotary_pos_emb: Tensor,
        attention_bias: PackedAttention,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[s, 1, H]` from `[s, 1, H]`, and no bias; `rotary_pos_emb` `[rows, 1, 1, D]` are angles."""
        recomputed = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recomputed else self._run_core_attention
        out = attend(*self._heads(hidden_states, rotary_pos_emb), attention_mask, attention_bias=attention_bias)
        return cast(tuple[Tensor, Tensor | None], self.linear_proj(out))

    def _heads(self, hidden: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this rank's heads, `[rows, 1, heads, D]`, from `[s, 1, H]`."""
        config, group = self.config, self.pg_collection.tp
        plain, rotary, size = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        gather = partial(gather_from_tensor_model_parallel_region, group=group)
        rotate = partial(apply_rotary_pos_emb, freqs=angles, config=config, mla_rotary_interleaved=True)
        if config.q_lora_rank is None:
            query = self.linear_q_proj(hidden)[0]
        else:
            latent = self._cut(gather(self.linear_q_down_proj(hidden)[0]))
            query = self.linear_q_up_proj(self.q_layernorm(latent))[0]
        latent, shared = gather(self.linear_kv_down_proj(hidden)[0]).split([config.kv_lora_rank, rotary], dim=-1)
        both = self.linear_kv_up_proj(self.kv_layernorm(self._cut(latent)))[0]
        q, q_rotary = query.unflatten(-1, (-1, plain + rotary)).split([plain, rotary], dim=-1)
        k, v = both.unflatten(-1, (-1, plain + size)).split([plain, size], dim=-1)
        # summed backward: this rank's heads give a part of its gradient
        shared = rotate(copy_to_tensor_model_parallel_region(shared, group=group)[:, :, None])
        q = torch.cat([q, rotate(q_rotary)], dim=-1)
        return q, torch.cat([k, shared.expand(-1, -1, k.shape[2], -1)], dim=-1), v

    def _cut(self, x: Tensor) -> Tensor:
        """`[s, 1, ..]` of `[rows, 1, ..]`."""
        if not self.config.sequence_parallel:
            return x
        return cast(Tensor, scatter_to_sequence_parallel_region(x, group=self.pg_collection.tp))


def _latent_norm(*, config: TransformerConfig, hidden_size: int, eps: float) -> Norm:
    return Norm(config=config, hidden_size=hidden_size, eps=1e-6)  # in transformers, whatever the other norms have


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    """Whether a layer, counted from 0 over all stages, has experts."""
    frequency = config.moe_layer_freq
    return bool(config.num_moe_experts) and (frequency == 1 or bool(frequency[layer]))


def _attention(config: TransformerConfig) -> ModuleSpec:
    mask = {"attn_mask_type": AttnMaskType.causal}
    if config.multi_latent_attention:
        latent = MLASelfAttentionSubmodules(
            linear_q_down_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=_latent_norm,
            kv_layernorm=_latent_norm,
        )
        return ModuleSpec(module=LatentAttention, params=mask, submodules=latent)
    norm = Norm if config.qk_layernorm else None
    plain = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    return ModuleSpec(module=SelfAttention, params=mask, submodules=plain)


def _layer(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    if experts:
        mlp = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
    else:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = partial(MLP.as_mlp_submodule, submodules=linears)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=_attention(config),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _inverse_frequencies(hf_config: Any) -> Tensor:
    """`[D / 2]` float32, by which Hugging Face's model multiplies positions."""
    classes = vars(inspect.getmodule(MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)])).items()
    rotary = next(cls for name, cls in classes if name.endswith("RotaryEmbedding"))(hf_config)
    assert rotary.attention_scaling == 1, "a scaling of the rotary embedding that `model_fields` let through"
    return cast(Tensor, rotary.inv_freq.float())
