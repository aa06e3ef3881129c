"""Pushes weights into engines and proves, by digests, that they arrived.

A push is one session per role, the target first, for all members at once: begin, buckets, end (also after an error),
then the digest of every tensor that each member serves is compared with what was sent.

Invariant: when `Syncer.push` returns, every member either serves the target as sent, verified, or has left; and it
drafts only with a draft that was verified. Without a member left it raises, since what is sampled would not be the
policy's. A bad draft costs only speed: it is pushed once more, then the member goes on without drafting until a later
push verifies.

Versions: a push may repeat the version that is served (start-up, resume, a retry) but never go back below it. A member
that serves -1, nothing that was verified, takes any.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from miles_spec.rollout.engine import Member, PushMember
from miles_spec.sync.digest import Digester
from miles_spec.sync.dtypes import dtype_of
from miles_spec.sync.transports import Fault, Faults, Transport, aligned_bytes, buckets, each, said
from miles_spec.types import Receipt, Role, RunError, TensorMeta, WeightUpdate

log = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Weights of which only a few are whole at a time, as when a trainer gathers its shards one by one."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor, by name; known without gathering."""
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    """Gathers each tensor once; called once per session, of which a push may need several. A tensor has to stay as it
    is until those of its bucket are sent."""

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """`tensors`, as a mapping has it."""
        return self.tensors()


Weights = Mapping[str, Tensor] | Gathered
"""Name to tensor. A mapping, not an iterator: names and shapes are checked before anything is sent, and a session may
have to be repeated."""


class TargetSyncError(RunError):
    """No member serves the target that was sent; none may generate before a verified push."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self.receipts = tuple(receipts)
        super().__init__("; ".join(map(_told, self.receipts)))


def _told(receipt: Receipt) -> str:
    """What a receipt that does not verify says, in a sentence."""
    faults = "; ".join(receipt.mismatched[:3]) or "no tensor to compare"
    more = f"; and {len(receipt.mismatched) - 3} more" if len(receipt.mismatched) > 3 else ""
    return (
        f"engine {receipt.engine!r} does not serve the {receipt.role} of version {receipt.version} that was sent: "
        f"{faults}{more}"
    )


def _shapes(weights: Weights) -> Mapping[str, tuple[int, ...]]:
    if isinstance(weights, Gathered):
        return weights.shapes
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _check(member: Member, role: Role, version: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ValueError` unless version, names and shapes are what the member expects."""
    served = member.versions().get(role)
    manifest = member.manifest().get(role)
    if served is None or not manifest:
        raise ValueError(f"engine {member.name!r} has no {role} to push weights into")
    if version < served:
        raise ValueError(
            f"engine {member.name!r} serves {role} version {served} and a push must not go back to {version}; "
            "start a fresh engine to serve older weights"
        )
    for name, shape in shapes.items():
        if name not in manifest:
            raise ValueError(f"{role} tensor {name!r} is pushed, but engine {member.name!r} has none of that name")
        if tuple(shape) != manifest[name].shape:
            raise ValueError(
                f"{role} tensor {name!r} has shape {list(shape)}, but engine {member.name!r} expects "
                f"{list(manifest[name].shape)}"
            )
    for name in manifest:
        if name not in shapes:
            raise ValueError(f"{role} tensor {name!r} is expected by engine {member.name!r} but not pushed")


def _check_alike(members: Sequence[Member], role: Role) -> None:
    """Raises `ValueError` unless all members serve the role in the same dtypes, so that one digest holds for all."""
    first, *others = members
    metas = first.manifest()[role]
    for other in others:
        for name, meta in other.manifest()[role].items():
            if meta.dtype != metas[name].dtype:
                raise ValueError(
                    f"engine {first.name!r} serves {role} tensor {name!r} as {metas[name].dtype}, engine "
                    f"{other.name!r} as {meta.dtype}; start all engines with the same dtypes"
                )


def compare(member: Member, sent: WeightUpdate, served: Mapping[str, str]) -> Receipt:
    """A receipt of what `member` says it serves (name to digest) against what was sent."""
    faults = [f"{name}: missing" for name in sent.digests if name not in served]
    faults += [f"{name}: unexpected" for name in served if name not in sent.digests]
    faults += [
        f"{name}: serves {served[name]}, sent {digest}"
        for name, digest in sent.digests.items()
        if served.get(name, digest) != digest
    ]
    version = member.versions()[sent.role]
    if version != sent.version:
        faults.append(f"version: serves {version}, sent {sent.version}")
    return Receipt(
        engine=member.name,
        role=sent.role,
        version=sent.version,
        tensors=len(sent.digests.keys() & served.keys()),
        mismatched=tuple(faults),
    )


