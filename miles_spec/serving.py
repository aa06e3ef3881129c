"""The SGLang servers of a run: started or joined, told what they will be sent, and supplied with weights.

Invariant: a server that comes back after it died is sent what `Serving.weights` gives, the very weights that the others
serve, before it generates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from miles_spec.config import RunConfig
from miles_spec.draft.export import TOKEN_MAP, algorithm, check_served, export, export_target
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES
from miles_spec.models import Loaded
from miles_spec.rollout.engine import Member
from miles_spec.rollout.fleet import Fleet
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import ServerSettings, with_underscores
from miles_spec.rollout.sglang_process import LAUNCH
from miles_spec.sync.collective import Collective
from miles_spec.sync.dtypes import dtype_name, metas_of
from miles_spec.sync.session import Syncer
from miles_spec.sync.session import Weights as Sent
from miles_spec.sync.transports import Disk, Ipc, Transport
from miles_spec.types import Receipt, Role

log = logging.getLogger(__name__)

GRADIENT_BYTES, MOMENTS_BYTES = 4, 8
"""Per weight, in float32."""

RELEASED = {"kv_cache": ("kv_cache",), "all": ("weights", "kv_cache"), "nothing": ()}
"""`fleet.release` to SGLang's tags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What all servers are to serve."""

    version: int
    target: Sent
    draft_version: int | None = None
    draft: Sent | None = None
    """None where they serve no draft yet."""

    def push(self, syncer: Syncer, members: Sequence[Member], *, self_test: bool = False) -> list[Receipt]:
        """Sends them to `members`; see `Syncer.push`, or with `self_test` `Syncer.self_test`."""
        send = syncer.self_test if self_test else syncer.push
        return send(
            members,
            version=self.version,
            target=self.target,
            draft_version=self.draft_version,
            draft=self.draft,
        )


class Serving:
    """The fleet, what pushes to it, and what both have to know of the policy and the draft."""

    def __init__(
        self,
        config: RunConfig,
        loaded: Loaded,
        folder: Path,
        max_context: int,
        weights: Callable[[], Weights],
        keys: Keys | None = None,
    ) -> None:
        """Writes what servers start from into `folder`; starts nothing yet.

        `weights` gives what the servers are to serve now; it is called at every push. Servers that are started take
        `keys`, by default new ones. Raises `ValueError` for GPUs that are not there or have no room, and for a model
        that SGLang has no draft for.
        """
        if config.draft.enabled and not config.draft.path:  # a draft from a folder was checked when it was read
            check_served(loaded.model.config.model_type, FAMILIES[config.draft.fresh_family], config.draft.layers)
        self.weights = weights
        self._loaded = loaded
        self._folder = folder
        self._dtype = loaded.dtype
        rollout, fleet = config.rollout, config.fleet
        given = with_underscores(config.sglang)
        ranks = int(given.get("tp_size", given.get("tensor_parallel_size", 1)))
        placed = [] if rollout.urls else _placed(fleet.gpus, fleet.engines, ranks, loaded.device)
        here = loaded.device.index or 0
        beside = loaded.device.type == "cpu" or any(here in gpus for gpus in placed)
        if beside and not all(here in gpus for gpus in placed if gpus):
            raise ValueError(
                f"fleet.gpus puts some servers on the trainer's GPU {here} and some on others; give them all that one, "
                "or none of them"
            )
        released = RELEASED[fleet.release] if beside and loaded.device.type == "cuda" else ()
        export_target(loaded.model, loaded.tokenizer, folder / "target", dtype=loaded.dtype)
        settings = ServerSettings(
            model_path=str(folder / "target"),
            rule=rollout.rule,
            dtype=dtype_name(loaded.dtype),
            context_length=max_context,
            max_running=rollout.max_running,
            max_batch=config.draft.max_batch,
            seed=config.seed,
            release=released,
            extra=config.sglang,
        )
        keys = keys or Keys.random()
        server = partial(
            SGLangServer,
            eos=loaded.eos_ids,
            vocab_size=loaded.model.config.vocab_size,
            start_timeout_s=fleet.start_timeout_s,
        )
        self._servers = [
            server(
                name=f"server{i}",
                settings=_with_room(settings, gpus, loaded, config) if here in gpus else settings,
                keys=keys,
                host=fleet.host,
                launch=fleet.launch or LAUNCH,
                gpus=gpus,
                folder=folder,
            )
            for i, gpus in enumerate(placed)
        ] or [server(name=url, settings=settings, keys=Keys.of_environment(), join=url) for url in rollout.urls]
        self.fleet = Fleet(
            self._servers,
            recover=self._recover,
            max_running=rollout.max_running,
            max_context=max_context,
            releases=bool(released),
            probe_s=fleet.probe_s,
            dead_after_s=fleet.dead_after_s,
            start_timeout_s=fleet.start_timeout_s,
            request_timeout_s=fleet.request_timeout_s,
        )
        transport = _transport(config, loaded.device, folder, beside=beside and not rollout.urls)
        self.syncer = Syncer(transport, bucket_bytes=fleet.bucket_mb << 20)

    def start(self) -> None:
        """Starts or joins all servers. Raises `RunError` with the end of a log if one does not come up."""
        begun = time.perf_counter()
        self.fleet.start()
        log.info("%d servers are up after %.0f s", len(self._servers), time.perf_counter() - begun)
        self._learn("target", self.weights().target)

    def attach_draft(self, draft: DraftHead, tensors: Mapping[str, Tensor], depth: int) -> None:
        """From now on the servers draft `depth` tokens with drafts such as `draft`, whose served tensors are
        `tensors`; they start anew for that, and must be pushed to before they generate."""
        folder = self._folder / "draft"
        export(draft, folder, dtype=self._dtype, tokenizer=self._loaded.tokenizer)
        for server in self._servers:
            server.settings = drafting(server.settings, draft, folder)
        self.fleet.set_draft_depth(depth)
        self._learn("draft", tensors)

    def stop(self) -> None:
        """Ends servers that are ours, and the transport."""
        self.fleet.stop()
        self.syncer.transport.stop()

    def _learn(self, role: Role, tensors: Sent) -> None:
        metas = metas_of(tensors.items())
        for server in self._servers:
            server.learn(role, metas)

    def _recover(self, server: SGLangServer) -> None:
        """For a server that started again, or whose last push did not verify."""
        now = self.weights()
        if "draft" not in server.versions():
            now = replace(now, draft_version=None, draft=None)
        now.push(self.syncer, [server])


