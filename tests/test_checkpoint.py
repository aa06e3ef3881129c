"""Checkpoints come back bit for bit, and a crash or a full disk at any moment leaves one that loads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fakes import flip_bit
from miles_spec import checkpoint
from miles_spec.checkpoint import load, load_latest, steps

VALUES = {"cursor": 7, "state": [1, 2.5, None, "é"], "nested": {"lr": 1e-5, "third": 1 / 3, "big": 2**63 + 1}}


def save(out: Path, step: int, tensors: dict[str, torch.Tensor], values: dict[str, Any], *, keep: int) -> Path:
    return checkpoint.save(out, step, tensors.items(), values, keep=keep)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 4, generator=generator)
    nan = torch.tensor([0x7FC1, 0xFF80, 1], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return {
        "base": base,
        "shared": base,
        "transposed": base.T,
        "part": base[1:3, 1],
        "bf16": base.bfloat16(),
        "nan payloads": nan,
        "fp16": base.half(),
        "fp64": base.double(),
        "fp8": base.to(torch.float8_e4m3fn),
        "random state": torch.randint(0, 256, (13,), generator=generator).to(torch.uint8),
        "int64": torch.tensor([-(2**62), 5]),
        "0-d": torch.tensor(3, dtype=torch.int64),
        "flag": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base + 1),
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: Mapping[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(got[name]) == raw(tensor), name


def hidden(out: Path) -> list[str]:
    root = out / "checkpoints"
    return [p.name for p in root.iterdir() if p.name.startswith(".")] if root.exists() else []


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 12, tensors(), VALUES, keep=2)
    assert path == tmp_path / "checkpoints" / "step_000012"
    got = load_latest(tmp_path)
    assert got is not None
    assert (got.path, got.step, got.values) == (path, 12, VALUES)
    assert_same(got.tensors, tensors())
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "tensors_00000.safetensors"]
    assert hidden(tmp_path) == []


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_file_is_what_safetensors_reads(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random sets of tensors, read with the library's own reader."""
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    described = data.draw(
        st.dictionaries(st.text(min_size=1).filter(lambda n: n != "__metadata__"), st.tuples(shapes, dtypes))
    )
    made = {name: (torch.rand(shape) * 2).to(dtype) for name, (shape, dtype) in described.items()}
    path = save(tmp_path_factory.mktemp("out"), 1, made, {}, keep=1)
    files = [load_file(file) for file in path.glob("*.safetensors")]
    assert len(files) == bool(made)
    assert_same({name: tensor for file in files for name, tensor in file.items()}, made)


def test_many_tensors_go_to_several_files_and_no_more_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    alive: list[weakref.ref[torch.Tensor]] = []
    held = []

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for i, size in enumerate((10, 10, 5, 60, 3, 0, 22)):
            held.append(sum(ref() is not None for ref in alive))
            tensor = torch.full((size,), float(i))
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor.view(-1)

    path = checkpoint.save(tmp_path, 1, made(), {}, keep=1)
    sizes = [[t.numel() for t in load_file(file).values()] for file in sorted(path.glob("*.safetensors"))]
    assert [sorted(of_file) for of_file in sizes] == [[5, 10, 10], [60], [0, 3, 22]]
    assert max(held) <= 4  # those of a file, and the one that begins the next
    got = load(path).tensors
    assert len(got) == 7
    assert all(torch.equal(got[f"t{i}"], torch.full((n,), float(i))) for i, n in enumerate((10, 10, 5, 60, 3, 0, 22)))
    with pytest.raises(KeyError):
        got["t7"]
    (path / "tensors_00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tensors_00001\.safetensors is missing"):
        load(path)


def test_what_is_read_can_be_changed_and_the_file_stays(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"a": torch.arange(3.0)}, {}, keep=1)
    load(path).tensors["a"].zero_()
    assert load(path).tensors["a"].tolist() == [0, 1, 2]


def test_an_error_of_whoever_gives_the_tensors_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(), {}, keep=1)
    ended = []

    def lost() -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield "a", torch.zeros(3)
            raise RuntimeError("rank 1 is gone")
        finally:
            ended.append(True)

    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        checkpoint.save(tmp_path, 2, lost(), {}, keep=1)
    assert ended and steps(tmp_path) == [1] and hidden(tmp_path) == []


