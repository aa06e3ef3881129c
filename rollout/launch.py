"""The script that runs in an SGLang server's process: takes the keys from its environment and runs SGLang's server.

    python -m miles_spec.rollout.launch [SGLang's own arguments]
    python -m miles_spec.rollout.launch --flags

The second form starts nothing and prints, as one line of JSON, the installed version, the arguments it knows and the
platforms it runs on. A launch command of one's own (`fleet.launch`) prepares what it must and ends in `main()`.

Invariant: the keys stand in no argument list, log or environment of a child process, and the server's processes end
with the process that started them, however it ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

API_KEY = "MILES_SPEC_API_KEY"
"""Environment variable of the key for generation."""
ADMIN_KEY = "MILES_SPEC_ADMIN_KEY"
"""Environment variable of the key for weights, memory and everything else that changes a server."""
PARENT = "MILES_SPEC_PARENT"
"""Environment variable with the process id of who starts the server; without it the server outlives its starter."""


class Secret(str):
    """A string that shows itself as `***`: SGLang logs its arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def watch_parent(interval_s: float = 0.5) -> None:
    """Ends this process and its group as soon as the process named by `PARENT` is gone; does nothing without a name.

    Not PR_SET_PDEATHSIG: that one fires when the *thread* ends that started the process, and servers are restarted
    from threads.
    """
    named = os.environ.pop(PARENT, "")
    if not named:
        return
    first = os.getppid()

    def watch() -> None:
        # a launch command may put a shell between; then the shell's end is what is seen
        while os.getppid() == first and (first == int(named) or _exists(int(named))):
            time.sleep(interval_s)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def take_keys() -> tuple[Secret | None, Secret | None]:
    """The API key and the admin key, removed from the environment; None where there is none."""
    api, admin = os.environ.pop(API_KEY, ""), os.environ.pop(ADMIN_KEY, "")
    return Secret(api) if api else None, Secret(admin) if admin else None


def describe() -> dict[str, Any]:
    """What `--flags` prints: `version`; `flags`, which has for each argument's name its options, whether it takes a
    value (`value`, `values` or `none`) and its default as text; `platforms`, of SGLang's own names."""
    import argparse

    import sglang.srt.utils as utils
    from sglang.srt.server_args import ServerArgs
    from sglang.version import __version__

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    # several options may set one argument: the one of its own name comes last and counts
    actions = [action for action in parser._actions if action.option_strings]
    actions.sort(key=lambda action: f"--{action.dest.replace('_', '-')}" in action.option_strings)
    flags = {
        action.dest: {
            "options": list(action.option_strings),
            "takes": "none" if action.nargs == 0 else "values" if action.nargs in ("*", "+") else "value",
            "default": str(action.default),
        }
        for action in actions
    }
    platforms = [name for name in ("cpu", "cuda", "hip", "npu", "xpu") if getattr(utils, f"is_{name}")()]
    return {"version": __version__, "flags": flags, "platforms": platforms}


def serve(argv: Sequence[str]) -> None:
    """Runs SGLang's server in this process until it ends."""
    watch_parent()
    api_key, admin_key = take_keys()

    import sglang.srt.entrypoints.http_server as http_server
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree
    from sglang.srt.utils.auth import AuthLevel

    from miles_spec.sync.loader import show_stacks

    show_stacks()
    # these two return every argument of the server, the admin key included
    for endpoint in (http_server.server_info, http_server.get_server_info):
        endpoint._auth_level = AuthLevel.ADMIN_OPTIONAL
    arguments = prepare_server_args(list(argv))
    for name, key in (("api_key", api_key), ("admin_api_key", admin_key)):
        try:
            setattr(arguments, name, key)
        except AttributeError:  # 0.5.17's dataclass refuses assignment, later ones are no dataclasses
            object.__setattr__(arguments, name, key)
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def main(argv: Sequence[str] | None = None) -> None:
    """`--flags` or a server, by the arguments (this process's own if None)."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--flags"]:
        print(json.dumps(describe()), flush=True)
    else:
        serve(argv)


if __name__ == "__main__":
    # under its own name, not `__main__`: SGLang's child processes unpickle `Secret` by it
    from miles_spec.rollout.launch import main as run

    run()
