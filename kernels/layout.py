"""`PackedLayout`: which rows of a packed batch this rank holds, and where the rows around them are.

A pack is a batch of segments end to end. Under context parallelism it is padded and cut, and each rank holds some runs
of it, called pieces. Made once per batch on the host from the segments' lengths, which must be the same on all ranks;
its tensors are moved to a device by one copy. Invariant: every real token is a row of exactly one rank, and all ranks
hold equally many rows.

Dimensions: `T` rows of this rank, `S` segments, `E` rows fetched from beyond this rank's pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

Sharding = Literal["zigzag", "contiguous"]
Ints = NDArray[np.int64]

_ALIGNMENT = 16  # int64 numbers: parts of one buffer start where kernels can load whole vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One run of one segment that a rank holds, padding included."""

    segment: int
    """Index of the segment."""
    start: int
    """First position in the segment."""
    end: int
    """One past the last position."""
    row: int
    """The rank's row of `start`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayout:
    """Segments of a pack, and this rank's share of them.

    `zigzag` pads each segment to a multiple of `2 * cp` and cuts it into as many chunks; rank `r` holds chunks `r` and
    `2 * cp - 1 - r` of every segment, segment after segment, so that causal attention costs all ranks the same.
    `contiguous` pads the last segment that is not empty until `cp` divides the pack, and cuts it into `cp` runs. With
    one rank nothing is padded, and the pack is what it was. With several, a `divisor` pads as `divisor * cp` ranks
    would.
    """

    lengths: tuple[int, ...]
    """`[S]` tokens of each segment, over all ranks; 0 is allowed."""
    padded: tuple[int, ...]
    """`[S]` the same with padding, which follows a segment's tokens."""
    positions: Tensor
    """`[T]` int64, the position within its segment, from 0; goes on counting over padding."""
    segments: Tensor
    """`[T]` int64, the index of the segment."""
    real: Tensor
    """`[T]` bool, False for padding."""
    source: Tensor
    """`[T]` int64, which token of the whole pack without padding this is; for padding the last of its segment."""
    sharding: Sharding
    """How the pack is cut."""
    cp_rank: int
    """This rank, from 0."""
    cp_size: int
    """Ranks among which the pack is cut."""
    cp_group: dist.ProcessGroup | None
    """The ranks' group; None if there is one rank, or if rows are never exchanged."""
    divisor: int
    """Among how many ranks `finer` can cut each rank's rows."""
    halo: int
    """How many tokens beyond the end of each piece an exchange brings; 0 with one rank, where no piece has an end."""

    # what kernels/shift.py needs
    left: Tensor
    """`[T]` int64, tokens that follow in the segment; 0 for padding."""
    before: Tensor
    """`[T]` int64, rows that precede in the piece; 0 for padding."""
    near: Tensor
    """`[T]` int64, rows that follow in the piece."""
    beyond: Tensor
    """`[T]` int64; `k > near` rows further on is entry `beyond + k` of `halo_rows`."""
    halo_rows: Tensor
    """`[E + 1]` int64, by piece and position: the row, from `T`, that an exchange gives a token; then a 0."""
    send_rows: Tensor
    """int64, rows that other pieces want, by the rank that wants them."""
    sent_entries: tuple[Tensor, ...]
    """Which entries of `send_rows` are a row's first, second and so on; within each part rows are unique."""
    send_splits: tuple[int, ...]
    """`[cp]` entries of `send_rows` for each rank."""
    receive_splits: tuple[int, ...]
    """`[cp]` of the `E` rows, those that come from each rank."""

    @classmethod
    def make(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        halo: int = 0,
        sharding: Sharding = "zigzag",
        cp_rank: int = 0,
        cp_size: int = 1,
        cp_group: dist.ProcessGroup | None = None,
        divisor: int = 1,
    ) -> PackedLayout:
        """From segment lengths, equal on all ranks. Rank and size come from `cp_group` if it is given.

        Communicates nothing and never waits for the device. Raises `ValueError` for a negative length or halo, an
        unknown sharding, a rank that is not below the size, or a divisor below 1.
        """
        if any(n < 0 for n in lengths):
            raise ValueError(f"segment lengths must not be negative: {list(lengths)}")
        if halo < 0:
            raise ValueError(f"halo must not be negative: {halo}")
        if sharding not in get_args(Sharding):
            raise ValueError(f"sharding must be one of {get_args(Sharding)}, not {sharding!r}")
        if cp_group is not None:
            cp_rank, cp_size = dist.get_rank(cp_group), dist.get_world_size(cp_group)
        if not 0 <= cp_rank < cp_size:
            raise ValueError(f"cp_rank must lie in 0..{cp_size - 1}, not {cp_rank}")
        if divisor < 1:
            raise ValueError(f"divisor must be at least 1: {divisor}")
        halo = halo if cp_size > 1 else 0
        cut = _Cut.make(np.asarray(lengths, dtype=np.int64), sharding, cp_size, divisor)
        swap = _Swap.make(cut, cp_rank, halo)
        runs = cut.runs(np.array([cp_rank]))
        sizes = runs.end - runs.start
        rows = np.arange(cut.tokens, dtype=np.int64)
        positions = rows + np.repeat(runs.start - runs.row, sizes)
        last = np.repeat(cut.lengths[runs.segment] - 1, sizes)
        inside = positions <= last
        near = np.repeat(runs.row + sizes - 1, sizes) - rows
        host = {
            "positions": positions,
            "segments": np.repeat(runs.segment, sizes),
            "source": np.repeat(cut.offsets[runs.segment], sizes) + np.minimum(positions, last),
            "left": np.maximum(last - positions, 0),
            "before": np.where(inside, rows - np.repeat(runs.row, sizes), 0),
            "near": near,
            "beyond": np.repeat(swap.starts, sizes) - near - 1,
            "halo_rows": swap.halo_rows,
            "send_rows": swap.send_rows,
        }
        flags, *moved = _move([_packed(inside), *host.values(), *swap.sent_entries], device)
        tensors = dict(zip(host, moved, strict=False))
        return cls(
            lengths=tuple(lengths),
            padded=tuple(cut.padded.tolist()),
            real=flags.view(torch.bool)[: cut.tokens],
            sharding=sharding,
            cp_rank=cp_rank,
            cp_size=cp_size,
            cp_group=cp_group,
            divisor=divisor,
            halo=halo,
            sent_entries=tuple(moved[len(host) :]),
            send_splits=swap.send_splits,
            receive_splits=swap.receive_splits,
            **tensors,
        )

    @property
    def tokens(self) -> int:
        """`T`, the same on every rank."""
        return sum(self.padded) // self.cp_size

    @property
    def offsets(self) -> tuple[int, ...]:
        """`[S + 1]` where each segment starts in the whole pack without padding, and the pack's tokens."""
        return (0, *accumulate(self.lengths))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What this rank holds, in the order of its rows; none is empty."""
        return self.pieces_of(self.cp_rank)

    def pieces_of(self, rank: int) -> tuple[Piece, ...]:
        """What any rank holds, in the order of its rows; none is empty. Chunks that adjoin in a segment and in the rows
        are one piece. Arithmetic on the host."""
        runs = self._cut().runs(np.array([rank]))
        columns = (x.tolist() for x in (runs.segment, runs.start, runs.end, runs.row))
        return tuple(Piece(segment=s, start=a, end=b, row=r) for s, a, b, r in zip(*columns, strict=True))

    def shard(self, x: Tensor, fill: float = 0) -> Tensor:
        """This rank's rows `[T, ...]` of the whole pack `x` `[sum(lengths), ...]`; padding becomes `fill`."""
        assert x.shape[0] == sum(self.lengths)
        if self.cp_size == 1:
            return x
        return x.index_select(0, self.source).masked_fill(~as_column(self.real, x), fill)

    def unshard(self, x: Tensor) -> Tensor:
        """The whole pack `[sum(lengths), ...]`, on every rank, of which each passes its rows `x` `[T, ...]`.

        One all-gather; gradients do not pass. Raises `ValueError` if the ranks have no group.
        """
        assert x.shape[0] == self.tokens
        if self.cp_size == 1:
            return x.detach()
        gathered = x.new_empty((self.cp_size * self.tokens, *x.shape[1:]))
        dist.all_gather_into_tensor(as_bytes(gathered), as_bytes(x.detach().contiguous()), group=self.group())
        cut = self._cut()
        segment = np.repeat(np.arange(len(self.lengths)), cut.lengths)
        rank, row = cut.home(segment, np.arange(len(segment)) - cut.offsets[segment])
        (index,) = _move([rank * cut.tokens + row], x.device)
        return gathered.index_select(0, index)

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on `device`."""
        return PackedLayout.make(
            self.lengths,
            device,
            halo=self.halo,
            sharding=self.sharding,
            cp_rank=self.cp_rank,
            cp_size=self.cp_size,
            cp_group=self.cp_group,
            divisor=self.divisor,
        )

    def finer(
        self, rank: int, *, halo: int = 0, cp_group: dist.ProcessGroup | None = None
    ) -> tuple[PackedLayout, Tensor]:
        """The rows of rank `rank` of `divisor` that all hold this rank's rows, which share these as context-parallel
        ranks share a pack; and `[T']` int64, which of this rank's rows each of them is, padding another row's copy.

        `cp_group` are all `divisor * cp_size` ranks, those with the same rows side by side.
        """
        layout = PackedLayout.make(
            self.lengths,
            self.positions.device,
            halo=halo,
            sharding=self.sharding,
            cp_rank=self.cp_rank * self.divisor + rank,
            cp_size=self.cp_size * self.divisor,
            cp_group=cp_group,
        )
        assert layout.cp_rank == self.cp_rank * self.divisor + rank, "cp_group has its ranks in another order"
        if self.cp_size == 1:
            return layout, layout.source
        pieces = layout.pieces
        segment = np.repeat([p.segment for p in pieces], [p.end - p.start for p in pieces])
        position = np.concatenate([np.arange(p.start, p.end) for p in pieces] or [np.empty(0, dtype=np.int64)])
        holder, rows = self._cut().home(segment.astype(np.int64), position)
        assert (holder == self.cp_rank).all()
        (moved,) = _move([rows], self.positions.device)
        return layout, moved

    def _cut(self) -> _Cut:
        return _Cut.make(np.asarray(self.lengths, dtype=np.int64), self.sharding, self.cp_size, self.divisor)

    def group(self) -> dist.ProcessGroup:
        """The group to exchange rows in. Raises `ValueError` if there is none."""
        if self.cp_group is None:
            raise ValueError("rows cannot be exchanged between ranks: pass cp_group to PackedLayout.make")
        return self.cp_group


def as_bytes(x: Tensor) -> Tensor:
    """A contiguous tensor's storage as one row of uint8, so that a collective takes any dtype."""
    return x.view(-1).view(torch.uint8)


