"""Names of dtypes, as they stand in commands, tables, digests and manifests: torch's, without "torch."."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from miles_spec.types import TensorMeta

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element to a dtype whose `==` compares bits."""


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.detach().view(INTEGERS[tensor.element_size()])


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """`torch.bfloat16` for `bfloat16`. Raises `ValueError` for a name that torch does not know."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype; use torch's names, such as 'bfloat16'")
    return dtype


def metas_of(named: Iterable[tuple[str, Tensor]]) -> dict[str, TensorMeta]:
    """Shape and dtype of every tensor, by name."""
    return {name: TensorMeta(shape=tuple(t.shape), dtype=dtype_name(t.dtype)) for name, t in named}
