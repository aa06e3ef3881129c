from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import FAMILIES, tiny_config, tiny_model
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.kernels.attention import NAME
from miles_spec.models import check_supported
from miles_spec.widen import MULTIPLE, mlp_width, widen, widen_to


def _logits(model: PreTrainedModel) -> torch.Tensor:
    model.set_attn_implementation("eager")
    ids = torch.tensor([[1, 5, 60, 17, 17, 3, 42, 9]])
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_same_function_in_float64(family: str) -> None:
    model = tiny_model(family, torch.float64)
    wide = widen(model, 112)
    assert wide.num_parameters() > model.num_parameters()
    expected, got = _logits(model), _logits(wide)
    assert (got - expected).abs().max() / expected.abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_its_configuration_says(family: str) -> None:
    """A model built from the widened configuration takes the widened weights and computes the same."""
    wide = widen(tiny_model(family), 80)
    assert wide.config.intermediate_size == 80
    built = AutoModelForCausalLM.from_config(wide.config).eval()
    built.load_state_dict(wide.state_dict(), strict=True)
    torch.testing.assert_close(_logits(built), _logits(wide))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_our_engines_take_it(family: str) -> None:
    """The configuration is shared as before: `check_supported` switches attention."""
    check_supported(widen(tiny_model(family), 64))


def test_the_model_given_stays_as_it_is() -> None:
    model = tiny_model()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    widen(model, 64)
    assert model.config.intermediate_size == 48
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_widened_model_trains_as_the_small_one() -> None:
    """Added columns get no gradient, so the old ones get what they would have had."""
    small = tiny_model(dtype=torch.float64)
    wide = widen(small, 1072)
    gate = wide.base_model.layers[0].mlp.gate_proj.weight
    assert gate[48:].std().item() == pytest.approx(gate[:48].std().item(), rel=0.05)
    ids = torch.tensor([[1, 5, 60, 17]])
    for model in (small, wide):
        model.set_attn_implementation("eager")
        model(ids, labels=ids, use_cache=False).loss.backward()
    old = dict(small.named_parameters())
    for name, parameter in wide.named_parameters():
        rows = tuple(slice(0, size) for size in old[name].shape)
        torch.testing.assert_close(parameter.grad[rows], old[name].grad, rtol=1e-9, atol=1e-12)
        added = parameter.grad.clone()
        added[rows] = 0
        assert not added.any(), name


def test_the_same_each_time() -> None:
    one, two = (widen(tiny_model(), 64).state_dict() for _ in range(2))
    assert all(torch.equal(p, two[n]) for n, p in one.items())


def test_a_draft_starts_from_an_old_layer() -> None:
    model = tiny_model()
    wide = widen(model, 64)
    head = DraftHead.attach(wide, EAGLE, generator=torch.Generator().manual_seed(0))
    assert head.layer.mlp.gate_proj.out_features == 64
    old = model.base_model.layers[-1].self_attn.o_proj.weight
    torch.testing.assert_close(head.layer.self_attn.o_proj.weight, old * 0.01)


@pytest.mark.parametrize("family_bias", [("llama", {}), ("llama", {"mlp_bias": True}), ("qwen2", {})])
def test_parameter_count_is_as_asked(family_bias: tuple[str, dict[str, object]]) -> None:
    family, more = family_bias
    model = AutoModelForCausalLM.from_config(tiny_config(family, **more), attn_implementation=NAME)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(model.config)
    for asked in (200_000, 1_000_000):
        wide = widen_to(model, asked)
        assert mlp_width(shapes, asked) == wide.config.intermediate_size
        assert wide.config.intermediate_size % MULTIPLE == 0
        column = 2 * (3 * 32 + 2 * bool(more))  # two layers
        assert abs(wide.num_parameters() - asked) <= column * MULTIPLE / 2
        assert sum(p.numel() for p in wide.parameters()) == wide.num_parameters()


def test_barely_more_parameters_leave_the_width() -> None:
    model = tiny_model()
    assert widen_to(model, model.num_parameters() + 1).config.intermediate_size == 48


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: widen(m, 32), "intermediate_size is 32, but the model has 48"),
        (lambda m: widen_to(m, 1000.0), "to 1000 parameters: it has [0-9]+ already"),
    ],
)
def test_a_model_only_grows(call, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        call(tiny_model())


def test_layers_that_are_built_otherwise_are_refused() -> None:
    config = tiny_config("mixtral", num_local_experts=2)
    with pytest.raises(ValueError, match=r"mixtral: a layer has no linear mlp\.gate_proj"):
        widen(AutoModelForCausalLM.from_config(config), 64)
