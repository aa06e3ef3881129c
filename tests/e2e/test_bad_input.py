"""Mistakes and accidents that a run meets at its start: exit status 2 and one sentence each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.conftest import Said, lines
from fakes import flip_bit_of_file
from miles_spec import cli
from miles_spec.checkpoint import steps

RunFile = Callable[..., str]


def test_a_corrupt_checkpoint(run_file: RunFile, tmp_path: Path, said: Callable[[], Said]) -> None:
    path, root = run_file(steps=2, checkpoint__every=1), tmp_path / "out" / "checkpoints"
    assert cli.main(["train", path]) == 0
    before = lines(tmp_path / "out")
    flip_bit_of_file(root / "step_000002" / "tensors_00000.safetensors", 99999)
    assert cli.main(["train", path, "--steps", "3"]) == 2
    assert said() == (
        f"the checkpoint is corrupt: {root}/step_000002/tensors_00000.safetensors differs from its checksum; "
        f"removing {root}/step_000002 resumes from step 1"
    )
    assert lines(tmp_path / "out") == before
    shutil.rmtree(root / "step_000002")
    assert cli.main(["train", path, "--steps", "3"]) == 0
    assert steps(tmp_path / "out") == [2, 3]


def test_a_checkpoint_that_is_not_to_be_resumed(run_file: RunFile, tmp_path: Path, said: Callable[[], Said]) -> None:
    path = run_file(steps=1)
    assert cli.main(["train", path]) == 0
    assert cli.main(["train", path, "--checkpoint.no-resume"]) == 2
    assert said().matches(r".*/out holds checkpoints of an earlier run; set checkpoint.resume, or choose another `out`")


def test_a_checkpoint_of_another_configuration(run_file: RunFile, said: Callable[[], Said]) -> None:
    path = run_file(steps=1)
    assert cli.main(["train", path]) == 0
    assert cli.main(["train", path, "--steps", "2", "--draft.no-enabled"]) == 2
    assert said().matches("the checkpoint has tensor 'draft.*', for which this run's configuration has no place")


def test_a_draft_over_another_vocabulary_than_the_runs(run_file: RunFile, said: Callable[[], Said]) -> None:
    path = run_file(steps=1)
    assert cli.main(["train", path]) == 0
    assert cli.main(["train", path, "--steps", "2", "--draft.vocab-size", "31"]) == 2
    assert said().matches(r"the run's draft is over \d+ tokens, and draft.vocab_size = 31 asks for 31")


def test_models(run_file: RunFile, work: Path, tmp_path: Path, said: Callable[[], Said]) -> None:
    model = tmp_path / "model"
    path = run_file(model__path=str(model))
    assert cli.main(["train", path]) == 2
    assert said() == f"model.path: there is no folder {model}"
    model.mkdir()
    assert cli.main(["train", path]) == 2
    assert said() == f"model.path: {model} has no config.json, so it is not a Hugging Face model folder"
    (model / "config.json").write_text('{"model_type": "brandnew"}')
    assert cli.main(["train", path]) == 2
    assert said() == (
        f"{model}: transformers has no causal language model of type 'brandnew' (config.json, model_type)"
    )


@pytest.mark.parametrize(
    ("tasks", "overrides", "message"),
    [
        ("", {}, 'the data set is empty: data.source = "TASKS" holds no record'),
        (
            '{"question": "a", "answer": "b"}\n',
            {"data__prompt_column": "questio"},
            'data.prompt_column = "questio": the record of prompt mine-0 has no such column, only question, answer; '
            'did you mean "question"?',
        ),
        (
            '{"prompt": "a"}\n',
            {},
            'data.answer_column = "answer" (set it to "" if there is none): the record of prompt mine-0 has no such '
            "column, only prompt",
        ),
        (
            json.dumps({"prompt": "x" * 40, "answer": ""}) + "\n",
            {},
            "prompt mine-0 has 43 tokens, more than data.max_prompt_tokens = 24: raise it, or set data.overlong = "
            '"drop"',
        ),
        (
            json.dumps({"prompt": "x" * 40, "answer": ""}) + "\n",
            {"data__overlong": "drop"},
            "all 1 prompts have more than data.max_prompt_tokens = 24 tokens and were dropped: raise it",
        ),
        (
            '{"prompt": "a", "answer": "b"}\n',
            {"rollout__max_new_tokens": 240},
            "the context of 264 tokens (rollout.max_context, or data.max_prompt_tokens + rollout.max_new_tokens) is "
            "longer than the model's 256; lower them",
        ),
        (
            '{"prompt": "a", "answer": "b"}\n',
            {"rollout__max_context": 30},
            "rollout.max_context is 30: data.max_prompt_tokens and rollout.max_new_tokens come to 36; give 0 or at "
            "least that",
        ),
        (
            '{"prompt": "a", "answer": "b"}\n',
            {"draft__num_steps": 0},
            "draft.num_steps is 0: nothing would be drafted; give 1 to 16, or set draft.enabled = false",
        ),
        (
            '{"prompt": "a", "answer": "b"}\n',
            {"reward__kind": "e2e_rewards:lettres"},
            'reward.kind = "e2e_rewards:lettres": module e2e_rewards (MODULE) has no "lettres"; did you mean '
            '"letters"?',
        ),
    ],
    ids=["empty", "prompt column", "answer column", "long prompt", "all dropped", "context", "max_context", "depth",
         "reward"],
)  # fmt: skip
def test_settings_and_data(
    run_file: RunFile,
    work: Path,
    tmp_path: Path,
    said: Callable[[], Said],
    tasks: str,
    overrides: dict[str, object],
    message: str,
) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text(tasks)
    assert cli.main(["train", run_file(data__source=str(source), **overrides)]) == 2
    assert said() == message.replace("TASKS", str(source)).replace("MODULE", str(work / "e2e_rewards.py"))
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_a_file(run_file: RunFile, tmp_path: Path, said: Callable[[], Said]) -> None:
    path = run_file()
    (tmp_path / "out").write_text("")
    assert cli.main(["train", path]) == 2
    assert said().matches(f"the run's directory {tmp_path / 'out'} cannot be written .*")


def test_bench_needs_a_run_with_a_draft(run_file: RunFile, tmp_path: Path, said: Callable[[], Said]) -> None:
    assert cli.main(["bench", "rollout", run_file()]) == 2
    assert said() == (
        f"{tmp_path / 'out'} has no checkpoint to take policy and drafts from; run `miles-spec train` first"
    )
    assert cli.main(["bench", "rollout", run_file(draft__enabled=False)]) == 2
    assert said() == "bench rollout compares drafts, and draft.enabled is false"
    for wrong in (["--batches", "0"], ["--batches", "1,-1"], ["--turns", "0"]):
        assert cli.main(["bench", "rollout", run_file(), *wrong]) == 2
        assert said() == "batches, turns and requests have to be at least 1"
