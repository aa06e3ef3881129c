from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed import Ranks
from miles_spec.kernels.layout import PackedLayout, Piece, Sharding
from oracles import sharding as oracle

LENGTHS = st.lists(st.integers(0, 30), max_size=7)
SHARDINGS = st.sampled_from(["zigzag", "contiguous"])


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, sharding=SHARDINGS, size=st.sampled_from([1, 2, 3, 4, 8]))
def test_rows_and_pieces_are_those_of_the_oracle(lengths: list[int], sharding: Sharding, size: int) -> None:
    want = oracle.held(lengths, sharding, size)
    ends = [sum(lengths[: s + 1]) for s in range(len(lengths))]
    for rank, rows in enumerate(want):
        layout = PackedLayout.make(lengths, sharding=sharding, cp_rank=rank, cp_size=size, halo=3)
        assert layout.tokens == len(rows) == len(layout.positions)
        assert layout.positions.tolist() == [r.position for r in rows]
        assert layout.segments.tolist() == [r.segment for r in rows]
        assert layout.real.tolist() == [r.token is not None for r in rows]
        assert layout.source.tolist() == [ends[r.segment] - 1 if r.token is None else r.token for r in rows]
        pieces = tuple(Piece(segment=s, start=a, end=b, row=r) for s, a, b, r in oracle.pieces(rows))
        assert layout.pieces == pieces
        # what one rank says about another is what the other says about itself
        assert PackedLayout.make(lengths, sharding=sharding, cp_rank=size - 1, cp_size=size).pieces_of(rank) == pieces
    counted = [sum(r.segment == s for rows in want for r in rows) for s in range(len(lengths))]
    assert list(PackedLayout.make(lengths, sharding=sharding, cp_size=size).padded) == counted


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, sharding=SHARDINGS, size=st.sampled_from([1, 2, 3]), divisor=st.sampled_from([1, 2, 4]))
def test_rows_that_are_cut_once_more(lengths: list[int], sharding: Sharding, size: int, divisor: int) -> None:
    """Each of `divisor` ranks has the rows that it would have among `size * divisor`, and finds them among its own."""
    for rank in range(size):
        layout = PackedLayout.make(lengths, sharding=sharding, cp_rank=rank, cp_size=size, divisor=divisor)
        found: list[int] = []
        for part in range(divisor):
            finer, take = layout.finer(part, halo=2)
            at, of = rank * divisor + part, size * divisor
            alone = PackedLayout.make(lengths, sharding=sharding, cp_rank=at, cp_size=of, halo=2)
            for name in ("positions", "segments", "real", "source", "halo_rows", "send_rows"):
                assert torch.equal(getattr(finer, name), getattr(alone, name))
            assert (finer.cp_rank, finer.cp_size, finer.halo) == (alone.cp_rank, alone.cp_size, alone.halo)
            assert torch.equal(layout.source[take], finer.source) and len(take) == finer.tokens
            if size > 1:
                assert torch.equal(layout.positions[take], finer.positions)
            found += finer.source[finer.real].tolist()
        assert sorted(found) == sorted(layout.source[layout.real].tolist())
        assert layout.to("cpu").padded == layout.padded


@pytest.mark.parametrize("divisor", [2, 4])
def test_a_pack_that_may_be_cut_once_more_comes_back_whole(ranks: Ranks, divisor: int) -> None:
    assert ranks.run(_whole_again, 2, divisor) == [list(range(12))] * 2


def _whole_again(group: dist.ProcessGroup, divisor: int) -> list[int]:
    layout = PackedLayout.make([5, 0, 7], cp_group=group, divisor=divisor)
    return layout.unshard(layout.shard(torch.arange(12))).tolist()


def test_one_rank_holds_the_pack_as_it_is() -> None:
    layout = PackedLayout.make([3, 0, 1], halo=4)
    assert layout.padded == layout.lengths == (3, 0, 1) and layout.tokens == 4 and layout.offsets == (0, 3, 3, 4)
    assert layout.positions.tolist() == [0, 1, 2, 0] and layout.segments.tolist() == [0, 0, 0, 2]
    assert layout.real.all() and layout.source.tolist() == [0, 1, 2, 3] and layout.halo == 0
    x = torch.randn(4, 2, requires_grad=True)
    assert layout.shard(x) is x and torch.equal(layout.unshard(x), x) and not layout.unshard(x).requires_grad


