"""Two ranks over gloo and a trainer that writes down what it is told; then ranks that fail, hang and are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import miles_spec.train.ranks as module
from conftest import state_of
from miles_spec.kernels.layout import PackedLayout
from miles_spec.stored import Stored
from miles_spec.train.messages import pack
from miles_spec.train.ranks import Leader, Ranks, follow
from miles_spec.types import LossTerms, PackedBatch, RunError

PATIENCE_S = 2.0
TERMS = LossTerms(
    policy=0.5,
    entropy=0.0,
    grad_norm=0.0,
    clip_fraction=0.0,
    rollout_kl=0.0,
    rollout_logprob_diff=0.0,
    tis_clip_fraction=0.0,
    ref_kl=0.0,
    draft=0.0,
)


class Fake:
    """A trainer that writes down every call, and misbehaves as `train_draft` is told by name."""

    def __init__(self, rank: int, heard: list[Any]) -> None:
        self.rank, self.heard = rank, heard
        self.version = self.draft_version = 0
        self.device = torch.device("cpu")

    def step(self, batches: Any) -> LossTerms:
        self.heard.append(["step", shown(batches)])
        self.version += 1
        return TERMS

    def logprobs(self, batches: Any, *, reference: bool = False) -> list[Tensor]:
        self.heard.append(["logprobs", shown(batches), reference])
        return [batch.tokens.float() for batch in batches]

    def warm_draft(self, batches: Any, steps: int) -> Iterator[LossTerms]:
        for step in range(steps):
            self.heard.append(["warm_draft", step, shown(batches)])
            self.draft_version += 1
            yield replace(TERMS, draft=float(step))

    def estimate_draft(self, batches: Any) -> LossTerms:
        self.heard.append(["estimate_draft", shown(batches)])
        return TERMS

    def freeze_draft(self) -> None:
        self.heard.append("freeze_draft")

    def trim(self) -> None:
        self.heard.append(["trim"])

    def sleep(self, tags: Any) -> None:
        self.heard.append(["sleep", tags])

    def wake(self, tags: Any) -> None:
        self.heard.append(["wake", tags])

    def weights(self, role: str) -> Iterator[tuple[str, Tensor]]:
        try:
            for i in range(3):
                self.heard.append(["weights", role, i])
                yield f"{role}.{i}", torch.full((2,), float(i))
        finally:
            self.heard.append(["closed", role])

    def state_values(self) -> dict[str, Any]:
        self.heard.append("state_values")
        return {"version": self.version}

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("rank", "more"):
            self.heard.append(["state_tensors", name])
            yield name, torch.tensor(self.rank)

    def load_state(self, tensors: Any, values: Any) -> None:
        self.heard.append(["load_state", shown(tensors), shown(values)])

    def train_draft(self, batches: Any, *, lr_scale: Any = "") -> LossTerms:
        self.heard.append(["train_draft", lr_scale])
        follower = self.rank == 1
        if lr_scale == "both" or (lr_scale == "follower" and follower) or (lr_scale == "leader" and not follower):
            raise ValueError("the gradient is lost")
        if lr_scale == "broken" and follower:
            raise KeyError("k")
        if lr_scale == "drift" and follower:
            self.draft_version += 1
        if lr_scale == "follower, leader waits":
            if follower:
                raise ValueError("the gradient is lost")
            dist.barrier()
        if lr_scale == "leader, follower waits":
            if not follower:
                raise ValueError("the gradient is lost")
            dist.barrier()
        if lr_scale == "killed":
            if follower:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.barrier()
        if lr_scale == "follower works on" and follower:
            time.sleep(600)
        return TERMS


def shown(value: Any) -> Any:
    """`value` in full, dtypes and layouts included, to be compared across processes."""
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist()]
    if isinstance(value, PackedLayout):
        return [list(value.lengths), shown(value.positions), value.cp_size]
    if isinstance(value, PackedBatch):
        return {name: shown(getattr(value, name)) for name in PackedBatch.__slots__}
    if isinstance(value, Mapping):
        return {key: shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list | tuple) else value


def batch(lengths: list[int], **more: Tensor) -> PackedBatch:
    count = sum(lengths)
    generator = torch.Generator().manual_seed(count)
    return PackedBatch(
        layout=PackedLayout.make(lengths),
        tokens=torch.randint(1 << 40, (count,), generator=generator),
        loss_mask=torch.rand(count, generator=generator) < 0.5,
        advantages=torch.randn(count, generator=generator),
        rollout_logprobs=torch.full((count,), float("-inf")),
        weights=torch.rand(count, generator=generator),
        **more,
    )


Play = Callable[[Leader, Ranks], Any]


def _process(rank: int, port: int, pipe: Any, play: Play) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it is pytest's
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "1"}
    module.GRACE_S = 1.0
    ranks = Ranks.join("cpu", PATIENCE_S)
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    heard: list[Any] = []
    if rank:

        def build(*arguments: Any) -> Fake:
            heard.append(["build", shown(arguments)])
            return Fake(rank, heard)

        try:
            follow(build, ranks)
        finally:
            pipe.send(heard)
        return
    arguments = (None, {"fc.weight": torch.arange(6.0).view(2, 3).bfloat16(), "none": torch.empty(0, 4)})

    def build_first() -> Fake:
        heard.append(["build", shown(arguments)])
        return Fake(0, heard)

    result = play(Leader(build_first, ranks, *arguments), ranks)
    ranks.end()
    pipe.send((result, heard))


class Pair:
    """Two forked ranks, of which rank 0 runs `play`."""

    def __init__(self, play: Play) -> None:
        context = multiprocessing.get_context("fork")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in (0, 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_process, args=(rank, port, theirs, play), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def told(self, rank: int, timeout_s: float = 20.0) -> Any:
        assert self.pipes[rank].poll(timeout_s), f"rank {rank} says nothing"
        return self.pipes[rank].recv()

    def status(self, rank: int, timeout_s: float) -> int | None:
        """Of a process that has ended by then."""
        self.processes[rank].join(timeout_s)
        return self.processes[rank].exitcode


@pytest.fixture
def pair() -> Iterator[Callable[[Play], Pair]]:
    made: list[Pair] = []

    def make(play: Play) -> Pair:
        made.append(Pair(play))
        return made[-1]

    yield make
    for process in (p for pair in made for p in pair.processes):
        process.kill()
        process.join()


def raised(act: Callable[[], Any]) -> str:
    """The kind and sentence of what `act` raises, and how long it took where it waited."""
    start = time.monotonic()
    with pytest.raises(Exception) as info:
        act()
    waited = time.monotonic() - start
    return f"{info.type.__name__}: {info.value}" + (f" [{'patience' if waited > PATIENCE_S - 0.5 else 'at once'}]")


def test_all_ranks_make_the_same_calls(pair: Callable[[Play], Pair]) -> None:
    def play(leader: Leader, ranks: Ranks) -> Any:
        plain, scored = batch([3, 0, 5]), batch([2], old_logprobs=torch.tensor([-1.0, float("nan")]))
        assert leader.step([plain, scored]) == TERMS and leader.step([]) == TERMS
        assert [x.tolist() for x in leader.logprobs([scored], reference=True)] == [scored.tokens.float().tolist()]
        assert [terms.draft for terms in leader.warm_draft([plain], 2)] == [0.0, 1.0]
        assert leader.estimate_draft((plain,)) == TERMS and leader.train_draft([plain], lr_scale=0.25) == TERMS
        leader.freeze_draft()
        assert [name for name, _ in leader.weights("target")] == ["target.0", "target.1", "target.2"]
        tensors, values = state_of(leader)
        assert {n: t.item() for n, t in tensors.items()} == {"rank": 0, "more": 0} and values == {"version": 2}
        odd = {"a": torch.tensor(3), "b": torch.rand(4, 6)[:, ::2], "c": torch.tensor([True]), "d": torch.empty(0)}
        leader.load_state(odd, {"version": 7, "x": [1, None, 0.1, {"y": "ö"}], "z": {}})
        leader.sleep(("optimizer",))
        leader.wake()
        leader.trim()
        assert (leader.version, leader.draft_version) == (2, 2)

    both = pair(play)
    _, heard = both.told(0)
    assert both.told(1) == heard and len(heard) == 20
    assert heard[-3:] == [["sleep", ["optimizer"]], ["wake", None], ["trim"]]
    assert [both.status(rank, 5) for rank in (0, 1)] == [0, 0]


def test_tensors_in_files_are_read_by_every_rank_from_there(pair: Callable[[Play], Pair], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"big": torch.arange(6.0).reshape(2, 3)}, path)

    def play(leader: Leader, ranks: Ranks) -> Any:
        stored = Stored([path])
        assert not pack({"do": "call", "arguments": [stored]})[1]  # of no tensor a byte is sent
        leader.load_state(stored, {"version": 1})
        path.unlink()
        return raised(lambda: leader.load_state(stored, {}))

    both = pair(play)
    (failed, heard), others = both.told(0), both.told(1)
    big = shown(torch.arange(6.0).reshape(2, 3))
    assert heard[:2] == others and others[1] == ["load_state", {"big": big}, shown({"version": 1})]
    assert failed.startswith("RunError: rank 1: ") and "all ranks of a run have to see its folder" in failed


def test_generators_go_in_lockstep(pair: Callable[[Play], Pair]) -> None:
    def play(leader: Leader, ranks: Ranks) -> None:
        leader.weights("never asked")  # so nothing is sent
        dropped = leader.weights("dropped")
        assert next(dropped)[0] == "dropped.0"
        del dropped
        leader.freeze_draft()
        first, second = leader.weights("first"), leader.weights("second")
        assert [next(first)[0], next(second)[0], next(first)[0]] == ["first.0", "second.0", "first.1"]
        leader.step([])  # others' calls may come between
        first.close()
        assert len(list(second)) == 2
        with pytest.raises(RuntimeError, match="stop"):
            for _ in leader.weights("left"):
                raise RuntimeError("stop")

    both = pair(play)
    _, heard = both.told(0)
    assert both.told(1) == heard
    closed = [["closed", "dropped"], ["closed", "first"], ["closed", "second"], ["closed", "left"]]
    assert [item for item in heard if item[0] == "closed"] == closed
    assert heard.index(closed[0]) < heard.index("freeze_draft")


def test_errors(pair: Callable[[Play], Pair]) -> None:
    def play(leader: Leader, ranks: Ranks) -> list[str]:
        def told(what: Any) -> str:
            return raised(lambda: leader.train_draft([], lr_scale=what))

        found = [told("both"), told("leader"), told("follower"), told("broken")]
        leader.step([])  # all that still works
        found.append(raised(lambda: leader.load_state({"a": object()}, {})))  # type: ignore[dict-item]
        leader.step([])
        return [*found, told("drift"), raised(leader.state_values)]

    both = pair(play)
    found, heard = both.told(0)
    assert found == [
        "ValueError: the gradient is lost [at once]",
        "ValueError: the gradient is lost [at once]",
        "RunError: rank 1: the gradient is lost [at once]",
        "RunError: rank 1: KeyError: 'k' [at once]",
        "TypeError: object does not travel between ranks [at once]",
        "RunError: the ranks differ by now: rank 1 is at [2, 1], rank 0 at [2, 0] [at once]",
        "RunError: the ranks differ by now: rank 1 is at [2, 1], rank 0 at [2, 0] [at once]",
    ]
    assert both.told(1) == heard
    assert [both.status(rank, 5) for rank in (0, 1)] == [0, 0]


def test_an_error_where_the_other_rank_waits(pair: Callable[[Play], Pair]) -> None:
    """Within a collective, which nobody else would end."""

    def play(which: str) -> Play:
        return lambda leader, ranks: [
            raised(lambda: leader.train_draft([], lr_scale=which)),
            raised(leader.state_values),
        ]

    follower, leader = pair(play("follower, leader waits")), pair(play("leader, follower waits"))
    (first, then), _ = follower.told(0)
    assert first.startswith("RunError: rank 0: ") and first.endswith("; rank 1: the gradient is lost [patience]")
    assert then.startswith("RunError: rank 1: its process is gone")
    (first, then), _ = leader.told(0)
    assert first == "RunError: rank 0: the gradient is lost; rank 1: no answer for 2 s [patience]"
    assert then == "RunError: rank 1: no answer for 2 s [at once]"
    assert follower.status(1, 1) == 1
    assert leader.status(1, 5) == 1


def test_a_killed_follower(pair: Callable[[Play], Pair]) -> None:
    def play(leader: Leader, ranks: Ranks) -> list[str]:
        generator = leader.weights("target")
        next(generator)
        found = [raised(lambda: leader.train_draft([], lr_scale="killed"))]
        return [*found, raised(lambda: next(generator)), raised(leader.state_values)]

    both = pair(play)
    found, _ = both.told(0)
    assert found[0].startswith("RunError: rank 0: ") and found[0].endswith(f"; rank 1: {module._GONE} [at once]")
    assert found[1:] == [f"RunError: rank 1: {module._GONE} [at once]"] * 2
    assert both.status(0, 5) == 0


def test_a_killed_leader_leaves_no_process(pair: Callable[[Play], Pair], tmp_path: Path) -> None:
    def idle(leader: Leader, ranks: Ranks) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def working(leader: Leader, ranks: Ranks) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)  # its signal, SIGALRM, kills as well
        leader.train_draft([], lr_scale="follower works on")

    def waiting(leader: Leader, ranks: Ranks) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        leader.train_draft([], lr_scale="leader, follower waits")

    pairs = [pair(play) for play in (idle, working, waiting)]
    start = time.monotonic()
    assert [p.status(0, 10) for p in pairs] == [-signal.SIGKILL, -signal.SIGALRM, -signal.SIGALRM]
    assert [p.status(1, 10) for p in pairs] == [1, 1, 1]
    assert time.monotonic() - start < 15


def test_a_leader_that_is_interrupted_calls_nobody_again(pair: Callable[[Play], Pair]) -> None:
    def play(leader: Leader, ranks: Ranks) -> list[str]:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            leader.train_draft([], lr_scale="follower works on")
        return [raised(leader.state_values)]

    both = pair(play)
    assert both.told(0)[0] == [
        "RunError: a call to the other ranks was cut off, so they cannot be called again [at once]"
    ]
    both.processes[0].join(5)
    os.kill(both.processes[1].pid, signal.SIGINT)  # torchrun passes Ctrl-C on to all
    assert both.processes[1].is_alive()


def test_a_sentence_names_its_ranks() -> None:
    with pytest.raises(RunError, match=r"^ranks 1, 3: a; rank 2: b$"):
        module._raise(None, {3: "a", 2: "b", 1: "a"})
    with pytest.raises(FloatingPointError, match=r"^a$"):
        module._raise(FloatingPointError("a"), {1: "a", 2: "a"})
