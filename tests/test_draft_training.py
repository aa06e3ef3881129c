"""Offline training: what it improves, that it resumes bit for bit, that it never sees what is held out."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from conftest import state_of, tiny_config, tiny_model, tiny_tokenizer
from miles_spec import checkpoint, draft_training, models
from miles_spec.config import RunConfig
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.draft_data import given, split
from miles_spec.draft_training import Training, train
from miles_spec.drafts import attach, export
from miles_spec.first_draft import fresh_draft, given_draft
from miles_spec.train.packing import pack
from miles_spec.train.torch_trainer import TorchTrainer
from miles_spec.types import LossTerms, PackedBatch, Sample

WORDS = ("alpha", "gamma", "delta", "omega")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, whose next token depends on the last for the most part, and `answers.jsonl`."""
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("offline"), tiny_tokenizer()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=len(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
        embed = model.model.embed_tokens.weight.mul_(4)
        model.lm_head.weight.copy_(0.7 * embed[torch.randperm(len(embed))])
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.5)
            layer.mlp.down_proj.weight.mul_(0.5)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}", "response": " ".join(WORDS[(i + j) % 4] for j in range(3))} for i in range(20)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def configure(work: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`configure(section__key=value, ...)`: 20 responses of the file, 4 of them held out, 6 steps."""

    def make(**overrides: Any) -> RunConfig:
        settings: dict[str, Any] = dict(
            out=str(tmp_path / "out"), seed=5, model__path=str(work / "model"), model__dtype="float32",
            data__source=str(work / "answers.jsonl"), data__max_prompt_tokens=24, rollout__max_new_tokens=24,
            rollout__max_running=8, draft__lr=0.01, draft__num_steps=2, draft__ramp_steps=4, train__token_budget=128,
            offline__response_column="response", offline__held_out=0.2, offline__batch=4, offline__steps=6,
        )  # fmt: skip
        config = RunConfig()
        for name, value in {**settings, **overrides}.items():
            section, _, key = name.rpartition("__")
            if section:
                config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
            else:
                config = replace(config, **{key: value})
        return config

    return make


Configure = Callable[..., RunConfig]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def quiet() -> Console:
    return Console(quiet=True)


def training(config: RunConfig) -> Training:
    loaded = models.load(config.model)
    return Training(config, loaded, given_draft(config, loaded), given(config, loaded), None)


def final(out: Path) -> dict[str, Tensor]:
    saved = checkpoint.load_latest(out)
    assert saved is not None
    return saved.tensors


# What comes of it


def test_the_accept_length_rises_on_what_is_held_out(configure: Configure) -> None:
    """The responses are four cycles of words, which the draft can learn by heart, for prompts that it has not seen."""
    config = configure(offline__steps=60, draft__loss="ce")
    out = train(config, quiet())
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["responses"], summary["responses_held_out"]) == (60, 16, 4)
    assert summary["accept_length_before"] < 1.5 and 2.5 < summary["accept_length_after"] <= 3
    assert [line["step"] for line in lines(out)] == list(range(1, 61))
    losses = [line["draft_loss"] for line in lines(out)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_on_responses_of_the_model_itself(configure: Configure) -> None:
    config = configure(
        offline__response_column="", offline__steps=20, draft__lr=0.003, offline__samples_per_prompt=2,
        rollout__temperature=0.7,
    )  # fmt: skip
    out = train(config, quiet())
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["responses"], summary["responses_held_out"]) == (32, 8)
    assert summary["rule"] == "target" and summary["temperature"] == 0.7
    assert summary["accept_length_after"] > summary["accept_length_before"]
    assert len((out / "responses.jsonl").read_text().splitlines()) == 1 + 40
    assert not any(name.startswith("policy") for name in final(out))


