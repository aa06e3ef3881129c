"""The policy's weights into Megatron's layers and out of them, by Hugging Face's names.

A table says for each of Hugging Face's parameters in which of Megatron's it lies and how that is cut; the same lines
serve both ways. Invariant: `export` after `load` gives the same bits, however the ranks are cut, and no rank makes more
than one whole tensor at a time.

Dimensions: `E` experts, `F` columns of an MLP, `H` hidden, `D` head size, `G` groups of heads that share a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from miles_spec.train.megatron_model import Policy

Select = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How one of Hugging Face's tensors lies in Megatron's."""

    cut: int | None = None
    """The dimension that is cut over tensor-parallel ranks; None if all ranks hold the whole."""
    fused: Callable[[Tensor, Any], Tensor] = lambda tensor, config: tensor
    """The part of Megatron's tensor that is meant, of one that holds several, as a view."""
    halves: bool = False
    """Whether the dimension that is cut is two, gate and up, each of which is cut."""
    experts: bool = False
    """Whether the first dimension is of experts, which Megatron holds one by one."""
    buffer: bool = False
    """Whether it is not trained, and float32 whatever the weights are."""


def _heads(tensor: Tensor, config: Any) -> Tensor:
    """`[G, heads of a group + 2, D, ...]`: queries, then the key's head, then the value's."""
    head = config.kv_channels
    group = config.num_attention_heads // config.num_query_groups + 2
    return tensor.view(-1, group, head, *tensor.shape[1:])


WHOLE = Kind()
COLUMN = Kind(cut=0)
ROW = Kind(cut=1)
QUERY = Kind(cut=0, fused=lambda tensor, config: _heads(tensor, config)[:, :-2])
KEY = Kind(cut=0, fused=lambda tensor, config: _heads(tensor, config)[:, -2])
VALUE = Kind(cut=0, fused=lambda tensor, config: _heads(tensor, config)[:, -1])
GATE = Kind(cut=0, fused=lambda tensor, config: tensor.chunk(2)[0])
UP = Kind(cut=0, fused=lambda tensor, config: tensor.chunk(2)[1])
EXPERTS_IN = Kind(cut=1, halves=True, experts=True)
EXPERTS_OUT = Kind(cut=2, experts=True)
BUFFER = Kind(buffer=True)

_QKV = "self_attention.linear_qkv"
_SHARED = "mlp.shared_experts"
_EXPERTS = "mlp.experts.local_experts.{}"
TABLE: dict[str, tuple[str, Kind]] = {
    "model.embed_tokens.weight": ("embedding.word_embeddings.weight", COLUMN),
    "model.norm.weight": ("decoder.final_layernorm.weight", WHOLE),
    "lm_head.weight": ("output_layer.weight", COLUMN),
    # within a layer
    "input_layernorm.weight": ("input_layernorm.weight", WHOLE),
    "self_attn.q_proj.weight": (f"{_QKV}.weight", QUERY),
    "self_attn.k_proj.weight": (f"{_QKV}.weight", KEY),
    "self_attn.v_proj.weight": (f"{_QKV}.weight", VALUE),
    "self_attn.q_proj.bias": (f"{_QKV}.bias", QUERY),
    "self_attn.k_proj.bias": (f"{_QKV}.bias", KEY),
    "self_attn.v_proj.bias": (f"{_QKV}.bias", VALUE),
    "self_attn.q_norm.weight": ("self_attention.q_layernorm.weight", WHOLE),
    "self_attn.k_norm.weight": ("self_attention.k_layernorm.weight", WHOLE),
    "self_attn.o_proj.weight": ("self_attention.linear_proj.weight", ROW),
    "post_attention_layernorm.weight": ("pre_mlp_layernorm.weight", WHOLE),
    "mlp.gate_proj.weight": ("mlp.linear_fc1.weight", GATE),
    "mlp.up_proj.weight": ("mlp.linear_fc1.weight", UP),
    "mlp.down_proj.weight": ("mlp.linear_fc2.weight", ROW),
    "mlp.gate.weight": ("mlp.router.weight", WHOLE),
    "mlp.gate.e_score_correction_bias": ("mlp.router.expert_bias", BUFFER),
    "mlp.shared_experts.gate_proj.weight": (f"{_SHARED}.linear_fc1.weight", GATE),
    "mlp.shared_experts.up_proj.weight": (f"{_SHARED}.linear_fc1.weight", UP),
    "mlp.shared_experts.down_proj.weight": (f"{_SHARED}.linear_fc2.weight", ROW),
    "mlp.experts.gate_up_proj": (f"{_EXPERTS}.linear_fc1.weight", EXPERTS_IN),
    "mlp.experts.down_proj": (f"{_EXPERTS}.linear_fc2.weight", EXPERTS_OUT),
}
"""Hugging Face's names of all families to Megatron's and how the tensor is cut."""
LATENT = TABLE | {
    "self_attn.q_proj.weight": ("self_attention.linear_q_proj.weight", COLUMN),
    "self_attn.q_a_proj.weight": ("self_attention.linear_q_down_proj.weight", COLUMN),
    "self_attn.q_a_layernorm.weight": ("self_attention.q_layernorm.weight", WHOLE),
    "self_attn.q_b_proj.weight": ("self_attention.linear_q_up_proj.weight", COLUMN),
    "self_attn.kv_a_proj_with_mqa.weight": ("self_attention.linear_kv_down_proj.weight", COLUMN),
    "self_attn.kv_a_layernorm.weight": ("self_attention.kv_layernorm.weight", WHOLE),
    "self_attn.kv_b_proj.weight": ("self_attention.linear_kv_up_proj.weight", COLUMN),
}
"""The same for families with multi-head latent attention."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def metas(hf_config: Any, *, buffers: bool = True) -> dict[str, tuple[int, ...]]:
    """The whole shapes of the model's parameters and, unless told otherwise, the buffers that checkpoints keep, each in
    Hugging Face's order; tied parameters once. No rank is asked."""
    trained, kept = _metas(hf_config.to_json_string(use_diff=False))
    return trained | kept if buffers else dict(trained)


