"""Commands between a trainer and the loaders in its engines' processes: JSON frames over TCP.

A frame is a length (4 bytes, big-endian) and a JSON object in UTF-8. A loader connects to the trainer's `Mailbox`, says
hello with the session's token, and then answers one command after the other. Tensors never travel here.

Invariant: a connection is in step or closed. After a fault on the way, late answers included, it is closed, and every
further use raises `ConnectionError`; no answer is ever taken for that of another command.

The token is in the hello alone, never in a URL, an argument list, a log or an error.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

IDLE_S = 300.0
"""How long a loader waits for the next command before it takes the trainer for dead and lets its engine go on."""

HELLO_S = 10.0
"""How long either side waits for the other's part of the greeting."""

MAX_BYTES = 64 << 20
"""Of one frame; a command that names 100,000 tensors has about 10 MB."""

HELLO_BYTES = 64 << 10
"""Of the first frame, whose sender is not yet known to have the token."""

Frame = dict[str, Any]


class Channel:
    """One end of a connection: sends and receives frames. For one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket: socket.socket | None = sock

    def send(self, frame: Mapping[str, Any], timeout_s: float) -> None:
        """Raises `ConnectionError` if the other side is gone, `TimeoutError` if it does not take the frame in time, and
        `ValueError` for a frame above `MAX_BYTES`."""
        data = json.dumps(frame).encode()
        if len(data) > MAX_BYTES:
            raise ValueError(f"a frame of {len(data)} bytes is above the limit of {MAX_BYTES}; push fewer tensors")
        sock = self._live()
        try:
            sock.settimeout(timeout_s)
            sock.sendall(struct.pack(">I", len(data)) + data)
        except TimeoutError:
            self.close()
            raise TimeoutError(f"the other side took no frame within {timeout_s:g} s") from None
        except OSError as error:
            self.close()
            raise ConnectionError(f"the connection broke: {error}") from error

    def receive(self, timeout_s: float, max_bytes: int = MAX_BYTES) -> Frame:
        """The next frame, whole within `timeout_s`. Raises `ConnectionError` if the other side is gone or sends what is
        no frame, `TimeoutError` if it is late."""
        deadline = time.monotonic() + timeout_s
        try:
            (size,) = struct.unpack(">I", self._read(4, deadline))
            if size > max_bytes:
                raise ConnectionError(f"a frame of {size} bytes came, above the limit of {max_bytes}")
            frame = json.loads(self._read(size, deadline))
            if not isinstance(frame, dict):
                raise ConnectionError("a frame came that is no JSON object")
        except TimeoutError:
            self.close()
            raise TimeoutError(f"nothing came within {timeout_s:g} s") from None
        except ValueError:
            self.close()
            raise ConnectionError("a frame came that is no JSON") from None
        except ConnectionError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ConnectionError(f"the connection broke: {error}") from error
        return frame

    def close(self) -> None:
        """Closes; any number of times, from any thread. A thread that waits in `receive` is woken."""
        sock, self._socket = self._socket, None
        if sock is not None:
            with contextlib.suppress(OSError):  # the other side may have closed first
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    @property
    def closed(self) -> bool:
        """Whether it can no longer be used."""
        return self._socket is None

    def _live(self) -> socket.socket:
        if self._socket is None:
            raise ConnectionError("the connection is closed")
        return self._socket

    def _read(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            sock, left_s = self._live(), deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            sock.settimeout(left_s)
            part = sock.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise ConnectionError("the other side closed the connection")
            parts += part
        return bytes(parts)


class Connection:
    """The trainer's end of a connection to one rank of an engine."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self._channel, self._rank = channel, rank

    def ask(self, command: Mapping[str, Any], timeout_s: float) -> Frame:
        """Sends one command and returns its answer: `{"ok": true, ...}` or `{"fault": sentence}`.

        Raises `ConnectionError` if the other side is gone and `TimeoutError` if it is late; both name the
        tensor-parallel rank and close the connection.
        """
        try:
            self._channel.send(command, timeout_s)
            return self._channel.receive(timeout_s)
        except (ConnectionError, TimeoutError) as error:
            raise type(error)(f"rank {self._rank}: {error}") from error

    def close(self) -> None:
        """Ends the session for this rank, at any time and from any thread."""
        self._channel.close()


