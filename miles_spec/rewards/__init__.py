"""How responses are scored: `Scorer` makes of `[reward]` either a built-in judge or the user's own function.

Invariant: `[reward]` is checked when the scorer is made; after that only `RewardError` is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from miles_spec.config import RewardConfig
from miles_spec.plugins import suggest
from miles_spec.rewards.base import Reward, RewardError
from miles_spec.rewards.builtin import Builtin, Judge, MathVerify, ReasoningGym, exact
from miles_spec.rewards.user import UserReward
from miles_spec.types import Completion, Prompt

__all__ = ["Reward", "RewardError", "Scorer"]

_JUDGES: dict[str, Callable[[RewardConfig], Judge]] = {
    "exact": lambda config: exact,
    "math_verify": lambda config: MathVerify(config.timeout_s, bool(config.extract)),
    "reasoning_gym": lambda config: ReasoningGym(config.timeout_s, bool(config.extract)),
}
_COMPARING = ("exact", "math_verify")
"""Those that compare with a prompt's answer."""


class Scorer:
    """Scores completions as `[reward]` says."""

    def __init__(self, config: RewardConfig) -> None:
        """Raises `ValueError` for an unknown kind, a bad `extract`, a missing library, or a function that cannot be
        loaded or called."""
        if not config.timeout_s > 0:
            raise ValueError(f"reward.timeout_s must be positive, not {config.timeout_s}")
        self._kind = config.kind
        self._reward: Reward
        if ":" in config.kind:
            if config.extract:
                raise ValueError(
                    f'reward.extract is for built-in rewards; "{config.kind}" is given the full response and extracts '
                    "what it needs itself"
                )
            self._reward = UserReward(config.kind, config.timeout_s)
        elif config.kind in _JUDGES:
            self._reward = Builtin(_JUDGES[config.kind](config), config.kind, config.extract, config.timeout_s)
        else:
            raise ValueError(
                f'reward.kind = "{config.kind}" is none of: {", ".join(_JUDGES)}, "pkg.mod:function"'
                + suggest(config.kind, _JUDGES)
            )

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raises `ValueError` for the first prompt without an answer, if the reward compares with that."""
        if self._kind in _COMPARING and (id := next((p.id for p in prompts if p.answer is None), None)):
            raise ValueError(
                f'reward.kind = "{self._kind}" compares with an answer, and prompt {id} has none: set '
                "data.answer_column, or take the prompt out of the data"
            )

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """One finite reward per completion; `prompts[i]` is what `completions[i]` responds to. Raises `RewardError`."""
        assert len(prompts) == len(completions)
        return self._reward.score(prompts, [c.text for c in completions])
