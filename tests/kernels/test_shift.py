from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import sharded
from distributed import Ranks
from miles_spec.kernels import shift as module
from miles_spec.kernels.backend import Backend
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import draft_targets, extend, shift
from sharded import Case

BACKENDS: tuple[Backend, ...] = ("reference", "triton")
# without a GPU the tests' Triton is the interpreter
here = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Halos that cross several chunks and ranks are likely: chunks of a segment of 30 on four ranks have four rows."""
    depth = draw(st.integers(1, 5))
    return Case(
        lengths=draw(st.lists(st.integers(0, 30), max_size=6)),
        sharding=draw(st.sampled_from(["zigzag", "contiguous"])),
        depth=depth,
        offset=draw(st.integers(1, depth + 1)),
        halo=depth + 1 + draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 1000)),
        width=draw(st.sampled_from([1, 3])),
    )


@here
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_one_rank_matches_the_oracle(backend: Backend, case: Case) -> None:
    assert sharded.mismatches(None, [case], backend) == []


@here
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_match_the_oracle_and_one_rank(ranks: Ranks, size: int, backend: Backend) -> None:
    # not shrunk: a rank that raises leaves the others waiting, each time
    @settings(max_examples=8, deadline=None, phases=[Phase.generate])
    @given(batch=st.lists(cases(), min_size=4, max_size=8))
    def check(batch: list[Case]) -> None:
        assert ranks.run(sharded.mismatches, size, batch, backend) == [[]] * size

    check()


WIDE = {"width": 64, "dtype": torch.bfloat16}


@here
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_in_half_precision(ranks: Ranks, backend: Backend) -> None:
    assert ranks.run(sharded.mismatches, 2, sharded.random_cases(4, 5, **WIDE), backend) == [[]] * 2


SMALL = Case(lengths=[9, 0, 1, 14], sharding="zigzag", depth=3, offset=2, halo=4, seed=0)


@here
@pytest.mark.parametrize("fault", sharded.FAULTS)
def test_a_broken_layout_is_noticed(ranks: Ranks, fault: str) -> None:
    assert ranks.run(sharded.mismatches, 4, [SMALL], "reference") == [[]] * 4
    assert any(ranks.run(sharded.mismatches, 4, [SMALL], "reference", fault))


@here
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [1, 1, 1, 0, 1]])
def test_packs_with_nothing_to_shift(ranks: Ranks, size: int, backend: Backend, lengths: list[int]) -> None:
    batch = [
        dataclasses.replace(SMALL, lengths=lengths, sharding=sharding, width=width)
        for sharding in ("zigzag", "contiguous")
        for width in (0, 2)
    ]
    assert ranks.run(sharded.mismatches, size, batch, backend) == [[]] * size


@here
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_any_dtype_and_shape_is_moved_as_it_is(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.randn(7, 2, 3).mul(3).to(dtype)
    got = shift(x, PackedLayout.make([4, 3]), 2, backend)
    want = torch.zeros_like(x)
    want[:2], want[4] = x[2:4], x[6]
    assert got.dtype == dtype and torch.equal(got, want)


@here
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_beyond_every_segment_gives_zeros(backend: Backend) -> None:
    x = torch.full((5, 2), float("nan"), requires_grad=True)
    got = shift(x, PackedLayout.make([4, 1]), 4, backend)
    got.sum().backward()
    assert (got == 0).all() and (x.grad == 0).all()


def test_example_of_the_contract() -> None:
    layout = PackedLayout.make([7])
    mask = torch.tensor([False] * 3 + [True] * 4)
    got = draft_targets(torch.arange(7), mask, layout, 2)
    assert got.mask[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert got.labels[0][got.mask[0]].tolist() == [4, 5, 6]
    assert got.mask[1].nonzero().flatten().tolist() == [2, 3]


def test_mistakes_are_refused() -> None:
    tokens, flags = torch.arange(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least 1"):
        draft_targets(tokens, flags, PackedLayout.make([3]), 0)
    with pytest.raises(ValueError, match="at least 1"):
        shift(tokens, PackedLayout.make([3]), 0)
    layout = PackedLayout.make([6], cp_size=2, halo=2)
    tokens, flags = layout.shard(torch.arange(6)), layout.shard(torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="halo=3"):
        draft_targets(tokens, flags, layout, 2)
    with pytest.raises(ValueError, match="halo=3"):
        shift(tokens, layout, 3)
    with pytest.raises(ValueError, match="cp_group"):
        shift(tokens, layout, 2)


def _on_meta(monkeypatch: pytest.MonkeyPatch, size: int) -> tuple[PackedLayout, list[Any]]:
    """A layout whose tensors have no data, so that any wait for a value raises; and the exchanges to come."""
    layout = PackedLayout.make([9, 0, 1, 20], "meta", halo=4, cp_rank=size - 1, cp_size=size)
    exchanges: list[Any] = []
    monkeypatch.setattr(dist, "all_to_all_single", lambda *args, **_: exchanges.append(args))
    return dataclasses.replace(layout, cp_group=object()), exchanges  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 4])
def test_one_exchange_and_no_value_read_by_the_host(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    layout, exchanges = _on_meta(monkeypatch, size)
    each = int(size > 1)
    draft_targets(layout.positions, layout.real, layout, 3)
    assert len(exchanges) == each
    x = torch.randn(layout.tokens, 2, device="meta", requires_grad=True)
    shifted = shift(x, layout, 3)
    assert len(exchanges) == 2 * each
    shifted.sum().backward()
    assert len(exchanges) == 3 * each
    extend(x, layout).sum().backward()
    layout.shard(torch.zeros(30, device="meta"))
    assert len(exchanges) == 5 * each
    with pytest.raises((RuntimeError, NotImplementedError)):
        layout.positions[0].item()  # what the calls above would have met


@here
def test_one_launch_with_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for name in ("_targets_kernel", "_mark_kernel", "_shift_kernel"):
        kernel = getattr(module, name)
        recorder = type("Recorder", (), {"__getitem__": lambda _, grid, k=kernel: launched.append(grid) or k[grid]})()
        monkeypatch.setattr(module, name, recorder)
    layout = PackedLayout.make([9, 300])
    tokens = torch.arange(309)
    got = draft_targets(tokens, tokens % 3 > 0, layout, 3, "triton")
    assert launched == [(2,)]
    assert torch.equal(got.mask, draft_targets(tokens, tokens % 3 > 0, layout, 3, "reference").mask)


@pytest.mark.gpu
def test_on_one_gpu(tmp_path: Path) -> None:
    batch = [*sharded.random_cases(6, 1), *sharded.random_cases(4, 2, **WIDE)]
    sharded.over_nccl(sharded.check_on_gpu, 1, tmp_path / "store", batch)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_over_nccl(tmp_path: Path, size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    batch = [*sharded.random_cases(8, 3), *sharded.random_cases(6, 4, **WIDE)]
    sharded.over_nccl(sharded.check_on_gpu, size, tmp_path / "store", batch)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [64, 512])
@pytest.mark.parametrize("depth", [1, 3, 7])
def test_large_packs_on_the_gpu(segments: int, depth: int) -> None:
    """Against the reference on the CPU; the memory that results will lie in holds NaN and -1 first."""
    size = 65536
    generator = torch.Generator().manual_seed(segments)
    cuts = torch.randperm(size, generator=generator)[: segments - 1].sort().values.tolist()
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    tokens = torch.randint(0, 150_000, (size,), generator=generator)
    flags = torch.rand(size, generator=generator) < 0.9
    x = torch.randn(size, 40, generator=generator).bfloat16()
    grad = torch.randn(size, 40, generator=generator).bfloat16()
    host, layout = PackedLayout.make(lengths), PackedLayout.make(lengths, "cuda")
    want = draft_targets(tokens, flags, host, depth)
    inputs = [v.cuda() for v in (tokens, flags, x, grad)]
    blocks = [torch.full((3 * depth + 1, size), -1, device="cuda"), torch.full_like(inputs[2], float("nan"))]
    blocks += [torch.full((depth + 1, size), True, device="cuda"), torch.full_like(inputs[2], float("nan"))]
    del blocks
    got = draft_targets(inputs[0], inputs[1], layout, depth)
    for field in dataclasses.fields(got):
        assert torch.equal(getattr(got, field.name).cpu(), getattr(want, field.name)), field.name
    ours, theirs = inputs[2].requires_grad_(), x.requires_grad_()
    assert torch.equal(shift(ours, layout, depth).cpu(), shift(theirs, host, depth))
    shift(ours, layout, depth).backward(inputs[3])
    shift(theirs, host, depth).backward(grad)
    assert torch.equal(ours.grad.cpu(), theirs.grad)


@pytest.mark.gpu
def test_one_launch_on_the_gpu() -> None:
    layout = PackedLayout.make([100, 5000], "cuda")
    tokens = torch.arange(5100, device="cuda")
    flags = tokens % 3 > 0
    draft_targets(tokens, flags, layout, 3)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        draft_targets(tokens, flags, layout, 3)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert on_device == ["_targets_kernel"]