def as_column(flags: Tensor, like: Tensor) -> Tensor:
    """`[T]` as `[T, 1, ...]`, to combine with `like` `[T, ...]`."""
    return flags.view(-1, *(1 for _ in like.shape[1:]))


class _Runs(NamedTuple):
    """Pieces as columns."""

    rank: Ints
    segment: Ints
    start: Ints
    end: Ints
    row: Ints


class _Cut(NamedTuple):
    """How a pack is padded and cut."""

    sharding: Sharding
    size: int
    lengths: Ints
    padded: Ints
    offsets: Ints
    """`[S]` where segments start without padding."""
    starts: Ints
    """`[S]` where they start with padding."""
    tokens: int
    """Rows of each rank."""

    @classmethod
    def make(cls, lengths: Ints, sharding: Sharding, size: int, divisor: int) -> _Cut:
        padded = lengths.copy()
        if size == 1:
            sharding = "contiguous"
        elif sharding == "zigzag":
            padded += -lengths % (2 * size * divisor)
        elif lengths.any():
            padded[np.flatnonzero(lengths)[-1]] += -lengths.sum() % (size * divisor)
        return cls(
            sharding=sharding,
            size=size,
            lengths=lengths,
            padded=padded,
            offsets=np.cumsum(lengths) - lengths,
            starts=np.cumsum(padded) - padded,
            tokens=int(padded.sum()) // size,
        )

    def runs(self, ranks: Ints) -> _Runs:
        """What `ranks` hold, rank after rank."""
        rank = ranks[:, None, None]
        if self.sharding == "zigzag":
            chunk = self.padded[:, None] // (2 * self.size)
            start = chunk * np.concatenate([rank, 2 * self.size - 1 - rank], axis=-1)
            end = start + chunk
            row = (self.starts // self.size)[:, None] + chunk * np.arange(2) + 0 * rank
            # the last rank's two chunks adjoin
            both = ranks == self.size - 1
            end[both, :, 0] = end[both, :, 1]
            start[both, :, 1] = end[both, :, 1]
        else:
            first = rank * self.tokens - self.starts[:, None]  # the position in the segment of the rank's first row
            start, end = (np.clip(x, 0, self.padded[:, None]) for x in (first, first + self.tokens))
            row = start - first
        held = np.nonzero(start < end)
        return _Runs(rank=ranks[held[0]], segment=held[1], start=start[held], end=end[held], row=row[held])

    def home(self, segment: Ints, position: Ints) -> tuple[Ints, Ints]:
        """The rank that holds each token, and its row there."""
        if self.sharding == "zigzag":
            chunk = self.padded[segment] // (2 * self.size)
            index, inner = np.divmod(position, chunk)
            rank = np.minimum(index, 2 * self.size - 1 - index)
            return rank, self.starts[segment] // self.size + inner + np.where(index < self.size, 0, chunk)
        rank, row = np.divmod(self.starts[segment] + position, max(self.tokens, 1))
        return rank, row


class _Swap(NamedTuple):
    """The exchange of the tokens that follow pieces; fields as in `PackedLayout`."""

    starts: Ints
    """The entry of `halo_rows` at which each of this rank's pieces starts."""
    halo_rows: Ints
    send_rows: Ints
    sent_entries: list[Ints]
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]

    @classmethod
    def make(cls, cut: _Cut, rank: int, halo: int) -> _Swap:
        # every rank's wishes, in the order of its pieces, so that both ends of a transfer agree on its order
        runs = cut.runs(np.arange(cut.size))
        counts = np.clip(cut.lengths[runs.segment] - runs.end, 0, halo)
        starts = np.cumsum(counts) - counts
        position = np.arange(counts.sum()) + np.repeat(runs.end - starts, counts)
        wanted_by = np.repeat(runs.rank, counts)
        held_by, row = cut.home(np.repeat(runs.segment, counts), position)

        mine = held_by[wanted_by == rank]
        arrival = np.argsort(mine, kind="stable")
        halo_rows = np.zeros(len(mine) + 1, dtype=np.int64)
        halo_rows[arrival] = cut.tokens + np.arange(len(mine))

        send = held_by == rank
        send_rows = row[send]
        order = np.argsort(send_rows, kind="stable")
        new = np.diff(send_rows[order], prepend=-1) != 0
        entries = np.arange(len(order))
        repeat = entries - np.maximum.accumulate(np.where(new, entries, 0))  # how often the row came before

        own = starts[runs.rank == rank]
        return cls(
            starts=own - own[:1],
            halo_rows=halo_rows,
            send_rows=send_rows,
            sent_entries=[order[repeat == i] for i in range(repeat.max(initial=-1) + 1)],
            send_splits=tuple(np.bincount(wanted_by[send], minlength=cut.size).tolist()),
            receive_splits=tuple(np.bincount(mine, minlength=cut.size).tolist()),
        )


def _packed(flags: NDArray[np.bool_]) -> Ints:
    """Booleans as the bytes of int64 numbers, so that they share a copy with them."""
    out = np.zeros(-(-len(flags) // 8) * 8, dtype=np.bool_)
    out[: len(flags)] = flags
    return out.view(np.int64)


def _move(arrays: Sequence[Ints], device: torch.device | str) -> list[Tensor]:
    """`arrays` on `device`, by one copy for which nobody waits."""
    sizes = [len(a) for a in arrays]
    starts = [0, *accumulate(-(-n // _ALIGNMENT) * _ALIGNMENT for n in sizes)]
    pinned = torch.device(device).type == "cuda"
    host = torch.empty(starts[-1], dtype=torch.int64, pin_memory=pinned)
    view: NDArray[Any] = host.numpy()
    for start, array in zip(starts, arrays, strict=False):
        view[start : start + len(array)] = array
    moved = host.to(device, non_blocking=pinned)
    return [moved[start : start + n] for start, n in zip(starts, sizes, strict=False)]
