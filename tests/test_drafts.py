"""Drafts attached, brought in, written out and shown, all in folders; whatever does not fit is refused by name."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_config, tiny_model, tiny_tokenizer
from miles_spec import checkpoint, models
from miles_spec.config import DataConfig, DraftConfig, ModelConfig, RunConfig
from miles_spec.draft.load import inspect, load
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, EAGLE3
from miles_spec.drafts import attach, describe, export, import_
from miles_spec.settings import dump
from miles_spec.train.torch_trainer import TorchTrainer

VOCABULARY = 262
"""Of the tiny tokenizer."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of four layers in a folder, in bfloat16."""
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("drafts") / "model", tiny_tokenizer()
    assert len(tokenizer) == VOCABULARY
    torch.manual_seed(3)
    config = tiny_config("llama", vocab_size=VOCABULARY, num_hidden_layers=4)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


# attach


@pytest.mark.parametrize("family", ["eagle", "eagle3"])
def test_attach(family: str, model: str, tmp_path: Path) -> None:
    found = attach(model, tmp_path / "draft", family=family)
    assert (found.family, found.format, found.hidden, found.draft_vocab) == (family, "sglang", 32, VOCABULARY)
    assert {tensor.dtype for tensor in weights(tmp_path / "draft").values()} == {torch.bfloat16}  # as the model is
    loaded = models.load(ModelConfig(path=model, dtype="float32"))
    read = load(tmp_path / "draft", loaded.model, tokenizer=loaded.tokenizer)
    spec = {"eagle": EAGLE, "eagle3": EAGLE3}[family]
    fresh = DraftHead.attach(loaded.model, spec, None, torch.Generator().manual_seed(0))
    for name, tensor in read.state_dict().items():
        assert tensor.equal(fresh.state_dict()[name].bfloat16().float()), name
    export(tmp_path / "draft", tmp_path / "copy", model=model)
    assert read.fresh and load(tmp_path / "copy", loaded.model).fresh


