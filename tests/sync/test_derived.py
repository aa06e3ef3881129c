"""What a model derives from its weights follows every push, or the push fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from fakes import flip_bit
from miles_spec.sync.digest import digests
from miles_spec.sync.placement import Placement
from miles_spec.types import TensorMeta

ROWS, COLUMNS = 6, 4


class Attention(nn.Module):
    """As SGLang's multi-head latent attention: a weight, what is made of its halves, and what is not made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ROWS, COLUMNS), requires_grad=False)
        self.w_kc: Tensor | None = None
        self.w_vc: Tensor | None = None
        self.scale = torch.ones(3)
        self.alias = self.weight.data[1:]


class Model(nn.Module):
    """`derive` is what happens after loading."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.Parameter(torch.ones(COLUMNS), requires_grad=False)
        self.derive: Callable[[Attention], None] = split
        self.derived = 0

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in named:
            if name in parameters:
                parameters[name].data.copy_(tensor)
        self.post_load_weights(names=[])

    def post_load_weights(self, names: object = None) -> None:
        self.derived += 1
        self.derive(self.attention)


def split(layer: Attention) -> None:
    k, v = layer.weight.split(ROWS // 2)
    for name, values in (("w_kc", k.T.contiguous().T), ("w_vc", 2 * v)):
        kept = getattr(layer, name)
        if kept is None:
            setattr(layer, name, values)
        else:
            kept.copy_(values)


SHAPES = {"attention.weight": (ROWS, COLUMNS), "norm": (COLUMNS,)}
METAS = {name: TensorMeta(shape=shape, dtype="float32") for name, shape in SHAPES.items()}


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def push(placement: Placement, seed: int) -> dict[str, Tensor]:
    """Raises what the digests raise."""
    sent = weights(seed)
    for item in sent.items():
        placement.load([item])
    assert placement.digests() == digests(sent.items())
    return sent


def learned(model: nn.Module, owner: nn.Module | None = None) -> Placement:
    placement = Placement.learn(model, METAS, owner)
    assert placement.faults == ()
    return placement


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_derived_follows_every_push(there: bool, mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        model = Model()
        layer = model.attention
        if there:
            model.post_load_weights()
        placement = learned(model)
        assert placement._derived.names == ("attention.w_kc", "attention.w_vc")
        places = layer.w_kc.data_ptr(), layer.w_vc.data_ptr()  # type: ignore[union-attr]
        for seed in (1, 2, 2):
            weight = push(placement, seed)["attention.weight"]
            assert torch.equal(layer.w_kc, weight[: ROWS // 2])  # type: ignore[arg-type]
            assert torch.equal(layer.w_vc, 2 * weight[ROWS // 2 :])  # type: ignore[arg-type]
        assert places == (layer.w_kc.data_ptr(), layer.w_vc.data_ptr())  # type: ignore[union-attr]
        assert torch.equal(layer.scale, torch.ones(3)) and torch.equal(layer.alias, weight[1:])


def test_it_is_derived_once_for_a_push_and_not_for_each_tensor() -> None:
    model = Model()
    placement = learned(model)
    assert model.derived == 3  # to have it, and with other weights, and back
    placement.load(list(weights(1).items()))
    assert model.derived == 3
    placement.digests()
    assert model.derived == 5


def test_a_learned_model_is_learned_again() -> None:
    """With the same random numbers as the first time."""
    model = Model()
    learned(model)
    assert learned(model)._derived.names == ("attention.w_kc", "attention.w_vc")


def half(layer: Attention) -> None:
    layer.w_kc[:1].copy_(layer.weight[:1])  # type: ignore[index]


@pytest.mark.parametrize("derive", [lambda _: None, half], ids=["not at all", "in part"])
def test_what_is_no_longer_derived_is_noticed(derive: Callable[[Attention], None]) -> None:
    model = Model()
    placement = learned(model)
    push(placement, 1)
    model.derive = derive
    with pytest.raises(ValueError, match=r"did not derive all of 'attention.w_kc' from the weights that were loaded"):
        push(placement, 2)
    model.derive = split
    push(placement, 3)


def test_what_was_derived_and_has_changed_since_is_derived_anew() -> None:
    model = Model()
    placement = learned(model)
    sent = push(placement, 1)
    flip_bit(model.attention.w_vc, 3)  # type: ignore[arg-type]
    assert placement.digests() == digests(sent.items())
    assert torch.equal(model.attention.w_vc, 2 * sent["attention.weight"][ROWS // 2 :])  # type: ignore[arg-type]


def anew(layer: Attention) -> None:
    layer.w_kc = layer.weight[: ROWS // 2].clone()


def test_what_is_derived_in_new_memory_each_time_is_refused() -> None:
    """Captured CUDA graphs would go on reading the old one."""
    model = Model()
    model.derive = anew
    assert Placement.learn(model, METAS).faults == (
        "the engine gives 'attention.w_kc' new memory each time it derives it from its weights",
    )
    model = Model()
    placement = learned(model)
    model.derive = anew
    with pytest.raises(ValueError, match=r"has moved 'attention.w_kc', which it derives from its weights; learn again"):
        push(placement, 1)


def test_weights_that_are_changed_after_loading_are_refused() -> None:
    model = Model()
    model.derive = lambda _: model.norm.data.mul_(2)  # type: ignore[assignment, return-value]
    assert Placement.learn(model, METAS).faults == (
        "the engine changes 'norm' after it has loaded it, in its post_load_weights",
    )


def test_a_step_that_fails_is_named() -> None:
    model = Model()
    placement = learned(model)

    def fail(_: Attention) -> None:
        raise KeyError("kv_b_proj")

    model.derive = fail
    with pytest.raises(ValueError, match="the engine's post_load_weights fails: KeyError: 'kv_b_proj'"):
        push(placement, 1)
    assert Placement.learn(model, METAS).faults == ("the engine's post_load_weights fails: KeyError: 'kv_b_proj'",)


def test_the_step_of_a_draft_leaves_its_target_alone() -> None:
    target, draft = Model(), Model()
    draft.norm = target.norm
    places = learned(target)
    sent = push(places, 1)
    seen = []
    draft.derive = lambda layer: (seen.append(target.norm.clone()), split(layer))  # type: ignore[func-returns-value, assignment, return-value]
    own = {name: meta for name, meta in METAS.items() if name != "norm"}
    assert Placement.learn(draft, own, target).faults == ()
    assert seen and all(torch.equal(norm, sent["norm"]) for norm in seen)
    assert places.digests() == digests(sent.items())
