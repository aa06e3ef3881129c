from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import tiny_config, tiny_model
from miles_spec.draft import fresh
from miles_spec.draft.fresh import NOISE, QUIET, fill
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3, FAMILIES, MIMO, NEXTN, QWEN_MTP, DraftSpec
from miles_spec.kernels.attention import NAME

KINDS = ("llama", "qwen2", "qwen3", "gemma", "gemma3_text", "olmo2", "qwen3_moe", "glm4_moe", "deepseek_v3")


def _seed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(kind: str) -> Any:
    return tiny_model(kind, layers=4)


def _multiplies_by(norm: nn.Module, size: int) -> Tensor:
    """What `norm` makes of a vector of ones, but for its epsilon."""
    with torch.no_grad():
        return norm(1e3 * torch.ones(1, size))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_everything_is_filled_in_the_same_way_for_the_same_generator(spec: DraftSpec, kind: str) -> None:
    model = _model(kind)
    heads = [DraftHead(spec, model.config, torch.tensor([2, 7, 9])) for _ in range(3)]
    for head, seed in zip(heads, (1, 1, 2), strict=True):
        for name in head.export_names:
            head.state_dict()[name].fill_(torch.nan)
        fill(head, model, _seed(seed))
    a, b, c = (head.state_dict() for head in heads)
    assert all(tensor.isfinite().all() for tensor in a.values())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_the_layer_is_the_targets_last_with_quiet_outputs(spec: DraftSpec, kind: str) -> None:
    model = _model(kind)
    head = DraftHead.attach(model, spec, generator=_seed())
    last, own = model.model.layers[-1], head.layer.state_dict()
    theirs = last.state_dict()
    same = head.config.model_type == model.config.model_type
    if same:
        # a router's bias is a buffer
        assert own.keys() == {n for n in theirs if spec.input_norm or not n.startswith("input_layernorm")}
    fits = {n for n in own if n in theirs and own[n].shape == theirs[n].shape}
    assert len(fits) == len(own) - 3 * (spec is EAGLE3) if same else "post_attention_layernorm.weight" in fits
    for name in fits:
        assert own[name].data_ptr() != theirs[name].data_ptr()
        module = name.removesuffix(".weight")
        if module.endswith("norm"):
            a, b = (_multiplies_by(x.get_submodule(module), len(own[name])) for x in (head.layer, last))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        else:
            quiet = module.endswith(("o_proj", "down_proj"))
            assert torch.equal(own[name], theirs[name] * QUIET if quiet else theirs[name]), name


def test_every_layer_of_several_is_filled_as_one_alone() -> None:
    model = _model("qwen2")
    one, three = (DraftHead.attach(model, MIMO, generator=_seed(), layers=n) for n in (1, 3))
    for part in three.parts:
        for (name, tensor), other in zip(part.layer.state_dict().items(), one.layer.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), name
        for norm in ("embed_norm", "hidden_norm", "norm"):
            assert torch.equal(part.get_submodule(norm).weight, one.get_submodule(norm).weight)
        torch.testing.assert_close(part.fc.weight, one.fc.weight, rtol=0, atol=12 * NOISE)
    assert not torch.equal(three.parts[1].fc.weight, three.parts[2].fc.weight)


