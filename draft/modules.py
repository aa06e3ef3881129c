"""`DraftHead`: a decoder layer, or one for each depth, that guesses on from a token and a hidden state of the target.

Invariant: it holds nothing of the target. Embedding, hidden states and, unless the family has its own, the LM head come
from the caller, detached, and the tensors of `export_names` are exactly those that an engine is sent, under the names
there.

Dimensions: `B` batch, `q` query tokens, `H` hidden, `S` width of the target's states that it reads (`H` or `3H`), `V`
the target's vocabulary, `Vd` the draft's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PretrainedConfig, PreTrainedModel

from miles_spec.draft.fresh import fill
from miles_spec.draft.spec import DraftSpec
from miles_spec.kernels.attention import NAME, Attend

OWN_LAYERS = {"llama": ("llama",), "plain": ("llama", "mistral", "qwen2")}
"""`DraftSpec.layer` to the target's model types whose own layer it is; any other target's draft has a Llama's."""

EXPERTS: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "mlp_layer_types": ["sparse"],
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
"""Fields that say which layers of a model have experts, as they say it of the only one."""


class DraftHead(nn.Module):
    """The draft of one target model.

    `enter` brings the target's states to the draft's size; `forward` maps embeddings of the newest tokens and states
    (entered ones at depth 1, its own afterwards) to the states of the next depth and to those that the LM head turns
    into logits. With several `layers`, each depth has one of its own, with norms and `fc`; depths beyond them apply the
    last one again. Parameters may be made on any device, `meta` included; the rotary table and the vocabulary always
    hold their values.
    """

    vocab_ids: Tensor | None
    """`[Vd]` int64 ascending, the target's token ids that the draft can propose; None for all."""
    to_draft: Tensor
    """`[V]` int64, a token's index in the draft's vocabulary, -1 outside it."""
    fresh: bool
    """Whether no data has touched its weights yet, as `fill` leaves them."""
    layer: Any
    fc: nn.Linear
    embed_norm: nn.Module
    hidden_norm: nn.Module
    norm: nn.Module

    def __init__(
        self,
        spec: DraftSpec,
        target_config: PretrainedConfig,
        vocab_ids: Tensor | None = None,
        aux_layers: tuple[int, ...] = (),
        layer_config: PretrainedConfig | None = None,
        layers: int = 1,
    ) -> None:
        """`aux_layers` are the target's layers, counted from 0, after which a family that reads such states reads
        them; none: `default_aux_layers`. `layer_config` describes the decoder layer of a draft from elsewhere; by
        default it is of the target's sizes. Raises `ValueError` for a vocabulary or layers that cannot be."""
        super().__init__()
        if layers < 1 or (layers > 1 and not spec.layered):
            most = "at least one layer" if spec.layered else "one layer"
            raise ValueError(f"a draft of family {spec.family!r} has {most}, not {layers}")
        self.spec, self.fresh = spec, False
        self.target_type: str = target_config.model_type
        self.config = _layer_config(spec, target_config, layer_config)
        self.aux_layers = _aux_layers(spec, target_config, aux_layers)
        with torch.device("meta"):
            blank = AutoModel.from_config(self.config)
        size = self.config.hidden_size
        self._build(self, blank)
        self.deeper = nn.ModuleList(nn.Module() for _ in range(layers - 1))
        for part in self.deeper:
            self._build(part, blank)
        with torch.device("cpu"):
            self.rotary = type(blank.rotary_emb)(self.config)
            # some families have a table for each kind of layer
            by_kind = "layer_type" in signature(type(self.rotary).forward).parameters
            self._rotated = {"layer_type": self.config.layer_types[0]} if by_kind else {}
            to_draft = _index(vocab_ids, target_config.vocab_size)
        drafted = target_config.vocab_size if vocab_ids is None else len(vocab_ids)
        self.lm_head = nn.Linear(size, drafted, bias=False) if spec.own_head else None
        self.register_buffer("vocab_ids", vocab_ids)
        self.register_buffer("to_draft", to_draft, persistent=False)

    def _build(self, part: Any, blank: Any) -> None:
        """Gives `part` what each depth has of its own: a layer like those of the model `blank`, norms, and `fc`."""
        spec, size = self.spec, self.config.hidden_size
        part.layer = type(blank.layers[0])(self.config, 0)
        if not spec.input_norm:
            part.layer.input_layernorm = nn.Identity()
        if spec.joins == "projection":
            part.fc = nn.Linear(2 * size, size, bias=spec.fc_bias)
        else:
            part.fc = nn.Linear(len(self.aux_layers) * size, size, bias=spec.fc_bias)
            for name in ("q_proj", "k_proj", "v_proj"):
                narrow = getattr(part.layer.self_attn, name)
                wide = nn.Linear(2 * size, narrow.out_features, bias=narrow.bias is not None)
                setattr(part.layer.self_attn, name, wide)

        def norm(wanted: bool) -> nn.Module:
            return type(blank.norm)(size, eps=self.config.rms_norm_eps) if wanted else nn.Identity()

        part.embed_norm, part.hidden_norm = norm(spec.part_norms), norm(spec.part_norms)
        part.norm = norm(spec.final_norm)

    @classmethod
    def attach(
        cls,
        target_model: PreTrainedModel,
        spec: DraftSpec,
        vocab_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        layers: int = 1,
    ) -> DraftHead:
        """A fresh draft for `target_model`, on its device and in its dtype; the same for the same generator state.

        See `miles_spec.draft.fresh` for what it starts as.
        """
        head = cls(spec, target_model.config, vocab_ids, layers=layers)
        fill(head, target_model, generator or torch.Generator())
        head.fresh = True
        parameter = next(target_model.parameters())
        return head.to(parameter.device, parameter.dtype)

    @property
    def layers(self) -> int:
        """How many depths have a layer of their own."""
        return 1 + len(self.deeper)

    @property
    def parts(self) -> tuple[Any, ...]:
        """What each depth has of its own (`layer`, `fc` and norms), by depth up to `layers`."""
        return (self, *self.deeper)

    @property
    def width(self) -> int:
        """`S`, of the target's states that it reads."""
        return self.config.hidden_size * (len(self.aux_layers) or 1)

    def enter(self, states: Tensor) -> Tensor:
        """`[.., H]` states of depth 1 from the target's `[.., S]`."""
        return self.fc(states) if self.spec.joins == "attention" else states

    def forward(
        self, embed: Tensor, hidden: Tensor, positions: Tensor, attend: Attend, depth: int = 1
    ) -> tuple[Tensor, Tensor]:
        """`[B, q, H]` twice, for the next depth and for the LM head, from `embed` and `hidden` `[B, q, H]` and rotary
        `positions` `[B, q]` int64, at `depth`, counted from 1."""
        part = self.parts[min(depth, self.layers) - 1]
        x = self.join(embed, hidden, positions, depth)
        if self.spec.joins == "projection":
            x = part.fc(x)
            rotary = self.rotary(x, positions, **self._rotated)
            state = part.layer(
                x, attention_mask=None, position_ids=positions, position_embeddings=rotary, attend=attend
            )
        else:
            rotary = self.rotary(hidden, positions, **self._rotated)
            mixed, _ = part.layer.self_attn(
                hidden_states=x, attention_mask=None, position_embeddings=rotary, attend=attend
            )
            state = hidden + mixed
            state = state + part.layer.mlp(part.layer.post_attention_layernorm(state))
        out = part.norm(state)
        return (state if self.spec.feeds == "pre_norm" else out), out

    def join(self, embed: Tensor, hidden: Tensor, positions: Tensor, depth: int = 1) -> Tensor:
        """`[B, q, 2H]` of what `forward` is given: token and state side by side, as `fc` or the attention reads
        them."""
        part = self.parts[min(depth, self.layers) - 1]
        if not self.spec.first_embed:
            embed = embed.masked_fill((positions == 0)[..., None], 0)
        both = {"embed": part.embed_norm(embed), "hidden": part.hidden_norm(hidden)}
        return torch.cat([both[name] for name in self.spec.concat], dim=-1)

    def head_rows(self, target_head_weight: Tensor) -> Tensor:
        """`[Vd, H]` the LM head of the draft: its own, or detached rows of the target's `[V, H]`, a copy if reduced."""
        return self.target_rows(target_head_weight) if self.lm_head is None else self.lm_head.weight

    def target_rows(self, target_head_weight: Tensor) -> Tensor:
        """`[Vd, H]` detached rows of the target's LM head `[V, H]` for the draft's vocabulary; a copy if reduced."""
        weight = target_head_weight.detach()
        return weight if self.vocab_ids is None else weight[self.vocab_ids]

    @property
    def export_names(self) -> dict[str, str]:
        """Name in `state_dict` of each tensor of a checkpoint to its name there.

        Those are the parameters and, of a layer with experts, what its router adds to choose by, which is not trained;
        the vocabulary has other forms.
        """
        return {name: self.spec.name_of(name) for name in self.state_dict() if name != "vocab_ids"}

    def exported(self) -> dict[str, Tensor]:
        """All that is trained, under its names in a checkpoint; detached, not copied."""
        return {self.spec.name_of(name): parameter.detach() for name, parameter in self.named_parameters()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DraftHead:
        # rotary frequencies must stay float32 and filled in: in half precision they are wrong at long positions
        kept = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self.rotary, name, value.to(getattr(self.rotary, name).device))
        return self


