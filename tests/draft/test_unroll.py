from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import FAMILIES as TARGETS
from conftest import tiny_model
from distributed import Ranks
from miles_spec.draft.export import per_expert, tensors_of
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3, MIMO, NEXTN, QWEN_MTP, DraftSpec
from miles_spec.draft.unroll import Unrolled, unroll
from miles_spec.kernels.layout import PackedLayout, Sharding
from miles_spec.kernels.shift import DraftTargets, draft_targets
from oracles.drafts import Numbers, block
from oracles.numbers import relative_error
from oracles.serving import draft_states


def _head(family: str = "llama", spec: DraftSpec = EAGLE, layers: int = 1) -> tuple[DraftHead, Tensor]:
    """In float64, with the embedding."""
    model = tiny_model(family, layers=4 if spec.reads == "aux" else 2).double()
    head = DraftHead.attach(model, spec, None, torch.Generator().manual_seed(0), layers)
    return head, model.get_input_embeddings().weight.detach()


def _pack(lengths: list[int], prompt: int = 2, width: int = 32) -> tuple[PackedLayout, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    layout = PackedLayout.make(lengths)
    tokens = torch.randint(0, 61, (layout.tokens,), generator=g)
    return layout, tokens, layout.positions >= prompt, torch.randn(layout.tokens, width, generator=g).double()


def _counting(unrolled: Unrolled, targets: DraftTargets) -> list[tuple[Tensor, Tensor]]:
    """The rows that count at each depth and their states."""
    rows = [mask.nonzero().squeeze(-1) for mask in targets.mask]
    return [(r, unrolled.flat[unrolled.index(torch.full_like(r, d), r)]) for d, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        *((kind, EAGLE) for kind in TARGETS),
        ("qwen3", EAGLE3),
        ("qwen2", MIMO),
        ("gemma", QWEN_MTP),
        ("glm4_moe", NEXTN),
        ("deepseek_v3", NEXTN),
    ],
)
def test_every_depth_computes_what_serving_computes(kind: str, spec: DraftSpec) -> None:
    head, embed = _head(kind, spec)
    layout, tokens, loss_mask, hidden = _pack([7, 0, 3, 9, 1], width=head.width)
    targets = draft_targets(tokens, loss_mask, layout, 4)
    compared = 0
    with torch.no_grad():
        got = unroll(head, embed, hidden, targets, layout)
        # one row of each piece at least; the prompts' rows but the last do not run deeper
        assert got.rows.tolist() == [1, 2, 3, 4, 5, 6, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19]
        assert [s.shape for s in got.states] == [(20, 32), *[(16, 32)] * 3]
        for d, (rows, states) in enumerate(_counting(got, targets)):
            for row, state in zip(rows.tolist(), states, strict=True):
                segment = int(layout.segments[row])
                part = slice(layout.offsets[segment], layout.offsets[segment + 1])
                want = draft_states(head, embed, hidden[part], tokens[part], row - part.start, d + 1)[d]
                # rotary tables are float32
                torch.testing.assert_close(state, want, rtol=1e-5, atol=1e-5)
                compared += 1
    assert compared == sum(int(m.sum()) for m in targets.mask) > 20


