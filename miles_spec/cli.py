"""The command line: one function per command.

Invariant: this module loads no torch; a command loads what it needs when it runs. An error of one of the kinds in
`SENTENCES` that our own code raised is printed as one sentence, exit status 2; anything else keeps its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from miles_spec import __version__
from miles_spec.types import RunError

TRACEBACK = "MILES_SPEC_TRACEBACK"
"""Environment variable; any value keeps the traceback of every error."""

SENTENCES = (ValueError, OSError, FloatingPointError, RunError)
"""The user's mistakes, disks and files that fail, a training that diverged, weights that did not arrive."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for an error that the message explains, or 130 for a Ctrl-C
    that nothing could be saved at."""
    texts = sys.argv[1:] if argv is None else list(argv)
    arguments, settings = _parser().parse_known_args(texts)
    try:
        if settings and not ("run" in arguments or arguments.command is _bench_train):
            raise ValueError(f"unexpected argument {settings[0]}; see `miles-spec --help`")
        if settings and "run" in arguments:
            _check_order(texts, arguments.run, settings)
        arguments.command(arguments, settings)
    except SENTENCES as e:
        if TRACEBACK in os.environ or not _ours(e.__traceback__):
            raise
        print(f"miles-spec: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if TRACEBACK in os.environ:
            raise
        print("miles-spec: interrupted", file=sys.stderr)
        return 130
    return 0


def _check_order(texts: Sequence[str], run: Path | None, settings: Sequence[str]) -> None:
    """Raises `ValueError` for settings without a run file, and for one before it whose value would be taken for it."""
    before = settings if run is None else texts[: [Path(text) for text in texts].index(run)]
    flags = [text for text in before if text in settings and text.startswith("--")]
    if wrong := next((flag for flag in flags if run is None or "=" not in flag), None):
        raise ValueError(f"{wrong} is a setting of a run file; name the run file before it")


def _train(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.settings import load
    from miles_spec.validation import validate_training

    config = load(arguments.run, settings)
    validate_training(config)
    from miles_spec.processes import rank, started

    leads = rank() == 0
    with started(config, ["train", str(arguments.run), *settings]):
        from miles_spec.loop import train

        out = train(config)
    if leads:
        print(out)


def _config(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.settings import dump, load

    print(dump(load(arguments.run, settings)), end="")


def _report(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.report import write

    print(write(arguments.directory))


def _rollout_serve(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.settings import load

    config = load(arguments.run, settings)
    from miles_spec.serve import serve

    serve(config)


def _draft_attach(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.drafts import attach, describe

    found = attach(
        arguments.model,
        arguments.out,
        family=arguments.family,
        layers=arguments.layers,
        vocab_size=arguments.vocab_size,
        vocab_data=arguments.vocab_data,
        seed=arguments.seed,
        dtype=arguments.dtype,
    )
    print(describe(found))


def _draft_import(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.drafts import describe, import_

    print(describe(import_(arguments.folder, arguments.out, model=arguments.model, dtype=arguments.dtype)))


def _draft_export(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.drafts import describe, export

    found = export(
        arguments.source, arguments.out, model=arguments.model, format=arguments.format, dtype=arguments.dtype
    )
    print(describe(found))


def _draft_inspect(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.draft.load import inspect
    from miles_spec.drafts import describe

    print(describe(inspect(arguments.folder)))


def _draft_train(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.settings import load

    config = load(arguments.run, settings)
    from miles_spec.draft_training import train

    print(train(config))


def _doctor(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.settings import load

    config = None if arguments.run is None else load(arguments.run, settings)
    from miles_spec.doctor import doctor

    doctor(config, server=not arguments.no_server)


def _bench_rollout(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.settings import load

    if arguments.engine:
        settings = [*settings, "--rollout.engine", arguments.engine]
    config = load(arguments.run, settings)
    from miles_spec.bench import rollout

    rollout(config, arguments.json, batches=arguments.batches, turns=arguments.turns)


def _bench_kernels(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.kernel_bench.run import kernels

    kernels(arguments.json, arguments.only)


def _bench_sync(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.sync_bench import sync

    sync(
        arguments.json,
        sizes=arguments.sizes,
        transports=arguments.transports,
        budget_s=arguments.budget_s,
        launch=arguments.launch,
        settings=dict(arguments.set),
    )


def _bench_train(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.settings import flags, literal
    from miles_spec.train_bench import Plan, Size, train

    plan = Plan(
        backends=arguments.backends,
        depths=arguments.depths,
        shares=arguments.shares,
        draft_vocabs=arguments.draft_vocabs,
        tokens=arguments.tokens,
        size=Size(hidden=arguments.hidden, layers=arguments.layers, vocab=arguments.vocab),
        micro_batches=arguments.micro_batches,
        turns=arguments.turns,
        warm_ups=arguments.warm_ups,
        rounds=arguments.rounds,
        recompute=arguments.gradient_checkpointing,
        megatron={flag.removeprefix("--"): literal(given) for flag, given in flags(settings)},
        budget_s=arguments.budget_s,
    )
    train(arguments.json, plan)


def _quickstart(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    from miles_spec.quickstart import main

    main()


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads values with commas between them."""

    def read(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas or spaces between them") from None

    return read


class _Flat(argparse.Action):
    """Several lists, as `nargs` and `_listed` make them, as one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


def _add_list(
    parser: argparse.ArgumentParser,
    name: str,
    kind: Callable[[str], Any],
    default: Sequence[Any],
    metavar: str,
    about: str,
) -> None:
    """An option with one value or more, with spaces or commas between them."""
    parser.add_argument(name, type=_listed(kind), nargs="+", action=_Flat, default=default, metavar=metavar, help=about)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles-spec",
        description="Reinforcement learning of language models with a draft model that is trained while it runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"miles-spec {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands, "train", _train, "Trains as the run file says and prints the directory of the run.")
    _add_run(commands, "config", _config, "Prints, as a run file, every setting that a run would use.")
    serving = commands.add_parser("rollout", help="Runs the rollout side alone.", allow_abbrev=False)
    _add_run(
        serving.add_subparsers(title="commands", metavar="COMMAND", required=True),
        "serve",
        _rollout_serve,
        "Serves a run's policy and draft from SGLang servers, from its newest checkpoint if it has one, until Ctrl-C.",
    )
    _add_draft(commands)
    bench = commands.add_parser("bench", help="Measures one part.", allow_abbrev=False)
    measured = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    rollout = _add_run(
        measured,
        "rollout",
        _bench_rollout,
        "Times a finished run's rollouts without speculation, with the frozen and with the co-trained draft. "
        "`--json PATH` writes the result there too; `--engine sglang` times servers, `--batches 1 8` these sizes, "
        "`--turns N` each so often.",
    )
    rollout.add_argument("--json", type=Path, metavar="PATH", help="write the result there too")
    rollout.add_argument("--engine", choices=("embedded", "sglang"), help="in place of the run file's")
    _add_list(rollout, "--batches", int, (), "N", "requests at a time; behind the run file")
    rollout.add_argument("--turns", type=int, default=3, metavar="N", help="of each, of which the median counts")
    kernels = _add(
        measured,
        "kernels",
        _bench_kernels,
        "Checks our kernels and times them against public ones and against the least that the same work costs, in "
        "minutes on a GPU. Without one small inputs show that they are right.",
    )
    kernels.add_argument("--json", type=Path, metavar="PATH", help="write the result there too")
    _add_list(kernels, "--only", str, (), "KERNEL", "of draft_loss, shift, logprob and attention; all if left out")
    sync = _add(
        measured,
        "sync",
        _bench_sync,
        "Times pushes of random weights into an SGLang server, of the target and of target and draft, against the "
        "bandwidth of the way they take and against SGLang's own call, in minutes. One server for each size.",
    )
    sync.add_argument("--json", type=Path, metavar="PATH", help="write the result there too")
    sizes = "parameters of the targets, about; 0.1e9, 1e9 and 3e9 if left out"
    _add_list(sync, "--sizes", float, (0.1e9, 1e9, 3e9), "N", sizes)
    ways = ("ipc", "nccl", "disk")
    _add_list(sync, "--transports", str, ways, "NAME", "of ipc, nccl (gloo without a GPU) and disk; all if left out")
    sync.add_argument("--budget-s", type=float, default=540.0, metavar="N", help="what would last longer is left out")
    sync.add_argument(
        "--launch", type=shlex.split, default=(), metavar="COMMAND", help="starts a server, as fleet.launch does"
    )
    sync.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for SGLang, as in [sglang]; may be given again",
    )
    training = _add(
        measured,
        "train",
        _bench_train,
        "Times training steps of a Qwen3-shaped policy with random weights, alone and with a draft, and beside "
        "Megatron's trainer Megatron's own path with its MTP. Megatron's own flags are taken unchanged; torchrun "
        "starts it on several GPUs.",
    )
    training.add_argument("--json", type=Path, metavar="PATH", help="write the result there too")
    for name, kind, default, metavar, about in (
        ("--backends", str, ("torch",), "NAME", "torch, megatron or both"),
        ("--depths", int, (1,), "N", "of the draft; 1 if left out"),
        ("--tokens", int, (8192, 32768), "N", "of a micro-batch; 8192 and 32768 if left out"),
        ("--shares", float, (1.0,), "X", "of a step's micro-batches that the draft learns from; 1 if left out"),
        ("--draft-vocabs", int, (), "N", "tokens that a draft is over, beside the whole vocabulary"),
    ):
        _add_list(training, name, kind, default, metavar, about)
    for name, number, about in (
        ("--hidden", 2048, "width of the policy, which is Qwen3-1.7B's shape if all of it is left out"),
        ("--layers", 28, "of the policy"),
        ("--vocab", 151936, "tokens of its vocabulary"),
        ("--micro-batches", 2, "of each data-parallel rank in a step"),
        ("--turns", 5, "steps that are timed"),
        ("--warm-ups", 2, "steps before those"),
        ("--rounds", 1, "times that each case is measured, each time after all the others"),
    ):
        training.add_argument(name, type=int, default=number, metavar="N", help=f"{about}; {number} if left out")
    training.add_argument(
        "--gradient-checkpointing", action="store_true", help="of the torch trainer, as in [train]; Megatron has flags"
    )
    training.add_argument(
        "--budget-s", type=float, default=540.0, metavar="N", help="what would begin later is left out"
    )
    report = _add(commands, "report", _report, "Writes a run's report, one static HTML page, and prints its path.")
    report.add_argument("directory", type=Path, metavar="RUN_DIR")
    doctor = _add(
        commands,
        "doctor",
        _doctor,
        "Checks an installation, a line per finding. With a run file: its launch command and `[sglang]` too.",
    )
    doctor.add_argument("run", type=Path, nargs="?", metavar="RUN.toml")
    doctor.add_argument("--no-server", action="store_true", help="leave out what needs a small server to be started")
    _add(commands, "quickstart", _quickstart, "Trains, measures and reports a small model in a few minutes.")
    return parser


def _add_draft(commands: _Commands) -> None:
    draft = commands.add_parser("draft", help="Makes, converts, shows and trains drafts.", allow_abbrev=False)
    commands = draft.add_subparsers(title="commands", metavar="COMMAND", required=True)
    attach = _add(commands, "attach", _draft_attach, "Writes a fresh draft for a model, as SGLang takes it.")
    attach.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or smollm2")
    attach.add_argument("out", type=Path, metavar="OUT")
    attach.add_argument(
        "--family", default="eagle", metavar="NAME", help="eagle, eagle3, nextn, mimo or qwen_mtp; eagle if left out"
    )
    attach.add_argument(
        "--layers", type=int, default=1, metavar="N", help="a layer for each of the first N depths; nextn and mimo"
    )
    attach.add_argument("--vocab-size", type=int, default=0, metavar="N", help="draft over so many tokens only")
    attach.add_argument(
        "--vocab-data",
        type=Path,
        metavar="FILE",
        help="jsonl or parquet with messages, text, or prompt and response: its most frequent tokens are those",
    )
    attach.add_argument("--seed", type=int, default=0, metavar="N")
    importing = _add(
        commands,
        "import",
        _draft_import,
        "Writes a draft as SGLang takes it, from a folder of EAGLE's, EAGLE3's, SpecForge's or speculators', or from "
        "the MTP layer in a model's.",
    )
    importing.add_argument("folder", type=Path, metavar="FOLDER")
    importing.add_argument("out", type=Path, metavar="OUT")
    importing.add_argument("--model", required=True, metavar="MODEL", help="the model that it is a draft of")
    exporting = _add(
        commands,
        "export",
        _draft_export,
        "Writes a draft, of a folder or of a run's newest checkpoint, as SGLang, SpecForge or speculators take it.",
    )
    exporting.add_argument("source", type=Path, metavar="FOLDER|RUN_DIR")
    exporting.add_argument("out", type=Path, metavar="OUT")
    exporting.add_argument(
        "--model", default="", metavar="MODEL", help="the model that it is a draft of; a run names it"
    )
    exporting.add_argument("--format", choices=("sglang", "specforge", "speculators"), default="sglang")
    for command in (attach, importing, exporting):
        command.add_argument(
            "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of its weights"
        )
    inspect = _add(commands, "inspect", _draft_inspect, "Prints what a draft's folder holds, and what SGLang is told.")
    inspect.add_argument("folder", type=Path, metavar="FOLDER")
    _add_run(
        commands,
        "train",
        _draft_train,
        "Trains a draft offline, on given responses or on the model's own, and prints the directory it is in.",
    )


def _setting(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, whose value is JSON or, where it is none, text."""
    key, given, value = text.partition("=")
    if not key or not given:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


_Command = Callable[[argparse.Namespace, Sequence[str]], None]
_Commands = Any  # argparse's own type of subparsers is private


def _add(commands: _Commands, name: str, command: _Command, about: str, **options: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, allow_abbrev=False, **options
    )
    parser.set_defaults(command=command)
    return parser


def _add_run(commands: _Commands, name: str, command: _Command, about: str) -> argparse.ArgumentParser:
    """A command that takes a run file and then settings in three layers."""
    parser = _add(commands, name, command, about, usage="%(prog)s RUN.toml [--section.key VALUE ...]", add_help=False)
    parser.add_argument("-h", "--help", action=_SettingsHelp, nargs=0)
    parser.add_argument("run", type=Path, metavar="RUN.toml")
    return parser


class _SettingsHelp(argparse.Action):
    """Prints the command's purpose with every setting, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import tyro

        from miles_spec.config import RunConfig

        about = (
            f"{parser.description} Every setting can stand in the run file too (`--draft.num-steps 3` is "
            "`num_steps = 3` in `[draft]`); the command line wins. `--data.options.KEY VALUE` reaches the data source, "
            "`--sglang-KEY VALUE` SGLang's server, and Megatron's own flags are taken unchanged."
        )
        tyro.cli(RunConfig, prog=f"{parser.prog} RUN.toml", description=about, args=["--help"])


def _ours(traceback: TracebackType | None) -> bool:
    """Whether the error was raised by a line of this package."""
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__")).split(".")[0] == "miles_spec"


if __name__ == "__main__":
    from miles_spec import cli  # under its name: errors of a module named `__main__` would not be ours

    sys.exit(cli.main())
