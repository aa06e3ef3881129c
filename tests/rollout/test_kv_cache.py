"""The ragged cache against attention written out one query at a time in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miles_spec.rollout.kv_cache import RaggedCache
from oracles.attention import attend

HEADS, GROUP, SIZE, CAPACITY, LAYERS = 2, 3, 8, 16, 2
SCALE = 0.3


class Sequences:
    """A cache, and beside it a plain list of the keys and values that each row should hold."""

    def __init__(self, rows: int) -> None:
        self.cache = RaggedCache(
            layers=LAYERS, rows=rows, capacity=CAPACITY, heads=HEADS, head_size=SIZE, dtype=torch.float64,
            device=torch.device("cpu"),
        )  # fmt: skip
        for store in (*self.cache.keys, *self.cache.values):
            store.fill_(1e9)  # would show in any result that it reached
        self.held: dict[tuple[int, int], dict[int, tuple[Tensor, Tensor]]] = {
            (layer, row): {} for layer in range(LAYERS) for row in range(rows)
        }
        self.random = torch.Generator().manual_seed(0)

    def forward(self, rows: list[int], positions: list[list[int]], longest: int, *, as_slice: bool = False) -> None:
        """Runs tokens at `positions` in `rows` through every layer and compares."""
        index = slice(rows[0], rows[-1] + 1) if as_slice else torch.tensor(rows)
        call = self.cache.attend(index, torch.tensor(positions), longest)
        count = len(positions[0])
        for layer in range(LAYERS):
            query = torch.randn(len(rows), HEADS * GROUP, count, SIZE, generator=self.random, dtype=torch.float64)
            key, value = torch.randn(2, len(rows), HEADS, count, SIZE, generator=self.random, dtype=torch.float64)
            got = call(layer, query, key, value, SCALE)
            for b, row in enumerate(rows):
                held = self.held[layer, row]
                for i, at in enumerate(positions[b]):
                    held[at] = key[b, :, i], value[b, :, i]
                for i, at in enumerate(positions[b]):
                    for head in range(HEADS * GROUP):
                        keys, values = ([held[p][part][head // GROUP] for p in range(at + 1)] for part in (0, 1))
                        expected = attend(query[b, head, i], keys, values, SCALE)
                        torch.testing.assert_close(got[b, head, i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("as_slice", [True, False])
def test_rows_of_different_lengths(as_slice: bool) -> None:
    sequences = Sequences(3)
    sequences.forward([0, 1, 2], [[0, 1, 2, 3]] * 3, 4, as_slice=as_slice)
    # row 1 has only two tokens; what prefill padded it with is overwritten before it is seen
    sequences.forward([0, 1, 2], [[4, 5], [2, 3], [3, 4]], 6, as_slice=as_slice)
    # row 0 had a token rejected and takes position 5 again
    sequences.forward([0, 1, 2], [[5], [4], [5]], 6, as_slice=as_slice)


def test_rows_in_any_order_and_a_part_of_them() -> None:
    sequences = Sequences(4)
    sequences.forward([3, 0], [[0, 1, 2]] * 2, 3)
    sequences.forward([1], [[0]], 1)
    sequences.forward([0, 1, 3], [[3], [1], [3]], 4)


def test_longest_may_be_more_than_is_there() -> None:
    sequences = Sequences(2)
    sequences.forward([0, 1], [[0], [0]], CAPACITY, as_slice=True)


def test_a_copied_row_goes_on_alone() -> None:
    sequences = Sequences(4)
    sequences.forward([0], [[0, 1, 2]], 3)
    sequences.cache.copy(0, [1, 3], 2)
    for layer in range(LAYERS):
        for row in (1, 3):
            sequences.held[layer, row] = {p: sequences.held[layer, 0][p] for p in (0, 1)}
            assert (sequences.cache.keys[layer][row, 2:] == 1e9).all()
    sequences.forward([0, 1, 3], [[3], [2], [2]], 4)
    sequences.forward([0, 1, 3], [[4], [3], [3]], 5)
