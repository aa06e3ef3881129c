"""The script in a server's process, run as a process against a package that only looks like SGLang."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles_spec.rollout.launch import ADMIN_KEY, API_KEY, PARENT, Secret, take_keys

ROOT = Path(__file__).parents[2]
SGLANG = {
    "__init__.py": "",
    "version.py": "__version__ = '0.5.17'",
    "launch_server.py": """
import json, multiprocessing, os, sys

def child(secret, queue):
    queue.put([os.environ.get("MILES_SPEC_API_KEY"), repr(secret), str(secret), open("/proc/self/cmdline").read()])

def run_server(arguments):
    import sglang.srt.entrypoints.http_server as server
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(arguments.api_key, queue))
    process.start()
    print(json.dumps({
        "argv": arguments.argv, "child": queue.get(timeout=60), "shown": repr(arguments),
        "keys": [arguments.api_key, arguments.admin_api_key],
        "levels": [server.server_info._auth_level, server.get_server_info._auth_level],
        "environment": sorted(k for k in os.environ if k.startswith("MILES_SPEC")),
    }), flush=True)
    process.join()
""",
    "srt/__init__.py": "",
    "srt/entrypoints/__init__.py": "",
    "srt/entrypoints/http_server.py": "def server_info(): pass\ndef get_server_info(): pass",
    "srt/utils/__init__.py": """
def kill_process_tree(pid, include_parent): print("children killed", flush=True)
def is_cpu(): return False
def is_cuda(): return True
is_hip = is_npu = is_xpu = is_cpu
""",
    "srt/utils/auth.py": "class AuthLevel:\n    ADMIN_OPTIONAL = 'admin'",
    "srt/server_args.py": """
import dataclasses, os

@dataclasses.dataclass
class ServerArgs:
    argv: list
    api_key: str = None
    admin_api_key: str = None

    def __setattr__(self, name, value):
        if os.environ.get("READ_ONLY") and "argv" in self.__dict__ and "admin_api_key" in self.__dict__:
            raise AttributeError(f"server_args.{name} assigned after resolution")
        object.__setattr__(self, name, value)

    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path", "--model")
        parser.add_argument("--enable-x", action="store_true")
        parser.add_argument("--custom-weight-loader", nargs="*")

def prepare_server_args(argv):
    return ServerArgs(argv)
""",
}
WATCH = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from miles_spec.rollout.launch import watch_parent
import subprocess
watch_parent(0.05)
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
time.sleep(60)
"""
PARENT_PROGRAM = f"""
import os, subprocess, sys, threading
variables = {{**os.environ, {PARENT!r}: str(os.getpid())}}
def start():
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=variables, start_new_session=True,
                             stdout=subprocess.PIPE, text=True)
    print(child.pid, child.stdout.readline(), flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
sys.stdin.read()
"""


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    for name, text in SGLANG.items():
        path = tmp_path / "sglang" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    return {**os.environ, "PYTHONPATH": path, API_KEY: "the-api-key", ADMIN_KEY: "the-admin-key"}


def run(variables: dict[str, str], *argv: str) -> list[str]:
    command = [sys.executable, "-m", "miles_spec.rollout.launch", *argv]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("read_only", ["", "1"])
def test_the_keys_reach_the_server_and_nobody_else(variables: dict[str, str], read_only: str) -> None:
    """Also where the arguments refuse to be assigned to, as those of 0.5.17 do."""
    told, killed = run({**variables, "READ_ONLY": read_only}, "--model-path", "/m")
    seen = json.loads(told)
    assert seen["argv"] == ["--model-path", "/m"]
    assert seen["keys"] == ["the-api-key", "the-admin-key"] and seen["environment"] == []
    assert "the-" not in seen["shown"] and "***" in seen["shown"]
    environment, shown, value, command = seen["child"]
    assert (environment, shown, value) == (None, "'***'", "the-api-key") and "the-" not in command
    assert killed == "children killed"


def test_what_returns_the_keys_wants_the_admin_key(variables: dict[str, str]) -> None:
    assert json.loads(run(variables)[0])["levels"] == ["admin", "admin"]


def test_flags_tell_version_arguments_and_platforms(variables: dict[str, str]) -> None:
    (line,) = run(variables, "--flags")
    told = json.loads(line)
    assert told["version"] == "0.5.17" and told["platforms"] == ["cuda"]
    assert told["flags"]["enable_x"] == {"options": ["--enable-x"], "takes": "none", "default": "False"}
    assert told["flags"]["model_path"]["options"] == ["--model-path", "--model"]
    assert told["flags"]["custom_weight_loader"]["takes"] == "values"


def test_a_secret_hides_and_stays_itself() -> None:
    secret = Secret("abc")
    assert "abc" not in f"{secret!r} {[secret]}" and secret == "abc" and json.dumps(secret) == '"abc"'
    assert pickle.loads(pickle.dumps(secret)) == "abc"


def test_without_keys_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    monkeypatch.setenv(ADMIN_KEY, "x")
    assert take_keys() == (None, "x") and ADMIN_KEY not in os.environ


def exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # what nobody reaps stays as a zombie


def test_the_server_and_its_children_end_with_the_trainer() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_PROGRAM, WATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    try:
        assert len(pids) == 2
        time.sleep(0.3)  # the thread that started it has ended long ago
        assert all(map(exists, pids))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        until_s = time.monotonic() + 10
        while any(map(exists, pids)) and time.monotonic() < until_s:
            time.sleep(0.05)
        assert not any(map(exists, pids))
    finally:
        parent.kill()
        for pid in filter(exists, pids):
            os.kill(pid, signal.SIGKILL)
