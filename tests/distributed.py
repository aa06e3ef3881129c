"""Processes for tests of collectives: four workers over gloo, started once, that run functions of test modules.

`ranks.run(fn, size, *args)` calls `fn(group, *args)` in the first `size` workers, `group` being theirs, and returns
what each gave, in rank order. A worker's exception is raised with its traceback in the message.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 4
SIZES = (1, 2, 4)


def _work(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    while (task := pipe.recv()) is not None:
        fn, size, args = task
        try:
            pipe.send((True, fn(groups[size], *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """The workers. Forked at first use, so they know every test module that pytest has collected by then."""

    def __init__(self, folder: Path) -> None:
        self._store = folder / "store"
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, str(self._store), theirs), daemon=True)
            worker.start()
            self._workers.append((worker, ours))

    def run(self, fn: Callable[..., Any], size: int, *args: Any, timeout_s: float = 60) -> list[Any]:
        """Raises `AssertionError` for a worker that raised, and for one that does not answer in time."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers[:size]:
            pipe.send((fn, size, args))
        answers = []
        for rank, (_, pipe) in enumerate(self._workers[:size]):
            if not pipe.poll(timeout_s):
                self.stop()
                raise AssertionError(f"rank {rank} of {size} gave no answer to {fn.__name__} in {timeout_s} s")
            answers.append(pipe.recv())
        failed = [text for ok, text in answers if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def stop(self) -> None:
        """Ends the workers; the next `run` would start new ones."""
        for worker, pipe in self._workers:
            worker.kill()
            worker.join()
            pipe.close()
        self._workers.clear()
        self._store.unlink(missing_ok=True)
