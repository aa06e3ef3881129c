from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed import Ranks
from memory import poison
from miles_spec.kernels import logprob as module
from miles_spec.kernels.backend import interpreted
from miles_spec.kernels.linear import vocab_range
from miles_spec.kernels.logprob import logprob
from oracles import losses
from oracles.numbers import relative_error

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="Triton's interpreter is off")
BACKENDS = ["reference", pytest.param("triton", marks=needs_interpreter)]


def _inputs(n: int = 13, h: int = 24, v: int = 50, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(dtype).requires_grad_()
    head = (0.5 * torch.randn(v, h, generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=g)
    labels[:2] = torch.tensor([0, v - 1])
    return hidden, head, labels, torch.randn(n, generator=g)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a vocabulary of 50 takes several blocks, the last one partly filled."""
    if interpreted():
        monkeypatch.setattr(module, "SWEEP_BLOCK", 16)
        monkeypatch.setattr(module, "GRADIENT_BLOCK", 16)


def _check(
    hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor, temperature: float, limit: float, **options: Any
) -> None:
    """Values and both gradients against float64."""
    dtype = hidden.dtype
    got = logprob(hidden, head, labels, temperature=temperature, **options)
    got_grads = torch.autograd.grad((got.logprob * weight).sum(), (hidden, head))

    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    want = losses.logprob(*exact, labels, temperature, dtype)
    want_grads = torch.autograd.grad((want[0] * weight.double()).sum(), exact)
    for a, b in zip((got.logprob, got.entropy, got.lse), want, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < limit
    assert got.best.tolist() == losses.product(*exact, dtype).argmax(-1).tolist()
    for a, b in zip(got_grads, want_grads, strict=True):
        assert a.dtype == dtype
        # rounded before the second product, after it, and between tiles
        assert relative_error(a, b) < (limit if dtype == torch.float32 else 2 * limit)
    assert not any(x.requires_grad for x in (got.entropy, got.lse, got.best))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [1, 5, 13, None])
def test_values_and_gradients(dtype: torch.dtype, limit: float, temperature: float, chunk_rows: int | None) -> None:
    _check(*_inputs(dtype=dtype), temperature, limit, chunk_rows=chunk_rows)


@needs_interpreter
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [2, 13])
@pytest.mark.parametrize("size", [1, 2, 16, 50])
def test_triton_values_and_gradients(temperature: float, chunk_rows: int, size: int) -> None:
    _check(*_inputs(n=7, v=size), temperature, 1e-6, chunk_rows=chunk_rows, backend="triton")


@needs_interpreter
def test_triton_at_its_own_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP_BLOCK", 4096)
    monkeypatch.setattr(module, "GRADIENT_BLOCK", 4096)
    _check(*_inputs(n=5, v=4500), 0.7, 3e-6, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_finite_differences(backend: Any) -> None:
    hidden, head, labels, weight = _inputs()
    got = logprob(hidden, head, labels, temperature=0.7, chunk_rows=5, backend=backend)
    grads = torch.autograd.grad((got.logprob * weight).sum(), (hidden, head))
    g = torch.Generator().manual_seed(1)
    exact = [x.detach().double() for x in (hidden, head)]
    for which, grad in enumerate(grads):
        for _ in range(3):
            step = [torch.zeros_like(x) for x in exact]
            step[which] = 1e-4 * torch.randn(grad.shape, generator=g, dtype=torch.float64)
            high, low = (
                (losses.logprob(*(x + sign * s for x, s in zip(exact, step, strict=True)), labels, 0.7)[0] * weight)
                for sign in (1, -1)
            )
            want = (high - low).sum() / 2
            assert float((grad.double() * step[which]).sum()) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plain_sum_weighs_rows_alike(backend: Any) -> None:
    # its gradient comes as one number, expanded
    hidden, head, labels, _ = _inputs()
    grads = [
        torch.autograd.grad((logprob(hidden, head, labels, backend=backend).logprob * weight).sum(), (hidden, head))
        for weight in (1, torch.ones(13))
    ]
    plain = torch.autograd.grad(logprob(hidden, head, labels, backend=backend).logprob.sum(), (hidden, head))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, *grads, strict=True))


@pytest.mark.parametrize(("n", "v"), [(600, 50), (50, 1200)])
def test_half_precision_adds_tiles_in_float32(n: int, v: int) -> None:
    # so many tiles that sums of half precision would be off by twice as much
    hidden, head, labels, weight = _inputs(n=n, v=v, dtype=torch.bfloat16)
    grads = [
        torch.autograd.grad((logprob(hidden, head, labels, chunk_rows=rows).logprob * weight).sum(), (hidden, head))
        for rows in (1, n)
    ]
    for tiled, whole in zip(*grads, strict=True):
        assert relative_error(tiled, whole) < 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_zero_counts_as_one(backend: Any) -> None:
    hidden, head, labels, _ = _inputs()
    got, want = (logprob(hidden, head, labels, temperature=t, backend=backend).logprob for t in (0, 1))
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: Any) -> None:
    hidden, head, _, _ = _inputs()
    got = logprob(hidden[:0], head, torch.empty(0, dtype=torch.int64), backend=backend)
    got.logprob.sum().backward()
    assert got.logprob.shape == got.entropy.shape == got.lse.shape == got.best.shape == (0,)
    assert torch.equal(head.grad, torch.zeros_like(head))


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_stay_finite(backend: Any) -> None:
    hidden, head, labels, _ = _inputs()
    big = (1e4 * hidden).detach().requires_grad_()
    got = logprob(big, head, labels, backend=backend)
    got.logprob.sum().backward()
    assert all(x.isfinite().all() for x in (got.logprob, got.entropy, got.lse, big.grad))
    want = losses.logprob(big.detach().double(), head.detach().double(), labels, 1.0)
    for a, b in zip((got.logprob, got.entropy, got.lse), want, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_of_equal_logits_is_the_best(backend: Any) -> None:
    # whole numbers, so that equal rows of the head give equal logits
    head = torch.zeros(40, 4)
    head[[3, 19, 21, 38], 0] = 2.0
    head[[5, 7, 33], 1] = 2.0
    hidden = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [-1, -1, 0, 0], [0, 0, 0, 0]])
    got = logprob(hidden, head, torch.zeros(4, dtype=torch.int64), backend=backend)
    assert got.best.tolist() == [3, 5, 0, 0] and got.best.dtype == torch.int64


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_outside_the_vocabulary_is_impossible(backend: Any) -> None:
    hidden, head, labels, _ = _inputs()
    labels[3], labels[4] = -1, 50
    got = logprob(hidden, head, labels, backend=backend).logprob
    assert got.isinf().nonzero().flatten().tolist() == [3, 4] and not got.isnan().any()


def test_an_empty_chunk_is_refused() -> None:
    hidden, head, labels, _ = _inputs()
    with pytest.raises(ValueError, match="chunk_rows"):
        logprob(hidden, head, labels, chunk_rows=0)


def test_autocast_computes_as_bfloat16_inputs_would() -> None:
    hidden, head, labels, weight = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logprob(hidden, head, labels, temperature=0.7)
        (got.logprob * weight).sum().backward()
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    want = logprob(*low, labels, temperature=0.7)
    (want.logprob * weight).sum().backward()
    assert torch.equal(got.logprob, want.logprob)
    for a, b in zip((hidden.grad, head.grad), (low[0].grad, low[1].grad), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


class _Made(TorchDispatchMode):
    """Notes the shape of every tensor with memory of its own that is made, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known]
        self.shapes += [x.shape for x in made]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_logits_exist_a_chunk_at_a_time(dtype: torch.dtype, frozen: bool) -> None:
    hidden, head, labels, _ = _inputs(dtype=dtype)
    head.requires_grad_(not frozen)
    with _Made() as made:
        logprob(hidden, head, labels, chunk_rows=4).logprob.sum().backward()
    # what has no side of 24 is logits or one number per row
    assert max(shape.numel() for shape in made.shapes if 24 not in shape) == 4 * 50
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    if frozen:
        assert head.grad is None
        assert max(shape[0] for shape in made.shapes if shape[1:] == (24,)) == 13
    else:
        assert torch.Size([50, 24]) in made.shapes


@pytest.mark.parametrize("rows", [1, 100, 3000, 20000])
@pytest.mark.parametrize("columns", [1, 130, 50257, 151936])
@pytest.mark.parametrize("chunk_rows", [1, 256, 768])
def test_tiles_fit_in_the_room_and_are_not_slivers(rows: int, columns: int, chunk_rows: int) -> None:
    n, c = module._tile(rows, columns, chunk_rows)
    assert 1 <= n <= rows and 1 <= c <= columns
    room = chunk_rows * columns
    assert n * c <= room
    if room >= 128 * 128:
        # a side is short only where the matrix itself is, and most of the room is used unless all of it fits
        assert min(n, c) >= min(128, rows, columns)
        assert n * c >= min(rows * columns, room) / 2 or c % 128 == 0


# Tensor parallel


def _shard(group: dist.ProcessGroup, backend: str, chunk_rows: int) -> list[np.ndarray]:
    hidden, head, labels, weight = _inputs(v=52)
    start, end = vocab_range(52 // group.size(), group)
    part = head.detach()[start:end].clone().requires_grad_()
    options: dict[str, Any] = dict(temperature=0.7, chunk_rows=chunk_rows, group=group, backend=backend)
    got = logprob(hidden, part, labels, **options)
    grads = torch.autograd.grad((got.logprob * weight).sum(), (hidden, part))
    return [x.detach().numpy() for x in (got.logprob, got.entropy, got.lse, got.best, *grads)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunk_rows", [3, 13])
def test_shards_give_what_the_whole_head_gives(ranks: Ranks, backend: str, size: int, chunk_rows: int) -> None:
    hidden, head, labels, weight = _inputs(v=52)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    want = losses.logprob(*exact, labels, 0.7)
    d_hidden, d_head = torch.autograd.grad((want[0] * weight.double()).sum(), exact)
    results = ranks.run(_shard, size, backend, chunk_rows)
    for *values, best, got_hidden, _ in results:
        for a, b in zip(values, want, strict=True):
            assert relative_error(torch.from_numpy(a), b) < 1e-6
        assert best.tolist() == (exact[0] @ exact[1].T).argmax(-1).tolist()
        assert relative_error(torch.from_numpy(got_hidden), d_hidden) < 1e-6
    assert relative_error(torch.from_numpy(np.concatenate([r[-1] for r in results])), d_head) < 1e-6
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0][:-1], other[:-1], strict=True))


