"""A run's weights and its GPU's memory, at the moments when servers need them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megatron_cpu
from conftest import tiny_config, tiny_model
from miles_spec.assemble import join
from miles_spec.config import DraftConfig, ModelConfig, RunConfig, TrainConfig
from miles_spec.draft.export import export
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE3, FAMILIES
from miles_spec.run import Run
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


@megatron_cpu.installed
def test_a_layout_that_does_not_fit_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    """Here the model has no weights at all."""
    config = tiny_config("llama", num_hidden_layers=4)
    config.save_pretrained(tmp_path / "model")
    export(DraftHead.attach(tiny_model("llama", layers=4), EAGLE3), tmp_path / "draft", dtype=torch.float32)
    two = {"pipeline_model_parallel_size": 2}
    given = DraftConfig(path=str(tmp_path / "draft"))
    for megatron, draft, said in (
        ({"tensor_model_parallel_size": 4}, DraftConfig(), r"does not divide the model's 2 key-value heads"),
        ({"expert_model_parallel_size": 2}, DraftConfig(), r"size is set, but llama has no experts"),
        (two, DraftConfig(family="eagle3"), r"family eagle3 reads states between the layers"),
        (two, given, r"family eagle3 reads states between the layers"),
    ):
        train = TrainConfig(backend="megatron", ranks=4)
        model = ModelConfig(path=str(tmp_path / "model"))
        with pytest.raises(ValueError, match=said):
            join(RunConfig(model=model, train=train, megatron=megatron, draft=draft))
