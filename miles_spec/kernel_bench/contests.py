"""What `miles-spec bench kernels` compares: sizes, calls on the same inputs, and what they must give.

Invariant: all calls of one contest get the same tensors, and every call that computes a result is compared with a plain
expression in float64 on these inputs (integers with a plain loop) before it is timed.

Dimensions: `N` rows, `H` hidden, `V` vocabulary, `T` packed tokens, `S` segments, `D` depths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spec.kernel_bench.measure import Call
from miles_spec.kernels.backend import Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the inputs are."""

    rows: int
    """`N`."""
    heads: tuple[tuple[int, int], ...]
    """`(V, H)` of the draft losses."""
    policy_heads: tuple[tuple[int, int], ...]
    """`(V, H)` of the log-probabilities."""
    pack: int
    """`T` of the shift."""
    segments: tuple[int, ...]
    """`S` of the shift."""
    depths: tuple[int, ...]
    """`D` of the shift."""
    hidden: int
    """`H` of the states that are shifted."""
    attention: tuple[int, int]
    """`T` and `S` of the attention."""
    heads_of_attention: tuple[int, int, int]
    """Query heads, key heads, head size."""
    chain: int
    """Depths of the chain."""


GPU = Sizes(
    rows=8192,
    heads=((151936, 1024), (151936, 2048), (151936, 4096), (49152, 576)),
    policy_heads=((151936, 2048), (151936, 4096)),
    pack=65536,
    segments=(64, 512),
    depths=(1, 3, 7),
    hidden=2048,
    attention=(16384, 16),
    heads_of_attention=(16, 8, 128),
    chain=4,
)
CPU = Sizes(
    rows=384,
    heads=((4096, 64),),
    policy_heads=((4096, 64),),
    pack=4096,
    segments=(64,),
    depths=(1, 3),
    hidden=64,
    attention=(512, 4),
    heads_of_attention=(4, 2, 32),
    chain=3,
)
TINY = Sizes(
    rows=12,
    heads=((130, 16),),
    policy_heads=((130, 16),),
    pack=48,
    segments=(5,),
    depths=(3,),
    hidden=8,
    attention=(24, 3),
    heads_of_attention=(2, 1, 8),
    chain=3,
)
"""For Triton's interpreter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where the contests run."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    backend: Backend
    """Of our kernels."""
    peers: bool
    """Whether those that need a GPU are asked for too."""
    group: dist.ProcessGroup | None = None
    """Context-parallel ranks."""

    def randn(self, *shape: int, scale: float = 1.0, seed: int) -> Tensor:
        """Normal numbers, the same on every rank."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).mul_(scale).to(self.dtype)

    def tokens(self, count: int, vocabulary: int) -> Tensor:
        """`[count]` int64."""
        generator = torch.Generator(self.device).manual_seed(7)
        return torch.randint(vocabulary, (count,), generator=generator, device=self.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a call gave, or what it must give."""

    value: Tensor
    gradients: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truth:
    """What calls must give on some of their outputs' entries."""

    expected: Outcome
    value_at: Any = ...
    """Index of the compared entries of the value."""
    gradients_at: tuple[Any, ...] = ()
    """The same of each gradient."""

    def errors(self, given: Outcome) -> tuple[float, float | None]:
        """Relative errors of the value and, the largest, of the gradients, in the norm; NaN if a number is NaN."""
        pairs = zip(given.gradients, self.gradients_at, self.expected.gradients, strict=True)
        gradients = [relative_error(g[at], want) for g, at, want in pairs]
        worst = max(gradients, key=lambda e: (e != e, e)) if gradients else None
        return relative_error(given.value[self.value_at], self.expected.value), worst


def relative_error(given: Tensor, expected: Tensor) -> float:
    """`|given - expected| / |expected|` in float64."""
    want = expected.detach().double()
    difference = (given.detach().double() - want).norm()
    return float(difference / want.norm()) if want.any() else float(difference)


def as_it_is(result: Any) -> Outcome:
    """For calls that return an `Outcome`."""
    assert isinstance(result, Outcome)
    return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One call in a contest."""

    name: str
    kind: Literal["ours", "peer", "floor", "scale"]
    """`floor`: what the work costs at least; `scale`: another call of ours, for comparison alone."""
    load: Callable[[], Call]
    """Raises `ImportError` where a peer is missing."""
    truth: Truth | None = None
    view: Callable[[Any], Outcome] = as_it_is
    """The call's result in the form that `truth` compares."""
    floor: str | None = None
    """The entry that is its floor."""
    rival: bool = True
    """Of ours: whether the peers do the same work."""
    tolerance: tuple[float, float] | None = None
    """Instead of the contest's."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contest:
    """Calls on the same inputs."""

    kernel: str
    case: str
    entries: Sequence[Entry]
    tolerance: tuple[float, float]
    """Largest relative error of our value and gradients; 0 means equal."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The size, for what is made of the results."""
    count: bool = False
    """Whether launches and host synchronisations are counted."""


def ready(call: Call) -> Callable[[], Call]:
    """`load` of a call that needs no import."""
    return lambda: call
