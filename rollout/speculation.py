"""What decoding costs without speculation, and how deep to draft for how many sequences together.

The cost model is of one engine, calibrated on that engine. It serves `net_speedup`: measured tokens/s over the tokens/s
this model gives for the same responses without a draft. How steps grow with the batch is timed step by step; how long
they take, prefill and what else a server does beside them included, is fitted to a real plain rollout. Invariant: its
error is measured on another one, and travels with every number made from it.

The controller compares steps that the engine has taken, plain ones and blocks, with what the draft's accept length
makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from miles_spec.rollout.engine import Engine
from miles_spec.types import EngineTimes, Request, Sampling

if TYPE_CHECKING:
    from miles_spec.rollout.embedded import EmbeddedEngine

_STEPS = 6
"""Decoding steps that one batch size is timed for at a time; fewer in a context that has no room."""
_BLOCKS = 4
"""The same for blocks, at least."""
_SERVED_STEPS = 48
"""The same for an engine that does not tell prefill from decoding: the difference of two calls needs more of them."""
_TURNS = 3
"""Times that each batch size is timed."""
_FADE = 0.5
"""Weight of a batch size's earlier measurements when a new one comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a plain decoding step by batch size."""

    step_s: tuple[tuple[int, float], ...]
    """Batch size and measured seconds of a step, ascending."""
    start_s: float = 0.0
    """Seconds before the first token, per request, of an engine that does not tell prefill from decoding; else 0."""
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

        The first token of each response comes from prefill and is not decoded; what it costs is `start_s`.
        """
        waiting = [n - 1 for n in reversed(lengths) if n > 1]
        running: list[int] = []
        seconds = self.start_s * len(lengths)
        while waiting or running:
            while waiting and len(running) < rows:
                running.append(waiting.pop())
            # all go on together until the shortest ends
            steps = min(running)
            seconds += steps * self.step_seconds(len(running))
            running = [n - steps for n in running if n > steps]
        return seconds

    def fitted(self, measured_s: float, lengths: Sequence[int], rows: int) -> CostModel:
        """All seconds times one factor, after which a plain rollout that took `measured_s` for decoding is predicted
        exactly; the same model if nothing was decoded."""
        if max(lengths) < 2:
            return self
        factor = measured_s / self.decode_seconds(lengths, rows)
        return replace(
            self,
            step_s=tuple((size, seconds * factor) for size, seconds in self.step_s),
            start_s=self.start_s * factor,
        )

    def checked(self, measured_s: float, lengths: Sequence[int], rows: int) -> CostModel:
        """The same model with its error on a plain rollout that took `measured_s` for decoding; without an error if
        nothing was decoded, all responses being of one token."""
        if max(lengths) < 2:
            return self
        return replace(self, error=self.decode_seconds(lengths, rows) / measured_s - 1)


def calibrate(engine: Engine, prompt: Sequence[int], *, served: bool = False) -> CostModel:
    """Times plain decoding of `engine`, which must be set to that, after `prompt`, cut to fit, at batch sizes 1, 2, 4,
    ... up to `max_running`.

    An engine that is `served` by other processes tells only how long a call took: there a step is the difference
    between long and short responses, and what the short ones cost is `CostModel.start_s`.
    """
    # a prompt of one token and the response's first, which prefill makes, are there before any step
    most = min(_SERVED_STEPS if served else _STEPS, engine.max_context - 2)
    if most < 1:
        return CostModel(step_s=((1, 0.0),))
    prompt_tokens = tuple(prompt[: engine.max_context - most - 1])

    def seconds(size: int, tokens: int) -> float:
        sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
        requests = [Request(id=str(i), tokens=prompt_tokens, sampling=sampling, seed=i) for i in range(size)]
        engine.take_times()
        engine.generate(requests)
        times = engine.take_times()
        return times.verify_s + times.other_s

    sizes = sorted({min(2**i, engine.max_running) for i in range(engine.max_running.bit_length() + 1)})
    turns: dict[int, list[float]] = {size: [] for size in sizes}
    starts: dict[int, list[float]] = {size: [] for size in sizes}
    # sizes in turn, and the median over turns: a burst of other work on the machine spoils no size for good
    for turn in range(_TURNS + 1):
        for size in sizes:
            start = seconds(size, 1) if served else 0.0
            whole = seconds(size, most + 1)
            if turn:  # the first makes buffers and warms caches
                turns[size].append(max(whole - start, 0.0) / most)
                starts[size].append(start / size)
    return CostModel(
        step_s=tuple((size, median(steps)) for size, steps in turns.items()), start_s=median(starts[sizes[-1]])
    )


class Controller:
    """Chooses how deep an engine drafts for how many sequences together, before each rollout."""

    def __init__(self, plain: CostModel, depths: Sequence[int], most: int, accept_length: float | None = None) -> None:
        """`plain` are the engine's steps without a draft, `depths` what it may draft, ascending, and `most` the
        sequences that it decodes together."""
        self.accept_length = accept_length
        """Of blocks of the largest depth, as it was last estimated; None if it was not. Of very short responses it
        promises a tenth too much (docs/metrics.md)."""
        self.depths = tuple(depths)
        self._most = most
        self._seen: dict[int, dict[int, tuple[float, float]]] = {0: {size: (1.0, s) for size, s in plain.step_s}}
        """By depth and batch size: steps, and their seconds; earlier ones have faded."""

    def observe(self, times: EngineTimes) -> None:
        """Takes up what the engine's steps took."""
        for (batch, depth), (steps, seconds) in times.by_batch.items():
            seen = self._seen.setdefault(depth, {})
            before_steps, before_s = seen.get(batch, (0.0, 0.0))
            seen[batch] = _FADE * before_steps + steps, _FADE * before_s + seconds

    def max_batches(self) -> tuple[int, ...]:
        """`[k]` up to how many sequences together to draft at least 1, 2, ... tokens, 0 for none: at each number of
        sequences the depth with the least seconds per token, put in order so that more sequences never draft deeper.
        All of them as long as there is no accept length or not every depth was timed."""
        deepest = self.depths[-1]
        if self.accept_length is None or not self._seen.keys() >= {*self.depths}:
            return (self._most,) * deepest
        worth = tokens_per_block(self.accept_length, deepest)
        models = {depth: self._model(depth) for depth in (0, *self.depths)}
        best = []
        for batch in range(1, self._most + 1):
            _, depth = min((model.step_seconds(batch) / worth[depth], depth) for depth, model in models.items())
            best.append(depth)
        return tuple(sum(depth >= least for depth in best) for least in range(1, deepest + 1))

    def _model(self, depth: int) -> CostModel:
        means = ((batch, seconds / steps) for batch, (steps, seconds) in self._seen[depth].items())
        return CostModel(step_s=tuple(sorted(means)))


