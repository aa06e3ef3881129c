from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miles_spec.kernels.logprob import logprob
from oracles import losses
from oracles.numbers import relative_error


def _inputs(n: int = 13, h: int = 24, v: int = 50, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(dtype).requires_grad_()
    head = (0.5 * torch.randn(v, h, generator=g)).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, v, (n,), generator=g), torch.randn(n, generator=g)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 1024])
def test_values_and_gradients(dtype: torch.dtype, limit: float, temperature: float, chunk_rows: int) -> None:
    hidden, head, labels, weight = _inputs(dtype=dtype)
    got = logprob(hidden, head, labels, temperature=temperature, chunk_rows=chunk_rows)
    got_grads = torch.autograd.grad((got.logprob * weight).sum(), (hidden, head))

    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    want = losses.logprob(*exact, labels, temperature, dtype)
    want_grads = torch.autograd.grad((want[0] * weight.double()).sum(), exact)
    for a, b in zip((got.logprob, got.entropy, got.lse), want, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < limit
    for a, b in zip(got_grads, want_grads, strict=True):
        assert a.dtype == dtype
        # rounded twice: before the second product and after it
        assert relative_error(a, b) < (limit if dtype == torch.float32 else 1.5 * limit)
    assert not got.entropy.requires_grad and not got.lse.requires_grad


def test_temperature_zero_counts_as_one() -> None:
    hidden, head, labels, _ = _inputs()
    assert torch.equal(
        logprob(hidden, head, labels, temperature=0).logprob, logprob(hidden, head, labels, temperature=1).logprob
    )


def test_frozen_head_gets_no_gradient() -> None:
    hidden, head, labels, _ = _inputs()
    head.requires_grad_(False)
    logprob(hidden, head, labels).logprob.sum().backward()
    assert head.grad is None and hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_no_rows() -> None:
    hidden, head, _, _ = _inputs()
    got = logprob(hidden[:0], head, torch.empty(0, dtype=torch.int64))
    got.logprob.sum().backward()
    assert got.logprob.shape == got.entropy.shape == got.lse.shape == (0,)
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_extreme_logits_stay_finite() -> None:
    hidden, head, labels, _ = _inputs()
    big = (1e4 * hidden).detach().requires_grad_()
    got = logprob(big, head, labels)
    got.logprob.sum().backward()
    assert all(x.isfinite().all() for x in (got.logprob, got.entropy, got.lse, big.grad))


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


class _Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that is made, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.seen.update(x.shape for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


def test_logits_exist_a_chunk_at_a_time() -> None:
    hidden, head, labels, _ = _inputs()
    with _Shapes() as shapes:
        logprob(hidden, head, labels, chunk_rows=4).logprob.sum().backward()
    assert max(shape[0] for shape in shapes.seen if shape[1:] == (50,) and shape != (24, 50)) == 4
