from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

from distributed import Ranks
from miles_spec.kernels import backend


def _sum_of_ranks(group: dist.ProcessGroup, factor: int) -> tuple[int, float]:
    total = torch.tensor([float(factor * (dist.get_rank(group) + 1))])
    dist.all_reduce(total, group=group)
    return dist.get_rank(group), float(total)


def _broken(group: dist.ProcessGroup) -> None:
    raise ValueError(f"rank {dist.get_rank(group)} is unhappy")


def test_workers_talk_and_report_what_they_raise(ranks: Ranks) -> None:
    assert ranks.run(_sum_of_ranks, 4, 2) == [(r, 20.0) for r in range(4)]
    with pytest.raises(AssertionError, match="rank 1 is unhappy"):
        ranks.run(_broken, 2)
    assert ranks.run(_sum_of_ranks, 2, 1) == [(0, 3.0), (1, 3.0)]


def test_the_interpreter_is_used_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert not backend.use_triton("auto", x) and not backend.use_triton("reference", x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.use_triton("triton", x)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        backend.use_triton("triton", x)


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "triton", None)
    backend._note_missing.cache_clear()
    with pytest.raises(ValueError, match="pip install"):
        backend.use_triton("triton", torch.zeros(1))

    class OnGpu:
        is_cuda = True

    with caplog.at_level(logging.WARNING):
        assert not any(backend.use_triton("auto", OnGpu()) for _ in range(3))  # type: ignore[arg-type]
    assert len(caplog.records) == 1
