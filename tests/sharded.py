"""Checks of layouts and shifts that every rank of a group makes of its own rows, over gloo or NCCL.

Not in a test module: processes that are spawned for NCCL must be able to import it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernels.backend import Backend
from miles_spec.kernels.layout import PackedLayout, Sharding
from miles_spec.kernels.shift import DraftTargets, draft_targets, extend, shift
from oracles import sharding as oracle
from oracles.targets import ahead, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pack and what is asked of it."""

    lengths: list[int]
    sharding: Sharding
    depth: int
    offset: int
    halo: int
    seed: int
    width: int = 3
    dtype: torch.dtype = torch.float32


FAULTS: dict[str, Callable[[PackedLayout], dict[str, Any]]] = {
    "positions": lambda x: {"positions": x.positions + 1},
    "left": lambda x: {"left": (x.left - 1).clamp(min=0)},
    "near": lambda x: {"near": x.near + (x.near < x.left)},
    "halo_rows": lambda x: {"halo_rows": torch.cat([x.halo_rows[:-1].flip(0), x.halo_rows[-1:]])},
    "send_rows": lambda x: {"send_rows": (x.send_rows + 1) % x.tokens},
    "sent_entries": lambda x: {"sent_entries": x.sent_entries[:1]},
    "segments crossed": lambda x: {"left": torch.full_like(x.left, x.halo).minimum(x.tokens - 1 - _rows(x))},
}
"""Ways to break a layout that leave every index in range."""


def _rows(layout: PackedLayout) -> Tensor:
    return torch.arange(layout.tokens, device=layout.left.device)


def mismatches(
    group: dist.ProcessGroup | None, cases: Sequence[Case], backend: Backend, fault: str | None = None
) -> list[str]:
    """What differs from the oracle on this rank, bit for bit, forward and backward; nothing if all is well. Never
    stops early, so that no rank waits for another."""
    nccl = group is not None and dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    return [f"{case}: {text}" for case in cases for text in _differences(group, case, backend, fault, device)]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _differences(
    group: dist.ProcessGroup | None, case: Case, backend: Backend, fault: str | None, device: torch.device
) -> Iterator[str]:
    host = random.Random(case.seed)
    count = sum(case.lengths)
    tokens = [host.randrange(1 << 40) for _ in range(count)]
    loss_mask = [host.random() < 0.8 for _ in range(count)]
    generator = torch.Generator().manual_seed(case.seed)
    x, grad = (torch.randn(count, case.width, generator=generator).to(device, case.dtype) for _ in range(2))

    layout = PackedLayout.make(case.lengths, device, halo=case.halo, sharding=case.sharding, cp_group=group)
    rank, size = layout.cp_rank, layout.cp_size
    if fault:
        layout = dataclasses.replace(layout, **FAULTS[fault](layout))
    flags = torch.tensor(loss_mask, dtype=torch.bool, device=device)
    numbers = torch.tensor(tokens, dtype=torch.int64, device=device)
    with poisoned():
        got = draft_targets(layout.shard(numbers, -1), layout.shard(flags, True), layout, case.depth, backend)
        local = layout.shard(x, 7).requires_grad_()
        shifted = shift(local, layout, case.offset, backend)
        (shift_grad,) = torch.autograd.grad(shifted, local, layout.shard(grad, 5))
        longer = extend(local, layout)
        # whole numbers, so that sums are exact in any dtype
        fetched = oracle.fetched(case.lengths, case.sharding, size, layout.halo)
        held = oracle.held(case.lengths, case.sharding, size)[rank]
        mine = [r.token for r in held]
        weights = torch.tensor([_weight(rank, t) for t in [*mine, *fetched[rank]]], device=device, dtype=case.dtype)
        column = torch.arange(case.width, device=device, dtype=case.dtype)
        (extend_grad,) = torch.autograd.grad(longer, local, weights[:, None] + 0 * column)
        ids = extend(torch.tensor([-1 if t is None else t for t in mine], device=device), layout).tolist()
        whole = [layout.unshard(part) for part in (x[layout.source], shifted, *_fields(got))]
        plain = PackedLayout.make(case.lengths, device)
        alone = draft_targets(numbers, flags, plain, case.depth, "reference")
        expected = [x, shift(x, plain, case.offset, "reference"), *_fields(alone)]

    def differs(name: str, a: Any, b: Any) -> Iterator[str]:
        if a != b:
            yield f"rank {rank} of {size}, {name}: {a} is not {b}"

    table = rows(tokens, loss_mask, case.lengths, case.depth)
    for d in range(case.depth):
        want = [None if t is None else table[d][t] for t in mine]
        yield from differs(f"inputs {d}", got.inputs[d].tolist(), [r.input if r else -1 for r in want])
        yield from differs(f"labels {d}", got.labels[d].tolist(), [r.label if r else -1 for r in want])
        positions = [h.position + d for h in held]
        yield from differs(f"positions {d}", got.positions[d].tolist(), positions)
        teachers = [ids[row] if t is not None else row for t, row in zip(mine, got.teacher[d].tolist(), strict=True)]
        yield from differs(f"teacher {d}", teachers, [r.teacher if r else i for i, r in enumerate(want)])
        yield from differs(f"mask {d}", got.mask[d].tolist(), [r is not None and r.counts for r in want])
    want = [None if t is None else table[0][t] for t in mine]
    yield from differs("keys", got.keys.tolist(), [r is not None and r.key for r in want])
    yield from differs("extend", longer.tolist(), [*local.tolist(), *x[fetched[rank]].tolist()])
    yield from differs("ids", ids, [-1 if t is None else t for t in mine] + fetched[rank])
    for name, a, values, offset in (("shift", shifted, x, case.offset), ("grad", shift_grad, grad, -case.offset)):
        which = ahead(case.lengths, offset)
        index = [None if t is None else which[t] for t in mine]
        zero = [0.0] * case.width
        values = values.tolist()
        yield from differs(name, a.tolist(), [zero if i is None else values[i] for i in index])
    sums = [
        _weight(rank, t) + sum(_weight(r, t) * part.count(t) for r, part in enumerate(fetched) if t is not None)
        for t in mine
    ]
    yield from differs("gradient of extend", extend_grad.tolist(), [[float(s)] * case.width for s in sums])
    for i, (a, b) in enumerate(zip(whole, expected, strict=True)):
        yield from differs(f"pack {i} against one rank", a.tolist(), b.tolist())


