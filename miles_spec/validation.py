"""What a configuration is refused for.

Invariant: settings of a run file that passed `validate` are within their ranges. What is built without a run file
checks for itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import regex  # type: ignore[import-untyped]

from miles_spec.config import DraftConfig, RolloutConfig, RunConfig, TrainConfig, values

_AT_LEAST = {
    "steps": 1,
    "seed": 0,
    "data.max_prompt_tokens": 1,
    "data.size": 1,
    "rollout.prompts_per_step": 1,
    "rollout.samples_per_prompt": 1,
    "rollout.temperature": 0,
    "rollout.top_k": 0,
    "rollout.max_new_tokens": 1,
    "rollout.max_running": 1,
    "rollout.max_context": 0,
    "rollout.prefill_chunk_tokens": 1,
    "model.widen": 0,
    "fleet.engines": 1,
    "fleet.margin_gb": 0,
    "fleet.bucket_mb": 1,
    "draft.max_batch": 0,
    "draft.vocab_size": 0,
    "draft.updates": 1,
    "draft.ramp_steps": 1,
    "draft.lr": 0,
    "draft.weight_decay": 0,
    "draft.lr_warmup_steps": 0,
    "draft.warmup_steps": 0,
    "draft.warmup_prompts": 1,
    "draft.warmup_lr": 0,
    "offline.samples_per_prompt": 1,
    "offline.prompts": 0,
    "offline.epochs": 1,
    "offline.steps": 0,
    "offline.batch": 1,
    "train.ranks": 1,
    "train.lr": 0,
    "train.lr_warmup_steps": 0,
    "train.weight_decay": 0,
    "train.clip_high": 0,
    "train.kl_coef": 0,
    "train.tis_cap": 0,
    "train.minibatches": 1,
    "train.token_budget": 1,
    "train.dynamic_rounds": 1,
    "checkpoint.every": -1,
    "checkpoint.keep": 1,
    "tracking.samples": 0,
}
_ABOVE_ZERO = (
    "reward.timeout_s",
    "fleet.start_timeout_s",
    "fleet.request_timeout_s",
    "fleet.probe_s",
    "fleet.dead_after_s",
    "draft.clip",
    "train.clip",
)
_NOT_EMPTY = {
    "out": "name the directory of the run",
    "model.path": "name a Hugging Face folder, or `smollm2`",
    "data.source": "name a file, `datasets:PATH`, `reasoning_gym:TASK` or `pkg.mod:function`",
    "data.prompt_column": "name the column of the prompts",
    "reward.kind": "name a reward",
    "fleet.host": "name the address that servers listen on",
}
_BETWEEN = {
    "rollout.top_p": (0, 1, "give a probability above 0, at most 1"),
    "draft.layers": (0, 16, "give 1 to 16"),
    "draft.share": (0, 1, "give a share above 0, at most 1"),
    "draft.num_steps": (-1, 16, "give 1 to 16"),
    "offline.held_out": (0, 0.9, "give a share above 0, at most 0.9"),
}
"""Exclusive lower and inclusive upper bound."""
_Need = Callable[[bool, str, str], None]


def validate(config: RunConfig) -> None:
    """Raises `ValueError` for the first setting that cannot work: its name, its value, and what to set instead."""
    flat = dict(values(config))
    need = _needs(flat)
    for key, value in flat.items():
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, float)]
        need(all(math.isfinite(x) for x in numbers), key, "give a finite number")
    for key, advice in _NOT_EMPTY.items():
        need(flat[key] != "", key, advice)
    for key, least in _AT_LEAST.items():
        need(flat[key] >= least, key, f"give {least} or more")
    for key in _ABOVE_ZERO:
        need(flat[key] > 0, key, "give a number above 0")
    for key, (above, most, advice) in _BETWEEN.items():
        need(above < flat[key] <= most, key, advice)
    _validate_text(config, need)
    _validate_rollout(config.rollout, config.data.max_prompt_tokens, need)
    need(
        config.draft.num_steps > 0 or not config.draft.enabled,
        "draft.num_steps",
        "nothing would be drafted; give 1 to 16, or set draft.enabled = false",
    )
    need(
        config.draft.layers == 1 or (not config.draft.path and config.draft.family in ("nextn", "mimo")),
        "draft.layers",
        "only a fresh draft of family nextn or mimo has a layer for each depth; set 1",
    )
    need(
        config.draft.layers <= max(config.draft.num_steps, 1) or not config.draft.enabled,
        "draft.layers",
        f"draft.num_steps is {config.draft.num_steps}, and layers beyond it would never be used; give at most that",
    )
    need(
        not config.draft.path or config.draft.vocab_size == 0,
        "draft.vocab_size",
        f"the draft of draft.path = {json.dumps(config.draft.path)} has a vocabulary of its own; set it to 0",
    )
    _validate_servers(config, need)
    _validate_train(config.train, config.rollout, config.draft, need)


def validate_training(config: RunConfig) -> None:
    """Raises `ValueError`, as `validate` does, for what `miles-spec train` alone is refused for."""
    _needs(dict(values(config)))(
        config.rollout.temperature > 0 or config.train.lr == 0,
        "rollout.temperature",
        "the samples of a prompt would be the same, and the policy would learn nothing; give a number above 0, or "
        "train.lr = 0 to train the draft alone",
    )


def _needs(flat: Mapping[str, Any]) -> _Need:
    def need(holds: bool, key: str, advice: str) -> None:
        if not holds:
            value = json.dumps(flat[key]) if isinstance(flat[key], str) else flat[key]
            raise ValueError(f"{key} is {value}: {advice}")

    return need


def _validate_text(config: RunConfig, need: _Need) -> None:
    need("{prompt}" in config.data.template, "data.template", "it must contain {prompt}, where the prompt goes")
    try:
        groups = regex.compile(config.reward.extract).groups
    except regex.error as e:
        need(False, "reward.extract", f"it is not a regular expression ({e})")
    else:
        need(config.reward.extract == "" or groups > 0, "reward.extract", "put the answer in a group, as in `= (\\d+)`")


def _validate_rollout(rollout: RolloutConfig, max_prompt_tokens: int, need: _Need) -> None:
    need("" not in rollout.stop, "rollout.stop", "the empty string would stop every response; take it out")
    if rollout.verify == "greedy":
        need(
            rollout.temperature == 0,
            "rollout.verify",
            f"at rollout.temperature {rollout.temperature} it would change what the policy samples; set the "
            'temperature to 0, or rollout.verify to "target" or "rejection"',
        )
    elif rollout.verify != "auto":
        need(
            rollout.temperature > 0,
            "rollout.verify",
            'it samples, and rollout.temperature is 0; set a temperature above 0, or rollout.verify to "greedy"',
        )
    longest = max_prompt_tokens + rollout.max_new_tokens
    need(
        rollout.max_context == 0 or rollout.max_context >= longest,
        "rollout.max_context",
        f"data.max_prompt_tokens and rollout.max_new_tokens come to {longest}; give 0 or at least that",
    )


def _validate_servers(config: RunConfig, need: _Need) -> None:
    rollout, fleet = config.rollout, config.fleet
    served = rollout.engine == "sglang"
    need(served or not rollout.urls, "rollout.urls", 'only SGLang servers are joined; set rollout.engine = "sglang"')
    for url in rollout.urls:
        need(re.fullmatch(r"https?://[^/]+/?", url) is not None, "rollout.urls", "write each as http://HOST:PORT")
    need(len(set(rollout.urls)) == len(rollout.urls), "rollout.urls", "name each server once")
    need(all(g >= 0 for g in fleet.gpus), "fleet.gpus", "give indices from 0 on")
    need(len(set(fleet.gpus)) == len(fleet.gpus), "fleet.gpus", "name each GPU once")
    need(
        not served or not config.draft.enabled or rollout.rule != "rejection" or config.draft.vocab_size == 0,
        "draft.vocab_size",
        'SGLang has no rejection sampling over a reduced vocabulary; set 0, or rollout.verify = "target"',
    )
    need(
        not served or not config.draft.enabled or rollout.rule != "rejection" or config.draft.max_batch == 0,
        "draft.max_batch",
        "SGLang cannot go without a draft for some batches under rejection sampling; set 0, or rollout.verify = "
        '"target"',
    )
    adaptive = config.draft.enabled and config.draft.adaptive
    need(
        not (adaptive and served),
        "draft.adaptive",
        "an SGLang server keeps the number that it was started with; set false, and draft.max_batch",
    )
    need(not (adaptive and config.draft.max_batch), "draft.max_batch", "draft.adaptive chooses it; set 0")
    need(
        not (adaptive and rollout.rule == "rejection"),
        "draft.adaptive",
        'under rejection sampling the machine\'s speed would change responses; set false, or rollout.verify = "target"',
    )
    need(
        not rollout.urls or config.draft.max_batch == 0,
        "draft.max_batch",
        "servers that run already draft as they were started; set 0",
    )


def _validate_train(train: TrainConfig, rollout: RolloutConfig, draft: DraftConfig, need: _Need) -> None:
    need(all(0 <= b < 1 for b in train.betas), "train.betas", "give two numbers from 0 to below 1")
    need(0 <= train.clip_low < 1, "train.clip_low", "give a number from 0 to below 1")
    need(
        rollout.samples_per_prompt >= 2,
        "rollout.samples_per_prompt",
        f'train.advantage = "{train.advantage}" compares the samples of a prompt with each other; give 2 or more',
    )
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    need(len(set(train.offload)) == len(train.offload), "train.offload", "name each once")
    need(
        not train.oom_retry or train.ranks == 1,
        "train.oom_retry",
        f"with train.ranks = {train.ranks} one rank cannot leave the others' collectives; set false",
    )
    need(
        not train.oom_retry or draft.updates == 1,
        "train.oom_retry",
        f"with draft.updates = {draft.updates} a step may have changed the draft when memory runs out; set one of them",
    )
    need(
        train.minibatches <= sequences,
        "train.minibatches",
        f"a step has rollout.prompts_per_step * rollout.samples_per_prompt = {sequences} sequences; give at most that",
    )
