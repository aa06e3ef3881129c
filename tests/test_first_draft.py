"""What a run's draft starts as: given or fresh, and over which vocabulary."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_config, tiny_model, tiny_tokenizer
from miles_spec import models
from miles_spec.config import DraftConfig, ModelConfig, RolloutConfig, RunConfig
from miles_spec.draft.export import export
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import FAMILIES
from miles_spec.first_draft import fresh_draft, given_draft, vocabulary
from miles_spec.types import Completion, Prompt, Sample, SpecCounts


def sampled(prompt: tuple[int, ...], response: tuple[int, ...]) -> Sample:
    completion = Completion(
        request_id="", tokens=response, logprobs=(0.0,) * len(response), accepted=(False,) * len(response),
        versions=(), spec=SpecCounts(), finish="stop", text="",
    )  # fmt: skip
    return Sample(prompt=Prompt(id="", tokens=prompt, text=""), index=0, completion=completion, reward=0.0)


tokens = st.lists(st.integers(0, 60), max_size=30).map(tuple)


@given(st.lists(st.tuples(tokens, tokens), max_size=4), st.integers(1, 60))
def test_the_vocabulary_holds_the_most_frequent_tokens(pairs: list[tuple[tuple[int, ...], ...]], size: int) -> None:
    got = vocabulary([sampled(*pair) for pair in pairs], size, tiny_model())
    assert got is not None and got.dtype == torch.int64
    chosen = got.tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == size and chosen[0] >= 0 and chosen[-1] < 61
    counts = Counter(t for prompt, response in pairs for t in (*prompt, *response))
    left_out = set(range(61)) - set(chosen)
    # what was seen comes before what was not and the frequent before the rare; unseen ones in order of their ids
    assert min(counts[t] for t in chosen) >= max(counts[t] for t in left_out)
    unseen = [t for t in chosen if not counts[t]]
    assert not unseen or all(counts[t] or t > unseen[-1] for t in left_out)


@pytest.mark.parametrize("size", [0, 61, 100])
def test_a_whole_vocabulary_needs_no_choice(size: int) -> None:
    assert vocabulary([sampled((3, 4), (5,))], size, tiny_model()) is None


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, a Llama of four layers, and drafts of it: `eagle/`, `eagle3/`, `reduced/`."""
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("drafts"), tiny_tokenizer()
    torch.manual_seed(3)
    config = tiny_config("llama", vocab_size=len(tokenizer), num_hidden_layers=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    loaded = models.load(ModelConfig(path=str(folder / "model"), dtype="float32"))
    for name, family, ids in (("eagle", "eagle", None), ("eagle3", "eagle3", None), ("reduced", "eagle", 40)):
        head = DraftHead.attach(
            loaded.model, FAMILIES[family], None if ids is None else torch.arange(ids), torch.Generator().manual_seed(9)
        )
        export(head, folder / name, dtype=torch.float32, tokenizer=tokenizer)
    return folder


def configured(work: Path, draft: DraftConfig, **rollout: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(work / "model"), dtype="float32"), draft=draft, rollout=RolloutConfig(**rollout)
    )


@pytest.mark.parametrize("family", ["auto", "eagle3"])
def test_a_draft_from_a_folder(family: Any, work: Path) -> None:
    config = configured(work, DraftConfig(path=str(work / "eagle3"), family=family))
    loaded = models.load(config.model)
    got = given_draft(config, loaded)
    assert got is not None and got.spec.family == "eagle3"
    fresh = DraftHead.attach(loaded.model, got.spec, None, torch.Generator().manual_seed(9))
    assert all(torch.equal(p, fresh.state_dict()[name]) for name, p in got.state_dict().items())


def test_no_draft_from_a_folder(work: Path) -> None:
    loaded = models.load(ModelConfig(path=str(work / "model"), dtype="float32"))
    for draft in (DraftConfig(), DraftConfig(enabled=False, path=str(work / "eagle"))):
        assert given_draft(configured(work, draft), loaded) is None
    assert fresh_draft(configured(work, DraftConfig()), loaded, None).spec.family == "eagle"
    assert fresh_draft(configured(work, DraftConfig(family="eagle3")), loaded, None).spec.family == "eagle3"


@pytest.mark.parametrize(
    ("draft", "rollout", "message"),
    [
        (
            {"path": "eagle3", "family": "eagle"},
            {},
            'eagle3" holds a draft of family eagle3, and draft.family is "eagle"',
        ),
        ({"path": "none"}, {}, "none: there is no config.json"),
        (
            {"path": "reduced"},
            {"engine": "sglang", "verify": "rejection"},
            'reduced" holds a draft over a reduced vocabulary, with which SGLang has no rejection sampling',
        ),
    ],
)
def test_a_draft_that_does_not_fit(draft: dict[str, Any], rollout: dict[str, Any], message: str, work: Path) -> None:
    draft["path"] = str(work / draft["path"])
    config = configured(work, DraftConfig(**draft), **rollout)
    with pytest.raises(ValueError) as error:
        given_draft(config, models.load(config.model))
    assert message in str(error.value)


def test_a_reduced_draft_is_fine_elsewhere(work: Path) -> None:
    for rollout in ({"engine": "sglang"}, {"verify": "rejection"}):
        config = configured(work, DraftConfig(path=str(work / "reduced")), **rollout)
        got = given_draft(config, models.load(config.model))
        assert got is not None and got.vocab_ids is not None and len(got.vocab_ids) == 40