def _fields(targets: DraftTargets) -> list[Tensor]:
    """`[T, ...]` each; without `teacher`, whose rows are each layout's own."""
    return [x.T for x in (targets.inputs, targets.labels, targets.positions, targets.mask)] + [targets.keys]


def _weight(rank: int, token: int | None) -> int:
    return 3 if token is None else 1 + (5 * rank + 3 * token) % 7


def random_cases(count: int, seed: int, **fields: Any) -> list[Case]:
    """Packs with empty, tiny and long segments."""
    host = random.Random(seed)
    out = []
    for i in range(count):
        depth = host.choice((1, 3, 7))
        offset = host.randrange(1, depth + 2)
        lengths = [host.choice((0, 1, 2, 5, 17, host.randrange(300))) for _ in range(host.randrange(1, 12))]
        sharding: Sharding = "zigzag" if i % 2 else "contiguous"
        out.append(
            Case(lengths=lengths, sharding=sharding, depth=depth, offset=offset, halo=depth + 1, seed=i, **fields)
        )
    return out


def check_on_gpu(group: dist.ProcessGroup | None, cases: Sequence[Case]) -> None:
    """`mismatches` with both backends, then the same calls with every wait for the device an error."""
    for backend in ("reference", "triton"):
        found = mismatches(group, cases, backend)
        assert not found, "\n".join(found)
    for case in cases:
        device = torch.device("cuda", torch.cuda.current_device())
        count = sum(case.lengths)
        tokens, flags = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layout = PackedLayout.make(case.lengths, device, halo=case.halo, sharding=case.sharding, cp_group=group)
            for backend in ("reference", "triton"):
                draft_targets(layout.shard(tokens), layout.shard(flags), layout, case.depth, backend)
                x = torch.randn(layout.tokens, case.width, device=device, dtype=case.dtype).requires_grad_()
                both = shift(x, layout, case.offset, backend).sum() + extend(x, layout).sum()
                both.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def over_nccl(fn: Callable[..., None], size: int, store: Path, *args: Any) -> None:
    """Runs `fn(group, *args)` in `size` processes with a GPU each. Raises what one of them raises."""
    torch.multiprocessing.spawn(_nccl_rank, args=(size, str(store), fn, args), nprocs=size)


def _nccl_rank(rank: int, size: int, store: str, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        fn(dist.group.WORLD, *args)
    finally:
        dist.destroy_process_group()
