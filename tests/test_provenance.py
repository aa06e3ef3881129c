"""Where a result comes from: read off the machine, not made up."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from miles_spec import provenance
from miles_spec.provenance import check, commit, hardware, versions, write_result


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, of which `provenance.py` is taken to be a part."""
    (tmp_path / "miles_spec").mkdir()
    file = tmp_path / "miles_spec" / "provenance.py"
    file.write_text("one")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(file))
    return tmp_path


def test_commit(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert commit() == head and len(head) == 40
    (checkout / "notes").write_text("untracked")
    assert commit() == head
    (checkout / "miles_spec" / "provenance.py").write_text("two")
    assert commit() == head + "+changes"


def test_no_commit_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "miles_spec" / "provenance.py"))
    assert commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None


def test_no_commit_of_a_checkout_that_this_is_merely_installed_in(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / "venv" / "miles_spec"
    installed.mkdir(parents=True)
    (installed / "provenance.py").write_text("installed")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert commit() is None


def test_hardware_and_versions() -> None:
    found = hardware()
    assert found.keys() == {"cpu", "cores", "threads", "avx512_bf16", "gpus"}
    assert found["cpu"] and found["threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count()
    named = versions()
    assert named["python"] == platform.python_version()
    assert named["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package-by-any-name"))
    assert versions().keys() == {"python", "torch"}


def test_result(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    write_result(path, "x", [{"a": 1}], [check("a", 1.0, "above 2", False)], model="m")
    content = json.loads(path.read_text())
    assert content.keys() == {"name", "commit", "hardware", "versions", "rows", "checks", "model"}
    assert content["checks"] == [{"what": "a", "value": 1.0, "goal": "above 2", "holds": False}]
    with pytest.raises(ValueError, match="JSON"):
        write_result(path, "x", [{"a": float("nan")}], [])
