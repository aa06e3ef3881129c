"""SGLang over HTTP: keys, control calls, and what a server can do.

Invariant: what a server does not say is an error that names it, never a guess.

Read in SGLang 0.5.17 and in 0.5.21 to 0.5.23:

- With both keys set, generation, `/model_info` and `/openapi.json` want the API key, and whatever changes a server
  (weights, memory, cache, pause, abort) wants the admin key; `/health` wants none. `/server_info` wants the API key,
  and the admin key on servers that `miles_spec.rollout.launch` started, because it returns both keys.
- `/abort_request` aborts every request whose id *starts* with the id given.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles_spec.rollout.launch import ADMIN_KEY, API_KEY
from miles_spec.rollout.sglang_args import LOADER, OLDEST, version_of
from miles_spec.types import RunError, VerifyRule

# a proxy from the environment must not see the keys, and knows no loopback address
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerBusy(ConnectionError):
    """The server is there and cannot serve now (429 or 5xx); the request may be tried again."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The two keys of a server; "" where it has none."""

    api: str = field(default="", repr=False)
    admin: str = field(default="", repr=False)

    @staticmethod
    def random() -> Keys:
        """New keys for one run."""
        return Keys(api=secrets.token_urlsafe(32), admin=secrets.token_urlsafe(32))

    @staticmethod
    def of_environment() -> Keys:
        """Those of servers that already run; without an admin key SGLang takes the API key for everything."""
        api = os.environ.get(API_KEY, "")
        return Keys(api=api, admin=os.environ.get(ADMIN_KEY, api))

    def header(self, *, admin: bool = False) -> dict[str, str]:
        """The header that shows a key."""
        key = self.admin if admin else self.api
        return {"Authorization": f"Bearer {key}"} if key else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a server is and can do, as itself says."""

    version: str
    selector: bool
    """Whether it has `/begin_weight_update` and pushes by role."""
    ranks: int
    """Tensor-parallel processes."""
    depth: int
    """Drafted tokens per block; 0 without speculation."""
    device: str
    """SGLang's own name of its kind, such as `cuda`."""
    info: Mapping[str, Any] = field(repr=False)
    """All of `/server_info`, without the keys."""


class Api:
    """Control calls to one server, each of which waits for its answer; from any thread."""

    def __init__(self, url: str, keys: Keys) -> None:
        self.url = url.rstrip("/")
        self.keys = keys

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, *, admin: bool = False, timeout_s: float
    ) -> tuple[int, str]:
        """Status and text of a GET (without a body) or a POST, an error status included.

        Raises `ConnectionError` if the server is not there and `TimeoutError` if it does not answer in time.
        """
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **self.keys.header(admin=admin)},
            method="GET" if body is None else "POST",
        )
        try:
            with _OPENER.open(request, timeout=timeout_s) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace")
        except TimeoutError:
            raise TimeoutError(f"{self.url}{path} did not answer within {timeout_s:g} s") from None
        except OSError as error:  # URLError is one
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise TimeoutError(f"{self.url}{path} did not answer within {timeout_s:g} s") from None
            raise ConnectionError(f"{self.url}{path} is not there: {reason}") from None
        except http.client.HTTPException as error:  # an answer that is cut short, or is none
            raise ConnectionError(f"{self.url}{path} gave no answer: {error}") from None

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, admin: bool = False, timeout_s: float = 30.0
    ) -> str:
        """The text of an answer with status 200. Raises as `call` and `refuse` do."""
        status, text = self.call(path, body, admin=admin, timeout_s=timeout_s)
        refuse(status, text, f"{self.url}{path}")
        return text

    def features(self, timeout_s: float = 60.0) -> Features:
        """What the server is. Raises `RunError` for a version too old or an answer that lacks something."""
        status, text = self.call("/server_info", timeout_s=timeout_s)
        if status in (401, 403):
            status, text = self.call("/server_info", admin=True, timeout_s=timeout_s)
        elif status == 404:
            oldest = ".".join(map(str, OLDEST))
            raise RunError(f"{self.url} has no /server_info; is it an SGLang server of version {oldest} or newer?")
        refuse(status, text, f"{self.url}/server_info")
        info = json_object(text, f"{self.url}/server_info")
        for key in ("version", "tp_size", "speculative_algorithm", "speculative_num_steps", "device"):
            if key not in info:
                raise RunError(f"{self.url}/server_info of SGLang {info.get('version', '?')} has no {key!r}")
        version_of(str(info["version"]))
        paths = json_object(self.ask("/openapi.json", timeout_s=timeout_s), f"{self.url}/openapi.json")["paths"]
        return Features(
            version=str(info["version"]),
            selector="/begin_weight_update" in paths,
            ranks=int(info["tp_size"]),
            depth=int(info["speculative_num_steps"] or 0) if info["speculative_algorithm"] else 0,
            device=str(info["device"]),
            info={k: v for k, v in info.items() if k not in ("api_key", "admin_api_key", "ssl_keyfile_password")},
        )


