"""What calls must give: the plain expressions are right, and one wrong number in a result is seen."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from miles_spec.kernel_bench import losses, packs, peers
from miles_spec.kernel_bench.contests import TINY, Outcome, Setting, relative_error
from miles_spec.kernel_bench.run import settle
from miles_spec.kernels.layout import PackedLayout


def tiny(dtype: torch.dtype = torch.float32) -> Setting:
    return Setting(device=torch.device("cpu"), dtype=dtype, sizes=TINY, backend="reference", peers=False)


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 0.5]), torch.zeros(2)) == 0.5
    assert relative_error(torch.tensor([2**53], dtype=torch.int64), torch.tensor([2**53])) == 0


def test_plain_roll_stays_in_its_segment() -> None:
    roll = peers.plain_roll([0, 3, 3, 4, 6])
    assert roll(torch.arange(1, 7)).tolist() == [2, 3, 0, 0, 6, 0]


def test_plain_targets() -> None:
    # a prompt of 3 and a response of 4: depth 1 trains rows 2, 3 and 4, which predict tokens 4, 5 and 6
    tokens, layout = torch.arange(100, 107), PackedLayout.make([7])
    inputs, labels, positions, teacher, keys, mask = packs.plain_targets(
        tokens, torch.arange(7) >= 3, layout, 2
    ).tolist()
    assert mask == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]]
    assert inputs == [[-1, -1, 103, 104, 105, -1, -1], [-1, -1, 104, 105, -1, -1, -1]]
    assert labels == [[-1, -1, 104, 105, 106, -1, -1], [-1, -1, 105, 106, -1, -1, -1]]
    assert positions == [[-1, -1, 2, 3, 4, -1, -1], [-1, -1, 3, 4, -1, -1, -1]]
    assert teacher == [[-1, -1, 3, 4, 5, -1, -1], [-1, -1, 4, 5, -1, -1, -1]]
    assert keys == [[1, 1, 1, 1, 1, 1, 0]] * 2


def test_block_weights() -> None:
    a, b, c, d = 0.5, 0.25, 0.75, 0.5
    weights = losses.block_weights(torch.tensor([a, b, c, d], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([1 + b + b * c, a + a * c, a * b, 1])


@pytest.mark.parametrize("field", ["labels", "mask", "teacher", "keys", "positions", "inputs"])
def test_one_wrong_index_is_seen(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packs.draft_targets

    def wrong(*arguments: Any, **options: Any) -> Any:
        targets = right(*arguments, **options)
        value = getattr(targets, field).clone()
        row = int(targets.mask[0].nonzero()[0])
        at = (0, row) if value.dim() == 2 else (row,)
        value[at] = not value[at] if value.dtype == torch.bool else value[at] + 1
        return replace(targets, **{field: value})

    monkeypatch.setattr(packs, "draft_targets", wrong)
    row = settle(next(packs.shift_contests(tiny())), None, tiny())[0]
    assert row.wrong and row.value_error and row.value_error > 0


def test_every_gradient_of_the_attention_counts() -> None:
    contest = next(packs.attention_contests(tiny()))
    ours = contest.entries[0]
    assert ours.truth is not None
    given = ours.load()()
    assert len(given.gradients) == 3 * TINY.chain
    for i in range(len(given.gradients)):
        spoiled = [g.clone() for g in given.gradients]
        spoiled[i][..., 0, 0] += 0.01
        value, gradient = ours.truth.errors(Outcome(value=given.value, gradients=tuple(spoiled)))
        assert value <= contest.tolerance[0] and gradient is not None and gradient > contest.tolerance[1]


def test_gradients_of_tv_may_be_coarser_in_half_precision() -> None:
    contests = itertools.islice(losses.draft_loss_contests(tiny(torch.bfloat16)), 2)
    ours = [entry for contest in contests for entry in contest.entries if entry.kind == "ours"]
    coarse = {entry.name for entry in ours if entry.tolerance == (2e-3, 0.2)}
    assert coarse == {"ours, tv", "ours, kl and end-to-end tv"}
    exact = next(losses.draft_loss_contests(tiny())).entries
    assert {e.tolerance for e in exact if e.kind == "ours"} <= {(1e-5, 1e-5), None}
