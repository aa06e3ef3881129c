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
    replace("serve", "serve", None)
    replace("draft_training", "train", Path("runs/x"))
    sync = ModuleType("miles_spec.sync_bench")
    sync.sync = lambda path, **given: made.append(("sync_bench", "sync", path, given))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, sync.__name__, sync)
    return made


def test_train(run_file: Path, calls: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run_file), "--steps", "3", "--draft.num-steps=2"]) == 0
    assert calls == [("loop", "train", load(run_file, ["--steps", "3", "--draft.num-steps", "2"]))]
    assert capsys.readouterr().out == "runs/x\n"


def test_train_refuses_temperature_zero_which_other_commands_need(
    run_file: Path, calls: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = [str(run_file), "--rollout.temperature", "0"]
    assert main(["train", *greedy]) == 2
    assert capsys.readouterr().err.startswith("miles-spec: error: rollout.temperature is 0.0: the samples of a prompt")
    assert calls == []
    for command in (["train", *greedy, "--train.lr=0"], ["draft", "train", *greedy], ["bench", "rollout", *greedy]):
        assert main(command) == 0
    assert [call[:2] for call in calls] == [("loop", "train"), ("draft_training", "train"), ("bench", "rollout")]


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


@pytest.mark.parametrize("batches", [["1,8"], ["1", "8"]], ids=["commas", "spaces"])
def test_bench_rollout_of_servers(batches: list[str], run_file: Path, calls: list[object]) -> None:
    arguments = ["--engine", "sglang", "--batches", *batches, "--turns", "2"]
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
        (["--only", "draft_loss", "logprob"], (None, ["draft_loss", "logprob"])),
    ],
    ids=["plain", "json", "one", "commas", "spaces"],
)
def test_bench_kernels(arguments: list[str], expected: tuple[object, ...], calls: list[object]) -> None:
    assert main(["bench", "kernels", *arguments]) == 0
    assert calls == [("kernel_bench.run", "kernels", *expected)]


SYNC = {
    "sizes": (0.1e9, 1e9, 3e9),
    "transports": ("ipc", "nccl", "disk"),
    "budget_s": 540.0,
    "launch": (),
    "settings": {},
}


@pytest.mark.parametrize(
    ("arguments", "path", "given"),
    [
        ([], None, {}),
        (["--json", "s.json", "--sizes", "0.1e9,2e6"], Path("s.json"), {"sizes": [1e8, 2e6]}),
        (["--sizes", "0.1e9", "2e6,1e9"], None, {"sizes": [1e8, 2e6, 1e9]}),
        (["--transports", "disk,ipc", "--budget-s", "60"], None, {"transports": ["disk", "ipc"], "budget_s": 60.0}),
        (["--launch", "python 'a b.py'"], None, {"launch": ["python", "a b.py"]}),
        (
            ["--set", "attention_backend=triton", "--set", "tp_size=2", "--set", "release=true", "--set", "x=a=b"],
            None,
            {"settings": {"attention_backend": "triton", "tp_size": 2, "release": True, "x": "a=b"}},
        ),
    ],
    ids=["plain", "sizes", "sizes with spaces", "transports", "launch", "settings"],
)
def test_bench_sync(arguments: list[str], path: Path | None, given: dict[str, object], calls: list[object]) -> None:
    assert main(["bench", "sync", *arguments]) == 0
    assert calls == [("sync_bench", "sync", path, SYNC | given)]


@pytest.mark.parametrize("text", ["triton", "=triton"])
def test_bench_sync_setting_without_a_key_or_a_value(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "sync", "--set", text])
    assert f"'{text}' is not of the form KEY=VALUE" in capsys.readouterr().err


