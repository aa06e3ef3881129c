"""`miles-spec rollout serve`: the servers of a run without its training, as a service for others.

Invariant: an address is told only when what answers there serves the run's weights, verified. A server that died comes
back at another address, so nobody reaches it before its weights have been pushed.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from miles_spec import checkpoint, models
from miles_spec.assemble import assemble, in_one_process
from miles_spec.config import RunConfig
from miles_spec.data import PromptSource
from miles_spec.draft.export import export, served_target, served_tensors
from miles_spec.draft.modules import DraftHead
from miles_spec.live import LiveTable
from miles_spec.requests import context_tokens
from miles_spec.rollout import router
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.launch import ADMIN_KEY, API_KEY
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import with_underscores
from miles_spec.serving import Serving, Weights, drafting
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import Receipt, RunError

log = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.85
"""Of a GPU that nothing trains on, for weights and cache, unless `[sglang]` sets `mem_fraction_static`."""
LOOK_S = 1.0
"""Between looks at the servers."""

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is served: a policy and its draft, in the dtype they are served in."""

    loaded: models.Loaded
    draft: DraftHead | None
    version: int
    draft_version: int | None

    def weights(self) -> Weights:
        """What the servers are sent."""
        target = dict(served_target(self.loaded.model))
        head = models.head_weight(self.loaded.model)
        draft = None if self.draft is None else dict(served_tensors(self.draft, head))
        return Weights(version=self.version, target=target, draft_version=self.draft_version, draft=draft)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What a run has come to so far."""

    policy: Policy
    frozen: DraftHead | None
    """The draft of step 1, where and as that of the policy is."""
    source: PromptSource
    """Its next prompts are those of the run's next step."""


class Hosted(Serving):
    """Servers that nothing here trains for: they start once, with their draft, and all have the same keys."""

    def __init__(self, config: RunConfig, policy: Policy, folder: Path, max_context: int, keys: Keys) -> None:
        """See `Serving`. Starts nothing yet."""
        super().__init__(config, policy.loaded, folder, max_context, policy.weights, keys)
        if policy.draft is not None:
            export(policy.draft, folder / "draft", dtype=self._dtype, tokenizer=policy.loaded.tokenizer)
            for server in self._servers:
                server.settings = drafting(server.settings, policy.draft, folder / "draft")
                server.draft_depth = config.draft.num_steps
            self.fleet.draft_depth = config.draft.num_steps

    def start(self) -> None:
        """Starts all servers, which then have to be pushed to. Raises as `Serving.start` does."""
        super().start()
        if (draft := self.weights().draft) is not None:
            self._learn("draft", draft)

    def push(self, servers: Sequence[SGLangServer], *, self_test: bool = False) -> list[Receipt]:
        """Sends both roles. Raises `RunError` if no server then serves the target, verified."""
        return self.weights().push(self.syncer, servers, self_test=self_test)

    def look(self) -> None:
        """Has servers that hang started again, see `Fleet.look`."""
        self.fleet.look()

    def members(self) -> list[SGLangServer]:
        """Servers that run; those that died are started again."""
        return [server for server in self.fleet.members() if isinstance(server, SGLangServer)]


def serve(config: RunConfig, say: Callable[[str], None] = print) -> None:
    """Serves what `config` describes until Ctrl-C or SIGTERM, then ends all that it started.

    Raises `ValueError` for a run file that is not of servers, `RunError` if they do not come up, or if none comes back.
    """
    if config.rollout.engine != "sglang":
        raise ValueError(f'rollout serve starts SGLang servers, and rollout.engine is "{config.rollout.engine}"')
    if config.rollout.urls:
        raise ValueError("rollout serve starts servers, and rollout.urls joins some that run; take rollout.urls out")
    with _until_told() as told, ExitStack() as stack:
        policy = load(config).policy
        folder, keys = Path(config.out) / "serve", Keys.random()
        hosted = Hosted(alone(config), policy, folder, context_tokens(config), keys)
        stack.callback(hosted.stop)
        stack.callback((folder / "keys.json").unlink, missing_ok=True)
        write_keys(keys, folder / "keys.json")
        hosted.start()
        hosted.push(hosted.members(), self_test=True)
        front: router.Router | None = None
        if config.fleet.engines > 1 and router.available():
            front = router.Router(keys, folder, config.fleet.host)
            stack.callback(front.stop)
        elif config.fleet.engines > 1:
            say("The package sglang-router is not installed: each server is called at its own address.")
        watch(hosted, front, config.fleet.start_timeout_s, told, lambda servers: say(described(servers, front, folder)))


