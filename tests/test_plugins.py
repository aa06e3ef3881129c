"""Loading by name: what works, and one sentence for each way to get it wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_spec.plugins import check_signature, load, require, suggest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; modules `plug_*` are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("plug_")]:
        del sys.modules[name]


def test_loads_from_the_current_directory(here: Path) -> None:
    (here / "plug_a").mkdir()
    (here / "plug_a" / "inner.py").write_text("def double(x):\n    return 2 * x\n")
    assert load("plug_a.inner:double", what="reward.kind")(4) == 8


def test_installed_modules_come_before_the_current_directory(here: Path) -> None:
    sys.modules.pop("colorsys", None)
    (here / "colorsys.py").write_text("def gcd(): ...\n")
    with pytest.raises(ValueError, match=r"module colorsys \(.*python.*colorsys\.py\) has no"):
        load("colorsys:gcd", what="reward.kind")


@pytest.mark.parametrize("path", ["", "plug", "plug:", ":f", "plug.py:f", "a/b:f", "a:b:c", "a: f", "a..b:f"])
def test_form(path: str, here: Path) -> None:
    (here / "plug.py").write_text("f = 1\n")
    with pytest.raises(ValueError, match=r"reward\.kind = .* (does not have the form|no module)"):
        load(path, what="reward.kind")


def test_missing_module_and_attribute(here: Path) -> None:
    (here / "plug_b.py").write_text("def reward(): ...\nconstant = 3\n")
    with pytest.raises(ValueError, match=r"there is no module plug_z, neither installed nor in .*"):
        load("plug_z.sub:f", what="reward.kind")
    with pytest.raises(ValueError, match=r'plug_b\.py\) has no "rewrd"; did you mean "reward"\?'):
        load("plug_b:rewrd", what="reward.kind")
    with pytest.raises(ValueError, match="is not a function but of type int"):
        load("plug_b:constant", what="reward.kind")


def test_a_module_that_fails_to_import(here: Path) -> None:
    (here / "plug_c.py").write_text("import no_such_library_at_all\n")
    (here / "plug_d.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="importing plug_c needs the module no_such_library_at_all"):
        load("plug_c:f", what="reward.kind")
    with pytest.raises(ValueError, match="importing plug_d raised ZeroDivisionError: division by zero"):
        load("plug_d:f", what="reward.kind")


def test_signatures() -> None:
    def two(prompt: str, response: str, scale: float = 1.0) -> float:
        return scale

    def one(prompt: str) -> float:
        return 1.0

    def more(prompt: str, response: str, judge: object) -> float:
        return 1.0

    def any_(**kwargs: object) -> float:
        return 1.0

    check_signature(two, ("prompt", "response"), "reward")
    check_signature(any_, ("prompt", "response"), "reward")
    with pytest.raises(ValueError, match=r"reward: one\(prompt: .* cannot be called as one\(prompt, response\): got"):
        check_signature(one, ("prompt", "response"), "reward")
    with pytest.raises(ValueError, match="missing a required argument: 'judge'"):
        check_signature(more, ("prompt", "response"), "reward")


def test_a_signature_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match=r"the signature of type cannot be read; wrap it"):
        check_signature(type, ("prompt",), "reward")


def test_require() -> None:
    assert require("json", package="json", what="x").loads("1") == 1
    with pytest.raises(ValueError, match=r"x needs the package nope \(.*\): pip install 'miles-spec\[tasks\]'"):
        require("no_such_library_at_all", package="nope", what="x")


def test_suggest() -> None:
    assert suggest("rewrad", ["reward", "prompt"]) == '; did you mean "reward"?'
    assert suggest("zzz", ["reward"]) == ""
