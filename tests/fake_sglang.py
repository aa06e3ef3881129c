"""A stand-in for an SGLang server: the same endpoints, keys and answers over HTTP, without a model.

Invariant: it answers as SGLang does, except for the faults asked for in `faults`, which may be set at any time.
`FakeSGLang` runs in a thread of the test; run as a script it is a process that takes SGLang's arguments and the keys'
environment variables, with its faults as JSON in the environment variable `FAKE_SGLANG`, so that a test can kill it.

What it generates: `max_new_tokens` tokens, each the one before plus 1, counted from the last prompt token.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import io
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ADMIN = {
    "/abort_request",
    "/begin_weight_update",
    "/continue_generation",
    "/end_weight_update",
    "/flush_cache",
    "/freeze_gc",
    "/pause_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/update_weights_from_tensor",
}
NORMAL = {"/generate", "/server_info", "/get_server_info", "/model_info", "/openapi.json", "/v1/models"}
FLAGS = {
    "api_key": {"options": ["--api-key"], "takes": "value", "default": "None"},
    "admin_api_key": {"options": ["--admin-api-key"], "takes": "value", "default": "None"},
    "model_path": {"options": ["--model-path"], "takes": "value", "default": "None"},
    "load_format": {"options": ["--load-format"], "takes": "value", "default": "None"},
    "dtype": {"options": ["--dtype"], "takes": "value", "default": "None"},
    "context_length": {"options": ["--context-length"], "takes": "value", "default": "None"},
    "max_running_requests": {"options": ["--max-running-requests"], "takes": "value", "default": "None"},
    "host": {"options": ["--host"], "takes": "value", "default": "None"},
    "port": {"options": ["--port"], "takes": "value", "default": "None"},
    "random_seed": {"options": ["--random-seed"], "takes": "value", "default": "None"},
    "custom_weight_loader": {"options": ["--custom-weight-loader"], "takes": "values", "default": "None"},
    "speculative_algorithm": {"options": ["--speculative-algorithm"], "takes": "value", "default": "None"},
    "speculative_draft_model_path": {
        "options": ["--speculative-draft-model-path"],
        "takes": "value",
        "default": "None",
    },
    "speculative_num_steps": {"options": ["--speculative-num-steps"], "takes": "value", "default": "None"},
    "speculative_eagle_topk": {"options": ["--speculative-eagle-topk"], "takes": "value", "default": "None"},
    "speculative_num_draft_tokens": {
        "options": ["--speculative-num-draft-tokens"],
        "takes": "value",
        "default": "None",
    },
    "speculative_use_rejection_sampling": {
        "options": ["--speculative-use-rejection-sampling"],
        "takes": "none",
        "default": "False",
    },
    "speculative_adaptive": {"options": ["--speculative-adaptive"], "takes": "none", "default": "False"},
    "speculative_adaptive_config": {
        "options": ["--speculative-adaptive-config"],
        "takes": "value",
        "default": "None",
    },
    "speculative_draft_load_format": {
        "options": ["--speculative-draft-load-format"],
        "takes": "value",
        "default": "None",
    },
    "speculative_token_map": {"options": ["--speculative-token-map"], "takes": "value", "default": "None"},
    "enable_memory_saver": {"options": ["--enable-memory-saver"], "takes": "none", "default": "False"},
    "enable_weights_cpu_backup": {"options": ["--enable-weights-cpu-backup"], "takes": "none", "default": "False"},
    "enable_draft_weights_cpu_backup": {
        "options": ["--enable-draft-weights-cpu-backup"],
        "takes": "none",
        "default": "False",
    },
    "mem_fraction_static": {"options": ["--mem-fraction-static"], "takes": "value", "default": "None"},
    "tp_size": {"options": ["--tp-size"], "takes": "value", "default": "None"},
    "log_level": {"options": ["--log-level"], "takes": "value", "default": "None"},
    "disable_radix_cache": {"options": ["--disable-radix-cache"], "takes": "none", "default": "False"},
}
"""What `--flags` answers with."""


@dataclass
class Faults:
    """What goes wrong; every field may be set while the server runs."""

    late_s: float = 0.0
    """Time until `/generate` answers."""
    late_tokens_s: float = 0.0
    """Time a token takes; an abort ends the request between two."""
    late_health_s: float = 0.0
    """Time until `/health` and `/health_generate` answer."""
    busy: int = 0
    """Answers of `/generate` that will be `busy_status`, counted down."""
    busy_status: int = 503
    drop: tuple[str, ...] = ()
    """Keys left out of `meta_info`."""
    unhealthy: bool = False
    """Health is answered with 503."""
    hang_up: int = 0
    """Requests to `/generate` whose connection is closed without an answer, counted down."""
    die_after: int | None = None
    """The process exits (the server in a thread closes its port) after this many more calls of `/generate`."""
    wrong_length: bool = False
    """One log-probability less than tokens."""
    refuse: tuple[str, ...] = ()
    """Paths answered with 400 and a message."""
    no_loader: bool = False
    """The doorbell answers at once and rings nobody."""
    flush_busy: int = 0
    """Answers of `/flush_cache` that say that requests run, counted down."""
    compile_s: float = 0.0
    """For this long nothing is answered when greedy and sampled requests first run together; a probe of the health
    counts as a greedy one."""
    exit_at_start: str = ""
    """The script writes this to its log and exits with status 3."""


@dataclass
class FakeSGLang:
    """One server in threads of this process; `url` is where it answers after `start`."""

    version: str = "0.5.21"
    api_key: str = ""
    admin_key: str = ""
    depth: int = 3
    """Drafted tokens per block; 0 is without speculation. Every verify step accepts as many as it can of the pattern
    1, 0, 2 (at most `depth`)."""
    host: str = "127.0.0.1"
    port: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    """More keys of `/server_info`."""
    ring: Callable[[int, dict[str, Any]], None] = lambda rank, bell: None
    """Stands in for the loader of each rank: gets the doorbell's JSON; the call answers when all have returned. See
    `FakeLoader`."""
    faults: Faults = field(default_factory=Faults)
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path and JSON body of every call that its key allowed."""
    refused: int = 0
    """Calls with a wrong key."""
    guarded: bool = False
    """Whether `/server_info` wants the admin key, as of servers that our launch script starts."""
    exit: Callable[[], None] | None = None
    """How it dies; None closes the port."""

    def __post_init__(self) -> None:
        self.running: dict[str, threading.Event] = {}
        """Requests that run, by their `rid`; an event that is set aborts one."""
        self.most_running = 0
        self.lock = threading.Lock()
        self.compiling = threading.Lock()
        self.server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def selector(self) -> bool:
        """Whether this version has `/begin_weight_update`."""
        return tuple(int(x) for x in self.version.split(".")[:3]) >= (0, 5, 21)

    def start(self) -> FakeSGLang:
        fake = self

        class Handler(_Handler):
            owner = fake

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *args: Any) -> None:
                pass  # a client that goes away is part of the tests

        self.server = Server((self.host, self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Closes the port and ends what runs; open connections are dropped at their next use."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        self.abort("")

    def paths(self) -> list[str]:
        """The paths called, in order, health and information left out."""
        quiet = NORMAL - {"/generate"} | {"/health", "/health_generate"}
        return [path for _, path, _ in self.calls if path not in quiet]

    def abort(self, prefix: str) -> None:
        """Ends running requests whose id starts with `prefix`, as SGLang matches them."""
        with self.lock:
            for rid, event in self.running.items():
                if rid.startswith(prefix):
                    event.set()

    def die(self) -> None:
        if self.exit is not None:
            self.exit()
        threading.Thread(target=self.stop, daemon=True).start()
        raise _Gone


class _Gone(Exception):
    """The connection is closed without an answer."""


class _Tensor:
    def __init__(self, data: bytes) -> None:
        self.data = data


class _Bell(pickle.Unpickler):
    """Reads a doorbell as SGLang would, without torch, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != ("torch", "ByteTensor"):
            raise pickle.UnpicklingError(f"a doorbell holds a torch.ByteTensor, not {module}.{name}")
        return lambda numbers: _Tensor(bytes(numbers))


def read_bell(serialized: str) -> dict[str, Any]:
    """The JSON in one rank's entry of `serialized_named_tensors`."""
    ((name, tensor),) = _Bell(io.BytesIO(base64.b64decode(serialized))).load()
    assert name == "miles_spec"
    return json.loads(tensor.data)


@dataclass
class FakeLoader:
    """A loader without a model: `FakeSGLang(ring=FakeLoader(...))`. It says that it serves what was loaded last."""

    digests: dict[str, str] = field(default_factory=dict)
    """What every rank says it serves."""
    other_digests: dict[int, dict[str, str]] = field(default_factory=dict)
    """What some ranks say instead."""
    faults: dict[str, Any] = field(default_factory=dict)
    """By command: a sentence that is its answer, a list of sentences for `learn`, or seconds by which it is late."""
    hang_up_at: str = ""
    """Command at which the connection is closed."""
    commands: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    """Rank, role and command of everything that was asked."""
    open: int = 0
    """Loaders that run."""
    learned: set[str] | None = None
    """Roles that it has learned in this process; it takes no other, as the real one. None is all."""

    def __call__(self, rank: int, bell: dict[str, Any]) -> None:
        from miles_spec.sync.wire import connect

        host, port = bell["address"]
        self.open += 1
        try:
            channel, idle_s = connect((host, port), token=bell["token"], session=bell["session"], rank=rank)
            try:
                while self.answer(channel, idle_s, rank, bell["role"]):
                    pass
            finally:
                channel.close()
        except (ConnectionError, TimeoutError):
            pass  # as the real one, which must never raise
        finally:
            self.open -= 1

    def answer(self, channel: Any, idle_s: float, rank: int, role: str) -> bool:
        command = channel.receive(idle_s)
        do, role = command["do"], command.get("role", role)
        self.commands.append((rank, role, command))
        if do == self.hang_up_at:
            return False
        fault = self.faults.get(do)
        if isinstance(fault, float):
            time.sleep(fault)
        content: dict[str, Any] = {"ok": True}
        if isinstance(fault, str):
            content = {"fault": fault}
        elif do in ("load", "digest") and self.learned is not None and role not in self.learned:
            content = {"fault": f"the places of the {role}'s tensors are not known; learn them first"}
        elif do == "learn":
            if self.learned is not None:
                self.learned.add(role)
            content["served"] = {name: [dtype, shape] for name, dtype, shape in command["tensors"]}
            content["faults"] = fault if isinstance(fault, list) else []
        elif do == "digest":
            content["digests"] = self.other_digests.get(rank, self.digests)
        channel.send(content, 10.0)
        return do != "end"


class _Handler(BaseHTTPRequestHandler):
    owner: FakeSGLang
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_call()

    def do_POST(self) -> None:
        self.handle_call()

    def handle_call(self) -> None:
        fake = self.owner
        if fake.server is None:  # stopped: a connection that was kept open serves no more
            self.close_connection = True
            return
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        if not path.startswith("/health"):
            admin = path in ADMIN or (fake.guarded and path in ("/server_info", "/get_server_info"))
            key = fake.admin_key or fake.api_key if admin else fake.api_key
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                fake.refused += 1
                self.answer(401, {"error": "Unauthorized"})
                return
        body = json.loads(data) if data else None
        with fake.lock:
            fake.calls.append((self.command, path, body))
        if path in fake.faults.refuse:
            self.answer(400, {"success": False, "message": f"the fake refuses {path}"})
            return
        try:
            self.answer(*self.result(path, body))
        except _Gone:
            self.close_connection = True

    def answer(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.end_headers()
        self.wfile.write(data)

    def result(self, path: str, body: Any) -> tuple[int, Any]:
        fake, faults = self.owner, self.owner.faults
        match path:
            case "/health" | "/health_generate":
                time.sleep(faults.late_health_s)
                if path == "/health_generate" and fake.running:
                    self.compile()
                with fake.compiling:
                    pass
                return (503 if faults.unhealthy else 200), ""
            case "/openapi.json":
                paths = ADMIN | NORMAL
                if not fake.selector:
                    paths = paths - {"/begin_weight_update", "/end_weight_update"}
                return 200, {"paths": {p: {} for p in sorted(paths)}}
            case "/server_info" | "/get_server_info":
                return 200, self.information()
            case "/model_info":
                return 200, {"model_path": "fake", "is_generation": True}
            case "/generate":
                return self.generate(body)
            case "/abort_request":
                fake.abort("" if body.get("abort_all") else body["rid"])
                return 200, ""
            case "/flush_cache":
                if faults.flush_busy > 0 or fake.running:
                    faults.flush_busy -= 1
                    return 400, "Flush cache failed. Pending requests: 1.\n"
                return 200, "Cache flushed.\n"
            case "/freeze_gc":
                return 200, "Garbage collection frozen.\n"
            case "/update_weights_from_tensor":
                if not faults.no_loader:
                    bells = [read_bell(serialized) for serialized in body["serialized_named_tensors"]]
                    ranks = [threading.Thread(target=fake.ring, args=(i, bell)) for i, bell in enumerate(bells)]
                    for rank in ranks:
                        rank.start()
                    for rank in ranks:
                        rank.join()
                return 200, {"success": True, "message": "Success"}
            case "/begin_weight_update" | "/end_weight_update" if fake.selector:
                return 200, {"success": True, "message": "Success"}
            case "/pause_generation" | "/continue_generation":
                return 200, {"status": "ok"}
            case "/release_memory_occupation" | "/resume_memory_occupation":
                return 200, "null"
        return 404, {"detail": "Not Found"}

    def information(self) -> dict[str, Any]:
        fake = self.owner
        speculation = {
            "speculative_algorithm": "EAGLE" if fake.depth else None,
            "speculative_num_steps": fake.depth or None,
            "speculative_num_draft_tokens": fake.depth + 1 if fake.depth else None,
            "speculative_eagle_topk": 1 if fake.depth else None,
        }
        exact = {"speculative_accept_threshold_single": 1.0, "speculative_accept_threshold_acc": 1.0}
        defaults = {"tp_size": 1, "dp_size": 1, "pp_size": 1, "context_length": 256, "max_running_requests": 8}
        defaults |= {"device": "cuda", "max_total_num_tokens": 4096}
        loader = {"custom_weight_loader": ["miles_spec.sync.loader.load"]}
        return {"version": fake.version} | defaults | loader | speculation | exact | fake.info

    def compile(self) -> None:
        """What the first batch of both kinds waits for."""
        with self.owner.compiling:
            seconds, self.owner.faults.compile_s = self.owner.faults.compile_s, 0.0
            time.sleep(seconds)

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        fake, faults = self.owner, self.owner.faults
        if isinstance(body["sampling_params"], list):
            if len({bool(kind["temperature"]) for kind in body["sampling_params"]}) == 2:
                self.compile()
            rows = zip(body["input_ids"], body["sampling_params"], strict=True)
            return 200, [
                self.decode({"rid": str(i), "input_ids": ids, "sampling_params": kind}, threading.Event())
                for i, (ids, kind) in enumerate(rows)
            ]
        with fake.lock:
            if faults.die_after is not None:
                faults.die_after -= 1
                if faults.die_after < 0:
                    faults.die_after = None
                    fake.die()
            if faults.hang_up > 0:
                faults.hang_up -= 1
                raise _Gone
            if faults.busy > 0:
                faults.busy -= 1
                return faults.busy_status, {"error": {"message": "The request queue is full."}}
            rid = body["rid"]
            if rid in fake.running:
                return 400, {"error": {"message": f"Duplicate request ID detected: {rid}"}}
            fake.running[rid] = threading.Event()
            fake.most_running = max(fake.most_running, len(fake.running))
        try:
            return 200, self.decode(body, fake.running[rid])
        finally:
            with fake.lock:
                del fake.running[rid]

    def decode(self, body: dict[str, Any], aborted: threading.Event) -> dict[str, Any]:
        fake, faults = self.owner, self.owner.faults
        if faults.late_s:
            aborted.wait(faults.late_s)
        params = body["sampling_params"]
        output: list[int] = []
        reason: dict[str, Any] = {"type": "length", "length": params["max_new_tokens"]}
        for i in range(params["max_new_tokens"]):
            with fake.compiling:
                pass
            if aborted.is_set() or aborted.wait(faults.late_tokens_s):
                reason = {"type": "abort", "message": "Abort in waiting queue" if not output else "Aborted"}
                break
            output.append(body["input_ids"][-1] + 1 + i)
            if output[-1] in (params.get("stop_token_ids") or ()):
                reason = {"type": "stop", "matched": output[-1]}
                break
        if fake.server is None:
            raise _Gone
        meta: dict[str, Any] = {
            "id": body["rid"],
            "finish_reason": reason,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(output),
            "num_retractions": 0,
            "cached_tokens": 0,
            "weight_version": "default",
        }
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[-0.25 * (1 + i % 4), token, None] for i, token in enumerate(output)]
            meta["output_token_logprobs"] = meta["output_token_logprobs"][int(faults.wrong_length) :]
        if fake.depth:
            meta |= self.counters(len(output))
        if reason.get("message") == "Abort in waiting queue":
            meta = {k: meta[k] for k in ("id", "finish_reason", "weight_version", "completion_tokens")}
            meta["output_token_logprobs"] = []
        meta = {k: v for k, v in meta.items() if k not in faults.drop}
        return {"text": " ".join(map(str, output)), "output_ids": output, "meta_info": meta}

    def counters(self, tokens: int) -> dict[str, Any]:
        """SGLang's counts for a response of `tokens`; like SGLang's they include what was cut off at its end."""
        histogram: list[int] = []
        made = 1
        while made < tokens:
            correct = min((1, 0, 2)[sum(histogram) % 3], self.owner.depth)
            histogram += [0] * (correct + 1 - len(histogram))
            histogram[correct] += 1
            made += correct + 1
        if not histogram:
            return {}
        return {
            "spec_verify_ct": sum(histogram),
            "spec_num_correct_drafts": sum(i * n for i, n in enumerate(histogram)),
            "spec_correct_drafts_histogram": histogram,
        }


@contextmanager
def serving(**settings: Any) -> Iterator[FakeSGLang]:
    """A fake that runs for the length of the block."""
    fake = FakeSGLang(**settings).start()
    try:
        yield fake
    finally:
        fake.stop()


COMMAND = (sys.executable, str(Path(__file__).resolve()))
"""Starts the fake as a process, as `fleet.launch` would start SGLang."""


def main() -> None:
    """A process of its own. Beside the keys it reads `FAKE_SGLANG`: JSON of `Faults`, of `version` and `start_s`, and
    of `adaptive`, which is false for one that drafts for any number of sequences whatever it is told, and of
    `last_words`, which it prints as it ends."""
    if sys.argv[1:2] == ["--flags"]:
        print(json.dumps({"version": "0.5.21", "flags": FLAGS, "platforms": ["cuda"]}))
        return
    settings = json.loads(os.environ.get("FAKE_SGLANG", "{}"))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--speculative-num-steps", type=int, default=0)
    parser.add_argument("--speculative-adaptive", action="store_true")
    known, rest = parser.parse_known_args()
    print(f"the fake starts with {rest}", flush=True)
    version, start_s = settings.pop("version", "0.5.21"), settings.pop("start_s", 0.0)
    adaptive = settings.pop("adaptive", True) and known.speculative_adaptive
    atexit.register(print, settings.pop("last_words", ""), flush=True)
    faults = Faults(**settings)
    if faults.exit_at_start:
        print(faults.exit_at_start, flush=True)
        sys.exit(3)
    time.sleep(start_s)
    fake = FakeSGLang(
        version=version,
        api_key=os.environ.get("MILES_SPEC_API_KEY", ""),
        admin_key=os.environ.get("MILES_SPEC_ADMIN_KEY", ""),
        depth=known.speculative_num_steps,
        host=known.host,
        port=known.port,
        faults=faults,
        guarded=True,
        exit=lambda: os._exit(9),
        info={"speculative_adaptive": adaptive},
    )
    fake.start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
