"""`miles-spec doctor`: says of an installation, line by line, what works and what does not.

Invariant: a line "ok" names what was tried and seen; what could not be tried is a "note", and nothing is left out in
silence. It changes nothing but a temporary folder, and what it starts has ended when it returns.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from miles_spec import models
from miles_spec.config import FleetConfig, RunConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.kernels import attention
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import (
    LOADER,
    Installed,
    ServerSettings,
    arguments,
    check,
    installed,
    refuse_greedy,
)
from miles_spec.rollout.sglang_process import LAUNCH, environment
from miles_spec.serve import Hosted, Policy, alone
from miles_spec.sync.session import TargetSyncError
from miles_spec.sync.transports import IN_TURN, Bucket, Faults, Transport
from miles_spec.types import Completion, Request, Role, RunError, Sampling

DEPTH = 2
CONTEXT = 128
VOCAB = 256
TOKENS = 16
"""Of each response that is compared."""
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Where the two likeliest tokens' logits are closer than this, either may be greedy's."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    level: Literal["ok", "note", "FAULT"]
    text: str


def doctor(config: RunConfig | None, *, server: bool = True, say: Callable[[str], None] = print) -> None:
    """Prints the findings, those of `config`'s servers too; with `server` it starts a small one and pushes to it.

    Raises `RunError` if one is a fault.
    """
    faults = 0
    for finding in findings(config, server=server):
        faults += finding.level == "FAULT"
        say(f"{finding.level:5} {finding.text}")
    if faults:
        raise RunError(f"{faults} fault{'s' if faults > 1 else ''} found")


def findings(config: RunConfig | None, *, server: bool) -> Iterator[Finding]:
    """All findings, as they are made."""
    wanted = config is not None and config.rollout.engine == "sglang"
    config = config or RunConfig()
    yield from versions()
    yield from gpus()
    yield from shared_memory(config.fleet)
    launch = config.fleet.launch or LAUNCH
    try:
        known = installed(launch, environment(), config.fleet.start_timeout_s)
    except RunError as error:
        more = "" if wanted else "; only the embedded engine can be used"
        yield Finding("FAULT" if wanted else "note", f"SGLang: {error}{more}")
        return
    yield Finding("ok", f"SGLang {known.version}, for {', '.join(known.platforms) or 'no known platform'}")
    usable = True
    for finding in (*flags(config, known), *loader(launch)):
        usable = usable and finding.level != "FAULT"
        yield finding
    if not server:
        yield Finding("note", "no server was started")
    elif not usable:
        yield Finding("note", "no server was started, because of the faults above")
    else:
        yield from served(config)


def versions() -> Iterator[Finding]:
    """What is installed in this Python."""
    yield Finding("ok", f"Python {platform.python_version()}, torch {torch.__version__}")
    for name in ("transformers", "triton"):
        try:
            yield Finding("ok", f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("note", f"{name} is not installed here")


def gpus() -> Iterator[Finding]:
    """The GPUs of this process, and whether their memory can be shared with a server."""
    if not torch.cuda.is_available():
        yield Finding("note", "no GPU that torch can use")
        return
    yield from _driver()
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Finding("ok", f"GPU {i}: {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            yield Finding("FAULT", f"{name} sets expandable_segments, with which no memory is shared; unset it")
            return
    try:
        torch.zeros(1024, device="cuda").untyped_storage()._share_cuda_()
    except RuntimeError as error:
        yield Finding("FAULT", f'CUDA memory cannot be shared: {error}; fleet.transport = "disk" needs none')
    else:
        yield Finding("ok", "CUDA memory can be shared between processes")


def _driver() -> Iterator[Finding]:
    if (tool := shutil.which("nvidia-smi")) is None:
        yield Finding("note", "nvidia-smi is not there to tell the driver's version")
        return
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    told = (done.stdout.splitlines() or [""])[0].strip()
    if done.returncode or not told:
        yield Finding("note", "nvidia-smi does not tell the driver's version")
    else:
        yield Finding("ok", f"driver {told}, CUDA {torch.version.cuda}")


def shared_memory(fleet: FleetConfig, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Room for the buckets on their way between processes of a CPU."""
    need = IN_TURN * fleet.bucket_mb << 20
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    told = f"{folder} has {free >> 20} MiB free, and {IN_TURN} buckets take {need >> 20}"
    if free > need:
        yield Finding("ok", told)
    else:
        yield Finding("note", f"{told}: on a CPU they go to the folder for temporary files; lower fleet.bucket_mb")


