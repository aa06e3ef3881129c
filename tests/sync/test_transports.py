"""Buckets lose nothing; every transport reaches processes of their own; a fault stays with the member that has it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeEngine, RemoteFake, flip_bit, flip_bit_of_file
from miles_spec.rollout.engine import RemoteMember
from miles_spec.sync import transports as module
from miles_spec.sync.collective import Collective
from miles_spec.sync.digest import Digester
from miles_spec.sync.session import Syncer, TargetSyncError
from miles_spec.sync.transports import ALIGN_BYTES, Disk, InProcess, Ipc, Transport, aligned_bytes, buckets
from miles_spec.types import Role

Named = dict[str, torch.Tensor]
CPU = torch.device("cpu")
KINDS = ("ipc", "gloo", "disk")


@given(st.lists(st.integers(0, 3000)), st.integers(1, 4000))
def test_buckets_hold_everything_in_order_within_their_size(sizes: list[int], limit: int) -> None:
    named = [(str(i), torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    made = list(buckets(named, limit))
    assert [item for bucket in made for item in bucket] == named
    used = [sum(aligned_bytes(t.nbytes) for _, t in bucket) for bucket in made]
    for bucket, size in zip(made, used, strict=True):
        assert bucket and (size <= limit or len(bucket) == 1)
    for size, following in zip(used, made[1:], strict=False):
        assert size + aligned_bytes(following[0][1].nbytes) > limit  # no bucket is cut short


def test_tensors_are_taken_one_bucket_at_a_time() -> None:
    taken = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(9):
            taken.append(i)
            yield str(i), torch.zeros(10, dtype=torch.uint8)

    first = next(buckets(source(), 3 * ALIGN_BYTES))
    assert [name for name, _ in first] == ["0", "1", "2"]
    assert taken == [0, 1, 2, 3]


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, not 0"):
        list(buckets([], 0))


def test_in_process_copies_detached() -> None:
    engine = FakeEngine({"target": {"w": torch.zeros(3)}})
    weight = torch.nn.Parameter(torch.ones(3))
    engine.begin_update(1, ["target"])
    assert InProcess().send([engine], "target", [("w", weight)]) == {}
    with torch.no_grad():
        weight.fill_(2)
    assert torch.equal(engine.tensors["target"]["w"], torch.ones(3))
    assert not engine.tensors["target"]["w"].requires_grad


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[Role, Named]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "target": {
            "embed": torch.randn(70, 40, generator=generator).to(dtype),
            "scale": torch.randn((), generator=generator),
            "norm": torch.randn(40, generator=generator).to(torch.bfloat16),
            "map": torch.randint(99, (7,), generator=generator),
            "mask": torch.rand(5, generator=generator) > 0.5,
            "none": torch.zeros(0, 3),
            "eight": torch.randn(11, generator=generator).to(torch.float8_e4m3fn),
            "strided": torch.randn(6, 9, generator=generator).T,
            "head": torch.randn(30, 40, generator=generator).to(dtype),
        },
        "draft": {"fc": torch.randn(4, 8, generator=generator), "norm": torch.randn(4, generator=generator)},
    }


@pytest.fixture(params=KINDS)
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    made = make(request.param, tmp_path)
    yield made
    made.stop()


def make(kind: str, folder: Path, timeout_s: float = 20.0) -> Transport:
    if kind == "ipc":
        return Ipc(CPU)
    return Disk(folder / "pushes") if kind == "disk" else Collective("gloo", CPU, timeout_s=timeout_s)


@pytest.fixture
def members() -> Iterator[list[RemoteFake]]:
    """Filled by a test; ended after it."""
    made: list[RemoteFake] = []
    yield made
    for member in made:
        member.stop()


def push(sync: Syncer, members: Sequence[RemoteFake], new: dict[Role, Named], version: int = 1):  # type: ignore[no-untyped-def]
    return sync.push(members, version=version, target=new["target"], draft_version=version, draft=new["draft"])


def outcome(receipts) -> list[tuple[str, str, bool]]:  # type: ignore[no-untyped-def]
    return [(r.engine, r.role, r.verified) for r in receipts]


def test_the_fake_is_a_remote_member(members: list[RemoteFake]) -> None:
    members.append(RemoteFake({"target": {}}))
    assert isinstance(members[0], RemoteMember)


def test_every_dtype_arrives_at_all_ranks_over_several_sessions(
    transport: Transport, members: list[RemoteFake]
) -> None:
    members += [RemoteFake(weights(0), name="a"), RemoteFake(weights(0), name="b", ranks=2)]
    sync = Syncer(transport, bucket_bytes=1024)  # smaller than the largest tensor
    receipts = sync.self_test(
        members, version=0, target=weights(0)["target"], draft_version=0, draft=weights(0)["draft"]
    )
    assert all(r.verified for r in receipts)
    for version in (1, 2):
        receipts = push(sync, members, weights(version), version)
        assert outcome(receipts) == [(m.name, r, True) for r in ("target", "draft") for m in members]
        assert receipts[0].tensors == 9
    assert all(m.versions() == {"target": 2, "draft": 2} for m in members)
    loads = [c for c in members[0].commands if c["do"] == "load"]
    assert len(loads) > 3 * 4
    assert all(offset % ALIGN_BYTES == 0 for c in loads for _, _, _, offset in c["table"])


def test_weights_are_cast_to_what_is_served(transport: Transport, members: list[RemoteFake]) -> None:
    members.append(RemoteFake(weights(0, torch.bfloat16)))
    assert all(r.verified for r in push(Syncer(transport), members, weights(1)))


def test_tensors_may_change_once_send_returned(transport: Transport, members: list[RemoteFake]) -> None:
    """Also while the member is still busy with the bucket before, which no later one may overwrite."""
    names = [f"w{i}" for i in range(6)]
    members.append(RemoteFake({"target": {name: torch.zeros(300) for name in names}}, late=1, late_s=0.3))
    (member,) = members
    tensor, sent = torch.empty(300), Digester()
    member.begin_update(1, ["target"])
    assert transport.open(members, "target", aligned_bytes(1200)) == {}
    for i, name in enumerate(names):
        sent.add(name, tensor.fill_(i))
        assert transport.send(members, "target", [(name, tensor)]) == {}
        tensor.fill_(-1)
    assert transport.close(members, "target") == {}
    assert member.end_update()["target"] == sent.read()


def test_packing_a_bucket_does_not_wait_for_the_one_before(transport: Transport, members: list[RemoteFake]) -> None:
    members.append(RemoteFake({"target": {"w": torch.zeros(3)}}))
    free = threading.Event()
    members[0].begin_update(1, ["target"])
    transport.open(members, "target", ALIGN_BYTES)
    members[0].on_command = lambda command: free.wait(20) if command["do"] == "load" else None
    transport.send(members, "target", [("w", torch.ones(3))])
    transport.send(members, "target", [("w", torch.ones(3))])  # would never return
    assert len([c for c in members[0].commands if c["do"] == "load"]) < 2
    free.set()
    assert transport.close(members, "target") == {}
    members[0].end_update()


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_flipped_bit_on_the_way_is_noticed(
    role: Role, transport: Transport, members: list[RemoteFake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between packing and receiving, so that what trainer and members do with their own memory is right."""
    members += [RemoteFake(weights(0), name="a"), RemoteFake(weights(0), name="b")]
    victim = {"target": "head", "draft": "fc"}[role]
    deliver = transport._deliver  # type: ignore[attr-defined]

    def flipping(to, command):  # type: ignore[no-untyped-def]
        for name, _, _, offset in command["table"]:
            if name == victim and "path" in command["via"]:
                path = Path(command["via"]["path"])
                flip_bit_of_file(path, 8 * path.stat().st_size - 3)
            elif name == victim:
                flip_bit(transport._buffers[command["via"]["slot"]], 8 * offset + 5)  # type: ignore[attr-defined]
        return deliver(to, command)

    monkeypatch.setattr(transport, "_deliver", flipping)
    sync = Syncer(transport, bucket_bytes=1)
    if role == "target":
        with pytest.raises(TargetSyncError, match=r"'a' does not.*head: serves.*'b' does not.*head: serves") as error:
            push(sync, members, weights(1))
        assert all(len(receipt.mismatched) == 1 for receipt in error.value.receipts)
        return
    receipts = push(sync, members, weights(1))
    assert outcome(receipts)[:2] == [("a", "target", True), ("b", "target", True)]
    assert all("fc: serves" in r.mismatched[0] and r.attempts == 2 for r in receipts[2:])
    assert [m.draft_depth for m in members] == [0, 0]


