"""What acceptance is worth: the verify steps that a draft would have needed, and the weights of end-to-end TV.

Invariant: an estimate reads only responses that exist; given them, every quantity here is an exact expectation.

Dimensions: `T` packed tokens, `D` depths, `N` rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from miles_spec.kernels.layout import PackedLayout
from miles_spec.types import SpecEstimate


def estimate(accept: Tensor, mask: Tensor, layout: PackedLayout) -> SpecEstimate:
    """Expected verify steps, and drafted tokens accepted in them, had blocks of `D` made the pack's responses.

    `accept` `[D, T]` float, probability that the token drafted at row `t`, depth `d` was accepted, given the realised
    tokens and that the block got so far; `mask` `[D, T]` bool as in `DraftTargets`.

    A block at row `t` accepts `a` tokens with `P(a >= j) = prod_{d <= j} accept[d, t]`, and the next one starts at
    `t + 1 + a`: a renewal process. The first block of each run of rows with `mask[0]` starts at the run's first row; a
    row's expected visits add up to the verify steps. Where `accept` is 0 or 1 (rules `greedy` and `target`) this is a
    count, else the expectation over the draft's own randomness. Copies to the host once.
    """
    depth = mask.shape[0]
    assert accept.shape == mask.shape and mask.shape[1] == layout.tokens
    # P(a >= j) for j = 1..D; a depth beyond the response is never accepted
    reach = torch.where(mask, accept.double(), 0).cumprod(0)
    host = torch.cat([reach, mask[:1].double()]).cpu().T.tolist()
    accepted = verify_steps = 0.0
    for start, end in pairwise(layout.offsets):
        visits = [0.0] * (end - start + depth + 1)
        running = False
        for i, row in enumerate(host[start:end]):
            counts = bool(row[depth])
            if counts:
                visit = visits[i] = visits[i] if running else 1.0
                if visit:
                    verify_steps += visit
                    accepted += visit * sum(row[:depth])  # E[a] = sum_j P(a >= j)
                    survive = [1.0, *row[:depth], 0.0]
                    for a, (more, less) in enumerate(pairwise(survive)):
                        visits[i + 1 + a] += visit * (more - less)
            running = counts
    return SpecEstimate(accepted=accepted, verify_steps=verify_steps)


def tv_weights(accept_prob: Tensor) -> Tensor:
    """`[D, N]` row weights of end-to-end TV: the derivative of the expected accepted tokens in each acceptance.

    `accept_prob` `[D, N]` float, expected acceptance `a_d` of each row at each depth, 0 where the row does not count.
    With `L = sum_d prod_{j <= d} a_j`, `dL/da_i = prod_{j < i} a_j * (1 + sum_{d > i} prod_{i < j <= d} a_j)`: what
    reaches depth `i`, times one plus what follows from it. Nothing is divided, so a zero acceptance is exact. Detached.
    """
    a = accept_prob.detach()
    reach = torch.cat([torch.ones_like(a[:1]), a[:-1].cumprod(0)])
    follows = torch.ones_like(a)
    for d in range(a.shape[0] - 2, -1, -1):
        follows[d] = 1 + a[d + 1] * follows[d + 1]
    return reach * follows
