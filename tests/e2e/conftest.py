"""Fixtures of whole runs: a tiny model in a folder, tasks, a reward function in a file, and a configuration."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import tiny_config, tiny_tokenizer
from miles_spec.config import RunConfig
from miles_spec.loop import train
from miles_spec.settings import dump

Configure = Callable[..., RunConfig]

REWARDS = '''
"""Scores a response, and fails on request."""

calls = 0
fault = None
"""Called with the number of the call, from 1; what it returns, if not None, is the reward."""


def letters(prompt, response):
    """Share of ASCII letters."""
    global calls
    calls += 1
    value = fault(calls) if fault else None
    return sum(c.isascii() and c.isalpha() for c in response) / max(1, len(response)) if value is None else value


def even(prompt, response):
    """1 for every response to a prompt with an even number, else the share of letters."""
    return 1.0 if prompt.metadata["number"] % 2 == 0 else letters(prompt, response)


def same(prompt, response):
    """1 for all."""
    return 1.0
'''


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `tasks.jsonl` and the module `e2e_rewards`."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("e2e")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=len(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
        # the next token depends on the last one for the most part, and on the layers for what a draft has to learn
        embed = model.model.embed_tokens.weight.mul_(4)
        model.lm_head.weight.copy_(0.7 * embed[torch.randperm(len(embed))])
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.5)
            layer.mlp.down_proj.weight.mul_(0.5)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks = [{"prompt": f"say {i}" + "!" * (i % 5), "answer": str(i), "number": i} for i in range(24)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    (folder / "e2e_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="session")
def importable(work: Path) -> Iterator[None]:
    sys.path.insert(0, str(work))
    yield
    sys.path.remove(str(work))


@pytest.fixture
def rewards(importable: None) -> ModuleType:
    """The reward module as new."""
    module = importlib.import_module("e2e_rewards")
    module.calls, module.fault = 0, None
    return module


@pytest.fixture(scope="session")
def configure(work: Path) -> Configure:
    """`configure(out, section__key=value, ...)`: four steps of 4 prompts, 4 responses each."""

    def make(out: Path, **overrides: Any) -> RunConfig:
        settings: dict[str, Any] = dict(
            out=str(out), steps=4, seed=5, model__path=str(work / "model"), model__dtype="float32",
            data__source=str(work / "tasks.jsonl"), data__max_prompt_tokens=24, reward__kind="e2e_rewards:letters",
            rollout__prompts_per_step=4, rollout__samples_per_prompt=4, rollout__max_new_tokens=12,
            rollout__max_running=8, draft__lr=0.01, draft__lr_warmup_steps=0, draft__warmup_prompts=8,
            train__lr=0.001, train__token_budget=256, tracking__samples=64,
        )  # fmt: skip
        config = RunConfig()
        for name, value in {**settings, **overrides}.items():
            section, _, key = name.rpartition("__")
            if section:
                config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
            else:
                config = replace(config, **{key: value})
        return config

    return make


@pytest.fixture
def run_file(tmp_path: Path, configure: Configure, rewards: ModuleType) -> Callable[..., str]:
    """`run_file(section__key=value, ...)`: the path of a run file with `out` in `tmp_path`."""

    def write(**overrides: Any) -> str:
        path = tmp_path / "run.toml"
        path.write_text(dump(configure(tmp_path / "out", **overrides)))
        return str(path)

    return write


@pytest.fixture(scope="session")
def finished(configure: Configure, importable: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The configuration of a run that has ended; tests only read its directory."""
    config = configure(tmp_path_factory.mktemp("finished") / "out", checkpoint__every=2)
    train(config)
    return config


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of one of a run's files."""
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


class Said(str):
    """One sentence from the command line."""

    def matches(self, pattern: str) -> bool:
        return re.fullmatch(pattern, self) is not None


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], Said]:
    """What the command line printed as its error since the last call: one line, without its beginning."""

    def read() -> Said:
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("miles-spec: error: ")
        return Said(line.removeprefix("miles-spec: error: "))

    return read