def load(config: RunConfig, *, stays: bool = False) -> Reached:
    """The policy and drafts of the run's newest checkpoint; without one those of `[model]`, the draft warmed up.

    It is the training's own way to them, in this process alone; what only training needs is given back. They come to
    the host's memory, or stay on the trainer's device if so told, from where they are pushed faster.
    """
    rollout = replace(config.rollout, engine="embedded")
    if checkpoint.steps(Path(config.out)):
        rollout = replace(rollout, max_running=1)  # what it then samples is not used
    config = replace(config, rollout=rollout, train=replace(config.train, kl_coef=0.0))
    with LiveTable(steps=config.steps) as live:
        run = assemble(in_one_process(config), live)
    assert isinstance(run.engine, EmbeddedEngine)
    trainer = run.trainer
    assert isinstance(trainer, TorchTrainer)
    kept = partial(_kept, device=trainer.device if stays else torch.device("cpu"), dtype=trainer.dtype)
    loaded = models.Loaded(
        model=kept(trainer.model),
        tokenizer=run.tokenizer,
        dtype=trainer.dtype,
        device=trainer.device,
        eos_ids=tuple(sorted(run.engine.eos_ids)),
    )
    draft, source = trainer.draft, run.source
    policy = Policy(
        loaded=loaded,
        draft=None if draft is None else kept(draft.draft),
        version=trainer.version,
        draft_version=None if draft is None else trainer.draft_version,
    )
    frozen = None if draft is None or draft.frozen is None else kept(draft.frozen)
    del run, trainer, draft
    gc.collect()
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    return Reached(policy=policy, frozen=frozen, source=source)


def _kept(module: M, *, device: torch.device, dtype: torch.dtype) -> M:
    return module.to(device=device, dtype=dtype).requires_grad_(False)


def alone(config: RunConfig) -> RunConfig:
    """`config` for servers that share their GPUs with no training, and tell their metrics."""
    sglang = {"enable_metrics": True, **with_underscores(config.sglang)}
    if torch.cuda.is_available():
        sglang.setdefault("mem_fraction_static", SHARE_OF_MEMORY)
    return replace(config, sglang=sglang, fleet=replace(config.fleet, release="nothing"))


def write_keys(keys: Keys, path: Path) -> None:
    """Writes a JSON object that only the user can read: each key under the environment variable it is taken from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({API_KEY: keys.api, ADMIN_KEY: keys.admin}, file, indent=1)


def watch(
    hosted: Hosted,
    front: router.Router | None,
    start_timeout_s: float,
    told: threading.Event,
    announce: Callable[[Sequence[SGLangServer]], None],
) -> None:
    """Until `told`: brings servers back that died or hang, pushes to them, and announces all that serve when that
    changes.

    Raises `RunError` if none has served for twice `start_timeout_s`.
    """
    announced: set[str] = set()
    served_s = time.monotonic()
    while not told.is_set():
        hosted.look()
        for server in hosted.members():
            if server.versions()["target"] < 0:
                try:
                    hosted.push([server])
                except (OSError, RunError, ValueError) as error:  # it may have died again; the next look tells
                    log.warning("server %r did not get its weights: %s", server.name, error)
        serving = [server for server in hosted.members() if server.versions()["target"] >= 0]
        if serving:
            served_s = time.monotonic()
            if front is not None:
                front.lead_to([server.url for server in serving])
        elif time.monotonic() - served_s > 2 * start_timeout_s:
            raise RunError(f"no server has served for {2 * start_timeout_s:g} s; see the logs of the servers")
        urls = {server.url for server in serving}
        if urls - announced:
            announce(serving)
        announced = urls
        told.wait(LOOK_S)


def described(servers: Sequence[SGLangServer], front: router.Router | None, folder: Path) -> str:
    """What can be called, where, and with which keys; no key itself."""
    lines = []
    for server in servers:
        assert server.features is not None
        serves = ", ".join(f"{role} version {version}" for role, version in server.versions().items())
        lines.append(
            f"{server.url}  SGLang {server.features.version}, drafts {server.draft_depth} tokens, {serves}, verified"
        )
    if front is not None:
        lines.append(f"{front.url}  router in front of {'it' if len(servers) == 1 else 'these'}")
    urls = json.dumps([server.url for server in servers])
    return "\n".join(
        [
            *lines,
            f"Keys: {folder / 'keys.json'}; send {API_KEY} as `Authorization: Bearer KEY`.",
            "POST /v1/chat/completions and /v1/completions as OpenAI's, POST /generate takes and gives token ids,",
            "GET /metrics of each server is for Prometheus.",
            f"A training run joins with `rollout.urls = {urls}`, both keys in its environment and",
            f"draft.num_steps = {servers[0].draft_depth}; what it pushes is verified. Ctrl-C ends the servers.",
        ]
    )


@contextmanager
def _until_told() -> Iterator[threading.Event]:
    """Ends its body at the first Ctrl-C or SIGTERM, wherever it is, and sets the event; the second is as always."""
    told = threading.Event()

    def tell(signum: int, frame: object) -> None:
        told.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with suppress(KeyboardInterrupt):
            yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
