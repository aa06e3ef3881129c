"""The function SGLang calls, against a real mailbox: whole sessions, and every fault comes back as a sentence."""

from __future__ import annotations

import gc
import json
import logging
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miles_spec.sync import loader
from miles_spec.sync.digest import digests
from miles_spec.sync.wire import Connection, Mailbox, connect

WAIT_S = 20


class Served(nn.Module):
    """A fused pair of matrices and a head; `fail` raises for a name, `drop` ignores it. With `derive` it does more than
    copy, so that it has to be asked for every push."""

    def __init__(self, *, derive: bool = False) -> None:
        super().__init__()
        self.derive = derive
        self.fused = nn.Parameter(torch.zeros(6, 3))
        self.head = nn.Parameter(torch.zeros(5, 3))
        self.fail = self.drop = ""

    def load_weights(self, named: list[tuple[str, Tensor]]) -> None:
        for name, tensor in named:
            if name == self.fail:
                raise RuntimeError("no luck")
            if name == self.drop:
                continue
            if self.derive:
                tensor.sum()
            if name == "head.weight":
                self.head.data.copy_(tensor)
            elif name in ("a", "b"):
                self.fused.data.narrow(0, 3 * "ab".index(name), 3).copy_(tensor)


TENSORS = [["a", "float32", [3, 3]], ["b", "float32", [3, 3]], ["head.weight", "float32", [5, 3]]]
OWN = TENSORS[:2]
"""Without the head, which a draft shares."""


