"""The small decisions of putting a run together: seeds, sampling, the context, weights for a server."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import tiny_model
from miles_spec.assemble import Run, check_context, sampling, seed_of
from miles_spec.config import RolloutConfig, RunConfig, TrainConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES
from miles_spec.train.torch_trainer import TorchTrainer


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    parts = [(1, "2.1", 0, 0), (2, "2.1", 0, 0), (1, "2.2", 0, 0), (1, "2.1", 1, 0), (1, "2.1", 0, 1), (12, ".1", 0, 0)]
    seeds = [seed_of(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    # the same on every machine and in every process
    assert seed_of(1, "2.1", 0, 0) == seeds[0] == 5770768136284970869
    assert all(0 <= seed_of("x", i) < 2**63 for i in range(1000))
    torch.tensor(seeds)  # fits into int64


def test_sampling_is_the_run_files() -> None:
    rollout = RolloutConfig(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=9, stop=("a",))
    got = sampling(RunConfig(rollout=rollout))
    assert (got.temperature, got.top_p, got.top_k, got.max_new_tokens, got.stop) == (0.5, 0.9, 7, 9, ("a",))
    assert not got.ignore_eos and got.stop_token_ids == ()


def test_context() -> None:
    check_context(256, tiny_model())
    with pytest.raises(
        ValueError, match=r"the context of 257 tokens \(.*\) is longer than the model's 256; lower them"
    ):
        check_context(257, tiny_model())


def test_weights_come_back_for_a_server_that_needs_them_in_a_rollout() -> None:
    config = RunConfig(train=TrainConfig(offload=("weights", "optimizer", "draft")))
    model = tiny_model()
    draft = DraftHead.attach(model, FAMILIES["eagle"], None, torch.Generator().manual_seed(1))
    trainer = TorchTrainer(model, draft, config, "cpu")
    run: Any = SimpleNamespace(trainer=trainer, config=config, draft=draft, serving=None)
    for name in ("_refresh", "_target", "draft_weights"):
        setattr(run, name, partial(getattr(Run, name), run))
    before = Run.weights(run)
    kept = [{n: t.clone() for n, t in tensors.items()} for tensors in (before.target, before.draft or {})]
    Run.sleep(run)
    now = Run.weights(run)
    assert [now.target.keys(), (now.draft or {}).keys()] == [k.keys() for k in kept]
    for got, expected in zip((now.target, now.draft or {}), kept, strict=True):
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert trainer.asleep and not any(size for _, size in trainer.memory._storages()["optimizer"])


def test_whose_the_memory_of_the_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = SimpleNamespace(trainer=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 << 30)
    assert Run.gpu_gib(run, "others") == {"gpu_gib_others": 9.0}
    assert Run.gpu_gib(run, "trainer", "free") == {"gpu_gib_trainer": 5.0, "gpu_gib_free": 2.0}
    run.trainer.device = torch.device("cpu")
    assert Run.gpu_gib(run, "others", "free") == {}
