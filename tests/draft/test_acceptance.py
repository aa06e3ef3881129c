from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spec.draft.acceptance import Replay
from miles_spec.kernels.layout import PackedLayout
from miles_spec.kernels.shift import draft_targets
from oracles.walk import walk


@settings(max_examples=100, deadline=None)
@given(
    # prompt and response lengths; a segment of several turns repeats them
    turns=st.lists(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 7)), min_size=1, max_size=2), max_size=3),
    depth=st.integers(1, 4),
    hard=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_every_outcome_of_serving(
    turns: list[list[tuple[int, int]]], depth: int, hard: bool, seed: int
) -> None:
    loss_mask: list[bool] = []
    spans: list[tuple[int, int]] = []  # first block's row and last token of each response
    lengths = []
    for segment in turns:
        lengths.append(sum(p + n for p, n in segment))
        for prompt, response in segment:
            spans.append((len(loss_mask) + prompt - 1, len(loss_mask) + prompt + response - 1))
            loss_mask += [False] * prompt + [True] * response
    size = len(loss_mask)
    accept = torch.rand(depth, size, generator=torch.Generator().manual_seed(seed))
    if hard:
        accept = accept.round()
    layout = PackedLayout.make(lengths)
    mask = draft_targets(
        torch.zeros(size, dtype=torch.int64), torch.tensor(loss_mask, dtype=torch.bool), layout, depth
    ).mask

    got = Replay(accept, mask, layout).result()
    parts = [walk(accept.double().tolist(), start, last, depth) for start, last in spans]
    want = [sum(column) for column in zip(*parts, strict=True)] or [0.0, 0.0]
    if hard:
        assert [got.accepted, got.verify_steps] == want
    else:
        assert [got.accepted, got.verify_steps] == pytest.approx(want, rel=1e-12)


def test_a_known_response() -> None:
    # prompt of 2, response tokens 2..7; depth 2; all accepted: blocks at rows 1 and 4, tokens 3..5 and 6..7
    layout = PackedLayout.make([8])
    loss_mask = torch.arange(8) >= 2
    mask = draft_targets(torch.arange(8), loss_mask, layout, 2).mask
    perfect = Replay(torch.ones(2, 8), mask, layout).result()
    assert (perfect.accepted, perfect.verify_steps) == (4.0, 2.0)
    hopeless = Replay(torch.zeros(2, 8), mask, layout).result()
    assert (hopeless.accepted, hopeless.verify_steps) == (0.0, 5.0)
    assert perfect.accept_length == 3 and hopeless.accept_length == 1