class Mailbox:
    """Where loaders connect to. Listens on a random port of `host` from the start until `close`."""

    def __init__(self, host: str = "127.0.0.1", *, idle_s: float = IDLE_S) -> None:
        self.token = secrets.token_hex(32)
        """What a loader has to say."""
        self.refused = 0
        """Connections that were closed: wrong token, no greeting, or of a session that is over."""
        self._idle_s = idle_s
        self._sessions = itertools.count(1)
        self._waiting: dict[int, dict[int, Connection]] = {}
        self._over: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        """Host and port."""
        self._accepting = threading.Thread(target=self._accept, name="mailbox", daemon=True)
        self._accepting.start()

    def new_session(self) -> int:
        """A session number that this mailbox has not given before."""
        return next(self._sessions)

    def expect(
        self,
        session: int,
        ranks: int,
        timeout_s: float,
        stopped: Callable[[], str] = lambda: "",
    ) -> list[Connection]:
        """Waits for the connections of ranks `0..ranks-1` and returns them in this order. Once for each session: later
        connections of it are refused.

        `stopped` is asked several times a second; a sentence it returns says why nobody will come. Raises
        `ConnectionError` then, or if the mailbox is closed, and `TimeoutError` if a rank is late.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            try:
                while True:
                    here = self._waiting.get(session, {})
                    missing = [rank for rank in range(ranks) if rank not in here]
                    if not missing:
                        return [self._waiting[session].pop(rank) for rank in range(ranks)]
                    left_s = deadline - time.monotonic()
                    reason = "the mailbox is closed" if self._closed else stopped()
                    if reason:
                        raise ConnectionError(f"no loader for session {session}: {reason}")
                    if left_s <= 0:
                        raise TimeoutError(
                            f"ranks {missing} of {ranks} did not connect for session {session} within {timeout_s:g} s "
                            f"({self.refused} connections were refused so far)"
                        )
                    self._changed.wait(min(left_s, 0.1))
            finally:
                self._over.add(session)
                for connection in self._waiting.pop(session, {}).values():
                    connection.close()

    def close(self) -> None:
        """Stops listening and refuses who waits; connections that `expect` returned stay open."""
        with self._changed:
            self._closed = True
            for connections in self._waiting.values():
                for connection in connections.values():
                    connection.close()
            self._waiting.clear()
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in `accept`
        # which must not accept for whoever gets the descriptor next
        self._accepting.join(HELLO_S)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # a connection that was reset before it was accepted, or no file descriptor left
                continue
            # a thread for each, so that one who says nothing keeps nobody waiting
            threading.Thread(target=self._greet, args=(sock,), name="mailbox-hello", daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        channel = Channel(sock)
        try:
            hello = channel.receive(HELLO_S, HELLO_BYTES)
            token = str(hello.pop("token", ""))
            if hmac.compare_digest(token.encode(), self.token.encode()):
                session, rank = int(hello["session"]), int(hello["rank"])
                channel.send({"ok": True, "idle_s": self._idle_s}, HELLO_S)
                with self._changed:
                    ranks = self._waiting.setdefault(session, {})
                    if not self._closed and session not in self._over and rank not in ranks:
                        ranks[rank] = Connection(channel, rank)
                        self._changed.notify_all()
                        return
        except (OSError, ValueError, TypeError, KeyError):
            pass  # no loader of ours; it is counted below
        channel.close()
        with self._changed:
            self.refused += 1


def connect(address: tuple[str, int], *, token: str, session: int, rank: int) -> tuple[Channel, float]:
    """The loader's end: connects and says hello.

    Returns the channel, and for how many seconds to wait for a command. Raises `ConnectionError` or `TimeoutError`.
    """
    try:
        channel = Channel(socket.create_connection(address, timeout=HELLO_S))
    except TimeoutError:
        raise TimeoutError(f"{address[0]}:{address[1]} took no connection within {HELLO_S:g} s") from None
    except OSError as error:
        raise ConnectionError(f"{address[0]}:{address[1]} took no connection: {error}") from error
    channel.send({"token": token, "session": session, "rank": rank}, HELLO_S)
    try:
        return channel, float(channel.receive(HELLO_S)["idle_s"])
    except (ConnectionError, KeyError):
        channel.close()
        raise ConnectionError(
            f"{address[0]}:{address[1]} refused the hello of rank {rank}, session {session}"
        ) from None