def test_report(calls: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs/x"]) == 0
    assert calls == [("report", "write", Path("runs/x"))]
    assert capsys.readouterr().out == "runs/x/report.html\n"


def test_rollout_serve(run_file: Path, calls: list[object]) -> None:
    assert main(["rollout", "serve", str(run_file), "--rollout.engine", "sglang"]) == 0
    assert calls == [("serve", "serve", load(run_file, ["--rollout.engine", "sglang"]))]


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What was called of drafts, whose descriptions are their names."""
    made: list[tuple[object, ...]] = []
    fake, reading = ModuleType("miles_spec.drafts"), ModuleType("miles_spec.draft.load")
    fake.describe = str  # type: ignore[attr-defined]
    for module, name in ((fake, "attach"), (fake, "import_"), (fake, "export"), (reading, "inspect")):

        def record(*arguments: object, name: str = name, **options: object) -> str:
            made.append((name, *arguments, options))
            return f"found by {name}"

        setattr(module, name, record)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


ATTACHED = {"family": "eagle", "layers": 1, "vocab_size": 0, "vocab_data": None, "seed": 0, "dtype": "auto"}


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["attach", "m", "o"], ("attach", "m", Path("o"), ATTACHED)),
        (
            ["attach", "m", "o", "--family", "mimo", "--layers", "3"],
            ("attach", "m", Path("o"), ATTACHED | {"family": "mimo", "layers": 3}),
        ),
        (
            ["attach", "m", "o", "--family", "eagle3", "--vocab-size", "9", "--vocab-data", "d", "--seed=3"],
            (
                "attach",
                "m",
                Path("o"),
                ATTACHED | {"family": "eagle3", "vocab_size": 9, "vocab_data": Path("d"), "seed": 3},
            ),
        ),
        (["import", "f", "o", "--model", "m"], ("import_", Path("f"), Path("o"), {"model": "m", "dtype": "auto"})),
        (
            ["export", "f", "o", "--dtype", "float32"],
            ("export", Path("f"), Path("o"), {"model": "", "format": "sglang", "dtype": "float32"}),
        ),
        (
            ["export", "f", "o", "--model", "m", "--format", "speculators"],
            ("export", Path("f"), Path("o"), {"model": "m", "format": "speculators", "dtype": "auto"}),
        ),
        (["inspect", "f"], ("inspect", Path("f"), {})),
    ],
    ids=["attach", "attach several layers", "attach with all", "import", "export of a run", "export", "inspect"],
)
def test_drafts(
    arguments: list[str], call: tuple[object, ...], drafts: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["draft", *arguments]) == 0
    assert drafts == [call]
    assert capsys.readouterr().out == f"found by {call[0]}\n"


def test_draft_train(run_file: Path, calls: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--offline.steps", "3", "--offline.response-column=response"]
    assert main(["draft", "train", str(run_file), *arguments]) == 0
    assert calls == [("draft_training", "train", load(run_file, arguments))]
    assert capsys.readouterr().out == "runs/x\n"


def test_a_draft_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draft", "inspect", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"miles-spec: error: {tmp_path}/none: there is no config.json\n"


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("server", [True, False])
def test_doctor(run_file: Path, given: bool, server: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    fake = ModuleType("miles_spec.doctor")
    fake.doctor = lambda config, *, server: made.extend([config, server])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    arguments = ([str(run_file), "--steps", "3"] if given else []) + ([] if server else ["--no-server"])
    assert main(["doctor", *arguments]) == 0
    assert made == [load(run_file, ["--steps", "3"]) if given else None, server]


def test_doctor_takes_settings_of_a_run_file_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--steps=3"]) == 2
    assert "name the run file before it" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train"], ["config"], ["bench", "rollout", "--turns", "2"], ["doctor"]])
@pytest.mark.parametrize("setting", [["--seed", "3"], ["--steps", "4", "--seed", "3"], ["--draft.no-enabled"]])
def test_settings_stand_behind_the_run_file(
    command: list[str], setting: list[str], run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for behind in ([], ["--seed", "5"]):
        assert main([*command, *setting, str(run_file), *behind]) == 2
        message = f"{setting[0]} is a setting of a run file; name the run file before it"
        assert capsys.readouterr().err == f"miles-spec: error: {message}\n"
    main(["bench", "rollout", "--turns", "3", str(run_file), "--steps", "3"])  # a word that stands for two
    assert "is a setting of" not in capsys.readouterr().err
    if len(setting) == 2:  # with its value it may stand anywhere
        assert main(["config", "=".join(setting), str(run_file)]) == 0


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
        (["bench", "kernels"], "--only KERNEL"),
        (["bench", "sync"], "--set KEY=VALUE"),
        (["rollout"], "serve"),
        (["rollout", "serve"], "--rollout.temperature"),
        (["draft"], "attach"),
        (["draft", "attach"], "--vocab-data FILE"),
        (["draft", "import"], "--model MODEL"),
        (["draft", "export"], "{sglang,specforge,speculators}"),
        (["draft", "inspect"], "FOLDER"),
        (["draft", "train"], "--offline.response-column"),
        (["doctor"], "--no-server"),
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


@pytest.mark.parametrize(
    "command", [[], ["bench"], ["draft"], ["draft", "import", "f", "o"], ["train"], ["report"], ["fly"]], ids=" ".join
)
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


def test_ctrl_c_is_no_traceback(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: RunConfig) -> Path:
        raise KeyboardInterrupt

    fake = ModuleType("miles_spec.loop")
    fake.train = interrupted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "miles_spec.loop", fake)
    assert main(["train", str(run_file)]) == 130
    assert capsys.readouterr().err == "miles-spec: interrupted\n"
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(KeyboardInterrupt):
        main(["train", str(run_file)])


def test_sizes_that_are_no_numbers(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "rollout", str(run_file), "--batches", "a"])
    assert "'a' is not numbers with commas or spaces between them" in capsys.readouterr().err


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


def test_as_a_module(tmp_path: Path) -> None:
    """As torchrun starts it; an error of this very module is a sentence too."""
    command = [sys.executable, "-m", "miles_spec.cli"]
    assert (
        subprocess.run([*command, "--version"], capture_output=True, text=True).stdout == f"miles-spec {__version__}\n"
    )
    done = subprocess.run([*command, "report", str(tmp_path), "more"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "miles-spec: error: unexpected argument more; see `miles-spec --help`\n"