def flags(config: RunConfig, known: Installed) -> Iterator[Finding]:
    """Whether this SGLang has every argument that a run may give, and those of `[sglang]`."""
    released = ("weights", "kv_cache")
    all_on = ServerSettings(model_path="m", draft_path="d", context_length=CONTEXT, max_running=1, release=released)
    anywhere = replace(known, platforms=())
    for settings in (
        replace(all_on, token_map="t"),
        replace(all_on, algorithm="EAGLE3", draft_vocabulary=True),
        replace(all_on, rule="rejection"),
    ):
        try:
            arguments(settings, DEPTH, anywhere, host="127.0.0.1", port=1)
        except ValueError as error:
            yield Finding("FAULT", str(error))
            return
    yield Finding("ok", "it has every argument that a run gives")
    own = replace(all_on, rule=config.rollout.rule, extra=alone(config).sglang)
    try:
        check(own)
        arguments(own, DEPTH, anywhere, host="127.0.0.1", port=1)
    except ValueError as error:
        yield Finding("FAULT", str(error))
    else:
        yield Finding("ok", f"and the {len(config.sglang)} of [sglang]")
    if config.draft.enabled:
        try:
            refuse_greedy(config.rollout.rule, known.platforms)
        except ValueError as error:
            yield Finding("FAULT" if config.rollout.engine == "sglang" else "note", str(error))


