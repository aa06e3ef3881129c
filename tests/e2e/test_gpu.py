"""The same parts on a CUDA device, against the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import tiny_model
from e2e.conftest import Configure, lines
from miles_spec.config import DraftConfig, RunConfig, TrainConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.loop import train
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.train.packing import pack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import Request, Sampling
from oracles.samples import random_samples

pytestmark = pytest.mark.gpu


def engine(device: str, depth: int, dtype: torch.dtype) -> EmbeddedEngine:
    model = tiny_model("qwen3", torch.float32)
    draft = DraftHead.attach(model, EAGLE, None, torch.Generator().manual_seed(0))
    return EmbeddedEngine(
        model.to(device), draft.to(device), dtype=dtype, depth=depth, max_context=96, prefill_chunk_tokens=8
    )


def requests(temperature: float) -> list[Request]:
    return [
        Request(
            id=str(i),
            tokens=tuple(3 + (7 * i + j) % 50 for j in range(1 + 7 * (i % 5))),
            sampling=Sampling(temperature=temperature, max_new_tokens=30),
            seed=i,
        )
        for i in range(9)
    ]


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_engine_gives_the_tokens_of_the_cpu(depth: int, temperature: float) -> None:
    asked = requests(temperature)
    expected = engine("cpu", 0, torch.float64).generate(asked)
    got = engine("cuda", depth, torch.float64).generate(asked)
    assert [c.tokens for c in got] == [c.tokens for c in expected]


def test_engine_in_bfloat16_speculates_and_stays_near() -> None:
    subject = engine("cuda", 3, torch.bfloat16)
    got = subject.generate(requests(1.0))
    assert sum(c.spec.verify_steps for c in got) > 0
    assert all(math.isfinite(x) for c in got for x in c.logprobs)
    times = subject.take_times()
    assert min(times.prefill_s, times.draft_s, times.verify_s) > 0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_trainer_takes_the_step_of_the_cpu(dtype: torch.dtype, bound: float) -> None:
    """Gradients of policy and draft, relative in norm to those of the CPU in float32."""
    found = []
    for device, of in (("cpu", torch.float32), ("cuda", dtype)):
        run = RunConfig(draft=DraftConfig(loss="kl", clip=1e9), train=TrainConfig(clip=1e9))
        model = tiny_model("llama")
        draft = DraftHead.attach(model, EAGLE, None, torch.Generator().manual_seed(0))
        subject = TorchTrainer(model, draft, run, device, of)
        samples = random_samples([(4, 7), (3, 1), (5, 0), (1, 9), (6, 4)])
        [batches] = pack(
            samples,
            [1.0, -0.5, 2.0, 0.25, -1.5],
            token_budget=24,
            aggregation="token",
            max_new_tokens=9,
            minibatches=1,
            device=device,
        )
        terms = subject.step(batches)
        assert terms.draft_seconds > 0
        named = [*model.named_parameters(), *draft.named_parameters()]
        found.append([p.grad.double().cpu() for _, p in named if p.grad is not None])
    expected, got = found
    assert len(expected) == len(got)
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= bound * float(b.norm()) + 1e-7


def test_a_whole_run(tmp_path: Path, configure: Configure, rewards: ModuleType) -> None:
    """In bfloat16, resumed halfway; the draft's loss falls and every receipt verifies."""
    settings = {"model__device": "cuda", "model__dtype": "bfloat16", "draft__warmup_steps": 3}
    train(configure(tmp_path, steps=3, **settings))
    train(configure(tmp_path, steps=6, **settings))
    rows = [row for row in lines(tmp_path) if "step" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["receipts_failed"] == 0 and row["receipts_verified"] == 2 for row in rows)
    assert rows[-1]["draft_loss"] < rows[0]["draft_loss"]
    assert max(row["rollout_kl"] for row in rows) < 0.01
