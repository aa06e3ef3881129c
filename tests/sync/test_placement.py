"""Places of tensors in models that load as SGLang's do: fused, padded, sharded, shared; and ways to deceive."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from fakes import flip_bit
from miles_spec.sync.digest import digest, digests
from miles_spec.sync.placement import Placement
from miles_spec.types import TensorMeta

HIDDEN, VOCAB, PADDED, KV = 8, 10, 16, 4


class Served(nn.Module):
    """Embedding padded to 16 rows, one fused qkv, an output matrix cut by columns, a norm in float32, a bias to skip.

    `swap(name)` may send a tensor elsewhere, `drop` ignores names, `change` is applied to what is loaded. With `derive`
    it keeps the sum of each tensor too, so that it has to be asked for every push.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, dtype: torch.dtype = torch.bfloat16, *, derive: bool = False
    ) -> None:
        super().__init__()
        self.rank, self.world, self.derive = rank, world, derive
        self.sums: dict[str, Tensor] = {}
        self.embed = self._parameter(PADDED // world, HIDDEN, dtype=dtype)
        self.qkv = self._parameter((HIDDEN + 2 * KV) // world, HIDDEN, dtype=dtype)
        self.out = self._parameter(HIDDEN, HIDDEN // world, dtype=dtype)
        self.norm = self._parameter(HIDDEN, dtype=torch.float32)
        self.drop: set[str] = set()
        self.swap: Callable[[str], str] = lambda name: name
        self.change: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self.loads: list[list[str]] = []

    @staticmethod
    def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        named = list(named)
        self.loads.append([name for name, _ in named])
        for name, tensor in named:
            if name not in self.drop:
                self._load(self.swap(name), self.change(tensor))
                if self.derive:
                    self.sums[name] = tensor.sum()

    def _load(self, name: str, tensor: Tensor) -> None:
        if name == "embed.weight":
            rows = PADDED // self.world
            start = self.rank * rows
            count = max(0, min(rows, VOCAB - start))
            if count:
                self.embed[:count].data.copy_(tensor.narrow(0, start, count))
            self.embed[count:].data.fill_(0)
        elif name[0] in "qkv":
            sizes = {"q": HIDDEN // self.world, "k": KV // self.world, "v": KV // self.world}
            size = sizes[name[0]]
            start = sum(sizes[n] for n in "qkv"[: "qkv".index(name[0])])
            assert tensor.shape == (size * self.world, HIDDEN)
            self.qkv.data.narrow(0, start, size).copy_(tensor.narrow(0, self.rank * size, size))
        elif name == "out.weight":
            size = HIDDEN // self.world
            self.out.data.copy_(tensor.narrow(1, self.rank * size, size))
        elif name == "norm.weight":
            self.norm.data.copy_(tensor)


SHAPES = {
    "embed.weight": (VOCAB, HIDDEN),
    "q.weight": (HIDDEN, HIDDEN),
    "k.weight": (KV, HIDDEN),
    "v.weight": (KV, HIDDEN),
    "out.weight": (HIDDEN, HIDDEN),
    "norm.weight": (HIDDEN,),
}


def metas(shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: str = "bfloat16") -> dict[str, TensorMeta]:
    return {name: TensorMeta(shape=shape, dtype=dtype) for name, shape in shapes.items()}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(torch.float32 if "norm" in name else torch.bfloat16)
        for name, shape in SHAPES.items()
    }


def learned(model: nn.Module, **more: tuple[int, ...]) -> Placement:
    placement = Placement.learn(model, metas({**SHAPES, **more}))
    assert placement.faults == ()
    return placement


def faults(model: nn.Module, **arguments: object) -> str:
    return "\n".join(Placement.learn(model, metas(), **arguments).faults)  # type: ignore[arg-type]


def push(placement: Placement, named: Mapping[str, Tensor]) -> dict[str, str]:
    """In two buckets."""
    items = list(named.items())
    for bucket in (items[:2], items[2:]):
        placement.load(bucket)
    return placement.digests()


# What is learned


def test_served_dtypes_and_shapes() -> None:
    served = learned(Served()).served()
    assert served == {**metas(), "norm.weight": TensorMeta(shape=(HIDDEN,), dtype="float32")}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_digests_are_those_of_what_was_sent(mode: Callable[[], AbstractContextManager[None]]) -> None:
    with mode():
        model = Served()
        placement = learned(model)
        for seed in (1, 2):
            sent = weights(seed)
            assert push(placement, sent) == digests(sent.items())
    assert torch.equal(model.qkv[HIDDEN : HIDDEN + KV], sent["k.weight"])
    assert not model.embed[VOCAB:].any()


@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_of_a_sharded_model_vouches_for_its_slices(world: int) -> None:
    for rank in range(world):
        model = Served(rank, world)
        if rank * PADDED // world >= VOCAB:  # nothing but padding: no row of the embedding lies here
            assert faults(model) == "the engine has no place for tensor 'embed.weight'\n" + (
                "served tensor 'embed' is reached by no pushed tensor, or not in all its elements"
            )
            continue
        placement = learned(model)
        assert "not loaded" in placement.digests()["q.weight"]
        for seed in (1, 2):
            sent = weights(seed)
            assert push(placement, sent) == digests(sent.items())


def test_learning_scrambles_every_tensor_the_same_on_every_rank() -> None:
    model, again = Served(), Served()
    state = torch.get_rng_state()
    learned(model)
    learned(again)
    assert torch.equal(torch.get_rng_state(), state)  # the engine samples as if nothing had been learned
    for name, parameter in model.named_parameters():
        assert (parameter[:VOCAB] != 0).all()
        assert torch.equal(parameter, dict(again.named_parameters())[name])


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_only_copied_goes_straight_to_its_places(world: int) -> None:
    for rank in range(world):
        model, asked = Served(rank, world), Served(rank, world)
        placement, sent = learned(model), weights(1)
        model.loads.clear()
        assert push(placement, sent) == digests(sent.items())
        assert model.loads == []
        asked.load_weights(sent.items())
        for name, parameter in asked.named_parameters():
            assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_a_loader_that_does_more_than_copy_gets_every_push() -> None:
    model = Served(derive=True)
    placement, sent = learned(model), weights(1)
    model.loads.clear()
    assert push(placement, sent) == digests(sent.items())
    assert model.loads == [list(SHAPES)[:2], list(SHAPES)[2:]]  # whole buckets
    assert all(torch.equal(model.sums[name], tensor.sum()) for name, tensor in sent.items())


def test_only_tensors_with_more_than_copies_go_to_the_loader() -> None:
    class Mixed(Served):
        def _load(self, name: str, tensor: Tensor) -> None:
            super()._load(name, tensor)
            if name == "out.weight":
                self.inverse = -self.out

    model = Mixed()
    placement, sent = learned(model), weights(1)
    model.loads.clear()
    assert push(placement, sent) == digests(sent.items())
    assert model.loads == [["out.weight"]]
    assert torch.equal(model.inverse, -sent["out.weight"])


class Fused(Served):
    """Loads `a.weight` and `b.weight` in a row, once both have come in one call, as SGLang's DeepSeek-V3 does with
    `q_a_proj` and `kv_a_proj_with_mqa`. `join` puts them in the row."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self._parameter(5, HIDDEN, dtype=torch.bfloat16)
        self.join: Callable[[Tensor, Tensor], Tensor] = lambda a, b: torch.cat([a, b])

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        named = list(named)
        parts = {name: tensor for name, tensor in named if name in ("a.weight", "b.weight")}
        super().load_weights((name, tensor) for name, tensor in named if name not in parts)
        if len(parts) == 2:
            self.fused.data.copy_(self.join(parts["a.weight"], parts["b.weight"]))


PARTS = {"a.weight": (2, HIDDEN), "b.weight": (3, HIDDEN)}


@pytest.mark.parametrize("dim", [0, -2])
def test_tensors_that_are_only_loaded_together_have_their_own_places(dim: int) -> None:
    model = Fused()
    model.join = lambda a, b: torch.cat((a, b), dim)
    shapes = {"a.weight": PARTS["a.weight"], **SHAPES, "b.weight": PARTS["b.weight"]}  # in any order
    placement = Placement.learn(model, metas(shapes))
    assert placement.faults == ()
    sent = weights() | {name: torch.randn(shape).bfloat16() for name, shape in PARTS.items()}
    model.loads.clear()
    for name in ("b.weight", *SHAPES, "a.weight"):  # each in a bucket of its own
        placement.load([(name, sent[name])])
    assert placement.digests() == digests(sent.items())
    assert model.loads == []
    assert torch.equal(model.fused, torch.cat([sent["a.weight"], sent["b.weight"]]))
    flip_bit(model.fused.data[2:], 3)
    assert [name for name, read in placement.digests().items() if read != digest(sent[name])] == ["b.weight"]


def test_a_tensor_whose_partner_is_not_pushed() -> None:
    assert Placement.learn(Fused(), metas({**SHAPES, "b.weight": PARTS["b.weight"]})).faults == (
        "the engine has no place for tensor 'b.weight'",
        "served tensor 'fused' is reached by no pushed tensor, or not in all its elements",
    )


@pytest.mark.parametrize(
    ("join", "shape", "fault"),
    [
        (
            lambda a, b: torch.cat([a, b]) * 2,
            (3, HIDDEN),
            "copies tensor 'b.weight' only together with others, and does",
        ),
        (
            lambda a, b: torch.cat([a, b.flip(0)]),
            (3, HIDDEN),
            "copies tensor 'b.weight' only together with others, and",
        ),
        (lambda a, b: torch.cat([a, b.t()]), (HIDDEN, 3), "the engine changes tensor 'b.weight' as it loads it"),
    ],
    ids=["scaled", "turned over", "transposed"],
)
def test_tensors_that_are_changed_as_they_are_loaded_together(
    join: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], fault: str
) -> None:
    model = Fused()
    model.join = join
    found = Placement.learn(model, metas({**SHAPES, "a.weight": PARTS["a.weight"], "b.weight": shape})).faults
    assert any(fault in each for each in found), found


def test_many_tensors_without_a_place_are_not_all_kept() -> None:
    """They would be a second copy of the model."""
    model = Fused()
    names = {f"other.{i}": (HIDDEN,) for i in range(20)}
    placement = Placement.learn(model, metas({"a.weight": PARTS["a.weight"], **names, **SHAPES}))
    assert len([fault for fault in placement.faults if "has no place" in fault]) == 21
    assert max(len(names) for names in model.loads) == 8


def test_a_parameter_that_the_loader_passes_over_is_filled_by_its_name() -> None:
    model = Served()
    model.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.float32)
    placement = learned(model, **{"lm_head.weight": (VOCAB, HIDDEN)})
    assert placement.served()["lm_head.weight"].dtype == "float32"
    sent = weights() | {"lm_head.weight": torch.randn(VOCAB, HIDDEN)}
    assert push(placement, sent) == digests(sent.items())
    assert torch.equal(model.lm_head.weight, sent["lm_head.weight"])


def test_a_weight_that_is_a_plain_tensor() -> None:
    """As SGLang's draft head over a reduced vocabulary: no parameter, but served."""
    model = Served()
    model.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
    del model.lm_head.weight
    model.lm_head.weight = torch.zeros(VOCAB, HIDDEN)
    assert "'lm_head.weight' is reached by no pushed tensor" in faults(model)
    placement = learned(model, **{"lm_head.weight": (VOCAB, HIDDEN)})
    sent = weights() | {"lm_head.weight": torch.randn(VOCAB, HIDDEN)}
    assert push(placement, sent) == digests(sent.items())
    model.lm_head.weight[0, 0] += 1
    assert placement.digests() != digests(sent.items())


def test_a_parameter_that_the_loader_passes_over_is_filled_by_the_loader_it_carries() -> None:
    """A padded head, of which another process has the second half of the rows."""
    model = Served()
    head = nn.Parameter(torch.ones(8, HIDDEN, dtype=torch.bfloat16), requires_grad=False)

    def load(parameter: nn.Parameter, tensor: Tensor) -> None:
        parameter[:5].data.copy_(tensor.narrow(0, 0, 5))
        parameter[5:].data.fill_(0)

    head.weight_loader = load  # type: ignore[attr-defined]
    model.head = head
    placement = learned(model, head=(VOCAB, HIDDEN))
    sent = weights() | {"head": torch.randn(VOCAB, HIDDEN).bfloat16()}
    assert push(placement, sent) == digests(sent.items())
    assert torch.equal(head[:5], sent["head"][:5]) and not head[5:].any()
    flip_bit(head.data, 3)
    assert placement.digests()["head"] == "changed since it was loaded"


@pytest.mark.parametrize(
    "change", [lambda t: t.clone(), lambda t: t.view(1, *t.shape)[0], lambda t: t.reshape(-1).view(t.shape)]
)
def test_loaders_that_change_no_value_are_taken(change: Callable[[Tensor], Tensor]) -> None:
    model = Served()
    model.change = change
    sent = weights()
    assert push(learned(model), sent) == digests(sent.items())


def test_a_tensor_in_several_places() -> None:
    model = Served()
    model.copy = nn.Parameter(torch.zeros(HIDDEN, HIDDEN, dtype=torch.bfloat16), requires_grad=False)
    load = model._load

    def twice(name: str, tensor: Tensor) -> None:
        load(name, tensor)
        if name == "q.weight":
            model.copy.data.copy_(tensor)

    model._load = twice  # type: ignore[method-assign]
    sent = weights()
    placement = learned(model)
    assert push(placement, sent) == digests(sent.items())
    flip_bit(model.copy.data, 3)
    assert placement.digests()["q.weight"] == "different in its 2 places"


# What is refused, by name


def test_names_without_a_place() -> None:
    for name in ("other.weight", "qkv"):  # the second is a parameter, but of another shape
        placement = Placement.learn(Served(), metas({**SHAPES, name: (3, 3)}))
        assert len(placement.faults) == 1 and name in placement.faults[0]


def test_all_faults_are_named_at_once() -> None:
    model = Served()
    model.drop = {"q.weight", "norm.weight"}
    assert faults(model).splitlines() == [
        "the engine has no place for tensor 'q.weight'",
        "the engine has no place for tensor 'norm.weight'",
        "served tensor 'qkv' is reached by no pushed tensor, or not in all its elements",
        "served tensor 'norm' is reached by no pushed tensor, or not in all its elements",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.T if t.shape == (HIDDEN, HIDDEN) else t,
        lambda t: t.T.contiguous() if t.shape == (HIDDEN, HIDDEN) else t,
        lambda t: t * 2 if t.shape == (HIDDEN, HIDDEN) else t,
        lambda t: t.mul_(2) if t.shape == (HIDDEN, HIDDEN) else t,
        lambda t: t[:1].expand(HIDDEN, HIDDEN) if t.shape == (HIDDEN, HIDDEN) else t,
        lambda t: t.roll(1, 0) if t.shape == (HIDDEN, HIDDEN) else t,
    ],
    ids=["transposed", "transposed copy", "scaled", "scaled in place", "repeated", "shifted"],
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_loader_that_changes_values(change: Callable[[Tensor], Tensor], world: int) -> None:
    model = Served(0, world)
    model.change = change
    for name in ("q.weight", "out.weight"):
        assert f"the engine changes tensor {name!r} as it loads it" in faults(model)
    assert "k.weight" not in faults(model)


def test_a_quantised_parameter() -> None:
    model = Served()
    model.out = nn.Parameter(torch.zeros(HIDDEN, HIDDEN).to(torch.float8_e4m3fn), requires_grad=False)
    assert "serves tensor 'out.weight' as float8_e4m3fn, quantised" in faults(model)
    model.out = nn.Parameter(torch.zeros(HIDDEN, HIDDEN, dtype=torch.int8), requires_grad=False)
    assert "turns tensor 'out.weight' from bfloat16 into int8" in faults(model)


def test_a_loader_that_raises() -> None:
    assert "the engine's loader fails on tensor 'q.weight': AssertionError" in "\n".join(
        Placement.learn(Served(), metas({**SHAPES, "q.weight": (3, 3)})).faults
    )


def test_an_unknown_dtype() -> None:
    placement = Placement.learn(Served(), metas() | {"q.weight": TensorMeta(shape=(8, 8), dtype="float5")})
    assert "'float5' is no dtype" in placement.faults[0]


def test_two_tensors_in_one_place() -> None:
    model = Served()
    model.swap = lambda name: name.replace("v.", "k.")
    assert faults(model).splitlines() == [
        "tensors 'k.weight' and 'v.weight' are loaded into the same place",
        "served tensor 'qkv' is reached by no pushed tensor, or not in all its elements",
    ]


def test_a_tensor_that_lands_in_another_parameter_than_its_own() -> None:
    model = Served()
    model.swap = lambda name: {"out": "out.weight"}.get(name, name)
    names = {name.replace("out.weight", "out"): shape for name, shape in SHAPES.items()}
    assert Placement.learn(model, metas(names)).faults == ()
    model.swap = lambda name: {"out": "q.weight", "q.weight": "out.weight"}.get(name, name)
    assert Placement.learn(model, metas(names)).faults == (
        "the engine loads tensor 'out' elsewhere than into its parameter of that name",
        "served tensor 'qkv' is reached by no pushed tensor, or not in all its elements",
    )


def test_a_parameter_that_nothing_reaches() -> None:
    model = Served()
    model.extra = nn.Parameter(torch.zeros(3), requires_grad=False)
    assert faults(model) == "served tensor 'extra' is reached by no pushed tensor, or not in all its elements"


def test_a_fill_without_a_copy_reaches_nothing() -> None:
    model = Served()
    load = model._load
    model._load = lambda name, t: model.norm.data.zero_() if "norm" in name else load(name, t)  # type: ignore[method-assign]
    assert faults(model).splitlines() == [
        "the engine has no place for tensor 'norm.weight'",
        "served tensor 'norm' is reached by no pushed tensor, or not in all its elements",
    ]


def test_a_loader_that_gives_a_parameter_new_memory() -> None:
    model = Served()
    load = model._load

    def replace(name: str, tensor: Tensor) -> None:
        if name == "norm.weight":
            model.norm = nn.Parameter(tensor.clone(), requires_grad=False)
        load(name, tensor)

    model._load = replace  # type: ignore[method-assign]
    assert "the engine gives parameter 'norm' new memory when it loads it" in faults(model)


def test_a_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        Placement.learn(nn.Module(), metas())


# A draft that shares with its target


def sharing() -> tuple[Served, Served]:
    target, draft = Served(), Served()
    draft.embed = target.embed
    return target, draft


def test_what_a_draft_shares_with_its_target_need_not_be_pushed() -> None:
    target, draft = sharing()
    sent = weights()
    push(learned(target), sent)
    own = {name: shape for name, shape in SHAPES.items() if name != "embed.weight"}
    assert "'embed' is reached by no pushed tensor" in Placement.learn(draft, metas(own)).faults[0]
    placement = Placement.learn(draft, metas(own), target)
    assert placement.faults == ()
    assert torch.equal(target.embed[:VOCAB], sent["embed.weight"])
    mine = {name: tensor for name, tensor in weights(5).items() if name in own}
    assert push(placement, mine) == digests(mine.items())


def test_a_draft_must_not_overwrite_its_target() -> None:
    target, draft = sharing()
    sent = weights()
    places = learned(target)
    push(places, sent)
    assert faults(draft, owner=target) == (
        "tensor 'embed.weight' would overwrite a tensor that belongs to the target; do not push it"
    )
    assert places.digests() == digests(sent.items())  # and learning that did not overwrite it either
    draft.drop = {"embed.weight"}
    renamed = metas({name: s for name, s in SHAPES.items() if "embed" not in name} | {"embed": (PADDED, HIDDEN)})
    assert "'embed' would overwrite" in Placement.learn(draft, renamed, target).faults[0]
    assert places.digests() == digests(sent.items())


# After learning


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_a_tensor_that_the_second_push_drops_is_noticed(name: str, world: int) -> None:
    model = Served(0, world, derive=True)
    placement = learned(model)
    push(placement, weights(1))
    model.drop = {name}
    sent = weights(2)
    served, wanted = push(placement, sent), digests(sent.items())
    assert {n for n in SHAPES if served[n] != wanted[n]} == {name}


@pytest.mark.parametrize("world", [1, 2])
def test_a_tensor_that_the_second_push_puts_elsewhere_is_noticed(world: int) -> None:
    model = Served(0, world, derive=True)
    placement = learned(model)
    push(placement, weights(1))
    model.swap = lambda name: {"k.weight": "v.weight", "v.weight": "k.weight"}.get(name, name)
    sent = weights(2)
    served, wanted = push(placement, sent), digests(sent.items())
    assert {n for n in SHAPES if served[n] != wanted[n]} == {"k.weight", "v.weight"}


@pytest.mark.parametrize("world", [1, 2])
def test_a_bit_that_flips_in_any_parameter_is_noticed(world: int) -> None:
    model = Served(0, world)
    placement = learned(model)
    sent = weights()
    wanted = digests(sent.items())
    for name, parameter in model.named_parameters():
        assert push(placement, sent) == wanted
        flip_bit(parameter.data, 13)
        served = placement.digests()
        assert [n[:1] for n in SHAPES if served[n] != wanted[n]] == ["q" if name == "qkv" else name[0]]


def test_slices_of_an_earlier_push_do_not_vouch_for_a_later_one() -> None:
    model = Served(0, 2, derive=True)
    placement = learned(model)
    old, new = weights(1), weights(2)
    push(placement, old)
    new.pop("q.weight")
    assert push(placement, new)["q.weight"] == digest(old["q.weight"])
    model.drop = {"q.weight"}
    assert push(placement, weights(2))["q.weight"] == "not loaded in full since it was learned"


@pytest.mark.parametrize("derive", [False, True])
def test_moved_memory(derive: bool) -> None:
    model, sent = Served(derive=derive), weights()
    placement = learned(model)
    model.qkv.data = model.qkv.data.clone()
    with pytest.raises(ValueError, match="has moved parameter 'qkv' since its place was learned; learn again"):
        push(placement, sent)
    with pytest.raises(ValueError, match="has moved parameter 'qkv'"):
        placement.digests()
    assert push(learned(model), sent) == digests(sent.items())


def test_a_placement_keeps_no_model_alive() -> None:
    model = Served()
    placement = learned(model)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="has dropped the model"):
        placement.digests()


@pytest.mark.parametrize(
    "name, tensor, fault",
    [
        ("other", torch.zeros(3), "tensor 'other' was not learned"),
        ("norm.weight", torch.zeros(HIDDEN + 1), r"comes as float32\[9\], but the engine serves it as float32\[8\]"),
        ("norm.weight", torch.zeros(HIDDEN, dtype=torch.bfloat16), "comes as bfloat16"),
    ],
)
def test_a_bucket_with_a_wrong_tensor_is_refused_whole(name: str, tensor: Tensor, fault: str) -> None:
    model = Served()
    placement = learned(model)
    sent = weights()
    push(placement, sent)
    with pytest.raises(ValueError, match=fault):
        placement.load([("q.weight", torch.zeros_like(sent["q.weight"])), (name, tensor)])
    assert placement.digests() == digests(sent.items())


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_on_a_gpu(world: int) -> None:
    model = Served(0, world).cuda()
    placement = learned(model)
    for seed, device in ((1, "cuda"), (2, "cpu")):
        sent = {name: tensor.to(device) for name, tensor in weights(seed).items()}
        assert push(placement, sent) == digests(sent.items())
    flip_bit(model.out.data, 13)
    assert [n for n, d in placement.digests().items() if d != digest(sent[n])] == ["out.weight"]
