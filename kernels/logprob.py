r"""Log-probabilities of given tokens from hidden states and the LM head, without a `[tokens, vocabulary]` tensor.

Invariant: at most `chunk_rows * V` logits exist at a time, in forward and in backward, which recomputes them.

One sweep over a row's logits `z` keeps their largest `m`, the mass `s = sum_v exp(z_v - m)`, `e = sum_v exp(z_v - m)
(z_v - m)`, the label's `z_x` and the argmax. States of two parts of the vocabulary merge exactly: that with the smaller
maximum `m'` moves to the larger `m`, by `s <- s exp(m' - m)` and `e <- (e + (m' - m) s) exp(m' - m)`. Lanes of a
program and ranks of a tensor-parallel (TP) group are merged alike. At the end

    log p_x = (z_x - m) - log s        entropy = log s - e / s        lse = m + log s

and the gradient of `g log p_x` in `z_k` is `g (1[k = x] - exp(z_k - m) / s)`.

Dimensions: `N` rows, `H` hidden, `V` vocabulary (under TP this rank's share), `n` and `c` rows and columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from miles_spec.kernels.backend import Backend, jit, tl, triton, use_triton
from miles_spec.kernels.linear import (
    HALF,
    Product,
    add_product,
    autocast_inputs,
    chunks,
    gather_states,
    no_autocast,
    vocab_range,
)

CPU_ROWS = 256
GPU_BYTES = 3 << 28  # of logits and their gradient: enough rows to fill the GPU, little beside the head itself
SWEEP_BLOCK, SWEEP_WARPS, SWEEP_STAGES = 4096, 8, 3
GRADIENT_BLOCK, GRADIENT_WARPS = 4096, 8
STATE = 5  # numbers that a sweep leaves per row: maximum, mass, e, label's logit, argmax


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogProbs:
    """Of `logits / temperature`, all `[N]`, float32 and in nats but for `best`; the same on every rank."""

    logprob: Tensor
    """Log-probability of the label; differentiable."""
    entropy: Tensor
    """Entropy of the row's distribution; detached."""
    lse: Tensor
    """Log-sum-exp of the row's tempered logits; detached."""
    best: Tensor
    """int64, the most likely token, the lowest id of several."""


# Reference


def _sweep(logits: Tensor, labels: Tensor, first: int, inverse: float, spare: Tensor, state: Tensor) -> None:
    """Fills `state` `[n, STATE]` from `logits` `[n, V]`, which it overwrites, as `spare`, of the same size."""
    columns = logits.shape[1]
    if inverse != 1:
        logits.mul_(inverse)
    top, best = logits.max(-1, keepdim=True)
    local = labels[:, None] - first
    mine = (local >= 0) & (local < columns)
    label = logits.gather(-1, local.clamp(0, columns - 1)).masked_fill(~mine, float("-inf"))
    weights = torch.exp(logits.sub_(top), out=spare[: logits.numel()].view_as(logits))
    mass = weights.sum(-1, keepdim=True)
    moment = weights.mul_(logits).sum(-1, keepdim=True)
    torch.cat([top, mass, moment, label, best + first], dim=-1, out=state)


def _gradient(
    logits: Tensor, out: Tensor, labels: Tensor, top: Tensor, mass: Tensor, grad: Tensor, first: int, inverse: float
) -> None:
    """Fills `out` `[n, c]` with the gradient of `grad @ logprob` in the untempered `logits`, which it overwrites."""
    columns = logits.shape[1]
    scale = grad[:, None] * inverse
    if inverse != 1:
        logits.mul_(inverse)
    weighted = logits.sub_(top[:, None]).exp_().mul_(-scale / mass[:, None])
    local = labels[:, None] - first
    mine = (local >= 0) & (local < columns)
    weighted.scatter_add_(-1, local.clamp(0, columns - 1), torch.where(mine, scale, 0))
    if out.dtype != weighted.dtype:
        out.copy_(weighted)


# Triton


