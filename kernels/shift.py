"""Shifts within segments of a pack: any tensor by some tokens, and draft training's labels and masks for all depths.

Invariants: nothing crosses from one segment into another. A row counts at depth `d` only if every token it reads or
predicts lies in its own segment and was sampled by the policy; that is exactly where serving drafts, because drafting
starts after the target has sampled one token. How the pack is cut among ranks changes no value.

Rows that live beyond a piece come with one exchange for all fields and depths; nothing here waits for the device.
Every rank must make the same calls in the same order, backward too.

Dimensions: `T` rows of this rank, `E` rows fetched from beyond its pieces, `D` depths, `F` numbers of a row. Depth
`d = 1..D` is index `d - 1`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernels.backend import Backend, jit, tl, triton, use_triton
from miles_spec.kernels.layout import PackedLayout, as_bytes, as_column

_ROWS = 256
"""Rows of a program of the kernels that handle whole numbers."""
_BLOCK = 2048
"""Numbers that a program of the shift moves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftTargets:
    """What each row of a pack reads and predicts at each depth.

    Where the token meant lies past the end of the segment, the segment's last token stands in, so gathering is always
    safe and never reads another segment; such entries are False in `mask`. A row of padding stands for itself and is
    False in `mask` and `keys`.
    """

    inputs: Tensor
    """`[D, T]` int64, the newest token that row `t` reads at depth `d`: `tokens[t + d]`."""
    labels: Tensor
    """`[D, T]` int64, the token it predicts: `tokens[t + d + 1]`."""
    positions: Tensor
    """`[D, T]` int64, rotary position within the segment: that of `t + d - 1`."""
    teacher: Tensor
    """`[D, T]` int64, the row of `extend(hidden, layout)` whose target distribution is the teacher: that of token
    `t + d`. With one rank, a row of the pack."""
    mask: Tensor
    """`[D, T]` bool, True where the row counts; `mask[d]` implies `mask[d - 1]`."""
    keys: Tensor
    """`[T]` bool, True where token `t + 1` lies in the segment: the rows that have a depth-1 input, prompts included,
    and so serve as keys."""


# Reference


def _ahead(layout: PackedLayout, steps: Tensor) -> Tensor:
    """`[..., T]` the row of `extend` that lies `steps` `[..., T]` tokens further on; at most `layout.left`."""
    row = torch.arange(layout.tokens, device=steps.device) + steps
    if layout.cp_size == 1:
        return row
    far = steps > layout.near
    return torch.where(far, layout.halo_rows[torch.where(far, layout.beyond + steps, -1)], row)


def _targets_reference(
    tokens: Tensor, loss_mask: Tensor, received: Tensor, layout: PackedLayout, depth: int
) -> DraftTargets:
    steps = torch.arange(1, depth + 2, device=tokens.device)[:, None]  # [D + 1, 1]
    inside = steps <= layout.left
    index = _ahead(layout, torch.minimum(steps, layout.left))
    marked = torch.cat([_marked(tokens, loss_mask), received])[index]
    sampled = (inside & (marked & 1).bool()).cumprod(0).bool()
    shifted = marked >> 1
    return DraftTargets(
        inputs=shifted[:-1],
        labels=shifted[1:],
        positions=layout.positions + steps[:-1] - 1,
        teacher=index[:-1],
        mask=sampled[1:],
        keys=inside[0],
    )


def _marked(tokens: Tensor, loss_mask: Tensor) -> Tensor:
    """Token and mask in one number: an exchange takes both."""
    return tokens * 2 + loss_mask


def _shift_reference(extended: Tensor, layout: PackedLayout, offset: int) -> Tensor:
    index = _ahead(layout, layout.left.clamp(max=offset))
    return extended.index_select(0, index).masked_fill(as_column(layout.left < offset, extended), 0)


# Triton


@jit
def _row_ahead(t, steps, near, beyond, halo_rows, live, HALO: tl.constexpr):  # type: ignore[no-untyped-def]
    row = t + steps
    if HALO:
        far = steps > near
        row = tl.where(far, tl.load(halo_rows + beyond + steps, live & far, other=0), row)
    return row


