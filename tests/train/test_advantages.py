"""Advantages against plain Python, and groups that teach nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spec.train.advantages import advantages, informative
from oracles import policy

# rewards as tasks give them: coarse enough that rounding does not decide whether they differ
REWARDS = st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=2, max_size=9)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dr_grpo"])
@given(groups=st.lists(REWARDS, max_size=4))
def test_equals_the_oracle(kind: str, groups: list[list[float]]) -> None:
    got = advantages(groups, kind)
    assert [len(g) for g in got] == [len(g) for g in groups]
    for group, values in zip(groups, got, strict=True):
        assert values == pytest.approx(getattr(policy, kind)(group), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dr_grpo"])
def test_equal_rewards_give_exactly_zero(kind: str) -> None:
    # the float mean of three times 0.1 is not 0.1
    assert sum([0.1] * 3) / 3 != 0.1
    assert advantages([[0.1] * 3, [1.0, 1.0]], kind) == [[0.0] * 3, [0.0] * 2]


def test_informative() -> None:
    assert informative([0.0, 0.0, 1.0])
    assert not informative([0.1, 0.1, 0.1])
    assert not informative([1.0])


def test_groups_of_one_or_none() -> None:
    assert advantages([[3.0], []], "grpo") == [[0.0], []]
    with pytest.raises(ValueError, match="samples_per_prompt of at least 2"):
        advantages([[3.0]], "rloo")
