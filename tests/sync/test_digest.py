"""Digests against a pure-Python oracle, and against every kind of fault they are there to notice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import flip_bit
from miles_spec.sync import digest as module
from miles_spec.sync.digest import ROW_WORDS, Digester, digest, digests
from oracles.digest import digest as oracle

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 3), (1,), (3,), (5, 7), (2, ROW_WORDS // 2), (3, ROW_WORDS + 1)], ids=str
)
def test_agrees_with_the_oracle(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random(shape, dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert digest(tensor) == oracle(str(dtype).removeprefix("torch."), list(shape), data, ROW_WORDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_offsets_do_not_matter(dtype: torch.dtype) -> None:
    base = random((9, 11), dtype)
    for view in (base.T, base[::2, 1::3], base[:, 1:], base[1:], base[3, 5], base[2, 3:6], base[:1].expand(4, 11)):
        assert digest(view) == digest(view.clone(memory_format=torch.contiguous_format))


def test_parameters_and_inference_tensors_are_taken() -> None:
    tensor = random((4, 4), torch.float32)
    with torch.inference_mode():
        inference = tensor.clone()
    assert digest(torch.nn.Parameter(tensor)) == digest(inference) == digest(tensor)


def test_shape_and_dtype_count() -> None:
    zeros = [torch.zeros(shape, dtype=dtype) for shape in [(), (0,), (4,), (2, 2), (1, 4)] for dtype in DTYPES]
    assert len({digest(t) for t in zeros}) == len(zeros)


def test_several_rows_at_once_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's block of rows, run here: the same digest for whole blocks, a part of one, and a part of a row."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(module, "GPU_ROWS", 2)
    tensor = random((5 * ROW_WORDS + 17,), torch.float32)
    blocked = digest(tensor)
    monkeypatch.undo()
    assert blocked == digest(tensor)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 3, 7, 1000, 2 * ROW_WORDS + 3]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]))
    tensor = random((size,), dtype, seed=data.draw(st.integers(0, 3)))
    changed = tensor.clone()
    flip_bit(changed, data.draw(st.integers(0, 8 * tensor.nbytes - 1)))
    assert digest(changed) != digest(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_of_many_words_are_noticed(dtype: torch.dtype) -> None:
    tensor = random((8, ROW_WORDS // 4), dtype)
    flat = tensor.view(-1)
    faults = {
        "negated": -tensor,
        "zeroed": torch.zeros_like(tensor),
        "rows swapped": tensor.roll(1, 0),
        "shifted": flat.roll(1).view_as(tensor),
        "transposed": tensor.T.reshape(tensor.shape),
        "reversed": flat.flip(0).view_as(tensor),
        "a zeroed stretch": torch.where(torch.arange(len(flat)) < 100, 0, flat).view_as(tensor),
        "doubled": 2 * tensor,
    }
    for pair in ((0, 2), (0, 1), (1, 40), (0, len(flat) - 1), (3, ROW_WORDS + 3)):
        swapped, signs = flat.clone(), flat.clone()
        swapped[list(pair)] = flat[list(reversed(pair))]
        signs[list(pair)] *= -1
        faults |= {f"swapped {pair}": swapped.view_as(tensor), f"signs of {pair}": signs.view_as(tensor)}
    seen = digests([("as it was", tensor), *faults.items()])
    assert len(set(seen.values())) == len(seen)


def test_changes_of_the_top_bit_at_many_pairs_are_noticed() -> None:
    """What a hash linear over 64-bit words misses: two top bits cancel there, whatever the odd weights."""
    tensor = torch.zeros(64, dtype=torch.int32)
    top = torch.iinfo(torch.int32).min
    seen = {digest(tensor)}
    for i in range(64):
        for j in range(i):
            changed = tensor.clone()
            changed[[i, j]] = top
            seen.add(digest(changed))
    assert len(seen) == 1 + 64 * 63 // 2


def test_a_digest_is_of_the_moment_it_was_added() -> None:
    tensor = random((5,), torch.float32)
    before = digest(tensor)
    digester = Digester()
    digester.add("a", tensor)
    tensor.zero_()
    digester.add("b", tensor)
    assert digester.read() == {"a": before, "b": digest(torch.zeros(5))}
    with pytest.raises(ValueError, match="'a' comes twice"):
        digester.add("a", tensor)


def test_nothing_gives_nothing() -> None:
    assert digests([]) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_and_cpu_agree(dtype: torch.dtype) -> None:
    for shape in [(), (0,), (3,), (200, ROW_WORDS + 1)]:
        tensor = random(shape, dtype)
        assert digest(tensor.cuda()) == digest(tensor)
    assert digests([("a", tensor), ("b", tensor.cuda())])["b"] == digest(tensor)
