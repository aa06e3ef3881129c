"""From one step's samples, losses and times to the numbers of one line of `metrics.jsonl`.

Invariant: whatever is a ratio is pooled over the step, a ratio of sums, never a mean of ratios. `docs/metrics.md`
defines each name.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from miles_spec.rollout.speculation import CostModel
from miles_spec.types import EngineTimes, LossTerms, Receipt, Sample, SpecCounts, SpecEstimate


def rollout_metrics(
    samples: Sequence[Sample],
    times: EngineTimes,
    wall_s: float,
    calls: Sequence[Sequence[int]],
    cost: CostModel | None,
    rows: int,
    *,
    drafting: bool = True,
) -> dict[str, Any]:
    """Of sampling: `samples` are those kept, `calls` the response lengths of each call of the engine in its order,
    `wall_s` the seconds of all calls, `cost` the engine's without speculation (None where it is not known), `rows`
    the sequences it decodes together, `drafting` whether the run has a draft."""
    rewards = [s.reward for s in samples]
    lengths = [len(s.completion.tokens) for s in samples]
    generated = sum(map(sum, calls))
    metrics: dict[str, Any] = {
        "samples": len(samples),
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "response_tokens_mean": statistics.fmean(lengths),
        "finish_length_fraction": sum(s.completion.finish == "length" for s in samples) / len(samples),
        "tokens_per_s": generated / wall_s,
        "seconds_rollout": wall_s,
        "rollout_seconds_prefill": times.prefill_s,
        "rollout_seconds_draft": times.draft_s,
        "rollout_seconds_verify": times.verify_s,
        "rollout_seconds_other": times.other_s,
        "engine_restarts": times.restarts,
        "requests_requeued": times.requeued,
    }
    if not drafting:
        return metrics
    counts = sum((s.completion.spec for s in samples), SpecCounts())
    metrics |= {
        "verify_steps": counts.verify_steps,
        "accepted_tokens": sum(counts.accepted),
        "accept_length": counts.accept_length,
        "accept_rate_by_position": list(counts.accept_rates),
    }
    if cost is None:
        return metrics
    # where nothing was drafted it was measured, too
    plain_s = wall_s
    if counts.verify_steps:
        plain_s = times.prefill_s + sum(cost.decode_seconds(lengths, rows) for lengths in calls)
    return metrics | {
        "tokens_per_s_plain": generated / plain_s,
        "net_speedup": plain_s / wall_s,
        "net_speedup_error": cost.error,
    }


def training_metrics(terms: Sequence[LossTerms], wall_s: float, engine_accept_length: float | None) -> dict[str, Any]:
    """Of the optimizer steps of one rollout; scalars are averaged over them, acceptance is pooled.

    `engine_accept_length` is the rollout's own, None without a draft.
    """
    draft_s = sum(t.draft_seconds for t in terms)
    names = ("policy", "entropy", "grad_norm", "clip_fraction", "tis_clip_fraction", "rollout_kl", "ref_kl")
    mean = {name: statistics.fmean(getattr(t, name) for t in terms) for name in names}
    metrics: dict[str, Any] = {
        "policy_loss": mean.pop("policy"),
        **mean,
        "rollout_logprob_diff": max(t.rollout_logprob_diff for t in terms),
        "seconds_train": wall_s - draft_s,
        "seconds_draft": draft_s,
    }
    if draft_s:
        metrics["draft_share"] = draft_s / wall_s
    # a minibatch whose responses are all of one token has no row for the draft
    if trained := [t for t in terms if t.draft_by_depth]:
        metrics |= {
            "draft_loss": statistics.fmean(t.draft for t in trained),
            "draft_loss_by_depth": [
                statistics.fmean(d) for d in zip(*(t.draft_by_depth for t in trained), strict=True)
            ],
            "draft_grad_norm": statistics.fmean(t.draft_grad_norm for t in trained),
        }
    for name in ("cotrained", "frozen"):
        estimates = [t.acceptance[name] for t in terms if name in t.acceptance]
        if estimates:
            pooled = sum(estimates, SpecEstimate(accepted=0.0, verify_steps=0.0))
            metrics[f"accept_length_{name}"] = pooled.accept_length
            metrics[f"accepted_tokens_{name}"] = pooled.accepted
            metrics[f"verify_steps_{name}"] = pooled.verify_steps
    if "accept_length_cotrained" in metrics and engine_accept_length is not None:
        metrics["accept_estimate_error"] = metrics["accept_length_cotrained"] - engine_accept_length
    return metrics


def host_gib_peak() -> float:
    """The most memory of the host that this process has had so far, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def sync_metrics(receipts: Sequence[Receipt], wall_s: float) -> dict[str, Any]:
    """Of one push."""
    return {
        "receipts_verified": sum(r.verified for r in receipts),
        "receipts_failed": sum(not r.verified for r in receipts),
        "seconds_sync": wall_s,
        **{f"{role}_version": version for role, version in sorted({(r.role, r.version) for r in receipts})},
    }


