"""A user's own functions and classes, named in the run file as `pkg.mod:name`.

Invariant: whatever is wrong with such a name or with the function's parameters is said at start-up, in one sentence
that names the setting; nothing of it waits for the first call.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

_FORM = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` with the nearest of `known`, or "" if none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def load(path: str, *, what: str) -> Callable[..., Any]:
    """The callable that `path`, `pkg.mod:name`, stands for.

    The current directory is importable, after everything that is installed. `what` is the setting that `path` came
    from, for the sentence of a `ValueError`: `path` is not of that form, the module does not exist or fails to import,
    or its attribute does not exist or is not callable.
    """
    match = _FORM.fullmatch(path)
    if match is None:
        raise ValueError(f'{what} = "{path}" does not have the form "pkg.mod:function"')
    if (here := os.getcwd()) not in sys.path:
        # last, so that a folder of the user's never hides an installed package
        sys.path.append(here)
    module = _import(match["module"], f'{what} = "{path}"')
    found = getattr(module, match["name"], None)
    if found is None:
        where = getattr(module, "__file__", None) or "a folder without __init__.py"
        raise ValueError(
            f'{what} = "{path}": module {match["module"]} ({where}) has no "{match["name"]}"'
            + suggest(match["name"], vars(module))
        )
    if not callable(found):
        raise ValueError(f'{what} = "{path}" is not a function but of type {type(found).__name__}')
    return found


def _import(name: str, subject: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ValueError(
                f"{subject}: there is no module {error.name}, neither installed nor in {os.getcwd()}"
            ) from error
        raise ValueError(f"{subject}: importing {name} needs the module {error.name}, which is missing") from error
    except Exception as error:
        raise ValueError(f"{subject}: importing {name} raised {type(error).__name__}: {error}") from error


def check_signature(fn: Callable[..., Any], params: Sequence[str], what: str) -> None:
    """Raises `ValueError` naming both signatures if `fn` cannot be called with `params` as keyword arguments.

    `what` says whose function it is and begins the sentence.
    """
    name = getattr(fn, "__name__", type(fn).__name__)
    wanted = f"{name}({', '.join(params)})"
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what}: the signature of {name} cannot be read; wrap it in a function that takes ({', '.join(params)})"
        ) from error
    try:
        signature.bind(**dict.fromkeys(params))
    except TypeError as error:
        raise ValueError(f"{what}: {name}{signature} cannot be called as {wanted}: {error}") from error


def require(module: str, *, package: str, what: str) -> ModuleType:
    """An optional library of the extra `tasks`. Raises `ValueError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what} needs the package {package} ({error}): pip install 'miles-spec[tasks]'") from error