@jit(varying=("size",))
def _mark_kernel(tokens, loss_mask, rows, out, size, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = entry < size
    row = tl.load(rows + entry, live, other=0)
    token = tl.load(tokens + row, live, other=0)
    tl.store(out + entry, token * 2 + tl.load(loss_mask + row, live, other=0), live)


@jit(varying=("position_out", "teacher", "masks", "size"))
def _targets_kernel(  # type: ignore[no-untyped-def]
    tokens,
    loss_mask,
    received,
    positions,
    left,
    near,
    beyond,
    halo_rows,
    shifted,
    position_out,
    teacher,
    masks,
    size,
    DEPTH: tl.constexpr,
    HALO: tl.constexpr,
    ROWS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = t < size
    follow = tl.load(left + t, live, other=0)
    position = tl.load(positions + t, live, other=0)
    here = t
    start = t
    if HALO:
        here = tl.load(near + t, live, other=0)
        start = tl.load(beyond + t, live, other=0)
    good = follow > 0
    tl.store(masks + t, good.to(tl.uint8), live)
    at = t
    for step in tl.static_range(1, DEPTH + 2):
        row = _row_ahead(t, tl.minimum(follow, step), here, start, halo_rows, live, HALO)
        local = live
        if HALO:
            local = live & (row < size)
        token = tl.load(tokens + row, local, other=0)
        sampled = tl.load(loss_mask + row, local, other=0) != 0
        if HALO:
            marked = tl.load(received + row - size, live & (row >= size), other=0)
            token += marked >> 1
            sampled = sampled | ((marked & 1) != 0)
        good = good & sampled & (follow >= step)
        tl.store(shifted + at, token, live)
        if step <= DEPTH:
            tl.store(position_out + at, position + step - 1, live)
            tl.store(teacher + at, row, live)
        if step >= 2:
            tl.store(masks + at, good.to(tl.uint8), live)
        at += size


@jit(varying=("size",))
def _shift_kernel(  # type: ignore[no-untyped-def]
    source,
    target,
    left,
    before,
    near,
    beyond,
    halo_rows,
    size,
    width,
    offset,
    HALO: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = t < size
    inside = live & (tl.load(left + t, live, other=0) >= offset)
    here = t
    start = t
    if HALO:
        here = tl.load(near + t, live, other=0)
        start = tl.load(beyond + t, live, other=0)
    row = _row_ahead(t, offset, here, start, halo_rows, inside, HALO)
    wide = (column < width)[None, :]
    ours = t[:, None] * width + column[None, :]
    theirs = row[:, None] * width + column[None, :]
    if BACK:
        values = tl.load(source + ours, inside[:, None] & wide, other=0)
        tl.store(target + theirs, values, inside[:, None] & wide)
        # rows that no row of the piece reads: those written above are the others
        unread = live & (tl.load(before + t, live, other=0) < offset)
        tl.store(target + ours, tl.zeros_like(values), unread[:, None] & wide)
    else:
        values = tl.load(source + theirs, inside[:, None] & wide, other=0)
        tl.store(target + ours, values, live[:, None] & wide)


def _mark_triton(tokens: Tensor, loss_mask: Tensor, rows: Tensor) -> Tensor:
    out = torch.empty_like(rows)
    if size := len(rows):
        _mark_kernel[(triton.cdiv(size, _ROWS),)](tokens, loss_mask.view(torch.uint8), rows, out, size, ROWS=_ROWS)
    return out


def _targets_triton(
    tokens: Tensor, loss_mask: Tensor, received: Tensor, layout: PackedLayout, depth: int
) -> DraftTargets:
    size = layout.tokens
    shifted, positions, teacher = tokens.new_empty((3 * depth + 1, size)).split([depth + 1, depth, depth])
    masks = loss_mask.new_empty((depth + 1, size))
    if size:
        _targets_kernel[(triton.cdiv(size, _ROWS),)](
            tokens,
            loss_mask.view(torch.uint8),
            received,
            layout.positions,
            layout.left,
            layout.near,
            layout.beyond,
            layout.halo_rows,
            shifted,
            positions,
            teacher,
            masks.view(torch.uint8),
            size,
            DEPTH=depth,
            HALO=layout.cp_size > 1,
            ROWS=_ROWS,
        )
    return DraftTargets(
        inputs=shifted[:-1], labels=shifted[1:], positions=positions, teacher=teacher, mask=masks[1:], keys=masks[0]
    )


class _Shift(torch.autograd.Function):
    """Moves bits: one row goes to at most one row, so forward and backward are exact."""

    @staticmethod
    def forward(ctx: Any, extended: Tensor, layout: PackedLayout, offset: int) -> Tensor:
        ctx.layout, ctx.offset = layout, offset
        out = extended.new_empty((layout.tokens, *extended.shape[1:]))
        _launch_shift(extended.contiguous(), out, layout, offset, back=False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        layout: PackedLayout = ctx.layout
        fetched = sum(layout.receive_splits)
        out = grad.new_empty((layout.tokens + fetched, *grad.shape[1:]))
        if fetched:
            out[layout.tokens :].zero_()
        _launch_shift(grad.contiguous(), out, layout, ctx.offset, back=True)
        return out, None, None


def _launch_shift(source: Tensor, target: Tensor, layout: PackedLayout, offset: int, *, back: bool) -> None:
    width = math.prod(source.shape[1:])
    if not layout.tokens or not width:
        return
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    columns = min(triton.next_power_of_2(width), _BLOCK)
    rows = _BLOCK // columns
    _shift_kernel[(triton.cdiv(layout.tokens, rows), triton.cdiv(width, columns))](
        source.view(bits),
        target.view(bits),
        layout.left,
        layout.before,
        layout.near,
        layout.beyond,
        layout.halo_rows,
        layout.tokens,
        width,
        offset,
        HALO=layout.cp_size > 1,
        BACK=back,
        ROWS=rows,
        COLUMNS=columns,
    )


# The exchange


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        out = x.new_empty((layout.tokens + sum(layout.receive_splits), *x.shape[1:]))
        out[: layout.tokens] = x
        _exchange(out[layout.tokens :], x.index_select(0, layout.send_rows), layout)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout: PackedLayout = ctx.layout
        out = grad[: layout.tokens].clone()
        back = grad.new_empty((sum(layout.send_splits), *grad.shape[1:]))
        _exchange(back, grad[layout.tokens :].contiguous(), layout, back=True)
        # a row may be wanted twice; one addition after the other gives the same sum every time
        for entries in layout.sent_entries:
            out.index_add_(0, layout.send_rows[entries], back[entries])
        return out, None


def _exchange(out: Tensor, send: Tensor, layout: PackedLayout, *, back: bool = False) -> None:
    """Fills `out` `[E, ...]` with other pieces' `send`; or, `back`, the other way round."""
    row_bytes = send.element_size() * math.prod(send.shape[1:])
    outs, sends = ([n * row_bytes for n in splits] for splits in (layout.receive_splits, layout.send_splits))
    if back:
        outs, sends = sends, outs
    dist.all_to_all_single(as_bytes(out), as_bytes(send), outs, sends, group=layout.group())


# Public functions


def extend(x: Tensor, layout: PackedLayout) -> Tensor:
    """`[T + E, ...]`: this rank's rows `x` `[T, ...]`, any dtype, then those that follow its pieces.

    For each piece these are the next tokens of its segment, up to `layout.halo` of them, wherever they live; they come
    in the order of one all-to-all, and indices such as `DraftTargets.teacher` know it. With one rank this is `x`.
    Gradients go back to the ranks that own the rows and are added there, in the same order every time. Raises
    `ValueError` if the ranks have no group.
    """
    assert x.shape[0] == layout.tokens
    return _Extend.apply(x, layout) if layout.halo else x


def shift(x: Tensor, layout: PackedLayout, offset: int, backend: Backend = "auto") -> Tensor:
    """`[T, ...]`: row `t` is the row of `x` `[T, ...]` that lies `offset` tokens further on in the segment, or 0.

    Any dtype; floats have an exact gradient. Padding gives and gets 0. Raises `ValueError` for an offset below 1 or,
    with several ranks, above `layout.halo`.
    """
    if offset < 1:
        raise ValueError(f"offset must be at least 1, not {offset}")
    _check_halo(layout, offset)
    extended = extend(x, layout)
    if use_triton(backend, x):
        return _Shift.apply(extended, layout, offset)
    return _shift_reference(extended, layout, offset)


def draft_targets(
    tokens: Tensor, loss_mask: Tensor, layout: PackedLayout, depth: int, backend: Backend = "auto"
) -> DraftTargets:
    """Shifts a pack for `depth` draft steps: one launch, and with several ranks one exchange and a launch before it.

    `tokens` `[T]` int64, below `2**62`; `loss_mask` `[T]` bool, True where the policy sampled the token; both this
    rank's rows. Raises `ValueError` for a depth below 1 or, with several ranks, if `layout.halo` is below `depth + 1`.
    """
    if depth < 1:
        raise ValueError(f"draft depth must be at least 1, not {depth}")
    _check_halo(layout, depth + 1)
    assert tokens.shape == loss_mask.shape == (layout.tokens,)
    assert tokens.dtype == torch.int64 and loss_mask.dtype == torch.bool
    tokens, loss_mask = tokens.contiguous(), loss_mask.contiguous()
    fast = use_triton(backend, tokens)
    received = tokens[:0]
    if layout.cp_size > 1:
        rows = layout.send_rows
        send = _mark_triton(tokens, loss_mask, rows) if fast else _marked(tokens[rows], loss_mask[rows])
        received = tokens.new_empty(sum(layout.receive_splits))
        _exchange(received, send, layout)
    make = _targets_triton if fast else _targets_reference
    return make(tokens, loss_mask, received, layout, depth)


def _check_halo(layout: PackedLayout, steps: int) -> None:
    if layout.cp_size > 1 and layout.halo < steps:
        raise ValueError(f"shifting by {steps} needs PackedLayout.make(..., halo={steps}) or more, not {layout.halo}")