def summary(lines: Sequence[Mapping[str, Any]], bench: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What `summary.json` says of a whole run: `lines` are its steps, `bench` the rows of `bench rollout` if it ran.

    First and last reward are each the mean over a fifth of the steps; accept lengths are pooled over the last fifth.
    """
    steps = [line for line in lines if "step" in line]
    if not steps:
        return {"steps": 0}
    fifth = max(1, len(steps) // 5)
    head, tail = steps[:fifth], steps[-fifth:]

    def mean(of: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values = [line[name] for line in of if line.get(name) is not None]
        return statistics.fmean(values) if values else None

    def accept_length(of: str) -> float | None:
        verify_steps = sum(line.get(f"verify_steps{of}") or 0 for line in tail)
        accepted = sum(line.get(f"accepted_tokens{of}") or 0 for line in tail)
        return 1 + accepted / verify_steps if verify_steps else None

    phases = ("rollout", "reward", "train", "draft", "memory", "sync", "checkpoint")
    seconds = {phase: sum(line.get(f"seconds_{phase}") or 0.0 for line in steps) for phase in phases}
    rollout_s = seconds["rollout"]
    tokens = sum(line["tokens_per_s"] * line["seconds_rollout"] for line in steps)
    plain_s = sum(
        line["net_speedup"] * line["seconds_rollout"] for line in steps if line.get("net_speedup") is not None
    )
    drafted = bool(plain_s) or any(line.get("verify_steps") for line in steps)
    errors = [abs(e) for line in steps if (e := line.get("accept_estimate_error")) is not None]
    training_s = seconds["draft"] + seconds["train"]
    return {
        "steps": steps[-1]["step"],
        "steps_averaged": fifth,
        "reward_first": mean(head, "reward_mean"),
        "reward_last": mean(tail, "reward_mean"),
        "accept_length": accept_length(""),
        "accept_length_cotrained": accept_length("_cotrained"),
        "accept_length_frozen": accept_length("_frozen"),
        "accept_estimate_error_max": max(errors, default=None),
        "tokens_per_s_speculative": tokens / rollout_s if drafted else None,
        # a run without a draft has measured it; of joined servers that draft it is not known
        "tokens_per_s_plain": tokens / plain_s if plain_s else None if drafted else tokens / rollout_s,
        "net_speedup": plain_s / rollout_s if plain_s else None,
        "net_speedup_error": steps[-1].get("net_speedup_error"),
        "draft_share": seconds["draft"] / training_s if seconds["draft"] else None,
        "rollout_kl_mean": mean(steps, "rollout_kl"),
        "seconds": seconds,
        "receipts_verified": sum(line.get("receipts_verified", 0) for line in steps),
        "receipts_failed": sum(line.get("receipts_failed", 0) for line in steps),
        **({"bench": list(bench)} if bench else {}),
    }