def _edges(group: dist.ProcessGroup, backend: str) -> tuple[list[int], list[int]]:
    """Ties across shards, and a gradient through no rows at all."""
    rank, size = group.rank(), group.size()
    head = torch.zeros(8 // size, 2)
    for token in (2, 3, 6):
        if token // len(head) == rank:
            head[token % len(head), 0] = 1.0
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    empty = logprob(hidden[:0], head, torch.empty(0, dtype=torch.int64), group=group, backend=backend)  # type: ignore[arg-type]
    empty.logprob.sum().backward()
    best = logprob(hidden, head, torch.tensor([0, 7]), group=group, backend=backend).best  # type: ignore[arg-type]
    return best.tolist(), list(empty.lse.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 4])
def test_shards_with_ties_and_without_rows(ranks: Ranks, backend: str, size: int) -> None:
    assert ranks.run(_edges, size, backend) == [([2, 0], [0])] * size


# On a GPU


def _gpu_inputs(n: int, h: int, dtype: torch.dtype, v: int = 151936) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, h, generator=g, device="cuda").to(dtype).requires_grad_()
    head = (2 * h**-0.5 * torch.randn(v, h, generator=g, device="cuda")).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=g, device="cuda")
    labels[:2] = torch.tensor([0, v - 1])
    return hidden, head, labels, torch.randn(n, generator=g, device="cuda")


