from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_config
from miles_spec.config import FleetConfig, RunConfig, TrainConfig
from miles_spec.draft.export import export
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3, MIMO, DraftSpec
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.serving import drafting, kept_bytes

SETTINGS = ServerSettings(model_path="/m", context_length=100, max_running=4)
IDS = torch.tensor([3, 4, 17, 60])


@pytest.mark.parametrize(
    ("spec", "ids", "told"),
    [
        (EAGLE, None, {}),
        (EAGLE, IDS, {"token_map": "token_map.pt"}),
        (EAGLE3, None, {"algorithm": "EAGLE3"}),
        (EAGLE3, IDS, {"algorithm": "EAGLE3", "draft_vocabulary": True}),
        (MIMO, IDS, {"token_map": "token_map.pt"}),
    ],
)
def test_a_server_is_told_what_the_folder_holds(
    spec: DraftSpec, ids: torch.Tensor | None, told: dict[str, object], tmp_path: Path
) -> None:
    draft = DraftHead(spec, tiny_config("qwen2", num_hidden_layers=4), ids)
    export(draft, tmp_path / "draft", dtype=torch.float32)
    settings = drafting(SETTINGS, draft, tmp_path / "draft")
    if "token_map" in told:
        told["token_map"] = str(tmp_path / "draft" / str(told["token_map"]))
    assert settings == replace(SETTINGS, draft_path=str(tmp_path / "draft"), **told)  # type: ignore[arg-type]
    assert (tmp_path / "draft" / "token_map.pt").exists() == bool(settings.token_map)


@pytest.mark.parametrize(
    ("offload", "release", "kept"),
    [((), "all", 12), (("optimizer",), "all", 0), (("weights", "draft"), "all", 8), (("optimizer",), "kv_cache", 12)],
)
@pytest.mark.parametrize(("backend", "dtype"), [("torch", "bfloat16"), ("megatron", "float32")])
def test_servers_take_the_room_of_what_the_trainer_moves_away(
    offload: Any, release: Any, kept: int, backend: Any, dtype: str
) -> None:
    """Where they give all of it back while the trainer needs it."""
    config = RunConfig(train=TrainConfig(offload=offload, backend=backend), fleet=FleetConfig(release=release))
    assert kept_bytes(config, getattr(torch, dtype)) == kept


def test_megatron_holds_weights_of_two_dtypes() -> None:
    """2 bytes and 4 of each, where the loaded model had 4."""
    train = TrainConfig(backend="megatron", offload=("weights",))
    assert kept_bytes(RunConfig(train=train, fleet=FleetConfig(release="all")), torch.bfloat16) == 10
    assert kept_bytes(RunConfig(train=train, fleet=FleetConfig(release="nothing")), torch.bfloat16) == 14
