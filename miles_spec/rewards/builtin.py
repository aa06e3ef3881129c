"""The built-in judges: `exact`, `math_verify` and `reasoning_gym`.

Invariant: nothing that a policy can write into a response raises or hangs; it scores 0 at worst. What raises is data
that cannot be judged.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

import regex  # type: ignore[import-untyped]

from miles_spec.plugins import require
from miles_spec.rewards.base import OvertimeError, RewardError, as_reward, within
from miles_spec.types import Prompt

log = logging.getLogger(__name__)


class Judge(Protocol):
    """Compares one answer with what the prompt asks for."""

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """The reward of `answer`, extracted and stripped. Raises `RewardError` if the prompt cannot be judged."""
        ...


class Builtin:
    """A reward that extracts the answer and has a judge compare it; a response without a match scores 0, and so does
    one that the pattern takes more than `timeout_s` of the CPU for."""

    def __init__(self, judge: Judge, kind: str, extract: str, timeout_s: float = 30.0) -> None:
        """Raises `ValueError` if `extract` is neither "" nor a regular expression with a group."""
        try:
            # not `re`, which knows no time limit and keeps every other thread waiting
            self._pattern = regex.compile(extract) if extract else None
        except regex.error as error:
            raise ValueError(f"reward.extract = {extract!r} is not a regular expression: {error}") from error
        if self._pattern is not None and not self._pattern.groups:
            raise ValueError(f"reward.extract = {extract!r} has no group: put the answer's part in parentheses")
        self._judge, self._who, self._timeout_s = judge, f"reward {kind}", timeout_s

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One reward per response. Raises `RewardError`."""
        return [self._score(p, r) for p, r in zip(prompts, responses, strict=True)]

    def _score(self, prompt: Prompt, response: str) -> float:
        try:
            answer = self.extract(response)
        except TimeoutError:
            log.warning("reward.extract took more than %g s on prompt %s: scored 0", self._timeout_s, prompt.id)
            return 0.0
        return 0.0 if answer is None else as_reward(self._judge(prompt, answer), self._who, prompt.id)

    def extract(self, response: str) -> str | None:
        """First group of the last match, stripped; None without one; all of the response without a pattern.

        Raises `TimeoutError` after `timeout_s`.
        """
        if self._pattern is None:
            return response.strip()
        found = None
        for match in self._pattern.finditer(response, timeout=self._timeout_s):
            found = match[1]
        return None if found is None else found.strip()


def _expected(prompt: Prompt, kind: str) -> str:
    if prompt.answer is None:
        raise RewardError(f"reward {kind} needs an answer to compare with, but prompt {prompt.id} has none")
    return str(prompt.answer)


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def exact(prompt: Prompt, answer: str) -> float:
    """1 if the answer equals the expected one, else 0: as decimal numbers if both are (`1,000` is `1e3`), otherwise as
    text without regard to case and amount of white space."""
    expected = _expected(prompt, "exact")
    a, b = _number(answer.strip()), _number(expected.strip())
    if a is not None and b is not None:
        return float(a == b)
    return float(answer.casefold().split() == expected.casefold().split())


