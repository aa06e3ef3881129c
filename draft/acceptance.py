"""What acceptance is worth: the verify steps that a draft would have needed.

Invariant: an estimate reads only responses that exist; given them, every quantity here is an exact expectation.

Dimensions: `T` packed tokens, `D` depths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miles_spec.kernels.layout import PackedLayout
from miles_spec.types import SpecEstimate


class Replay:
    """Expected verify steps, and drafted tokens accepted in them, had blocks of `D` made the pack's responses.

    A block at row `t` accepts `a` tokens with `P(a >= j) = prod_{d <= j} accept[d, t]`, and the next one starts at
    `t + 1 + a`: a renewal process. The first block of each run of rows with `mask[0]` starts at the run's first row; a
    row's expected visits add up to the verify steps. Where `accept` is 0 or 1 (rules `greedy` and `target`) this is a
    count, else the expectation over the draft's own randomness.

    Making one waits for nothing: what it needs is copied to the host behind what is queued, and `result` waits for it.
    """

    def __init__(self, accept: Tensor, mask: Tensor, layout: PackedLayout) -> None:
        """`accept` `[D, T]` float, probability that the token drafted at row `t`, depth `d` was accepted, given the
        realised tokens and that the block got so far; `mask` `[D, T]` bool as in `DraftTargets`. Under context
        parallelism the ranks' rows are gathered here."""
        assert accept.shape == mask.shape and mask.shape[1] == layout.tokens
        # P(a >= j) for j = 1..D; a depth beyond the response is never accepted
        reach = torch.where(mask, accept.double(), 0).cumprod(0)
        rows = layout.unshard(torch.cat([reach, mask[:1].double()]).T.contiguous())
        self._offsets = layout.offsets
        self._arrived = None
        self._rows = rows
        if rows.is_cuda:
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(rows.device))

    def result(self) -> SpecEstimate:
        """Of the whole pack, on every rank of it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        host = self._rows.numpy()
        reach, counts = host[:, :-1], host[:, -1] > 0
        replay = _count if np.isin(reach, (0, 1)).all() else _expect
        accepted = verify_steps = 0.0
        for first, last in pairwise(self._offsets):
            (edges,) = np.diff(counts[first:last], prepend=False, append=False).nonzero()
            for start, stop in (first + edges.reshape(-1, 2)).tolist():
                more, steps = replay(reach[start:stop])
                accepted, verify_steps = accepted + more, verify_steps + steps
        return SpecEstimate(accepted=accepted, verify_steps=verify_steps)


def _count(reach: NDArray[Any]) -> tuple[float, float]:
    """Tokens accepted and verify steps of one run of rows, from `reach` `[n, D]` of zeros and ones: block by block."""
    accepts = reach.sum(1).astype(int).tolist()
    row = accepted = verify_steps = 0
    while row < len(accepts):
        accepted, verify_steps = accepted + accepts[row], verify_steps + 1
        row += 1 + accepts[row]
    return accepted, verify_steps


def _expect(reach: NDArray[Any]) -> tuple[float, float]:
    """Both as expectations, from `reach` `[n, D]`, over the visits of each row."""
    depth = reach.shape[1]
    visits = [1.0] + [0.0] * (len(reach) + depth)
    accepted = verify_steps = 0.0
    for row, survive in enumerate(reach.tolist()):
        if visit := visits[row]:
            verify_steps += visit
            accepted += visit * sum(survive)  # E[a] = sum_j P(a >= j)
            before = 1.0
            for a, after in enumerate(survive):
                visits[row + 1 + a] += visit * (before - after)
                before = after
            visits[row + 1 + depth] += visit * before
    return accepted, verify_steps
