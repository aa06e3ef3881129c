"""Servers of other kinds: a draft with a reduced vocabulary, and weights in shards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from miles_spec.sync.collective import Collective
from miles_spec.sync.session import TargetSyncError
from miles_spec.sync.transports import Ipc

CPU = torch.device("cpu")


def same_as_ours(host: Any, requests: Any) -> None:
    """Tokens, verify steps and accepted drafts are those of our engine."""
    for ours, theirs in zip(host.pair.embedded().generate(requests), host.generate(requests), strict=True):
        assert theirs.tokens == ours.tokens
        assert theirs.spec.verify_steps == ours.spec.verify_steps
        assert sum(theirs.spec.accepted) == sum(ours.spec.accepted)


def test_a_reduced_vocabulary_has_its_head_pushed(start: Any, reduced: Any, sampled: Any) -> None:
    host = start("reduced", reduced)
    host.learn()
    assert "lm_head.weight" in host.server.manifest()["draft"]
    for pair in (reduced, reduced.other(1)):  # the second time with another head
        assert all(receipt.verified for receipt in host.push(pair))
        same_as_ours(host, sampled(max_new_tokens=16))
    assert sum(sum(c.spec.accepted) for c in host.generate(sampled())) > 0
    host.server.stop()


def test_a_large_batch_goes_without_a_draft(start: Any, pair: Any, sampled: Any) -> None:
    """Eight sequences together decode one token a step. The two that are left in the end are drafted for again, by a
    draft that has seen all their tokens."""
    host = start("tail", pair, max_batch=2)
    host.learn()
    assert all(receipt.verified for receipt in host.push())
    same_as_ours(host, sampled(max_new_tokens=24)[:2])
    sizes = (8,) * 6 + (48,) * 2
    requests = [
        replace(request, sampling=replace(request.sampling, max_new_tokens=size))
        for request, size in zip(sampled(), sizes, strict=True)
    ]
    ours, theirs = host.pair.embedded(0).generate(requests), host.generate(requests)
    assert [c.tokens for c in theirs] == [c.tokens for c in ours]
    assert [len(c.tokens) for c in theirs] == list(sizes)
    for a, b in zip(theirs, ours, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)
    steps, accepted = [c.spec.verify_steps for c in theirs], [sum(c.spec.accepted) for c in theirs]
    assert (steps[:6], accepted[:6]) == ([7] * 6, [0] * 6)
    alone = [sum(c.spec.accepted) for c in host.generate(requests[6:])]
    assert all(0 < some < whole for some, whole in zip(accepted[6:], alone, strict=True))
    host.server.stop()


def test_two_ranks_take_their_shards(start: Any, pair: Any, sampled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    host = start("sharded", pair, tp_size=2)
    assert host.server.ranks == 2
    host.learn()
    for transport in (Ipc(CPU), Collective("gloo", CPU)):
        receipts = host.push(host.pair.other(1), transport)
        assert all(receipt.verified for receipt in receipts)
        assert receipts[0].tensors == len(pair.target())
        same_as_ours(host, sampled(max_new_tokens=12)[:4])
    name = "model.layers.0.mlp.down_proj.weight"
    deliver = type(host.server).deliver

    def swapped(self: Any, command: Any) -> Any:
        """Two tensors of the same shape change places in the bucket's table."""
        if command["do"] == "load":
            rows = {row[0]: list(row) for row in command["table"]}
            if name in rows and (other := name.replace("layers.0", "layers.1")) in rows:
                rows[name][3], rows[other][3] = rows[other][3], rows[name][3]
                command = {**command, "table": list(rows.values())}
        return deliver(self, command)

    monkeypatch.setattr(type(host.server), "deliver", swapped)
    host.syncer.bucket_bytes = 1 << 20
    with pytest.raises(TargetSyncError, match=name):
        host.push(transport=Ipc(CPU))
    monkeypatch.undo()
    assert all(receipt.verified for receipt in host.push())
    host.server.stop()
