"""What the trainer offers is read in place, and nothing beyond it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from miles_spec.sync.group import NO_GROUP
from miles_spec.sync.receivers import map_file, open_receiver, views
from miles_spec.sync.transports import table_of

CPU = torch.device("cpu")


def test_views_are_the_buffers_own_bytes() -> None:
    bucket = [("a", torch.rand(3, 2)), ("b", torch.tensor(True)), ("none", torch.zeros(0, 4)), ("c", torch.arange(5))]
    table, size = table_of(bucket)
    flat = torch.zeros(size, dtype=torch.uint8)
    for (_, view), (_, tensor) in zip(views(flat, table), bucket, strict=True):
        view.copy_(tensor)
    for (name, view), (_, tensor) in zip(views(flat, table), bucket, strict=True):
        assert torch.equal(view, tensor) and view.dtype == tensor.dtype, name
    flat.zero_()
    assert all(not view.any() for _, view in views(flat, table))


@pytest.mark.parametrize("row", [["w", "float32", [3], 248], ["w", "float32", [65], 0], ["w", "uint8", [1], -1]])
def test_a_table_that_leaves_the_buffer_is_refused(row: list[object]) -> None:
    with pytest.raises(ValueError, match=r"'w' would lie at bytes .* of a bucket of 256"):
        views(torch.zeros(256, dtype=torch.uint8), [row])


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="no transport is called 'pigeon'"):
        open_receiver({"kind": "pigeon"}, rank=0, device=CPU)


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "buffer"
    with pytest.raises(FileNotFoundError, match="use the disk transport"):
        map_file(str(path), 16)
    assert not path.exists()
    disk = open_receiver({"kind": "disk"}, rank=0, device=CPU)
    with (
        pytest.raises(FileNotFoundError, match="a folder that trainer and engines share"),
        disk.bucket({"table": [], "via": {"path": str(path)}}),
    ):
        pass


def test_memory_stays_mapped_as_long_as_the_same_is_offered(tmp_path: Path) -> None:
    vias = []
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(8))
        vias.append({"kind": "ipc", "buffers": [{"path": str(tmp_path / name), "bytes": 8}]})
    command = {"table": [["w", "uint8", [8], 0]], "via": {"slot": 0}}
    first = open_receiver(vias[0], rank=0, device=CPU)
    assert open_receiver(vias[0], rank=0, device=CPU, before=first) is first
    second = open_receiver(vias[1], rank=0, device=CPU, before=first)
    assert second is not first
    with pytest.raises(IndexError), first.bucket(command):  # it is closed
        pass
    third = open_receiver({"kind": "disk"}, rank=0, device=CPU, before=second)
    assert open_receiver({"kind": "disk"}, rank=0, device=CPU, before=third) is not third
    with pytest.raises(IndexError), second.bucket(command):
        pass


def test_a_gpu_that_is_not_visible_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="GPU GPU-abc is not visible here"):
        open_receiver({"kind": "ipc", "buffers": [{"uuid": "GPU-abc"}]}, rank=0, device=CPU)


@pytest.mark.parametrize("row", [["w", "float32", [3], 0], ["w", "int32", [2], 0]])
def test_a_file_that_differs_from_its_table_is_refused(row: list[object], tmp_path: Path) -> None:
    path = tmp_path / "bucket"
    save_file({"w": torch.ones(2)}, path)
    command = {"table": [row], "via": {"path": str(path)}}
    disk = open_receiver({"kind": "disk"}, rank=0, device=CPU)
    with pytest.raises(ValueError, match="holds 'w' as"), disk.bucket(command):
        pass


def test_a_group_that_was_not_joined_is_said() -> None:
    via = {"kind": "gloo", "bytes": 8, "keep": [], "group": "g", "joined": True}
    with pytest.raises(LookupError, match=NO_GROUP):
        open_receiver(via, rank=0, device=CPU)


def test_a_server_whose_nccl_allocates_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    via = {"kind": "nccl", "bytes": 8, "keep": [], "group": "g", "joined": False, "cumem": "0"}
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    with pytest.raises(ValueError, match="NCCL_CUMEM_ENABLE is '1' here and '0' in the trainer's process"):
        open_receiver(via, rank=0, device=CPU)
