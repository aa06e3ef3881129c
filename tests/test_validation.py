"""What a configuration is refused for, one case per rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from miles_spec.config import DataConfig, ModelConfig, RunConfig, values
from miles_spec.draft.spec import FAMILIES
from miles_spec.validation import validate, validate_training

GOOD = RunConfig(model=ModelConfig(path="model"), data=DataConfig(source="tasks.jsonl"))


def changed(**settings: Any) -> RunConfig:
    """`GOOD` with `section__key=value` set."""
    config = GOOD
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        made = replace(getattr(config, section), **{key: value}) if section else value
        config = replace(config, **{section or key: made})
    return config


def test_good_configuration_passes() -> None:
    """`validate` raises nothing."""
    validate(GOOD)
    validate(changed(rollout__temperature=0.0, rollout__verify="greedy", draft__num_steps=1, rollout__max_context=1280))
    validate(changed(rollout__verify="rejection", draft__num_steps=16, reward__extract=r"= (\d+)", train__tis_cap=0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": ""}, 'out is "": name the directory of the run'),
        ({"steps": 0}, "steps is 0: give 1 or more"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
        ({"model__path": ""}, 'model.path is "": name a Hugging Face folder, or `smollm2`'),
        (
            {"data__source": ""},
            'data.source is "": name a file, `datasets:PATH`, `reasoning_gym:TASK` or `pkg.mod:function`',
        ),
        ({"data__prompt_column": ""}, 'data.prompt_column is "": name the column of the prompts'),
        (
            {"data__template": "Solve."},
            'data.template is "Solve.": it must contain {prompt}, where the prompt goes',
        ),
        ({"data__max_prompt_tokens": 0}, "data.max_prompt_tokens is 0: give 1 or more"),
        ({"data__size": 0}, "data.size is 0: give 1 or more"),
        ({"reward__kind": ""}, 'reward.kind is "": name a reward'),
        (
            {"reward__extract": "(a"},
            'reward.extract is "(a": it is not a regular expression (missing ) at position 2)',
        ),
        ({"reward__extract": "a+"}, r'reward.extract is "a+": put the answer in a group, as in `= (\d+)`'),
        ({"reward__timeout_s": 0.0}, "reward.timeout_s is 0.0: give a number above 0"),
        ({"rollout__prompts_per_step": 0}, "rollout.prompts_per_step is 0: give 1 or more"),
        ({"rollout__temperature": -0.5}, "rollout.temperature is -0.5: give 0 or more"),
        ({"rollout__top_p": 0.0}, "rollout.top_p is 0.0: give a probability above 0, at most 1"),
        ({"rollout__top_p": 1.5}, "rollout.top_p is 1.5: give a probability above 0, at most 1"),
        ({"rollout__top_k": -1}, "rollout.top_k is -1: give 0 or more"),
        ({"rollout__max_new_tokens": 0}, "rollout.max_new_tokens is 0: give 1 or more"),
        (
            {"rollout__stop": ("a", "")},
            "rollout.stop is ('a', ''): the empty string would stop every response; take it out",
        ),
        ({"rollout__max_running": 0}, "rollout.max_running is 0: give 1 or more"),
        (
            {"rollout__max_context": 100},
            "rollout.max_context is 100: data.max_prompt_tokens and rollout.max_new_tokens come to 1280; "
            "give 0 or at least that",
        ),
        ({"rollout__prefill_chunk_tokens": 0}, "rollout.prefill_chunk_tokens is 0: give 1 or more"),
        (
            {"rollout__verify": "greedy"},
            'rollout.verify is "greedy": at rollout.temperature 1.0 it would change what the policy samples; '
            'set the temperature to 0, or rollout.verify to "target" or "rejection"',
        ),
        *(
            (
                {"rollout__verify": rule, "rollout__temperature": 0.0},
                f'rollout.verify is "{rule}": it samples, and rollout.temperature is 0; set a temperature above 0, '
                'or rollout.verify to "greedy"',
            )
            for rule in ("target", "rejection")
        ),
        (
            {"draft__path": "draft", "draft__vocab_size": 9},
            'draft.vocab_size is 9: the draft of draft.path = "draft" has a vocabulary of its own; set it to 0',
        ),
        ({"offline__held_out": 0.0}, "offline.held_out is 0.0: give a share above 0, at most 0.9"),
        ({"offline__held_out": 0.95}, "offline.held_out is 0.95: give a share above 0, at most 0.9"),
        ({"offline__samples_per_prompt": 0}, "offline.samples_per_prompt is 0: give 1 or more"),
        ({"offline__prompts": -1}, "offline.prompts is -1: give 0 or more"),
        ({"offline__epochs": 0}, "offline.epochs is 0: give 1 or more"),
        ({"offline__steps": -1}, "offline.steps is -1: give 0 or more"),
        ({"offline__batch": 0}, "offline.batch is 0: give 1 or more"),
        ({"draft__layers": 0}, "draft.layers is 0: give 1 to 16"),
        ({"draft__layers": 17}, "draft.layers is 17: give 1 to 16"),
        *(
            (
                {"draft__layers": 2, **others},
                "draft.layers is 2: only a fresh draft of family nextn or mimo has a layer for each depth; set 1",
            )
            for others in ({}, {"draft__family": "eagle3"}, {"draft__family": "mimo", "draft__path": "draft"})
        ),
        (
            {"draft__layers": 3, "draft__family": "nextn", "draft__num_steps": 2},
            "draft.layers is 3: draft.num_steps is 2, and layers beyond it would never be used; give at most that",
        ),
        ({"draft__num_steps": -1}, "draft.num_steps is -1: give 1 to 16"),
        ({"draft__num_steps": 17}, "draft.num_steps is 17: give 1 to 16"),
        (
            {"draft__num_steps": 0},
            "draft.num_steps is 0: nothing would be drafted; give 1 to 16, or set draft.enabled = false",
        ),
        ({"draft__max_batch": -1}, "draft.max_batch is -1: give 0 or more"),
        (
            {"draft__max_batch": 8, "rollout__engine": "sglang", "rollout__verify": "rejection"},
            "draft.max_batch is 8: SGLang cannot go without a draft for some batches under rejection sampling; set 0, "
            'or rollout.verify = "target"',
        ),
        (
            {"draft__max_batch": 8, "rollout__engine": "sglang", "rollout__urls": ("http://a:1",)},
            "draft.max_batch is 8: servers that run already draft as they were started; set 0",
        ),
        (
            {"draft__adaptive": True, "rollout__engine": "sglang"},
            "draft.adaptive is True: an SGLang server keeps the number that it was started with; set false, and "
            "draft.max_batch",
        ),
        ({"draft__adaptive": True, "draft__max_batch": 8}, "draft.max_batch is 8: draft.adaptive chooses it; set 0"),
        (
            {"draft__adaptive": True, "rollout__verify": "rejection"},
            "draft.adaptive is True: under rejection sampling the machine's speed would change responses; set false, "
            'or rollout.verify = "target"',
        ),
        ({"draft__vocab_size": -1}, "draft.vocab_size is -1: give 0 or more"),
        ({"draft__ramp_steps": 0}, "draft.ramp_steps is 0: give 1 or more"),
        ({"draft__lr": -1.0}, "draft.lr is -1.0: give 0 or more"),
        ({"draft__clip": 0.0}, "draft.clip is 0.0: give a number above 0"),
        ({"draft__warmup_steps": -1}, "draft.warmup_steps is -1: give 0 or more"),
        ({"train__lr": float("nan")}, "train.lr is nan: give a finite number"),
        ({"train__betas": (0.9, float("inf"))}, "train.betas is (0.9, inf): give a finite number"),
        ({"train__betas": (0.9, 1.0)}, "train.betas is (0.9, 1.0): give two numbers from 0 to below 1"),
        ({"train__clip": 0.0}, "train.clip is 0.0: give a number above 0"),
        ({"train__clip_low": 1.0}, "train.clip_low is 1.0: give a number from 0 to below 1"),
        ({"train__clip_high": -0.1}, "train.clip_high is -0.1: give 0 or more"),
        ({"train__kl_coef": -0.1}, "train.kl_coef is -0.1: give 0 or more"),
        ({"train__tis_cap": -1.0}, "train.tis_cap is -1.0: give 0 or more"),
        ({"train__ranks": 0}, "train.ranks is 0: give 1 or more"),
        ({"train__minibatches": 0}, "train.minibatches is 0: give 1 or more"),
        (
            {"train__minibatches": 65},
            "train.minibatches is 65: a step has rollout.prompts_per_step * rollout.samples_per_prompt = 64 sequences; "
            "give at most that",
        ),
        ({"train__token_budget": 0}, "train.token_budget is 0: give 1 or more"),
        ({"train__dynamic_rounds": 0}, "train.dynamic_rounds is 0: give 1 or more"),
        ({"train__offload": ("draft", "draft")}, "train.offload is ('draft', 'draft'): name each once"),
        (
            {"train__oom_retry": True, "train__ranks": 2},
            "train.oom_retry is True: with train.ranks = 2 one rank cannot leave the others' collectives; set false",
        ),
        (
            {"train__oom_retry": True, "draft__updates": 2},
            "train.oom_retry is True: with draft.updates = 2 a step may have changed the draft when memory runs out; "
            "set one of them",
        ),
        *(
            (
                {"rollout__samples_per_prompt": 1, "train__advantage": advantage},
                f'rollout.samples_per_prompt is 1: train.advantage = "{advantage}" compares the samples of a prompt '
                "with each other; give 2 or more",
            )
            for advantage in ("grpo", "rloo", "dr_grpo")
        ),
        ({"checkpoint__every": -2}, "checkpoint.every is -2: give -1 or more"),
        ({"checkpoint__keep": 0}, "checkpoint.keep is 0: give 1 or more"),
        ({"tracking__samples": -1}, "tracking.samples is -1: give 0 or more"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        validate(changed(**settings))
    assert str(error.value) == message


def test_greedy_training_of_the_policy_is_refused() -> None:
    """But for the draft alone; other commands need temperature 0."""
    validate_training(GOOD)
    validate_training(changed(rollout__temperature=0.0, train__lr=0.0))
    with pytest.raises(ValueError) as error:
        validate_training(changed(rollout__temperature=0.0))
    assert str(error.value) == (
        "rollout.temperature is 0.0: the samples of a prompt would be the same, and the policy would learn nothing; "
        "give a number above 0, or train.lr = 0 to train the draft alone"
    )


def refused(name: str, value: float, **others: Any) -> bool:
    try:
        validate(changed(**others, **{name.replace(".", "__"): value}))
    except ValueError as error:
        return str(error).startswith(f"{name} is ")
    return False


def test_every_number_has_a_lower_bound() -> None:
    numbers = [(name, type(value)) for name, value in values(GOOD) if type(value) in (int, float)]
    assert [name for name, kind in numbers if not refused(name, kind(-1e9))] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_several_layers_are_for_the_families_that_may_have_them(family: str) -> None:
    assert refused("draft.layers", 2, draft__family=family) != FAMILIES[family].layered