@cache
def _metas(config: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    # drawing nothing, so that a run's random state does not depend on what was asked before
    with torch.random.fork_rng([]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)))
    kept = model.state_dict().keys()
    trained = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return trained, {name: tuple(b.shape) for name, b in model.named_buffers() if name in kept}


@torch.no_grad()
def load(
    policy: Policy,
    tensors: Mapping[str, Tensor],
    hf_config: Any,
    select: Select = lambda tensor: tensor,
    *,
    buffers: bool = True,
) -> None:
    """Fills this rank's weights, or another tensor of each parameter's shape, and unless told otherwise its buffers,
    from the whole ones, which every rank passes.

    Raises `ValueError` naming the first tensor that is missing, misshapen or unknown: the same on every rank, and
    before any weight has changed.
    """
    shapes = metas(hf_config, buffers=buffers)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing")
        if (got := tuple(tensors[name].shape)) != shape:
            raise ValueError(f"tensor {name!r} has shape {list(got)}, and the model's has {list(shape)}")
    if extra := next((name for name in tensors if name not in shapes), None):
        raise ValueError(f"the model has no place for tensor {extra!r}")
    home, config = _Home.own(), policy.config
    for name in shapes:
        place = _Place.of(name, config)
        if place.stage == home.stage:
            _fill(place.views(policy, select), place.part(tensors[name], home, config))
    if policy.post_process and not policy.pre_process and policy.share_embeddings_and_output_weights:
        name = "model.embed_tokens.weight"
        _fill([select(policy.head_weight())], _Place.of(name, config).part(tensors[name], home, config))


def _fill(views: Sequence[Tensor], part: Tensor) -> None:
    for view, one in zip(views, [part] if len(views) == 1 else part, strict=True):
        view.copy_(one.reshape(view.shape))


def export(policy: Policy, hf_config: Any) -> Iterator[tuple[str, Tensor | None]]:
    """Each tensor of `metas` by its name: the whole one on global rank 0, None elsewhere.

    All ranks together, each to the end. One tensor at a time moves to rank 0, on the device of the weights; a caller
    that keeps none needs no more memory than for the largest.
    """
    return _gather(policy, metas(hf_config), lambda tensor: tensor.detach())


def export_values(policy: Policy, select: Select, *, buffers: bool = False) -> Iterator[tuple[str, Tensor | None]]:
    """The same for another tensor of each parameter's shape, such as its gradient, and on request the buffers. All
    ranks that hold a parameter `select` it at the same time, whoever sends it."""
    return _gather(policy, metas(policy.hf_config, buffers=buffers), select)


class _Home(NamedTuple):
    """Which part of the model a rank holds, as its ranks in Megatron's groups."""

    stage: int
    tensor: int
    expert: int
    expert_tensor: int

    @classmethod
    def own(cls) -> _Home:
        return cls(
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            tensor=parallel_state.get_tensor_model_parallel_rank(),
            expert=parallel_state.get_expert_model_parallel_rank(),
            expert_tensor=parallel_state.get_expert_tensor_parallel_rank(),
        )

    @classmethod
    def every(cls, device: torch.device) -> list[_Home]:
        """Of all ranks of the run."""
        own = torch.tensor(cls.own(), device=device)
        out = own.new_empty(dist.get_world_size() * len(own))
        dist.all_gather_into_tensor(out, own)
        return [cls(*row) for row in out.view(-1, len(own)).tolist()]


