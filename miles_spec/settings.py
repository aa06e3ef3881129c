"""Makes a `RunConfig` from a TOML run file and the command line, and writes one back as TOML.

Three layers share the command line: ours (`--draft.num-steps 3`), SGLang's with a prefix
(`--sglang-mem-fraction-static 0.6`) and Megatron's unchanged (`--tensor-model-parallel-size 2`). Invariant: no name is
ever ignored; each is ours, or the installed package's, or refused with the nearest one that is known.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import inspect
import json
import sys
import tomllib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from miles_spec.config import FleetConfig, RunConfig, values
from miles_spec.validation import validate

_SGLANG_PREFIX = "--sglang-"
_OPTIONS_PREFIX = "--data.options."
_MEGATRON_ARGUMENTS = (
    ("megatron.core.transformer", "TransformerConfig"),
    ("megatron.core.transformer", "MLATransformerConfig"),
    ("megatron.core.optimizer", "OptimizerConfig"),
    ("megatron.core.distributed", "DistributedDataParallelConfig"),
)
"""The dataclasses whose fields are Megatron's arguments; parallel sizes are inherited by `TransformerConfig`."""


def load(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file's settings (defaults if `path` is None) with the command line's `overrides` on top, validated.

    Raises `ValueError` in one sentence for a file that cannot be read, a name that is unknown, a value of a wrong type
    or one that cannot work. A value on the command line that does not parse ends the process as `argparse` does.
    """
    config = RunConfig() if path is None else _from_table(_read(path), str(path))
    config = _override(config, overrides)
    config = replace(config, sglang=_known("sglang", config.sglang), megatron=_known("megatron", config.megatron))
    for table, key, given, backend, needed in (
        ("sglang", "rollout.engine", config.sglang, config.rollout.engine, "sglang"),
        ("fleet", "rollout.engine", config.fleet != FleetConfig(), config.rollout.engine, "sglang"),
        ("megatron", "train.backend", config.megatron, config.train.backend, "megatron"),
    ):
        if given and backend != needed:
            _note(f'{key} is "{backend}", so [{table}] has no effect')
    validate(config)
    return config


def nearest(name: str, known: Collection[str]) -> str:
    """The one of `known` (not empty) that is most like `name`, by difflib's ratio."""
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]


# Run files


def changes(config: RunConfig, path: Path, *sections: str) -> list[str]:
    """What `config` has other than the run file `path`, in `sections` or in all, as sentences put it; nothing where
    there is no such file, or it is of another version. `out` and `steps` are left out."""
    try:
        before = dict(values(_from_table(_read(path), str(path))))
    except ValueError:
        return []
    return [
        f"{name} = {_toml(value)} (was {_toml(before[name])})"
        for name, value in values(config)
        if value != before[name] and name not in ("out", "steps") and (not sections or name.startswith(sections))
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no run file {path}") from None
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path} is not valid TOML: {e}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    except OSError as e:
        raise ValueError(f"cannot read the run file {path}: {e.strerror}") from None


def _from_table(table: Mapping[str, Any], source: str) -> RunConfig:
    hints = get_type_hints(RunConfig)
    sections = {name: _section(cls) for name, cls in hints.items() if is_dataclass(cls)}
    made: dict[str, Any] = {}
    for name, value in table.items():
        if name not in hints:
            if isinstance(value, dict):
                near = nearest(name, [n for n, kind in hints.items() if n in sections or get_origin(kind) is dict])
                raise ValueError(f"{source}: unknown section [{name}]; did you mean [{near}]?")
            raise ValueError(f"{source}: unknown key {json.dumps(name)}{_suggest(name, '', sections)}")
        if name not in sections:
            made[name] = _checked(value, hints[name], f"{source}: {name}")
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{source}: {name} must be a table [{name}], got {_shown(value)}")
        for key in value:
            if key not in sections[name]:
                raise ValueError(f"{source}: unknown key {json.dumps(key)} in [{name}]{_suggest(key, name, sections)}")
        checked = {k: _checked(v, sections[name][k], f"{source}: {name}.{k}") for k, v in value.items()}
        made[name] = hints[name](**checked)
    return RunConfig(**made)


