from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import pytest
import torch

from miles_spec.kernel_bench.measure import LEAST_TURNS, TURNS, WARM_UP, Meter

CPU = torch.device("cpu")
NAMES = "abcd"


def order(meter: Meter) -> str:
    """The calls that `NAMES` got in turns, one letter each."""
    made: list[str] = []
    times = meter.times({name: lambda name=name: made.append(name) for name in NAMES})
    assert list(times) == list(NAMES)
    assert made[: WARM_UP * len(NAMES)] == [name for name in NAMES for _ in range(WARM_UP)]
    return "".join(made[WARM_UP * len(NAMES) :])


def test_order_changes_from_round_to_round() -> None:
    made = order(Meter(CPU))
    rounds = [made[i : i + len(NAMES)] for i in range(0, len(made), len(NAMES))]
    assert len(rounds) == TURNS and all(sorted(r) == sorted(NAMES) for r in rounds)
    assert len(set(rounds)) > TURNS / 2
    # each call comes after several others: none always follows the same one
    followed = {(a, b) for a, b in pairwise(made)}
    assert all(len({a for a, b in followed if b == name}) > 1 for name in NAMES)
    assert order(Meter(CPU)) == made  # on every rank the same


def test_long_calls_take_few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls give the milliseconds that they would have taken."""
    monkeypatch.setattr(Meter, "_alone", lambda self, call: (call(), call()))
    monkeypatch.setattr(Meter, "_turn", lambda self, call: call())
    seen: Counter[float] = Counter()

    def call(ms: float) -> float:
        seen[ms] += 1
        return ms

    found = Meter(CPU).times({str(ms): lambda ms=ms: call(ms) for ms in (2000.0, 150.0, 1.0)})
    assert seen == {2000.0: 2 * 1 + 1, 150.0: 2 * WARM_UP + LEAST_TURNS, 1.0: 2 * WARM_UP + TURNS}
    assert (found["2000.0"].ms, found["2000.0"].spread) == (2000.0, 0)


def test_median_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 6.0, 8.0, 7.0])
    monkeypatch.setattr(Meter, "_turn", lambda self, call: next(taken))
    found = Meter(CPU).times({"x": lambda: None})["x"]
    assert (found.ms, found.host_ms) == (5.0, None)
    assert found.spread == pytest.approx((7 - 3) / 5)


@pytest.mark.gpu
def test_counts_on_a_gpu() -> None:
    meter, x = Meter(torch.device("cuda")), torch.zeros(1 << 20, device="cuda")
    assert meter.launches(lambda: x.add_(1)) == 1
    assert meter.launches(lambda: (x.add_(1), x.mul_(2), x.clone())) == 3
    assert meter.syncs(lambda: x.add_(1)) == 0
    assert meter.syncs(lambda: (x[0].item(), x[1].item())) == 2
    assert meter.peak_gib(lambda: torch.empty(1 << 28, dtype=torch.int8, device="cuda")) == pytest.approx(0.25)


@pytest.mark.gpu
def test_a_time_does_not_depend_on_its_neighbours() -> None:
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    calls = {
        "idle": lambda: time.sleep(0.05),
        "after a pause": lambda: a @ a,
        "hot": lambda: [a @ a for _ in range(30)][-1],
        "after heat": lambda: a @ a,
    }
    times = Meter(torch.device("cuda")).times(calls)
    assert times["after a pause"].ms == pytest.approx(times["after heat"].ms, rel=0.08)


@pytest.mark.gpu
def test_the_host_has_a_short_start_on_a_gpu() -> None:
    x = torch.zeros(1 << 10, device="cuda")

    def after(seconds: float) -> None:
        time.sleep(seconds)
        x.add_(1)

    times = Meter(torch.device("cuda")).times({"launch": lambda: after(0.001), "loop": lambda: after(0.05)})
    launch, loop = times["launch"], times["loop"]
    assert launch.host_ms is not None and launch.host_ms >= 1 and launch.ms < 0.5
    # the load takes 40 ms: queued as a whole before the call, it would hide most of the loop
    assert loop.host_ms is not None and loop.host_ms >= 50 and 40 < loop.ms < 52
