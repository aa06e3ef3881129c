"""The sampling half of a step: prompts, responses, rewards, and which groups are kept.

Invariant: a step's requests, their order and their seeds depend on the run's seed and the data's cursor alone, so a
resumed step samples the same responses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from miles_spec.live import LiveTable
from miles_spec.metrics import rollout_metrics
from miles_spec.requests import sampling, seed_of
from miles_spec.run import Run
from miles_spec.train.advantages import informative
from miles_spec.types import Completion, Prompt, Request, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """What one step sampled."""

    groups: list[list[Sample]]
    """The samples of each prompt, all scored."""
    metrics: dict[str, Any]
    """Of sampling and scoring."""

    @property
    def samples(self) -> list[Sample]:
        """All groups', in order."""
        return [s for group in self.groups for s in group]


def sample(run: Run, step: int, live: LiveTable) -> Groups:
    """Samples and scores the groups of `step`.

    With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups whose rewards are all equal are dropped and
    others sampled in their place, `dynamic_rounds` times at most; the last round keeps whatever it gets.
    """
    rollout, rules = run.config.rollout, run.config.train
    rounds = 1 + rules.dynamic_rounds if rules.dynamic_sampling else 1
    kept: list[list[Sample]] = []
    calls: list[list[int]] = []
    generating = scoring = 0.0
    dropped = 0
    before = run.engine.take_times()  # servers that died while the trainer worked count here
    for turn in range(1, rounds + 1):
        prompts = run.source.take(rollout.prompts_per_step - len(kept))
        start = time.perf_counter()
        completions = _generate(run, f"{step}.{turn}", prompts, live)
        generated = time.perf_counter()
        live.phase("reward")
        groups = _score(run, prompts, completions)
        generating += generated - start
        scoring += time.perf_counter() - generated
        calls.append([len(c.tokens) for c in completions])
        if turn < rounds:
            good = [g for g in groups if informative([s.reward for s in g])]
            dropped += len(groups) - len(good)
            groups = good
        kept += groups
        if len(kept) == rollout.prompts_per_step:
            break
    times, served = run.engine.take_times(), run.engine.versions()
    rows = rollout.max_running * max(1, len(run.engine.members()))
    times = replace(times, restarts=times.restarts + before.restarts)
    if run.controller is not None:
        run.controller.observe(times)
    drafting = run.draft is not None
    metrics = rollout_metrics([s for g in kept for s in g], times, generating, calls, run.cost, rows, drafting=drafting)
    metrics |= {"groups_dropped": dropped, "seconds_reward": scoring}
    if "draft" in served:
        metrics["draft_age"] = run.trainer.draft_version - served["draft"]
    return Groups(groups=kept, metrics=metrics)


def _generate(run: Run, turn: str, prompts: list[Prompt], live: LiveTable) -> list[Completion]:
    """`samples_per_prompt` responses to each prompt, a prompt's side by side."""
    # a prompt can come twice in a step, at the turn of an epoch: its place tells its requests apart
    requests = [
        Request(
            id=f"{turn}/{place}/{i}",
            tokens=prompt.tokens,
            sampling=sampling(run.config),
            seed=seed_of(run.config.seed, turn, place, i),
        )
        for place, prompt in enumerate(prompts)
        for i in range(run.config.rollout.samples_per_prompt)
    ]
    done = iter(range(1, len(requests) + 1))
    live.phase("rollout", 0, len(requests))
    return run.engine.generate(requests, lambda _: live.phase("rollout", next(done), len(requests)))


def _score(run: Run, prompts: list[Prompt], completions: list[Completion]) -> list[list[Sample]]:
    """Groups of scored samples, one for each prompt."""
    size = run.config.rollout.samples_per_prompt
    owners = [p for p in prompts for _ in range(size)]
    rewards = run.scorer.score(owners, completions)
    scored = [
        Sample(prompt=p, index=i % size, completion=c, reward=r)
        for i, (p, c, r) in enumerate(zip(owners, completions, rewards, strict=True))
    ]
    return [scored[i : i + size] for i in range(0, len(scored), size)]