def test_nothing_saved_gives_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert steps(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    assert load_latest(tmp_path) is None


def test_no_tensors_and_no_values(tmp_path: Path) -> None:
    got = load(save(tmp_path, 1, {}, {}, keep=1))
    assert (dict(got.tensors), got.values) == ({}, {})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100, 1_000_000):
        save(tmp_path, step, {}, {}, keep=2)
    assert steps(tmp_path) == [100, 1_000_000]
    save(tmp_path, 50, {}, {}, keep=1)
    assert steps(tmp_path) == [50, 100, 1_000_000]  # later ones are another run's, and the user's to remove
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert steps(tmp_path) == [50, 100, 1_000_000]


def test_a_checkpoint_is_written_while_others_read(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(1), {"seed": 1}, keep=1)
    seen = []

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors(2).items():
            seen.append(load_latest(tmp_path))
            yield name, tensor

    checkpoint.save(tmp_path, 2, made(), {"seed": 2}, keep=1)
    assert {got and got.values["seed"] for got in seen} == {1}
    got = load_latest(tmp_path)
    assert got is not None and got.values == {"seed": 2}
    assert_same(got.tensors, tensors(2))


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 3, tensors(0), {"n": 0}, keep=1)
    save(tmp_path, 3, tensors(1), {"n": 1}, keep=1)
    got = load_latest(tmp_path)
    assert got is not None and got.values == {"n": 1}
    assert_same(got.tensors, tensors(1))
    assert hidden(tmp_path) == []


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, not 0"):
        save(tmp_path, 1, {}, {}, keep=0)
    with pytest.raises(ValueError, match=r"values of the checkpoint of step 1 cannot be written as JSON: .*PosixPath"):
        save(tmp_path, 1, {}, {"path": tmp_path}, keep=1)
    with pytest.raises(ValueError, match=r"tensor 'c' of dtype torch\.complex128 cannot be written"):
        save(tmp_path, 1, {"c": torch.zeros(1, dtype=torch.complex128)}, {}, keep=1)
    assert steps(tmp_path) == [] and hidden(tmp_path) == []


def test_integer_keys_become_strings_and_stay_intact(tmp_path: Path) -> None:
    """Sorted as numbers and as strings, 9 and 10 change places; the checksum must not mind."""
    got = load(save(tmp_path, 1, {}, {"by_id": {9: "a", 10: "b"}, "pair": (1, 2)}, keep=1))
    assert got.values == {"by_id": {"9": "a", "10": "b"}, "pair": [1, 2]}


# Faults on the disk after the write


def test_every_flipped_bit_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 2, {"a": torch.arange(3.0)}, {}, keep=1) / "tensors_00000.safetensors"
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"corrupt: .*tensors_00000\.safetensors differs from its checksum"):
            load(path.parent)


def test_a_flipped_bit_of_the_state_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = save(tmp_path, 2, {"a": torch.arange(3.0)}, {"n": 17, "x": 0.5, "s": "ab"}, keep=1) / "state.json"
    data = path.read_bytes()
    noticed, bits = 0, range(0, 8 * len(data), 3)  # every third, so two or three of each byte
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            got = load(path.parent)
        except ValueError as error:
            noticed += 1
            assert "state.json" in str(error) and "\n" not in str(error)
        else:  # one kind of white space for another
            assert (got.step, got.values) == (2, {"n": 17, "x": 0.5, "s": "ab"})
    assert noticed > 0.9 * len(bits)


@pytest.mark.parametrize("name", ["tensors_00000.safetensors", "state.json"])
def test_truncated_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 2, tensors(), VALUES, keep=1) / name
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 0):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=f"the checkpoint is corrupt: {path} "):
            load(path.parent)
    path.unlink()
    with pytest.raises(ValueError, match=f"the checkpoint is corrupt: {path} is missing"):
        load(path.parent)


def test_a_corrupt_newest_one_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step, tensors(step), {}, keep=2)
    newest = tmp_path / "checkpoints" / "step_000010"
    (newest / "tensors_00000.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"tensors_00000\.safetensors is missing; removing .*step_000010 resumes from step 5$"
    ):
        load_latest(tmp_path)
    shutil.rmtree(newest)
    got = load_latest(tmp_path)
    assert got is not None and got.step == 5
    (got.path / "state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cannot be read .*; removing .* starts the run from the beginning$"):
        load_latest(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {}, {}, keep=1) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match=r"state\.json is of checkpoint format 1, and this version reads format 2"):
        load(path.parent)