def tokens_per_block(accept_length: float, depth: int) -> list[float]:
    """`[depth + 1]` expected tokens of blocks that draft 0, 1, ... `depth` tokens, if those of the last make
    `accept_length` and each drafted token is accepted with one probability, given that those before it were."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(depth + 1)) < accept_length else (low, middle)
    return [sum(low**i for i in range(n + 1)) for n in range(depth + 1)]


def time_blocks(engine: EmbeddedEngine, controller: Controller, prompt: Sequence[int]) -> None:
    """Has `controller` see blocks of each of its depths, after `prompt`, cut to fit, at batch sizes 1, 4, 16, ... up to
    `max_running`. Does nothing in a context without room."""
    if engine.max_context < 3:
        return
    sizes = sorted({min(4**i, engine.max_running) for i in range(engine.max_running.bit_length() + 1)})
    for depth in controller.depths:
        most = min(_BLOCKS * (depth + 1), engine.max_context - 2)
        sampling = Sampling(max_new_tokens=most, ignore_eos=True)
        tokens = tuple(prompt[: engine.max_context - most])
        engine.max_batches = (engine.max_running,) * depth
        for turn in range(_TURNS):
            for size in sizes:
                engine.take_times()
                engine.generate([Request(id=str(i), tokens=tokens, sampling=sampling, seed=i) for i in range(size)])
                if turn:  # the first makes buffers and warms caches
                    controller.observe(engine.take_times())
    engine.max_batches = ()
