"""The transport that broadcasts: one bucket to the ranks of all members at once, on other GPUs or machines.

Invariant: nobody's broadcast is trusted once a rank is gone. Whoever was in it fails, and the group is made anew.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's `__all__`

from miles_spec.rollout.engine import RemoteMember
from miles_spec.sync.group import CUMEM, GROUP_FAILED, NO_GROUP, Group, make_store
from miles_spec.sync.transports import (
    IN_TURN,
    Answer,
    Bucket,
    Command,
    Fault,
    Faults,
    Remote,
    each,
    fault_of,
    fill,
    in_thread,
    own_faults,
)
from miles_spec.types import Role

GROUPS = 2
"""Collective groups kept: all members for the target, and those that draft."""

Key = tuple[tuple[str, int], ...]
"""Of a group: its members' names and ranks."""


def without_cumem() -> None:
    """Has NCCL allocate here as it does in servers, unless the environment says how; before this process's first NCCL
    communicator, on every rank of a run."""
    os.environ.setdefault(CUMEM, "0")


class Collective(Remote):
    """Members on other GPUs or machines: the trainer is rank 0 of a group and broadcasts each bucket to all of them.

    A group is made at the first session of its members, kept over sessions, and made anew once a member of it was gone.
    A member that fails without leaving the group takes part in the broadcasts that follow and loads nothing of them.
    When one is gone the others fail too, with `Fault.by` naming it.

    `host` is the trainer's address as the members see it, `device` where the buffers lie.
    """

    def __init__(
        self,
        backend: Literal["nccl", "gloo"],
        device: torch.device,
        *,
        host: str = "127.0.0.1",
        timeout_s: float = 60.0,
    ) -> None:
        super().__init__()
        assert (backend == "nccl") == (device.type == "cuda"), "nccl broadcasts from GPUs, gloo from CPUs"
        if backend == "nccl":
            without_cumem()
        self._backend, self._device, self._host, self._timeout_s = backend, device, host, timeout_s
        self._store: TCPStore | None = None
        self._groups: dict[Key, tuple[str, Group]] = {}
        """With their names; the one used last at the end."""
        self._key: Key = ()
        self._buffers: list[Tensor] = []

    def stop(self) -> None:
        for _, group in self._groups.values():
            group.abort()
        self._groups.clear()
        self._buffers, self._store = [], None

    def _open(self, members: Sequence[RemoteMember], role: Role, room_bytes: int) -> Faults:
        if not self._buffers or self._buffers[0].numel() < room_bytes:
            self._buffers = [torch.empty(room_bytes, dtype=torch.uint8, device=self._device) for _ in range(IN_TURN)]
        self._key = tuple((member.name, member.ranks) for member in members)
        if self._key in self._groups:
            name, group = self._groups.pop(self._key)
            self._groups[self._key] = name, group
            answers = self._join(members, name, room_bytes, joined=True)
            if not any(isinstance(a, Exception) or NO_GROUP in (fault_of(a) or "") for a in answers.values()):
                return own_faults(answers)
            self._drop(self._key)  # a member has restarted since, or is gone
        while len(self._groups) >= GROUPS:
            self._drop(next(iter(self._groups)))
        return self._build(members, room_bytes)

    def _build(self, members: Sequence[RemoteMember], room_bytes: int) -> Faults:
        name = secrets.token_hex(8)
        store = self._store = self._store or make_store(self._host, self._timeout_s)
        joining = in_thread(lambda: self._join(members, name, room_bytes, joined=False))
        failed: Exception | None = None
        try:
            group = Group(
                self._backend,
                store,
                name=name,
                rank=0,
                world=1 + sum(member.ranks for member in members),
                device=self._device,
                timeout_s=self._timeout_s,
            )
            self._groups[self._key] = name, group
        except (ConnectionError, TimeoutError) as error:
            failed = error
        return self._judge(joining.result(), failed)

    def _join(self, members: Sequence[RemoteMember], name: str, room_bytes: int, *, joined: bool) -> dict[str, Answer]:
        assert self._store is not None
        first, at = {}, 1
        for member in members:
            first[member.name] = at
            at += member.ranks
        via = {
            "kind": self._backend,
            "address": [self._host, self._store.port],
            "group": name,
            "joined": joined,
            "keep": [name, *(kept for kept, _ in self._groups.values())],
            "world": at,
            "bytes": room_bytes,
            "timeout_s": self._timeout_s,
            "cumem": os.environ.get(CUMEM, ""),
        }
        return each(members, lambda m: m.deliver({"do": "open", "via": {**via, "rank": first[m.name]}}))

    def _pack(self, bucket: Bucket, role: Role, slot: int) -> tuple[Command, Callable[[], None]]:
        table, size, ready = fill(bucket, self._buffers[slot])
        return {"do": "load", "table": table, "bytes": size, "via": {"slot": slot}}, ready

    def _deliver(self, members: Sequence[RemoteMember], command: Command) -> Faults:
        _, group = self._groups[self._key]
        well, gone = {member.name for member in members}, threading.Event()

        def tell(member: RemoteMember) -> Mapping[str, Any]:
            try:
                return member.deliver(command if member.name in well else {**command, "table": []})
            except BaseException:
                gone.set()
                raise

        answering = in_thread(lambda: each(self._members, tell))
        failed: Exception | None = None
        try:
            group.broadcast(self._buffers[command["via"]["slot"]][: command["bytes"]], gone)
        except (ConnectionError, TimeoutError) as error:
            failed = error
            group.abort()  # so that whoever waits for this broadcast learns it now
        faults = self._judge(answering.result(), failed)
        return {name: fault for name, fault in faults.items() if name not in self._faults}

    def _judge(self, answers: Mapping[str, Answer], failed: Exception | None) -> Faults:
        """Whose faults they are. Drops the group if its broadcast did not reach all."""
        faults = {name: why for name, answer in answers.items() if (why := fault_of(answer)) is not None}
        gone = any(isinstance(answer, Exception) for answer in answers.values())
        if failed is None and not gone and not any(GROUP_FAILED in why for why in faults.values()):
            return {name: Fault(why=why) for name, why in faults.items()}
        self._drop(self._key)
        guilty = {name: why for name, why in faults.items() if GROUP_FAILED not in why}
        if not guilty:  # nobody says more than that it broke
            return {name: Fault(why=faults.get(name) or str(failed)) for name in answers}
        by = ", ".join(map(repr, guilty))
        return {
            name: Fault(why=guilty[name]) if name in guilty else Fault(why=f"cut off by the fault of {by}", by=by)
            for name in answers
        }

    def _drop(self, key: Key) -> None:
        if key in self._groups:
            self._groups.pop(key)[1].abort()