# Faults during the write


class Dead(BaseException):
    """The process is gone: nothing of it runs any more."""


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, at: int, error: Callable[[], BaseException], *, once: bool
) -> Iterator[list[str]]:
    """Raises `error()` at the `at`-th operation that changes or flushes the disk, and (unless `once`) at later ones.

    A failing write writes the first half of its data. Yields the names of the operations that were reached.
    """
    reached: list[str] = []

    def due(name: str) -> bool:
        reached.append(name)
        return len(reached) == at if once else len(reached) >= at

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if due(name):
                raise error()
            return real(*args, **kwargs)

        return call

    class File:
        def __init__(self, *args: Any) -> None:
            self.file = open(*args, buffering=0)  # noqa: SIM115
            self.flush, self.fileno = self.file.flush, self.file.fileno

        def write(self, data: bytes) -> None:
            if due("write"):
                self.file.write(data[: len(data) // 2])
                raise error()
            self.file.write(data)

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "mkdir", "open", "unlink", "rmdir"):
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(checkpoint, "open", wrap("open", File), raising=False)
        yield reached


@pytest.fixture
def several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 300)


def operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    out = tmp_path / "dry"
    save(out, 1, tensors(1), {}, keep=1)
    with failing(monkeypatch, 10**6, Dead, once=True) as reached:
        save(out, step, tensors(2), {}, keep=1)
    return reached


@pytest.mark.usefixtures("several_files")
@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step"])
def test_a_crash_at_any_moment_leaves_a_checkpoint_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """With `keep=1`, the hardest case: the old one goes as soon as the new one is there."""
    count = len(operations(tmp_path, monkeypatch, step))
    loaded = []
    for at in range(1, count + 1):
        out = tmp_path / str(at)
        save(out, 1, tensors(1), {"seed": 1}, keep=1)
        with failing(monkeypatch, at, Dead, once=False), pytest.raises(Dead):
            save(out, step, tensors(2), {"seed": 2}, keep=1)
        got = load_latest(out)
        assert got is not None, at
        assert_same(got.tensors, tensors(got.values["seed"]))
        loaded.append(got.values["seed"])
        assert steps(out)[-1] == got.step
        for path in (out / "checkpoints").glob("step_*"):
            load(path)
        save(out, 3, tensors(3), {}, keep=1)  # and the next save goes on as if nothing had been
        assert steps(out) == [3] and hidden(out) == []
    assert loaded == sorted(loaded) and set(loaded) == {1, 2}  # the old one up to the rename, the new one from it on


@pytest.mark.usefixtures("several_files")
@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step"])
def test_an_error_of_the_disk_at_any_moment_is_one_sentence_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    names = operations(tmp_path, monkeypatch, step)
    failed = 0
    for at in range(1, len(names) + 1):
        out = tmp_path / str(at)
        save(out, 1, tensors(1), {"seed": 1}, keep=1)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        caplog.clear()
        with failing(monkeypatch, at, lambda full=full: full, once=True):  # type: ignore[misc]
            try:
                save(out, step, tensors(2), {"seed": 2}, keep=1)
            except OSError as error:
                failed += 1
                assert str(error) == (
                    f"the checkpoint of step {step} could not be written to {out / 'checkpoints'} "
                    f"(No space left on device); the one of step {steps(out)[-1]} is kept"
                )
                assert hidden(out) == []
            else:  # `checkpoints` was there already, or the new one is and only the old one could not be removed
                assert (at == 1 and names[0] == "mkdir") or "an older one could not be removed" in caplog.text
        got = load_latest(out)
        assert got is not None and got.values["seed"] in (1, 2)
        assert_same(got.tensors, tensors(got.values["seed"]))
    assert failed >= names.count("write") + 5


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        failing(monkeypatch, 6, lambda: full, once=False),
        pytest.raises(OSError, match=r"No space left on device\); there is no earlier one"),
    ):
        save(tmp_path, 1, tensors(), {}, keep=1)
    assert load_latest(tmp_path) is None


def test_the_tests_own_bit_flip_changes_a_byte() -> None:
    tensor = torch.zeros(2, dtype=torch.uint8)
    flip_bit(tensor, 9)
    assert tensor.tolist() == [0, 2]
