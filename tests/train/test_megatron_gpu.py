"""The trainers of several ranks over NCCL against one GPU of the torch trainer, in float32 and in bfloat16.

Every rank computes the oracle itself and compares in its own process.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conftest import state_of
from miles_spec.kernels.layout import PackedLayout
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import PackedBatch
from sharded import over_nccl

from .test_megatron import CP, PP, TP, Outcome, _draft, _model, _outcome, _packs, _run
from .test_torch_trainer import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core"),
]

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{}, {CP: 2}, {TP: 2}, {TP: 2, "sequence_parallel": True}, {PP: 2}],
    4: [{CP: 4}, {TP: 2, CP: 2, "sequence_parallel": True}, {PP: 2, TP: 2}],
}
TERMS = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Relative distance of losses and entropy after each of three steps."""
UPDATE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Norm of the difference between two updates of all weights, over that of one: Adam makes as much of a gradient that is
all rounding as of any other."""


def _moved(pack: PackedBatch, device: torch.device) -> PackedBatch:
    names = ("tokens", "loss_mask", "advantages", "rollout_logprobs", "weights", "old_logprobs")
    there = {name: getattr(pack, name).to(device) for name in names}
    return replace(pack, layout=PackedLayout.make(pack.layout.lengths, device), **there)


def _update(outcome: Outcome, start: dict[str, Tensor], part: int, prefix: str) -> Tensor:
    now = {name: t for name, t in outcome[part].items() if name.startswith(prefix)}
    return torch.cat([(now[name].cpu() - start[name].cpu()).double().flatten() for name in sorted(now)])


def _cases(size: int, family: str) -> list[dict[str, Any]]:
    if family == "llama":
        return LAYOUTS[size]
    # experts ask for sequence parallelism where there is tensor parallelism
    return [table for table in LAYOUTS[size] if TP not in table or "sequence_parallel" in table]


def _compare(group: dist.ProcessGroup, family: str) -> None:
    from megatron.core import parallel_state

    from miles_spec.train.megatron import MegatronTrainer

    device = torch.device("cuda", torch.cuda.current_device())
    packs = [_moved(pack, device) for pack in _packs()]

    def outcome(trainer: Any) -> tuple[Outcome, dict[str, Tensor]]:
        trainer.freeze_draft()
        start = {name: t.clone() for name, t in state_of(trainer)[0].items()}
        return _outcome(trainer, packs), start

    for dtype in (torch.float32, torch.bfloat16):
        model = _model(family)
        expected, start = outcome(TorchTrainer(model, _draft(model), _run(), device, dtype))
        for table in [*_cases(group.size(), family), *([None] if group.size() > 1 else [])]:
            model = _model(family)
            if table is None:
                found, _ = outcome(TorchTrainer(model, _draft(model), _run(), device, dtype, group=group))
            else:
                run = replace(_run(), megatron=dict(table))
                found, _ = outcome(MegatronTrainer(model, _draft(model), run, device, dtype))
                parallel_state.destroy_model_parallel()
            for a, b in zip(found[0], expected[0], strict=True):
                for name in ("policy", "entropy", "draft"):
                    x, y = getattr(a, name), getattr(b, name)
                    assert x == pytest.approx(y, rel=TERMS[dtype], abs=TERMS[dtype]), (table, dtype, name, x, y)
            if group.rank() == 0:  # which alone has the state
                for part, prefix in ((1, "policy."), (2, "draft.")):
                    ours, theirs = (_update(o, start, part, prefix) for o in (found, expected))
                    far = float((ours - theirs).norm() / theirs.norm())
                    print(f"{family}, {table or 'data'}, {dtype}: {prefix} {far:.2e}", flush=True)
                    assert far <= UPDATE[dtype], (table, dtype, prefix, far)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("size", sorted(LAYOUTS))
def test_layouts_over_nccl_are_the_torch_trainer_but_for_rounding(size: int, family: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    over_nccl(_compare, size, tmp_path / "store", family)


def _keep(group: dist.ProcessGroup, family: str) -> None:
    from megatron.core import parallel_state

    from miles_spec.train.megatron import MegatronTrainer

    device = torch.device("cuda", torch.cuda.current_device())
    packs = [_moved(pack, device) for pack in _packs()]
    for table in _cases(group.size(), family):
        run = replace(_run(), megatron=dict(table))
        saved: list[Any] = [None]
        for steps in (2, 0):
            model = _model(family)
            trainer = MegatronTrainer(model, _draft(model), run, device, torch.bfloat16)
            trainer.freeze_draft()
            if saved[0] is not None:
                trainer.load_state(*saved[0])
            for _ in range(steps):
                trainer.step(packs)
            tensors, values = state_of(trainer)
            state = {name: t.cpu().clone() for name, t in tensors.items()}, values
            parallel_state.destroy_model_parallel()
            if steps:
                saved = [state]
                dist.broadcast_object_list(saved, device=device)  # rank 0 alone has the tensors
        model = _model(family)
        alone = TorchTrainer(model, _draft(model), _run(), device, torch.bfloat16)
        alone.freeze_draft()
        alone.load_state(*saved[0])
        if group.rank() == 0:
            assert values == saved[0][1]
            assert_same(state[0], saved[0][0])
            theirs = {name: t.cpu() for name, t in state_of(alone)[0].items() if name != "random.cuda"}
            assert_same(theirs, saved[0][0])


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("size", sorted(LAYOUTS))
def test_a_checkpoint_comes_back_the_same_bits_and_goes_to_the_torch_trainer(
    size: int, family: str, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    over_nccl(_keep, size, tmp_path / "store", family)
