"""Weights pushed into a real server's memory: every transport, every fault that a receipt has to notice."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from miles_spec.sync.collective import Collective
from miles_spec.sync.session import TargetSyncError
from miles_spec.sync.transports import Disk, Ipc
from miles_spec.types import RunError, TensorMeta

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["ipc", "gloo", "disk"])
def test_both_roles_arrive(host: Any, sampled: Any, kind: str, tmp_path: Path) -> None:
    made = {"ipc": lambda: Ipc(CPU), "gloo": lambda: Collective("gloo", CPU), "disk": lambda: Disk(tmp_path)}
    transport, new = made[kind](), host.pair.other(1)
    target, draft = host.push(new, transport)
    assert target.verified
    assert draft.verified
    assert target.tensors == len(new.target())
    assert draft.tensors == len(new.drafted())
    assert host.server.versions() == {"target": target.version, "draft": draft.version}
    again = host.push(new.other(2))  # buffers and groups are used again
    assert all(receipt.verified for receipt in again)
    ours = host.pair.embedded().generate(sampled(max_new_tokens=12))
    theirs = host.generate(sampled(max_new_tokens=12))
    assert [c.tokens for c in theirs] == [c.tokens for c in ours]
    assert [c.spec.verify_steps for c in theirs] == [c.spec.verify_steps for c in ours]
    assert {span.target for c in theirs for span in c.versions} == {again[0].version}
    host.syncer.transport.stop()
    assert not list(tmp_path.iterdir())


def test_self_test_serves_inverted_bits_and_then_the_weights(host: Any) -> None:
    before = host.checksums()
    verified, version = host.syncer.verified, host.server.versions()["target"] + 1
    weights = {"target": host.pair.target(), "draft": host.pair.drafted()}
    receipts = host.syncer.self_test([host.server], version=version, draft_version=version, **weights)
    assert all(receipt.verified for receipt in receipts)
    assert host.syncer.verified == verified + 4
    assert host.checksums() == before


def test_a_role_changes_only_its_own_tensors(host: Any) -> None:
    before, new = host.checksums(), host.pair.other(3)
    version = host.server.versions()["target"] + 1
    assert host.syncer.push([host.server], version=version, target=new.target())[0].verified
    target_pushed = host.checksums()
    changed = {name for name in before if target_pushed[name] != before[name]}
    shared = {"draft.model.embed_tokens.weight", "draft.lm_head.weight"}  # the target's own memory
    assert changed == {name for name in before if not name.startswith("draft.")} | shared
    both = {"target": new.target(), "draft": new.drafted()}
    assert all(r.verified for r in host.syncer.push([host.server], version=version, draft_version=version, **both))
    draft_pushed = host.checksums()
    changed = {name for name in before if draft_pushed[name] != target_pushed[name]}
    assert changed == {name for name in before if name.startswith("draft.")} - shared


class Flipped(Ipc):
    """Flips one byte of one tensor of every bucket that has it, as it would on the way."""

    def __init__(self, name: str, times: int) -> None:
        super().__init__(CPU)
        self.name, self.times = name, times

    def send(self, members: Any, role: Any, bucket: Any) -> Any:
        named = dict(bucket)
        if self.name in named and self.times > 0:
            self.times -= 1
            named[self.name] = named[self.name].clone()
            named[self.name].view(-1).view(torch.uint8)[5] ^= 1
        return super().send(members, role, list(named.items()))


def test_a_flipped_byte_of_the_target_takes_the_server_out(host: Any, sampled: Any) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"  # served as a part of qkv_proj
    with pytest.raises(TargetSyncError, match=name):
        host.push(host.pair, Flipped(name, 1))
    assert host.server.versions()["target"] == -1
    with pytest.raises(RuntimeError, match="no verified target"):
        host.generate(sampled())
    assert all(receipt.verified for receipt in host.push(transport=Ipc(CPU)))
    assert len(host.generate(sampled(max_new_tokens=2))) == 8


def test_a_flipped_byte_of_the_draft_is_pushed_again(host: Any) -> None:
    target, draft = host.push(host.pair, Flipped("fc.weight", 1))
    assert target.verified
    assert draft.verified
    assert draft.attempts == 2
    assert host.server.draft_depth > 0


def test_names_and_shapes_are_checked_before_anything_is_sent(host: Any) -> None:
    before, target, version = host.checksums(), host.pair.target(), host.server.versions()["target"]
    name = "model.norm.weight"
    missing = {n: t for n, t in target.items() if n != name}
    with pytest.raises(ValueError, match=f"'{name}' is expected"):
        host.syncer.push([host.server], version=version + 1, target=missing)
    with pytest.raises(ValueError, match=f"'{name}' has shape"):
        host.syncer.push([host.server], version=version + 1, target={**target, name: torch.zeros(3)})
    with pytest.raises(ValueError, match="none of that name"):
        host.syncer.push([host.server], version=version + 1, target={**target, "model.more": torch.zeros(3)})
    with pytest.raises(ValueError, match="must not go back"):
        host.syncer.push([host.server], version=version - 1, target=target)
    assert host.checksums() == before
    assert host.server.versions()["target"] == version


def test_a_server_has_a_place_for_every_tensor_and_a_tensor_for_every_place(host: Any) -> None:
    metas = {n: TensorMeta(shape=tuple(t.shape), dtype="float32") for n, t in host.pair.target().items()}
    norm = metas.pop("model.norm.weight")
    with pytest.raises(RunError, match=r"model\.norm\.weight"):
        host.server.learn("target", metas)
    with pytest.raises(RunError, match=r"no place for tensor 'model\.norms\.weight'"):
        host.server.learn("target", {**metas, "model.norm.weight": norm, "model.norms.weight": norm})
    assert host.server.alive()
    host.learn()
    assert all(receipt.verified for receipt in host.push())


def test_a_late_server_fails_the_push_and_takes_the_next_one(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process = host.server._process
    monkeypatch.setattr(host.server, "_push_timeout_s", 3.0)

    class Stalled(Ipc):
        def send(self, members: Any, role: Any, bucket: Any) -> Any:
            os.killpg(process.pid, signal.SIGSTOP)
            return super().send(members, role, bucket)

    try:
        with pytest.raises(TargetSyncError, match="within 3 s"):
            host.push(host.pair, Stalled(CPU))
    finally:
        os.killpg(process.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert host.server.versions()["target"] == -1
    assert all(receipt.verified for receipt in host.push(transport=Ipc(CPU)))


def test_a_server_killed_during_a_push_serves_again_after_a_verified_one(host: Any, sampled: Any) -> None:
    process = host.server._process

    class Killing(Ipc):
        def send(self, members: Any, role: Any, bucket: Any) -> Any:
            os.killpg(process.pid, signal.SIGKILL)
            return super().send(members, role, bucket)

    with pytest.raises(TargetSyncError, match="push: "):
        host.push(host.pair, Killing(CPU))
    deadline = time.monotonic() + 5
    while host.server.alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not host.server.alive()
    assert host.server.versions() == {"target": -1, "draft": -1}
    host.syncer.transport = Ipc(CPU)
    host.server.stop()
    host.server.start()
    with pytest.raises(RuntimeError, match="no verified target"):
        host.generate(sampled())
    host.learn()
    assert all(receipt.verified for receipt in host.push(version=0))
    ours = host.pair.embedded().generate(sampled(max_new_tokens=8))
    assert [c.tokens for c in host.generate(sampled(max_new_tokens=8))] == [c.tokens for c in ours]


def test_a_push_waits_for_nobody_while_requests_run(host: Any, sampled: Any) -> None:
    """A session beside running requests is refused, and they are not disturbed."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(host.generate(sampled(max_new_tokens=60)[:2])))
    thread.start()
    while len(host.server._running) < 2:  # a request that came later would be refused
        time.sleep(0.01)
    with pytest.raises(TargetSyncError, match="requests run"):
        host.push()
    thread.join()
    ours = host.pair.embedded().generate(sampled(max_new_tokens=60)[:2])
    assert [c.tokens for c in results] == [c.tokens for c in ours]