class Trainer:
    """A mailbox, a bucket in a file, and engines that run in threads."""

    def __init__(self, folder: Path) -> None:
        self.mailbox = Mailbox(idle_s=WAIT_S)
        self.path = folder / "bucket"
        self.via = {"kind": "ipc", "buffers": [{"path": str(self.path), "bytes": 4096}]}
        self.threads: list[threading.Thread] = []
        self.raised: list[BaseException] = []

    def ring(
        self, *models: nn.Module, role: str = "target", mode: AbstractContextManager[Any] | None = None, **change: Any
    ) -> int:
        """Rings, at each model in turn, in the thread of an engine; the session's number."""
        session = self.mailbox.new_session()
        bell = {"address": self.mailbox.address, "token": self.mailbox.token, "session": session, "role": role} | change
        data = torch.tensor(list(json.dumps(bell).encode()), dtype=torch.uint8)

        def engine() -> None:
            try:
                with mode or nullcontext():
                    for model in models:
                        loader.load(model, [("miles_spec", data)])
            except BaseException as error:
                self.raised.append(error)

        self.threads.append(threading.Thread(target=engine, daemon=True))
        self.threads[-1].start()
        return session

    def open(self, *models: nn.Module, **arguments: Any) -> Connection:
        return self.mailbox.expect(self.ring(*models, **arguments), 1, WAIT_S)[0]

    def write(self, named: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fills the bucket; the command that loads it."""
        data, table = bytearray(4096), []
        for i, (name, tensor) in enumerate(named.items()):
            data[256 * i : 256 * i + tensor.nbytes] = tensor.contiguous().numpy().tobytes()
            table.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), 256 * i])
        self.path.write_bytes(data)
        return {"do": "load", "table": table, "bytes": 4096, "via": {"slot": 0}}

    def push(self, connection: Connection, named: Mapping[str, Tensor], **more: str) -> dict[str, str]:
        load = self.write(named)
        for command in ({"do": "open", "via": self.via} | more, load):
            assert connection.ask(command, WAIT_S) == {"ok": True}
        return connection.ask({"do": "digest"}, WAIT_S)["digests"]

    def end(self, connection: Connection) -> None:
        assert connection.ask({"do": "end"}, WAIT_S) == {"ok": True}
        self.join()

    def join(self) -> None:
        """The engines have gone on, and nothing was raised into them."""
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert self.raised == []


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    loader._models.clear()
    trainer = Trainer(tmp_path)
    yield trainer
    trainer.mailbox.close()
    trainer.join()


def weights(seed: int, names: list[list[Any]] = TENSORS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, _, shape in names}


def learn(connection: Connection, tensors: list[list[Any]] = TENSORS) -> dict[str, Any]:
    answer = connection.ask({"do": "learn", "tensors": tensors}, WAIT_S)
    assert answer == {"ok": True, "served": {name: meta for name, *meta in tensors}, "faults": []}
    return answer


def test_whole_sessions(trainer: Trainer) -> None:
    model = Served()
    for version in (0, 1):
        connection = trainer.open(model)
        if not version:
            learn(connection)
        sent = weights(version)
        assert trainer.push(connection, sent) == digests(sent.items())
        trainer.end(connection)
    assert torch.equal(model.fused[3:], sent["b"])


def test_a_tensor_dropped_in_the_second_session_shows_in_its_digest(trainer: Trainer) -> None:
    model = Served(derive=True)
    connection = trainer.open(model)
    learn(connection)
    trainer.push(connection, weights(1))
    trainer.end(connection)
    model.drop = "b"
    connection = trainer.open(model)
    served, sent = trainer.push(connection, weights(2)), digests(weights(2).items())
    assert [name for name in sent if served[name] != sent[name]] == ["b"]
    trainer.end(connection)


@pytest.mark.parametrize("called", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("made", [torch.inference_mode, torch.enable_grad])
def test_whatever_mode_the_engine_is_in(trainer: Trainer, made: Any, called: Any) -> None:
    with made():
        model = Served()
    for _ in range(2):
        connection = trainer.open(model, mode=called())
        learn(connection)
        assert trainer.push(connection, weights(1)) == digests(weights(1).items())
        trainer.end(connection)
    assert model.fused.is_leaf and model.fused.grad_fn is None


def test_a_draft_of_an_engine_that_rings_twice(trainer: Trainer) -> None:
    """As SGLang 0.5.17 does for the draft: in the draft's model, then, with the same bell, in the target's."""
    target, draft = Served(), Served()
    draft.head = target.head
    connection = trainer.open(target)
    learn(connection)
    trainer.push(connection, weights(1))
    trainer.end(connection)
    refused = trainer.mailbox.refused
    connection = trainer.open(draft, target, role="draft")
    learn(connection, OWN)
    sent = weights(2, OWN)
    assert trainer.push(connection, sent) == digests(sent.items())
    trainer.end(connection)
    assert trainer.mailbox.refused == refused  # the target's model has not even connected
    assert torch.equal(target.fused[:3], weights(1)["a"]) and torch.equal(target.head, weights(1)["head.weight"])
    connection = trainer.open(target)
    assert connection.ask({"do": "digest"}, WAIT_S)["digests"] == digests(weights(1).items())
    trainer.end(connection)


def test_both_roles_by_one_ring(trainer: Trainer) -> None:
    """Also where the modes of the two models differ."""
    with torch.inference_mode():
        target = Served()
    draft = Served()
    draft.head = target.head
    for model, role, tensors in ((target, "target", TENSORS), (draft, "draft", OWN)):
        connection = trainer.open(model, role=role)
        learn(connection, tensors)
        trainer.end(connection)
    for turn in range(2):
        sent = {"target": weights(turn), "draft": weights(2 + turn, OWN)}
        connection = trainer.open(target)
        for role, named in sent.items():
            assert trainer.push(connection, named, role=role) == digests(named.items())
        served = connection.ask({"do": "digest", "role": "target"}, WAIT_S)["digests"]
        assert served == digests(sent["target"].items())
        assert torch.equal(draft.fused[:3], sent["draft"]["a"])
        trainer.end(connection)


def test_a_role_that_was_never_rung_for(trainer: Trainer) -> None:
    target = Served()
    connection = trainer.open(target)
    learn(connection)
    for _ in range(2):
        fault = connection.ask({"do": "digest", "role": "draft"}, WAIT_S)["fault"]
        assert fault == "the draft's model is not known; ring for it first"
    assert trainer.push(connection, weights(1)) == digests(weights(1).items())  # still the target's
    trainer.end(connection)


def test_a_draft_before_its_target_and_one_that_would_overwrite_it(trainer: Trainer) -> None:
    target, draft = Served(), Served()
    draft.head = target.head
    connection = trainer.open(draft, role="draft")
    fault = connection.ask({"do": "learn", "tensors": OWN}, WAIT_S)["fault"]
    assert fault == "the draft's places cannot be learned before a session of the target"
    trainer.end(connection)
    trainer.end(trainer.open(target))
    connection = trainer.open(draft, role="draft")
    [fault] = connection.ask({"do": "learn", "tensors": TENSORS}, WAIT_S)["faults"]
    assert "'head.weight' would overwrite" in fault
    trainer.end(connection)
    assert not target.head.any()


def test_no_model_is_kept_alive(trainer: Trainer) -> None:
    model = Served()
    connection = trainer.open(model)
    learn(connection)
    trainer.end(connection)
    trainer.threads.clear()
    before = len(loader._placements)
    del model
    gc.collect()
    assert len(loader._placements) == before - 1 and "target" not in loader._models


def test_every_fault_is_a_sentence_and_the_session_goes_on(trainer: Trainer) -> None:
    model = Served(derive=True)
    connection = trainer.open(model)

    def fault(**command: Any) -> str:
        answer = connection.ask(command, WAIT_S)
        assert set(answer) == {"fault"}
        return answer["fault"]

    load = trainer.write(weights(1))
    assert fault(**load) == "a bucket came before a transport was opened"
    assert "'pigeon'" in fault(do="open", via={"kind": "pigeon"})
    assert "FileNotFoundError" in fault(do="open", via={"kind": "ipc", "buffers": [{"path": "/none", "bytes": 1}]})
    assert connection.ask({"do": "open", "via": trainer.via}, WAIT_S) == {"ok": True}
    assert fault(**load) == "the places of the target's tensors are not known; learn them first"
    assert fault(do="digest") == "the places of the target's tensors are not known; learn them first"
    assert connection.ask(trainer.write({}), WAIT_S) == {"ok": True}  # only takes part
    assert "no command is called 'dance'" in fault(do="dance")
    assert "no command is called None" in fault()
    assert "KeyError" in fault(do="learn")
    assert fault(do="learn", tensors=[["a"]])
    answer = connection.ask({"do": "learn", "tensors": [["a", "float5", [3]], ["c", "float32", [3]]]}, WAIT_S)
    assert [text[:7] for text in answer["faults"]] == ["'float5", "the eng", "served ", "served "]
    assert fault(do="digest") == "the places of the target's tensors are not known; learn them first"
    learn(connection)
    assert "IndexError" in fault(**load | {"via": {"slot": 3}})
    assert "bytes 4095" in fault(**load | {"table": [["a", "float32", [3, 3], 4095]]})
    assert "'c' was not learned" in fault(**load | {"table": [["c", "float32", [3], 0]]})
    assert "serves it as float32[3, 3]" in fault(**load | {"table": [["a", "float32", [9], 0]]})
    model.fail = "a"
    assert fault(**load) == "RuntimeError: no luck"
    model.fail = ""
    assert trainer.push(connection, weights(1)) == digests(weights(1).items())
    model.fused.data = model.fused.data.clone()
    assert "has moved parameter 'fused'" in fault(do="digest")
    trainer.end(connection)


def test_a_fault_while_learning_names_the_tensor(trainer: Trainer) -> None:
    model = Served()
    model.fail = "b"
    connection = trainer.open(model)
    faults = connection.ask({"do": "learn", "tensors": TENSORS}, WAIT_S)["faults"]
    assert faults[0] == "the engine's loader fails on tensor 'b': RuntimeError: no luck"
    trainer.end(connection)


def test_a_wrong_token(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer.ring(Served(), token="5ecret" * 8)
    trainer.join()
    assert "refused the hello of rank 0" in caplog.text
    assert "5ecret" not in caplog.text and trainer.mailbox.token not in caplog.text


def test_nobody_at_the_address(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer.mailbox.close()
    trainer.ring(Served())
    trainer.join()
    assert "took no connection" in caplog.text and trainer.mailbox.token not in caplog.text


@pytest.mark.parametrize("when", ["at once", "after a load"])
def test_a_dead_trainer_lets_the_engine_go_on(
    trainer: Trainer, when: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(
        "miles_spec.sync.receivers.IpcReceiver.close", lambda receiver: closed.append(receiver), raising=True
    )
    model = Served()
    connection = trainer.open(model)
    if when == "after a load":
        learn(connection)
        trainer.push(connection, weights(1))
    started = time.monotonic()
    connection.close()
    trainer.join()
    assert time.monotonic() - started < WAIT_S / 2
    assert "of the target ended early" in caplog.text
    assert len(closed) == (when == "after a load")


def test_a_silent_trainer_lets_the_engine_go_on(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer.mailbox._idle_s = 0.3
    connection = trainer.open(Served())
    trainer.join()
    assert "ended early: nothing came within 0.3 s" in caplog.text
    with pytest.raises(ConnectionError):
        connection.ask({"do": "digest"}, WAIT_S)


class Broken(Served):
    """Fails in its own way."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        raise RuntimeError("no parameters today")


@pytest.mark.parametrize(
    "named",
    [
        [],
        [("miles_spec", torch.zeros(0, dtype=torch.uint8))],
        [("miles_spec", torch.tensor([255, 3], dtype=torch.uint8))],
        [("w", torch.randn(3))],
        [("miles_spec", torch.tensor(list(b"[]"), dtype=torch.uint8))],
        [("miles_spec", torch.tensor(list(b'{"role": "target"}'), dtype=torch.uint8))],
        [("miles_spec", torch.tensor(list(b'{"role": "draft", "address": 5}'), dtype=torch.uint8))],
    ],
)
def test_what_is_no_doorbell_goes_to_the_log(named: Any, caplog: pytest.LogCaptureFixture) -> None:
    loader.load(Served(), named)
    assert "an update of weights failed" in caplog.text


def test_a_broken_model_goes_to_the_log(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    for model in (Broken(), nn.Module()):
        caplog.clear()
        trainer.ring(model)
        trainer.join()
        assert "an update of weights failed" in caplog.text


def test_the_rank_is_asked_of_sglang(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = types.ModuleType("sglang.srt.distributed.parallel_state")
    distributed.get_tensor_model_parallel_rank = lambda: 1  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.distributed"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, distributed.__name__, distributed)
    session = trainer.ring(Served())
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2"):
        trainer.mailbox.expect(session, 2, 1.0)
    trainer.join()
    session = trainer.ring(Served())
    channel, _ = connect(trainer.mailbox.address, token=trainer.mailbox.token, session=session, rank=0)
    _, second = trainer.mailbox.expect(session, 2, WAIT_S)
    channel.close()
    trainer.end(second)


def test_it_needs_no_sglang() -> None:
    assert "sglang" not in sys.modules
    assert loader._rank() == 0


def test_the_log_says_which_command_failed(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    connection = trainer.open(Served())
    connection.ask({"do": "digest"}, WAIT_S)
    trainer.end(connection)
    assert "the target's digest failed" in caplog.text