def _section(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _suggest(name: str, section: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """`; did you mean ...?`: the same key of another section if there is one, else the nearest name of this section."""
    for other, keys in sections.items():
        if name in keys:
            return f"; did you mean {other}.{name}?"
    known = sections[section] if section else [f.name for f in fields(RunConfig)]
    return f"; did you mean {json.dumps(nearest(name, known))}?"


def _checked(value: Any, kind: Any, where: str) -> Any:
    """`value` as a `kind`: an integer may stand for a float, an array for a tuple; anything else is refused."""
    if kind is float and type(value) is int:
        return float(value)
    if kind in (bool, int, float, str):
        if type(value) is kind:
            return value
        expected = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]
        raise ValueError(f"{where} must be {expected}, got {_shown(value)}")
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        if value in arguments:
            return value
        *others, last = (json.dumps(a) for a in arguments)
        choice = f"one of {', '.join(others)} or {last}" if others else last
        raise ValueError(f"{where} must be {choice}, got {_shown(value)}")
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be an array, got {_shown(value)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(value) != len(kinds):
            raise ValueError(f"{where} must be an array of {len(kinds)}, got {len(value)}")
        return tuple(_checked(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    assert get_origin(kind) is dict
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "a table",
    }
    return f"{_toml(value)} ({names.get(type(value), 'a date or time')})"


# The command line


def _override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with the command line's values; tyro parses what is ours."""
    ours = _our_flags()
    own: list[str] = []
    tables: dict[str, dict[str, Any]] = {"options": {}, "sglang": {}, "megatron": {}}
    for flag, given in flags(overrides):
        name = flag.replace("_", "-")
        if name in ours:
            if ours[name] and given in (["true"], ["false"]):
                flag, given = flag if given == ["true"] else ours[name], []
            own += [f"{flag}={given[0]}"] if len(given) == 1 else [flag, *given]
        elif flag.startswith(_OPTIONS_PREFIX):
            tables["options"][flag.removeprefix(_OPTIONS_PREFIX)] = literal(given)
        elif name.startswith(_SGLANG_PREFIX):
            tables["sglang"][name.removeprefix(_SGLANG_PREFIX).replace("-", "_")] = literal(given)
        elif (key := name.removeprefix("--").replace("-", "_")) in (megatron := _names("megatron") or {}):
            tables["megatron"][key] = literal(given)
        else:
            near = nearest(name, ours.keys() | {f"--{_dashed(n)}" for n in megatron})
            absent = "" if megatron else " (Megatron's own flags need megatron-core, which is not installed)"
            raise ValueError(f"unknown flag {flag}; did you mean {near}?{absent}")
    if own:
        import tyro

        # tyro would make a flag of every entry of a table, so the tables are put back afterwards
        bare = replace(config, sglang={}, megatron={}, data=replace(config.data, options={}))
        parsed = tyro.cli(RunConfig, args=own, default=bare, prog="miles-spec train")
        config = replace(
            parsed,
            sglang=config.sglang,
            megatron=config.megatron,
            data=replace(parsed.data, options=config.data.options),
        )
    return replace(
        config,
        sglang=config.sglang | tables["sglang"],
        megatron=config.megatron | tables["megatron"],
        data=replace(config.data, options=config.data.options | tables["options"]),
    )


def flags(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values: what follows it up to the next `--`, or what `=` joins to it."""
    flag, given = "", list[str]()
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            if flag:
                yield flag, given
            flag, equals, value = argument.partition("=")
            given = [value] if equals else []
        elif flag:
            given.append(argument)
        else:
            raise ValueError(f"unexpected argument {json.dumps(argument)}: settings are written --section.key value")
    if flag:
        yield flag, given


def _our_flags() -> dict[str, str]:
    """Every flag that tyro makes of `RunConfig`, with dashes; to one that is true or false, the flag that denies it."""
    found = {}
    for name, kind in get_type_hints(RunConfig).items():
        settings = _section(kind) if is_dataclass(kind) else {"": kind}
        for key, key_kind in settings.items():
            if get_origin(key_kind) is not dict:
                prefix = f"--{name}." if key else "--"
                denied = _dashed(f"{prefix}no-{key or name}") if key_kind is bool else ""
                found[_dashed(f"{prefix}{key or name}")] = denied
                if denied:
                    found[denied] = ""
    return found


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def literal(given: Sequence[str]) -> Any:
    """The value of a flag that is not ours: true without one, a list of several; a boolean or number where it reads as
    one, else the text."""
    if not given:
        return True
    if len(given) > 1:
        return [literal([text]) for text in given]
    text = given[0]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# Arguments of other packages


def _known(package: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` under the package's own names; refuses what the package does not know, with a note if it is absent."""
    names = _names(package) if given else {}
    if names is None:
        _note(f"{package} is not installed; [{package}] is not checked")
        return dict(given)
    for key in given:
        if key not in names:
            near = json.dumps(nearest(key, names))
            raise ValueError(f"[{package}]: {package} has no argument {json.dumps(key)}; did you mean {near}?")
    return {names[key]: value for key, value in given.items()}


def _names(package: str) -> dict[str, str] | None:
    """Every argument name of the package to the field it sets; None where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return _sglang_names() if package == "sglang" else _megatron_names()
    except ImportError as e:
        raise ValueError(f"{package} is installed but cannot be imported: {e}") from e


def _sglang_names() -> dict[str, str]:
    """What SGLang's server takes, aliases of its command line included."""
    server = importlib.import_module("sglang.srt.server_args").ServerArgs
    parser = argparse.ArgumentParser(add_help=False)
    server.add_cli_args(parser)
    # a dataclass in some versions and a msgspec.Struct in others; both have this signature
    names = {name: name for name in inspect.signature(server).parameters if not name.startswith("_")}
    aliases = {
        option.removeprefix("--").replace("-", "_"): action.dest
        for action in parser._actions
        for option in action.option_strings
        if action.dest in names
    }
    return aliases | names


def _megatron_names() -> dict[str, str]:
    """The fields of Megatron's configuration classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it can do without
        classes = [getattr(importlib.import_module(module), name) for module, name in _MEGATRON_ARGUMENTS]
    return {f.name: f.name for cls in classes for f in fields(cls)}


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


# Writing


def dump(config: RunConfig) -> str:
    """TOML that `load` reads back as the same configuration."""
    lines: list[str] = []
    tables: list[str] = []
    for top in fields(config):
        value = getattr(config, top.name)
        if is_dataclass(value):
            tables += ["", f"[{top.name}]"]
            tables += [f"{f.name} = {_toml(getattr(value, f.name))}" for f in fields(value)]
        elif isinstance(value, dict):
            if value:
                tables += ["", f"[{top.name}]", *(_pair(k, v) for k, v in value.items())]
        else:
            lines.append(f"{top.name} = {_toml(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml(value: Any) -> str:
    """One value in TOML, tables inline."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML also wants DEL escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    assert isinstance(value, dict), f"TOML has no {type(value).__name__}"
    return f"{{{', '.join(_pair(k, v) for k, v in value.items())}}}"


def _pair(key: str, value: Any) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return f"{key if bare else _toml(key)} = {_toml(value)}"
