"""Runs that stop, break and go on: what is saved, what is said, and that going on changes nothing, bit for bit."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from e2e.conftest import Configure, Said, lines
from fakes import flip_bit
from miles_spec import assemble, checkpoint, cli, rundir
from miles_spec.checkpoint import load_latest, steps
from miles_spec.config import RunConfig
from miles_spec.loop import train
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.train import memory
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import Role, RunError

TIMES = ("time_s", "host_gib_peak", "seconds_", "tokens_per_s", "net_speedup", "draft_share", "rollout_seconds_")
HARD: dict[str, Any] = dict(
    train__dynamic_sampling=True, train__minibatches=2, train__kl_coef=0.1, draft__vocab_size=64, draft__warmup_steps=2,
    reward__kind="e2e_rewards:even",
)  # fmt: skip


def untimed(out: Path) -> list[dict[str, Any]]:
    """A run's lines without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in lines(out)]


def state(out: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The newest checkpoint, without its time."""
    found = load_latest(out)
    assert found is not None
    return found.tensors, {k: v for k, v in {**found.values, "step": found.step}.items() if k != "time_s"}


def assert_same_run(a: Path, b: Path) -> None:
    """Every tensor and value of the last checkpoint, every sample and every metric but the times."""
    (tensors, values), (others, other_values) = state(a), state(b)
    assert values == other_values and tensors.keys() == others.keys()
    assert [n for n, t in tensors.items() if not torch.equal(t, others[n])] == []
    assert untimed(a) == untimed(b)
    assert lines(a, "samples.jsonl") == lines(b, "samples.jsonl")


@pytest.mark.parametrize("overrides", [{}, HARD], ids=["defaults", "everything"])
def test_resume_is_bit_for_bit(
    configure: Configure, rewards: ModuleType, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    whole, parts = (configure(tmp_path / name, **overrides) for name in ("whole", "parts"))
    train(whole)
    train(replace(parts, steps=1))
    train(replace(parts, steps=3))
    elapsed = lines(tmp_path / "parts")[-1]["time_s"]
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert lines(tmp_path / "parts")[-1]["time_s"] > elapsed


def test_the_test_of_resuming_can_fail(configure: Configure, rewards: ModuleType, tmp_path: Path) -> None:
    train(configure(tmp_path / "a", steps=2))
    train(configure(tmp_path / "b", steps=2, train__lr=0.00100001))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "b")


DRAFTS: dict[str, dict[str, Any]] = {
    "none": dict(draft__enabled=False),
    "one": dict(draft__num_steps=1),
    "untrained": dict(draft__num_steps=5, draft__train=False, draft__vocab_size=50),
    "small batches": dict(draft__max_batch=2, draft__warmup_steps=2),
}


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_policy_does_not_depend_on_the_draft(
    configure: Configure, rewards: ModuleType, tmp_path: Path, draft: str
) -> None:
    """The same tokens and rewards, and so the same weights bit for bit.

    The engine's log-probabilities differ in their last bits, since blocks and single tokens are matrix products of
    other shapes; so without the importance correction, which alone lets them into the loss.
    """
    for name, overrides in {"reference": {}, "other": DRAFTS[draft]}.items():
        train(configure(tmp_path / name, train__tis_cap=0.0, **overrides))
    kept = ("step", "prompt_id", "index", "tokens", "reward", "finish")
    reference, other = (
        [{k: s[k] for k in kept} for s in lines(tmp_path / name, "samples.jsonl")] for name in ("reference", "other")
    )
    assert reference == other and len(reference) == 64
    (expected, _), (got, _) = state(tmp_path / "reference"), state(tmp_path / "other")
    policy = [n for n in expected if n.startswith("policy")]
    assert policy and [n for n in policy if not torch.equal(expected[n], got[n])] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_step_and_saves(
    configure: Configure,
    finished: RunConfig,
    rewards: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    rewards.fault = lambda call: signal.raise_signal(number) if call == 20 else None
    config = configure(tmp_path)
    before = signal.getsignal(number)
    train(config)
    assert signal.getsignal(number) is before
    assert steps(tmp_path) == [2] and [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert rundir.read(tmp_path).notes == ("This run ended after step 2 of 4.",)
    assert f"Interrupted; step 2 is saved in {tmp_path}, and the same command goes on." in capsys.readouterr().out
    train(config)
    assert f"Going on from step 2 in {tmp_path}." in capsys.readouterr().out
    train(config)
    assert f"Nothing to do: {tmp_path} is at step 4; with more `steps` it goes on." in capsys.readouterr().out
    assert_same_run(tmp_path, Path(finished.out))


def test_ctrl_c_during_the_warm_start(
    run_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, taken = TorchTrainer._draft_step, 0

    def step(self: TorchTrainer, *arguments: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, *arguments, **options)

    monkeypatch.setattr(TorchTrainer, "_draft_step", step)
    assert cli.main(["train", run_file(draft__warmup_steps=50)]) == 130
    assert taken == 3 and capsys.readouterr().err == "miles-spec: interrupted\n"
    assert steps(tmp_path / "out") == []


def test_what_a_resumed_run_changes_is_said(
    configure: Configure, rewards: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(configure(tmp_path, steps=1))
    train(configure(tmp_path, steps=2, train__lr=0.25))
    assert f"Going on from step 1 in {tmp_path}, with train.lr = 0.25 (was " in capsys.readouterr().out


def test_ctrl_c_before_the_first_step(configure: Configure, rewards: ModuleType, tmp_path: Path) -> None:
    from miles_spec import loop

    assemble = loop.assemble

    def interrupt(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return assemble(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "assemble", interrupt)
        train(configure(tmp_path))
    assert steps(tmp_path) == [] and not (tmp_path / "summary.json").exists()


def test_a_second_ctrl_c_within_the_optimizer_saves_no_half_step(
    configure: Configure,
    finished: RunConfig,
    rewards: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    real, updates = torch.optim.AdamW.step, iter(range(1, 99))

    def step(self: torch.optim.AdamW) -> None:
        real(self)
        if next(updates) == 5:  # policy and draft in turn: the policy's in step 3
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    config = configure(tmp_path, checkpoint__every=4)
    # as in a terminal: where tests run in the background, the shell has it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    # the policy has moved on and its version has not: what is in memory is of no step
    assert steps(tmp_path) == [] and [row["step"] for row in lines(tmp_path)] == [1, 2]
    train(config)
    assert_same_run(tmp_path, Path(finished.out))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: 1 / 0, r"reward e2e_rewards:letters raised ZeroDivisionError: division by zero on prompt tasks-\d+"),
        (
            lambda: float("nan"),
            r"reward e2e_rewards:letters returned nan for prompt tasks-\d+; a reward must be finite",
        ),
    ],
    ids=["raises", "nan"],
)
def test_a_reward_that_fails_loses_nothing(
    run_file: Callable[..., str],
    finished: RunConfig,
    rewards: ModuleType,
    tmp_path: Path,
    fault: Callable[[], float],
    message: str,
    said: Callable[[], Said],
) -> None:
    rewards.fault = lambda call: fault() if call == 2 * 16 + 5 else None
    path = run_file()
    assert cli.main(["train", path]) == 2
    assert said().matches(message)
    assert steps(tmp_path / "out") == [2]
    rewards.fault = None
    assert cli.main(["train", path]) == 0
    assert_same_run(tmp_path / "out", Path(finished.out))


def test_a_gradient_that_is_not_finite(
    run_file: Callable[..., str], rewards: ModuleType, tmp_path: Path, said: Callable[[], Said]
) -> None:
    # squared deviations of these overflow, so advantages are not finite
    rewards.fault = lambda call: (-1) ** call * 1e200 if call > 16 else None
    assert cli.main(["train", run_file(train__advantage="dr_grpo")]) == 2
    assert said().matches("the policy's gradient norm is (nan|inf) at version 1; its weights are unchanged.*")
    assert steps(tmp_path / "out") == [1]


@pytest.mark.parametrize(
    ("every", "left", "said"),
    [(2, [2], "the checkpoint of step 2 is kept"), (0, [], "no checkpoint was written before")],
)
def test_a_step_that_fails_halfway_leaves_the_last_checkpoint(
    run_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    every: int,
    left: list[int],
    said: str,
) -> None:
    """In step 4, after the first of its two minibatches."""
    real, calls = TorchTrainer.step, iter(range(1, 99))

    def failing(self: TorchTrainer, *args: Any) -> Any:
        if next(calls) == 8:
            raise RunError("a rank is gone")
        return real(self, *args)

    monkeypatch.setattr(TorchTrainer, "step", failing)
    with pytest.raises(RunError, match="a rank is gone"):
        cli.main(["train", run_file(train__minibatches=2, checkpoint__every=every, steps=4)])
    assert steps(tmp_path / "out") == left
    assert f"The step that was cut off may have changed weights; {said}." in capsys.readouterr().out


def test_a_full_disk_at_save_time(
    run_file: Callable[..., str],
    finished: RunConfig,
    tmp_path: Path,
    said: Callable[[], Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, path = tmp_path / "out", run_file(checkpoint__every=2)
    written: list[str] = []

    def full(file: Path, mode: str) -> Any:
        written.append(file.name)
        return open("/dev/full" if len(written) > 2 else file, "r+b" if len(written) > 2 else mode)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "open", full, raising=False)
        assert cli.main(["train", path]) == 2
    strerror = os.strerror(errno.ENOSPC)
    assert said() == (
        f"the checkpoint of step 4 could not be written to {out / 'checkpoints'} ({strerror}); the one of step 2 is "
        "kept"
    )
    assert written == ["tensors_00000.safetensors", "state.json", "tensors_00000.safetensors"]  # and no second attempt
    assert steps(out) == [2] and [row["step"] for row in lines(out)] == [1, 2, 3, 4]
    assert cli.main(["train", path]) == 0
    assert_same_run(out, Path(finished.out))


def corrupted(role: Role, name: str, versions: Iterable[int]) -> Callable[..., None]:
    """`EmbeddedEngine.load_weights` that flips a bit of one tensor in pushes of these versions."""
    real = EmbeddedEngine.load_weights

    def load(self: EmbeddedEngine, of: Role, tensors: Iterable[tuple[str, Tensor]]) -> None:
        real(self, of, tensors)
        assert self._updating is not None
        if of == role and self._updating[0] in versions:
            flip_bit(self._served()[role][name], 12345)

    return load


def test_a_flipped_bit_in_the_target_ends_the_run(
    run_file: Callable[..., str],
    finished: RunConfig,
    tmp_path: Path,
    said: Callable[[], Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, name = run_file(), "model.layers.1.mlp.down_proj.weight"
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedEngine, "load_weights", corrupted("target", name, [2]))
        assert cli.main(["train", path]) == 2
    message = "engine 'embedded' does not serve the target of version 2 that was sent: " + name + ": serves .*, sent .*"
    assert said().matches(message)
    # the trainer's step was whole: it is saved, with its line
    assert steps(tmp_path / "out") == [2]
    assert [(r["receipts_verified"], r["receipts_failed"]) for r in lines(tmp_path / "out")] == [(2, 0), (0, 1)]
    assert cli.main(["train", path]) == 0
    assert state(tmp_path / "out")[1] == state(Path(finished.out))[1]
    for name, tensor in state(Path(finished.out))[0].items():
        assert torch.equal(state(tmp_path / "out")[0][name], tensor), name


def test_a_flipped_bit_in_the_draft_costs_only_speculation(
    configure: Configure,
    finished: RunConfig,
    rewards: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(EmbeddedEngine, "load_weights", corrupted("draft", "fc.weight", [1]))
        train(configure(tmp_path))
    rows = lines(tmp_path)
    assert [(r["receipts_verified"], r["receipts_failed"]) for r in rows] == [(1, 1), (2, 0), (2, 0), (2, 0)]
    assert [row["verify_steps"] > 0 for row in rows] == [True, False, True, True]
    assert rows[1]["accept_length"] is None and rows[1]["accept_estimate_error"] is None
    assert "goes on without speculation" in caplog.text and "drafts again" in caplog.text
    assert (rundir.read(tmp_path).summary or {})["receipts_failed"] == 1
    # the same responses, if not always by the same way
    tokens = [[s["tokens"] for s in lines(out, "samples.jsonl")] for out in (tmp_path, Path(finished.out))]
    assert tokens[0] == tokens[1]


def test_a_trainer_that_sleeps_changes_nothing(
    configure: Configure, rewards: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While responses are made all of it is in the host's memory, the optimizer also while weights are pushed; an error
    meanwhile loses nothing."""
    away: dict[str, set[str]] = {}
    generate, load, make = EmbeddedEngine.generate, EmbeddedEngine.load_weights, assemble.make_trainer
    trainers: list[Any] = []

    def made(*args: Any) -> Any:
        trainers.append(make(*args))
        for p in trainers[-1].model.parameters():
            # products round by where their factors lie in a cache line, and in a file that is anywhere
            p.data = p.data.clone()
        return trainers[-1]

    def note(call: str) -> None:
        here = {tag for tag, found in trainers[-1].memory._storages().items() if found}
        away.setdefault(call, set()).update({"weights", "optimizer", "draft"} - here)

    def generates(self: EmbeddedEngine, *args: Any) -> Any:
        if trainers:
            note("generate")
        return generate(self, *args)

    def loads(self: EmbeddedEngine, *args: Any) -> None:
        note("load")
        load(self, *args)

    monkeypatch.setattr(assemble, "make_trainer", made)
    train(configure(tmp_path / "awake"))
    trainers.clear()
    monkeypatch.setattr(EmbeddedEngine, "generate", generates)
    monkeypatch.setattr(EmbeddedEngine, "load_weights", loads)
    rewards.calls, rewards.fault = 0, lambda call: 1 / 0 if call == 2 * 16 + 5 else None
    asleep = configure(tmp_path / "asleep", train__offload=("weights", "optimizer", "draft"), checkpoint__every=3)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        train(asleep)
    assert steps(tmp_path / "asleep") == [2]
    trainers.clear()
    rewards.fault = None
    train(asleep)
    assert steps(tmp_path / "asleep") == [3, 4]
    assert away == {"generate": {"weights", "optimizer", "draft"}, "load": {"optimizer"}}
    assert_same_run(tmp_path / "awake", tmp_path / "asleep")


@pytest.mark.parametrize(("name", "at"), [("_forward", 4), ("logprobs", 2)])
def test_a_run_that_is_out_of_memory_once_goes_on(
    configure: Configure, rewards: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    """As one that is packed at half the budget from that step on, which here is the second, but for rounding."""
    settings: dict[str, Any] = dict(steps=2, draft__warmup_steps=0, train__minibatches=2, train__token_budget=128)
    train(configure(tmp_path / "small", **{**settings, "steps": 1}))
    train(configure(tmp_path / "small", **settings | {"train__token_budget": 64}))
    real, calls = getattr(TorchTrainer, name), 0

    def failing(self: TorchTrainer, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += self.version == 2  # after the first step
        if self.version == 2 and calls == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, name, memory.guarded(failing) if name == "logprobs" else failing)
        train(configure(tmp_path / "retried", **settings, train__oom_retry=True))
    assert [row["token_budget"] for row in lines(tmp_path / "retried")] == [128, 64]
    assert "The run goes on with train.token_budget = 64" in (tmp_path / "retried" / "run.log").read_text()
    (got, values), (expected, others) = state(tmp_path / "retried"), state(tmp_path / "small")
    assert values == others | {"halved_budget": [128, 64]} and got.keys() == expected.keys()
    for part in ("policy.", "policy_optim.", "draft.", "draft_optim."):
        names = [n for n in got if n.startswith(part)]
        scale = max(float(expected[n].abs().max()) for n in names)
        assert max(float((got[n].double() - expected[n].double()).abs().max()) for n in names) < 1e-5 * scale
    # half of it is the setting of this run, also after a resume, until another is set
    train(configure(tmp_path / "retried", **settings | {"steps": 3}, train__oom_retry=True))
    train(configure(tmp_path / "retried", **settings | {"steps": 4, "train__token_budget": 96}, train__oom_retry=True))
    assert [row["token_budget"] for row in lines(tmp_path / "retried")] == [128, 64, 64, 96]


def test_a_run_that_is_out_of_memory_says_so(
    run_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], Said]
) -> None:
    real = TorchTrainer._forward

    def failing(self: TorchTrainer, *args: Any) -> Any:
        if self.version == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args)

    path = run_file(train__oom_retry=True)
    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, "_forward", failing)
        assert cli.main(["train", path]) == 2
    assert said().splitlines()[-1].startswith("out of memory in the policy's forward, with a micro-batch of ")
    assert steps(tmp_path / "out") == [1]
