from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sharded
import sharded_attention
from distributed import Ranks
from miles_spec.kernels import attention, chain_attention
from miles_spec.kernels.backend import Backend
from miles_spec.kernels.chain_attention import ChainAttention
from miles_spec.kernels.layout import PackedLayout, Sharding
from oracles import attention as oracle
from oracles.numbers import relative_error
from sharded_attention import SHARDINGS

HEADS, KEY_HEADS, SIZE, SCALE = 4, 2, 8, 0.3
LENGTHS = [4, 0, 2, 7, 1]
STARTS = [1, 0, 8, 99]  # mid-piece, all of a piece, mid-piece, past the end
ROWS = [1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU the kernels run for real, below
BACKENDS: list[Backend] = ["reference", "triton"] if DEVICE == "cpu" else ["reference"]


def _random(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _qkv(
    n: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    shape: tuple[int, int, int] = (HEADS, KEY_HEADS, SIZE),
    width: int | None = None,
) -> list[Tensor]:
    """With values of their own `width`, if it is given."""
    heads, key_heads, size = shape
    shapes = (heads, size), (key_heads, size), (key_heads, width or size)
    made = [_random((n, *shape), 10 * seed + i) for i, shape in enumerate(shapes)]
    return [x.transpose(0, 1)[None].to(device, dtype).requires_grad_() for x in made]


def _forward(chain: ChainAttention, depths: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [(chain.deeper if d else chain)(0, *qkv, SCALE) for d, qkv in enumerate(depths)]


def _backward(outs: Sequence[Tensor]) -> None:
    total = torch.zeros((), dtype=torch.float64, device=outs[0].device)
    for d, out in enumerate(outs):
        total = total + (out.double() * _random(out.shape, d).to(out.device)).sum()
    total.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "starts", "rows"), [([6], [2], [2, 3, 4, 5]), (LENGTHS, STARTS, ROWS), ([3], [-5], [0, 1, 2])]
)
def test_matches_pure_loops(lengths: list[int], starts: list[int], rows: list[int], backend: Backend) -> None:
    layout = PackedLayout.make(lengths)
    chain = ChainAttention(layout, starts, backend)
    assert chain.rows.tolist() == rows
    depths = [_qkv(len(rows) if d else layout.tokens, d) for d in range(4)]
    got = _forward(chain, depths)
    exact = [tuple(x[0].detach().double() for x in qkv) for qkv in depths]
    first = (torch.arange(layout.tokens) - layout.positions).tolist()
    want = oracle.chain(exact, rows, first, SCALE)
    assert all(relative_error(a[0], b) < 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    [
        *((b, torch.float32, 1e-6) for b in BACKENDS),
        (BACKENDS[-1], torch.float64, 1e-12),
        ("auto", torch.bfloat16, 2**-7),
    ],
)
@pytest.mark.parametrize("width", [None, SIZE - 3])
def test_gradients_flow_through_every_depth(
    backend: Backend, dtype: torch.dtype, limit: float, width: int | None
) -> None:
    """Also with values narrower than queries and keys, as latent attention has them."""
    layout = PackedLayout.make(LENGTHS)
    depths = [_qkv(len(ROWS) if d else layout.tokens, d, dtype, width=width) for d in range(4)]
    exact = [[x.detach().double().requires_grad_() for x in qkv] for qkv in depths]
    got = _forward(ChainAttention(layout, STARTS, backend), depths)
    want = oracle.dense_chain(exact, torch.tensor(ROWS), layout.segments, SCALE)
    _backward(got)
    _backward(want)
    for d in range(4):
        assert got[d].dtype == dtype and relative_error(got[d], want[d]) < limit
        for a, b in zip(depths[d], exact[d], strict=True):
            assert b.grad.abs().sum() > 0 and relative_error(a.grad, b.grad) < limit


def test_a_chain_never_sees_another_row_or_a_later_token() -> None:
    """Changing any key that a query must not see leaves its output bit for bit."""
    layout = PackedLayout.make([5, 6])
    depths = [[x.detach() for x in _qkv(n, 30 + d)] for d, n in enumerate((11, 9, 9))]

    def run(base: list[int], own: list[int]) -> Tensor:
        spoiled = [[x.clone() for x in qkv] for qkv in depths]
        for d, qkv in enumerate(spoiled):
            for x in qkv[1:]:
                x[:, :, own if d else base] = 1e3
        chain = ChainAttention(layout, [1, 6])
        assert chain.rows.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
        return _forward(chain, spoiled)[2]

    clean = run([], [])
    # row 2 is the second query, row 8 the seventh
    assert torch.equal(run([3, 4, *range(5, 11)], [0, *range(2, 9)])[:, :, 1], clean[:, :, 1])
    assert torch.equal(run([9, 10, *range(5)], [*range(6), 7, 8])[:, :, 6], clean[:, :, 6])
    for base, own in (([0], []), ([2], []), ([], [1])):
        assert not torch.equal(run(base, own)[:, :, 1], clean[:, :, 1])


def test_autocast_changes_nothing() -> None:
    """Queries and keys leave the rotary embedding in float32, values the projection in bfloat16."""

    def run(autocast: bool) -> list[Tensor]:
        depths = [_qkv(n, d) for d, n in enumerate((14, 11, 11))]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs = _forward(
                ChainAttention(PackedLayout.make(LENGTHS), STARTS), [(q, k, v.bfloat16()) for q, k, v in depths]
            )
            _backward(outs)
        assert all(out.dtype == torch.bfloat16 for out in outs)
        return [*outs, *(x.grad for qkv in depths for x in qkv)]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize(
    ("rows", "depths", "heads", "key_heads", "size"),
    [(7, 1, 4, 4, 8), (70, 3, 6, 2, 80), (3, 7, 5, 1, 12), (2, 2, 64, 1, 40), (33, 2, 2, 2, 96)],
)
def test_merge_kernels_equal_the_reference(rows: int, depths: int, heads: int, key_heads: int, size: int) -> None:
    query, out, grad, d_query = (_random((rows, heads, size), i).to(DEVICE) for i in range(4))
    keys, values = (_random((depths, rows, key_heads, size), 4 + i).to(DEVICE) for i in range(2))
    # far apart, so that every branch of the running maximum is taken
    lse = 60 * _random((heads, rows), 6).to(DEVICE)
    given = (query, keys, values)
    want = chain_attention._merge_reference(*(x.double() for x in (*given, out, lse)), SCALE)
    got = chain_attention._merge_triton(*given, out.clone(), lse.clone(), SCALE)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    want = chain_attention._merge_reference_backward(*(x.double() for x in (grad, *given, *got, d_query)), SCALE)
    got = chain_attention._merge_triton_backward(grad, *given, *got, d_query.clone(), SCALE)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def test_each_piece_has_one_start() -> None:
    with pytest.raises(ValueError, match="zip"):
        ChainAttention(PackedLayout.make([3, 4]), [0])


def _check_sharded(ranks: Ranks, size: int, lengths: list[int], begin: list[int], sharding: Sharding) -> None:
    case = sharded_attention.Case(lengths=lengths, begin=begin, sharding=sharding, depths=4)
    want, _ = sharded_attention.run(PackedLayout.make(lengths), case)
    for got, leaked in ranks.run(sharded_attention.run_rank, size, case):
        assert leaked == 0
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_context_parallel_equals_one_rank(ranks: Ranks, size: int, sharding: Sharding) -> None:
    _check_sharded(ranks, size, [37, 0, 5, 1, 16], [11, 0, 2, 0, 16], sharding)


@settings(max_examples=15, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), min_size=1, max_size=4),
    sharding=st.sampled_from(SHARDINGS),
    size=st.sampled_from([2, 4]),
)
def test_any_lengths(ranks: Ranks, segments: list[tuple[int, int]], sharding: Sharding, size: int) -> None:
    lengths, begin = (list(x) for x in zip(*segments, strict=True))
    if any(lengths):
        _check_sharded(ranks, size, lengths, begin, sharding)


