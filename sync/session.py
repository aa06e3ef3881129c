"""Pushes weights into engines and proves, by digests, that they arrived.

A push is one session per role, the target first: begin, buckets, end (also after an error), then the digest of every
tensor the engine serves is compared with what was sent.

Invariant: when `Syncer.push` returns, the engine serves the target as sent, verified; and it drafts only with a draft
that was verified. A bad target raises, since what is sampled would not be the policy's. A bad draft costs only speed:
it is pushed once more, then the engine goes on without drafting until a later push verifies.

Versions: a push may repeat the version that is served (start-up, resume, a retry) but never go back below it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from miles_spec.rollout.engine import Engine
from miles_spec.sync.digest import Digester
from miles_spec.sync.transports import Transport, buckets
from miles_spec.types import Receipt, Role, RunError, TensorMeta, WeightUpdate

log = logging.getLogger(__name__)

Named = list[tuple[str, Tensor]]


class TargetSyncError(RunError):
    """An engine does not serve the target that was sent; it must not generate before a verified push."""

    def __init__(self, receipt: Receipt) -> None:
        self.receipt = receipt
        faults = "; ".join(receipt.mismatched[:3]) or "no tensor to compare"
        more = f"; and {len(receipt.mismatched) - 3} more" if len(receipt.mismatched) > 3 else ""
        super().__init__(
            f"engine {receipt.engine!r} does not serve the target of version {receipt.version} that was sent: "
            f"{faults}{more}"
        )


def _dtype(meta: TensorMeta) -> torch.dtype:
    dtype = getattr(torch, meta.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _checked(engine: Engine, role: Role, version: int, weights: Iterable[tuple[str, Tensor]]) -> Named:
    """The weights as a list, once version, names and shapes are what the engine expects; `ValueError` otherwise."""
    served = engine.versions().get(role)
    manifest = engine.manifest().get(role)
    if served is None or not manifest:
        raise ValueError(f"engine {engine.name!r} has no {role} to push weights into")
    if version < served:
        raise ValueError(
            f"engine {engine.name!r} serves {role} version {served} and a push must not go back to {version}; "
            "start a fresh engine to serve older weights"
        )
    named = list(weights)
    sent: set[str] = set()
    for name, tensor in named:
        if name in sent:
            raise ValueError(f"{role} tensor {name!r} is pushed twice; give each tensor once")
        if name not in manifest:
            raise ValueError(f"{role} tensor {name!r} is pushed, but engine {engine.name!r} has none of that name")
        if tuple(tensor.shape) != manifest[name].shape:
            raise ValueError(
                f"{role} tensor {name!r} has shape {list(tensor.shape)}, but engine {engine.name!r} expects "
                f"{list(manifest[name].shape)}"
            )
        sent.add(name)
    for name in manifest:
        if name not in sent:
            raise ValueError(f"{role} tensor {name!r} is expected by engine {engine.name!r} but not pushed")
    return named


def _checked_roles(
    engine: Engine,
    version: int,
    target: Iterable[tuple[str, Tensor]],
    draft_version: int | None,
    draft: Iterable[tuple[str, Tensor]] | None,
) -> list[tuple[Role, int, Named]]:
    roles: list[tuple[Role, int, Named]] = [("target", version, _checked(engine, "target", version, target))]
    if draft is not None:
        assert draft_version is not None, "a draft is pushed under its own version"
        roles.append(("draft", draft_version, _checked(engine, "draft", draft_version, draft)))
    return roles


def compare(engine: Engine, sent: WeightUpdate, served: Mapping[str, str]) -> Receipt:
    """A receipt of what `engine` says it serves (name to digest) against what was sent."""
    faults = [f"{name}: missing" for name in sent.digests if name not in served]
    faults += [f"{name}: unexpected" for name in served if name not in sent.digests]
    faults += [
        f"{name}: serves {served[name]}, sent {digest}"
        for name, digest in sent.digests.items()
        if served.get(name, digest) != digest
    ]
    version = engine.versions()[sent.role]
    if version != sent.version:
        faults.append(f"version: serves {version}, sent {sent.version}")
    return Receipt(
        engine=engine.name,
        role=sent.role,
        version=sent.version,
        tensors=len(sent.digests.keys() & served.keys()),
        mismatched=tuple(faults),
    )


def _session(
    engine: Engine,
    role: Role,
    version: int,
    named: Named,
    *,
    transport: Transport,
    bucket_bytes: int,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Receipt:
    """Sends every tensor in the dtype the engine serves it in (and as `change` makes it then), and compares.

    Whatever goes wrong, in the engine or on the way, is in the receipt, whether a tensor differs or something raised.
    """
    manifest = engine.manifest()[role]
    digester = Digester()

    def cast() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            tensor = tensor.detach().to(_dtype(manifest[name]))
            if change is not None:
                tensor = change(tensor)
            digester.add(name, tensor)
            yield name, tensor

    try:
        engine.begin_update(version, (role,))
        try:
            for bucket in buckets(cast(), bucket_bytes):
                transport.send(engine, role, bucket)
        finally:
            served = engine.end_update().get(role, {})
        return compare(engine, WeightUpdate(version=version, role=role, digests=digester.read()), served)
    except Exception as error:  # an engine may fail in any way; the receipt says how, and the caller acts on it
        log.debug("pushing the %s of version %d to engine %r failed", role, version, engine.name, exc_info=True)
        fault = f"push: {type(error).__name__}: {error}"
        return Receipt(engine=engine.name, role=role, version=version, tensors=0, mismatched=(fault,))


def _inverted(tensor: Tensor) -> Tensor:
    """The same dtype and shape with every bit flipped, so that every tensor of at least one element differs."""
    if tensor.dtype == torch.bool:
        return ~tensor
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return data.bitwise_not().view(tensor.dtype).view(tensor.shape)


class Syncer:
    """Pushes to any number of engines; remembers which of them go without a draft and how deep they drafted before."""

    def __init__(self, transport: Transport, *, bucket_bytes: int = 256 << 20, draft_attempts: int = 2) -> None:
        if bucket_bytes < 1 or draft_attempts < 1:
            raise ValueError(f"bucket_bytes ({bucket_bytes}) and draft_attempts ({draft_attempts}) must be at least 1")
        self.transport = transport
        self.bucket_bytes = bucket_bytes
        self.draft_attempts = draft_attempts
        self.verified = 0
        """Sessions whose receipt verified, since the start."""
        self.failed = 0
        """Sessions whose receipt did not, each attempt counted."""
        self.seconds: dict[Role, float] = {"target": 0.0, "draft": 0.0}
        """Time in sessions since the start, digests included."""
        self._depths: dict[str, int] = {}

    def drafting(self, engine: Engine) -> bool:
        """False while the engine's draft is off because its last push failed; its depth must then stay 0."""
        return engine.name not in self._depths

    def push(
        self,
        engine: Engine,
        *,
        version: int,
        target: Iterable[tuple[str, Tensor]],
        draft_version: int | None = None,
        draft: Iterable[tuple[str, Tensor]] | None = None,
    ) -> list[Receipt]:
        """Pushes the target and, where one is given, the draft; one receipt each, the draft's perhaps unverified.

        Raises `ValueError`, before anything is sent, for a version that goes back and for names or shapes that are not
        the engine's; `TargetSyncError` for a target that did not verify (the draft is then not pushed). After
        `draft_attempts` failures the engine's drafting is switched off, and on again, at the depth it had, by the next
        verified push.
        """
        roles = _checked_roles(engine, version, target, draft_version, draft)
        return [self._push(engine, role, at, named) for role, at, named in roles]

    def self_test(
        self,
        engine: Engine,
        *,
        version: int,
        target: Iterable[tuple[str, Tensor]],
        draft_version: int | None = None,
        draft: Iterable[tuple[str, Tensor]] | None = None,
    ) -> list[Receipt]:
        """For start-up: pushes every tensor with its bits inverted, sees that the engine serves just that, then pushes
        the real ones.

        So an engine that ignores pushes does not pass because it happens to hold the same weights already. Returns and
        raises as `push` does, and leaves the engine serving the weights given; a draft that fails inverted stays off.
        """
        receipts = []
        for role, at, named in _checked_roles(engine, version, target, draft_version, draft):
            receipt = self._push(engine, role, at, named, _inverted)
            receipts.append(self._push(engine, role, at, named) if receipt.verified else receipt)
        return receipts

    def _push(
        self, engine: Engine, role: Role, version: int, named: Named, change: Callable[[Tensor], Tensor] | None = None
    ) -> Receipt:
        """One role, as often as it may take, and what follows from its receipt."""
        for attempt in range(1, 1 + (self.draft_attempts if role == "draft" else 1)):
            start = time.perf_counter()
            receipt = _session(
                engine, role, version, named, transport=self.transport, bucket_bytes=self.bucket_bytes, change=change
            )
            receipt = replace(receipt, attempts=attempt)
            self.seconds[role] += time.perf_counter() - start
            self.verified += receipt.verified
            self.failed += not receipt.verified
            if receipt.verified:
                break
        if role == "draft":
            self._switch_draft(engine, receipt)
        elif not receipt.verified:
            raise TargetSyncError(receipt)
        return receipt

    def _switch_draft(self, engine: Engine, receipt: Receipt) -> None:
        if receipt.verified:
            depth = self._depths.pop(engine.name, None)
            if depth is not None:
                engine.set_draft_depth(depth)
                log.warning("engine %r drafts again, with version %d of the draft", engine.name, receipt.version)
            return
        if self.drafting(engine):
            self._depths[engine.name] = engine.draft_depth
            log.warning(
                "engine %r goes on without speculation until a push of the draft verifies: "
                "version %d failed %d times; %s",
                engine.name,
                receipt.version,
                receipt.attempts,
                "; ".join(receipt.mismatched[:3]) or "no tensor to compare",
            )
        engine.set_draft_depth(0)
