"""Commands between trainer and loader: every fault of the other side ends in an error in time, none in a mix-up."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from miles_spec.sync import wire
from miles_spec.sync.wire import Channel, Connection, Mailbox, connect


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox(idle_s=7.5)
    yield mailbox
    mailbox.close()


def dial(mailbox: Mailbox, session: int, rank: int = 0, **change: Any) -> tuple[Channel, float]:
    arguments = {"token": mailbox.token, "session": session, "rank": rank} | change
    return connect(mailbox.address, **arguments)


def pair(mailbox: Mailbox) -> tuple[Connection, Channel]:
    session = mailbox.new_session()
    channel, _ = dial(mailbox, session)
    return mailbox.expect(session, 1, 5)[0], channel


def served(channel: Channel, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers every command in a thread until the other side closes."""

    def work() -> None:
        while True:
            try:
                channel.send(answer(channel.receive(5)), 5)
            except OSError:
                return

    threading.Thread(target=work, daemon=True).start()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_commands_are_answered_in_order(mailbox: Mailbox) -> None:
    connection, channel = pair(mailbox)
    served(channel, lambda command: {"ok": True, "echo": command})
    for command in ({"do": "a"}, {"do": "ü", "n": [1.5, None]}, {"do": "large", "data": "x" * (3 << 20)}):
        assert connection.ask(command, 5) == {"ok": True, "echo": command}


def test_hello_tells_both_sides_what_they_need(mailbox: Mailbox) -> None:
    session = mailbox.new_session()
    channel, idle_s = dial(mailbox, session)
    assert idle_s == 7.5
    [connection] = mailbox.expect(session, 1, 5)
    channel.close()
    with pytest.raises(ConnectionError, match="rank 0: the other side closed"):
        connection.ask({}, 5)


def test_ranks_are_sorted_whenever_they_come(mailbox: Mailbox) -> None:
    session = mailbox.new_session()

    def join(rank: int) -> None:
        channel, _ = dial(mailbox, session, rank)
        served(channel, lambda _: {"rank": rank})

    join(2)
    join(0)
    late = threading.Timer(0.2, join, (1,))
    late.start()
    assert [connection.ask({}, 5)["rank"] for connection in mailbox.expect(session, 3, 5)] == [0, 1, 2]
    late.join()


def test_sessions_do_not_mix(mailbox: Mailbox) -> None:
    first, second = mailbox.new_session(), mailbox.new_session()
    assert first != second
    for session in (second, first):
        channel, _ = dial(mailbox, session)
        served(channel, lambda _, session=session: {"session": session})  # type: ignore[misc]
    for session in (first, second):
        assert mailbox.expect(session, 1, 5)[0].ask({}, 5) == {"session": session}


@pytest.mark.parametrize("token", ["", "0" * 64, "ü", None, 5])
def test_a_wrong_token_is_refused_and_counted(mailbox: Mailbox, token: Any) -> None:
    session = mailbox.new_session()
    with pytest.raises(ConnectionError, match=f"refused the hello of rank 0, session {session}") as error:
        dial(mailbox, session, token=token)
    assert mailbox.token not in str(error.value)
    eventually(lambda: mailbox.refused == 1)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 did not connect .* \(1 connections were refused"):
        mailbox.expect(session, 1, 0.1)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 3) + b"[1]",
        struct.pack(">I", 2) + b"\xff\xff",
        struct.pack(">I", 10) + b"{}",
        b"",
    ],
    ids=["http", "no object", "no utf-8", "short", "nothing"],
)
def test_what_is_no_hello_is_refused_and_harms_nobody(mailbox: Mailbox, data: bytes) -> None:
    with socket.create_connection(mailbox.address) as sock:
        sock.sendall(data)
        with suppress(OSError):  # which may find it refused by now
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    eventually(lambda: mailbox.refused == 1)
    pair(mailbox)


def test_a_silent_stranger_keeps_nobody_waiting(mailbox: Mailbox) -> None:
    with socket.create_connection(mailbox.address):
        started = time.monotonic()
        pair(mailbox)
        assert time.monotonic() - started < wire.HELLO_S / 2


