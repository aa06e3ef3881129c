"""What all rewards share: the protocol, the error, and the time limit.

Invariant: a reward is a finite float; whatever else a function does becomes one `RewardError` that names it and the
prompt, so that the loop can save a checkpoint before it stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any, Protocol, TypeVar

from miles_spec.types import Prompt

T = TypeVar("T")


class RewardError(ValueError):
    """A reward could not be had; one sentence with the function, the prompt and what happened."""


class OvertimeError(Exception):
    """A call took longer than it may."""


class Reward(Protocol):
    """Scores responses."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One finite reward per response; `prompts[i]` belongs to `responses[i]`. Raises `RewardError`."""
        ...


def as_reward(value: Any, who: str, prompt: str) -> float:
    """`value` as a float: a number, a bool, or a scalar of numpy or torch. Raises `RewardError` for all else, and for
    NaN and infinities."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RewardError(f"{who} returned {value!r:.80} for prompt {prompt}, which is not a number") from error
    if not math.isfinite(number):
        raise RewardError(f"{who} returned {number} for prompt {prompt}; a reward must be finite")
    return number


def within(seconds: float, call: Callable[[], T]) -> T:
    """`call()` in a thread of its own. Raises what it raises, and `OvertimeError` after `seconds`.

    A thread cannot be killed: a call that ran over time goes on in the background until it returns or the process ends,
    which does not wait for it.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            # SystemExit too: a reward must not end the process before the loop has saved
            outcome.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    Thread(target=run, name="reward", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError as error:
        if outcome.done():  # raised by the call itself
            raise
        raise OvertimeError(f"took more than {seconds:g} s") from error
