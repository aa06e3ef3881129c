"""Llama-shaped targets of about a given size with their drafts, all weights random: for measurements without a model.

Invariant: names and shapes are those that a server which starts from the exported folders is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from miles_spec.draft.export import export, export_target, served_tensors
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.types import Role

DTYPE = torch.bfloat16
SCALE = 0.02
"""Standard deviation of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """What does not depend on the number of layers."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int

    @property
    def embedding(self) -> int:
        """Parameters, tied with the head's."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        keys = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.intermediate + 2 * self.hidden


WIDTHS = {
    1e6: Width(hidden=64, intermediate=192, vocabulary=512, heads=4, kv_heads=2),
    0.1e9: Width(hidden=768, intermediate=2048, vocabulary=32000, heads=12, kv_heads=4),
    1e9: Width(hidden=2048, intermediate=8192, vocabulary=49152, heads=32, kv_heads=8),
    3e9: Width(hidden=2560, intermediate=9216, vocabulary=49152, heads=20, kv_heads=4),
    8e9: Width(hidden=4096, intermediate=14336, vocabulary=128256, heads=32, kv_heads=8),
}
"""By the size of a target that has it; of those, the one nearest to what is asked for is taken."""


class Drawn:
    """A target and its draft, by the names that are pushed; on one device at a time."""

    def __init__(self, target: dict[str, Tensor], draft: dict[str, Tensor]) -> None:
        self.target, self.draft = target, draft

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return next(iter(self.target.values())).device

    @property
    def parameters(self) -> int:
        """Of the target."""
        return sum(tensor.numel() for tensor in self.target.values())

    def roles(self) -> Iterator[tuple[Role, Mapping[str, Tensor]]]:
        """The target, then the draft."""
        yield "target", self.target
        yield "draft", self.draft

    def to(self, device: torch.device) -> None:
        """Moves all tensors, one at a time."""
        for named in (self.target, self.draft):
            for name in named:
                named[name] = named[name].to(device)

    def change(self) -> None:
        """Changes every tensor of the target, in place, to what it was never before."""
        for tensor in self.target.values():
            tensor.mul_(-2)  # exact, since only sign and exponent change


Shapes = dict[str, tuple[int, ...]]


def export_for(parameters: float, folder: Path) -> tuple[Shapes, Shapes]:
    """Writes the folders `target` and `draft` of a target of about `parameters` parameters, for a server to start from;
    returns the shapes of both. Raises `ValueError` for less than one parameter."""
    if parameters < 1:
        raise ValueError(f"a model needs parameters, and {parameters:g} are asked for")
    width = WIDTHS[min(WIDTHS, key=lambda size: abs(math.log(size / parameters)))]
    config = LlamaConfig(
        vocab_size=width.vocabulary,
        hidden_size=width.hidden,
        intermediate_size=width.intermediate,
        num_hidden_layers=max(1, round((parameters - width.embedding) / width.layer)),
        num_attention_heads=width.heads,
        num_key_value_heads=width.kv_heads,
        head_dim=width.hidden // width.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = DraftHead(EAGLE, config)
    export_target(model, _tokenizer(), folder / "target", dtype=DTYPE)
    export(head, folder / "draft", dtype=DTYPE)
    target = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return target, {name: tuple(t.shape) for name, t in served_tensors(head, torch.empty(0))}


def draw(shapes: tuple[Shapes, Shapes], device: torch.device) -> Drawn:
    """The weights themselves, made on `device` in `DTYPE`."""
    generator = torch.Generator(device).manual_seed(0)
    target, draft = (
        {
            name: torch.empty(shape, dtype=DTYPE, device=device).normal_(0.0, SCALE, generator=generator)
            for name, shape in named.items()
        }
        for named in shapes
    )
    return Drawn(target, draft)


def _tokenizer() -> PreTrainedTokenizerFast:
    """An end of text and a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<end>",
        eos_token="<end>",
        pad_token="<end>",
        clean_up_tokenization_spaces=False,
    )
