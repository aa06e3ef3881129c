"""Digests against a pure-Python oracle, and against every kind of fault they are there to notice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeEngine, flip_bit
from miles_spec.kernels.backend import interpreted
from miles_spec.sync import digest as module
from miles_spec.sync import digest_kernel, session
from miles_spec.sync.digest import COLUMNS, ROWS, Digester, digest, digests, row_weights
from miles_spec.sync.session import Gathered, Syncer
from miles_spec.sync.transports import InProcess
from oracles.digest import digest as oracle

CHUNK = ROWS * COLUMNS
"""Words."""

interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

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


@pytest.fixture(params=["reference", pytest.param("triton", marks=interpreter)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 3), (1,), (3,), (5, 7), (2, COLUMNS // 2), (3, COLUMNS + 1), (2, CHUNK // 4 + 1)], ids=str
)
def test_agrees_with_the_oracle(dtype: torch.dtype, shape: tuple[int, ...], backend: str) -> None:
    tensor = random(shape, dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert digest(tensor, backend) == oracle(str(dtype).removeprefix("torch."), list(shape), data, ROWS, COLUMNS)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_backends_agree(data: st.DataObject) -> None:
    """Tensors of all sizes and alignments in one launch, whose memory next to them is not zero."""
    named = []
    for i in range(data.draw(st.integers(1, 6))):
        size = data.draw(st.integers(0, 40) | st.integers(0, 12 * COLUMNS) | st.just(2 * CHUNK - 5))
        start, dtype = data.draw(st.integers(0, 9)), data.draw(st.sampled_from(DTYPES))
        named.append((str(i), random((start + size + 9,), dtype, seed=i)[start : start + size]))
    assert digests(named, "triton" if interpreted() else "auto") == digests(named, "reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_offsets_do_not_matter(dtype: torch.dtype, backend: str) -> None:
    base = random((9, 11), dtype)
    one, none = base[0, 4:6][::3], base[0, :0][::3]  # contiguous, and yet of stride 3
    views = (base.T, base[::2, 1::3], base[:, 1:], base[1:], base[3, 5], base[2, 3:6], base[:1].expand(4, 11))
    for view in (*views, one, none):
        assert digest(view, backend) == digest(view.clone(memory_format=torch.contiguous_format), backend)


def test_words_that_start_at_odd_addresses_are_taken(backend: str) -> None:
    """As views of files and of other processes' memory may: the storage itself starts there."""
    data = bytearray(random((1000,), torch.float32).view(torch.uint8).numpy().tobytes())
    for start in (1, 2, 3, 4, 6):
        tensor = torch.frombuffer(data, dtype=torch.uint8, offset=start, count=900)
        assert digest(tensor, backend) == digest(tensor.clone(), backend)
        assert digest(tensor[1:801], backend) == digest(tensor[1:801].clone(), backend)


def test_parameters_and_inference_tensors_are_taken() -> None:
    tensor = random((4, 4), torch.float32)
    with torch.inference_mode():
        inference = tensor.clone()
    assert digest(torch.nn.Parameter(tensor)) == digest(inference) == digest(tensor)


def test_shape_and_dtype_count() -> None:
    zeros = [torch.zeros(shape, dtype=dtype) for shape in [(), (0,), (4,), (2, 2), (1, 4)] for dtype in DTYPES]
    assert len({digest(t) for t in zeros}) == len(zeros)