def test_the_seed_and_the_dtype(model: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        attach(model, tmp_path / name, seed=seed, dtype="float32")
    assert same(tmp_path / "a", tmp_path / "b")
    assert {tensor.dtype for tensor in weights(tmp_path / "a").values()} == {torch.float32}
    assert inspect(tmp_path / "a").family == "eagle"


ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": "aab", "response": "zz"}, {"prompt": "a"}],
    "texts": [{"text": "aaabzz"}],
    "messages": [{"messages": [{"role": "user", "content": "aab"}, {"role": "assistant", "content": "azz"}]}],
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_vocabulary_of_the_users_data(kind: str, model: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    found = attach(model, tmp_path / "draft", vocab_size=12, vocab_data=path)
    assert found.draft_vocab == 12
    loaded = models.load(ModelConfig(path=model, dtype="float32"))
    ids = load(tmp_path / "draft", loaded.model).vocab_ids
    assert ids is not None
    a, b, z = (loaded.tokenizer.encode(letter)[0] for letter in "abz")
    assert {a, b, z} <= set(ids.tolist())
    # the lowest ones beside
    assert ids.tolist()[:6] == [0, 1, 2, 3, 4, 5] and len(ids) == 12


def test_the_most_frequent_come_first(model: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    text = "zzzzyyyxxw"
    path.write_text(json.dumps({"text": text}) + "\n")
    attach(model, tmp_path / "draft", vocab_size=3, vocab_data=path)
    loaded = models.load(ModelConfig(path=model, dtype="float32"))
    ids = load(tmp_path / "draft", loaded.model).vocab_ids
    assert ids is not None
    wanted = [letter for letter, _ in Counter(text).most_common(3)]
    assert sorted(ids.tolist()) == sorted(loaded.tokenizer.encode(letter)[0] for letter in wanted)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "data.jsonl:2 has none of the fields messages, text and prompt, only question"),
        ({"text": 7}, "the text or response of data.jsonl:2 is not text but of type int"),
        ({"prompt": 7}, "prompt data.jsonl:2 is neither text nor a list of messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "the chat template refuses the messages of data.jsonl:2"),
    ],
)
def test_data_that_cannot_be_counted(row: dict[str, Any], message: str, model: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError) as error:
        attach(model, tmp_path / "draft", vocab_size=12, vocab_data=path)
    assert message in str(error.value)
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "eagle33"}, 'there is no draft family "eagle33"; did you mean "eagle3"?'),
        ({"family": "mimo"}, "mimo"),
        ({"vocab_size": 9}, "a reduced vocabulary needs --vocab-data"),
        ({"vocab_size": -9, "vocab_data": Path("x.jsonl")}, "a draft cannot have -9 tokens"),
        ({"vocab_data": Path("x.jsonl")}, "a reduced vocabulary needs --vocab-size"),
    ],
)
def test_attach_refuses(options: dict[str, Any], message: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        attach(model, tmp_path / "draft", **options)
    assert message in str(error.value)
    assert not (tmp_path / "draft").exists()


def test_nothing_that_is_there_is_replaced(model: str, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    attach(model, tmp_path / "draft")  # an empty folder holds nothing to lose
    before = weights(tmp_path / "draft")
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "draft", tmp_path / "file"):
        with pytest.raises(ValueError, match="is there already; remove it, or choose another folder"):
            attach(model, out, seed=1)
        with pytest.raises(ValueError, match="is there already"):
            import_(tmp_path / "draft", out, model=model)
    assert all(tensor.equal(before[name]) for name, tensor in weights(tmp_path / "draft").items())


# import and export


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_import_of_an_export_is_the_same_bit_for_bit(dtype: str, model: str, tmp_path: Path) -> None:
    attach(model, tmp_path / "one", family="eagle3", dtype=dtype)
    export(tmp_path / "one", tmp_path / "theirs", model=model, format="specforge")
    assert inspect(tmp_path / "theirs").format == "specforge"
    found = import_(tmp_path / "theirs", tmp_path / "two", model=model)
    assert found.format == "sglang" and same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("family", ["eagle", "eagle3"])
def test_speculators_and_back(family: str, model: str, tmp_path: Path) -> None:
    attach(model, tmp_path / "one", family=family)
    found = export(tmp_path / "one", tmp_path / "theirs", model=model, format="speculators")
    assert (found.family, found.format) == (family, "speculators")
    import_(tmp_path / "theirs", tmp_path / "two", model=model)
    assert same(tmp_path / "one", tmp_path / "two")


def test_export_refuses(model: str, tmp_path: Path) -> None:
    attach(model, tmp_path / "one")
    with pytest.raises(ValueError, match="--model is missing: name the model"):
        export(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match="SpecForge has drafts of the family eagle3, not eagle"):
        export(tmp_path / "one", tmp_path / "two", model=model, format="specforge")
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        export(tmp_path / "none", tmp_path / "two", model=model)
    assert not (tmp_path / "two").exists()


@pytest.fixture
def run(model: str, tmp_path: Path) -> Path:
    """The directory of a run whose draft has been trained: its weights are not those of a fresh one."""
    out = tmp_path / "run"
    config = RunConfig(
        out=str(out), model=ModelConfig(path=model, dtype="float32"), data=DataConfig(source="tasks.jsonl"),
        draft=DraftConfig(family="eagle3"),
    )  # fmt: skip
    loaded = models.load(config.model)
    draft = DraftHead.attach(loaded.model, EAGLE3, torch.arange(0, VOCABULARY, 2), torch.Generator().manual_seed(0))
    trainer = TorchTrainer(loaded.model, draft, config, "cpu")
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint.save(out, 3, trainer.state_tensors(), {"trainer": trainer.state_values()}, keep=1)
    (out / "config.toml").write_text(dump(config))
    return out


def test_export_of_a_run(run: Path, model: str, tmp_path: Path) -> None:
    found = export(run, tmp_path / "draft", dtype="float32")
    assert (found.family, found.draft_vocab) == ("eagle3", VOCABULARY // 2)
    saved = checkpoint.load_latest(run)
    assert saved is not None
    loaded = models.load(ModelConfig(path=model, dtype="float32"))
    for name, tensor in load(tmp_path / "draft", loaded.model, tokenizer=loaded.tokenizer).state_dict().items():
        assert tensor.equal(saved.tensors[f"draft.{name}"]), name
    assert not load(tmp_path / "draft", loaded.model).fresh
    export(run, tmp_path / "served")
    assert weights(tmp_path / "served")["fc.weight"].dtype == torch.bfloat16  # the model's


def test_export_of_a_run_of_another_model(run: Path, tmp_path: Path) -> None:
    other = tiny_model("qwen3", layers=4)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained another model than .*other: their tensors differ"):
        export(run, tmp_path / "draft", model=str(tmp_path / "other"))
    assert not (tmp_path / "draft").exists()


def test_export_of_a_run_that_has_none(run: Path, model: str, tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(path=model), data=DataConfig(source="tasks.jsonl"))
    (run / "config.toml").write_text(dump(replace(config, draft=DraftConfig(enabled=False))))
    with pytest.raises(ValueError, match=r"has no draft: draft\.enabled is false"):
        export(run, tmp_path / "draft")
    (run / "config.toml").write_text(dump(config))  # of family eagle, whose tensors are others
    with pytest.raises(ValueError, match=r"step_000003 has no tensor 'draft\.\S+' of shape"):
        export(run, tmp_path / "draft")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text(dump(config))
    with pytest.raises(ValueError, match="has no checkpoint to take a draft from"):
        export(tmp_path / "other", tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


# inspect


def test_a_layer_for_each_depth(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("qwen2", vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    text = describe(attach(path, tmp_path / "draft", family="mimo", layers=3))
    assert "layers      3, one for each depth, the last for all deeper ones\n" in text
    assert "SGLang      serves no such draft with several layers; the embedded engine does\n" in text
    assert "model.mtp_layers.2.input_proj.weight" in text
    assert describe(import_(tmp_path / "draft", tmp_path / "again", model=path)).count("\n") == text.count("\n")
    assert same(tmp_path / "draft", tmp_path / "again")
    with pytest.raises(ValueError, match="family 'eagle' has one layer, not 3"):
        attach(path, tmp_path / "other", layers=3)


def test_describe(model: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    options: dict[str, Any] = {"vocab_size": 40, "vocab_data": tmp_path / "data.jsonl"}
    text = describe(attach(model, tmp_path / "draft", family="eagle3", **options))
    count = sum(tensor.numel() for tensor in weights(tmp_path / "draft").values() if tensor.is_floating_point())
    for said in (
        "family      eagle3",
        "sglang (LlamaForCausalLMEagle3)",
        "hidden 32, intermediate 48, 4 heads of 8, 2 of keys and values",
        "262, drafts over 40",
        "layers 0, 1, 2 of the target",
        "shares      the target's embedding\n",
        f"{count:,} in ",
        "BF16",
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {tmp_path / 'draft'}",
        "BF16 [32, 96]",
    ):
        assert said in text


def test_experts_share_a_line(model: str, tmp_path: Path) -> None:
    found = attach(model, tmp_path / "draft")
    experts = {f"layers.0.mlp.experts.{i}.up_proj.weight": ("BF16", (8, 4)) for i in range(3)}
    assert "layers.0.mlp.experts.*.up_proj.weight  BF16 [8, 4] x 3" in describe(replace(found, tensors=experts))
