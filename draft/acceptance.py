"""What acceptance is worth: the verify steps that a draft would have needed.

Invariant: an estimate reads only responses that exist; given them, every quantity here is an exact expectation.

Dimensions: `T` packed tokens, `D` depths.
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
    count, else the expectation over the draft's own randomness. Copies to the host once. Under context parallelism the
    ranks' rows are gathered, and each returns the estimate of the whole pack.
    """
    depth = mask.shape[0]
    assert accept.shape == mask.shape and mask.shape[1] == layout.tokens
    # P(a >= j) for j = 1..D; a depth beyond the response is never accepted
    reach = torch.where(mask, accept.double(), 0).cumprod(0)
    host = layout.unshard(torch.cat([reach, mask[:1].double()]).T).tolist()
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
