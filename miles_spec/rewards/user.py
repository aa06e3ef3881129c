"""A user's reward function, `reward.kind = "pkg.mod:function"`.

Its parameters say what it is: `(prompt, response)` scores one response, `(prompts, responses)` a list of them; either
may be `async def`. `prompt` is a `miles_spec.types.Prompt`, `response` the full text without special tokens; both are
passed by keyword, and further parameters need defaults. One call may take `reward.timeout_s`.

Invariant: every call ends in finite floats, one per response, or in a `RewardError`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from miles_spec.plugins import check_signature, load
from miles_spec.rewards.base import OvertimeError, RewardError, as_reward, within
from miles_spec.types import Prompt

log = logging.getLogger(__name__)

Call = tuple[str, Mapping[str, Any]]
"""For whom, as error sentences put it, and the keyword arguments."""


class UserReward:
    """Calls a user's function.

    Asynchronous calls run at the same time, all in one event loop that lives as long as this object (so the function
    may keep a client session). Synchronous ones run one after the other, each in a thread of its own: signals cannot be
    used there, and one that runs over time goes on in the background, since a thread cannot be killed.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        """Raises `ValueError` if `path` names no function or one with other parameters."""
        what = f'reward.kind = "{path}"'
        self._fn = load(path, what="reward.kind")
        self._who, self._timeout_s = f"reward {path}", timeout_s
        try:
            names = set(inspect.signature(self._fn).parameters)
        except (TypeError, ValueError):
            names = set()  # check_signature says so
        self._batched = "prompts" in names
        if not self._batched and names.isdisjoint({"prompt", "response"}) and names:
            raise ValueError(
                f"{what} must take (prompt, response), or (prompts, responses) for a batch, but takes "
                f"{inspect.signature(self._fn)}"
            )
        check_signature(self._fn, ("prompts", "responses") if self._batched else ("prompt", "response"), what)
        self._loop: asyncio.AbstractEventLoop | None = None
        # an object with `async def __call__` is asynchronous as well
        if inspect.iscoroutinefunction(self._fn) or inspect.iscoroutinefunction(type(self._fn).__call__):
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="reward", daemon=True).start()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One reward per response. Raises `RewardError`."""
        if not prompts:
            return []
        if self._batched:
            calls = [(self._several(prompts), {"prompts": list(prompts), "responses": list(responses)})]
        else:
            calls = [(p.id, {"prompt": p, "response": r}) for p, r in zip(prompts, responses, strict=True)]
        values = [self._call(c) for c in calls] if self._loop is None else self._gather(calls)
        if self._batched:
            values = self._unbatched(values[0], prompts)
        return [as_reward(v, self._who, p.id) for v, p in zip(values, prompts, strict=True)]

    @staticmethod
    def _several(prompts: Sequence[Prompt]) -> str:
        return prompts[0].id if len(prompts) == 1 else f"{prompts[0].id} and {len(prompts) - 1} more"

    def _unbatched(self, values: Any, prompts: Sequence[Prompt]) -> list[Any]:
        try:
            listed = list(values)
        except TypeError as error:
            raise RewardError(
                f"{self._who} returned {values!r:.80} for prompt {self._several(prompts)}, not a list of rewards"
            ) from error
        if len(listed) != len(prompts):
            raise RewardError(
                f"{self._who} returned {len(listed)} rewards for {len(prompts)} responses, on prompt "
                f"{self._several(prompts)}"
            )
        return listed

    def _call(self, call: Call) -> Any:
        prompt, arguments = call
        try:
            return within(self._timeout_s, lambda: self._fn(**arguments))
        except OvertimeError as error:
            raise self._overtime(prompt) from error
        except Exception as error:
            raise self._raised(prompt, error) from error

    def _gather(self, calls: Sequence[Call]) -> list[Any]:
        assert self._loop is not None

        async def one(call: Call) -> Any:
            prompt, arguments = call
            limit = asyncio.timeout(self._timeout_s)
            try:
                async with limit:
                    return await self._fn(**arguments)
            except Exception as error:
                if limit.expired():
                    return self._overtime(prompt)
                return self._raised(prompt, error)
            except BaseException as error:  # SystemExit would end the event loop, and with it the wait for it
                return self._raised(prompt, error)

        async def every() -> list[Any]:
            return await asyncio.gather(*map(one, calls))

        pending = asyncio.run_coroutine_threadsafe(every(), self._loop)
        try:
            # calls that never await run one after the other, and their own time limits never fire
            values = pending.result(self._timeout_s * len(calls) + 1)
        except TimeoutError as error:
            pending.cancel()
            raise self._overtime(calls[0][0]) from error
        for value in values:
            if isinstance(value, RewardError):
                raise value
        return values

    def _overtime(self, prompt: str) -> RewardError:
        return RewardError(f"{self._who} took more than reward.timeout_s = {self._timeout_s:g} on prompt {prompt}")

    def _raised(self, prompt: str, error: BaseException) -> RewardError:
        log.info("%s raised on prompt %s", self._who, prompt, exc_info=error)  # where, for `run.log`
        raised = RewardError(f"{self._who} raised {type(error).__name__}: {error} on prompt {prompt}")
        raised.__cause__ = error
        return raised