def loader(launch: Sequence[str]) -> Iterator[Finding]:
    """Whether the Python of the server finds what takes the weights there."""
    if not Path(launch[0]).name.startswith("python"):
        yield Finding("note", f"{launch[0]} is no Python, so whether it finds {LOADER} shows only when it serves")
        return
    asked = [launch[0], "-c", f"import {LOADER.rpartition('.')[0]}"]
    done = subprocess.run(asked, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("FAULT", f"the server's Python cannot import {LOADER}: {last}")
    else:
        yield Finding("ok", f"the server's Python finds {LOADER}")


# A small server


def served(config: RunConfig) -> Iterator[Finding]:
    """Starts a small server as `config` says, pushes to it and generates with it, and compares with our own engine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = small(device)
    with tempfile.TemporaryDirectory(prefix="miles-spec-") as folder:
        try:
            hosted = Hosted(trial(config), policy, Path(folder), CONTEXT, Keys.random())
        except (RunError, ValueError, OSError) as error:
            yield Finding("FAULT", f"settings of a server: {error}")
            return
        try:
            for what, work in trials(hosted, policy).items():
                started = time.monotonic()
                try:
                    seen = work()
                except (RunError, ValueError, OSError) as error:
                    yield Finding("FAULT", f"{what}: {error}")
                    return
                yield Finding("ok", f"{what}: {seen} ({time.monotonic() - started:.1f} s)")
        finally:
            hosted.stop()


def trial(config: RunConfig) -> RunConfig:
    """`config` for one small server that drafts greedily, with the draft of `small`."""
    config = alone(config)
    sglang = {"max_total_tokens": 8192, **config.sglang}
    rollout = replace(config.rollout, engine="sglang", urls=(), temperature=0.0, verify="greedy", max_running=8)
    ours = replace(config.draft, path="", family="eagle", layers=1, vocab_size=0)
    draft = replace(ours, enabled=True, num_steps=DEPTH, max_batch=0)
    return replace(config, rollout=rollout, draft=draft, fleet=replace(config.fleet, engines=1), sglang=sglang)


def trials(hosted: Hosted, policy: Policy) -> Mapping[str, Callable[[], str]]:
    """What is tried with a server, in this order; each says what was seen, or raises."""
    made: list[Completion] = []

    def start() -> str:
        hosted.start()
        (server,) = hosted.members()
        assert server.features is not None
        return f"SGLang {server.features.version} on {server.features.device}, {server.ranks} ranks"

    def push() -> str:
        receipts = hosted.push(hosted.members(), self_test=True)
        if bad := [receipt for receipt in receipts if not receipt.verified]:
            raise RunError(f"the {bad[0].role} was not served as it was sent: {'; '.join(bad[0].mismatched[:3])}")
        return "inverted bits and then the weights are served as sent: " + ", ".join(
            f"{r.tensors} tensors of the {r.role}" for r in receipts
        )

    def generate() -> str:
        made.extend(hosted.fleet.generate(prompts()))
        return compared(policy, made)

    def speculate() -> str:
        steps = sum(c.spec.verify_steps for c in made)
        accepted = sum(sum(c.spec.accepted) for c in made)
        if not steps or not accepted:
            raise RunError(f"{accepted} drafted tokens were accepted in {steps} verify steps, of a draft made to agree")
        return f"accept length {1 + accepted / steps:.2f} of at most {DEPTH + 1}"

    def flip() -> str:
        straight, flipping = hosted.syncer.transport, Flipping(hosted.syncer.transport)
        hosted.syncer.transport = flipping
        logging.disable(logging.WARNING)  # the fault is ours
        try:
            hosted.push(hosted.members())
        except TargetSyncError as error:
            if flipping.flipped not in str(error):
                raise
        else:
            raise RunError(f"a flipped byte of {flipping.flipped} was not noticed")
        finally:
            logging.disable(logging.NOTSET)
            hosted.syncer.transport = straight
        hosted.push(hosted.members())
        return f"it was noticed in {flipping.flipped}, and the next push verified"

    return {
        "start of a server": start,
        "push": push,
        "generation": generate,
        "speculation": speculate,
        "a flipped byte": flip,
    }


class Flipping:
    """A transport that flips one byte of the first matrix of a target that it sends."""

    def __init__(self, inner: Transport) -> None:
        self.flipped = ""
        """Its name."""
        self._inner = inner

    def open(self, members: Sequence[Any], role: Role, room_bytes: int) -> Faults:
        return self._inner.open(members, role, room_bytes)

    def send(self, members: Sequence[Any], role: Role, bucket: Bucket) -> Faults:
        sent: list[tuple[str, Tensor]] = []
        for name, tensor in bucket:
            if not self.flipped and role == "target" and tensor.dim() == 2:
                self.flipped, tensor = name, tensor.clone()
                tensor.view(-1).view(torch.uint8)[0] ^= 1
            sent.append((name, tensor))
        return self._inner.send(members, role, sent)

    def close(self, members: Sequence[Any], role: Role) -> Faults:
        return self._inner.close(members, role)

    def stop(self) -> None:
        self._inner.stop()


def small(device: torch.device) -> Policy:
    """A random policy whose next token depends mostly on the last one, and a draft that sees that."""
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4 * CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 1.0 if "embed" in name else 0.4 if "lm_head" in name else 0.03
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    draft = DraftHead.attach(model, EAGLE, None, generator).to(dtype).requires_grad_(False)
    model = model.to(dtype).requires_grad_(False)
    loaded = models.Loaded(model=model, tokenizer=_tokenizer(), dtype=dtype, device=device, eos_ids=())
    return Policy(loaded=loaded, draft=draft, version=1, draft_version=1)


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def prompts() -> list[Request]:
    """Four, of different lengths."""
    sampling = Sampling(temperature=0.0, max_new_tokens=TOKENS, ignore_eos=True)
    tokens = [(1, *range(10 * i, 10 * i + 3 + i)) for i in range(1, 5)]
    return [Request(id=str(i), tokens=t, sampling=sampling, seed=i) for i, t in enumerate(tokens)]


def compared(policy: Policy, made: Sequence[Completion]) -> str:
    """The responses to `prompts` against our own engine's. Raises `RunError` where they differ and neither is a tie."""
    loaded = policy.loaded
    engine = EmbeddedEngine(
        loaded.model, policy.draft, dtype=loaded.dtype, rule="greedy", depth=DEPTH, max_context=CONTEXT
    )
    ties = 0
    for request, ours, theirs in zip(prompts(), engine.generate(prompts()), made, strict=True):
        if ours.tokens == theirs.tokens:
            continue
        at = next((i for i, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=False)) if a != b), -1)
        gap = float("inf") if at < 0 else _gap(loaded, [*request.tokens, *ours.tokens[:at]], theirs.tokens[at])
        if gap > TIE[loaded.dtype]:
            raise RunError(
                f"after {request.tokens} it gives {theirs.tokens}, and our own engine {ours.tokens}, its choice "
                f"{gap:.3g} ahead"
            )
        ties += 1
    same = f"{len(made)} greedy responses of {TOKENS} tokens are our own engine's"
    return f"{same}, {ties} of them up to a tie" if ties else same


def _gap(loaded: models.Loaded, tokens: Sequence[int], other: int) -> float:
    """How far the likeliest token after `tokens` is ahead of `other`, in logits."""
    plain = LlamaForCausalLM._from_config(loaded.model.config, attn_implementation="eager").float().eval()
    plain.load_state_dict(loaded.model.state_dict())
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([list(tokens)])).logits[0, -1]
    return float(logits.max() - logits[other])