def test_zigzag_by_hand() -> None:
    """Five tokens on two ranks: chunks of two, of which the last rank's adjoin."""
    first, second = (PackedLayout.make([5], cp_rank=r, cp_size=2) for r in range(2))
    assert first.padded == (8,) and first.positions.tolist() == [0, 1, 6, 7]
    assert first.real.tolist() == [True, True, False, False]
    assert second.positions.tolist() == [2, 3, 4, 5] and second.real.tolist() == [True, True, True, False]
    assert second.pieces == (Piece(segment=0, start=2, end=6, row=0),)


def test_rows_wanted_twice_are_added_one_after_the_other() -> None:
    """Chunks of one row: with a halo of 4, up to four pieces want the same row."""
    layout = PackedLayout.make([8, 3], cp_rank=1, cp_size=4, halo=4)
    parts = [layout.send_rows[entries].tolist() for entries in layout.sent_entries]
    assert len(parts) > 1 and all(len(set(rows)) == len(rows) for rows in parts)
    assert sorted(torch.cat(layout.sent_entries).tolist()) == list(range(len(layout.send_rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_shard_fills_padding(dtype: torch.dtype) -> None:
    x = torch.arange(1, 11).view(5, 2).to(dtype)
    layout = PackedLayout.make([5], cp_rank=1, cp_size=2)
    got = layout.shard(x, fill=1)
    assert got.dtype == dtype and torch.equal(got[:3], x[2:]) and (got[3] == 1).all()


def test_gradient_of_a_shard_skips_padding() -> None:
    x = torch.zeros(5, requires_grad=True)
    layout = PackedLayout.make([5], cp_rank=1, cp_size=2)
    layout.shard(x).backward(torch.tensor([1.0, 2.0, 4.0, float("nan")]))
    assert x.grad.tolist() == [0, 0, 1, 2, 4]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="divisor must be at least 1: 0"):
        PackedLayout.make([3], divisor=0)
    with pytest.raises(ValueError, match="must not be negative"):
        PackedLayout.make([3, -1])
    with pytest.raises(ValueError, match="halo must not be negative"):
        PackedLayout.make([3], halo=-1)
    with pytest.raises(ValueError, match="'contiguous'"):
        PackedLayout.make([3], sharding="striped")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cp_rank"):
        PackedLayout.make([3], cp_rank=2, cp_size=2)
    with pytest.raises(ValueError, match="cp_group"):
        PackedLayout.make([3], cp_size=2).unshard(torch.zeros(2))


def _tensors(layout: PackedLayout) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    values |= {f"sent {i}": x for i, x in enumerate(layout.sent_entries)}
    return {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}


def test_to_moves_every_tensor() -> None:
    layout = PackedLayout.make([9, 2, 5], cp_rank=1, cp_size=2, halo=3, sharding="contiguous")
    moved = layout.to("meta")
    assert {n: (x.shape, x.dtype) for n, x in _tensors(moved).items()} == {
        n: (x.shape, x.dtype) for n, x in _tensors(layout).items()
    }
    assert all(x.device.type == "meta" for x in _tensors(moved).values())
    assert moved.pieces == layout.pieces and moved.halo == 3


@pytest.mark.gpu
def test_made_on_the_gpu_without_waiting_for_it() -> None:
    lengths = [1000, 0, 1, 17, 4096, 3]
    torch.zeros(1, device="cuda")
    for size in (1, 2, 4):
        torch.cuda.set_sync_debug_mode("error")
        try:
            layout = PackedLayout.make(lengths, "cuda", cp_rank=size - 1, cp_size=size, halo=4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        host = _tensors(PackedLayout.make(lengths, cp_rank=size - 1, cp_size=size, halo=4))
        for name, x in _tensors(layout).items():
            assert x.is_cuda and torch.equal(x.cpu(), host[name]), name
