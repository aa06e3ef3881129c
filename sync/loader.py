"""Takes weights into a served model: the function that SGLang calls, in every process that holds a part of the model.

SGLang runs `load(model, named_tensors)` for an update whose `load_format` names it. The update is a doorbell: its one
tensor, uint8, is a JSON object

    {"address": [host, port], "token": hex, "session": int, "role": "target" | "draft"}

and the loader connects back to the trainer there, then obeys commands until "end". Each is answered by
`{"ok": true, ...}` or `{"fault": sentence}`:

    {"do": "learn", "tensors": [[name, dtype, shape], ...]}   -> "served": {name: [dtype, shape]}, "faults": [sentence]
    {"do": "open", "via": {...}}                              a transport, see receivers.py
    {"do": "load", "table": [...], "bytes": n, "via": {...}}  one bucket; the answer comes when it may be overwritten
    {"do": "digest"}                                          -> "digests": {name: digest} of what is served; what the
                                                              model derives from that is derived anew before
    {"do": "end"}

Invariant: nothing is raised into SGLang, where it would end the server, and no dead or silent trainer holds a server up
for longer than the time it named in its greeting. A fault goes to the trainer, or to the log if there is none.

Up to 0.5.17 SGLang rings for a draft's update in the draft's model and then in the target's. So the model of a session
of the target is remembered, and rung at for the draft it does nothing; the first session has to be the target's.

From the first update on a process answers the signal `STACKS` with its threads' stacks on standard error, which is
what a hung server leaves behind.

Both models are remembered, so that one ring is enough for a push of both roles: a command may name the `role` that it
and those after it are for.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import signal
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from miles_spec.sync.placement import Placement
from miles_spec.sync.receivers import Receiver, open_receiver
from miles_spec.sync.wire import Channel, connect
from miles_spec.types import TensorMeta

log = logging.getLogger(__name__)

STACKS = signal.SIGUSR2
"""SGLang itself uses SIGQUIT and SIGTERM."""

_placements: weakref.WeakKeyDictionary[nn.Module, Placement] = weakref.WeakKeyDictionary()
"""What was learned, by the model; outlives sessions."""

_models: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
"""The model that was last rung at for each role, while it lives."""


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Answers the doorbell in `named_tensors` with a whole session, and returns when that has ended."""
    show_stacks()
    try:
        bell = json.loads(bytes(named_tensors[0][1].cpu().tolist()))
        if bell["role"] == "draft" and model is _models.get("target"):
            return
        _models[bell["role"]] = model
        _answer(bell)
    except Exception:
        log.exception("miles-spec: an update of weights failed")


def show_stacks() -> None:
    """Has this process answer `STACKS` from now on."""
    faulthandler.register(STACKS, file=2, all_threads=True)


def _answer(bell: Mapping[str, Any]) -> None:
    rank = _rank()
    session = _Session(bell["role"], rank)
    host, port = bell["address"]
    channel, idle_s = connect((host, port), token=bell["token"], session=bell["session"], rank=rank)
    try:
        session.obey(channel, idle_s)
    except (ConnectionError, TimeoutError) as error:
        log.error("miles-spec: session %s of the %s ended early: %s", bell["session"], bell["role"], error)
    finally:
        channel.close()
        session.close()


def _rank() -> int:
    """This process's tensor-parallel rank."""
    if "sglang" not in sys.modules:
        return 0
    from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()


class _Session:
    """An update of one role after the other, on one rank."""

    def __init__(self, role: str, rank: int) -> None:
        self._rank = rank
        self._receiver: Receiver | None = None
        self._turn(role)

    def _turn(self, role: str) -> None:
        """To that role's model. Raises `ValueError` for one that was never rung at, and stays."""
        model = _models.get(role)
        if model is None:
            raise ValueError(f"the {role}'s model is not known; ring for it first")
        device = next(model.parameters()).device
        # parameters that were made in inference mode can be written only within it
        inference = any(parameter.is_inference() for parameter in model.parameters())
        self._model, self._role, self._device, self._inference = model, role, device, inference

    def obey(self, channel: Channel, idle_s: float) -> None:
        """Until the end. Raises `ConnectionError` or `TimeoutError` if it does not come."""
        ended = False
        while not ended:
            command = channel.receive(idle_s)
            ended = command.get("do") == "end"
            try:
                if (role := command.get("role", self._role)) != self._role:
                    self._turn(role)
                with torch.inference_mode() if self._inference else torch.no_grad():
                    answer = {"ok": True, **self._do(command)}
            except Exception as error:
                log.warning("miles-spec: the %s's %s failed", self._role, command.get("do"), exc_info=True)
                answer = {"fault": _sentence(error)}
            channel.send(answer, idle_s)

    def close(self) -> None:
        """Lets go of the trainer's memory."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()

    def _do(self, command: Mapping[str, Any]) -> Mapping[str, Any]:
        match command.get("do"):
            case "learn":
                return self._learn(command["tensors"])
            case "open":
                before, self._receiver = self._receiver, None
                self._receiver = open_receiver(command["via"], rank=self._rank, device=self._device, before=before)
                return {}
            case "load":
                if self._receiver is None:
                    raise ValueError("a bucket came before a transport was opened")
                # first the bucket, then what may be wrong with it: other ranks wait in a collective until all take part
                with self._receiver.bucket(command) as named:
                    if named:
                        self._placement().load(named)
                return {}
            case "digest":
                return {"digests": self._placement().digests()}
            case "end":
                self.close()
                return {}
            case other:
                raise ValueError(f"no command is called {other!r}; trainer and engine need the same miles-spec")

    def _learn(self, tensors: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
        owner = None
        if self._role == "draft":
            owner = _models.get("target")
            if owner is None:
                raise ValueError("the draft's places cannot be learned before a session of the target")
        _placements.pop(self._model, None)
        metas = {name: TensorMeta(shape=tuple(shape), dtype=dtype) for name, dtype, shape in tensors}
        placement = Placement.learn(self._model, metas, owner)
        if not placement.faults:
            _placements[self._model] = placement
        served = {name: [meta.dtype, list(meta.shape)] for name, meta in placement.served().items()}
        return {"served": served, "faults": list(placement.faults)}

    def _placement(self) -> Placement:
        placement = _placements.get(self._model)
        if placement is None:
            raise ValueError(f"the places of the {self._role}'s tensors are not known; learn them first")
        return placement


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
