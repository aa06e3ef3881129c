"""The loader: run files, the command line's three layers, every message, and the round trip through `dump`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spec.config import DataConfig, DraftConfig, ModelConfig, RolloutConfig, RunConfig, TrainConfig
from miles_spec.settings import _our_flags, changes, dump, load, nearest

BASE = '[model]\npath = "model"\n[data]\nsource = "tasks.jsonl"\n'
GOOD = RunConfig(model=ModelConfig(path="model"), data=DataConfig(source="tasks.jsonl"))


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(BASE)
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        load(path, overrides)
    return str(error.value)


# Run files


def test_defaults_and_values_of_every_kind(run_file: Path) -> None:
    assert load(run_file) == GOOD
    run_file.write_text(
        'steps = 3\nout = "runs/x"\n' + BASE + 'shuffle = false\noptions = { max_digits = 2, "a b" = [1, "x"] }\n'
        '[rollout]\ntemperature = 1\nstop = ["\\n\\n", "é"]\nverify = "rejection"\n'
        "[train]\nbetas = [0, 0.5]\n[draft]\n"
    )
    config = load(run_file)
    assert config == replace(
        GOOD,
        steps=3,
        out="runs/x",
        data=replace(GOOD.data, shuffle=False, options={"max_digits": 2, "a b": [1, "x"]}),
        rollout=RolloutConfig(temperature=1.0, stop=("\n\n", "é"), verify="rejection"),
        train=TrainConfig(betas=(0.0, 0.5)),
    )
    assert type(config.rollout.temperature) is float
    assert [type(beta) for beta in config.train.betas] == [float, float]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[drafft]\n", "unknown section [drafft]; did you mean [draft]?"),
        ("[sgland]\n", "unknown section [sgland]; did you mean [sglang]?"),
        ("step = 3\n", 'unknown key "step"; did you mean "steps"?'),
        ("num_steps = 3\n", 'unknown key "num_steps"; did you mean draft.num_steps?'),
        ("[draft]\nnum_step = 3\n", 'unknown key "num_step" in [draft]; did you mean "num_steps"?'),
        ("[train]\ntemperature = 1.0\n", 'unknown key "temperature" in [train]; did you mean rollout.temperature?'),
        ("draft = 3\n", "draft must be a table [draft], got 3 (an integer)"),
        ("sglang = true\n", "sglang must be a table, got true (a boolean)"),
        ("steps = 1.5\n", "steps must be an integer, got 1.5 (a number)"),
        ("steps = true\n", "steps must be an integer, got true (a boolean)"),
        ("out = 3\n", "out must be a string, got 3 (an integer)"),
        ("[draft]\nenabled = 1\n", "draft.enabled must be true or false, got 1 (an integer)"),
        ('[draft]\nlr = "1e-4"\n', 'draft.lr must be a number, got "1e-4" (a string)'),
        ("[draft]\nlr = false\n", "draft.lr must be a number, got false (a boolean)"),
        ("[draft]\nlr = 2026-01-02\n", "draft.lr must be a number, got 2026-01-02 (a date or time)"),
        ("[draft]\nlr = [1.0]\n", "draft.lr must be a number, got [1.0] (an array)"),
        ("[draft]\nlr = {a = 1}\n", "draft.lr must be a number, got {a = 1} (a table)"),
        (
            '[rollout]\nverify = "typical"\n',
            'rollout.verify must be one of "auto", "greedy", "target" or "rejection", got "typical" (a string)',
        ),
        ('[train]\nbackend = "jax"\n', 'train.backend must be one of "torch" or "megatron", got "jax" (a string)'),
        ('[rollout]\nstop = "x"\n', 'rollout.stop must be an array, got "x" (a string)'),
        ('[rollout]\nstop = ["x", 3]\n', "rollout.stop[1] must be a string, got 3 (an integer)"),
        ("[train]\nbetas = [0.9]\n", "train.betas must be an array of 2, got 1"),
        (
            "[draft\n",
            "run.toml is not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 7)",
        ),
        ("steps = 1\nsteps = 2\n", "run.toml is not valid TOML: Cannot overwrite a value (at line 2, column 10)"),
    ],
)
def test_run_file_refused(text: str, message: str, run_file: Path) -> None:
    run_file.write_text(text)
    shown = refusal(run_file)
    assert shown.endswith(message)
    assert str(run_file) in shown
    assert "\n" not in shown


def test_unreadable_run_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.toml") == f"there is no run file {tmp_path}/no.toml"
    assert refusal(tmp_path) == f"cannot read the run file {tmp_path}: Is a directory"
    (tmp_path / "latin.toml").write_bytes('out = "é"'.encode("latin-1"))
    assert refusal(tmp_path / "latin.toml") == f"{tmp_path}/latin.toml is not a text file in UTF-8"


def test_loaded_configuration_is_validated(run_file: Path) -> None:
    assert refusal(None).startswith('model.path is ""')
    run_file.write_text(BASE + "[draft]\nnum_steps = 40\n")
    assert refusal(run_file).startswith("draft.num_steps is 40")
    assert load(run_file, ["--draft.num-steps", "4"]).draft.num_steps == 4


# Our flags


def test_command_line_wins_over_the_run_file(run_file: Path) -> None:
    run_file.write_text("steps = 7\n" + BASE + "options = {a = 1, b = 2}\n[draft]\nnum_steps = 2\nlr = 1e-3\n")
    flags = "--draft.num-steps 5 --seed=9 --data.no-shuffle --draft.no_train --rollout.stop a b --train.betas 0.8 0.9"
    config = load(run_file, [*flags.split(), "--data.options.b", "true", "--data.options.c_d", "x"])
    assert config == replace(
        GOOD,
        steps=7,
        seed=9,
        data=replace(GOOD.data, shuffle=False, options={"a": 1, "b": True, "c_d": "x"}),
        draft=DraftConfig(num_steps=5, lr=1e-3, train=False),
        rollout=RolloutConfig(stop=("a", "b")),
        train=TrainConfig(betas=(0.8, 0.9)),
    )


@pytest.mark.parametrize("joined", ["=", " "])
@pytest.mark.parametrize("value", [True, False])
def test_booleans_take_a_value_too(joined: str, value: bool, run_file: Path) -> None:
    run_file.write_text(BASE + f"[draft]\nenabled = {str(not value).lower()}\n")
    flags = f"--draft.enabled{joined}{str(value).lower()} --steps 3 --train.oom_retry true"
    config = load(run_file, flags.split(" "))
    assert config.draft.enabled is value
    assert config.train.oom_retry and config.steps == 3


def test_overrides_alone(run_file: Path) -> None:
    assert load(None, ["--model.path", "model", "--data.source=tasks.jsonl"]) == GOOD


def test_value_may_be_negative_or_hold_dashes(run_file: Path) -> None:
    assert refusal(run_file, "--rollout.top-k", "-1") == "rollout.top_k is -1: give 0 or more"
    assert load(run_file, ["--data.system=--be brief"]).data.system == "--be brief"
    assert load(run_file, ["--rollout.stop=--"]).rollout.stop == ("--",)
    assert load(run_file, ["--data.template", "{prompt} a=b"]).data.template == "{prompt} a=b"


@pytest.mark.parametrize("flags", [["--draft.num-steps", "x"], ["--rollout.verify", "typical"], ["--steps"]])
def test_bad_value_ends_the_process(flags: list[str], run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(run_file, flags)
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_stray_argument(run_file: Path) -> None:
    message = 'unexpected argument "3": settings are written --section.key value'
    assert refusal(run_file, "3", "--steps", "4") == message


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--draft.num-step", "--draft.num-steps"),
        ("--num-steps", "--draft.num-steps"),
        ("--rolout.temprature", "--rollout.temperature"),
        ("--data.no-shufle", "--data.no-shuffle"),
        ("--draft.num_stepz", "--draft.num-steps"),
    ],
)
def test_unknown_flag_without_megatron(flag: str, near: str, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "megatron")
    assert refusal(run_file, flag, "3") == (
        f"unknown flag {flag}; did you mean {near}? (Megatron's own flags need megatron-core, which is not installed)"
    )


# The flags of other packages


def absent(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes `package` look as if it were not installed."""
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))


