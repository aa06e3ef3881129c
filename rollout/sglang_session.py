"""A push to one server: rings the loaders in its processes and passes commands to all of them.

SGLang is asked to update its weights from one tensor, which holds no weights but says where to connect to; the loader
(`miles_spec.sync.loader`) that SGLang hands it to obeys commands until "end". The call therefore lasts as long as the
push, in a thread. Ringing and flushing take longer than a draft's weights, so both roles go by one ring.

Invariant: when `close` has returned, no loader of the push runs and the server may be asked for other things.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from miles_spec.rollout.sglang_api import Api, Features, refuse
from miles_spec.rollout.sglang_args import LOADER
from miles_spec.sync.wire import Connection, Mailbox
from miles_spec.types import Role, RunError, TensorMeta

BELL = "miles_spec"
"""Name of the one tensor."""
LONGEST_S = 24 * 3600.0
"""Of a session; the parts of it have timeouts of their own."""


class _Bytes:
    """Is written as the call `torch.ByteTensor([...])`, which SGLang's unpickler allows; holds no memory to share."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __reduce__(self) -> tuple[Any, tuple[list[int]]]:
        return torch.ByteTensor, (list(self._data),)


def bell(content: Mapping[str, Any]) -> str:
    """What one rank is sent in `serialized_named_tensors`."""
    return base64.b64encode(pickle.dumps([(BELL, _Bytes(json.dumps(content).encode()))])).decode()


class PushSession:
    """An open push, of one role at a time. Its methods are for one thread at a time."""

    def __init__(self, api: Api, features: Features, mailbox: Mailbox, roles: Sequence[Role], timeout_s: float) -> None:
        """Rings for the first of `roles`, which the others may follow, and waits for a connection from each rank.

        Raises `RunError` where the server refuses, `ConnectionError` or `TimeoutError` where a loader does not come;
        then nothing stays open."""
        self.role = role = roles[0]
        """What commands are for; may be set between two."""
        self._api = api
        self._selector = features.selector
        self._timeout_s = timeout_s
        self._connections: list[Connection] = []
        self._answer: tuple[int, str] | Exception | None = None
        if self._selector:
            self._begin(role if len(roles) == 1 else "all")
        number = mailbox.new_session()
        content = {"address": list(mailbox.address), "token": mailbox.token, "session": number, "role": role}
        body = {
            "serialized_named_tensors": [bell(content)] * features.ranks,
            "load_format": LOADER,
            "flush_cache": False,  # SGLang asserts that it succeeds, and dies if not
            **({"selector": role} if self._selector else {"disable_draft_model": role == "target"}),
        }
        self._thread = threading.Thread(target=self._ring, args=(body,), name="doorbell", daemon=True)
        self._thread.start()
        try:
            self._connections = mailbox.expect(number, features.ranks, timeout_s, self._stopped)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error says more
                self.close()
            raise

    def ask(self, command: Mapping[str, Any], timeout_s: float | None = None) -> list[Mapping[str, Any]]:
        """Has all ranks obey at the same time (a collective needs that); their answers by rank.

        Raises `ConnectionError` if one is gone and `TimeoutError` if one is late.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        command = {**command, "role": self.role}
        if len(self._connections) == 1:
            return [self._connections[0].ask(command, timeout_s)]
        with ThreadPoolExecutor(len(self._connections)) as pool:
            return list(pool.map(lambda connection: connection.ask(command, timeout_s), self._connections))

    def learn(self, metas: Mapping[str, TensorMeta], timeout_s: float) -> dict[str, TensorMeta]:
        """Has all ranks find the places of tensors; in which shape and dtype each has to be pushed.

        Raises `RunError` with all faults, and as `ask` does.
        """
        tensors = [[name, meta.dtype, list(meta.shape)] for name, meta in metas.items()]
        answers = self.ask({"do": "learn", "tensors": tensors}, timeout_s)
        if faults := [fault for answer in answers for fault in (_faults(answer) or answer["faults"])]:
            raise RunError("; ".join(dict.fromkeys(faults)))
        served = answers[0]["served"]
        return {name: TensorMeta(shape=tuple(shape), dtype=dtype) for name, (dtype, shape) in served.items()}

    def digests(self) -> dict[str, str]:
        """The digest of each tensor that is served; one on which the ranks do not agree gets a text that no digest
        equals. Raises `RunError` with the faults of ranks, and as `ask` does."""
        answers = self.ask({"do": "digest"})
        if faults := [fault for answer in answers for fault in _faults(answer)]:
            raise RunError("; ".join(dict.fromkeys(faults)))
        return _agreed([answer["digests"] for answer in answers])

    def end(self) -> bool:
        """Has the loaders return, whether or not they are in order; whether all of them said that they do."""
        said = True
        for connection in self._connections:
            try:
                connection.ask({"do": "end"}, 10.0)
            except (ConnectionError, TimeoutError):
                said = False
            connection.close()
        self._connections = []
        return said

    def close(self) -> None:
        """Ends the push on the server, also after an error. Raises `RunError`, `ConnectionError` or `TimeoutError` if
        the server did not take part until the end."""
        self.end()
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._api.url} did not end the weight update within {self._timeout_s:g} s")
        try:
            self._check_answer()
        finally:
            if self._selector:
                self._call("/end_weight_update", {})

    def _begin(self, selector: str) -> None:
        """Opens SGLang's own session; one that was broken off and is still open there is ended first."""
        path, content = "/begin_weight_update", {"selector": selector}
        status, text = self._api.call(path, content, admin=True, timeout_s=self._timeout_s)
        if status == 400 and "already open" in text:
            self._call("/end_weight_update", {})
            status, text = self._api.call(path, content, admin=True, timeout_s=self._timeout_s)
        _check(status, text, self._api.url + path)

    def _ring(self, body: Mapping[str, Any]) -> None:
        try:
            self._answer = self._api.call("/update_weights_from_tensor", body, admin=True, timeout_s=LONGEST_S)
        except Exception as error:  # raised where the answer is looked at
            self._answer = error

    def _stopped(self) -> str:
        """Why no loader will come any more."""
        if self._answer is None:
            return ""
        try:
            self._check_answer()
        except Exception as error:  # in whatever way the call failed
            return str(error)
        return "the server answered without calling the loader"

    def _check_answer(self) -> None:
        assert self._answer is not None
        if isinstance(self._answer, Exception):
            raise self._answer
        status, text = self._answer
        _check(status, text, f"{self._api.url}/update_weights_from_tensor")

    def _call(self, path: str, body: Mapping[str, Any]) -> None:
        status, text = self._api.call(path, body, admin=True, timeout_s=self._timeout_s)
        _check(status, text, self._api.url + path)


def _faults(answer: Mapping[str, Any]) -> list[str]:
    """What kept a rank from obeying."""
    return [answer["fault"]] if "fault" in answer else []


def _agreed(by_rank: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """One digest for each tensor; where the ranks differ, what each of them says."""
    names = dict.fromkeys(name for digests in by_rank for name in digests)
    merged = {}
    for name in names:
        said = [digests.get(name, "nothing") for digests in by_rank]
        same = len(set(said)) == 1
        merged[name] = said[0] if same else ", ".join(f"rank {i}: {digest}" for i, digest in enumerate(said))
    return merged


def _check(status: int, text: str, what: str) -> None:
    refuse(status, text, what)
    try:
        success = json.loads(text).get("success")
    except (ValueError, AttributeError):
        success = None
    if success is not True:
        raise RunError(f"{what} did not succeed: {text[:500].strip()}")
