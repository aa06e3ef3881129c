"""Addresses of strided tensors against the set of their bytes, element by element."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spec.sync.runs import covers, joined, overlaps, runs_of, touches

BASE = torch.zeros(6, 5, 4, dtype=torch.int16)
VIEWS = {
    "all": BASE,
    "permuted": BASE.permute(2, 0, 1),
    "rows": BASE[2:4],
    "columns": BASE[:, :, 1:3],
    "middle": BASE[:, 2],
    "every other": BASE[::2, 1:, ::3],
    "one": BASE[3, 2, 1],
    "none": BASE[:, :0],
    "expanded": BASE[:1].expand(6, 5, 4),
}


def oracle(tensor: torch.Tensor) -> set[int]:
    found = set()
    for index in itertools.product(*(range(size) for size in tensor.shape)):
        address = tensor.data_ptr() + tensor.element_size() * sum(
            i * stride for i, stride in zip(index, tensor.stride(), strict=True)
        )
        found |= set(range(address, address + tensor.element_size()))
    return found


def bytes_of(runs: torch.Tensor) -> set[int]:
    return {byte for start, end in runs.tolist() for byte in range(start, end)}


@pytest.mark.parametrize("name", VIEWS)
def test_runs_are_the_tensors_bytes(name: str) -> None:
    runs = runs_of(VIEWS[name])
    assert bytes_of(runs) == bytes_of(joined([runs])) == oracle(VIEWS[name])


def test_side_by_side_is_one_run() -> None:
    assert len(runs_of(BASE)) == len(runs_of(BASE.permute(2, 0, 1))) == len(runs_of(BASE[1:3])) == 1
    assert len(runs_of(BASE[:, :, :2])) == 30


stretches = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=6)


def as_runs(pairs: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([(start, start + size) for start, size in pairs], dtype=torch.int64).view(-1, 2)


@settings(max_examples=100, deadline=None)
@given(stretches, stretches, stretches)
def test_sets(a: list[tuple[int, int]], b: list[tuple[int, int]], c: list[tuple[int, int]]) -> None:
    runs = {"a": as_runs(a), "b": as_runs(b), "c": as_runs(c)}
    sets = {name: bytes_of(r) for name, r in runs.items()}
    union = joined([runs["a"], runs["b"]])
    assert bytes_of(union) == sets["a"] | sets["b"]
    assert (union[1:, 0] > union[:-1, 1]).all()
    assert covers(union, runs["c"]) == (sets["c"] <= sets["a"] | sets["b"])
    assert touches(union, runs["c"]) == bool(sets["c"] & (sets["a"] | sets["b"]))
    common = {(x, y) for x, y in itertools.combinations("abc", 2) if sets[x] & sets[y]}
    found = set(overlaps(runs))
    assert found <= common
    assert {n for pair in found for n in pair} == {n for pair in common for n in pair}