def _inverted(tensor: Tensor) -> Tensor:
    """The same dtype and shape with every bit flipped, so that every tensor of at least one element differs."""
    if tensor.dtype == torch.bool:
        return ~tensor
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return data.bitwise_not().view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """One role's weights on their way."""

    role: Role
    version: int
    weights: Weights


class Syncer:
    """Pushes to any number of members; remembers which of them go without a draft and how deep they drafted before."""

    def __init__(self, transport: Transport, *, bucket_bytes: int = 256 << 20, draft_attempts: int = 2) -> None:
        if bucket_bytes < 1 or draft_attempts < 1:
            raise ValueError(f"bucket_bytes ({bucket_bytes}) and draft_attempts ({draft_attempts}) must be at least 1")
        self.transport = transport
        self.bucket_bytes = bucket_bytes
        self.draft_attempts = draft_attempts
        self.verified = 0
        """Sessions of a member whose receipt verified, since the start."""
        self.failed = 0
        """Those whose receipt did not, each attempt counted."""
        self.seconds: dict[Role, float] = {"target": 0.0, "draft": 0.0}
        """Time in sessions since the start, digests included; members share a session."""
        self.bytes: dict[Role, int] = {"target": 0, "draft": 0}
        """Weights sent in those sessions, counted once however many members took them."""
        self._depths: dict[str, int] = {}

    def drafting(self, member: Member) -> bool:
        """False while the member's draft is off because its last push failed; its depth must then stay 0."""
        return member.name not in self._depths

    def push(
        self,
        members: Sequence[Member],
        *,
        version: int,
        target: Weights,
        draft_version: int | None = None,
        draft: Weights | None = None,
    ) -> list[Receipt]:
        """Pushes the target and, where one is given, the draft: a receipt per member and role, targets first.

        A member whose target does not verify leaves (`Member.leave`) and gets no draft. After `draft_attempts`
        failures a member's drafting is switched off, and on again, at the depth it had, by the next verified push; a
        member that had to restart for that and now has no place for a draft gets none, and no receipt of one.

        Raises `ValueError`, before anything is sent, for a version that goes back and for names or shapes that are not
        a member's; `TargetSyncError` if no member is left.
        """
        return self._push_all(members, self._loads(members, version, target, draft_version, draft))

    def self_test(
        self,
        members: Sequence[Member],
        *,
        version: int,
        target: Weights,
        draft_version: int | None = None,
        draft: Weights | None = None,
    ) -> list[Receipt]:
        """For start-up: pushes every tensor with its bits inverted, sees that the members serve just that, then pushes
        the real ones.

        So an engine that ignores pushes does not pass because it happens to hold the same weights already. Returns and
        raises as `push` does, and leaves the members serving the weights given; a draft that fails inverted stays off.
        """
        return self._push_all(members, self._loads(members, version, target, draft_version, draft), _inverted)

    def _loads(
        self,
        members: Sequence[Member],
        version: int,
        target: Weights,
        draft_version: int | None,
        draft: Weights | None,
    ) -> list[_Load]:
        """The roles to push, once they are what every member expects."""
        if not members:
            raise ValueError("a push needs at least one engine")
        assert len({member.name for member in members}) == len(members), "members are told apart by their names"
        loads = [_Load(role="target", version=version, weights=target)]
        if draft is not None:
            assert draft_version is not None, "a draft is pushed under its own version"
            loads.append(_Load(role="draft", version=draft_version, weights=draft))
        for load in loads:
            takers = [member for member in members if self._takes(member, load.role)]
            shapes = _shapes(load.weights)
            for member in takers:
                _check(member, load.role, load.version, shapes)
            if takers:
                _check_alike(takers, load.role)
        return loads

    def _takes(self, member: Member, role: Role) -> bool:
        """Not so for the draft of a member that was started anew without one, since its draft had failed."""
        return role == "target" or self.drafting(member) or role in member.versions()

    def _push_all(
        self, members: Sequence[Member], loads: Sequence[_Load], first: Change | None = None
    ) -> list[Receipt]:
        """All roles. With `first`, each is pushed changed that way, and as it is where that verified."""
        target, *_ = loads
        receipts, drafted = self._sessions(members, loads, first)
        takers = [member for member in members if receipts[member.name].verified and member.name in drafted]
        for member in takers:
            if why := self._switch_draft(member, drafted[member.name]):
                receipts[member.name] = self._broken(member.name, target, Fault(why=why))
        # switching a draft off may take a restart, after which the member serves nothing
        restarted = [m for m in takers if receipts[m.name].verified and m.versions()["target"] != target.version]
        if restarted:
            receipts |= self._sessions(restarted, [target])[0]
        if not any(receipt.verified for receipt in receipts.values()):
            raise TargetSyncError([receipts[member.name] for member in members])
        return [*(receipts[member.name] for member in members), *drafted.values()]

    def _sessions(
        self, members: Sequence[Member], loads: Sequence[_Load], first: Change | None = None
    ) -> tuple[dict[str, Receipt], dict[str, Receipt]]:
        """The last receipt of each member, by name: of the target and, of those whose target verified, of the draft.

        Members that do not end the push as they should have left, as have those whose target does not verify.
        """
        target, *drafts = loads
        received: tuple[dict[str, Receipt], dict[str, Receipt]] = {}, {}
        keeping = [member for member in members if isinstance(member, PushMember)]
        for member in keeping:
            member.begin_push([load.role for load in loads])
        try:
            received[0].update(self._push_target(members, target, first))
            serving = [member for member in members if received[0][member.name].verified]
            for draft in drafts:
                takers = [member for member in serving if self._takes(member, draft.role)]
                received[1].update(self._attempts(takers, draft, self.draft_attempts, first))
        finally:
            start = time.perf_counter()
            ended = each(keeping, lambda member: member.end_push())
            self.seconds[target.role] += time.perf_counter() - start
        for member in keeping:
            if isinstance(error := ended[member.name], Exception):
                why = f"push: {said(error)}"
                for receipts in received:
                    if (receipt := receipts.get(member.name)) and receipt.verified:
                        self.verified, self.failed = self.verified - 1, self.failed + 1
                        receipts[member.name] = replace(receipt, tensors=0, mismatched=(why,))
                self._leave(member, received[0][member.name])
        return received

    def _push_target(self, members: Sequence[Member], load: _Load, first: Change | None = None) -> dict[str, Receipt]:
        """By name; members whose receipt does not verify have left."""
        receipts = self._attempts(members, load, 1, first)
        for member in members:
            if not receipts[member.name].verified:
                self._leave(member, receipts[member.name])
        return receipts

    @staticmethod
    def _leave(member: Member, receipt: Receipt) -> None:
        reason = _told(receipt)
        log.warning("engine %r leaves until a push verifies: %s", member.name, reason)
        member.leave(reason)

    def _attempts(
        self, members: Sequence[Member], load: _Load, attempts: int, first: Change | None = None
    ) -> dict[str, Receipt]:
        """One role, for each member as often as it may take; the last receipt of each, by name."""
        if first is None:
            return self._repeat(members, load, attempts)
        receipts = self._repeat(members, load, attempts, first)
        passed = [member for member in members if receipts[member.name].verified]
        return receipts | self._repeat(passed, load, attempts)

    def _repeat(
        self, members: Sequence[Member], load: _Load, attempts: int, change: Change | None = None
    ) -> dict[str, Receipt]:
        receipts: dict[str, Receipt] = {}
        failures = dict.fromkeys((member.name for member in members), 0)
        waiting, number = list(members), 0
        while waiting:
            number += 1
            start = time.perf_counter()
            results = self._session(waiting, load, change)
            self.seconds[load.role] += time.perf_counter() - start
            again = []
            for member in waiting:
                receipt, by = results[member.name]
                receipts[member.name] = replace(receipt, attempts=number)
                self.verified += receipt.verified
                self.failed += not receipt.verified
                # a failure that another member caused is not held against this one; the other has one fewer attempt
                failures[member.name] += not receipt.verified and not by
                if not receipt.verified and failures[member.name] < attempts:
                    again.append(member)
            waiting = again
        return receipts

    def _session(self, members: Sequence[Member], load: _Load, change: Change | None) -> dict[str, tuple[Receipt, str]]:
        """Sends every tensor in the dtype it is served in (and as `change` makes it then), and compares: by name, the
        receipt and which other members are to blame if it does not verify.

        Whatever goes wrong, in a member or on the way, is in its receipt, whether a tensor differs or something raised.
        """
        role, manifest = load.role, members[0].manifest()[load.role]
        digester, transport = Digester(), self.transport

        def cast() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in load.weights.items():
                tensor = tensor.detach().to(dtype_of(manifest[name].dtype))
                if change is not None:
                    tensor = change(tensor)
                digester.add(name, tensor)
                yield name, tensor

        begun = each(members, lambda member: member.begin_update(load.version, (role,)))
        faults: Faults = {name: Fault(why=said(error)) for name, error in begun.items() if isinstance(error, Exception)}
        opened = [member for member in members if member.name not in faults]
        if not opened:
            return {name: (self._broken(name, load, fault), fault.by) for name, fault in faults.items()}
        ended: dict[str, Mapping[Role, Mapping[str, str]] | Exception] = {}
        try:
            faults |= transport.open(opened, role, self._room_bytes(manifest))
            for bucket in buckets(cast(), self.bucket_bytes):
                if not (taking := [member for member in opened if member.name not in faults]):
                    break
                digester.flush()  # before anything of the bucket may change
                self.bytes[role] += sum(tensor.nbytes for _, tensor in bucket)
                faults |= transport.send(taking, role, bucket)
        except Exception as error:  # of the trainer or the transport; the receipts say so, and the caller acts on them
            log.debug("pushing the %s of version %d failed", role, load.version, exc_info=True)
            faults = {member.name: Fault(why=said(error)) for member in opened} | faults
        finally:
            try:
                faults = transport.close(opened, role) | faults
            finally:
                ended = each(opened, lambda member: member.end_update())
        digests = digester.read() if len(faults) < len(members) else {}  # a fault may be the digester's
        sent = WeightUpdate(version=load.version, role=role, digests=digests)
        results = {}
        for member in members:
            served, fault = ended.get(member.name), faults.get(member.name)
            if fault is None and isinstance(served, Exception):
                fault = Fault(why=said(served))
            if fault is None:
                assert isinstance(served, Mapping)
                results[member.name] = compare(member, sent, served.get(role, {})), ""
            else:
                results[member.name] = self._broken(member.name, load, fault), fault.by
        return results

    @staticmethod
    def _broken(name: str, load: _Load, fault: Fault) -> Receipt:
        """The receipt of a session that did not come to its end."""
        why = (f"push: {fault.why}",)
        return Receipt(engine=name, role=load.role, version=load.version, tensors=0, mismatched=why)

    def _room_bytes(self, manifest: Mapping[str, TensorMeta]) -> int:
        """What the largest bucket takes."""
        sizes = [aligned_bytes(prod(meta.shape) * dtype_of(meta.dtype).itemsize) for meta in manifest.values()]
        return min(max(self.bucket_bytes, *sizes), sum(sizes))

    def _switch_draft(self, member: Member, receipt: Receipt) -> str:
        """Drafting on or off, as the draft's receipt says; why the member has left over that, "" if it has not."""
        if receipt.verified:
            depth = self._depths.pop(member.name, None)
            if depth is not None and member.draft_depth != depth:
                member.set_draft_depth(depth)
                log.warning("engine %r drafts again, with version %d of the draft", member.name, receipt.version)
            return ""
        if self.drafting(member):
            self._depths[member.name] = member.draft_depth
            log.warning(
                "engine %r goes on without speculation until a push of the draft verifies: "
                "version %d failed %d times; %s",
                member.name,
                receipt.version,
                receipt.attempts,
                "; ".join(receipt.mismatched[:3]) or "no tensor to compare",
            )
        if not member.draft_depth:
            return ""
        try:
            member.set_draft_depth(0)
        except ValueError as error:  # a joined server, whose start is not ours
            log.warning("engine %r drafts on with what it has, which costs speed only: %s", member.name, error)
        except RunError as error:
            why = f"it did not start again without its draft: {error}"
            log.warning("engine %r leaves: %s", member.name, why)
            member.leave(why)
            return why
        return ""
