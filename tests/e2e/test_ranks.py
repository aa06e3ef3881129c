"""Whole runs in two processes over gloo: started by themselves, by torchrun, interrupted, resumed, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from e2e.conftest import Configure, lines
from miles_spec import cli
from miles_spec.checkpoint import load_latest
from miles_spec.loop import train

SCRIPT = str(Path(__file__).with_name("two_ranks.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(work: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(work), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_steps(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or len(lines(out)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def test_a_run_in_two_processes(run_file: Callable[..., str], configure: Configure, work: Path, tmp_path: Path) -> None:
    """Ctrl-C, then torchrun from the checkpoint: the run is that of one process, bit for bit."""
    settings = dict(draft__vocab_size=40, draft__warmup_steps=2, train__minibatches=2, train__kl_coef=0.01)
    path, out = run_file(steps=1000, train__ranks=2, **settings), tmp_path / "out"
    process = start(work, SCRIPT, "train", path)
    wait_for_steps(process, out, 4)  # two of them are of the warm start
    (follower,) = children(process.pid)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=30)
    assert (process.returncode, errors, said.splitlines()[-1]) == (0, "", str(out))
    assert all(line.startswith(("step ", str(out))) for line in said.splitlines())
    assert gone(follower)
    first = load_latest(out)
    assert first is not None
    steps = first.step + 1

    process = start(work, *TORCHRUN, SCRIPT, "train", path, "--steps", str(steps))
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said.splitlines()[-1] == str(out) and len(said.splitlines()) == 2

    train(configure(tmp_path / "alone", steps=steps, **settings))
    ranked, alone = load_latest(out), load_latest(tmp_path / "alone")
    assert ranked is not None and alone is not None and ranked.step == alone.step == steps
    assert ranked.tensors.keys() == alone.tensors.keys() and ranked.values["trainer"] == alone.values["trainer"]
    assert all(torch.equal(tensor, alone.tensors[name]) for name, tensor in ranked.tensors.items())
    assert {f.name for f in out.iterdir()} - {f.name for f in (tmp_path / "alone").iterdir()} == {"logs"}
    assert [f.name for f in (out / "logs").iterdir()] == ["rank1.log"]


def test_a_killed_rank_ends_the_run(run_file: Callable[..., str], work: Path, tmp_path: Path) -> None:
    process = start(work, SCRIPT, "train", run_file(steps=1000, train__ranks=2))
    wait_for_steps(process, tmp_path / "out", 1)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert errors.startswith("miles-spec: error: rank") and "rank 1: its process is gone" in errors
    assert errors.count("\n") == 1


def test_what_cannot_share_its_work_is_refused(
    run_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch, said: Callable[[], str], tmp_path: Path
) -> None:
    path = run_file(train__ranks=2, model__path="/nowhere")
    refusal = 'train.backend = "torch" trains in one process, not in 2; set train.ranks = 1'
    assert cli.main(["train", path]) == 2
    assert said() == refusal
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", run_file(model__path="/nowhere")]) == 2
    assert said() == refusal
    assert not (tmp_path / "out").exists()
