"""How many processes a run has, and what becomes of those that are started; they import nothing heavy here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from miles_spec import processes
from miles_spec.assemble import join
from miles_spec.config import RunConfig
from miles_spec.processes import call, count, log_to, started

SLEEPS = "import os, sys, time; open(os.path.join(sys.argv[1], os.environ['RANK']), 'w').close(); time.sleep(60)"
WRITES = """
import json, os, sys, time
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
with open(os.path.join(sys.argv[1], os.environ["RANK"]), "w") as file:
    json.dump([[os.environ[name] for name in names], sys.argv[2:], os.getsid(0) == os.getpid()], file)
while not os.path.exists(os.path.join(sys.argv[1], "met")):
    time.sleep(0.01)
"""

CALLS = """
import sys
from pathlib import Path
from miles_spec import processes
sleeps = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
processes.COMMAND = (sys.executable, "-c", sleeps)
processes.call("train", cwd=Path.cwd())
"""


def ranks(number: int) -> RunConfig:
    config = RunConfig()
    return replace(config, train=replace(config.train, ranks=number))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_count() -> None:
    assert [count(ranks(1)), count(ranks(3)), processes.rank()] == [1, 3, 0]
    os.environ |= {"RANK": "1", "WORLD_SIZE": "4"}
    assert [count(ranks(1)), count(ranks(4)), processes.rank()] == [4, 4, 1]
    with pytest.raises(ValueError, match=r"^train\.ranks is 3, and 4 processes were started: give 4, or 1$"):
        count(ranks(3))


def test_join_needs_the_other_processes() -> None:
    assert join(ranks(1)) is None
    with pytest.raises(ValueError, match=r"^train\.ranks is 2, and this is one process; start `miles-spec train`$"):
        join(ranks(2))


def test_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", WRITES, str(tmp_path)))
    with started(ranks(3), ["train", "x"]):
        first = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        port = os.environ["MASTER_PORT"]
        del os.environ["RANK"]  # as joining does
        (tmp_path / "met").touch()
    assert first == ["0", "0", "3"]
    for rank in "12":
        told = json.loads((tmp_path / rank).read_text())
        assert told == [[rank, rank, "3", "3", "127.0.0.1", port], ["train", "x"], True]


def test_nothing_is_started_for_one_rank_or_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "COMMAND", ("/nowhere",))
    with started(ranks(1), []):
        assert "RANK" not in os.environ
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
    with started(ranks(2), []):
        assert os.environ["RANK"] == "1"


def test_an_error_ends_them_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", SLEEPS, str(tmp_path)))
    monkeypatch.setattr(processes, "END_AFTER_ERROR_S", 0.2)
    start = time.monotonic()
    with pytest.raises(KeyError), started(ranks(2), []):
        del os.environ["RANK"]
        while not (tmp_path / "1").exists():
            time.sleep(0.01)
        raise KeyError
    assert time.monotonic() - start < 10


def test_one_whose_parent_is_killed_before_they_met_ends(tmp_path: Path) -> None:
    follows = (
        "import os, sys, time; from miles_spec import processes as p; from miles_spec.config import *\n"
        "with p.started(RunConfig(train=TrainConfig(ranks=2)), []):\n"
        "    open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    leads = (
        "import sys, time; from miles_spec import processes as p; from miles_spec.config import *\n"
        f"p.COMMAND = (sys.executable, '-c', {follows!r}, {str(tmp_path / 'pid')!r})\n"
        "with p.started(RunConfig(train=TrainConfig(ranks=2)), []): time.sleep(60)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    leader = subprocess.Popen([sys.executable, "-c", leads], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and leader.poll() is None
        time.sleep(0.05)
    follower = Path("/proc") / (tmp_path / "pid").read_text()
    assert follower.exists()
    leader.kill()
    leader.wait()
    while _runs(follower):
        assert time.monotonic() < deadline, "the follower lives on"
        time.sleep(0.05)


def _runs(process: Path) -> bool:
    with suppress(FileNotFoundError):
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_one_that_ends_at_once_ends_the_run() -> None:
    code = (
        "import sys, time; from miles_spec import processes as p; from miles_spec.config import *\n"
        "p.COMMAND = (sys.executable, '-c', 'raise SystemExit(7)')\n"
        "with p.started(RunConfig(train=TrainConfig(ranks=3)), []): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr in [f"miles-spec: error: rank {rank} ended with status 7 at its start\n" for rank in (1, 2)]


def test_log_to(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank1.log"
    code = (
        "import logging, os, sys; from pathlib import Path; from miles_spec.processes import log_to\n"
        f"print('before', flush=True); log_to(Path({str(path)!r})); print('printed'); os.write(2, b'raw\\n')\n"
        "logging.getLogger('miles_spec.x').info('logged')"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "before\n", "")
    text = path.read_text()
    assert text.count("printed") == text.count("raw") == text.count(" INFO miles_spec.x: logged\n") == 2
    with pytest.raises(OSError):
        log_to(path / "below")


def test_a_command_that_is_called_ends_with_its_caller() -> None:
    with subprocess.Popen([sys.executable, "-c", CALLS], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        called = int(caller.stdout.readline())
        caller.send_signal(signal.SIGTERM)
        assert caller.wait(10) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(called, 0)


def test_a_command_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", "import sys; sys.exit(int(sys.argv[1]))"))
    before = signal.getsignal(signal.SIGTERM)
    call("0", cwd=tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        call("3", cwd=tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