@pytest.mark.parametrize(("kind", "spec"), [("qwen2", MIMO), ("glm4_moe", NEXTN)])
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any),
    prompt=st.integers(1, 3),
    layers=st.integers(2, 3),
    depth=st.integers(1, 4),
)
@example(lengths=[9, 0, 7], prompt=2, layers=3, depth=3)
@example(lengths=[9, 0, 7], prompt=2, layers=2, depth=4)
@settings(max_examples=6, deadline=None)
def test_a_layer_for_each_depth_computes_what_was_published(
    kind: str, spec: DraftSpec, lengths: list[int], prompt: int, layers: int, depth: int
) -> None:
    """States of the rows that count and gradients of a weighted sum of them, against the papers' equations row by row,
    with the tensors by their names in a checkpoint."""
    head, embed = _head(kind, spec, layers)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():  # so that no two layers are alike
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    layout, tokens, loss_mask, hidden = _pack(lengths, prompt)
    targets = draft_targets(tokens, loss_mask, layout, depth)
    weight = torch.randn(depth, *hidden.shape, generator=g).double()
    got = _counting(unroll(head, embed, hidden, targets, layout), targets)
    sum((s * w[rows]).sum() for (rows, s), w in zip(got, weight, strict=True)).backward()

    named = {name: tensor.clone().requires_grad_() for name, tensor in tensors_of(head).items()}
    numbers, total = Numbers.of(head.config), torch.zeros((), dtype=torch.float64)
    for d, (rows, states) in enumerate(got):
        for row, state in zip(rows.tolist(), states, strict=True):
            segment = int(layout.segments[row])
            part = slice(layout.offsets[segment], layout.offsets[segment + 1])
            place = row - part.start
            want = block(spec.family, named, numbers, embed, hidden[part], tokens[part], place, d + 1, layers)[d]
            total = total + want @ weight[d, row]
            assert relative_error(state, want) < 5e-6  # norms, routers and rotary tables are float32
    if total.requires_grad:
        total.backward()
    grads = {spec.name_of(n): torch.zeros_like(p) if p.grad is None else p.grad for n, p in head.named_parameters()}
    for name, grad in per_expert(grads.items()):
        exact = named[name].grad
        exact = torch.zeros_like(grad) if exact is None else exact
        bound = 1e-4 if name.endswith("mlp.gate.weight") else 1e-5  # a small difference of a router's float32
        assert (grad - exact).norm() <= bound * exact.norm() + 1e-9, name


def test_rows_that_do_not_count_change_nothing() -> None:
    """What the other rows read at deeper depths, states included, leaves those that count bit for bit."""
    head, embed = _head()
    layout, tokens, loss_mask, hidden = _pack([7, 5, 9])
    loss_mask[15:17] = False  # two turns
    targets = draft_targets(tokens, loss_mask, layout, 3)
    inputs = targets.inputs.clone()
    inputs[1:][~targets.mask[1:]] = 60
    spoiled = DraftTargets(
        inputs=inputs,
        labels=targets.labels,
        positions=targets.positions,
        teacher=targets.teacher,
        mask=targets.mask,
        keys=targets.keys,
    )
    clean, other = (unroll(head, embed, hidden, t, layout) for t in (targets, spoiled))
    for (_, a), (_, b) in zip(_counting(clean, targets), _counting(other, targets), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(clean.flat, other.flat)


def test_packed_equals_alone() -> None:
    head, embed = _head()
    layout, tokens, loss_mask, hidden = _pack([6, 8])
    targets = draft_targets(tokens, loss_mask, layout, 3)
    both = _counting(unroll(head, embed, hidden, targets, layout), targets)
    for start, end in ((0, 6), (6, 14)):
        alone = PackedLayout.make([end - start])
        part = draft_targets(tokens[start:end], loss_mask[start:end], alone, 3)
        single = _counting(unroll(head, embed, hidden[start:end], part, alone), part)
        for (rows, states), (own, want) in zip(both, single, strict=True):
            inside = (rows >= start) & (rows < end)
            assert (rows[inside] - start).tolist() == own.tolist()
            torch.testing.assert_close(states[inside], want, rtol=1e-12, atol=1e-12)


def _run(layout: PackedLayout, layers: int) -> tuple[list[Tensor], Tensor]:
    """States of the rows that count, by depth in the order of the whole pack and 0 elsewhere, and the gradient of a
    weighted sum of them."""
    head, embed = _head("qwen2", MIMO, layers) if layers > 1 else _head()
    _, tokens, loss_mask, hidden = _pack(list(layout.lengths))
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)).double()
    targets = draft_targets(layout.shard(tokens), layout.shard(loss_mask), layout, 3)
    got = _counting(unroll(head, embed, layout.shard(hidden), targets, layout), targets)
    states = [s.new_zeros(layout.tokens, 32).index_put((rows,), s) for rows, s in got]
    sum((s * layout.shard(weight)).sum() for s in states).backward()
    return [layout.unshard(s) for s in states], torch.cat([p.grad.flatten() for p in head.parameters()])