class _Place(NamedTuple):
    """Where one of Hugging Face's parameters lies."""

    stage: int
    kind: Kind
    names: list[str]
    """Megatron's, on that stage; one, or one per expert of a rank."""

    @classmethod
    def of(cls, name: str, config: Any) -> _Place:
        stages = config.pipeline_model_parallel_size
        match = _LAYER.fullmatch(name)
        theirs, kind = (LATENT if config.multi_latent_attention else TABLE)[match[2] if match else name]
        if match is None:
            return cls(0 if theirs.startswith("embedding") else stages - 1, kind, [theirs])
        layer = int(match[1])
        stage = 0
        while layer >= (count := get_num_layers_to_build(config, None, stage)):
            layer, stage = layer - count, stage + 1
        experts = config.num_moe_experts // config.expert_model_parallel_size if kind.experts else 1
        return cls(stage, kind, [f"decoder.layers.{layer}.{theirs.format(expert)}" for expert in range(experts)])

    def part(self, whole: Tensor, home: _Home, config: Any) -> Tensor:
        """A rank's part of the whole tensor, as a view."""
        cut, size, index = self.kind.cut, config.tensor_model_parallel_size, home.tensor
        if self.kind.experts:
            whole = whole.chunk(config.expert_model_parallel_size)[home.expert]
            size, index = config.expert_tensor_parallel_size, home.expert_tensor
        if cut is None:
            return whole
        if self.kind.halves:
            whole, cut = whole.unflatten(cut, (2, -1)), cut + 1
        return whole.chunk(size, cut)[index]

    def views(self, policy: Policy, select: Select) -> list[Tensor]:
        """This rank's own part, as views of Megatron's tensors; one for each of `names`."""
        if self.kind.buffer:
            return [policy.get_buffer(name) for name in self.names]
        return [self.kind.fused(select(policy.get_parameter(name)), policy.config) for name in self.names]

    def holders(self, homes: Sequence[_Home]) -> dict[int, _Home]:
        """The ranks whose parts are the whole, the first of those that hold the same."""
        found: dict[tuple[int, ...], int] = {}
        for rank, home in enumerate(homes):
            part = home[2:] if self.kind.experts else (home.tensor,)
            if home.stage == self.stage:
                found.setdefault(() if self.kind.cut is None else part, rank)
        return {rank: homes[rank] for rank in found.values()}


@torch.no_grad()
def _gather(
    policy: Policy, shapes: Mapping[str, tuple[int, ...]], select: Select
) -> Iterator[tuple[str, Tensor | None]]:
    like = select(next(policy.parameters())).new_empty(0)
    # all ranks start together: the first messages between two of them must not be a group's first
    homes = _Home.every(like.device)
    for name, shape in shapes.items():
        place = _Place.of(name, policy.config)
        yield name, _collect(policy, place, homes, shape, select, like.float() if place.kind.buffer else like)


def _collect(
    policy: Policy, place: _Place, homes: Sequence[_Home], shape: tuple[int, ...], select: Select, like: Tensor
) -> Tensor | None:
    """The whole tensor on rank 0, None elsewhere."""
    rank = dist.get_rank()
    holders = place.holders(homes)
    # on every rank of the stage, since `select` may be a collective of those that hold the same
    views = place.views(policy, select) if place.stage == homes[rank].stage else []
    if rank and rank not in holders:
        return None
    mine = torch.empty(0)
    if rank in holders:
        mine = torch.stack(views) if place.kind.experts else views[0].contiguous()
        assert mine.dtype == like.dtype
    if rank:
        _message(dist.isend, mine, 0)
        return None
    whole = like.new_empty(shape)
    for holder, home in holders.items():
        part = place.part(whole, home, policy.config)
        if holder == rank:
            part.copy_(mine.view(part.shape))
        elif part.is_contiguous():
            _message(dist.irecv, part, holder)
        else:
            received = torch.empty_like(part, memory_format=torch.contiguous_format)
            _message(dist.irecv, received, holder)
            part.copy_(received)
    return whole


def _message(move: Callable[..., Any], tensor: Tensor, peer: int) -> None:
    # in a batch, NCCL uses the group's own connections, and does not make one for each pair
    for work in dist.batch_isend_irecv([dist.P2POp(move, tensor, peer)]):
        work.wait()
