"""The built-in judges, with the real libraries, and what a policy could write to break them."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from miles_spec.config import RewardConfig
from miles_spec.rewards import RewardError, Scorer
from miles_spec.rewards.builtin import Builtin, MathVerify, ReasoningGym, exact
from miles_spec.types import Completion, Prompt, SpecCounts

LAST_BOXED = r"\\boxed\{(.*?)\}"


def prompt(answer: Any, record: dict[str, Any] | None = None) -> Prompt:
    return Prompt(id="p-7", tokens=(1,), text="", answer=answer, metadata=record or {})


def completion(text: str) -> Completion:
    return Completion(
        request_id="r", tokens=(), logprobs=(), accepted=(), versions=(), spec=SpecCounts(), finish="stop", text=text
    )


def score(kind: str, answer: Any, text: str, extract: str = "", record: dict[str, Any] | None = None) -> float:
    (reward,) = Scorer(RewardConfig(kind=kind, extract=extract)).score([prompt(answer, record)], [completion(text)])
    return reward


# Scorer and extraction


def test_kinds_and_settings() -> None:
    with pytest.raises(ValueError, match=r'reward\.kind = "exect" is none of: exact, .*; did you mean "exact"\?'):
        Scorer(RewardConfig(kind="exect"))
    with pytest.raises(ValueError, match=r"reward\.extract = '\(' is not a regular expression: "):
        Scorer(RewardConfig(extract="("))
    with pytest.raises(ValueError, match=r"reward\.extract = 'a\+' has no group"):
        Scorer(RewardConfig(extract="a+"))
    with pytest.raises(ValueError, match=r"reward\.timeout_s must be positive, not 0"):
        Scorer(RewardConfig(timeout_s=0))
    with pytest.raises(ValueError, match=r"reward\.extract is for built-in rewards"):
        Scorer(RewardConfig(kind="mod:f", extract="(a)"))


@pytest.mark.parametrize(("kind", "library"), [("math_verify", "math_verify"), ("reasoning_gym", "reasoning_gym")])
def test_missing_library(kind: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf'reward\.kind = "{kind}" needs the package .* pip install'):
        Scorer(RewardConfig(kind=kind))


def test_extraction_takes_the_last_match_and_its_first_group() -> None:
    reward = Builtin(exact, "exact", r"answer(?: is|:) (\S+?)(\.|$)")
    assert reward.extract("the answer is 3. No, answer: 4") == "4"
    assert reward.extract("no idea") is None
    assert Builtin(exact, "exact", r"(x)?y").extract("y") is None  # a group that took no part
    assert Builtin(exact, "exact", "").extract("  all \n") == "all"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"((?:\d+,?)+)\.$", "1,234 and 12,345."),
        (r"\\boxed{(.*?)}", r"\boxed{7}, then \boxed{42}"),
        (r"(?i)answer: (\w+)", "ANSWER: No. Answer: Yes"),
        (r"(?m)^(\d*)$", "1\n\n22\n"),
        (r"(?<=\$)(?P<n>\d+)(?!\d)(?P=n)?", "$12 $1212"),
    ],
)
def test_extraction_is_that_of_re(pattern: str, text: str) -> None:
    *_, last = (match[1] for match in re.finditer(pattern, text))
    assert Builtin(exact, "exact", pattern).extract(text) == last.strip()


def test_extraction_over_time(caplog: pytest.LogCaptureFixture) -> None:
    """With `re` the second takes 20 s, and three times that with two digits more."""
    config = RewardConfig(extract=r"((?:\d|\d\d)+)x$", timeout_s=0.2)
    texts = ["1x", "1" * 36 + "x.", "12x"]
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        rewards = Scorer(config).score([prompt("1"), prompt("1"), prompt("12")], [completion(t) for t in texts])
    assert rewards == [1, 0, 1]
    assert time.monotonic() - began < 5
    assert caplog.messages == ["reward.extract took more than 0.2 s on prompt p-7: scored 0"]


def test_one_reward_per_completion_in_order() -> None:
    prompts = [prompt("1"), prompt("2"), prompt("3")]
    rewards = Scorer(RewardConfig()).score(prompts, [completion("1"), completion("x"), completion(" 3 ")])
    assert rewards == [1.0, 0.0, 1.0]


# exact


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("42", "42", 1),
        (42, " 42.0\n", 1),
        ("1,000", "1e3", 1),
        ("1,000", "1.000", 0),
        ("1,00", "100", 0),
        ("-0.10", "-.1", 1),
        ("New  York", "new york", 1),
        ("New York", "newyork", 0),
        ("42", "The answer is 42", 0),
        ("nan", "NaN", 1),  # text, not a number
        ("1", "1e999999999", 0),
        ("1", "9" * 50_000, 0),
        ("", "", 1),
        (True, "true", 1),
    ],
)
def test_exact(answer: Any, text: str, reward: float) -> None:
    assert score("exact", answer, text) == reward


def test_exact_of_what_is_extracted() -> None:
    assert score("exact", "42", r"first \boxed{7}, then \boxed{42}", LAST_BOXED) == 1
    assert score("exact", "42", "42", LAST_BOXED) == 0


@pytest.mark.parametrize("kind", ["exact", "math_verify"])
def test_without_an_answer(kind: str) -> None:
    with pytest.raises(RewardError, match=f"reward {kind} needs an answer to compare with, but prompt p-7 has none"):
        score(kind, None, "1")


@pytest.mark.parametrize("kind", ["exact", "math_verify"])
def test_prompts_without_an_answer_are_found_before_the_run(kind: str) -> None:
    scorer = Scorer(RewardConfig(kind=kind))
    scorer.check([prompt("1"), prompt(0), prompt("")])
    with pytest.raises(ValueError, match=rf'^reward\.kind = "{kind}" compares with an answer, and prompt p-7 has none'):
        scorer.check([prompt("1"), prompt(None)])
    Scorer(RewardConfig(kind="reasoning_gym", extract="(.*)")).check([prompt(None)])


# math_verify

MATH = [
    (r"\frac{1}{2}", "So it is $0.5$.", "", 1),
    ("1/2", r"thus \boxed{\frac{2}{4}}", "", 1),
    ("1/2", r"thus \boxed{\frac{2}{3}}", "", 0),
    ("1/2", r"so <a>\frac{2}{4}</a>", r"<a>(.*)</a>", 1),
    ("(1,2)", "<a>(1, 2)</a>", r"<a>(.*)</a>", 1),
    ("(1,2)", "<a>(2, 1)</a>", r"<a>(.*)</a>", 0),
    ("2", "<a>1, 2</a>", r"<a>(.*)</a>", 0),
    (r"2\sqrt{2}", "<a>\\sqrt{8}</a>", r"<a>(.*)</a>", 1),
    (8, "The answer is 8.", "", 1),
    ("8", "8", r"<a>(.*)</a>", 0),
    ("8", "no number", "", 0),
    ("8", "", "", 0),
]


@pytest.mark.parametrize(("answer", "text", "extract", "reward"), MATH)
def test_math_verify(answer: Any, text: str, extract: str, reward: float) -> None:
    pytest.importorskip("math_verify")
    assert score("math_verify", answer, text, extract) == reward


def in_thread(call: Callable[[], Any]) -> Any:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


def test_math_verify_outside_the_main_thread() -> None:
    pytest.importorskip("math_verify")
    assert [in_thread(lambda c=c: score("math_verify", *c[:3])) for c in MATH] == [c[3] for c in MATH]


def test_math_verify_refuses_an_answer_it_cannot_read() -> None:
    pytest.importorskip("math_verify")
    for run in (lambda call: call(), in_thread):
        with pytest.raises(RewardError, match=r"cannot read the answer '' of prompt p-7 as mathematics"):
            error = run(lambda: score("math_verify", "", "8"))
            raise error


def test_math_verify_over_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    library = pytest.importorskip("math_verify.grader")
    pytest.importorskip("math_verify")
    monkeypatch.setattr(library, "sympy_expr_eq", lambda *a, **k: time.sleep(20))
    judge = MathVerify(0.5, extracted=False)
    began = time.monotonic()
    assert judge(prompt("8"), "8.0") == 0
    assert time.monotonic() - began < 5  # signals count whole seconds
    with caplog.at_level(logging.WARNING):
        assert in_thread(lambda: judge(prompt("8"), "8")) == 0
    assert time.monotonic() - began < 5
    assert "reward math_verify took more than 0.5 s on prompt p-7: scored 0" in caplog.text


# reasoning_gym


def entry(task: str = "chain_sum", **options: Any) -> dict[str, Any]:
    gym = pytest.importorskip("reasoning_gym")
    return {**gym.create_dataset(task, size=1, seed=3, **options)[0], "task": task, "options": options}


def test_reasoning_gym() -> None:
    e = entry()
    tagged = r"<answer>(.*?)</answer>"
    assert score("reasoning_gym", e["answer"], f"<answer> {e['answer']} </answer>", tagged, record=e) == 1
    assert score("reasoning_gym", e["answer"], "<answer>nothing</answer>", tagged, record=e) == 0
    # what the library would give part of the credit to
    assert score("reasoning_gym", e["answer"], f"It is {e['answer']}", tagged, record=e) == 0
    del e["task"], e["options"]  # an entry from a file
    assert score("reasoning_gym", e["answer"], f"<answer>{e['answer']}</answer>", tagged, record=e) == 1


def test_reasoning_gym_judges_by_the_options_of_the_task() -> None:
    # decimal_arithmetic allows an error of one unit in the last of `max_num_decimal_places`, 6 by default
    e = entry("decimal_arithmetic", min_num_decimal_places=1, max_num_decimal_places=1)
    near = str(float(e["answer"]) + 0.05)
    assert score("reasoning_gym", None, near, "(.+)", record=e) == 1
    assert score("reasoning_gym", None, near, "(.+)", record={**e, "options": {}}) == 0


def test_reasoning_gym_says_what_whole_responses_lead_to(caplog: pytest.LogCaptureFixture) -> None:
    e = entry()
    with caplog.at_level(logging.WARNING):
        assert 0 < score("reasoning_gym", e["answer"], f"It is {e['answer']}", record=e) < 1
    assert caplog.text.count("reward.extract is empty") == 1


def test_reasoning_gym_needs_an_entry() -> None:
    pytest.importorskip("reasoning_gym")
    for record in ({}, {"metadata": {}}, {"task": "chain_sun"}, {"metadata": "text"}):
        with pytest.raises(RewardError, match="cannot judge prompt p-7, whose record names no task of it"):
            score("reasoning_gym", "1", "1", record=record)


def with_judge(judge: Callable[[str, dict[str, Any]], Any], timeout_s: float = 5.0) -> ReasoningGym:
    reward = ReasoningGym(timeout_s, extracted=True)
    reward._task = lambda prompt, entry: judge  # type: ignore[method-assign]
    return reward


def test_reasoning_gym_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("reasoning_gym")

    def digits(answer: str, entry: dict[str, Any]) -> float:
        return float(int(answer) == int(entry["answer"]))

    judge = with_judge(digits)
    with caplog.at_level(logging.WARNING):
        assert judge(prompt("3", {"answer": "3"}), "three") == 0
    assert "cannot read an answer to prompt p-7 (ValueError" in caplog.text
    with pytest.raises(RewardError, match=r"raised ValueError: .* on prompt p-7, even for the answer in its record"):
        judge(prompt("x", {"answer": "x"}), "3")


def test_reasoning_gym_over_time(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("reasoning_gym")
    judge = with_judge(lambda answer, entry: time.sleep(5), timeout_s=0.1)
    with caplog.at_level(logging.WARNING):
        assert judge(prompt("3", {"answer": "3"}), "3") == 0
    assert "reward reasoning_gym took more than 0.1 s on prompt p-7: scored 0" in caplog.text


def test_reasoning_gym_nan_is_an_error() -> None:
    pytest.importorskip("reasoning_gym")
    reward = Builtin(with_judge(lambda answer, entry: float("nan")), "reasoning_gym", "(.*)")
    with pytest.raises(RewardError, match="reward reasoning_gym returned nan for prompt p-7; a reward must be finite"):
        reward.score([prompt("3", {"answer": "3"})], ["3"])
