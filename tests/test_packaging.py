"""The layout: five top-level folders are packages of `miles_spec` and nothing else, in the tree and in the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "draft", "sync", "train", "rollout")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def python(code: str, cwd: Path, *path: Path) -> object:
    """What `code` prints as JSON, run in a fresh interpreter in `cwd` with `path` on `sys.path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    environment.pop("PYTHONSAFEPATH", None)  # the current directory is part of what is tested
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def modules_in_tree() -> set[str]:
    """Every file of the package as the wheel should hold it."""
    files = set()
    for top in ("miles_spec", *FOLDERS):
        for path in (ROOT / top).rglob("*"):
            inside = path.relative_to(ROOT)
            linked = top == "miles_spec" and inside.parts[1] in FOLDERS
            if path.suffix in (".py", ".typed") and not linked:
                files.add(str(inside) if top == "miles_spec" else f"miles_spec/{inside}")
    return files


def test_folders_have_no_init() -> None:
    assert [str(f) for name in FOLDERS for f in (ROOT / name).rglob("__init__.py")] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_link_resolves(name: str) -> None:
    link = ROOT / "miles_spec" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


def test_every_folder_with_python_is_a_package() -> None:
    folders = {str(Path(file).parent).replace("/", ".") for file in modules_in_tree()}
    assert folders <= set(SETUPTOOLS["packages"])
    assert set(SETUPTOOLS["packages"]) == set(SETUPTOOLS["package-dir"])
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert (ROOT / folder).resolve() == (ROOT / package.replace(".", "/")).resolve()


def test_wheel_holds_each_file_of_the_tree_once(tmp_path: Path) -> None:
    # a copy, because setuptools would reuse what an earlier build left in the tree
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("miles_spec", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.name in ("pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(path, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", str(tmp_path), str(tree)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == modules_in_tree()

    # unpacked, it stands on its own beside this checkout
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import json, miles_spec.kernels.layout as m; print(json.dumps([m.__name__, m.__file__]))"
    shown = python(code, tmp_path, site)
    assert shown == ["miles_spec.kernels.layout", str(site / "miles_spec" / "kernels" / "layout.py")]


def test_no_module_is_loaded_under_two_names(tmp_path: Path) -> None:
    names = sorted(
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in modules_in_tree()
        if file.startswith(tuple(f"miles_spec/{name}/" for name in FOLDERS))
    )
    code = (
        "import importlib, json, os, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "loaded = [(n, os.path.realpath(m.__file__)) for n, m in sys.modules.items() if getattr(m, '__file__', None)]\n"
        f"print(json.dumps([(n, f) for n, f in loaded if f.startswith({str(ROOT)!r} + '/') and '/.venv/' not in f]))"
    )
    loaded = python(code, tmp_path, ROOT)
    assert isinstance(loaded, list)
    assert len(loaded) >= len(names)
    assert all(name.startswith("miles_spec") for name, _ in loaded)
    assert len({file for _, file in loaded}) == len(loaded)


@pytest.mark.parametrize("name", FOLDERS)
def test_top_level_name_is_not_ours(name: str, tmp_path: Path) -> None:
    code = (
        "import importlib.util, json, miles_spec\n"
        f"spec = importlib.util.find_spec({name!r})\n"
        "places = list(spec.submodule_search_locations or [spec.origin]) if spec else []\n"
        "print(json.dumps(places))"
    )
    places = python(code, tmp_path)
    assert isinstance(places, list)
    assert not [place for place in places if Path(place).resolve() == ROOT / name]


def test_installed_package_of_the_same_name_wins_in_the_root(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = "import json, kernels; print(json.dumps(kernels.__file__))"
    assert python(code, ROOT, tmp_path) == str(tmp_path / "kernels" / "__init__.py")


@pytest.mark.parametrize("name", ["miles_spec", "miles_spec.types", "miles_spec.config", "miles_spec.cli"])
def test_import_is_light(name: str, tmp_path: Path) -> None:
    code = (
        f"import json, sys, {name}\n"
        "print(json.dumps([m for m in ('torch', 'ray', 'sglang', 'transformers', 'numpy') if m in sys.modules]))"
    )
    assert python(code, tmp_path, ROOT) == []


def test_no_benchmark_hides_a_package() -> None:
    # a script's own folder comes first on its path, and transformers looks for a package named `kernels`
    scripts = (ROOT / "benchmarks").glob("*.py")
    assert not {script.stem for script in scripts} & set(FOLDERS)
