"""The run files that ship are ones that a run accepts, and their own code does what they say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from miles_spec.data import read
from miles_spec.rewards.builtin import Builtin, exact
from miles_spec.settings import load
from miles_spec.types import Prompt

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_setting_is_known(path: Path) -> None:
    config = load(path, [])
    assert config.out == tomllib.loads(path.read_text())["out"]


def test_counting_is_rewarded_for_the_whole_list_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    config = load(FOLDER / "sglang.toml", [])
    records = read(config.data, seed=1)
    assert len(records) == config.data.options["size"]
    record = records[3]
    numbers = [int(number) for number in str(record["answer"]).split(", ")]
    assert record["prompt"].startswith(f"Count from {numbers[0]} to {numbers[-1]}.")
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    judge = Builtin(exact, "exact", config.reward.extract)
    prompt = Prompt(id="p", tokens=(1,), text=str(record["prompt"]), answer=record["answer"])
    told = [f"Sure: {record['answer']}.", str(record["answer"]), f"{record['answer']}, {numbers[-1] + 1}", "1, 2"]
    assert judge.score([prompt] * 4, told) == [1, 1, 0, 0]
