"""What one server is pushed, against the fake of SGLang."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import pytest
import torch

from fake_sglang import FakeLoader, FakeSGLang
from joined import METAS, ask, during, joined, request, serve
from miles_spec.rollout.engine import PushMember
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_session import PushSession
from miles_spec.sync.digest import digests
from miles_spec.sync.session import Syncer, TargetSyncError
from miles_spec.sync.transports import Bucket, Fault, Faults, InProcess
from miles_spec.types import Completion, Receipt, Role, RunError


def loader(fake: FakeSGLang) -> FakeLoader:
    assert isinstance(fake.ring, FakeLoader)
    return fake.ring


def bell_body(fake: FakeSGLang) -> dict[str, Any]:
    return [body for _, path, body in fake.calls if path == "/update_weights_from_tensor"][-1]


def test_a_session_rings_delivers_and_ends(fake: FakeSGLang) -> None:
    server = joined(fake)
    for role in ("target", "draft"):
        fake.calls.clear()
        server.begin_update(5, [role])
        assert server.versions()[role] == -1
        assert server.deliver({"do": "load", "bytes": 3}) == {"ok": True}
        assert server.end_update() == {role: {"w": "right"}} and server.versions()[role] == 5
        body = bell_body(fake)
        assert body["flush_cache"] is False and body["load_format"] == "miles_spec.sync.loader.load"
        if fake.version == "0.5.17":
            assert body["disable_draft_model"] is (role == "target") and "selector" not in body
            assert fake.paths() == ["/update_weights_from_tensor", "/flush_cache"]
        else:
            assert body["selector"] == role and "disable_draft_model" not in body
            begin, end = "/begin_weight_update", "/end_weight_update"
            assert sorted(fake.paths()) == sorted([begin, "/update_weights_from_tensor", end, "/flush_cache"])
            assert [body["selector"] for _, path, body in fake.calls if path == begin] == [role]
    assert [c["do"] for _, _, c in loader(fake).commands] == ["load", "digest", "end"] * 2
    assert loader(fake).open == 0


def push_both(server: SGLangServer, version: int) -> None:
    server.begin_push(["target", "draft"])
    for role in ("target", "draft"):
        server.begin_update(version, [role])
        server.deliver({"do": "load"})
        assert server.end_update() == {role: {"w": "right"}}


def test_both_roles_go_by_one_ring(fake: FakeSGLang) -> None:
    server = joined(fake)
    assert isinstance(server, PushMember)
    fake.calls.clear()
    push_both(server, 5)
    assert server.versions() == {"target": 5, "draft": 5}
    (error,) = ask(server, request())
    assert isinstance(error, RuntimeError) and "takes weights" in str(error)
    with pytest.raises(RuntimeError, match="a session is open"):
        server.learn("draft", METAS)
    assert "/flush_cache" not in fake.paths()
    server.end_push()
    paths, begin, end = fake.paths(), "/begin_weight_update", "/end_weight_update"
    assert paths.count("/update_weights_from_tensor") == paths.count("/flush_cache") == 1
    if fake.version != "0.5.17":
        assert paths[0] == begin and paths.count(end) == 1
        assert [body for _, path, body in fake.calls if path == begin] == [{"selector": "all"}]
    commands = [(c["do"], c.get("role")) for _, _, c in loader(fake).commands]
    ask_each = [(do, role) for role in ("target", "draft") for do in ("load", "digest")]
    assert [c for c in commands if c[0] != "end"] == ask_each and commands[-1][0] == "end"
    assert loader(fake).open == 0
    assert isinstance(ask(server, request())[0], Completion)


def test_a_role_that_breaks_off_is_rung_for_again(fake: FakeSGLang) -> None:
    server = joined(fake)
    server.begin_push(["target", "draft"])
    server.begin_update(1, ["target"])
    server.end_update()
    loader(fake).hang_up_at = "load"
    server.begin_update(1, ["draft"])
    with pytest.raises(ConnectionError):
        server.deliver({"do": "load"})
    with pytest.raises(ConnectionError, match="broke off the session at load"):
        server.end_update()
    assert loader(fake).open == 0 and server.versions() == {"target": 1, "draft": -1}
    loader(fake).hang_up_at = ""
    fake.calls.clear()
    server.begin_update(1, ["draft"])
    assert bell_body(fake).get("selector", "draft") == "draft"
    begun = [body for _, path, body in fake.calls if path == "/begin_weight_update"]
    assert begun == ([] if fake.version == "0.5.17" else [{"selector": "draft"}]), "the target's turn is over"
    assert server.end_update() == {"draft": {"w": "right"}}
    server.end_push()
    assert server.versions() == {"target": 1, "draft": 1}


@pytest.mark.parametrize("when", ["before the draft", "at the end"])
def test_a_loader_that_is_gone_between_two_roles(fake: FakeSGLang, when: str) -> None:
    server = joined(fake)
    server.begin_push(["target", "draft"])
    server.begin_update(1, ["target"])
    server.end_update()
    assert server._session is not None
    server._session._connections[0].close()
    if when == "before the draft":
        server.begin_update(1, ["draft"])
        with pytest.raises(ConnectionError):
            server.end_update()
    server.end_push()
    assert server.versions() == {"target": 1, "draft": -1} and loader(fake).open == 0


def test_a_push_that_does_not_end_serves_nothing(fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_spec.rollout import sglang_weights

    server = joined(fake)
    monkeypatch.setattr(sglang_weights, "FLUSH_S", 0.2)
    fake.faults.flush_busy = 1000
    push_both(server, 1)
    with pytest.raises(RunError, match="Pending requests"):
        server.end_push()
    assert server.versions() == {"target": -1, "draft": -1} and loader(fake).open == 0
    fake.faults.flush_busy = 0
    push_both(server, 1)
    server.end_push()
    assert server.versions() == {"target": 1, "draft": 1}


def does_not_close(session: PushSession, close: Callable[[PushSession], None] = PushSession.close) -> None:
    close(session)
    raise TimeoutError("the weight update did not end")


def test_a_draft_that_does_not_close_takes_the_target_with_it(
    fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = joined(fake)
    server.begin_push(["target", "draft"])
    server.begin_update(1, ["target"])
    server.end_update()
    loader(fake).hang_up_at = "load"
    server.begin_update(1, ["draft"])
    with pytest.raises(ConnectionError):
        server.deliver({"do": "load"})
    with monkeypatch.context() as patch:
        patch.setattr(PushSession, "close", does_not_close)
        with pytest.raises(TimeoutError, match="did not end"):
            server.end_update()
    assert server.versions() == {"target": -1, "draft": -1}
    loader(fake).hang_up_at = ""
    server.begin_update(1, ["draft"])
    assert server.end_update() == {"draft": {"w": "right"}}
    with pytest.raises(RunError, match=r"'e0' did not end a session of the push: TimeoutError: the weight update"):
        server.end_push()
    assert server.versions() == {"target": -1, "draft": -1} and loader(fake).open == 0
    (error,) = ask(server, request())
    assert isinstance(error, RuntimeError) and "no verified target" in str(error)
    push_both(server, 2)
    server.end_push()
    assert server.versions() == {"target": 2, "draft": 2}


class Nothing(InProcess):
    """Sends commands without weights, which the fake's loader takes."""

    def open(self, members: Sequence[Any], role: Role, room_bytes: int) -> Faults:
        return {}

    def send(self, members: Sequence[Any], role: Role, bucket: Bucket) -> Faults:
        faults: Faults = {}
        for member in members:
            try:
                member.deliver({"do": "load"})
            except ConnectionError as error:
                faults[member.name] = Fault(why=str(error))
        return faults