def test_the_draft_that_it_writes_starts_the_next_run(configure: Configure, tmp_path: Path) -> None:
    config = configure(draft__vocab_size=64)
    out = train(config, quiet())
    summary = json.loads((out / "summary.json").read_text())
    trained = {name: t for name, t in final(out).items() if name.startswith("draft.")}
    again = training(configure(draft__path=str(out / "draft"), out=str(tmp_path / "again")))
    assert again.trainer.draft is not None
    for name, tensor in again.trainer.draft.draft.state_dict().items():
        assert torch.equal(tensor, trained[f"draft.{name}"]), name
    assert again.before.accept_length == pytest.approx(summary["accept_length_after"], rel=1e-6)
    assert len(trained["draft.vocab_ids"]) == 64


EXPERTS = {
    "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family", "layers"),
    [
        ("qwen3", "eagle3", 1),
        ("qwen2", "mimo", 1),
        ("qwen2", "mimo", 2),
        ("qwen3_moe", "qwen_mtp", 1),
        ("glm4_moe", "nextn", 1),
    ],
)
def test_every_family_is_trained_from_its_folder(
    kind: str, family: str, layers: int, configure: Configure, tmp_path: Path, work: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 4, **(EXPERTS if "moe" in kind else {})}
    AutoModelForCausalLM.from_config(tiny_config(kind, **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    attach(str(tmp_path / "model"), tmp_path / "draft", family=family, layers=layers)
    config = configure(
        model__path=str(tmp_path / "model"),
        draft__path=str(tmp_path / "draft"),
        draft__loss="ce",
        draft__lr_warmup_steps=0,
        offline__steps=12,
    )
    out = train(config, quiet())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["family"] == family and summary["accept_length_after"] > summary["accept_length_before"] + 0.1
    export(out, tmp_path / "exported", dtype="float32")
    written, exported = (load_file(folder / "model.safetensors") for folder in (out / "draft", tmp_path / "exported"))
    assert written.keys() == exported.keys() and all(torch.equal(written[n], exported[n]) for n in written)
    before = load_file(tmp_path / "draft" / "model.safetensors")
    still = {name for name in written if torch.equal(written[name], before[name].float())}
    assert still == {name for name in written if "e_score_correction_bias" in name}  # which no gradient moves


def test_the_vocabulary_is_counted_on_what_is_trained_on(work: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(draft__vocab_size=16)
    loaded = models.load(config.model)
    held_out = split(given(config, loaded), 0.2, config.seed)[1]
    rare = next(t for t in range(200, 255) if all(t not in s.completion.tokens for s in held_out))
    rows = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    for sample in held_out:
        rows[int(sample.prompt.id.rpartition(":")[2]) - 1]["response"] = loaded.tokenizer.decode([rare]) * 12
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = training(replace(config, data=replace(config.data, source=str(tmp_path / "answers.jsonl"))))
    assert made.trainer.draft is not None and made.trainer.draft.draft.vocab_ids is not None
    assert rare not in made.trainer.draft.draft.vocab_ids.tolist()


def segments(batch: PackedBatch) -> list[tuple[int, ...]]:
    return [tuple(batch.tokens[a:b].tolist()) for a, b in pairwise(batch.layout.offsets)]


def test_what_is_held_out_is_never_trained_on(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    made = training(configure(offline__steps=0, offline__epochs=3))
    seen: list[tuple[int, ...]] = []
    step = made.trainer.train_draft

    def watched(batches: Any, **options: Any) -> LossTerms:
        for batch in batches:
            seen.extend(segments(batch))
        return step(batches, **options)

    monkeypatch.setattr(made.trainer, "train_draft", watched)
    assert made.run(lambda: False, quiet())
    held_out = {text for batch in made._held_out for text in segments(batch)}
    assert len(held_out) == 4 and not held_out & set(seen)
    # three passes over sixteen, each in an order of its own
    assert made.steps == 12 and all(seen.count(text) == 3 for text in seen)
    passes = [seen[:16], seen[16:32], seen[32:]]
    assert all(len(set(one)) == 16 for one in passes) and passes[0] != passes[1]


def test_the_learning_rate_falls_linearly(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    made = training(configure(offline__steps=4))
    rates: list[float] = []
    step = made.trainer.train_draft

    def watched(batches: Any, *, lr_scale: float) -> LossTerms:
        rates.append(lr_scale)
        return step(batches, lr_scale=lr_scale)

    monkeypatch.setattr(made.trainer, "train_draft", watched)
    made.run(lambda: False, quiet())
    assert rates == [1, 0.75, 0.5, 0.25]


# Resuming


def strip(out: Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    return [{k: v for k, v in line.items() if k != "time_s" and not k.startswith("seconds")} for line in lines(out)]


def test_interrupted_and_resumed_it_is_the_same_bit_for_bit(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(configure(out=str(tmp_path / "whole")), quiet())
    config = configure(out=str(tmp_path / "parts"))
    step, calls = TorchTrainer.train_draft, 0

    def interrupted(self: TorchTrainer, *arguments: Any, **options: Any) -> LossTerms:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C: the step at hand ends
        return step(self, *arguments, **options)

    monkeypatch.setattr(TorchTrainer, "train_draft", interrupted)
    parts = train(config, quiet())
    assert checkpoint.steps(parts) == [3] and not (parts / "summary.json").exists()
    train(config, quiet())
    assert calls == 6
    assert strip(parts) == strip(whole)
    expected, got = final(whole), final(parts)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (whole, parts)]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}
    folders = [load_file(out / "draft" / "model.safetensors") for out in (whole, parts)]
    assert all(torch.equal(folders[0][name], folders[1][name]) for name in folders[0] | folders[1])


def test_a_failing_step_loses_nothing_before_it(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = TorchTrainer.train_draft, 0

    def failing(self: TorchTrainer, *arguments: Any, **options: Any) -> LossTerms:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory")
        return step(self, *arguments, **options)

    monkeypatch.setattr(TorchTrainer, "train_draft", failing)
    config = configure()
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config, quiet())
    assert checkpoint.steps(Path(config.out)) == [3]


def test_a_finished_training_is_not_repeated(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    out = train(config, quiet())
    before = (out / "summary.json").read_text()
    monkeypatch.setattr(TorchTrainer, "train_draft", None)
    train(config, quiet())
    assert (out / "summary.json").read_text() == before


def test_a_finished_training_can_be_measured_by_another_rule(configure: Configure) -> None:
    out = train(configure(), quiet())
    by_target = json.loads((out / "summary.json").read_text())
    train(configure(rollout__verify="rejection"), quiet())
    by_rejection = json.loads((out / "summary.json").read_text())
    assert (by_target["rule"], by_rejection["rule"]) == ("target", "rejection")
    for when in ("before", "after"):
        assert by_rejection[f"accept_length_{when}"] != by_target[f"accept_length_{when}"]


def test_other_data_is_refused(configure: Configure, tmp_path: Path, work: Path) -> None:
    train(configure(), quiet())
    changed = tmp_path / "answers.jsonl"
    changed.write_text((work / "answers.jsonl").read_text().replace("alpha", "Alpha", 1))
    for config in (configure(data__source=str(changed)), configure(offline__held_out=0.4)):
        with pytest.raises(ValueError, match="the data has changed since the checkpoint"):
            train(config, quiet())


# Refusals


def test_an_interrupt_while_sampling_trains_nothing(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_training, "sampled", lambda *_: None)
    config = configure(offline__response_column="")
    assert train(config, quiet()) == Path(config.out)
    assert not (Path(config.out) / "metrics.jsonl").exists()


@pytest.mark.parametrize("which", ["enabled", "train"])
def test_a_draft_that_is_not_to_be_trained(which: str, configure: Configure) -> None:
    with pytest.raises(ValueError, match=f"draft train trains a draft, and draft.{which} is false"):
        train(configure(**{f"draft__{which}": False}), quiet())


def test_a_directory_of_another_kind_of_run(configure: Configure) -> None:
    config = configure()
    checkpoint.save(Path(config.out), 1, [], {"source": {}}, keep=1)
    with pytest.raises(ValueError, match="holds checkpoints of `miles-spec train`; choose another"):
        train(config, quiet())


def test_responses_too_short_to_measure_on(configure: Configure) -> None:
    with pytest.raises(ValueError, match="none of the responses held out has two tokens"):
        train(configure(rollout__max_new_tokens=1), quiet())


def test_a_draft_that_nothing_would_serve_is_refused_before_it_is_trained(configure: Configure) -> None:
    config = configure(draft__family="mimo")
    with pytest.raises(ValueError, match="mimo"):
        train(config, quiet())
    assert not Path(config.out).exists()


# The trainer that only teaches


def batches(config: RunConfig) -> Any:
    return packs([lesson.sample for lesson in given(config, models.load(config.model))])


def packs(samples: Sequence[Sample]) -> Any:
    (made,) = pack(
        samples, [0.0] * len(samples), token_budget=128, aggregation="token", max_new_tokens=24, minibatches=1,
        device="cpu",
    )  # fmt: skip
    return made


@pytest.mark.parametrize(("count", "attached"), [(1, False), (3, False), (3, True), (16, False)])
def test_a_fresh_draft_starts_from_least_squares_over_the_first_responses(
    count: int, attached: bool, configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure()
    if attached:
        attach(config.model.path, tmp_path / "attached", seed=config.seed, dtype="float32")
        config = configure(draft__path=str(tmp_path / "attached"))
    loaded = models.load(config.model)
    first = split(given(config, loaded), config.offline.held_out, config.seed)[0][:count]
    tokens = sum(len(s.prompt.tokens) + len(s.completion.tokens) for s in first)
    monkeypatch.setattr(draft_training, "FIT_TOKENS", tokens / 32 if count > 1 else 0)  # never none
    made = training(config).trainer.draft
    assert made is not None
    draft = fresh_draft(config, loaded, None)
    before = draft.fc.weight.detach().clone()
    TorchTrainer(loaded.model, draft, config, "cpu", policy=False).fit_draft(packs(first))
    assert not torch.equal(draft.fc.weight, before)
    for (name, got), expected in zip(made.draft.named_parameters(), draft.parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_the_same_steps_as_in_the_loop(configure: Configure) -> None:
    """A step on the draft alone changes it as the loop's own step does, whose policy stands still."""
    config = configure(train__lr=0.0)
    packed = batches(config)
    got = []
    for policy in (True, False):
        loaded = models.load(config.model)
        draft = DraftHead.attach(loaded.model, EAGLE, None, torch.Generator().manual_seed(1))
        trainer = TorchTrainer(loaded.model, draft, config, "cpu", policy=policy)
        terms = trainer.step(packed) if policy else trainer.train_draft(packed)
        got.append((terms, {n: p.detach().clone() for n, p in draft.named_parameters()}))
    (in_loop, expected), (alone, weights) = got
    assert alone.draft == in_loop.draft and alone.draft_by_depth == in_loop.draft_by_depth
    assert alone.acceptance == in_loop.acceptance
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_an_estimate_changes_nothing(configure: Configure) -> None:
    made = training(configure())
    assert made.trainer.draft is not None
    before = {n: p.detach().clone() for n, p in made.trainer.draft.draft.named_parameters()}
    estimate = made.estimate()
    assert made.estimate() == estimate
    assert all(torch.equal(p, before[n]) for n, p in made.trainer.draft.draft.named_parameters())
    assert made.trainer.draft.version == 0


def test_a_teacher_has_no_optimizer_and_no_gradient() -> None:
    trainer = TorchTrainer(tiny_model(), None, RunConfig(), "cpu", policy=False)
    assert trainer.optimizer is None and not any(p.requires_grad for p in trainer.model.parameters())
    assert [name for name in state_of(trainer)[0] if not name.startswith("random")] == []
    with pytest.raises(AssertionError, match="trains no policy"):
        trainer.step([])
    with pytest.raises(ValueError, match="there is no draft to train"):
        trainer.train_draft([])