class MathVerify:
    """1 if the library math-verify finds the answer equal to the expected one as mathematics, else 0.

    The expected answer and an extracted one are expressions, LaTeX or plain; a whole response is searched for its final
    expression. The library limits its time by signals, which only the main thread can have; in other threads the
    limit is ours. What runs over time scores 0.
    """

    def __init__(self, timeout_s: float, extracted: bool) -> None:
        """`extracted`: answers are bare expressions, not whole responses."""
        self._library = require("math_verify", package="math-verify", what='reward.kind = "math_verify"')
        self._timeout_s, self._extracted = timeout_s, extracted

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """Raises `RewardError` if the expected answer is not an expression."""
        expected = _delimited(_expected(prompt, "math_verify"))
        answer = _delimited(answer) if self._extracted else answer
        if threading.current_thread() is threading.main_thread():
            return self._compare(prompt, expected, answer, math.ceil(self._timeout_s))
        try:
            return within(self._timeout_s, lambda: self._compare(prompt, expected, answer, None))
        except OvertimeError as error:
            log.warning("reward math_verify %s on prompt %s: scored 0", error, prompt.id)
            return 0.0

    def _compare(self, prompt: Prompt, expected: str, answer: str, limit_s: int | None) -> float:
        gold = self._library.parse(expected, parsing_timeout=limit_s)
        if not gold:
            raise RewardError(
                f"reward math_verify cannot read the answer {prompt.answer!r} of prompt {prompt.id} as mathematics"
            )
        found = self._library.parse(answer, parsing_timeout=limit_s)
        return float(self._library.verify(gold, found, timeout_seconds=limit_s))


def _delimited(expression: str) -> str:
    """math-verify reads LaTeX such as `(1,2)` or `\\sqrt 2` whole only between delimiters."""
    return expression if any(d in expression for d in ("$", "\\boxed", "\\(", "\\[")) else f"${expression}$"


class ReasoningGym:
    """reasoning-gym's own verdict on the answer: 1 if right, and what the task gives otherwise.

    Most tasks give part of the credit to an answer that merely contains the right one, which a whole response often
    does: so extract. The prompt's record is the task's entry (`question`, `answer`, `metadata`), and the options that
    the task was made with, as `reasoning_gym:TASK` sources have it.
    """

    def __init__(self, timeout_s: float, extracted: bool) -> None:
        """Says once if whole responses are to be judged."""
        what = 'reward.kind = "reasoning_gym"'
        require("reasoning_gym", package="reasoning-gym", what=what)  # registers the tasks
        self._factory = require("reasoning_gym.factory", package="reasoning-gym", what=what)
        self._timeout_s = timeout_s
        self._tasks: dict[str, Callable[[str, dict[str, Any]], Any]] = {}
        if not extracted:
            log.warning(
                "reward.extract is empty: reasoning_gym gives part of the credit to a response that merely contains "
                "the answer"
            )

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """Raises `RewardError` if the prompt's record is not an entry of a task."""
        entry = dict(prompt.metadata)
        judge = self._task(prompt, entry)
        try:
            return float(within(self._timeout_s, lambda: judge(answer, entry)))
        except OvertimeError as error:
            log.warning("reward reasoning_gym %s on prompt %s: scored 0", error, prompt.id)
        except Exception as error:
            self._check_entry(prompt, entry, judge)
            log.warning("reasoning_gym cannot read an answer to prompt %s (%r): scored 0", prompt.id, error)
        return 0.0

    def _task(self, prompt: Prompt, entry: dict[str, Any]) -> Callable[[str, dict[str, Any]], Any]:
        try:
            name = entry.get("task") or entry["metadata"]["source_dataset"]
            options = entry.get("options") or {}
            key = json.dumps([name, options], sort_keys=True)
            if key not in self._tasks:
                self._tasks[key] = self._factory.create_dataset(name, size=1, seed=0, **options).score_answer
        except Exception as error:
            raise RewardError(
                f"reward reasoning_gym cannot judge prompt {prompt.id}, whose record names no task of it "
                f'({type(error).__name__}: {error}): use data.source = "reasoning_gym:TASK"'
            ) from error
        return self._tasks[key]

    def _check_entry(self, prompt: Prompt, entry: dict[str, Any], judge: Callable[[str, dict[str, Any]], Any]) -> None:
        """A judge that fails even on the right answer has been given a broken entry."""
        try:
            within(self._timeout_s, lambda: judge(entry["answer"], entry))
        except Exception as error:
            raise RewardError(
                f"reward reasoning_gym raised {type(error).__name__}: {error} on prompt {prompt.id}, even for the "
                "answer in its record"
            ) from error