def _exact_on_gpu(hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor, temperature: float) -> list[Tensor]:
    """Values and gradients in float64, a few rows at a time."""
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    values = []
    for rows in torch.arange(len(labels), device="cuda").split(64):
        part = losses.logprob(exact[0][rows], exact[1], labels[rows], temperature)
        (part[0] * weight[rows].double()).sum().backward()
        values.append(torch.stack([x.detach() for x in part]))
    return [*torch.cat(values, dim=1), exact[0].grad, exact[1].grad]  # type: ignore[list-item]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
# a gradient is rounded twice, before the second product and after it; sums over a large vocabulary in float32 add to it
@pytest.mark.parametrize(
    ("dtype", "limit", "gradient_limit"), [(torch.float32, 1e-6, 3e-6), (torch.bfloat16, 1e-5, 3e-3)]
)
@pytest.mark.parametrize(("v", "chunk_rows"), [(151936, None), (151936, 128), (50257, None), (1000, 7)])
def test_on_a_gpu(
    backend: Any, dtype: torch.dtype, limit: float, gradient_limit: float, v: int, chunk_rows: int | None
) -> None:
    inputs = _gpu_inputs(300, 512, dtype, v)
    hidden, head, labels, weight = inputs
    want = _exact_on_gpu(*inputs, 0.7)
    poison()
    got = logprob(hidden, head, labels, temperature=0.7, chunk_rows=chunk_rows, backend=backend)
    poison()
    grads = torch.autograd.grad((got.logprob * weight).sum(), (hidden, head))
    # logits are never rounded to half precision
    for a, b in zip((got.logprob, got.entropy, got.lse), want[:3], strict=True):
        assert relative_error(a, b) < limit
    for a, b in zip(grads, want[3:], strict=True):
        assert a.dtype == dtype and relative_error(a, b) < gradient_limit
    logits = hidden.detach().double() @ head.detach().double().T
    top = logits.amax(-1)
    assert (top - logits.gather(-1, got.best[:, None])[:, 0]).max() < 1e-5 * top.max()


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    n = 16384
    hidden, head, labels, weight = _gpu_inputs(n, 64, torch.bfloat16)
    head.requires_grad_(False)
    assert n * head.shape[0] > 2**31
    got = logprob(hidden, head, labels, chunk_rows=n)
    (grad,) = torch.autograd.grad((got.logprob * weight).sum(), hidden)
    last = slice(n - 64, n)
    want = _exact_on_gpu(hidden[last], head, labels[last], weight[last], 1.0)
    for a, b in zip((got.logprob, got.entropy, got.lse), want[:3], strict=True):
        assert relative_error(a[last], b) < 1e-5
    assert relative_error(grad[last], want[3]) < 3e-3  # rounded twice


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [True, False])
def test_peak_memory_on_a_gpu(frozen: bool) -> None:
    hidden, head, labels, weight = _gpu_inputs(8192, 2048, torch.bfloat16)
    head.requires_grad_(not frozen)
    wanted = (hidden,) if frozen else (hidden, head)
    # the libraries' own memory is taken at the first call
    torch.autograd.grad((logprob(hidden, head, labels).logprob * weight).sum(), wanted)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad((logprob(hidden, head, labels).logprob * weight).sum(), wanted)
    above = torch.cuda.max_memory_allocated() - before
    # logits and their gradient; a frozen head's gradient would be 0.58 GiB more
    states = 4 * hidden.numel()
    allowed = (3 << 28) + 3 * states + (0 if frozen else 2 * head.numel())
    assert above < allowed, f"{above / 2**30:.2f} GiB"
