"""The processes of one run: how many there are, and how those beyond the first are started and end.

Invariant: a process that this one started does not outlive it; what it writes goes to its own log, never to the
terminal.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from miles_spec.config import RunConfig

COMMAND = (sys.executable, "-m", "miles_spec.cli")
"""What a further process runs, with the arguments of the first."""
END_S = 30.0
"""For them to end once the run has ended well."""
END_AFTER_ERROR_S = 2.0

_RANK = "RANK"
_PARENT = "MILES_SPEC_PARENT"
"""Process that started this one as a further rank."""


def rank() -> int:
    """Which of a run's processes this is; known until it has joined the others, and 0 from then on."""
    return int(os.environ.get(_RANK, "0"))


def count(config: RunConfig) -> int:
    """Processes of the run: those that torchrun or `started` started, else `train.ranks`.

    Raises `ValueError` if both say something else.
    """
    train = config.train
    given = int(os.environ["WORLD_SIZE"]) if _RANK in os.environ else 0
    if given and train.ranks not in (1, given):
        raise ValueError(f"train.ranks is {train.ranks}, and {given} processes were started: give {given}, or 1")
    return given or train.ranks


@contextmanager
def started(config: RunConfig, arguments: Sequence[str]) -> Iterator[None]:
    """Makes this process rank 0 of `train.ranks`, and starts the others with the same command line `arguments`.

    Does nothing for one rank, or where torchrun has started them all. All find their places in the environment, as
    torchrun gives them. The others are in sessions of their own: rank 0 alone gets the terminal's Ctrl-C.
    """
    size = count(config)
    if parent := os.environ.pop(_PARENT, ""):
        threading.Thread(target=_stay_with, args=(int(parent),), name="stay-with-rank-0", daemon=True).start()
    if size == 1 or _RANK in os.environ:
        yield
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    own = {_PARENT: str(os.getpid())}
    children: dict[int, subprocess.Popen[bytes]] = {}
    wait_s = END_AFTER_ERROR_S
    try:
        for other in range(1, size):
            children[other] = subprocess.Popen(
                [*COMMAND, *arguments],
                env={**os.environ, **shared, **own, _RANK: str(other), "LOCAL_RANK": str(other)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        os.environ.update({**shared, _RANK: "0", "LOCAL_RANK": "0"})
        threading.Thread(target=_watch, args=(children,), name="watch-ranks", daemon=True).start()
        yield
        wait_s = END_S
    finally:
        deadline = time.monotonic() + wait_s
        for child in children.values():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _watch(children: dict[int, subprocess.Popen[bytes]]) -> None:
    """Ends this process if another one ends before all have met, where this one would wait for half an hour."""
    while _RANK in os.environ:
        for number, child in children.items():
            if (status := child.poll()) is not None:
                print(f"miles-spec: error: rank {number} ended with status {status} at its start", file=sys.stderr)
                for other in children.values():
                    other.kill()
                os._exit(2)
        time.sleep(0.2)


def _stay_with(parent: int) -> None:
    """Ends this process with the one that started it, as long as they have not met; then `Ranks` sees to it."""
    while _RANK in os.environ:
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(0.2)


def call(*arguments: str, cwd: Path) -> None:
    """Runs this package's command with other arguments, to its end; a SIGTERM to this process, which has to be called
    from its main thread, ends both.

    Raises `subprocess.CalledProcessError` if it fails.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        subprocess.run([*COMMAND, *arguments], check=True, cwd=cwd)
    finally:
        signal.signal(signal.SIGTERM, before)


def log_to(path: Path) -> None:
    """Sends all that this process writes from now on to the end of a file, and this package's log with it.

    Raises `OSError` if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("miles_spec").setLevel(logging.INFO)
