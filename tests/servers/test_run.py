"""A whole run whose rollouts come from a real server: `miles-spec train` with `rollout.engine = "sglang"`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from conftest import tiny_tokenizer
from miles_spec import cli, loop
from miles_spec.config import RunConfig
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.run import Run
from miles_spec.settings import load

from .conftest import ARGUMENTS, FORKED, PYTHON, make_pair

RUN = """
out = "{out}"
steps = 3
[model]
path = "{work}/model"
dtype = "float32"
device = "cpu"
[data]
source = "{work}/tasks.jsonl"
chat_template = false
max_prompt_tokens = 24
[reward]
kind = "exact"
[rollout]
engine = "sglang"
prompts_per_step = 2
samples_per_prompt = 2
temperature = 0.0
max_new_tokens = 12
max_running = 4
[fleet]
launch = ["{python}", "{server}"]
[draft]
num_steps = 2
warmup_prompts = 4
warmup_steps = 3
[train]
lr = 0.0
"""


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_pair().model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tasks = [{"prompt": f"say {i}", "answer": str(i)} for i in range(24)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    return folder


def config(work: Path, out: Path, *overrides: str) -> RunConfig:
    file = out.with_suffix(".toml")
    text = RUN.format(out=out, work=work, python=PYTHON, server=FORKED)
    text += "[sglang]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in ARGUMENTS.items())
    file.write_text(text)
    return load(file, overrides)


def lines(out: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "step" in row]


def test_a_whole_run_of_two_ranks_whose_server_is_killed(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two rollouts, while the trainer works: the next rollout waits for the server and pushes to it first what
    both ranks hold, gathered as it is sent."""
    real, steps = loop.optimize, []

    def optimize(run: Run, *rest: object) -> object:
        steps.append(1)
        if len(steps) == 2:
            (server,) = run.engine.members()
            assert isinstance(server, SGLangServer) and server._process is not None
            os.killpg(server._process.pid, signal.SIGKILL)
        return real(run, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "optimize", optimize)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # which the run sets for its ranks
    config(work, tmp_path / "run")
    more = ["--train.ranks", "2", "--draft.vocab-size", "40"]
    assert cli.main(["train", str(tmp_path / "run.toml"), *more]) == 0
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    pushes = [(row["receipts_verified"], row["receipts_failed"]) for row in rows]
    # the second push fails, or finds that nobody is there
    assert pushes[0] == pushes[2] == (2, 0) and pushes[1] in ((0, 1), (0, 0))
    assert [row["engine_restarts"] for row in rows] == [0, 0, 1]
    for row in rows:
        assert row["samples"] == 4
        assert row["rollout_kl"] < 1e-6 and row["rollout_logprob_diff"] < 1e-3
        assert row["verify_steps"] > 0
    assert [rows[at]["target_version"] for at in (0, 2)] == [1, 3]  # the second push may have reached nobody
