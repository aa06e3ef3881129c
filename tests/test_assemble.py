"""A run's weights and its GPU's memory, at the moments when servers need them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import tiny_model
from miles_spec.assemble import Run
from miles_spec.config import RunConfig, TrainConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES
from miles_spec.train.torch_trainer import TorchTrainer


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