def default_aux_layers(layers: int) -> tuple[int, ...]:
    """The layers of a target of that many, counted from 0, whose outputs are read: near its start, its middle, its end.

    From 7 layers on those of EAGLE-3's public checkpoints. Raises `ValueError` below 4, where there are no three.
    """
    if layers < 4:
        raise ValueError(f"a draft that reads three layers below the last needs a target of at least 4, not {layers}")
    return (1, layers // 2 - 1, layers - 4) if layers >= 7 else (0, layers // 2 - 1, layers - 2)


def _aux_layers(spec: DraftSpec, config: PretrainedConfig, given: tuple[int, ...]) -> tuple[int, ...]:
    if spec.reads != "aux":
        if given:
            raise ValueError(f"a draft of family {spec.family!r} reads no auxiliary layers, and {given} are named")
        return ()
    layers = config.num_hidden_layers
    chosen = given or default_aux_layers(layers)
    # in this order they lie side by side, and engines cannot read the last layer's output
    if len(chosen) != 3 or sorted(set(chosen)) != list(chosen) or chosen[0] < 0 or chosen[-1] > layers - 2:
        raise ValueError(f"auxiliary layers must be three of 0..{layers - 2} in ascending order, not {chosen}")
    return chosen


def _layer_config(spec: DraftSpec, target_config: PretrainedConfig, own: PretrainedConfig | None) -> Any:
    """The configuration of a model of just the draft's layer, which calls our attention."""
    config: Any = own or target_config
    if own is None and config.model_type not in OWN_LAYERS.get(spec.layer, (config.model_type,)):
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        config = LlamaConfig(
            **{name: getattr(config, name) for name in sizes},
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=_whole_rotary(config.rope_parameters),
        )
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] if "full_attention" in config.layer_types else config.layer_types[-1:]
    # where some layers have experts and others not, this one has
    for name, value in EXPERTS.items():
        if hasattr(config, name):
            setattr(config, name, copy.copy(value))
    if spec.joins == "attention":  # as in all checkpoints and engines, whatever the target has
        config.attention_bias = config.mlp_bias = False
    config._attn_implementation = NAME
    return config


def _whole_rotary(parameters: dict[str, Any]) -> dict[str, Any]:
    """A target's rotary parameters for a Llama's layer, which rotates all of a head."""
    found = parameters.get("full_attention", parameters)  # some families have one set for each kind of layer
    return {name: copy.deepcopy(value) for name, value in found.items() if name != "partial_rotary_factor"}


def _index(vocab_ids: Tensor | None, size: int) -> Tensor:
    """`[V]` inverse of the draft's vocabulary."""
    if vocab_ids is None:
        return torch.arange(size)
    ids = vocab_ids.cpu()
    if not len(ids) or ids[0] < 0 or ids[-1] >= size or (ids.diff() <= 0).any():
        raise ValueError(f"the draft's vocabulary must be ascending token ids, each once, within 0..{size - 1}")
    return torch.full((size,), -1).scatter_(0, ids, torch.arange(len(ids)))