def install(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Puts modules with these attributes (`a__b` for `a.b`) where imports find them."""
    import importlib.machinery

    for name, content in modules.items():
        parts = name.split("__")
        for i in range(len(parts)):
            dotted = ".".join(parts[: i + 1])
            module = ModuleType(dotted)
            module.__spec__ = importlib.machinery.ModuleSpec(dotted, None)
            if dotted not in sys.modules or i + 1 == len(parts):
                monkeypatch.setitem(sys.modules, dotted, module)
        for key, value in content.items():
            setattr(module, key, value)


class _Server:
    @staticmethod
    def add_cli_args(parser: Any) -> None:
        parser.add_argument("--tensor-parallel-size", "--tp-size", dest="tp_size")
        parser.add_argument("--config")


@dataclass
class DataclassArgs(_Server):
    """As in SGLang 0.5.17."""

    model_path: str = ""
    mem_fraction_static: float = 0.9
    tp_size: int = 1
    disable_radix_cache: bool = False
    cuda_graph_bs: tuple[int, ...] = ()


class StructArgs(_Server):
    """As in SGLang 0.5.21: no dataclass, but a signature."""

    __signature__ = inspect.signature(DataclassArgs)


@dataclass
class TransformerConfig:
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False


@dataclass
class OptimizerConfig:
    adam_eps: float = 1e-8


@pytest.fixture(params=[DataclassArgs, StructArgs])
def sglang(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, sglang__srt__server_args={"ServerArgs": request.param})


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        megatron__core__transformer={"TransformerConfig": TransformerConfig, "MLATransformerConfig": TransformerConfig},
        megatron__core__optimizer={"OptimizerConfig": OptimizerConfig},
        megatron__core__distributed={"DistributedDataParallelConfig": OptimizerConfig},
    )


@pytest.mark.usefixtures("sglang")
def test_sglang_flags(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file.write_text(BASE + '[sglang]\ntensor_parallel_size = 2\nmodel_path = "m"\n')
    flags = "--sglang-mem-fraction-static 0.6 --sglang-disable_radix_cache --sglang-cuda-graph-bs 1 2 4"
    config = load(run_file, [*flags.split(), "--sglang-model-path=x y"])
    assert config.sglang == {
        "tp_size": 2,
        "model_path": "x y",
        "mem_fraction_static": 0.6,
        "disable_radix_cache": True,
        "cuda_graph_bs": [1, 2, 4],
    }
    assert capsys.readouterr().err == 'note: rollout.engine is "embedded", so [sglang] has no effect\n'


def test_changes(run_file: Path, tmp_path: Path) -> None:
    run_file.write_text(dump(GOOD))
    now = replace(GOOD, steps=77, train=replace(GOOD.train, lr=0.5), rollout=replace(GOOD.rollout, stop=("x",)))
    assert changes(GOOD, run_file) == []
    lr, stop = f"train.lr = 0.5 (was {GOOD.train.lr})", 'rollout.stop = ["x"] (was [])'
    assert changes(now, run_file) == [stop, lr]
    assert changes(now, run_file, "train.", "rollout.top") == [lr]
    assert changes(now, tmp_path / "none.toml") == []


def test_settings_of_servers_without_servers_are_noted(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file.write_text(dump(GOOD) + "\n")  # with [fleet], all as it is anyway
    load(run_file)
    assert capsys.readouterr().err == ""
    load(run_file, ["--fleet.engines", "2"])
    assert capsys.readouterr().err == 'note: rollout.engine is "embedded", so [fleet] has no effect\n'
    load(run_file, ["--fleet.engines", "2", "--rollout.engine", "sglang"])
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("in_file", [True, False])
def test_sglang_unknown(in_file: bool, run_file: Path) -> None:
    flags = ["--sglang-mem-fraction-statics", "0.6"]
    if in_file:
        run_file.write_text(BASE + "[sglang]\nmem_fraction_statics = 0.6\n")
        flags = []
    message = '[sglang]: sglang has no argument "mem_fraction_statics"; did you mean "mem_fraction_static"?'
    assert refusal(run_file, *flags) == message


@pytest.mark.usefixtures("sglang")
def test_sglang_flag_that_is_no_server_argument(run_file: Path) -> None:
    assert '[sglang]: sglang has no argument "config"' in refusal(run_file, "--sglang-config", "x")


@pytest.mark.parametrize("package", ["sglang", "megatron"])
def test_absent_package_is_noted(
    package: str, run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent(monkeypatch, package)
    run_file.write_text(BASE + f"[{package}]\nanything = [1, 2]\n")
    assert getattr(load(run_file), package) == {"anything": [1, 2]}
    assert f"note: {package} is not installed; [{package}] is not checked\n" in capsys.readouterr().err


def test_broken_package_is_refused(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, sglang={})
    run_file.write_text(BASE + "[sglang]\ntp_size = 2\n")
    assert refusal(run_file).startswith("sglang is installed but cannot be imported: No module named 'sglang.srt'")


@pytest.mark.usefixtures("megatron")
def test_megatron_flags(run_file: Path) -> None:
    run_file.write_text(BASE + "[megatron]\nadam_eps = 1e-6\n")
    config = load(run_file, ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--steps", "3"])
    assert config.megatron == {"adam_eps": 1e-6, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert config.steps == 3


@pytest.mark.usefixtures("megatron")
def test_megatron_unknown(run_file: Path) -> None:
    shown = refusal(run_file, "--tensor-model-paralel-size", "2")
    assert shown == "unknown flag --tensor-model-paralel-size; did you mean --tensor-model-parallel-size?"
    assert refusal(run_file, "--drft.num-steps", "2").endswith("did you mean --draft.num-steps?")
    run_file.write_text(BASE + "[megatron]\nadam_esp = 1\n")
    assert refusal(run_file) == '[megatron]: megatron has no argument "adam_esp"; did you mean "adam_eps"?'


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        ([], True),
        (["false"], False),
        (["True"], True),
        (["-3"], -3),
        (["1e-3"], 1e-3),
        (["1.2.3"], "1.2.3"),
        (['{"a": 1}'], '{"a": 1}'),
        (["1", "x"], [1, "x"]),
        ([""], ""),
    ],
)
def test_value_of_a_foreign_flag(texts: list[str], value: object, run_file: Path) -> None:
    got = load(run_file, ["--data.options.key", *texts]).data.options["key"]
    assert got == value
    assert type(got) is type(value)


# The nearest name


def edits(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, previous[j] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def typos(name: str) -> Iterator[str]:
    yield from (name[:i] + name[i + 1 :] for i in range(2, len(name)))
    yield from (name[:i] + "z" + name[i:] for i in range(2, len(name) + 1))
    yield from (name[:i] + "z" + name[i + 1 :] for i in range(2, len(name)))


def test_nearest_undoes_every_single_typo() -> None:
    flags = _our_flags()
    wrong = [(t, f, nearest(t, flags)) for f in sorted(flags)[::7] for t in typos(f) if t not in flags]
    # where two flags are equally near, either will do
    assert [(t, got) for t, flag, got in wrong if got != flag and edits(t, got) > edits(t, flag)] == []


@given(st.text(max_size=30), st.sets(st.text(min_size=1, max_size=20), min_size=1, max_size=8))
def test_nearest_always_answers(name: str, known: set[str]) -> None:
    assert nearest(name, known) in known
    assert nearest(name, {*known, name}) == name


# Round trip

text = st.text(st.characters(exclude_categories=["Cs"]))
names = text.filter(bool)
numbers = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.booleans() | st.integers(-(2**60), 2**60) | numbers | text | st.dates(date(1900, 1, 1))
tables = st.dictionaries(
    names, st.recursive(leaves, lambda x: st.lists(x) | st.dictionaries(names, x), max_leaves=6), max_size=3
)


@given(system=text, stop=st.lists(names, max_size=3), lr=st.floats(0, 1e6), options=tables, sglang=tables)
def test_dump_reads_back(
    system: str,
    stop: list[str],
    lr: float,
    options: dict[str, Any],
    sglang: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = replace(
        GOOD,
        data=replace(GOOD.data, system=system, options=options),
        rollout=RolloutConfig(stop=tuple(stop)),
        train=TrainConfig(lr=lr),
        sglang=sglang,
    )
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_text(dump(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        absent(patch, "sglang")
        assert load(path) == config
    assert dump(load(path)) == dump(config)


def test_dump_shows_every_section() -> None:
    shown = dump(GOOD)
    assert shown.startswith('out = "runs/run"\nsteps = 100\nseed = 0\n\n[model]\npath = "model"\n')
    assert "\nbetas = [0.9, 0.95]\n" in shown
    assert "[sglang]" not in shown
