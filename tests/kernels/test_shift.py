from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import draft_targets
from oracles.targets import rows


def _check(lengths: list[int], loss_mask: list[bool], depth: int) -> None:
    size = sum(lengths)
    tokens = [100 + i for i in range(size)]
    layout = PackedLayout.make(lengths)
    mask = torch.tensor(loss_mask, dtype=torch.bool)
    got = draft_targets(torch.tensor(tokens, dtype=torch.int64), mask, layout, depth)
    want = rows(tokens, loss_mask, lengths, depth)
    for d in range(depth):
        assert got.mask[d].tolist() == [r.counts for r in want[d]]
        assert got.positions[d].tolist() == [r.position for r in want[d]]
        for name, field in (("input", "inputs"), ("label", "labels"), ("teacher", "teacher")):
            values = getattr(got, field)[d].tolist()
            assert all(
                v == getattr(r, name) for v, r in zip(values, want[d], strict=True) if getattr(r, name) is not None
            )
    assert got.keys.tolist() == [r.input is not None for r in want[0]]
    # what lies outside is still safe to gather with
    assert ((got.teacher >= 0) & (got.teacher < max(size, 1))).all()
    assert got.inputs.shape == got.labels.shape == got.mask.shape == (depth, size)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    depth=st.integers(1, 5),
    data=st.data(),
)
def test_matches_the_contract_row_by_row(lengths: list[int], depth: int, data: st.DataObject) -> None:
    size = sum(lengths)
    _check(lengths, data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), depth)


def test_example_of_the_contract() -> None:
    layout = PackedLayout.make([7])
    mask = torch.tensor([False] * 3 + [True] * 4)
    got = draft_targets(torch.arange(7), mask, layout, 2)
    assert got.mask[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert got.labels[0][got.mask[0]].tolist() == [4, 5, 6]
    assert got.mask[1].nonzero().flatten().tolist() == [2, 3]


def test_depth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        draft_targets(torch.arange(3), torch.ones(3, dtype=torch.bool), PackedLayout.make([3]), 0)
