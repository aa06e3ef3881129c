"""`miles-spec doctor` with a real server."""

from __future__ import annotations

from miles_spec.config import FleetConfig, RolloutConfig, RunConfig
from miles_spec.doctor import DEPTH, findings

from .conftest import ARGUMENTS, FORKED, PYTHON


def test_all_is_well() -> None:
    config = RunConfig(
        rollout=RolloutConfig(engine="sglang", temperature=0.0),
        fleet=FleetConfig(launch=(PYTHON, FORKED), bucket_mb=1),
        sglang=ARGUMENTS,
    )
    found = [finding for finding in findings(config, server=True) if "GPU" not in finding.text]
    assert {finding.level for finding in found} == {"ok"}, found
    texts = "\n".join(finding.text for finding in found)
    for tried in ("start of a server", "push", "generation", "speculation", "a flipped byte"):
        assert f"{tried}: " in texts
    length = float(texts.split("accept length ")[1].split()[0])
    assert 1.3 < length <= DEPTH + 1
