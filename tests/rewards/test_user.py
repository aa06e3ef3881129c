"""Users' functions of all four kinds, and each way in which one can fail: one `RewardError`, never a wrong number."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_spec.config import RewardConfig
from miles_spec.rewards import RewardError, Scorer
from miles_spec.types import Completion, Prompt, SpecCounts

SOURCE = """
import asyncio, time
import numpy, torch

running = most = 0
loops = set()

def sync(prompt, response): return len(response) + prompt.answer
def batched(prompts, responses, scale=1): return tuple(len(r) + p.answer for p, r in zip(prompts, responses))
async def async_batched(prompts, responses): return batched(prompts, responses)
async def asynchronous(prompt, response):
    global running, most
    loops.add(asyncio.get_running_loop())
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.05)
    running -= 1
    return sync(prompt, response)
class Judge:
    async def __call__(self, prompt, response): return sync(prompt, response)
judge = Judge()

def gives(value):
    return lambda prompt, response: value
an_int, a_bool, an_np, a_tensor = gives(1), gives(True), gives(numpy.float32(1)), gives(torch.tensor(1.0))
nan, infinite, text, nothing, many = gives(float("nan")), gives(-float("inf")), gives("1"), gives(None), gives([1, 2])
huge, vector = gives(10**400), gives(torch.ones(2))

def second(prompt, response):
    if prompt.id == "p1": raise KeyError("gone")
    return 1.0
async def async_second(prompt, response): return second(prompt, response)
async def async_nan(prompt, response): return float("nan") if prompt.id == "p1" else 0
def leaves(prompt, response): raise SystemExit(3)
async def async_leaves(prompt, response): raise SystemExit(3)
def own_timeout(prompt, response): raise TimeoutError("the judge's server")
async def async_own_timeout(prompt, response): raise TimeoutError("the judge's server")
def slow(prompt, response): time.sleep(3); return 1
async def async_slow(prompt, response): await asyncio.sleep(3 if prompt.id == "p1" else 0); return 1
async def async_blocking(prompt, response): time.sleep(3); return 1

def short(prompts, responses): return [1.0]
def scalar(prompts, responses): return 1.0
def batched_nan(prompts, responses): return [0.0, float("nan"), 1.0]
def batched_raises(prompts, responses): raise OSError("no space")
def slow_batch(prompts, responses): time.sleep(3); return [1] * len(prompts)

def other(question, answer): return 1.0
def three(prompt, response, extra): return 1.0
def half(prompt): return 1.0
def mixed(prompts, response): return [1.0]
def anything(*args, **kwargs): return 1.0
"""
PROMPTS = [Prompt(id=f"p{i}", tokens=(1,), text="", answer=10 * i) for i in range(3)]
TEXTS = ["", "a", "abc"]
COMPLETIONS = [
    Completion(
        request_id="r", tokens=(), logprobs=(), accepted=(), versions=(), spec=SpecCounts(), finish="stop", text=t
    )
    for t in TEXTS
]
EXPECTED = [0.0, 11.0, 23.0]


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`SOURCE` as `my_rewards` in the current directory."""
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_rewards", None)


def score(name: str, timeout_s: float = 30.0) -> list[float]:
    return Scorer(RewardConfig(kind=f"my_rewards:{name}", timeout_s=timeout_s)).score(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("name", ["sync", "batched", "asynchronous", "async_batched", "judge"])
def test_every_kind(name: str) -> None:
    rewards = score(name)
    assert rewards == EXPECTED
    assert all(type(r) is float for r in rewards)
    assert Scorer(RewardConfig(kind=f"my_rewards:{name}")).score([], []) == []


def test_asynchronous_calls_run_together_and_in_one_loop() -> None:
    scorer = Scorer(RewardConfig(kind="my_rewards:asynchronous"))
    for _ in range(2):
        assert scorer.score(PROMPTS, COMPLETIONS) == EXPECTED
    module = sys.modules["my_rewards"]
    assert module.most == 3
    assert len(module.loops) == 1


@pytest.mark.parametrize("name", ["an_int", "a_bool", "an_np", "a_tensor"])
def test_scalars(name: str) -> None:
    assert score(name) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nan", "returned nan for prompt p0; a reward must be finite"),
        ("infinite", "returned -inf for prompt p0; a reward must be finite"),
        ("text", "returned '1' for prompt p0, which is not a number"),
        ("nothing", "returned None for prompt p0, which is not a number"),
        ("many", r"returned \[1, 2\] for prompt p0, which is not a number"),
        ("huge", "returned 1000.* for prompt p0, which is not a number"),
        ("vector", r"returned tensor\(\[1., 1.\]\) for prompt p0, which is not a number"),
        ("second", "raised KeyError: 'gone' on prompt p1"),
        ("async_second", "raised KeyError: 'gone' on prompt p1"),
        ("async_nan", "returned nan for prompt p1; a reward must be finite"),
        ("leaves", r"raised RuntimeError: SystemExit\(3\) on prompt p0"),
        ("async_leaves", "raised SystemExit: 3 on prompt p0"),
        ("own_timeout", "raised TimeoutError: the judge's server on prompt p0"),
        ("async_own_timeout", "raised TimeoutError: the judge's server on prompt p0"),
        ("short", "returned 1 rewards for 3 responses, on prompt p0 and 2 more"),
        ("scalar", "returned 1.0 for prompt p0 and 2 more, not a list of rewards"),
        ("batched_nan", "returned nan for prompt p1; a reward must be finite"),
        ("batched_raises", "raised OSError: no space on prompt p0 and 2 more"),
    ],
)
def test_failures(name: str, sentence: str) -> None:
    with pytest.raises(RewardError, match=f"^reward my_rewards:{name} {sentence}$"):
        score(name)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("slow", "p0"), ("async_slow", "p1"), ("async_blocking", "p0"), ("slow_batch", "p0 and 2 more")],
)
def test_over_time(name: str, prompt: str) -> None:
    began = time.monotonic()
    with pytest.raises(RewardError, match=rf"{name} took more than reward\.timeout_s = 0\.1 on prompt {prompt}$"):
        score(name, timeout_s=0.1)
    assert time.monotonic() - began < 2.5
    assert all(t.daemon for t in threading.enumerate() if t.name == "reward")  # so the process can still end


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "other",
            r"must take \(prompt, response\), or \(prompts, responses\) for a batch, but takes \(question, answer",
        ),
        ("anything", r"must take \(prompt, response\), .* but takes \(\*args, \*\*kwargs\)"),
        ("three", r"three\(prompt, response, extra\) cannot be called as three\(prompt, response\): missing .*'extra'"),
        ("half", r"half\(prompt\) cannot be called as half\(prompt, response\)"),
        ("mixed", r"mixed\(prompts, response\) cannot be called as mixed\(prompts, responses\)"),
        ("absent", 'has no "absent"'),
    ],
)
def test_signatures_are_checked_at_start_up(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Scorer(RewardConfig(kind=f"my_rewards:{name}"))


def test_the_cause_is_kept() -> None:
    for name in ("second", "async_second"):
        with pytest.raises(RewardError) as caught:
            score(name)
        assert isinstance(caught.value.__cause__, KeyError)
