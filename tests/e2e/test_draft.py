"""A draft trained offline on the model's own responses starts a run, and what the run makes of it is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e2e.conftest import Configure, Said, lines
from miles_spec import checkpoint, cli, models
from miles_spec.assemble import assemble
from miles_spec.draft.load import inspect
from miles_spec.first_draft import fresh_draft
from miles_spec.live import LiveTable
from miles_spec.settings import dump


@pytest.mark.usefixtures("rewards")
def test_from_a_model_to_a_run_and_back(
    configure: Configure, work: Path, tmp_path: Path, said: Callable[[], Said], capsys: pytest.CaptureFixture[str]
) -> None:
    offline, online = tmp_path / "offline.toml", tmp_path / "run.toml"
    offline.write_text(
        dump(configure(tmp_path / "offline", offline__samples_per_prompt=2, offline__steps=8, draft__lr=0.003))
    )
    assert cli.main(["draft", "train", str(offline)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "offline")
    trained = tmp_path / "offline" / "draft"
    online.write_text(dump(configure(tmp_path / "run", steps=2, draft__path=str(trained), checkpoint__every=1)))
    assert cli.main(["train", str(online), "--steps", "1"]) == 0
    first = checkpoint.load_latest(tmp_path / "run")
    assert first is not None
    for name, tensor in load_file(trained / "model.safetensors").items():  # what the run started from
        ours = name.replace("layers.0.", "layer.")
        assert torch.equal(first.tensors[f"frozen.{ours}"], tensor), name
    assert cli.main(["train", str(online)]) == 0  # resumes
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    before = json.loads((tmp_path / "offline" / "summary.json").read_text())["accept_length_before"]
    assert lines(tmp_path / "run")[0]["accept_length"] > before - 0.2

    capsys.readouterr()
    assert cli.main(["draft", "export", str(tmp_path / "run"), str(tmp_path / "draft"), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith("family      eagle\n")
    last = checkpoint.load_latest(tmp_path / "run")
    assert last is not None and inspect(tmp_path / "draft").family == "eagle"
    for name, tensor in load_file(tmp_path / "draft" / "model.safetensors").items():
        assert torch.equal(last.tensors[f"draft.{name.replace('layers.0.', 'layer.')}"], tensor), name

    assert cli.main(["train", str(online), "--draft.family", "eagle3"]) == 2
    assert said().matches(r'draft.path = ".*" holds a draft of family eagle, and draft.family is "eagle3".*')
    assert cli.main(["train", str(offline)]) == 2
    assert said().matches(r".*/offline holds checkpoints of `miles-spec draft train`; choose another `out`")
    assert cli.main(["draft", "train", str(online)]) == 2
    assert said().matches(r".*/run holds checkpoints of `miles-spec train`; choose another `out`")


@pytest.mark.usefixtures("rewards")
def test_a_layer_for_each_depth_is_trained_and_served(configure: Configure, tmp_path: Path) -> None:
    """What the trainer expects of it is what the engine counts, before each step and after a resume."""
    config = configure(tmp_path / "run", draft__family="nextn", draft__layers=2, checkpoint__every=1)
    path = tmp_path / "run.toml"
    path.write_text(dump(config))
    assert cli.main(["train", str(path), "--steps", "2"]) == 0
    assert cli.main(["train", str(path), "--steps", "3"]) == 0
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3] and config.draft.num_steps > 2
    assert all(abs(row["accept_estimate_error"]) < 1e-9 and row["accepted_tokens"] > 0 for row in rows)
    saved = checkpoint.load_latest(tmp_path / "run")
    assert saved is not None
    before, after = (saved.tensors[f"{which}.deeper.0.fc.weight"] for which in ("frozen", "draft"))
    assert not torch.equal(before, after)


@pytest.mark.usefixtures("rewards")
def test_a_fresh_draft_starts_from_least_squares_over_the_first_responses(configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path, draft__warmup_steps=0)
    draft = assemble(config, LiveTable(steps=config.steps)).draft
    assert draft is not None
    before = dict(fresh_draft(config, models.load(config.model), None).named_parameters())
    changed = {name for name, parameter in draft.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
