from __future__ import annotations

from collections.abc import Iterator

import pytest

from fake_sglang import FakeLoader, FakeSGLang, serving


@pytest.fixture(params=["0.5.17", "0.5.21"])
def fake(request: pytest.FixtureRequest) -> Iterator[FakeSGLang]:
    """SGLang of either kind; its loaders find the digest `right` of one tensor."""
    loader = FakeLoader(digests={"w": "right"})
    with serving(version=request.param, api_key="api-secret", admin_key="admin-secret", ring=loader) as fake:
        yield fake
