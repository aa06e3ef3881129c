"""What `miles-spec rollout serve` serves: the policy and the draft of a run's newest checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from miles_spec import checkpoint
from miles_spec.config import RunConfig
from miles_spec.models import stored_tensors
from miles_spec.serve import load


def test_the_newest_checkpoint_is_served(finished: RunConfig) -> None:
    saved = checkpoint.load_latest(Path(finished.out))
    assert saved is not None
    reached = load(replace(finished, rollout=replace(finished.rollout, engine="sglang")))
    policy = reached.policy
    assert (policy.version, policy.draft_version) == (saved.values["trainer"]["version"], 4)
    weights = policy.weights()
    assert weights.draft is not None
    held = {id(t): t for t in saved.tensors.values()}
    for tensor in (*weights.target.values(), *weights.draft.values()):
        assert not tensor.requires_grad
        assert any(t.shape == tensor.shape and torch.equal(t, tensor) for t in held.values())
    assert reached.frozen is not None
    for name, tensor in stored_tensors(reached.frozen).items():
        assert torch.equal(tensor, saved.tensors[f"frozen.{name}"])
    assert reached.source.state() == saved.values["source"]
    assert checkpoint.steps(Path(finished.out))[-1] == saved.step
