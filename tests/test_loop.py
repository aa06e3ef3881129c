"""What the loop decides by itself; whole runs are in `e2e`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from miles_spec.config import DraftConfig, RunConfig
from miles_spec.loop import _counted


@pytest.mark.parametrize(
    ("serving", "max_batch", "counted"), [(None, 0, 2.5), (None, 8, 2.5), ("servers", 0, 2.5), ("servers", 8, None)]
)
def test_what_an_estimate_is_held_against(serving: Any, max_batch: int, counted: float | None) -> None:
    """Servers count steps without a draft as well; the embedded engine does not."""
    run: Any = SimpleNamespace(serving=serving, config=RunConfig(draft=DraftConfig(max_batch=max_batch)))
    assert _counted(run, {"accept_length": 2.5}) == counted
    assert _counted(run, {}) is None