def _spoil_memory() -> None:
    """Leaves NaN in the blocks that the allocator hands out next."""
    blocks = [torch.full((2**n,), torch.nan, device="cuda") for n in range(7, 23) for _ in range(4)]
    del blocks


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "width"), [(64, None), (80, None), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_on_a_gpu(
    size: int, width: int | None, dtype: torch.dtype, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    attention._note_slow_path.cache_clear()
    host = PackedLayout.make([40, 0, 3, 333, 1, 129])
    starts = [17, 40, 43 + 200, 376, 10**6]
    shape = (8, 2, size)
    chain = ChainAttention(host.to("cuda"), starts, backend)
    rows = chain.rows.cpu()
    assert len(rows) == 23 + 3 + 133 + 1 + 1
    depths = [_qkv(len(rows) if d else host.tokens, d, dtype, "cuda", shape, width) for d in range(4)]
    exact = [[x.detach().cpu().double().requires_grad_() for x in qkv] for qkv in depths]
    want = oracle.dense_chain(exact, rows, host.segments, SCALE)
    _backward(want)
    _spoil_memory()
    with caplog.at_level(logging.WARNING):
        got = _forward(chain, depths)
        _spoil_memory()
        _backward(got)
    # the slow path says so, once
    assert len(caplog.records) == (dtype == torch.float32 and backend == "auto")
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and relative_error(a.cpu(), b) < limit
    for a, b in zip((x for qkv in depths for x in qkv), (x for qkv in exact for x in qkv), strict=True):
        assert relative_error(a.grad.cpu(), b.grad) < 2 * limit


@pytest.mark.gpu
def test_a_depth_does_not_wait_for_the_gpu() -> None:
    depths = [_qkv(n, d, torch.bfloat16, "cuda", (8, 2, 64)) for d, n in enumerate((60, 45, 45))]
    chain = ChainAttention(PackedLayout.make([20, 40], "cuda"), [5, 30])
    _backward(_forward(chain, depths))  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")  # what waits raises
    try:
        chain = ChainAttention(PackedLayout.make([20, 40], "cuda"), [5, 30])
        outs = _forward(chain, depths)
        sum(x.float().sum() for x in outs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_over_nccl(tmp_path: Path, size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    lengths, begin = [700, 0, 3, 257, 1, 64], [300, 0, 0, 256, 0, 99]
    cases = [
        sharded_attention.Case(
            lengths=lengths, begin=begin, sharding=sharding, depths=depths, shape=(8, 2, 64), dtype=dtype
        )
        for sharding in SHARDINGS
        for depths in (1, 4)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    sharded.over_nccl(sharded_attention.check_on_gpu, size, tmp_path / "store", cases)
