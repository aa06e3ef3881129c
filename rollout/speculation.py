"""What decoding would cost without speculation: a cost model of one engine, calibrated on that engine.

The one claim it serves is `net_speedup`: measured tokens/s over the tokens/s this model gives for the same responses
without a draft. Invariant: its error is measured on a real plain rollout, and travels with every number made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from miles_spec.types import Request, Sampling

if TYPE_CHECKING:
    from miles_spec.rollout.embedded import EmbeddedEngine

_STEPS = 6
"""Decoding steps that one batch size is timed for at a time; fewer in a context that has no room."""
_TURNS = 3
"""Times that each batch size is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a plain decoding step by batch size."""

    step_s: tuple[tuple[int, float], ...]
    """Batch size and measured seconds of a step, ascending."""
    error: float = float("nan")
    """Relative error on a real plain rollout, predicted over measured minus 1; NaN before `checked`."""

    def step_seconds(self, batch: int) -> float:
        """Linear between the measured sizes, proportional beyond the largest."""
        (low, low_s), *_ = self.step_s
        if batch <= low:
            return low_s
        for (a, a_s), (b, b_s) in pairwise(self.step_s):
            if batch <= b:
                return a_s + (b_s - a_s) * (batch - a) / (b - a)
        largest, largest_s = self.step_s[-1]
        return largest_s * batch / largest

    def decode_seconds(self, lengths: Sequence[int], rows: int) -> float:
        """Seconds to decode responses of `lengths` tokens in this order, `rows` at a time, a freed row taken at once.

        The first token of each response comes from prefill and is not decoded.
        """
        waiting = [n - 1 for n in reversed(lengths) if n > 1]
        running: list[int] = []
        seconds = 0.0
        while waiting or running:
            while waiting and len(running) < rows:
                running.append(waiting.pop())
            # all go on together until the shortest ends
            steps = min(running)
            seconds += steps * self.step_seconds(len(running))
            running = [n - steps for n in running if n > steps]
        return seconds

    def checked(self, measured_s: float, lengths: Sequence[int], rows: int) -> CostModel:
        """The same model with its error on a plain rollout that took `measured_s` for decoding; without an error if
        nothing was decoded, all responses being of one token."""
        if max(lengths) < 2:
            return self
        return replace(self, error=self.decode_seconds(lengths, rows) / measured_s - 1)


def calibrate(engine: EmbeddedEngine, prompt: Sequence[int]) -> CostModel:
    """Times plain decoding of `engine` after `prompt`, cut to fit, at batch sizes 1, 2, 4, ... up to `max_running`."""
    # a prompt of one token and the response's first, which prefill makes, are there before any step
    most = min(_STEPS, engine.max_context - 2)
    if most < 1:
        return CostModel(step_s=((1, 0.0),))
    depth = engine.draft_depth
    engine.set_draft_depth(0)
    sizes = sorted({min(2**i, engine.max_running) for i in range(engine.max_running.bit_length() + 1)})
    turns: dict[int, list[float]] = {size: [] for size in sizes}
    try:
        # sizes in turn, and the median over turns: a burst of other work on the machine spoils no size for good
        for turn in range(_TURNS + 1):
            for size in sizes:
                sampling = Sampling(max_new_tokens=most + 1, ignore_eos=True)
                prompt_tokens = tuple(prompt[: engine.max_context - most - 1])
                requests = [Request(id=str(i), tokens=prompt_tokens, sampling=sampling, seed=i) for i in range(size)]
                engine.take_times()
                engine.generate(requests)
                times = engine.take_times()
                if turn:  # the first makes buffers and warms caches
                    turns[size].append((times.verify_s + times.other_s) / most)
    finally:
        engine.set_draft_depth(depth)
    return CostModel(step_s=tuple((size, median(seconds)) for size, seconds in turns.items()))