@pytest.mark.parametrize("again", [True, False])
def test_the_receipt_of_a_target_that_a_draft_took_with_it_is_not_green(
    fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Whether or not the second attempt at the draft ends well."""
    tensor = torch.ones(2, 3)
    loader(fake).digests = digests({"w": tensor}.items())
    server = joined(fake)
    server.learn("target", METAS)
    server.learn("draft", METAS)
    sync, closes = Syncer(Nothing()), []

    def both() -> list[Receipt]:
        return sync.push([server], version=3, target={"w": tensor}, draft_version=3, draft={"w": tensor})

    assert all(receipt.verified for receipt in both())
    assert server.versions() == {"target": 3, "draft": 3}

    def close(session: PushSession) -> None:
        closes.append(session.role)
        if again and len(closes) > 1:
            session_close(session)
        else:
            does_not_close(session)

    session_close = PushSession.close
    ask_ranks = PushSession.ask

    def ask_once(session: PushSession, command: Any, timeout_s: float | None = None) -> Any:
        if session.role == "draft" and not closes:
            raise ConnectionError("rank 0 is gone")
        return ask_ranks(session, command, timeout_s)

    monkeypatch.setattr(PushSession, "close", close)
    monkeypatch.setattr(PushSession, "ask", ask_once)
    with pytest.raises(TargetSyncError, match=r"'e0' does not serve the target of version 3.*did not end"):
        both()
    assert closes == ["draft", "draft"]
    assert server.versions() == {"target": -1, "draft": -1} and server.draft_depth == 3
    (error,) = ask(server, request())
    assert isinstance(error, RuntimeError) and "no verified target" in str(error)


def test_every_rank_obeys_and_all_must_agree(fake: FakeSGLang) -> None:
    fake.info["tp_size"] = 3
    loader(fake).other_digests = {2: {"w": "wrong", "extra": "e"}}
    server = joined(fake)
    assert server.ranks == 3
    server.begin_update(1, ["target"])
    server.deliver({"do": "load"})
    served = server.end_update()["target"]
    assert served["w"] == "rank 0: right, rank 1: right, rank 2: wrong" and "rank 2: e" in served["extra"]
    assert sorted(r for r, _, c in loader(fake).commands if c["do"] == "load") == [0, 1, 2]


def test_learning_makes_the_manifest(fake: FakeSGLang) -> None:
    server = joined(fake)
    serve(server)
    server.learn("target", METAS)
    assert server.manifest() == {"target": METAS}
    assert server.versions()["target"] == -1, "learning fills the served memory with anything"
    loader(fake).faults = {"learn": ["the engine has no place for tensor 'w'", "served tensor 'x' is reached by none"]}
    with pytest.raises(RunError, match="no place for tensor 'w'; served tensor 'x'"):
        server.learn("target", METAS)
    loader(fake).faults = {"learn": "broken"}
    with pytest.raises(RunError, match="cannot take the target: broken"):
        server.learn("target", METAS)


def test_a_fault_is_an_answer_and_the_session_goes_on(fake: FakeSGLang) -> None:
    server = joined(fake)
    loader(fake).faults = {"load": "no tensor 'w'"}
    server.begin_update(1, ["target"])
    assert server.deliver({"do": "load"}) == {"fault": "no tensor 'w'"}
    assert server.end_update() == {"target": {"w": "right"}}


def test_a_loader_that_goes_away_ends_the_session_and_the_next_one_works(fake: FakeSGLang) -> None:
    server = joined(fake)
    loader(fake).hang_up_at = "load"
    server.begin_update(1, ["target"])
    with pytest.raises(ConnectionError):
        server.deliver({"do": "load"})
    with pytest.raises(ConnectionError, match="'e0' broke off the session at load"):
        server.end_update()
    assert server.versions()["target"] == -1
    loader(fake).hang_up_at = ""
    serve(server, 2)
    assert server.versions()["target"] == 2


def test_a_late_loader_is_a_timeout(fake: FakeSGLang) -> None:
    server = joined(fake)
    loader(fake).faults = {"load": 1.0}
    server.begin_update(1, ["target"])
    assert server._session is not None
    server._session._timeout_s = server._push_timeout_s = 0.3
    with pytest.raises(TimeoutError):
        server.deliver({"do": "load"})
    with pytest.raises((ConnectionError, TimeoutError)):
        server.end_update()
    assert server.versions()["target"] == -1


def test_digests_that_cannot_be_read_are_an_error(fake: FakeSGLang) -> None:
    server = joined(fake)
    loader(fake).faults = {"digest": "learn again"}
    server.begin_update(1, ["target"])
    with pytest.raises(RunError, match="learn again"):
        server.end_update()
    assert server.versions()["target"] == -1 and loader(fake).open == 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"no_loader": True}, "without calling the loader"),
        ({"refuse": ("/update_weights_from_tensor",)}, "400.*the fake refuses"),
    ],
)
def test_a_doorbell_that_nobody_hears_is_told_at_once(fake: FakeSGLang, fault: dict[str, Any], says: str) -> None:
    server = joined(fake, push_timeout_s=30.0)
    for name, value in fault.items():
        setattr(fake.faults, name, value)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=says):
        server.begin_update(1, ["target"])
    assert time.monotonic() - start < 5
    with pytest.raises(RuntimeError, match="no session"):
        server.end_update()
    fake.faults.no_loader, fake.faults.refuse = False, ()
    serve(server, 2)


def test_a_cache_that_cannot_be_flushed_is_an_error(fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_spec.rollout import sglang_weights

    server = joined(fake)
    fake.faults.flush_busy = 2
    serve(server, 1)
    assert server.versions()["target"] == 1, "it is tried again"
    monkeypatch.setattr(sglang_weights, "FLUSH_S", 0.2)
    fake.faults.flush_busy = 1000
    with pytest.raises(RunError, match="Pending requests"):
        serve(server, 2)
    assert server.versions()["target"] == -1


def test_sessions_and_requests_keep_out_of_each_others_way(fake: FakeSGLang) -> None:
    server = joined(fake)
    server.begin_update(1, ["target"])
    with pytest.raises(RuntimeError, match="a session is open"):
        server.begin_update(1, ["target"])
    (error,) = ask(server, request())
    assert isinstance(error, RuntimeError) and "takes weights" in str(error)
    server.end_update()
    fake.faults.late_tokens_s = 0.003

    def push(http: aiohttp.ClientSession) -> None:
        with pytest.raises(RuntimeError, match="while 2 requests run"):
            server.begin_update(2, ["target"])

    assert [d.finish for d in during(server, push, fake)] == ["length", "length"]
    serve(server, 2)


def test_an_old_server_gets_its_target_first(fake: FakeSGLang) -> None:
    server = joined(fake)
    if fake.version == "0.5.17":
        with pytest.raises(ValueError, match="target before its draft"):
            server.begin_update(1, ["draft"])
        serve(server)
    server.begin_update(1, ["draft"])
    server.end_update()


def test_a_role_that_is_not_served_is_refused(fake: FakeSGLang) -> None:
    fake.depth = 0
    with pytest.raises(ValueError, match="serves no draft"):
        joined(fake).begin_update(1, ["draft"])


def test_who_leaves_does_not_generate_until_a_push(fake: FakeSGLang, caplog: pytest.LogCaptureFixture) -> None:
    server = joined(fake)
    serve(server, 3)
    with caplog.at_level(logging.WARNING):
        server.leave("its digest differs")
    assert "its digest differs" in caplog.text and server.versions() == {"target": -1, "draft": -1}
    assert isinstance(ask(server, request())[0], RuntimeError)
    serve(server, 3)
    assert isinstance(ask(server, request())[0], Completion)
