"""What a draft reads of its target, against the hidden states that transformers itself returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_model
from miles_spec.draft import states
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3
from miles_spec.kernels.attention import PackedAttention
from miles_spec.kernels.layout import PackedLayout

LENGTHS = [7, 4]


def _run(model: Any, head: DraftHead | None) -> tuple[Tensor, Tensor]:
    layout = PackedLayout.make(LENGTHS)
    ids = torch.arange(3, 3 + layout.tokens)[None]
    attend = PackedAttention(layout)
    return states.run(model.model, head, ids, position_ids=layout.positions[None], attend=attend, use_cache=False)


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _hidden_states(model: Any) -> tuple[Tensor, ...]:
    """Of transformers' own forward, a sequence at a time: before each layer, the last after the final norm."""
    model.config._attn_implementation = "eager"
    tokens = torch.arange(3, 3 + sum(LENGTHS)).split(LENGTHS)
    with torch.no_grad():
        parts = [model.model(ids[None], output_hidden_states=True, use_cache=False).hidden_states for ids in tokens]
    return tuple(torch.cat(layer, 1) for layer in zip(*parts, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3_moe"])
@pytest.mark.parametrize("layers", [(0, 1, 3), (1, 2, 3)])
def test_states_are_those_that_transformers_returns(kind: str, layers: tuple[int, ...]) -> None:
    model = tiny_model(kind, layers=5)
    hooks = _hooks(model)
    outs = {
        "post": _run(model, DraftHead(EAGLE, model.config)),
        "aux": _run(model, DraftHead(EAGLE3, model.config, aux_layers=layers)),
        "none": _run(model, None),
    }
    assert _hooks(model) == hooks
    every = _hidden_states(model)
    for hidden, _ in outs.values():
        # hooks only look on
        assert torch.equal(hidden, outs["none"][0])
        torch.testing.assert_close(hidden, every[-1], rtol=1e-4, atol=1e-4)
    assert outs["post"][1] is outs["post"][0] and outs["none"][1] is outs["none"][0]
    aux = torch.cat([every[n + 1] for n in layers], -1)
    assert outs["aux"][1].shape == (1, 11, 96)
    torch.testing.assert_close(outs["aux"][1], aux, rtol=1e-4, atol=1e-4)


def test_hooks_go_also_after_an_error() -> None:
    model = tiny_model("llama", layers=4)
    hooks = _hooks(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the last layer")

    fault = model.model.layers[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the last layer"):
        _run(model, DraftHead(EAGLE3, model.config))
    fault.remove()
    assert _hooks(model) == hooks


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny_model("llama", layers=4).requires_grad_(True)
    head = DraftHead(EAGLE3, model.config)
    results = []
    for on in (False, True):
        if on:
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
            model.train()
        calls: list[int] = []
        # before the forward, since recomputing stops as soon as it has what the backward needs
        count = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        hidden, read = _run(model, head)
        kept = read.detach().clone()
        model.zero_grad()
        hidden.square().sum().backward()
        # recomputing runs the layers again, and what was caught stays
        assert torch.equal(read, kept)
        assert len(calls) == 1 + on
        count.remove()
        results.append((hidden.detach(), kept, [p.grad for p in model.model.layers.parameters()]))
    plain, again = results
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[2], again[2], strict=True))