def _run_sharded(
    group: dist.ProcessGroup, lengths: list[int], sharding: Sharding, layers: int
) -> tuple[list[Tensor], Tensor]:
    states, grad = _run(PackedLayout.make(lengths, halo=4, cp_group=group, sharding=sharding), layers)
    dist.all_reduce(grad, group=group)
    return states, grad


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("size", "sharding"), [(2, "zigzag"), (4, "zigzag"), (4, "contiguous")])
def test_context_parallel_equals_one_rank(ranks: Ranks, size: int, sharding: Sharding, layers: int) -> None:
    lengths = [21, 0, 4, 1, 13]
    want, grad = _run(PackedLayout.make(lengths), layers)
    assert all(s.any() for s in want)
    for states, summed in ranks.run(_run_sharded, size, lengths, sharding, layers):
        # rotary tables are float32, the same for all
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(states, want, strict=True))
        assert relative_error(summed, grad) < 1e-12


@pytest.mark.parametrize("lengths", [[], [0], [1, 2], [3, 1], [2]])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("depth", [1, 3])
def test_packs_too_short_for_the_depth(lengths: list[int], depth: int, layers: int) -> None:
    head, embed = _head("qwen2", MIMO, layers) if layers > 1 else _head()
    layout, tokens, loss_mask, hidden = _pack(lengths, prompt=1)
    targets = draft_targets(tokens, loss_mask, layout, depth)
    got = unroll(head, embed, hidden, targets, layout)
    assert len(got.states) == depth and got.flat.isfinite().all()
    assert all(s.shape == (layout.tokens if d < layers else len(got.rows), 32) for d, s in enumerate(got.states))
    assert [len(r) for r, _ in _counting(got, targets)] == targets.mask.sum(1).tolist()


def test_index_of_any_row_and_depth() -> None:
    head, embed = _head()
    layout, tokens, loss_mask, hidden = _pack([6, 5])
    targets = draft_targets(tokens, loss_mask, layout, 3)
    got = unroll(head, embed, hidden, targets, layout)
    depth = torch.tensor([[0, 1], [2, 1]])
    row = torch.tensor([[9, 5], [7, 1]])
    want = [got.states[0][9], got.states[1][4], got.states[2][5], got.states[1][0]]
    assert got.rows.tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert torch.equal(got.flat[got.index(depth, row)].flatten(0, 1), torch.stack(want))


class _Copies(TorchDispatchMode):
    """Counts what makes the host wait: reads of a number, and operations whose result's size is data."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        self.count += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        if name in ("aten::index.Tensor", "aten::index_put_"):
            self.count += any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("depth", "layers"), [(1, 1), (4, 1), (3, 3), (4, 3)])
def test_the_host_reads_only_where_pieces_start(depth: int, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head, embed = _head("qwen2", MIMO, layers) if layers > 1 else _head()
    layout, tokens, loss_mask, hidden = _pack([6, 0, 5])
    targets = draft_targets(tokens, loss_mask, layout, depth)
    reads = []
    monkeypatch.setattr(Tensor, "tolist", lambda x: reads.append(x.shape) or [1, 7])
    with _Copies() as copies:
        got = unroll(head, embed, hidden, targets, layout)
        got.index(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert copies.count == 0
    assert reads == [(2,)] * (depth > layers)


def test_attached_states_are_refused() -> None:
    head, embed = _head()
    layout, tokens, loss_mask, hidden = _pack([5])
    targets = draft_targets(tokens, loss_mask, layout, 1)
    with pytest.raises(AssertionError):
        unroll(head, embed.clone().requires_grad_(), hidden, targets, layout)
    with pytest.raises(AssertionError):
        unroll(head, embed, hidden.requires_grad_(), targets, layout)
