"""What a draft learns from: responses read and sampled, each error with its line, and what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from conftest import tiny_config, tiny_tokenizer
from miles_spec.config import DataConfig, ModelConfig, OfflineConfig, RolloutConfig, RunConfig
from miles_spec.draft_data import Lesson, _sample, given, sampled, split
from miles_spec.models import Loaded
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.types import Prompt, Sample


def loaded() -> Loaded:
    from transformers import AutoModelForCausalLM

    from miles_spec.kernels.attention import NAME

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = tiny_config("llama", vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    return Loaded(
        model=model, tokenizer=tokenizer, dtype=torch.float32, device=torch.device("cpu"), eos_ids=(0, 2)
    )  # fmt: skip


def configured(source: Path, response_column: str = "response", **settings: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="tiny"),
        data=DataConfig(source=str(source), max_prompt_tokens=settings.pop("max_prompt_tokens", 40), **settings),
        rollout=RolloutConfig(max_new_tokens=12),
        offline=OfflineConfig(response_column=response_column, samples_per_prompt=2),
    )


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def text(tokens: tuple[int, ...]) -> str:
    return tiny_tokenizer().decode(list(tokens))


# Given responses


def test_a_response_follows_its_prompt_and_ends_with_the_turn(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "one", "response": "two"}, {"prompt": "a", "response": "b" * 30})
    first, second = given(configured(path), loaded())
    assert text(first.sample.prompt.tokens) == "<|user|>one</s><|assistant|>"
    assert text(first.sample.completion.tokens) == "two</s>"  # of both tokens that end a text, the turn's
    assert first.group == first.sample.prompt.tokens
    assert text(second.sample.completion.tokens) == "b" * 12  # cut at max_new_tokens
    assert len(first.sample.completion.logprobs) == len(first.sample.completion.tokens)


def test_the_turns_end_is_what_the_template_puts_last(tmp_path: Path) -> None:
    made = loaded()
    made.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ('</s>' if m['role'] == 'assistant' else '<pad>') }}{% endfor %}"
    )
    (lesson,) = given(configured(jsonl(tmp_path, {"prompt": "one", "response": "two"})), made)
    assert (text(lesson.sample.prompt.tokens), text(lesson.sample.completion.tokens)) == ("one<pad>", "two</s>")


def test_without_a_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "one", "response": "two"})
    (lesson,) = given(configured(path, chat_template=False), loaded())
    assert (text(lesson.sample.prompt.tokens), text(lesson.sample.completion.tokens)) == ("one", "two<pad>")


def test_every_answer_of_a_conversation_is_one(tmp_path: Path) -> None:
    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = jsonl(tmp_path, {"messages": [{"role": role, "content": content} for role, content in talk]})
    first, second = given(configured(path, "messages"), loaded())
    assert text(first.sample.prompt.tokens) == "<|system|>s</s><|user|>a</s><|assistant|>"
    assert (
        text(second.sample.prompt.tokens) == "<|system|>s</s><|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>"
    )
    assert [text(x.sample.completion.tokens) for x in (first, second)] == ["b</s>", "d</s>"]
    assert first.group == second.group == first.sample.prompt.tokens


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["one"], "response": ["two"]}), tmp_path / "answers.parquet")
    (lesson,) = given(configured(tmp_path / "answers.parquet"), loaded())
    assert text(lesson.sample.completion.tokens) == "two</s>"


def test_the_first_prompts_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"prompt": str(i), "response": "x"} for i in range(5)))
    config = replace(configured(path), offline=OfflineConfig(response_column="response", prompts=2))
    assert [lesson.sample.prompt.id for lesson in given(config, loaded())] == ["answers.jsonl:1", "answers.jsonl:2"]


ASSISTANT = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, 'offline.response_column = "response": the record of prompt answers.jsonl:3'),
        ({"prompts": "p", "response": "r"}, 'data.prompt_column = "prompt": the record of prompt answers.jsonl:3'),
        ({"prompt": "p", "response": ""}, "the response of answers.jsonl:3 is empty"),
        ({"prompt": "p", "response": 7}, "the response of answers.jsonl:3 is neither text nor a list of messages"),
        ({"prompt": 7, "response": "r"}, "prompt answers.jsonl:3 is neither text nor a list of messages"),
        ({"prompt": "p" * 40, "response": "r"}, "prompt answers.jsonl:3 has 43 tokens, more than data.max_p"),
        ({"response": [{"role": "user"}]}, 'answers.jsonl:3: each message must be a dict with "role" and "content"'),
        ({"response": [{"role": "user", "content": "u"}]}, "the conversation of answers.jsonl:3 has no assistant's"),
        ({"response": [ASSISTANT]}, "the conversation of answers.jsonl:3 begins with an assistant's message"),
        ({"response": [{"role": "tool", "content": "t"}, ASSISTANT]}, "chat template refuses prompt answers.jsonl:3"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "p", "response": "r"}, row)
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # a blank line is no record, and counts as a line
    with pytest.raises(ValueError) as error:
        given(configured(path), loaded())
    assert message in str(error.value)


def test_overlong_prompts_can_be_dropped(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "p" * 40, "response": "r"}, {"prompt": "p", "response": "r"})
    (lesson,) = given(configured(path, overlong="drop"), loaded())
    assert lesson.sample.prompt.id == "answers.jsonl:2"
    with pytest.raises(ValueError, match=r"every prompt has more than data\.max_prompt_tokens = 2 tokens"):
        given(configured(path, overlong="drop", max_prompt_tokens=2), loaded())


# What is held out


def lesson(group: tuple[int, ...], index: int) -> Lesson:
    return Lesson(group=group, sample=_sample(Prompt(id="", tokens=group, text=""), index, (5, 6)))


groups = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=30)


@hypothesis.given(groups, st.floats(0.01, 0.9), st.integers(0, 3))
def test_no_prompt_is_on_both_sides(made: list[tuple[int, ...]], share: float, seed: int) -> None:
    lessons = [lesson(group, i) for i, group in enumerate(made)]
    if len(set(made)) == 1:
        with pytest.raises(ValueError, match="one prompt alone"):
            split(lessons, share, seed)
        return
    taught, held_out = split(lessons, share, seed)

    def prompts(samples: list[Sample]) -> set[tuple[int, ...]]:
        return {sample.prompt.tokens for sample in samples}

    assert taught and held_out and not prompts(taught) & prompts(held_out)
    assert sorted(s.index for s in taught + held_out) == list(range(len(made)))
    count = len(set(made))
    assert len(prompts(held_out)) == min(count - 1, max(1, round(share * count)))
    # neither the order of the data nor more of the same prompts changes the choice
    assert prompts(split(lessons[::-1] + lessons, share, seed)[1]) == prompts(held_out)


def test_the_seed_chooses_what_is_held_out() -> None:
    lessons = [lesson((i,), i) for i in range(40)]
    chosen = {tuple(s.index for s in split(lessons, 0.1, seed)[1]) for seed in range(5)}
    assert len(chosen) > 1


# Sampled responses


@pytest.fixture
def prompts(tmp_path: Path) -> RunConfig:
    return configured(jsonl(tmp_path, *({"prompt": f"say {i}"} for i in range(4))), "")


class Engines:
    """Makes engines of the tiny model, and counts what they are asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.model = loaded().model

    @contextmanager
    def __call__(self) -> Iterator[EmbeddedEngine]:
        engine = EmbeddedEngine(self.model, None, tokenizer=tiny_tokenizer(), eos_ids=(2,), max_running=3)
        generate = engine.generate

        def counted(requests: Any, on_done: Any = None) -> Any:
            self.asked.append(len(requests))
            return generate(requests, on_done)

        engine.generate = counted  # type: ignore[method-assign]
        yield engine


