"""Whole runs in two processes over gloo: started by themselves, by torchrun, interrupted, resumed, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import megatron_cpu
from e2e.conftest import Configure, lines
from miles_spec import cli
from miles_spec.checkpoint import load_latest
from miles_spec.loop import train

SCRIPT = str(Path(__file__).with_name("two_ranks.py"))
PATIENCE_S = 120
"""For processes that import torch side by side."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(work: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(work), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_steps(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
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
    said, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors, said.splitlines()[-1]) == (0, "", str(out))
    assert all(line.startswith(("step ", "Interrupted; step ", str(out))) for line in said.splitlines())
    assert gone(follower)
    first = load_latest(out)
    assert first is not None
    steps = first.step + 1

    process = start(work, *TORCHRUN, SCRIPT, "train", path, "--steps", str(steps))
    said, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert said.splitlines()[-1] == str(out) and len(said.splitlines()) == 3

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
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert errors.startswith("miles-spec: error: rank") and "rank 1: its process is gone" in errors
    assert errors.count("\n") == 1


def test_a_sharded_run_and_one_process_after_it(
    run_file: Callable[..., str], configure: Configure, work: Path, tmp_path: Path
) -> None:
    """FSDP2: the weights of both ranks' work are near those of one, which goes on from their checkpoint."""
    path, out = run_file(steps=2, train__ranks=2, draft__warmup_steps=2), tmp_path / "out"
    process = start(work, "-m", "miles_spec.cli", "train", path)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    train(configure(tmp_path / "alone", steps=2, draft__warmup_steps=2))
    assert_near(out, tmp_path / "alone")
    train(configure(out, steps=3, draft__warmup_steps=2))
    assert [line["step"] for line in lines(out) if "step" in line] == [1, 2, 3]


@megatron_cpu.installed
def test_a_run_on_megatron(run_file: Callable[..., str], configure: Configure, work: Path, tmp_path: Path) -> None:
    """Two pipeline stages, so that rank 0, which has rollouts by the embedded engine, has no draft to train. One
    process goes on from the checkpoint."""
    settings = dict(steps=2, draft__warmup_steps=2)
    path = run_file(**settings, train__ranks=2, train__backend="megatron", megatron={"pipeline_model_parallel_size": 2})
    out = tmp_path / "out"
    process = start(work, str(Path(__file__).with_name("megatron_ranks.py")), "train", path)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    steps = [line for line in lines(out) if "step" in line]
    assert all(line["receipts_failed"] == 0 and line["accept_length"] >= 1 for line in steps) and len(steps) == 2
    train(configure(tmp_path / "alone", **settings))
    # transformers gives the padding token's embedding no gradient
    assert_near(out, tmp_path / "alone", padding=0)
    train(configure(out, **(settings | {"steps": 3})))
    assert [line["step"] for line in lines(out) if "step" in line] == [1, 2, 3]


@megatron_cpu.installed
def test_a_layout_that_does_not_fit_is_refused_at_once(
    run_file: Callable[..., str], said: Callable[[], str], tmp_path: Path
) -> None:
    path = run_file(train__backend="megatron", megatron={"tensor_model_parallel_size": 2}, model__path="/nowhere")
    assert cli.main(["train", path]) == 2
    assert said().startswith("the run has 1 ranks, which tensor_model_parallel_size * ")
    assert not (tmp_path / "out").exists()


def assert_near(out: Path, other: Path, padding: int | None = None) -> None:
    """Two runs of equal rollouts, as far as rounding goes; but for the embedding of `padding`."""
    a, b = (dict(found.tensors) for found in map(load_latest, (out, other)) if found is not None)
    assert a.keys() == b.keys()
    weights = [name for name in a if name.startswith(("policy.", "draft.")) and name != "draft.vocab_ids"]
    assert weights
    if padding is not None:
        a["policy.model.embed_tokens.weight"][padding] = b["policy.model.embed_tokens.weight"][padding]
    for name in weights:
        torch.testing.assert_close(
            a[name], b[name], atol=1e-4, rtol=1e-3, msg=lambda said, name=name: f"{name}: {said}"
        )
