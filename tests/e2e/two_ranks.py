"""`miles-spec` as a script, whose trainer all ranks run in full, comparing their weights and terms after each step.

Stands for a trainer that shares its work. Not a test module: the ranks of a run start it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from miles_spec import assemble, cli, processes
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import LossTerms


class Checked(TorchTrainer):
    """Raises `AssertionError` where ranks differ in a bit."""

    def step(self, batches: Any) -> LossTerms:
        terms = super().step(batches)
        self._compare(terms)
        return terms

    def freeze_draft(self) -> None:
        super().freeze_draft()
        self._compare(None)

    def _compare(self, terms: LossTerms | None) -> None:
        tensors = [t for name, t in self.state_tensors() if not name.startswith("random.")]
        mine = torch.cat([t.reshape(-1).double() for t in tensors])
        theirs = mine.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(mine, theirs), "the ranks' states differ"
        said = repr(terms and replace(terms, draft_seconds=0.0)).encode()
        lengths = torch.tensor([len(said), -len(said)])
        dist.all_reduce(lengths, dist.ReduceOp.MAX)
        assert lengths[0] == -lengths[1], "the ranks' terms differ"


def _make(config: Any, loaded: Any, draft: Any, ranks: Any) -> TorchTrainer:
    return Checked(loaded.model, draft, config, loaded.device, loaded.dtype)


if __name__ == "__main__":
    assemble.make_trainer = _make
    processes.COMMAND = (sys.executable, __file__)
    sys.exit(cli.main())
