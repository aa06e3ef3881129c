"""How far apart two tensors are."""

from __future__ import annotations

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """`|got - want| / |want|` in the Euclidean norm, in float64; 0 for two empty tensors."""
    assert got.shape == want.shape
    if not got.numel():
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-300))