def test_a_draft_shares_no_memory_with_its_target() -> None:
    model = _model("llama")
    for spec in FAMILIES.values():
        theirs = {p.data_ptr() for p in model.parameters()}
        assert not theirs & {p.data_ptr() for p in DraftHead.attach(model, spec).parameters()}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_projections_that_take_both_read_the_state_as_the_targets_do(kind: str) -> None:
    """And of the token next to nothing: noise."""
    model = _model(kind)
    last = model.model.layers[-1]
    head = DraftHead.attach(model, EAGLE3, generator=_seed())
    for name in ("q_proj", "k_proj", "v_proj"):
        embed, hidden = head.layer.self_attn.get_submodule(name).weight.chunk(2, dim=1)
        assert torch.equal(hidden, last.self_attn.get_submodule(name).weight)
        assert 0.8 * NOISE < embed.std() < 1.2 * NOISE
    want = _multiplies_by(last.input_layernorm, 32)
    torch.testing.assert_close(_multiplies_by(head.hidden_norm, 32), want, rtol=1e-6, atol=0)
    thirds = head.fc.weight.chunk(3, dim=1)
    for part in thirds:
        torch.testing.assert_close(part, torch.eye(32) / 3, rtol=0, atol=6 * NOISE)
    assert not torch.equal(thirds[0], thirds[1])


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_norms(kind: str) -> None:
    """By what they multiply, whether their weight is that or that less one."""
    model = _model(kind)
    final = _multiplies_by(model.model.norm, 32)
    for spec in (EAGLE3, NEXTN, QWEN_MTP):
        head = DraftHead.attach(model, spec, generator=_seed())
        ones = torch.ones(32)
        torch.testing.assert_close(_multiplies_by(head.embed_norm, 32), ones)
        if spec is EAGLE3:
            # reads states from before the final norm
            torch.testing.assert_close(_multiplies_by(head.norm, 32), final, rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(_multiplies_by(head.hidden_norm, 32), ones)
            rms = final.square().mean().sqrt()
            torch.testing.assert_close(_multiplies_by(head.norm, 32), rms * ones, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [("embed", "hidden"), ("hidden", "embed")])
@pytest.mark.parametrize("base", [EAGLE, NEXTN], ids=["eagle", "nextn"])
def test_the_projection_mixes_token_and_state(base: DraftSpec, order: Any) -> None:
    model = _model("llama")
    head = DraftHead.attach(model, replace(base, concat=order), generator=_seed())
    rms = float(model.get_input_embeddings().weight.detach().square().mean().sqrt())
    want = {"embed": 0.7 / (1.0 if base.part_norms else rms) * torch.eye(32), "hidden": 0.3 * torch.eye(32)}
    torch.testing.assert_close(head.fc.weight, torch.cat([want[part] for part in order], dim=1), rtol=0, atol=6 * NOISE)
    if base.fc_bias:
        assert not head.fc.bias.any()


@pytest.mark.parametrize("ids", [None, [1, 5, 60]])
def test_a_head_of_its_own_starts_as_the_targets_rows(ids: list[int] | None) -> None:
    model = _model("llama")
    head = DraftHead.attach(model, EAGLE3, None if ids is None else torch.tensor(ids))
    weight = model.lm_head.weight
    rows = head.head_rows(weight)
    assert torch.equal(rows, weight if ids is None else weight[ids]) and rows is head.lm_head.weight
    assert rows.requires_grad and rows.data_ptr() != weight.data_ptr()
    assert not head.target_rows(weight).requires_grad


def test_what_has_nothing_to_be_copied_from_is_noise() -> None:
    """A Llama's projections for a target whose attention has others."""
    model = _model("deepseek_v3")
    head = DraftHead.attach(model, EAGLE3, generator=_seed())
    weight = head.layer.self_attn.q_proj.weight
    assert 0.9 * fresh.FRESH < weight.std() < 1.1 * fresh.FRESH
    assert weight.mean().abs() < 0.1 * fresh.FRESH


def test_experts_of_a_target_that_has_none_in_its_last_layer() -> None:
    config = tiny_config("glm4_moe", first_k_dense_replace=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    head = DraftHead(NEXTN, config)
    mlp = head.layer.mlp
    own = mlp.state_dict()
    for tensor in own.values():
        tensor.fill_(torch.nan)
    fill(head, model, _seed())
    assert not mlp.gate.e_score_correction_bias.any()
    assert 0.9 * fresh.FRESH < mlp.experts.gate_up_proj.std() < 1.1 * fresh.FRESH
    assert 0.9 * QUIET * fresh.FRESH < mlp.experts.down_proj.std() < 1.1 * QUIET * fresh.FRESH
    assert all(tensor.isfinite().all() for tensor in own.values())
