"""The command line, in process; the commands' own modules are replaced by recorders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from miles_spec import __version__
from miles_spec.cli import TRACEBACK, main
from miles_spec.config import RunConfig
from miles_spec.settings import load
from miles_spec.types import RunError


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "model"\n[data]\nsource = "tasks.jsonl"\n')
    return path


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the command line called, as module, function and arguments."""
    made: list[tuple[object, ...]] = []

    def replace(module: str, function: str, result: object) -> None:
        def record(*arguments: object, **options: object) -> object:
            made.append((module, function, *arguments, *options.values()))
            return result

        fake = ModuleType(f"miles_spec.{module}")
        setattr(fake, function, record)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)

    replace("loop", "train", Path("runs/x"))
    replace("report", "write", Path("runs/x/report.html"))
    replace("bench", "rollout", None)
    replace("kernel_bench.run", "kernels", None)
    replace("quickstart", "main", None)
    return made


def test_train(run_file: Path, calls: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run_file), "--steps", "3", "--draft.num-steps=2"]) == 0
    assert calls == [("loop", "train", load(run_file, ["--steps", "3", "--draft.num-steps", "2"]))]
    assert capsys.readouterr().out == "runs/x\n"


def test_config(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(run_file), "--steps", "3"]) == 0
    run_file.write_text(capsys.readouterr().out)
    assert load(run_file).steps == 3


@pytest.mark.parametrize("where", ["before", "between", "after", "absent"])
def test_bench_rollout(where: str, run_file: Path, calls: list[object]) -> None:
    arguments = {
        "before": ["--json", "b.json", str(run_file), "--steps", "3"],
        "between": [str(run_file), "--json", "b.json", "--steps", "3"],
        "after": [str(run_file), "--steps", "3", "--json", "b.json"],
        "absent": [str(run_file), "--steps", "3"],
    }[where]
    assert main(["bench", "rollout", *arguments]) == 0
    out = None if where == "absent" else Path("b.json")
    assert calls == [("bench", "rollout", load(run_file, ["--steps", "3"]), out, (), 3)]


def test_bench_rollout_of_servers(run_file: Path, calls: list[object]) -> None:
    arguments = ["--engine", "sglang", "--batches", "1,8", "--turns", "2"]
    assert main(["bench", "rollout", str(run_file), *arguments]) == 0
    config = load(run_file, ["--rollout.engine", "sglang"])
    assert calls == [("bench", "rollout", config, None, [1, 8], 2)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (None, ())),
        (["--json", "k.json"], (Path("k.json"), ())),
        (["--only", "shift", "--json", "k.json"], (Path("k.json"), ["shift"])),
        (["--only", "draft_loss,logprob"], (None, ["draft_loss", "logprob"])),
    ],
    ids=["plain", "json", "one", "two"],
)
def test_bench_kernels(arguments: list[str], expected: tuple[object, ...], calls: list[object]) -> None:
    assert main(["bench", "kernels", *arguments]) == 0
    assert calls == [("kernel_bench.run", "kernels", *expected)]


def test_report(calls: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs/x"]) == 0
    assert calls == [("report", "write", Path("runs/x"))]
    assert capsys.readouterr().out == "runs/x/report.html\n"


def test_quickstart(calls: list[object]) -> None:
    assert main(["quickstart"]) == 0
    assert calls == [("quickstart", "main")]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"miles-spec {__version__}\n"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ([], "quickstart"),
        (["train"], "--draft.num-steps"),
        (["train", "run.toml", "--steps", "3"], "--draft.num-steps"),
        (["config"], "--rollout.temperature"),
        (["bench"], "rollout"),
        (["bench"], "kernels"),
        (["bench", "rollout"], "--json PATH"),
        (["bench", "kernels"], "--only KERNELS"),
        (["report"], "RUN_DIR"),
        (["quickstart"], "a few minutes"),
    ],
    ids=" ".join,
)
def test_help(command: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["bench"], ["train"], ["report"], ["fly"]], ids=" ".join)
def test_incomplete_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "usage: miles-spec" in capsys.readouterr().err


def test_mistake_is_one_sentence(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run_file.parent / "no.toml")]) == 2
    assert capsys.readouterr().err == f"miles-spec: error: there is no run file {run_file.parent}/no.toml\n"
    assert main(["train", str(run_file), "--step", "3"]) == 2
    assert capsys.readouterr().err.startswith("miles-spec: error: unknown flag --step; did you mean --steps?")


@pytest.mark.usefixtures("calls")
def test_setting_of_a_command_without_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs/x", "--steps", "3"]) == 2
    message = "miles-spec: error: unexpected argument --steps; see `miles-spec --help`\n"
    assert capsys.readouterr().err == message


def test_traceback_on_request(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="there is no run file"):
        main(["train", str(run_file.parent / "no.toml")])


@pytest.mark.parametrize("error", [ValueError, OSError, FloatingPointError, RunError])
def test_error_of_our_own_code_is_one_sentence(
    error: type[Exception], run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scope = {"__name__": "miles_spec.loop", "error": error}
    exec("def train(config): raise error('it did not work; do this')", scope)
    fake = ModuleType("miles_spec.loop")
    fake.train = scope["train"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "miles_spec.loop", fake)
    assert main(["train", str(run_file)]) == 2
    assert capsys.readouterr().err == "miles-spec: error: it did not work; do this\n"


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError, RunError])
def test_error_of_other_code_keeps_its_traceback(
    error: type[Exception], run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: RunConfig) -> Path:
        raise error("from a library")

    fake = ModuleType("miles_spec.loop")
    fake.train = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "miles_spec.loop", fake)
    with pytest.raises(error, match="from a library"):
        main(["train", str(run_file)])


def test_installed_script() -> None:
    script = Path(sys.executable).with_name("miles-spec")
    done = subprocess.run([script, "config", "no.toml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "miles-spec: error: there is no run file no.toml\n"
