"""One address in front of several servers: the package `sglang-router`, in a process of its own.

    python -m miles_spec.rollout.router [the router's own arguments]

Invariant: the servers' key stands in the process's environment alone, and the process ends with the one that started
it. A request has to show the router that same key.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from miles_spec.rollout.launch import take_keys, watch_parent
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.rollout.sglang_process import ServerProcess, environment, free_port, url_of
from miles_spec.types import RunError


def available() -> bool:
    """Whether this Python has the package."""
    return importlib.util.find_spec("sglang_router") is not None


class Router:
    """Keeps one address over servers that change theirs."""

    def __init__(self, keys: Keys, folder: Path, host: str, timeout_s: float = 120.0) -> None:
        """Listens on `host` once there are servers; `keys` are the servers', its log is written into `folder`."""
        self.url = ""
        self.servers: tuple[str, ...] = ()
        """Addresses that it passes requests on to."""
        self._keys, self._log = keys, folder / "router.log"
        self._host, self._timeout_s = host, timeout_s
        self._port = 0
        self._process: ServerProcess | None = None

    def lead_to(self, servers: Sequence[str]) -> None:
        """Passes requests on to just these from now on; starts anew for that, or if it has died, at the address it had.

        Raises `RunError` with the end of its log if it does not come up.
        """
        running = self._process is not None and self._process.status() is None
        if running and set(servers) == set(self.servers):
            return
        self.stop()
        self._port = self._port or free_port(self._host)
        self.url = url_of(self._host, self._port)
        flags = {
            "--host": self._host,
            "--port": str(self._port),
            "--policy": "cache_aware",
            "--prometheus-host": "127.0.0.1",
            "--prometheus-port": str(free_port("127.0.0.1")),
        }
        command = [sys.executable, "-m", "miles_spec.rollout.router", "--worker-urls", *servers]
        command += [text for pair in flags.items() for text in pair]
        keys = Keys(api=self._keys.api)  # it changes no server
        self._process, self.servers = ServerProcess(command, environment(), keys, self._log), tuple(servers)
        until_s = time.monotonic() + self._timeout_s
        while self._process.status() is None and time.monotonic() < until_s:
            with contextlib.suppress(ConnectionError, TimeoutError):  # not yet
                if Api(self.url, self._keys).call("/readiness", timeout_s=5.0)[0] == 200:
                    return
            time.sleep(0.1)
        last = self._process.last_lines()
        self.stop()
        raise RunError(f"the router at {self.url} did not come up; the end of {self._log}:\n{last}")

    def stop(self) -> None:
        """Ends its process; may be called again."""
        if self._process is not None:
            self._process.stop()
        self._process, self.servers = None, ()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the router in this process until it ends."""
    watch_parent()
    key, _ = take_keys()
    from sglang_router.launch_router import (  # type: ignore[import-not-found]
        launch_router,
        parse_router_args,
    )

    arguments = parse_router_args(list(sys.argv[1:] if argv is None else argv))
    arguments.api_key = key and str(key)  # it is given to a library that wants a plain string
    launch_router(arguments)


if __name__ == "__main__":
    main()
