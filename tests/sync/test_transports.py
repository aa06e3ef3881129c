"""Buckets: nothing lost, order kept, size kept, and no more taken than needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeEngine
from miles_spec.sync.transports import InProcess, buckets


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_buckets_hold_everything_in_order_within_their_size(sizes: list[int], limit: int) -> None:
    named = [(str(i), torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    made = list(buckets(named, limit))
    assert [item for bucket in made for item in bucket] == named
    used = [sum(t.nbytes for _, t in bucket) for bucket in made]
    for bucket, size in zip(made, used, strict=True):
        assert bucket and (size <= limit or len(bucket) == 1)
    for size, following in zip(used, made[1:], strict=False):
        assert size + following[0][1].nbytes > limit  # no bucket is cut short


def test_tensors_are_taken_one_bucket_at_a_time() -> None:
    taken = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(9):
            taken.append(i)
            yield str(i), torch.zeros(10, dtype=torch.uint8)

    first = next(buckets(source(), 30))
    assert [name for name, _ in first] == ["0", "1", "2"]
    assert taken == [0, 1, 2, 3]


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, not 0"):
        list(buckets([], 0))


def test_in_process_copies_detached() -> None:
    engine = FakeEngine({"target": {"w": torch.zeros(3)}})
    weight = torch.nn.Parameter(torch.ones(3))
    engine.begin_update(1, ["target"])
    InProcess().send(engine, "target", [("w", weight)])
    with torch.no_grad():
        weight.fill_(2)
    assert torch.equal(engine.tensors["target"]["w"], torch.ones(3))
    assert not engine.tensors["target"]["w"].requires_grad
