"""A broadcast that cannot reach all ranks ends in an error, and nothing listens where it need not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from miles_spec.sync.group import GROUP_FAILED, Group, make_store

CPU = torch.device("cpu")


def test_a_group_nobody_joins_ends_in_an_error() -> None:
    store = make_store("127.0.0.1", 5)
    with pytest.raises((ConnectionError, TimeoutError), match=GROUP_FAILED):
        Group("gloo", store, name="g", rank=0, world=2, device=CPU, timeout_s=0.5)
    assert not torch.distributed.is_initialized()


def test_a_broadcast_that_a_rank_misses_ends_in_an_error_or_is_given_up() -> None:
    stores, groups = [make_store("127.0.0.1", 5)], {}
    stores.append(TCPStore("127.0.0.1", stores[0].port, is_master=False, wait_for_workers=False))

    def join(rank: int) -> None:
        groups[rank] = Group("gloo", stores[rank], name="g", rank=rank, world=2, device=CPU, timeout_s=5)

    other = threading.Thread(target=join, args=(1,))
    other.start()
    join(0)
    other.join()
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(ConnectionError, match="given up since a rank is gone"):
        groups[1].broadcast(torch.zeros(4), given_up)
    with pytest.raises((ConnectionError, TimeoutError), match=GROUP_FAILED):
        groups[1].broadcast(torch.zeros(4))  # rank 0 sends nothing
    for group in groups.values():
        group.abort()


def test_the_store_of_a_group_is_not_open_to_the_network() -> None:
    store = make_store("127.0.0.1", 5.0)
    inodes = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_socket(fd)}
    listening = [
        row.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for row in Path(table).read_text().splitlines()[1:]
        if row.split()[3] == "0A" and f"socket:[{row.split()[9]}]" in inodes
    ]
    ours = [address for address in listening if int(address.split(":")[1], 16) == store.port]
    assert ours == [f"0100007F:{store.port:04X}"]


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except FileNotFoundError:
        return False
