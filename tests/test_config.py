"""The sections of a configuration: their names, and what their choices come to."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args, get_type_hints

from miles_spec.config import DraftConfig, ModelConfig, RolloutConfig, RunConfig, TrainConfig, values
from miles_spec.draft.spec import FAMILIES


def test_values_names_every_setting() -> None:
    names = dict(values(RunConfig(model=ModelConfig(path="model"))))
    assert names["model.path"] == "model"
    assert names["sglang"] == {}
    assert {f"train.{f.name}" for f in fields(TrainConfig)} <= set(names)


def test_every_family_can_be_named() -> None:
    assert get_args(get_type_hints(DraftConfig)["family"]) == ("auto", *FAMILIES)


def test_resolved_choices() -> None:
    assert [DraftConfig(family=family).fresh_family for family in ("auto", "eagle3")] == ["eagle", "eagle3"]
    assert [RolloutConfig(temperature=t).rule for t in (0.0, 0.7)] == ["greedy", "target"]
    assert RolloutConfig(verify="rejection").rule == "rejection"
    assert [TrainConfig(advantage=a).loss_aggregation for a in ("grpo", "rloo", "dr_grpo")] == [
        "sequence",
        "token",
        "constant",
    ]
    assert TrainConfig(advantage="rloo", aggregation="constant").loss_aggregation == "constant"
