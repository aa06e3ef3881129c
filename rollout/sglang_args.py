"""Makes SGLang's argument list from a run's settings and its `[sglang]` table.

Invariant: what would change the policy's distribution, or what the run itself decides, is refused by name, and so is an
argument that the installed SGLang does not know; nothing is left out in silence.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from miles_spec.types import RunError, VerifyRule

LOADER = "miles_spec.sync.loader.load"
"""The function that SGLang calls with the served model."""
OLDEST = (0, 5, 17)
"""The oldest version whose counters and endpoints are known here."""
SPARE = 8
"""Tokens of the context that SGLang keeps for itself."""
PREFILL_GRAPHS = "cuda_graph_backend_prefill"
"""Is "disabled" unless `[sglang]` says otherwise: CUDA graphs of prefills, dozens for the target and as many for the
draft, keep no hold of the memory that the attention between their parts reads (SGLang's pull request 37448), SGLang
refuses them beside graphs whose memory is released, they lengthen every start, and rollouts spend little time there."""
GREEDY_PLATFORMS = ("cpu", "hip", "npu", "xpu")
"""Where SGLang verifies drafted tokens greedily whatever the temperature, so that sampling would not be exact."""

_OURS = {
    "host": "fleet.host sets it",
    "port": "a free one is taken",
    "api_key": "a random one is made for every run",
    "admin_api_key": "a random one is made for every run",
    "model": "model.path sets it",
    "model_path": "model.path sets it",
    "load_format": "all weights are pushed and verified after the start",
    "custom_weight_loader": "the weight push needs its own",
    "config": "its settings would pass unchecked; write them into [sglang]",
    "speculative_algorithm": "draft.family sets it",
    "speculative_algo": "draft.family sets it",
    "speculative_draft_model": "the run exports its own draft",
    "speculative_draft_model_path": "the run exports its own draft",
    "speculative_draft_model_revision": "the run exports its own draft",
    "speculative_draft_load_format": "all weights are pushed and verified after the start",
    "speculative_num_steps": "draft.num_steps sets it",
    "speculative_num_draft_tokens": "draft.num_steps sets it",
    "speculative_use_rejection_sampling": 'rollout.verify = "rejection" sets it',
    "speculative_use_block_verification": "rollout.verify says how drafted tokens are verified",
    "speculative_token_map": "draft.vocab_size sets it",
    "speculative_adaptive": "draft.num_steps and draft.max_batch say how deep it drafts",
    "speculative_adaptive_config": "draft.num_steps and draft.max_batch say how deep it drafts",
    "enable_memory_saver": "fleet.release sets it",
    "enable_weights_cpu_backup": "fleet.release sets it",
    "enable_draft_weights_cpu_backup": "fleet.release sets it",
    "skip_tokenizer_init": "responses would come without text, and stop strings would not stop",
    "preferred_sampling_params": "[rollout] says how to sample",
    "allow_auto_truncate": "it would cut prompts in silence",
    "enable_watermark": "it changes which tokens are sampled, so they would not be the policy's",
    "watermark_config": "it changes which tokens are sampled, so they would not be the policy's",
    "trust_remote_code": "code from a model's folder is never run",
}
_ONLY_ONE = {
    "speculative_eagle_topk": "a tree of drafted tokens is neither counted nor trained for",
    "speculative_accept_threshold_single": "below 1 it accepts tokens that the policy would not have sampled",
    "speculative_accept_threshold_acc": "below 1 it accepts tokens that the policy would not have sampled",
    "dp_size": "more engines come from fleet.engines",
    "data_parallel_size": "more engines come from fleet.engines",
    "attn_dp_size": "more engines come from fleet.engines",
    "attention_data_parallel_size": "more engines come from fleet.engines",
    "pp_size": "weights cannot be pushed into a pipeline",
    "pipeline_parallel_size": "weights cannot be pushed into a pipeline",
    "nnodes": "a server must fit on one node",
}
_LOSSY_ENVIRONMENT = {
    "SGLANG_SIMULATE_ACC_LEN": "it accepts drafted tokens that the policy would not have sampled",
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "log-probabilities would not be those at the rollout temperature",
    "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED": "experts that a push did not load would be reordered a second time after it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a run says about its servers; the depth of the draft comes with each start."""

    model_path: str
    """Folder of the target: its configuration and tokenizer; its weights are not read."""
    draft_path: str = ""
    """Folder of the draft's configuration; "" without a draft."""
    algorithm: Literal["EAGLE", "EAGLE3"] = "EAGLE"
    """What SGLang calls the draft's family; MTP layers are EAGLE to it."""
    token_map: str = ""
    """File of the draft's reduced vocabulary; "" for the whole, or where its weights hold it."""
    draft_vocabulary: bool = False
    """Whether the draft's weights hold its reduced vocabulary: SGLang takes that from the draft's folder, once."""
    rule: VerifyRule = "target"
    dtype: str = "auto"
    context_length: int
    """Tokens of prompt and response together; SGLang is given `SPARE` more and the draft's block."""
    max_running: int
    """Sequences decoded together by one server."""
    max_batch: int = 0
    """Sequences decoded together for which it drafts at most; 0 for any number."""
    seed: int = 0
    release: tuple[str, ...] = ()
    """SGLang's tags of the memory that can be released and resumed: `weights`, `kv_cache`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The table `[sglang]`: SGLang's own names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The SGLang that a launch command starts, as its `--flags` tells."""

    version: str
    flags: Mapping[str, Mapping[str, Any]]
    """By name: `options`, `takes` and `default`, see `miles_spec.rollout.launch.describe`."""
    platforms: tuple[str, ...]


def version_of(text: str) -> tuple[int, ...]:
    """`0.5.21.post1` as (0, 5, 21). Raises `RunError` for a version that is older than `OLDEST` or no version."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise RunError(f"SGLang says that its version is {text!r}; a release such as 0.5.21 is needed")
    version = tuple(map(int, match.groups()))
    if version < OLDEST:
        raise RunError(f"SGLang is version {text}, and {'.'.join(map(str, OLDEST))} is the oldest that is supported")
    return version


def installed(command: Sequence[str], environment: Mapping[str, str], timeout_s: float = 300.0) -> Installed:
    """Asks the launch command for its version and arguments; once for each command.

    Raises `RunError` with its last lines if it does not answer.
    """
    with _asking:
        if tuple(command) not in _installed:
            _installed[tuple(command)] = _ask([*command, "--flags"], environment, timeout_s)
        return _installed[tuple(command)]


_asking = threading.Lock()
_installed: dict[tuple[str, ...], Installed] = {}


def _ask(asked: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Installed:
    # a file, not a pipe: a helper process that is left behind would hold a pipe open
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                asked,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
            )
        except OSError as error:
            raise RunError(f"cannot run {asked[0]}: {error.strerror}; check fleet.launch") from None
        except subprocess.TimeoutExpired:
            raise RunError(f"{' '.join(asked)} did not answer within {timeout_s:g} s") from None
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        if line.startswith('{"version"'):
            told = json.loads(line)
            version_of(told["version"])
            return Installed(version=told["version"], flags=told["flags"], platforms=tuple(told["platforms"]))
    if any("No module named 'sglang'" in line for line in lines):
        raise RunError(
            f"{asked[0]} has no SGLang: install it there, name another command as fleet.launch, or set "
            'rollout.engine = "embedded"'
        )
    last = "\n".join(lines[-10:])
    raise RunError(
        f"{' '.join(asked)} ended with status {done.returncode} and told no arguments; is SGLang there?\n{last}"
    )


def with_underscores(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table `[sglang]` by the names of SGLang's settings, whose options have hyphens."""
    return {name.replace("-", "_"): value for name, value in table.items()}


def check(settings: ServerSettings) -> None:
    """Raises `ValueError` for an entry of `[sglang]` that is not the user's to set, or that would be lossy."""
    for name, value in with_underscores(settings.extra).items():
        if name in _OURS:
            raise ValueError(f"sglang.{name} cannot be set: {_OURS[name]}")
        if name in _ONLY_ONE and value != 1:
            raise ValueError(f"sglang.{name} is {value} and must be 1: {_ONLY_ONE[name]}")
        if name.startswith(("speculative_ngram", "speculative_dflash", "speculative_dspark", "speculative_domino")):
            raise ValueError(f"sglang.{name} cannot be set: the draft is of another kind; draft.family sets it")
        if name == "disaggregation_mode" and value != "null":
            raise ValueError(f"sglang.{name} is {value!r} and must be 'null': a server must both prefill and decode")
    for name, why in _LOSSY_ENVIRONMENT.items():
        if os.environ.get(name, "").lower() not in ("", "0", "false", "-1"):
            raise ValueError(f"the environment variable {name} is set: {why}; unset it")
    if settings.rule == "rejection" and settings.max_batch:
        raise ValueError(
            "SGLang cannot go without a draft for some batches under rejection sampling; set draft.max_batch = 0, "
            'or rollout.verify = "target"'
        )
    if settings.rule == "rejection" and (settings.token_map or settings.draft_vocabulary):
        raise ValueError(
            "SGLang has no rejection sampling over a reduced vocabulary; set draft.vocab_size = 0, "
            'or rollout.verify = "target"'
        )


def depths(depth: int, max_batch: int) -> str:
    """SGLang's file of draft depths by the number of sequences: `depth` for `max_batch` at most, and for more none."""
    return json.dumps({"1": {"candidate_steps": [depth]}, str(max_batch + 1): {"candidate_steps": [0]}})


def arguments(
    settings: ServerSettings, depth: int, known: Installed, *, host: str, port: int, by_batch: str = ""
) -> list[str]:
    """The argument list of a server that drafts `depth` tokens (0: without speculation); `by_batch` is the file with
    `depths`, where there is a `max_batch`.

    Raises `ValueError` as `check` does, and for a name that this SGLang does not have or that cannot take its value.
    """
    check(settings)
    wanted: dict[str, Any] = {
        "model_path": settings.model_path,
        "load_format": "dummy",
        "dtype": settings.dtype,
        "context_length": settings.context_length + SPARE + depth,
        "max_running_requests": settings.max_running,
        "host": host,
        "port": port,
        "random_seed": settings.seed,
        "custom_weight_loader": [LOADER],
    }
    if depth:
        if not settings.draft_path:
            raise ValueError(f"{depth} tokens are to be drafted without a draft; set draft.enabled = true")
        refuse_greedy(settings.rule, known.platforms)
        wanted |= {
            "speculative_algorithm": settings.algorithm,
            "speculative_draft_model_path": settings.draft_path,
            "speculative_num_steps": depth,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": depth + 1,
        }
        if settings.max_batch:
            wanted |= {"speculative_adaptive": True, "speculative_adaptive_config": by_batch}
        if settings.rule == "rejection":
            wanted["speculative_use_rejection_sampling"] = True
        if settings.token_map:
            wanted["speculative_token_map"] = settings.token_map
        if settings.draft_vocabulary:
            wanted["speculative_draft_load_format"] = "auto"
    if settings.release:
        wanted["enable_memory_saver"] = True
    if "weights" in settings.release:
        wanted["enable_weights_cpu_backup"] = True
        if depth:
            # SGLang restores the target's buffers itself; the draft's rotary tables, which no push carries, come back
            # as whatever lies there unless its memory is kept
            wanted["enable_draft_weights_cpu_backup"] = True
    if PREFILL_GRAPHS in known.flags:
        wanted[PREFILL_GRAPHS] = "disabled"
    for name, value in with_underscores(settings.extra).items():
        if depth or not name.startswith("speculative_"):
            wanted[name] = value
    return [text for name, value in wanted.items() for text in _option(name, value, known)]


def refuse_greedy(rule: VerifyRule, platforms: Sequence[str]) -> None:
    """Raises `ValueError` where SGLang would verify greedily although tokens are to be sampled."""
    bad = [p for p in platforms if p in GREEDY_PLATFORMS]
    if bad and rule != "greedy":
        raise ValueError(
            f"on the platform {bad[0]!r} SGLang accepts drafted tokens greedily at every temperature, so responses "
            "would not be the policy's; set draft.enabled = false, or rollout.temperature = 0"
        )


def _option(name: str, value: Any, known: Installed) -> list[str]:
    if name not in known.flags:
        near = difflib.get_close_matches(name, known.flags, n=1, cutoff=0.0)
        raise ValueError(
            f"SGLang {known.version} has no argument --{name.replace('_', '-')}"
            + (f"; did you mean {near[0]}?" if near and name not in _OURS else "; another version may have it")
        )
    flag = known.flags[name]
    options = flag.get("options") or [f"--{name.replace('_', '-')}"]
    option, takes = next((o for o in options if o.startswith("--")), options[0]), flag.get("takes", "value")
    if isinstance(value, bool):
        off = next((o for o in options if o.startswith("--no-")), "")
        if takes != "none":
            return [option, str(value)]
        if value:
            return [option]
        if off:
            return [off]
        if flag.get("default") == "True":
            raise ValueError(f"SGLang {known.version} cannot switch sglang.{name} off")
        return []
    if takes == "none":
        raise ValueError(f"sglang.{name} must be true or false, got {value!r}")
    if isinstance(value, (list, tuple)):
        if takes != "values":
            raise ValueError(f"sglang.{name} takes one value, got {list(value)}")
        return [option, *map(str, value)]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]