def test_a_member_that_refuses_a_bucket_fails_alone(transport: Transport, members: list[RemoteFake]) -> None:
    members += [RemoteFake(weights(0), name="a", refuse=2), RemoteFake(weights(0), name="b")]
    sync = Syncer(transport, bucket_bytes=1)
    receipts = push(sync, members, weights(1))
    assert outcome(receipts) == [("a", "target", False), ("b", "target", True), ("b", "draft", True)]
    assert receipts[0].mismatched == ("push: Refused: no room",)
    assert receipts[1].attempts == 1
    assert "no room" in members[0].left[0]
    loads = [[len(c["table"]) for c in m.commands if c["do"] == "load"] for m in members]
    assert loads[1] == [1] * 11
    # in a collective it goes on taking part, but loads nothing
    assert sum(loads[0][:9]) == 2 and len(loads[0]) == (9 if isinstance(transport, Collective) else 2)
    assert all(r.verified for r in push(sync, members, weights(2), 2))


@pytest.mark.parametrize("bucket", [1, 3])
def test_a_member_killed_in_a_push_costs_only_itself(
    bucket: int, transport: Transport, members: list[RemoteFake]
) -> None:
    members += [RemoteFake(weights(0), name="a", ranks=2, die=bucket), RemoteFake(weights(0), name="b")]
    sync = Syncer(transport, bucket_bytes=1)
    receipts = push(sync, members, weights(1))
    assert outcome(receipts) == [("a", "target", False), ("b", "target", True), ("b", "draft", True)]
    assert receipts[0].mismatched == ("push: ConnectionError: a rank of a is gone",)
    assert receipts[1].attempts == (2 if isinstance(transport, Collective) else 1)
    # started anew, it joins again
    members[0].faults = {}
    members[0].start()
    receipts = push(sync, members, weights(2), 2)
    assert all(r.verified and r.attempts == 1 for r in receipts) and len(receipts) == 4


