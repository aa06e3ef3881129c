"""Names of dtypes go both ways, and a wrong one is named."""

from __future__ import annotations

import pytest
import torch

from miles_spec.sync.dtypes import dtype_name, dtype_of, metas_of
from miles_spec.types import TensorMeta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_names_go_both_ways(dtype: torch.dtype) -> None:
    assert dtype_of(dtype_name(dtype)) is dtype


@pytest.mark.parametrize("name", ["float5", "Tensor", ""])
def test_what_is_no_dtype_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no dtype"):
        dtype_of(name)


def test_metas_are_those_of_the_tensors() -> None:
    named = {"w": torch.zeros(2, 3, dtype=torch.float16), "scale": torch.zeros(())}
    assert metas_of(named.items()) == {
        "w": TensorMeta(shape=(2, 3), dtype="float16"),
        "scale": TensorMeta(shape=(), dtype="float32"),
    }
