from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distributed import Ranks
from miles_spec.kernels.linear import Product, add_product, gather_states, vocab_range, whole_vocab
from oracles.numbers import relative_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _factors(dtype: torch.dtype, device: str, n: int = 7, v: int = 50, h: int = 24) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, h, generator=g).to(device, dtype) for rows in (n, v))


def _limit(dtype: torch.dtype, device: str) -> float:
    """On a GPU nothing is rounded to half precision; on a CPU the result of a product is."""
    return 1e-6 if dtype == torch.float32 or device == "cuda" else 3e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(dtype: torch.dtype, device: str) -> None:
    x, weight = _factors(dtype, device)
    product = Product(x, 50, 7)
    # whole, fewer rows, columns of the weight, and more rows than asked for of fewer columns
    taller = torch.cat([x, x])
    for a, b in ((x, weight), (x[2:5], weight), (x, weight[11:30]), (taller, weight[:25]), (x[:0], weight)):
        got = product(a, b)
        assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == (len(a), len(b))
        assert relative_error(got, a.double() @ b.double().T) < _limit(dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_product_reuses_its_memory(device: str) -> None:
    x, weight = _factors(torch.bfloat16, device)
    product = Product(x, 50, 7)
    logits = product(x, weight)
    narrow = product.narrow(logits)
    assert narrow.dtype == torch.bfloat16 and narrow.shape == logits.shape
    before = logits.clone()
    narrow.fill_(float("nan"))
    assert torch.equal(logits, before)
    again = product(x[:3], weight)
    assert again.data_ptr() == logits.data_ptr() and product.narrow(again).data_ptr() == narrow.data_ptr()
    single = Product(x.float(), 50, 7)
    wide = single(x.float(), weight.float())
    assert single.narrow(wide).data_ptr() == wide.data_ptr()


def test_product_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="float64"):
        Product(torch.zeros(1, 4, dtype=torch.float64), 5, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [True, False])
def test_sum_of_products(dtype: torch.dtype, device: str, wide: bool) -> None:
    x, weight = _factors(dtype, device)
    total = torch.full((7, 50), float("nan"), device=device, dtype=torch.float32 if wide else dtype)
    add_product(total, x, weight.T, first=True)
    exact = x.double() @ weight.double().T
    assert relative_error(total, exact) < (_limit(dtype, device) if wide else _limit(dtype, "cpu"))
    if wide:
        add_product(total, 2 * x, weight.T, first=False)
        assert relative_error(total, 3 * exact) < _limit(dtype, device)


def _gathered(group: dist.ProcessGroup, rows: int) -> tuple[np.ndarray, tuple[int, int]]:
    state = torch.arange(rows * 3.0).view(rows, 3) + 100 * dist.get_rank(group)
    return gather_states(state, group).numpy(), vocab_range(5, group)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("rows", [0, 2])
def test_states_come_in_the_order_of_ranks(ranks: Ranks, size: int, rows: int) -> None:
    state = np.arange(rows * 3.0).reshape(rows, 3)
    for rank, (got, shard) in enumerate(ranks.run(_gathered, size, rows)):
        assert np.array_equal(got, np.stack([state + 100 * r for r in range(size)]))
        assert shard == (5 * rank, 5 * rank + 5)


def _whole(group: dist.ProcessGroup) -> np.ndarray:
    start, end = vocab_range(3, group)
    weight = torch.arange(24.0, requires_grad=True).view(12, 2)
    whole = whole_vocab(weight[start:end], group)
    assert not whole.requires_grad
    return whole.numpy()


def test_a_weight_is_put_together_from_its_shares(ranks: Ranks) -> None:
    for size in (1, 4):
        for got in ranks.run(_whole, size):
            assert np.array_equal(got, np.arange(6.0 * size).reshape(-1, 2))


def test_without_a_group() -> None:
    state = torch.randn(4, 3)
    assert torch.equal(gather_states(state, None), state[None])
    assert vocab_range(5, None) == (0, 5)