def test_a_member_killed_between_pushes(transport: Transport, members: list[RemoteFake]) -> None:
    members += [RemoteFake(weights(0), name="a"), RemoteFake(weights(0), name="b")]
    sync = Syncer(transport)
    push(sync, members, weights(1))
    members[0].kill()
    receipts = push(sync, members, weights(2), 2)
    assert outcome(receipts) == [("a", "target", False), ("b", "target", True), ("b", "draft", True)]


def test_a_member_that_hangs_is_named_by_the_clock(tmp_path: Path, members: list[RemoteFake]) -> None:
    for kind in KINDS:
        pair = [
            RemoteFake(weights(0), name="a", timeout_s=3.0, hang=2),
            RemoteFake(weights(0), name="b", timeout_s=30.0),
        ]
        members += pair
        transport = make(kind, tmp_path, timeout_s=2.0)
        receipts = push(Syncer(transport, bucket_bytes=1), pair, weights(1))
        assert outcome(receipts) == [("a", "target", False), ("b", "target", True), ("b", "draft", True)], kind
        assert "TimeoutError: rank 0 of a gave no answer" in receipts[0].mismatched[0]
        transport.stop()


def test_a_member_that_answers_late_but_in_time(transport: Transport, members: list[RemoteFake]) -> None:
    members += [RemoteFake(weights(0), name="a", late=2, late_s=0.5), RemoteFake(weights(0), name="b")]
    assert all(r.verified for r in push(Syncer(transport, bucket_bytes=1), members, weights(1)))


def test_the_last_member_killed_ends_the_run(transport: Transport, members: list[RemoteFake]) -> None:
    members.append(RemoteFake(weights(0), die=2))
    with pytest.raises(TargetSyncError, match="a rank of remote is gone"):
        push(Syncer(transport, bucket_bytes=1), members, weights(1))


def test_a_wrong_table_is_a_fault_and_not_a_read_beyond_the_buffer(
    transport: Transport, members: list[RemoteFake], monkeypatch: pytest.MonkeyPatch
) -> None:
    members.append(RemoteFake({"target": {"w": torch.zeros(3)}}))

    def wrong(bucket):  # type: ignore[no-untyped-def]
        return [("w", "float32", [300], 0)], ALIGN_BYTES

    monkeypatch.setattr(module, "table_of", wrong)
    monkeypatch.setattr(module, "views", lambda flat, table: [("w", flat[:12].view(torch.float32))])
    with pytest.raises(TargetSyncError, match=r"bytes 0 to 1200 of a bucket|holds 'w' as"):
        Syncer(transport).push(members, version=1, target={"w": torch.ones(3)})