@jit(varying=("labels", "state"))
def _sweep_kernel(  # type: ignore[no-untyped-def]
    logits, labels, state, columns, first, inverse, STATE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    # one program per row; each lane sums for itself, relative to the largest logit so far, which seldom rises
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    lane = tl.arange(0, BLOCK)
    scale = inverse * 1.4426950408889634  # powers of two are what the hardware takes
    top = -1.0e30
    best = 0
    mass = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        # what lies beyond the row weighs nothing, and is finite, so that nothing times its gap is no NaN
        z = tl.load(logits + start + lane, mask=start + lane < columns, other=-1.0e30)
        highest = tl.max(z, axis=0)
        if highest > top:
            gap = (top - highest) * scale
            factor = tl.exp2(gap)
            moment = factor * (moment + gap * mass)
            mass = factor * mass
            best = start + tl.min(tl.where(z == highest, lane, BLOCK - 1), axis=0)
            top = highest
        gaps = (z - top) * scale
        weights = tl.exp2(gaps)
        mass += weights
        moment += weights * gaps
    local = tl.load(labels + row) - first
    mine = (local >= 0) & (local < columns)
    label = tl.load(logits + local, mask=mine, other=-float("inf")) * inverse
    state += row * STATE
    tl.store(state, top * inverse)
    tl.store(state + 1, tl.sum(mass, axis=0))
    tl.store(state + 2, tl.sum(moment, axis=0) * 0.6931471805599453)
    tl.store(state + 3, label)
    tl.store(state + 4, (best + first).to(tl.float32))


@jit(varying=("labels", "top", "mass", "grad"))
def _gradient_kernel(logits, out, labels, top, mass, grad, columns, first, inverse, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    z = tl.load(logits + row * columns + column, mask=inside, other=0.0) * inverse
    scale = tl.load(grad + row) * inverse
    p = tl.exp(z - tl.load(top + row)) / tl.load(mass + row)
    hit = column == tl.load(labels + row) - first
    d = scale * (tl.where(hit, 1.0, 0.0) - p)
    tl.store(out + row * columns + column, d.to(out.dtype.element_ty), mask=inside)


def _sweep_triton(logits: Tensor, labels: Tensor, first: int, inverse: float, state: Tensor) -> None:
    rows, columns = logits.shape
    block = min(SWEEP_BLOCK, triton.next_power_of_2(columns))
    _sweep_kernel[(rows,)](
        logits, labels, state, columns, first, inverse, STATE, BLOCK=block, STAGES=SWEEP_STAGES, num_warps=SWEEP_WARPS
    )


def _gradient_triton(
    logits: Tensor, out: Tensor, labels: Tensor, top: Tensor, mass: Tensor, grad: Tensor, first: int, inverse: float
) -> None:
    rows, columns = logits.shape
    # whatever the last tile has: its columns follow the number of rows, and a block of its size would be another kernel
    _gradient_kernel[rows, triton.cdiv(columns, GRADIENT_BLOCK)](
        logits, out, labels, top, mass, grad, columns, first, inverse, BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS
    )


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        inverse: float,
        chunk_rows: int,
        group: dist.ProcessGroup | None,
        fused: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, columns = hidden.shape[0], head.shape[0]
        first, end = vocab_range(columns, group)
        assert end <= 1 << 24, "a state keeps its argmax in float32"
        state = hidden.new_empty(count, STATE, dtype=torch.float32)
        product = Product(hidden, columns, min(chunk_rows, count))
        spare = None if fused else hidden.new_empty(min(chunk_rows, count) * columns, dtype=torch.float32)
        with no_autocast(hidden):
            for rows in chunks(count, chunk_rows):
                logits = product(hidden[rows], head)
                if spare is None:
                    _sweep_triton(logits, labels[rows], first, inverse, state[rows])
                else:
                    _sweep(logits, labels[rows], first, inverse, spare, state[rows])
        top, mass, moment, label, best = _merge(gather_states(state, group))
        ctx.save_for_backward(hidden, head, labels, top, mass)
        ctx.inverse, ctx.chunk_rows, ctx.group, ctx.fused = inverse, chunk_rows, group, fused
        log_mass = mass.log()
        results = label - top - log_mass, log_mass - moment / mass, top + log_mass, best.long()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, labels, top, mass = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        count, columns = hidden.shape[0], head.shape[0]
        if not count:
            return hidden.new_empty(hidden.shape), torch.zeros_like(head) if need_head else None, *[None] * 5
        first = vocab_range(columns, ctx.group)[0]
        size = _tile(count, columns, ctx.chunk_rows) if need_head else (min(count, ctx.chunk_rows), columns)
        grad = grad.contiguous()
        gradient = _gradient_triton if ctx.fused else _gradient
        product = Product(hidden, size[1], size[0])
        d_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if need_hidden else None
        d_head = head.new_empty(head.shape) if need_head else None
        # sums over several tiles are taken in float32
        wide = count > size[0] and head.dtype in HALF
        part = head.new_empty(size[1], head.shape[1], dtype=torch.float32) if need_head and wide else None
        with no_autocast(hidden):
            for cols in chunks(columns, size[1]):
                for rows in chunks(count, size[0]):
                    logits = product(hidden[rows], head[cols])
                    d_logits = product.narrow(logits)
                    row_values = labels[rows], top[rows], mass[rows], grad[rows]
                    gradient(logits, d_logits, *row_values, first + cols.start, ctx.inverse)
                    if d_hidden is not None:
                        add_product(d_hidden[rows], d_logits, head[cols], first=cols.start == 0)
                    if d_head is not None:
                        total = d_head[cols] if part is None else part[: cols.stop - cols.start]
                        add_product(total, d_logits.T, hidden[rows], first=rows.start == 0)
                if d_head is not None and part is not None:
                    d_head[cols] = part[: cols.stop - cols.start]
        if d_hidden is not None:
            if ctx.group is not None:
                dist.all_reduce(d_hidden, group=ctx.group)
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, d_head, None, None, None, None, None


def _merge(states: Tensor) -> tuple[Tensor, ...]:
    """The five numbers of each row, `[N]` each, from `states` `[tp, N, STATE]` of equal parts of the vocabulary."""
    tops, masses, moments, labels, bests = states.unbind(-1)
    top, winner = tops.max(0)  # the first of equals, which has the lowest ids
    gap = tops - top
    factor = gap.exp()
    mass = (factor * masses).sum(0)
    moment = (factor * (moments + gap * masses)).sum(0)
    return top, mass, moment, labels.amax(0), bests.gather(0, winner[None])[0]


def _tile(rows: int, columns: int, chunk_rows: int) -> tuple[int, int]:
    """Rows and columns of backward's tiles where both gradients are wanted, of `chunk_rows * columns` logits at most.

    Each tile adds to a band of either gradient, so together `N H V / c` and `V H N / n` numbers are read and written
    besides the products: least for squares.
    """
    room = chunk_rows * columns
    side = _whole(isqrt(room))
    if rows <= side:
        return rows, min(columns, _whole(room // rows))
    return (min(rows, _whole(room // columns)), columns) if columns <= side else (side, side)


def _whole(size: int) -> int:
    """`size`, down to a multiple of 128, which suits the hardware, unless it is smaller."""
    return size // 128 * 128 or size


def _chunk_rows(head: Tensor) -> int:
    if not head.is_cuda:
        return CPU_ROWS
    row_bytes = head.shape[0] * (4 + (2 if head.dtype in HALF else 0))
    return max(256, _whole(GPU_BYTES // row_bytes))


def logprob(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> LogProbs:
    """Log-probability of `labels` `[N]` int64 under `softmax(hidden @ head.T / temperature)`.

    `hidden` `[N, H]` and `head` `[V, H]` in float32, bfloat16 or float16; both get gradients, the head's only if it
    requires one. The products are taken in their own dtype (that of autocast where it is on) and summed in float32;
    `Product` says how they are rounded. Everything after them is float32. Temperature 0 (greedy) counts as 1. A label
    outside the vocabulary has log-probability `-inf`.

    `chunk_rows` bounds memory: that many rows of logits at a time, or as many logits in another shape. By default 256
    on a CPU, and on a GPU as many as keep logits and gradient near 0.75 GiB.

    With `group`, a TP group, `head` is this rank's shard (`vocab_range`), and hidden states, labels (global ids) and
    the loss made of the result are the same on every rank. Each then gets the whole gradient of the hidden states, and
    its shard's of the head. Raises `ValueError` for other dtypes and for a backend that cannot run here.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, not {chunk_rows}")
    hidden, head = autocast_inputs(hidden, head)
    rows = chunk_rows or _chunk_rows(head)
    fused = use_triton(backend, hidden)
    results = _LogProb.apply(hidden, head, labels.contiguous(), 1 / (temperature or 1.0), rows, group, fused)
    value, entropy, lse, best = results
    return LogProbs(logprob=value, entropy=entropy, lse=lse, best=best)
