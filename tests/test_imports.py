"""The import rule: who may import whom, read from the source.

Imports under `if TYPE_CHECKING` are types only and do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "draft", "sync", "train", "rollout")
COMMON = {"models", "types", "config"}
ALLOWED = {
    "types": set(),
    "stored": set(),
    "config": {"types"},
    "widen": set(),
    "models": {"types", "config", "kernels", "widen"},
    "kernels": {"kernels", "types"},
    "draft": {"draft", "kernels"} | COMMON,
    "train": {"train", "draft", "kernels", "stored"} | COMMON,
}
"""Layers that may import these and nothing else of ours; every other layer may import all but `FORBIDDEN`."""
TOP = {
    *(
        "loop",
        "assemble",
        "run",
        "sampling",
        "cli",
        "quickstart",
        "serve",
        "doctor",
        "drafts",
        "draft_data",
        "draft_training",
    ),
    *("bench", "kernel_bench", "sync_bench", "train_bench", "megatron_stock"),
}
"""The loop with its parts, and the commands: they may import everything, and nobody else may import them."""
FORBIDDEN = {"train"} | TOP


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `source` imports at run time, inside functions too."""

    def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child)
            return
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            # `from miles_spec import loop` names the layer in what it imports
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{a.name}" for a in node.names] if base == "miles_spec" else [base]
            yield from ((node.lineno, name) for name in names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(source))


def violations(layer: str, source: str) -> list[str]:
    """What `source`, a file of `layer`, imports against the rule."""
    found = []
    for line, name in imports(source):
        parts = name.split(".")
        if parts[0] in ("", *FOLDERS):
            found.append(f"line {line}: {name} is not written as miles_spec...")
        elif parts[0] == "miles_spec" and len(parts) > 1 and not parts[1].startswith("__") and layer not in TOP:
            allowed = parts[1] in ALLOWED[layer] if layer in ALLOWED else parts[1] not in FORBIDDEN
            if not allowed:
                found.append(f"line {line}: {layer} imports {name}")
    return found


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] in FOLDERS else Path(parts[1]).stem


def sources() -> list[Path]:
    package = [p for p in (ROOT / "miles_spec").iterdir() if not p.is_symlink()]
    files = [p for p in package if p.suffix == ".py"]
    folders = [p for p in package if p.is_dir()] + [ROOT / name for name in FOLDERS]
    return sorted(files + [f for folder in folders for f in folder.rglob("*.py")])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_import_rule(path: Path) -> None:
    assert violations(layer_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("types", "import miles_spec.config"),
        ("types", "from miles_spec import config"),
        ("kernels", "from miles_spec.models import load"),
        ("kernels", "import kernels.layout"),
        ("kernels", "from .layout import PackedLayout"),
        ("draft", "def f():\n    from miles_spec.train.base import Trainer"),
        ("sync", "from miles_spec.train.base import Trainer"),
        ("rollout", "from miles_spec import train"),
        ("rollout", "import miles_spec.loop"),
        ("rollout", "from miles_spec import assemble"),
        ("train", "from miles_spec.rollout.engine import Engine"),
        ("report", "from miles_spec.cli import main"),
        ("data", "if TYPE_CHECKING:\n    pass\nelse:\n    from train.base import Trainer"),
    ],
)
def test_rule_catches(layer: str, source: str) -> None:
    assert len(violations(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("types", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from miles_spec.kernels.layout import X"),
        ("kernels", "from miles_spec.kernels.layout import PackedLayout\nfrom miles_spec.types import Role"),
        ("train", "from miles_spec.draft.spec import EAGLE\nimport torch, datasets"),
        ("cli", "from miles_spec import __version__, loop"),
        ("loop", "import miles_spec.train.base"),
        ("data", "from miles_spec import __version__"),
    ],
)
def test_rule_lets_through(layer: str, source: str) -> None:
    assert violations(layer, source) == []