def test_files_are_private_and_go(tmp_path: Path, members: list[RemoteFake]) -> None:
    members.append(RemoteFake(weights(0)))
    ipc, modes = Ipc(CPU, tmp_path), []
    members[0].on_command = lambda _: modes.extend(path.stat().st_mode & 0o777 for path in tmp_path.iterdir())
    assert all(r.verified for r in push(Syncer(ipc), members, weights(1)))
    assert set(modes) == {0o600}
    ipc.stop()
    assert not list(tmp_path.iterdir())
    assert all(r.verified for r in push(Syncer(ipc), members, weights(2), 2))
    del ipc
    seen: list[str] = []
    members[0].on_command = lambda _: seen.extend(path.name for path in tmp_path.glob("pushes/*"))
    disk = Disk(tmp_path / "pushes")
    assert all(r.verified for r in push(Syncer(disk, bucket_bytes=1), members, weights(3), 3))
    assert seen and not list((tmp_path / "pushes").iterdir())


def test_a_full_disk_is_in_the_receipts(
    tmp_path: Path, members: list[RemoteFake], monkeypatch: pytest.MonkeyPatch
) -> None:
    members.append(RemoteFake(weights(0)))

    def full(named, path) -> None:  # type: ignore[no-untyped-def]
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(TargetSyncError, match="No space left"):
        push(Syncer(Disk(tmp_path)), members, weights(1))
    assert not list(tmp_path.iterdir())


def test_no_room_for_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch, members: list[RemoteFake]) -> None:
    members.append(RemoteFake(weights(0)))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(TargetSyncError, match=r"lower fleet\.bucket_mb"):
        push(Syncer(Ipc(CPU)), members, weights(1))


def test_members_and_transports_have_to_fit(transport: Transport, members: list[RemoteFake]) -> None:
    members.append(RemoteFake(weights(0)))
    with pytest.raises(ValueError, match="'remote' is in another process"):
        InProcess().open(members, "target", 1)
    with pytest.raises(ValueError, match="'fake' is in this process"):
        transport.open([FakeEngine({})], "target", 1)


def gpus(count: int) -> list[str]:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    return [f"cuda:{i}" for i in range(count)]


def on_gpu(new: dict[Role, Named]) -> dict[Role, Named]:
    return {role: {name: tensor.cuda() for name, tensor in named.items()} for role, named in new.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ipc", "ipc from the CPU", "nccl", "disk"])
def test_gpus_are_reached(kind: str, tmp_path: Path, members: list[RemoteFake]) -> None:
    """Buffers grow, buckets are many, and a second member joins."""
    devices = gpus(2)[1:] if kind == "nccl" else gpus(1)
    first = torch.device("cuda", 0)
    transport: Transport = {
        "ipc": lambda: Ipc(first),
        "ipc from the CPU": lambda: Ipc(CPU),
        "nccl": lambda: Collective("nccl", first),
        "disk": lambda: Disk(tmp_path),
    }[kind]()
    large = {"target": {f"w{i}": torch.zeros(1 << 20) for i in range(20)}, "draft": weights(0)["draft"]}
    new = {"target": {name: torch.rand(1 << 20) for name in large["target"]}, "draft": weights(1)["draft"]}
    for shapes, tensors, size in ((weights(0), weights(1), 1024), (large, new, 9 << 20)):
        members.append(RemoteFake(shapes, name="a", devices=devices, timeout_s=120))
        if kind != "nccl":  # which takes every GPU once only
            members.append(RemoteFake(shapes, name="b", devices=devices, timeout_s=120))
        for version in (1, 2):
            receipts = push(Syncer(transport, bucket_bytes=size), members, on_gpu(tensors), version)
            assert all(r.verified for r in receipts) and len(receipts) == 2 * len(members)
        while members:
            members.pop().stop()
    transport.stop()


@pytest.mark.gpu
def test_expandable_segments_are_refused(monkeypatch: pytest.MonkeyPatch, members: list[RemoteFake]) -> None:
    members.append(RemoteFake(weights(0), devices=gpus(1)))
    snapshot = torch.cuda.memory_snapshot
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{**s, "is_expandable": True} for s in snapshot()])
    with pytest.raises(TargetSyncError, match="expandable_segments:True out of"):
        push(Syncer(Ipc(torch.device("cuda", 0))), members, on_gpu(weights(1)))