def never(done: int, total: int) -> bool:
    return False


def after(count: int) -> Callable[[int, int], bool]:
    return lambda done, total: done >= count


def test_each_prompt_is_sampled_and_nothing_twice(prompts: RunConfig, tmp_path: Path) -> None:
    engines, path = Engines(), tmp_path / "out" / "responses.jsonl"
    lessons = sampled(prompts, loaded(), path, engines, never)
    assert lessons is not None
    assert [text(x.sample.prompt.tokens).strip() for x in lessons[::2]] == [
        f"<|user|>say {i}</s><|assistant|>" for i in range(4)
    ]
    assert [x.sample.index for x in lessons] == [0, 1] * 4
    assert len({x.sample.completion.tokens for x in lessons}) > 4  # each with a seed of its own
    assert sampled(prompts, loaded(), path, engines, never) == lessons
    assert engines.asked == [8]


def test_it_goes_on_where_it_was_interrupted(prompts: RunConfig, tmp_path: Path) -> None:
    engines, path = Engines(), tmp_path / "responses.jsonl"
    whole = sampled(prompts, loaded(), tmp_path / "whole.jsonl", engines, never)
    assert sampled(prompts, loaded(), path, engines, after(3)) is None
    kept = len(path.read_text().splitlines()) - 1
    assert 3 <= kept < 8
    with path.open("a") as file:
        file.write('{"id": "3.1", "tok')  # a crash cuts the last line off
    assert sampled(prompts, loaded(), path, engines, never) == whole
    assert engines.asked == [8, 8, 8 - kept]


def test_responses_of_other_settings_are_refused(prompts: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    sampled(prompts, loaded(), path, Engines(), never)
    hotter = replace(prompts, rollout=replace(prompts.rollout, temperature=0.5))
    with pytest.raises(ValueError, match=r"responses\.jsonl holds responses to other prompts, or of another model"):
        sampled(hotter, loaded(), path, Engines(), never)
    path.write_text('{"of": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"other prompts"):
        sampled(prompts, loaded(), path, Engines(), never)


def test_a_damaged_line_is_named(prompts: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    sampled(prompts, loaded(), path, Engines(), never)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "nonsense", *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=r"responses\.jsonl, line 3 is not a line of this project's"):
        sampled(prompts, loaded(), path, Engines(), never)


def test_a_source_of_unknown_length_needs_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless_source.py").write_text(
        "from miles_spec.types import Prompt\n"
        "class Source:\n"
        "    def __init__(self, tokenizer): self.made = 0\n"
        "    def take(self, n):\n"
        "        return [Prompt(id=str(i), tokens=(7 + i,), text='') for i in range(n)]\n"
        "    def state(self): return {}\n"
        "    def load_state(self, state): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = configured(Path("endless_source:Source"), "")
    with pytest.raises(ValueError, match=r"offline\.prompts is 0"):
        sampled(config, loaded(), tmp_path / "responses.jsonl", Engines(), never)
    config = replace(config, offline=OfflineConfig(prompts=2, samples_per_prompt=2))
    got = sampled(config, loaded(), tmp_path / "responses.jsonl", Engines(), never)
    assert got is not None and [x.sample.prompt.tokens for x in got] == [(7,), (7,), (8,), (8,)]