def test_late_doubled_and_finished_ranks_are_refused(mailbox: Mailbox) -> None:
    session = mailbox.new_session()
    first, _ = dial(mailbox, session)
    eventually(lambda: bool(mailbox._waiting.get(session)))
    second, _ = dial(mailbox, session)
    with pytest.raises(ConnectionError):
        second.receive(5)
    [connection] = mailbox.expect(session, 1, 5)
    third, _ = dial(mailbox, session)
    with pytest.raises(ConnectionError):
        third.receive(5)
    served(first, lambda command: {"ok": True})
    assert connection.ask({}, 5) == {"ok": True}  # the one that came first is as it was


def test_an_address_of_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    mailbox = Mailbox("::1")
    channel, _ = dial(mailbox, session := mailbox.new_session(), 0)
    (connection,) = mailbox.expect(session, 1, 10)
    served(channel, lambda command: {"ok": True})
    assert mailbox.address[0] == "::1" and connection.ask({}, 5) == {"ok": True}
    connection.close()
    mailbox.close()


def test_a_missing_rank_is_named_and_the_others_are_let_go(mailbox: Mailbox) -> None:
    session = mailbox.new_session()
    channel, _ = dial(mailbox, session, 1)
    eventually(lambda: bool(mailbox._waiting.get(session)))  # the other end registers it
    with pytest.raises(TimeoutError, match=r"ranks \[0, 2\] of 3"):
        mailbox.expect(session, 3, 0.2)
    with pytest.raises(ConnectionError):
        channel.receive(5)


def test_waiting_stops_when_nobody_can_come(mailbox: Mailbox) -> None:
    started = time.monotonic()
    with pytest.raises(ConnectionError, match="no loader for session 1: the server exited with 9"):
        mailbox.expect(mailbox.new_session(), 1, 60, lambda: "the server exited with 9")
    threading.Timer(0.1, mailbox.close).start()
    with pytest.raises(ConnectionError, match="mailbox is closed"):
        mailbox.expect(mailbox.new_session(), 1, 60)
    assert time.monotonic() - started < 10
    with pytest.raises(ConnectionError, match="took no connection"):
        dial(mailbox, 3)


def test_the_other_side_gone(mailbox: Mailbox) -> None:
    connection, channel = pair(mailbox)
    threading.Timer(0.1, channel.close).start()
    with pytest.raises(ConnectionError):
        connection.ask({}, 5)
    with pytest.raises(ConnectionError, match="is closed"):
        connection.ask({}, 5)


def test_a_late_answer_is_never_taken_for_the_next_one(mailbox: Mailbox) -> None:
    connection, channel = pair(mailbox)
    with pytest.raises(TimeoutError, match=r"nothing came within 0\.1 s"):
        connection.ask({"do": "first"}, 0.1)
    assert channel.receive(5) == {"do": "first"}
    with pytest.raises(ConnectionError):
        channel.send({"answer": "first"}, 5)
        channel.receive(5)
    with pytest.raises(ConnectionError, match="is closed"):
        connection.ask({"do": "second"}, 5)


def test_a_frame_that_trickles_in_is_late(mailbox: Mailbox) -> None:
    """The time is for the whole frame, not for each piece of it."""
    connection, channel = pair(mailbox)

    def trickle() -> None:
        sock = channel._socket
        assert sock is not None
        try:
            for byte in struct.pack(">I", 100) + b" " * 100:
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass

    threading.Thread(target=trickle, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.ask({}, 0.5)
    assert time.monotonic() - started < 4


def test_too_large_frames(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    connection, channel = pair(mailbox)
    sock = channel._socket
    assert sock is not None
    sock.sendall(struct.pack(">I", wire.MAX_BYTES + 1))
    with pytest.raises(ConnectionError, match="above the limit"):
        connection.ask({}, 5)
    connection, channel = pair(mailbox)
    monkeypatch.setattr(wire, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="push fewer tensors"):
        connection.ask({"do": "x" * 100}, 5)
    served(channel, lambda command: {"ok": True})
    assert connection.ask({}, 5) == {"ok": True}  # nothing was sent, so it is still in step


def test_close_wakes_a_thread_that_waits(mailbox: Mailbox) -> None:
    connection, channel = pair(mailbox)
    threading.Timer(0.2, connection.close).start()
    started = time.monotonic()
    with pytest.raises(ConnectionError):
        connection.ask({}, 30)
    assert time.monotonic() - started < 5
    with pytest.raises(ConnectionError):
        channel.receive(5)
        channel.receive(5)
