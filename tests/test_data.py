"""Sources, prompts and the buffer: each source read for real, each error sentence, resume against an unbroken run."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_tokenizer
from miles_spec.config import DataConfig
from miles_spec.data import DataBuffer, build_prompts, make_source
from miles_spec.types import Prompt

ROWS = [{"prompt": "one plus one?", "answer": "2"}, {"prompt": "two plus two?", "answer": "4"}]


def jsonl(folder: Path, rows: list[Any] = ROWS) -> str:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def build(source: str, **settings: Any) -> list[Prompt]:
    return build_prompts(DataConfig(source=source, **settings), tiny_tokenizer(), seed=5)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file `data_plugin.py` in the current directory, to be written by the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "data_plugin.py"
    sys.modules.pop("data_plugin", None)


# Sources


def check_rows(prompts: list[Prompt], name: str) -> None:
    assert [p.id for p in prompts] == [f"{name}-0", f"{name}-1"]
    assert [p.answer for p in prompts] == ["2", "4"]
    assert [p.metadata["prompt"] for p in prompts] == [r["prompt"] for r in ROWS]
    assert all(r["prompt"] in p.text for r, p in zip(ROWS, prompts, strict=True))


def test_jsonl(tmp_path: Path) -> None:
    source = jsonl(tmp_path)
    Path(source).write_text(Path(source).read_text().replace("\n", "\n\n"))  # blank lines are no records
    check_rows(build(source), "tasks")


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "tasks.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    check_rows(build(str(path)), "tasks")


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "tasks.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"tasks\.parquet cannot be read as parquet: "):
        build(str(path))


@pytest.mark.parametrize("library", ["pyarrow", "datasets", "reasoning_gym"])
def test_missing_library(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"")
    source = {"pyarrow": str(tmp_path / "t.parquet"), "datasets": "datasets:x", "reasoning_gym": "reasoning_gym:x"}
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=r"needs the package .* pip install 'miles-spec\[tasks\]'"):
        build(source[library])


def test_datasets_saved_folder_and_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    flat = datasets.Dataset.from_list(ROWS)
    flat.save_to_disk(str(tmp_path / "flat"))
    check_rows(build(f"datasets:{tmp_path}/flat"), "flat")
    datasets.DatasetDict(train=flat, test=flat.select([1])).save_to_disk(str(tmp_path / "split"))
    check_rows(build(f"datasets:{tmp_path}/split"), "split")
    assert [p.answer for p in build(f"datasets:{tmp_path}/split", split="test")] == ["4"]
    with pytest.raises(ValueError, match=r'has no split "dev" \(data\.split\); it has train, test'):
        build(f"datasets:{tmp_path}/split", split="dev")
    with pytest.raises(ValueError, match=r"saved folder, for which data\.options has no meaning"):
        build(f"datasets:{tmp_path}/split", options={"name": "main"})


def test_datasets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "named"
    folder.mkdir()
    jsonl(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    check_rows(build(f"datasets:{folder}", options={"cache_dir": str(tmp_path / "cache")}), "named")
    with pytest.raises(ValueError, match=r'data\.source = "datasets:.*/absent" cannot be loaded: '):
        build(f"datasets:{tmp_path}/absent")


def test_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym")
    options = {"max_terms": 3}
    prompts = build("reasoning_gym:chain_sum", size=4, options=options)
    entries = list(gym.create_dataset("chain_sum", size=4, seed=5, max_terms=3))
    assert [p.answer for p in prompts] == [e["answer"] for e in entries]
    assert all(e["question"] in p.text for e, p in zip(entries, prompts, strict=True))
    assert prompts[3].id == "chain_sum-3"
    assert prompts[3].metadata == {**entries[3], "task": "chain_sum", "options": options}
    other = build_prompts(DataConfig(source="reasoning_gym:chain_sum", size=4), tiny_tokenizer(), seed=6)
    assert [p.answer for p in other] != [p.answer for p in prompts]


@pytest.mark.parametrize(
    ("task", "settings", "sentence"),
    [
        ("chain_sun", {}, r'there is no such task; did you mean "chain_sum"\?'),
        (
            "chain_sum",
            {"options": {"max_term": 3}},
            r"refuses data\.options = .*unexpected keyword argument 'max_term'",
        ),
        ("chain_sum", {"options": {"min_terms": -1}}, r"refuses data\.options = .*min_terms must be positive"),
        ("chain_sum", {"options": {"seed": 1}}, r"set data\.size and the run's seed instead of seed in"),
        ("chain_sum", {"size": 0}, r"data\.size must be at least 1, not 0"),
    ],
)
def test_reasoning_gym_errors(task: str, settings: dict[str, Any], sentence: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=sentence):
        build(f"reasoning_gym:{task}", **settings)


def test_function(plugin: Path) -> None:
    plugin.write_text(
        "def rows(n):\n    for i in range(n):\n        yield {'prompt': f'number {i}', 'answer': i}\n"
        "def bad(): return ['text']\n"
        "def broken(): raise KeyError('no')\n"
    )
    assert [p.answer for p in build("data_plugin:rows", options={"n": 3})] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"rows\(n\) cannot be called as rows\(\): missing a required argument: 'n'"):
        build("data_plugin:rows")
    with pytest.raises(ValueError, match="record 0 is not a dict but of type str"):
        build("data_plugin:bad")
    with pytest.raises(ValueError, match=r'"data_plugin:broken" raised KeyError: .no.'):
        build("data_plugin:broken")


def test_custom_class(plugin: Path) -> None:
    plugin.write_text(
        "class Source:\n"
        "    def __init__(self, tokenizer, start=0): self.at, self.tokenizer = start, tokenizer\n"
        "    def take(self, n): self.at += n; return [self.at] * n\n"
        "    def state(self): return {'at': self.at}\n"
        "    def load_state(self, state): self.at = state['at']\n"
        "class Stateless:\n"
        "    def take(self, n): return []\n"
        "class Broken(Source):\n"
        "    def __init__(self, tokenizer): raise OSError('disk')\n"
    )
    tokenizer = tiny_tokenizer()
    source: Any = make_source(DataConfig(source="data_plugin:Source", options={"start": 7}), tokenizer, 0)
    assert type(source).__name__ == "Source" and source.tokenizer is tokenizer
    assert source.take(2) == [9, 9]
    with pytest.raises(ValueError, match=r"cannot be called as Source\(tokenizer, begin\)"):
        make_source(DataConfig(source="data_plugin:Source", options={"begin": 7}), tokenizer, 0)
    with pytest.raises(ValueError, match=r"has take\(\) but not state and load_state\(\)"):
        make_source(DataConfig(source="data_plugin:Stateless"), tokenizer, 0)
    with pytest.raises(ValueError, match=r'"data_plugin:Broken" raised OSError: disk'):
        make_source(DataConfig(source="data_plugin:Broken"), tokenizer, 0)


@pytest.mark.parametrize("source", ["", "tasks.csv", "datasets:", "reasoning_gym:"])
def test_unknown_source(source: str) -> None:
    with pytest.raises(ValueError, match=rf'data\.source = "{source}" is none of: '):
        build(source)


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*/absent\.jsonl"):
        build(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match=r"the data set is empty: data\.source = .* holds no record"):
        build(jsonl(tmp_path, []))
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n\n{"prompt": "b"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3 is not JSON: "):
        build(str(path))
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1 is a JSON list, not an object"):
        build(str(path))
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl is not UTF-8 text"):
        build(str(path))
    with pytest.raises(ValueError, match=r"data\.options has no meaning for the file"):
        build(jsonl(tmp_path), options={"a": 1})


# Prompts


def test_missing_column(tmp_path: Path) -> None:
    source = jsonl(tmp_path, [*ROWS, {"promt": "x", "answer": "1"}])
    with pytest.raises(ValueError, match=r'"prompt": .* tasks-2 has no such column, only promt, answer; did .*"promt"'):
        build(source)
    with pytest.raises(
        ValueError, match=r'data\.answer_column = "solution" \(set it to "" if there is none\): .* only'
    ):
        build(source, answer_column="solution")
    assert build(jsonl(tmp_path, [{"q": "hi"}]), prompt_column="q", answer_column="")[0].answer is None


def test_chat_template_and_plain_text(tmp_path: Path) -> None:
    source = jsonl(tmp_path, ROWS[:1])
    tokenizer = tiny_tokenizer()
    (chat,) = build(source, template="Q: {prompt} {x}", system="Be brief.")
    assert chat.text == "<|system|>Be brief.</s><|user|>Q: one plus one? {x}</s><|assistant|>"
    assert chat.tokens[0] == tokenizer.convert_tokens_to_ids("<|system|>")
    assert tokenizer.decode(list(chat.tokens)) == chat.text
    (plain,) = build(source, template="Q: {prompt}\nA:", chat_template=False)
    assert plain.text == "Q: one plus one?\nA:"
    assert list(plain.tokens) == tokenizer.encode(plain.text)


def test_messages(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]

    def one(messages: Any, **settings: Any) -> str:
        return build(jsonl(tmp_path, [{"prompt": messages, "answer": ""}]), **settings)[0].text

    assert one(talk) == "<|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>"
    assert one(talk, system="s").startswith("<|system|>s</s><|user|>a")
    for messages, settings, sentence in (
        (talk, {"chat_template": False}, r"needs data\.chat_template = true"),
        (talk, {"template": "Q {prompt}"}, r"data\.template cannot apply"),
        (talk[:2], {}, "ends with an assistant's message"),
        ([], {}, "is an empty list of messages"),
        ([{"role": "user"}], {}, 'must be a dict with "role" and "content"'),
        ([{"role": "system", "content": "x"}, *talk], {"system": "y"}, "has a system message of its own"),
        ([{"role": "tool", "content": "x"}], {}, "chat template refuses prompt tasks-0: no role tool"),
        (3, {}, "neither text nor a list of messages but of type int"),
    ):
        with pytest.raises(ValueError, match=sentence):
            one(messages, **settings)  # type: ignore[arg-type]


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    source = jsonl(tmp_path)
    with pytest.raises(ValueError, match=r'data\.template = "Q:" does not contain \{prompt\}'):
        build(source, template="Q:")
    with pytest.raises(ValueError, match=r"data\.system needs data\.chat_template = true"):
        build(source, system="x", chat_template=False)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens must be at least 1, not 0"):
        build(source, max_prompt_tokens=0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"tokenizer has no chat template: set data\.chat_template = false"):
        build_prompts(DataConfig(source=source), tokenizer, 0)


def test_overlong_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = jsonl(tmp_path, [{"prompt": "abc", "answer": ""}, {"prompt": "abcdef", "answer": ""}])
    assert len(build(source, chat_template=False, max_prompt_tokens=6)) == 2
    with pytest.raises(ValueError, match=r"prompt tasks-1 has 6 tokens, more than data\.max_prompt_tokens = 5"):
        build(source, chat_template=False, max_prompt_tokens=5)
    with caplog.at_level(logging.WARNING):
        kept = build(source, chat_template=False, max_prompt_tokens=5, overlong="drop")
    assert [p.id for p in kept] == ["tasks-0"]
    assert "dropped 1 of 2 prompts" in caplog.text
    with pytest.raises(ValueError, match=r"all 2 prompts have more than data\.max_prompt_tokens = 2 tokens"):
        build(source, chat_template=False, max_prompt_tokens=2, overlong="drop")


def test_records_that_cannot_be_used(tmp_path: Path, plugin: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt tasks-0 has no tokens: its text is empty"):
        build(jsonl(tmp_path, [{"prompt": "", "answer": ""}]), chat_template=False)
    plugin.write_text("def rows(): return [{'prompt': 'x', 'answer': 'y', 'when': {1, 2}}]\n")
    with pytest.raises(ValueError, match=r'column "when" of prompt rows-0 holds what JSON cannot \(.*set'):
        build("data_plugin:rows")


# The buffer


def prompts(n: int, first: int = 0) -> list[Prompt]:
    return [Prompt(id=str(i), tokens=(i + first, 1), text="") for i in range(n)]


def test_every_epoch_serves_every_prompt_once_in_another_order() -> None:
    buffer = DataBuffer(prompts(20), seed=3)
    epochs = [[p.id for p in buffer.take(20)] for _ in range(3)]
    assert all(Counter(e) == Counter(p.id for p in prompts(20)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert [p.id for p in DataBuffer(prompts(20), seed=3).take(60)] == [id for epoch in epochs for id in epoch]
    assert [p.id for p in DataBuffer(prompts(20), seed=4).take(20)] != epochs[0]
    assert [p.id for p in DataBuffer(prompts(3), seed=3, shuffle=False).take(7)] == list("0120120")


@given(
    n=st.integers(1, 7), seed=st.integers(0, 3), before=st.lists(st.integers(0, 9)), after=st.lists(st.integers(0, 9))
)
def test_resume_equals_an_unbroken_run(n: int, seed: int, before: list[int], after: list[int]) -> None:
    whole = DataBuffer(prompts(n), seed=seed)
    expected = [whole.take(k) for k in before + after]
    first = DataBuffer(prompts(n), seed=seed)
    taken = [first.take(k) for k in before]
    second = DataBuffer(prompts(n), seed=seed)
    second.load_state(json.loads(json.dumps(first.state())))
    assert taken + [second.take(k) for k in after] == expected
    assert second.state() == whole.state()


def test_resume_through_make_source(tmp_path: Path) -> None:
    rows = [{"prompt": f"number {i}", "answer": i} for i in range(9)]
    config = DataConfig(source=jsonl(tmp_path, rows))
    whole, first, second = (make_source(config, tiny_tokenizer(), seed=2) for _ in range(3))
    expected = whole.take(4) + whole.take(11)
    taken = first.take(4)
    second.load_state(first.state())
    assert taken + second.take(11) == expected
    changed = make_source(DataConfig(source=jsonl(tmp_path, rows[::-1])), tiny_tokenizer(), seed=2)
    with pytest.raises(ValueError, match="the data has changed since the checkpoint"):
        changed.load_state(first.state())


def test_states_that_do_not_fit() -> None:
    state = DataBuffer(prompts(4), seed=1).state()
    for other in (prompts(5), prompts(4, first=1), prompts(4)[::-1]):
        with pytest.raises(ValueError, match="the data has changed since the checkpoint"):
            DataBuffer(other, seed=1).load_state(state)
    with pytest.raises(ValueError, match="made with seed = 1, this run has 2"):
        DataBuffer(prompts(4), seed=2).load_state(state)
    with pytest.raises(ValueError, match=r"made with data\.shuffle = true, this run has false"):
        DataBuffer(prompts(4), seed=1, shuffle=False).load_state(state)
    with pytest.raises(ValueError, match="data state is damaged: epoch 0, cursor 5"):
        DataBuffer(prompts(4), seed=1).load_state({**state, "cursor": 5})
    with pytest.raises(ValueError, match="data state lacks cursor, epoch"):
        DataBuffer(prompts(4), seed=1).load_state({k: state[k] for k in ("seed", "shuffle", "fingerprint")})


def test_a_refused_state_changes_nothing() -> None:
    buffer, same = DataBuffer(prompts(4), seed=1), DataBuffer(prompts(4), seed=1)
    buffer.take(3), same.take(3)
    with pytest.raises(ValueError, match="damaged"):
        buffer.load_state({**buffer.state(), "cursor": -1})
    assert buffer.take(9) == same.take(9)


def test_buffers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        DataBuffer([], seed=0)
    with pytest.raises(ValueError, match="two prompts have the same id"):
        DataBuffer(prompts(2) * 2, seed=0)