def test_several_chunks_at_once_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's blocks without Triton, run here: the same digest for whole blocks, a part of one, and a part of a
    chunk."""
    tensor = random((5 * CHUNK + 17,), torch.float32)
    plain = digest(tensor)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(module, "GPU_CHUNKS", 2)
    assert digest(tensor, "reference") == plain


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 3, 7, 1000, CHUNK + 3]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]))
    tensor = random((size,), dtype, seed=data.draw(st.integers(0, 3)))
    changed = tensor.clone()
    flip_bit(changed, data.draw(st.integers(0, 8 * tensor.nbytes - 1)))
    assert digest(changed) != digest(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_of_many_words_are_noticed(dtype: torch.dtype) -> None:
    tensor = random((8, CHUNK // 4), dtype)
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
    for pair in ((0, 2), (0, 1), (1, 40), (0, len(flat) - 1), (3, 2 * COLUMNS + 3), (3, CHUNK + 3)):
        swapped, signs = flat.clone(), flat.clone()
        swapped[list(pair)] = flat[list(reversed(pair))]
        signs[list(pair)] *= -1
        faults |= {f"swapped {pair}": swapped.view_as(tensor), f"signs of {pair}": signs.view_as(tensor)}
    seen = digests([("as it was", tensor), *faults.items()])
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("step", [1, COLUMNS], ids=["in a row", "in a column"])
def test_changes_of_the_top_bit_at_many_pairs_are_noticed(step: int) -> None:
    """What a hash linear over 64-bit words misses: two top bits cancel there, whatever the odd weights."""
    tensor = torch.zeros(64 * step, dtype=torch.int32)
    top = torch.iinfo(torch.int32).min
    seen = {digest(tensor)}
    for i in range(64):
        for j in range(i):
            changed = tensor.clone()
            changed[[i * step, j * step]] = top
            seen.add(digest(changed))
    assert len(seen) == 1 + 64 * 63 // 2


def test_pairs_of_row_weights_share_few_factors_of_two() -> None:
    """Which is why two swapped words of a column, or two flipped signs, are always noticed."""
    weights = row_weights(torch.device("cpu")).tolist()
    assert len(weights) == ROWS and all(a % 2 for a in weights)
    for i, a in enumerate(weights):
        for b in weights[:i]:
            assert (a - b) % (1 << 33) and (a + b) % (1 << 33)


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


@interpreter
def test_a_launch_is_of_the_moment_of_the_flush() -> None:
    tensor, strided = random((5,), torch.float32), random((4, 6), torch.float32)
    before = digests([("a", tensor), ("s", strided.T)])
    digester = Digester("triton")
    digester.add("a", tensor)
    digester.add("s", strided.T)
    strided.zero_()  # of which there is a copy
    digester.flush()
    tensor.zero_()
    digester.add("b", tensor)
    tensor.fill_(1)
    assert digester.read() == {**before, "b": digest(torch.ones(5))}
    assert digester.read() == {**before, "b": digest(torch.ones(5))}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors of each launch."""
    taken: list[int] = []
    launch: Callable[..., torch.Tensor] = digest_kernel.launch

    def noted(places, device):  # type: ignore[no-untyped-def]
        taken.append(len(places))
        return launch(places, device)

    monkeypatch.setattr(digest_kernel, "launch", noted)
    return taken


@interpreter
def test_tensors_share_a_launch_until_their_copies_are_large(
    launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [(str(i), random((30, 30), torch.float32, seed=i)) for i in range(7)]
    assert digests(named, "triton") == digests(named)
    assert launches == [7]
    monkeypatch.setattr(module, "COPIES_BYTES", 7500)
    turned = [(name, tensor.T) for name, tensor in named]
    assert digests(turned, "triton") == digests(turned)
    assert launches == [7, 3, 3, 1]


def test_column_sums_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    named = [(str(i), random((30, 30), torch.float32, seed=i)) for i in range(7)]
    seen = digests(named)
    taken: list[int] = []
    numbers = module._numbers
    monkeypatch.setattr(module, "_numbers", lambda sums: taken.append(len(sums)) or numbers(sums))  # type: ignore[func-returns-value]
    monkeypatch.setattr(module, "SUMS_BYTES", 2 * 8 * COLUMNS)
    assert digests(named) == seen and taken == [3, 3, 1]


@interpreter
def test_a_session_reads_each_bucket_before_it_may_change(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are gathered in two buffers in turn, as `Gathered` allows with a tensor to a bucket."""
    monkeypatch.setattr(session, "Digester", partial(Digester, "triton"))
    new = {str(i): random((4, 4), torch.float32, seed=i) for i in range(6)}
    buffers = [torch.empty(4, 4) for _ in range(2)]

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for i, (name, tensor) in enumerate(new.items()):
            yield name, buffers[i % 2].copy_(tensor)

    engine = FakeEngine({"target": {name: torch.zeros(4, 4) for name in new}})
    target = Gathered(shapes={name: (4, 4) for name in new}, tensors=gather)
    assert all(r.verified for r in Syncer(InProcess(), bucket_bytes=1).push([engine], version=1, target=target))
    assert launches == [2, 1, 1, 1, 1]


def test_triton_is_not_imported_for_a_cpu() -> None:
    code = (
        "import sys, torch; from miles_spec.sync import loader, session; from miles_spec.sync.digest import digest; "
        "digest(torch.ones(3)); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_gives_nothing() -> None:
    assert digests([]) == {}
