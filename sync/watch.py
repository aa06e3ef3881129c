"""What a model's own loader does with memory: its copies, its fills, and whether it computes anything.

Invariant: all that happens within `with watch:` in this thread is carried out, but for writes into foreign memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miles_spec.sync.runs import runs_of, touches

_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)

_VIEWS = frozenset(
    (
        "alias",
        "chunk",
        "detach",
        "narrow",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unflatten",
        "unsqueeze",
        "view",
    )
)
"""Operations that compute nothing. Not `reshape`, `contiguous` and `to`, which may copy and in inference mode come
whole."""


class Watch(TorchDispatchMode):
    """Records what is copied and filled, and whether anything else is computed. What would be written into `foreign`
    memory, joined runs, is noted, and not written."""

    def __init__(self, foreign: Tensor) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor]] = []
        """What is written and with what; a copy of tensors put in a row (`torch.cat`) is one of each of them."""
        self.fills: list[Tensor] = []
        self.trespassed = False
        self.plain = True
        """Whether there was nothing but copies, fills and views."""
        self._foreign = foreign
        self._rows: dict[int, tuple[Tensor, Sequence[Tensor], int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.copy_.default or function in _FILLS:
            if len(self._foreign) and touches(self._foreign, runs_of(args[0])):
                self.trespassed = True
                return args[0]
            if function in _FILLS:
                self.fills.append(args[0])
            else:
                self.copies += self._parts(args[0], args[1])
        elif function is torch.ops.aten.cat.default:
            row: Tensor = function(*args, **(kwargs or {}))
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            self._rows[row.data_ptr()] = (row, args[0], dim)
            return row
        elif function.overloadpacket.__name__ not in _VIEWS:
            self.plain = False
        return function(*args, **(kwargs or {}))

    def _parts(self, to: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The copies that a copy of `values` consists of."""
        row, parts, dim = self._rows.get(values.data_ptr(), (None, (), 0))
        if row is None or not row.shape == values.shape == to.shape or row.stride() != values.stride():
            return [(to, values)]
        return list(zip(to.split([part.shape[dim] for part in parts], dim), parts, strict=True))