def refuse(status: int, text: str, what: str) -> None:
    """Raises what an error status means: `RunError` for a wrong key or a call that is refused, `ServerBusy` for one to
    try again."""
    if status == 200:
        return
    if status in (401, 403):
        raise RunError(
            f"{what} refuses the key; for servers that already run set the environment variables {API_KEY} and "
            f"{ADMIN_KEY}"
        )
    if status == 429 or status >= 500:
        raise ServerBusy(f"{what} answered {status}: {text[:300].strip()}", status)
    raise RunError(f"{what} answered {status}: {text[:500].strip()}")


def check_served(features: Features) -> None:
    """Raises `RunError` if a server cannot take our pushes, or is set up so that it would not be exact."""
    info, name = features.info, f"SGLang {features.version}"
    if LOADER not in (info.get("custom_weight_loader") or ()):
        raise RunError(f"this server cannot take our weights; start it with --custom-weight-loader {LOADER}")
    for key in ("dp_size", "attn_dp_size", "pp_size"):  # 0.5.22 moved attention's data parallelism out of the first
        if info.get(key, 1) != 1:
            raise RunError(f"this server has {key} {info[key]}, and weights can only be pushed where it is 1")
    if info.get("enable_watermark"):
        raise RunError("this server changes what is sampled (enable_watermark); start it without")
    if not features.depth:
        return
    if info["speculative_algorithm"] not in ("EAGLE", "EAGLE3"):
        raise RunError(f"this server drafts with {info['speculative_algorithm']}; only EAGLE and EAGLE3 are supported")
    exact = {
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": features.depth + 1,
        "speculative_accept_threshold_single": 1.0,
        "speculative_accept_threshold_acc": 1.0,
    }
    for key, need in exact.items():
        if key not in info:
            raise RunError(f"/server_info of {name} has no {key!r}, so its speculation cannot be checked")
        if info[key] != need:
            raise RunError(
                f"this server has {key} {info[key]} and must have {need:g}, or it is not exact or not counted"
            )


def check_rule(features: Features, rule: VerifyRule) -> None:
    """Raises `RunError` if a server that drafts and was not started by the run chooses its depth by itself, or accepts
    drafts by another rule than the run's, which the draft is trained for and its acceptance estimated by. At
    temperature 0 all rules are one."""
    if features.info.get("speculative_adaptive"):
        raise RunError("this server changes its draft depth while it runs (speculative_adaptive); start it without")
    if features.info.get("speculative_use_block_verification"):
        raise RunError("this server verifies whole blocks (speculative_use_block_verification); start it without")
    theirs = "rejection" if features.info.get("speculative_use_rejection_sampling") else "target"
    if rule not in ("greedy", theirs):
        raise RunError(
            f'this server verifies drafts by the rule "{theirs}" and was not started by this run: set rollout.verify '
            f'to "{theirs}", or start it {"with" if rule == "rejection" else "without"} '
            "--speculative-use-rejection-sampling"
        )


def json_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object that `what` answered with. Raises `RunError` for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{what} did not answer with a JSON object; is it an SGLang server?")
    return value
