"""The weights of one SGLang server: how it takes them, and what it is known to serve.

Invariant: a role has a version from a session of it that ended well until the next one, a start or a fault; before and
after it is -1. No session opens while requests run, and none may run while one is open.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from miles_spec.rollout.sglang_api import Api, Features, Keys
from miles_spec.rollout.sglang_session import PushSession
from miles_spec.sync.transports import said
from miles_spec.sync.wire import Mailbox
from miles_spec.types import Role, RunError, TensorMeta

log = logging.getLogger(__name__)

CONTROL_S = 120.0
"""For a control call such as a flush or the release of memory."""
FLUSH_S = 30.0
"""For requests that were given up to end, before a flush that cannot happen is an error."""


class SGLangMember:
    """What takes weights in a `RemoteMember` and `PushMember`; `SGLangServer` adds process, requests and memory."""

    def __init__(
        self, *, name: str, url: str, joined: bool, keys: Keys, start_timeout_s: float, push_timeout_s: float
    ) -> None:
        """`start_timeout_s` is for `learn`, `push_timeout_s` for each other command of a session."""
        self.name = name
        self.url = url
        self.joined = joined
        """Whether it was not started by us: then it cannot be restarted."""
        self.ranks = 1
        """Tensor-parallel processes, from `start` on."""
        self.features: Features | None = None
        """What the server says of itself, from `start` on."""
        self._keys = keys
        self._start_timeout_s = start_timeout_s
        self._push_timeout_s = push_timeout_s
        self._lock = threading.Lock()
        """Also for what the server adds: sessions, requests and its memory exclude each other."""
        self._running: dict[str, str] = {}
        """By the ids of requests those that SGLang knows them by; kept by the server."""
        self._released = False
        """Whether its memory is given back; kept by the server."""
        self._mailbox: Mailbox | None = None
        self._session: PushSession | None = None
        """Within a push also between two sessions of it."""
        self._opened: tuple[Role, int] | None = None
        """The role and version of a session, until it ends."""
        self._push: tuple[Role, ...] = ()
        """The roles of a push, until it ends."""
        self._broken = ""
        """Why the session can no longer end well."""
        self._stuck = ""
        """Why a session of the push did not close."""
        self._had_target = False
        """Whether a session of the target was opened since the start."""
        self._manifest: dict[Role, dict[str, TensorMeta]] = {}
        self._told: dict[Role, Mapping[str, TensorMeta]] = {}
        """What it was last told to learn, before the start too."""
        self._versions: dict[Role, int] = {"target": -1}

    def versions(self) -> Mapping[Role, int]:
        """By role; -1 where nothing verified is served."""
        with self._lock:
            return dict(self._versions)

    def manifest(self) -> Mapping[Role, Mapping[str, TensorMeta]]:
        """What `learn` found, by role; empty after a start."""
        with self._lock:
            return {role: dict(named) for role, named in self._manifest.items()}

    def leave(self, reason: str) -> None:
        """Stops generating until a push of the target verifies."""
        with self._lock:
            served = max(self._versions.values()) >= 0
            self._versions = dict.fromkeys(self._versions, -1)
        log.log(logging.WARNING if served else logging.DEBUG, "server %r leaves: %s", self.name, reason)

    def learn(self, role: Role, metas: Mapping[str, TensorMeta]) -> None:
        """Has every rank find out where the tensors of a role lie in its memory; the role serves nothing then.

        Raises `RunError` with all faults where a tensor has no place, or a served tensor is reached by none.
        """
        self._told[role] = metas
        self._open(role, -1, ())
        assert self._session is not None
        try:
            served = self._session.learn(metas, self._start_timeout_s)
        except (ConnectionError, TimeoutError) as error:
            raise RunError(f"server {self.name!r} did not learn its {role}: {error}") from error
        except RunError as error:
            raise RunError(f"server {self.name!r} cannot take the {role}: {error}") from None
        finally:
            self._close()
        with self._lock:
            self._manifest[role] = served

    def begin_push(self, roles: Sequence[Role]) -> None:
        """See `PushMember.begin_push`."""
        assert not self._push, "one push at a time"
        self._push = tuple(roles)

    def end_push(self) -> None:
        """See `PushMember.end_push`. It fails, too, if a session of the push did not close and the target had been
        verified before: its receipt no longer holds."""
        self._push = ()
        stuck, self._stuck = self._stuck, ""
        if self._session is not None:
            self._close()
        if stuck:
            with self._lock:
                self._versions = dict.fromkeys(self._versions, -1)
            raise RunError(f"server {self.name!r} did not end a session of the push: {stuck}")

    def begin_update(self, version: int, roles: Sequence[Role]) -> None:
        """Opens a session of one role, which serves nothing until the session ends well.

        Raises `RuntimeError` while a session is open or requests run, `ValueError` for a role it does not serve, and as
        `PushSession` does.
        """
        (role,) = roles
        self._open(role, version, self._push)

    def deliver(self, command: Mapping[str, Any]) -> Mapping[str, Any]:
        """Has every rank obey `command`; the first rank's answer, or the first fault's.

        Raises `ConnectionError` when a rank is gone and `TimeoutError` when it does not answer.
        """
        session = self._session
        if session is None:
            raise RuntimeError(f"server {self.name!r} has no session open")
        try:
            answers = session.ask(command)
        except (ConnectionError, TimeoutError) as error:
            self._broken = f"{command.get('do')}: {error}"
            raise
        return next((answer for answer in answers if "fault" in answer), answers[0])

    def end_update(self) -> Mapping[Role, Mapping[str, str]]:
        """Reads the digests of all that is served of the session's role, and closes the session, also after an error.
        Within a push that goes well, the loaders go on waiting for the next role.

        A tensor on which the ranks do not agree gets a text that no digest equals. Raises `RunError`, `ConnectionError`
        or `TimeoutError` if they cannot be read (the role then serves nothing), or the server did not end the session
        (then no role does).
        """
        session, opened = self._session, self._opened
        if session is None or opened is None:
            raise RuntimeError(f"server {self.name!r} has no session open")
        role, version = opened
        kept = False
        try:
            if self._broken:
                raise ConnectionError(f"server {self.name!r} broke off the session at {self._broken}")
            digests = session.digests()
            kept = bool(self._push)
        except RunError as error:
            raise RunError(f"server {self.name!r} cannot say what it serves: {error}") from None
        finally:
            if not kept:
                self._close()
        with self._lock:
            self._opened = None
            self._versions[role] = version
        return {role: digests}

    def flush(self) -> None:
        """Empties the prefix cache. Raises `RunError` if requests still run after a while."""
        until_s = time.monotonic() + FLUSH_S
        while True:
            try:
                self._control("/flush_cache", {})
                return
            except RunError:
                if time.monotonic() > until_s:
                    raise
            time.sleep(0.1)

    # A session

    def _open(self, role: Role, version: int, push: Sequence[Role]) -> None:
        """Rings for a role and, where the session is one of a push, for those still to come; or goes on with it."""
        features = self._known_features()
        with self._lock:
            session = self._session if push and self._opened is None else None
            if session is None:
                self._require_idle("take weights")
            if self._released:
                raise RuntimeError(f"server {self.name!r} has released its memory; wake it before a push")
            if role not in self._versions:
                raise ValueError(f"server {self.name!r} serves no {role}")
            if role == "draft" and not features.selector and not self._had_target:
                raise ValueError(
                    f"server {self.name!r} with SGLang {features.version} must get its target before its draft"
                )
            if self._mailbox is None:
                self._mailbox = Mailbox(self._mailbox_host())
            mailbox = self._mailbox
            self._opened, self._broken = (role, version), ""
            self._versions[role] = -1
        if session is not None:
            session.role = role
            return
        roles = push[push.index(role) :] if push else (role,)
        try:
            session = PushSession(Api(self.url, self._keys), features, mailbox, roles, self._push_timeout_s)
        except BaseException:
            with self._lock:
                self._opened = None
            raise
        with self._lock:
            self._session = session
            self._had_target = self._had_target or role == "target"

    def _close(self) -> None:
        """Ends the session; what was cached with the old weights goes. Nothing is served if that fails."""
        session = self._session
        assert session is not None
        try:
            if session.end():
                with contextlib.closing(session):
                    self.flush()  # while SGLang still answers the call that rang
            else:
                session.close()
                self.flush()
        except BaseException as error:
            with self._lock:
                if self._push and self._versions["target"] >= 0:
                    self._stuck = said(error)
                self._versions = dict.fromkeys(self._versions, -1)
            raise
        finally:
            with self._lock:
                self._session = self._opened = None

    def _mailbox_host(self) -> str:
        """An address of this host that the server can reach."""
        host = urlsplit(self.url).hostname or "127.0.0.1"
        if not self.joined:
            return host
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, and chooses the address
            return str(probe.getsockname()[0])

    # A start, for the server

    def _forget_weights(self) -> None:
        """Nothing is known of what it serves. The lock is held."""
        self._versions = dict.fromkeys(self._versions, -1)
        self._manifest, self._had_target = {}, False

    def _found(self, features: Features) -> None:
        """A start found out which roles there are; none is served. The lock is held."""
        self.ranks, self.features = features.ranks, features
        self._versions = {"target": -1, "draft": -1} if features.depth else {"target": -1}

    def _learn_again(self) -> None:
        """What it was told before a start."""
        for role in self._versions:
            if role in self._told:
                self.learn(role, self._told[role])

    # Smaller things

    def _control(self, path: str, body: Mapping[str, Any]) -> None:
        Api(self.url, self._keys).ask(path, body, admin=True, timeout_s=CONTROL_S)

    def _known_features(self) -> Features:
        if self.features is None:
            raise RuntimeError(f"server {self.name!r} has not started")
        return self.features

    def _require_serving(self) -> None:
        """Raises `RuntimeError` while it may not generate. The lock is held."""
        if self._opened is not None or self._session is not None:
            raise RuntimeError(f"server {self.name!r} takes weights and generates when that has ended")
        if self._released:
            raise RuntimeError(f"server {self.name!r} has released its memory; wake it first")
        if self._versions["target"] < 0:
            raise RuntimeError(f"server {self.name!r} serves no verified target; push one first")

    def _require_idle(self, to: str) -> None:
        """Raises `RuntimeError` while a session is open or requests run. The lock is held."""
        if self._opened is not None or self._session is not None:
            raise RuntimeError(f"server {self.name!r} cannot {to} while a session is open")
        if self._running:
            raise RuntimeError(f"server {self.name!r} cannot {to} while {len(self._running)} requests run")
