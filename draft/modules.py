"""`DraftHead`: one decoder layer of the target's own kind behind a projection that fuses a token with a hidden state.

Invariant: it holds nothing of the target. Embedding, LM head and hidden states come from the caller, detached, and its
parameters are exactly the tensors that an engine is sent, under the names of `export_names`.

Dimensions: `B` batch, `q` query tokens, `H` hidden, `V` the target's vocabulary, `Vd` the draft's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from miles_spec.draft.spec import DraftSpec
from miles_spec.kernels.attention import NAME, Attend


class DraftHead(nn.Module):
    """The draft of one target model.

    `forward` maps embeddings of the newest tokens and hidden states (the target's at depth 1, its own afterwards) to
    states that the target's LM head turns into logits. Parameters may be made on any device, `meta` included; the
    rotary table and the vocabulary always hold their values.
    """

    vocab_ids: Tensor | None
    """`[Vd]` int64 ascending, the target's token ids that the draft can propose; None for all."""
    to_draft: Tensor
    """`[V]` int64, a token's index in the draft's vocabulary, -1 outside it."""

    def __init__(self, spec: DraftSpec, target_config: PretrainedConfig, vocab_ids: Tensor | None = None) -> None:
        """Raises `ValueError` for a family or a vocabulary that this module cannot hold."""
        super().__init__()
        if spec.hidden != "post_norm" or spec.final_norm or not spec.shared_head:
            raise ValueError(
                f"draft family {spec.family!r} is not supported: it must read states after the final norm, "
                "have no norm of its own before the LM head, and share the target's"
            )
        self.spec = spec
        self.config = _layer_config(target_config)
        with torch.device("meta"):
            blank = AutoModel.from_config(self.config)
        size = self.config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=spec.fc_bias)
        self.layer = type(blank.layers[0])(self.config, 0)
        if not spec.input_norm:
            self.layer.input_layernorm = nn.Identity()
        with torch.device("cpu"):
            self.rotary = type(blank.rotary_emb)(self.config)
            to_draft = _index(vocab_ids, self.config.vocab_size)
        self.register_buffer("vocab_ids", vocab_ids)
        self.register_buffer("to_draft", to_draft, persistent=False)

    @classmethod
    def attach(
        cls,
        target_model: PreTrainedModel,
        spec: DraftSpec,
        vocab_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DraftHead:
        """A fresh draft for `target_model`, on its device and in its dtype; the same for the same generator state.

        The decoder layer is a copy of the target's last one with its two output projections scaled by 0.01, and `fc`
        mixes 0.7 of the embedding, brought to unit RMS, with 0.3 of the hidden state (plus normal noise of 0.002). So
        it starts as a smooth function of the newest token and the target's state, with the target's features at hand.
        Unscaled, the copied layer's outputs are sized for the residual stream before the final norm,
        and with an identity on the hidden state they start the draft far from the target.
        """
        head = cls(spec, target_model.config, vocab_ids)
        weights = target_model.base_model.layers[-1].state_dict()
        kept = {n: w for n, w in weights.items() if spec.input_norm or not n.startswith("input_layernorm.")}
        head.layer.load_state_dict(kept)
        embed_rms = target_model.get_input_embeddings().weight.detach().float().square().mean().sqrt().cpu()
        eye = torch.eye(head.config.hidden_size)
        halves = {"embed": 0.7 / embed_rms * eye, "hidden": 0.3 * eye}
        mix = torch.cat([halves[name] for name in spec.concat], dim=1)
        with torch.no_grad():
            head.fc.weight.copy_(mix + 0.002 * torch.randn(mix.shape, generator=generator))
            if spec.fc_bias:
                head.fc.bias.zero_()
            for projection in (head.layer.self_attn.o_proj, head.layer.mlp.down_proj):
                for weight in projection.parameters():
                    weight.mul_(0.01)
        parameter = next(target_model.parameters())
        return head.to(parameter.device, parameter.dtype)

    def forward(self, embed: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`[B, q, H]` draft states from `embed` and `hidden` `[B, q, H]` and rotary `positions` `[B, q]` int64."""
        halves = {"embed": embed, "hidden": hidden}
        x = self.fc(torch.cat([halves[name] for name in self.spec.concat], dim=-1))
        rotary = self.rotary(x, positions)
        return self.layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary, attend=attend)

    def head_rows(self, target_head_weight: Tensor) -> Tensor:
        """`[Vd, H]` detached rows of the target's LM head `[V, H]` for the draft's vocabulary; a copy if reduced."""
        weight = target_head_weight.detach()
        return weight if self.vocab_ids is None else weight[self.vocab_ids]

    @property
    def export_names(self) -> dict[str, str]:
        """Name of each parameter here to its name in an exported checkpoint; the vocabulary is not a parameter."""
        names = [name for name, _ in self.named_parameters()]
        return {n: self.spec.layer_prefix + n.removeprefix("layer.") if n.startswith("layer.") else n for n in names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DraftHead:
        # rotary frequencies must stay float32 and filled in: in half precision they are wrong at long positions
        kept = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self.rotary, name, value.to(getattr(self.rotary, name).device))
        return self


def _layer_config(target_config: PretrainedConfig) -> Any:
    """The target's configuration, cut to one layer that calls our attention."""
    config = copy.deepcopy(target_config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:]
    config._attn_implementation = NAME
    return config


def _index(vocab_ids: Tensor | None, size: int) -> Tensor:
    """`[V]` inverse of the draft's vocabulary."""
    if vocab_ids is None:
        return torch.arange(size)
    ids = vocab_ids.cpu()
    if not len(ids) or ids[0] < 0 or ids[-1] >= size or (ids.diff() <= 0).any():
        raise ValueError(f"the draft's vocabulary must be ascending token ids, each once, within 0..{size - 1}")
    return torch.full((size,), -1).scatter_(0, ids, torch.arange(len(ids)))
