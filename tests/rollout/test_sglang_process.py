"""A server's process: its environment, its log and its end."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from miles_spec.rollout import sglang_process
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_process import PORTS, ServerProcess, environment, free_port
from miles_spec.types import RunError

KEYS = Keys(api="api-secret", admin="admin-secret")


def test_the_environment_finds_our_package_and_holds_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILES_SPEC_ADMIN_KEY", "another server's")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTHONPATH", "/other")
    variables = environment()
    assert variables["TQDM_DISABLE"] == "1" and variables["PYTHONPATH"].endswith(f"{os.pathsep}/other")
    assert "MILES_SPEC_ADMIN_KEY" not in variables and "PYTORCH_CUDA_ALLOC_CONF" not in variables
    found = [sys.executable, "-c", "import miles_spec; print(miles_spec.__file__)"]
    assert "miles_spec" in subprocess.check_output(found, env=variables, cwd=tmp_path, text=True)


def test_gpus_are_indices_into_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in environment() and environment([1, 3])["CUDA_VISIBLE_DEVICES"] == "1,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-x")
    assert environment([1])["CUDA_VISIBLE_DEVICES"] == "GPU-x" and environment()["CUDA_VISIBLE_DEVICES"] == "4,GPU-x"
    with pytest.raises(ValueError, match="GPU 2 is asked for"):
        environment([2])


def test_a_free_port_can_be_listened_on_and_is_none_that_systems_give_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port("127.0.0.1"))) as taken:
        port = taken.getsockname()[1]
        assert port in PORTS
        monkeypatch.setattr(sglang_process, "PORTS", [port] * 100)
        assert free_port("127.0.0.1") not in (0, port)
    with pytest.raises(RunError, match=r"nothing can listen on '192\.0\.2\.1'"):
        free_port("192.0.2.1")


def test_the_log_is_the_users_alone_and_its_end_can_be_read(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "e0.log"
    log.parent.mkdir()
    log.write_text("of an earlier run")
    log.chmod(0o644)
    program = "import sys; [print(i) for i in range(50)]; sys.stdout.flush(); print('oops', file=sys.stderr)"
    process = ServerProcess([sys.executable, "-c", program], environment(), KEYS, log)
    until_s = time.monotonic() + 20
    while process.status() is None and time.monotonic() < until_s:
        time.sleep(0.01)
    assert process.status() == 0 and stat.S_IMODE(log.stat().st_mode) == 0o600
    assert process.last_lines(3) == "48\n49\noops" and "earlier" not in log.read_text()
    process.stop()


@pytest.mark.parametrize("deaf", [False, True])
def test_stop_asks_and_then_kills(tmp_path: Path, deaf: bool) -> None:
    """A process that ignores the request, and one that ends by it but leaves a child behind."""
    program = (
        "import signal, subprocess, time; child = subprocess.Popen(['sleep', '30']); print(child.pid, flush=True);"
    )
    program += "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if deaf else ""
    process = ServerProcess(
        [sys.executable, "-c", program + "print('up', flush=True); time.sleep(30)"], {}, KEYS, tmp_path / "log"
    )
    until_s = time.monotonic() + 20
    while "up" not in process.last_lines() and time.monotonic() < until_s:
        time.sleep(0.01)
    child = int(process.last_lines().split()[0])
    process.stop(0.3)
    assert process.status() == (-9 if deaf else -15)
    stat_file = Path(f"/proc/{child}/stat")
    assert not stat_file.exists() or stat_file.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_stacks_of_those_that_can_show_them_stand_in_the_log(tmp_path: Path) -> None:
    """A child that shows them, one that would die of the signal, and another group's process, which is not asked."""
    program = """
import subprocess, sys, time
from miles_spec.sync.loader import show_stacks
plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def stuck_here():
    print("up", flush=True)
    while plain.poll() is None:
        time.sleep(0.05)
    print("a child died", flush=True)
show_stacks()
stuck_here()
"""
    process = ServerProcess([sys.executable, "-c", program], environment(), KEYS, tmp_path / "log")
    try:
        wait_for(lambda: "up" in process.last_lines())
        assert process.dump_stacks() == 1
        wait_for(lambda: "in stuck_here" in process.last_lines())
        time.sleep(0.2)
        assert process.status() is None and "a child died" not in process.last_lines()
    finally:
        process.stop(0.0)
    assert process.dump_stacks() == 0


def wait_for(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)
