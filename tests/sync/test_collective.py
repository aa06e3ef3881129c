"""Groups are kept over sessions, and made anew for other members and after one that died."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
import torch

from fakes import RemoteFake
from miles_spec.sync.collective import GROUPS, Collective, without_cumem
from miles_spec.sync.group import CUMEM
from miles_spec.sync.session import Syncer
from miles_spec.types import Receipt, Role

CPU = torch.device("cpu")
Named = dict[str, torch.Tensor]


def weights(seed: int, device: str = "cpu") -> dict[Role, Named]:
    generator = torch.Generator().manual_seed(seed)
    names = {"target": ("embed", "norm", "head"), "draft": ("fc", "norm")}
    return {
        role: {name: torch.randn(30, 4, generator=generator).to(device) for name in named}
        for role, named in names.items()
    }


@pytest.fixture
def members() -> Iterator[list[RemoteFake]]:
    """Filled by a test; ended after it."""
    made: list[RemoteFake] = []
    yield made
    for member in made:
        member.stop()


def push(sync: Syncer, members: Sequence[RemoteFake], new: dict[Role, Named], version: int) -> list[Receipt]:
    return sync.push(members, version=version, target=new["target"], draft_version=version, draft=new["draft"])


def test_a_group_is_kept_over_sessions_and_made_anew_for_others(members: list[RemoteFake]) -> None:
    members += [RemoteFake(weights(0), name=name) for name in "abc"]
    transport = Collective("gloo", CPU, timeout_s=20)

    def joined(pushed: Sequence[RemoteFake], version: int) -> list[bool]:
        before = len(pushed[0].commands)
        assert all(r.verified for r in push(Syncer(transport), pushed, weights(version), version))
        return [c["via"]["joined"] for c in pushed[0].commands[before:] if c["do"] == "open"]

    assert joined(members, 1) == [False, True]  # target, draft
    assert joined(members, 2) == [True, True]
    assert joined(members[:2], 3) == [False, True]
    assert joined(members, 4) == [True, True]  # two are kept,
    assert joined(members[:1], 5) == [False, True]  # the one used longest ago goes
    assert joined(members[:2], 6) == [False, True]
    assert len(transport._groups) == GROUPS
    transport.stop()
    assert joined(members[:2], 7) == [False, True]
    transport.stop()


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_nccl_allocates_as_in_servers_unless_told(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CUMEM, before or "")
    if before is None:
        monkeypatch.delenv(CUMEM)
    without_cumem()
    assert os.environ[CUMEM] == after


@pytest.mark.gpu
def test_nccl_survives_a_killed_member(members: list[RemoteFake]) -> None:
    if torch.cuda.device_count() < 3:
        pytest.skip("needs 3 GPUs")
    devices = [f"cuda:{i}" for i in range(3)]
    members += [
        RemoteFake(weights(0), name=n, devices=[d], timeout_s=90) for n, d in zip("ab", devices[1:], strict=True)
    ]
    transport = Collective("nccl", torch.device(devices[0]), timeout_s=20)
    sync = Syncer(transport, bucket_bytes=1)
    assert all(r.verified for r in push(sync, members, weights(1, "cuda"), 1))
    members[0].faults = {"die": 3}
    members[0].start()
    receipts = push(sync, members, weights(2, "cuda"), 2)
    verified = [(r.engine, r.role, r.verified) for r in receipts]
    assert verified == [("a", "target", False), ("b", "target", True), ("b", "draft", True)]
    members[0].faults = {}
    members[0].start()
    assert all(r.verified for r in push(sync, members, weights(3, "cuda"), 3))
    transport.stop()
