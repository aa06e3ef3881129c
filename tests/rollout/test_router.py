"""The router's process: its key, its address, and how it follows servers; the package is a stand-in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_spec.rollout import router as module
from miles_spec.rollout.router import Router, available
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.types import RunError

PACKAGE = '''
"""Answers every call with what it leads to, behind its key; the first server `http://broken` is a crash."""

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer


def parse_router_args(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--worker-urls", nargs="*")
    for name in ("--host", "--port", "--policy", "--prometheus-host", "--prometheus-port"):
        parser.add_argument(name, required=True)
    return parser.parse_args(argv)


def launch_router(arguments):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.headers.get("Authorization") == f"Bearer {arguments.api_key}"
            open_path = self.path == "/readiness"
            data = json.dumps([arguments.worker_urls, arguments.api_key in os.environ.values()]).encode()
            self.send_response(200 if right or open_path else 401)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    if arguments.worker_urls == ["http://broken"]:
        raise SystemExit("no worker is well")
    HTTPServer((arguments.host, int(arguments.port)), Handler).serve_forever()
'''


@pytest.fixture
def keys() -> Keys:
    return Keys.random()


@pytest.fixture
def router(tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Iterator[Router]:
    package = tmp_path / "path" / "sglang_router"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_router.py").write_text(PACKAGE)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    made = Router(keys, tmp_path, "127.0.0.1", timeout_s=30.0)
    yield made
    made.stop()


def answer(router: Router, keys: Keys) -> tuple[int, str]:
    return Api(router.url, keys).call("/v1/models", timeout_s=10.0)


def test_it_keeps_its_address_and_hides_its_key(router: Router, keys: Keys) -> None:
    router.lead_to(["http://a:1", "http://b:1"])
    url, process = router.url, router._process
    assert process is not None
    # the environment that it hands on has no key
    assert answer(router, keys) == (200, '[["http://a:1", "http://b:1"], false]')
    assert answer(router, Keys())[0] == 401
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert keys.api.encode() not in command and b"cache_aware" in command
    assert keys.admin.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes()

    router.lead_to(["http://b:1", "http://a:1"])
    assert router._process is process  # the same servers
    router.lead_to(["http://c:1", "http://b:1"])
    assert router.url == url
    assert answer(router, keys) == (200, '[["http://c:1", "http://b:1"], false]')
    assert process.status() is not None

    assert router._process is not None
    os.kill(router._process.pid, signal.SIGKILL)
    while router._process.status() is None:
        time.sleep(0.01)
    router.lead_to(["http://c:1", "http://b:1"])
    assert (router.url, answer(router, keys)[0]) == (url, 200)
    router.stop()
    with pytest.raises(ConnectionError):
        answer(router, keys)


def test_one_that_does_not_come_up(router: Router) -> None:
    with pytest.raises(RunError, match="no worker is well"):
        router.lead_to(["http://broken"])
    assert router._process is None


def test_the_package_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert not available()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "sglang_router")
    assert available()
