"""A server's process: its environment, its log, and its end.

Invariant: nothing of it outlives `stop`, and the keys stand in its environment alone.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import miles_spec
from miles_spec.rollout.launch import ADMIN_KEY, API_KEY, PARENT
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.sync.loader import STACKS
from miles_spec.types import RunError

log = logging.getLogger(__name__)

LAUNCH = (sys.executable, "-m", "miles_spec.rollout.launch")
"""The command that starts a server where the run file names none."""
STARTS = 3
"""Attempts to start when another process took the port meanwhile."""
PORTS = range(20000, 32768)
"""Below those that Linux and others give away unasked."""
STACKS_S = 0.5
"""For a process to write its stacks."""
_PORT_TAKEN = re.compile(r"address already in use|port \d+ is (not available|already in use)", re.IGNORECASE)

_NOT_INHERITED = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "SGLANG_API_KEY", API_KEY, ADMIN_KEY)
"""The allocator's settings are the trainer's; with expandable segments a server could not release its memory."""


def environment(gpus: Sequence[int] = ()) -> dict[str, str]:
    """The variables of a server's process, without its keys; `gpus` are indices into those this process may see."""
    variables = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    folder = _alone()
    inherited = variables.get("PYTHONPATH", "")
    variables["PYTHONPATH"] = f"{folder}{os.pathsep}{inherited}" if inherited else folder
    # a context a little longer than the model's is asked for, so that the last tokens have room for a drafted block
    variables["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    variables["TQDM_DISABLE"] = "1"  # progress bars make a log unreadable
    # /health would generate a token, also while the memory that needs is released
    variables["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    if gpus:
        visible = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if visible and max(gpus) >= len(visible):
            raise ValueError(f"GPU {max(gpus)} is asked for, but CUDA_VISIBLE_DEVICES names {len(visible)}")
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] if visible else str(i) for i in gpus)
    return variables


@cache
def _alone() -> str:
    """A folder that holds this package alone: the one it is installed in may hold a torch that is not the server's."""
    folder = tempfile.mkdtemp(prefix="miles-spec-python-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "miles_spec").symlink_to(Path(miles_spec.__file__).resolve().parent, target_is_directory=True)
    return folder


def free_port(host: str) -> int:
    """A port that nobody listens on now; somebody may before it is used.

    A server takes its port last, after a minute in which others open many. So it is none of those that systems give to
    who asks for any, unless `PORTS` are in use. Raises `RunError` for a host that is not this machine's.
    """
    fault: OSError | None = None
    for port in [*random.SystemRandom().sample(PORTS, 100), 0]:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                fault = error
            else:
                return int(probe.getsockname()[1])
    raise RunError(f"nothing can listen on {host!r}: {fault}")


def url_of(host: str, port: int) -> str:
    """How this machine calls what listens on `host`."""
    called = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{called}]:{port}" if ":" in called else f"http://{called}:{port}"


class ServerProcess:
    """One process with its children, in a process group of its own; standard output and errors go to `log`, which only
    the user can read."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], keys: Keys, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_name(f"{log.name}.before"))  # what it says of why the last one ended
        given = {API_KEY: keys.api, ADMIN_KEY: keys.admin, PARENT: str(os.getpid())}
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # the file may have been there
            self._process = subprocess.Popen(
                list(command),
                env={**variables, **given},
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        atexit.register(self.stop, 0.0)

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def last_lines(self, count: int = 30) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 64 * 1024))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
        return ""

    def dump_stacks(self) -> int:
        """Has the processes of the group write the Python stacks of their threads to the log; how many were asked.

        Those that handle `STACKS`, which are the server's own and, from the first push on, those with a part of the
        model; one after the other, `STACKS_S` apart, since the log would mix what they write at once.
        """
        asked = 0
        for pid in _members(self.pid):
            with contextlib.suppress(OSError):
                if _handles(pid, STACKS):  # of any other it would be the end
                    os.kill(pid, STACKS)
                    asked += 1
                    time.sleep(STACKS_S)
        return asked

    def stop(self, grace_s: float = 5.0) -> None:
        """Ends it and all of its children: asks, waits `grace_s`, then kills. May be called again, from any thread."""
        if grace_s and self.status() is None:
            self._process.terminate()  # it alone: SGLang takes a child that ends first for a crash
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self._signal(signal.SIGKILL)  # the children too, whether or not their parent has ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        # their memory is free only once they are gone; a process that nobody reaps stays in the group
        until_s = time.monotonic() + 2
        while self._signal(0) and time.monotonic() < until_s:
            time.sleep(0.02)
        atexit.unregister(self.stop)

    def _signal(self, number: int) -> bool:
        """False if the group has no process left."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def _members(group: int) -> list[int]:
    """The processes of a group; none where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ProcessLookupError):
            if os.getpgid(int(entry.name)) == group:
                found.append(int(entry.name))
    return found


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def start_server(
    command: Callable[[int], Sequence[str]],
    variables: Mapping[str, str],
    keys: Keys,
    path: Path,
    *,
    host: str,
    timeout_s: float,
    started: Callable[[ServerProcess, str], None],
) -> None:
    """Starts a server on a free port of `host` and returns when it answers; `command` makes its argument list from the
    port, `path` is its log. `started` is told of the process and its address, before anything is waited for.

    Raises `RunError` with the end of the log if it exits or does not come up in time; its processes are gone then.
    """
    until_s = time.monotonic() + timeout_s
    for attempt in range(1, STARTS + 1):
        port = free_port(host)
        url = url_of(host, port)
        process = ServerProcess(command(port), variables, keys, path)
        started(process, url)
        fault = _wait(process, url, keys, until_s)
        if not fault:
            return
        # much may stand behind it: SGLang still warms up, and says why that fails
        taken = process.status() is not None and _PORT_TAKEN.search(process.last_lines(1000))
        last = process.last_lines()
        process.stop(0.0)
        if not taken or attempt == STARTS:
            raise RunError(f"{fault}; the end of {path}:\n{last}")
        log.warning("port %d was taken meanwhile; %s is started again", port, path.stem)


def _wait(process: ServerProcess, url: str, keys: Keys, until_s: float) -> str:
    """Why the server did not come up; "" once it answers."""
    api, stranger = Api(url, keys), Api(url, Keys())
    while time.monotonic() < until_s:
        if process.status() is not None:
            return f"exited with status {process.status()} before it was up"
        with contextlib.suppress(ConnectionError, TimeoutError):  # not yet
            status, _ = api.call("/health", timeout_s=5.0)
            # it is ours if our key opens it and none does not: another server may have taken the port
            if status == 200 and api.call("/model_info", timeout_s=5.0)[0] == 200:
                status, _ = stranger.call("/model_info", timeout_s=5.0)
                if status in (401, 403):
                    return ""
        time.sleep(0.1)
    return "was not up in time"
