"""`miles-spec rollout serve` with a real server: what others can call, and a run that joins it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from miles_spec import bench, checkpoint
from miles_spec.rollout.launch import ADMIN_KEY, API_KEY
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.settings import load
from miles_spec.sync.session import Syncer
from miles_spec.sync.transports import Ipc
from miles_spec.types import RunError, TensorMeta

from .conftest import ARGUMENTS, FORKED, PYTHON, make_pair
from .test_run import RUN, lines, work  # noqa: F401  # a fixture

SCRIPT = Path(sys.executable).with_name("miles-spec")


@dataclass(frozen=True)
class Service:
    process: subprocess.Popen[bytes]
    output: Path
    url: str
    keys: Keys
    run: Path


def run_file(work: Path, out: Path) -> Path:  # noqa: F811
    text = RUN.format(out=out, work=work, python=PYTHON, server=FORKED)
    text += "[sglang]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in ARGUMENTS.items())
    out.with_suffix(".toml").write_text(text)
    return out.with_suffix(".toml")


def miles_spec(*arguments: object, **environment: str) -> None:
    """Runs a command to its end."""
    command = [SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def service(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:  # noqa: F811
    """The servers of a run that was trained for one step."""
    run = tmp_path_factory.mktemp("serve") / "run"
    file = run_file(work, run)
    learns = ("--draft.lr", 0.01, "--draft.lr-warmup-steps", 0)  # so that it is another draft than that of step 1
    miles_spec("train", file, "--rollout.engine", "embedded", "--steps", 1, *learns)
    output = run.parent / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen([SCRIPT, "rollout", "serve", file], stdout=stream, stderr=subprocess.STDOUT)
    try:
        until_s = time.monotonic() + 300
        while "Ctrl-C" not in output.read_text():
            assert process.poll() is None and time.monotonic() < until_s, output.read_text()
            time.sleep(0.2)
        told = json.loads((run / "serve" / "keys.json").read_text())
        found = re.search(r"http://\S+", output.read_text())
        assert found is not None
        yield Service(process, output, found[0], Keys(api=told[API_KEY], admin=told[ADMIN_KEY]), run)
    finally:
        process.terminate()
        process.wait(60)


def test_what_is_told(service: Service) -> None:
    text = service.output.read_text()
    assert "drafts 2 tokens, target version 1, draft version 4, verified" in text
    path = service.run / "serve" / "keys.json"
    assert str(path) in text
    assert path.stat().st_mode & 0o777 == 0o600
    for key in (service.keys.api, service.keys.admin):
        assert len(key) > 30
        assert key not in text


def test_chat_and_metrics(service: Service) -> None:
    asked = {"model": "x", "messages": [{"role": "user", "content": "say 1"}], "max_tokens": 4, "temperature": 0}
    status, text = Api(service.url, service.keys).call("/v1/chat/completions", asked, timeout_s=60)
    assert status == 200, text
    assert json.loads(text)["usage"]["completion_tokens"] > 0
    assert Api(service.url, Keys()).call("/v1/chat/completions", asked, timeout_s=60)[0] == 401
    status, text = Api(service.url, service.keys).call("/metrics", timeout_s=60)
    assert status == 200
    assert "sglang:" in text


def joined(service: Service, keys: Keys) -> SGLangServer:
    settings = ServerSettings(model_path="", rule="greedy", context_length=36, max_running=4)
    return SGLangServer(name="joined", settings=settings, keys=keys, join=service.url, push_timeout_s=60)


def test_a_joined_server_takes_a_push(service: Service) -> None:
    server, pair = joined(service, service.keys), make_pair()
    server.start()
    try:
        assert server.draft_depth == 2
        for role, tensors in (("target", pair.target()), ("draft", pair.drafted())):
            server.learn(role, {n: TensorMeta(shape=tuple(t.shape), dtype="float32") for n, t in tensors.items()})  # type: ignore[arg-type]
        weights = {"target": pair.target(), "draft": pair.drafted()}
        receipts = Syncer(Ipc(torch.device("cpu"))).push([server], version=7, draft_version=3, **weights)
        assert [(r.role, r.verified) for r in receipts] == [("target", True), ("draft", True)]
        assert server.versions() == {"target": 7, "draft": 3}
    finally:
        server.stop()
    assert service.process.poll() is None


def test_a_wrong_admin_key_pushes_nothing(service: Service) -> None:
    server = joined(service, Keys(api=service.keys.api, admin="x" * 40))
    with pytest.raises(RunError, match="refuses the key"):
        server.start()


def test_a_run_joins(service: Service, work: Path, tmp_path: Path) -> None:  # noqa: F811
    keys = {API_KEY: service.keys.api, ADMIN_KEY: service.keys.admin}
    miles_spec("train", run_file(work, tmp_path / "run"), "--rollout.urls", service.url, "--steps", 2, **keys)
    rows = lines(tmp_path / "run")
    assert [row["target_version"] for row in rows] == [1, 2]
    for row in rows:
        assert (row["receipts_verified"], row["receipts_failed"]) == (2, 0)
        assert row["rollout_kl"] < 1e-6 and row["verify_steps"] > 0
    assert checkpoint.steps(tmp_path / "run") == [2]


def test_its_drafts_are_compared(service: Service, work: Path, tmp_path: Path) -> None:  # noqa: F811
    """By servers as by the embedded engine, whose greedy responses and accepted drafts are the same."""
    out = shutil.copytree(service.run, tmp_path / "run", ignore=shutil.ignore_patterns("serve"))
    found = []
    for engine in ("embedded", "sglang"):
        config = load(run_file(work, out), ["--rollout.engine", engine])
        rows = bench.rollout(config, None, batches=(2,), turns=1, requests=4)
        found.append([(r.mode, r.tokens, r.accept_length, r.same_responses) for r in rows])
    assert found[1] == found[0]
    (_, *plain), (_, *frozen), (_, *cotrained) = found[1]
    assert plain[1] is None and 1 < frozen[1] != cotrained[1] > 1 and frozen[2] == cotrained[2] == 1


def test_a_server_that_dies_comes_back_with_the_weights(service: Service) -> None:
    (child,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"--port\0" + service.url.rsplit(":")[-1].encode() + b"\0" in path.read_bytes()
        and int((path.parent / "stat").read_text().rsplit(")")[-1].split()[1]) == service.process.pid
    ]
    os.killpg(child, signal.SIGKILL)
    until_s = time.monotonic() + 300
    while service.output.read_text().count("Ctrl-C") < 2:
        assert service.process.poll() is None and time.monotonic() < until_s, service.output.read_text()
        time.sleep(0.2)
    last = service.output.read_text().rsplit("http://", 2)[-2]
    assert "target version 1, draft version 4, verified" in last
    url = "http://" + last.split()[0]
    asked = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    status, _ = Api(url, service.keys).call("/generate", asked, timeout_s=60)
    assert status == 200
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 0
    assert not (service.run / "serve" / "keys.json").exists()
    with pytest.raises(ConnectionError):
        Api(url, service.keys).call("/health", timeout_s=5)