def drafting(settings: ServerSettings, draft: DraftHead, folder: Path) -> ServerSettings:
    """`settings` for a server that starts from `folder`, where `draft` was exported to."""
    reduced = draft.vocab_ids is not None
    in_weights = draft.spec.own_head
    return replace(
        settings,
        draft_path=str(folder),
        algorithm=algorithm(draft.spec),
        token_map=str(folder / TOKEN_MAP) if reduced and not in_weights else "",
        draft_vocabulary=reduced and in_weights,
    )


def _placed(gpus: tuple[int, ...], engines: int, ranks: int, device: torch.device) -> list[tuple[int, ...]]:
    """The GPUs of each server to start; empty ones on a CPU."""
    if device.type == "cpu":
        if gpus:
            raise ValueError('fleet.gpus names GPUs, and the trainer is on a CPU; set model.device to "cuda"')
        return [()] * engines
    there = torch.cuda.device_count()
    gpus = gpus or tuple(range(min(there, engines * ranks)))
    if max(gpus) >= there:
        raise ValueError(f"fleet.gpus names GPU {max(gpus)}, and there are {there}")
    if len(gpus) < engines * ranks:
        raise ValueError(
            f"{engines} servers of {ranks} GPUs each need {engines * ranks}, and there are {len(gpus)}; lower "
            "fleet.engines or sglang.tp_size, or name more in fleet.gpus"
        )
    return [gpus[i * ranks : (i + 1) * ranks] for i in range(engines)]


def kept_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    """Per weight, what training adds to the loaded model and keeps while servers on its GPU have their memory; `dtype`
    is that of forward passes."""
    # Megatron gives the loaded weights up for such of this dtype and, where that is not float32, float32 ones beside
    masters = 2 if config.train.backend == "megatron" and dtype == torch.bfloat16 else 0
    offload = config.train.offload
    if config.fleet.release != "all" or not offload:
        return masters + GRADIENT_BYTES + MOMENTS_BYTES
    return 0 if "optimizer" in offload else masters + MOMENTS_BYTES


def _with_room(settings: ServerSettings, gpus: tuple[int, ...], loaded: Loaded, config: RunConfig) -> ServerSettings:
    """Leaves the trainer of the same GPU the memory that it will take, and `fleet.margin_gb` beside."""
    if not gpus or "mem_fraction_static" in with_underscores(settings.extra):
        return settings
    free, _ = torch.cuda.mem_get_info(loaded.device)
    weights = sum(p.numel() for p in loaded.model.parameters())
    kept = kept_bytes(config, loaded.dtype) * weights + config.fleet.margin_gb * 2**30
    fraction = 1 - kept / free
    if fraction < 0.05:
        raise ValueError(
            f"GPU {loaded.device.index or 0} has {free / 2**30:.1f} GiB free, and training needs about "
            f"{kept / 2**30:.1f} GiB of it, fleet.margin_gb included; give the servers other GPUs with fleet.gpus"
        )
    return replace(settings, extra={**settings.extra, "mem_fraction_static": round(fraction, 3)})


def _transport(config: RunConfig, device: torch.device, folder: Path, *, beside: bool) -> Transport:
    kind = config.fleet.transport
    if kind == "auto":
        kind = "ipc" if beside else "nccl" if device.type == "cuda" else "gloo"
    if kind in ("nccl", "gloo") and (kind == "nccl") != (device.type == "cuda"):
        raise ValueError(f'fleet.transport is "{kind}", and the trainer is on a {device.type}; set it to "auto"')
    if kind == "ipc":
        return Ipc(device)
    if kind == "disk":
        return Disk(Path(config.fleet.folder) if config.fleet.folder else folder / "push")
    return Collective(kind, device=device, host=config.fleet.host)
