"""What a draft is trained on offline: responses that the user has, or that the model gives when asked.

Invariant: prompts of one conversation, and prompts that are equal, are all held out or all trained on; which ones are
depends on them, the share and the seed alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from miles_spec.config import RunConfig
from miles_spec.data import Record, check_template, column, make_source, read, tokenize
from miles_spec.models import Loaded
from miles_spec.requests import sampling, seed_of
from miles_spec.rollout.engine import Engine
from miles_spec.types import Completion, Prompt, Request, Sample, SpecCounts

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One response to learn from."""

    group: Tokens
    """The first prompt of its conversation: what is held out or trained on together."""
    sample: Sample


def split(lessons: Sequence[Lesson], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Responses to train on, and those held out: of `share` of the groups, rounded, at least one.

    Raises `ValueError` if all prompts are the same.
    """
    groups = sorted({lesson.group for lesson in lessons}, key=lambda group: seed_of(seed, "held out", group))
    if len(groups) < 2:
        raise ValueError("the data has one prompt alone; with two or more, one can be held out to measure on")
    held_out = set(groups[: min(len(groups) - 1, max(1, round(share * len(groups))))])
    return (
        [lesson.sample for lesson in lessons if lesson.group not in held_out],
        [lesson.sample for lesson in lessons if lesson.group in held_out],
    )


def first(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    """The first of `samples` that have, with their prompts, at most so many tokens together; at least one."""
    lengths = accumulate(len(s.prompt.tokens) + len(s.completion.tokens) for s in samples)
    return [sample for sample, total in zip(samples, lengths, strict=True) if total <= tokens] or list(samples[:1])


def given(config: RunConfig, loaded: Loaded) -> list[Lesson]:
    """The responses of `offline.response_column`, each ended by the token that ends the model's own turns.

    A response is cut at `rollout.max_new_tokens`; prompts are made and limited as those of a run. Raises `ValueError`
    naming file and line, or else the record, that has no response, or none that can be read.
    """
    data, tokenizer = config.data, loaded.tokenizer
    check_template(data, tokenizer)
    records = read(data, config.seed)
    end = _end_of_turn(loaded, data.chat_template)
    lessons: list[Lesson] = []
    for name, record in list(zip(names_of(data.source, len(records)), records, strict=True))[: _count(config)]:
        group: Tokens = ()
        for prompt, text in _turns(record, config, name):
            tokens = tokenize(prompt, data, tokenizer, name)
            group = group or tokens
            if not tokens:
                raise ValueError(f"prompt {name} has no tokens: its text is empty")
            if len(tokens) > data.max_prompt_tokens:
                if data.overlong == "drop":
                    continue
                raise ValueError(
                    f"prompt {name} has {len(tokens)} tokens, more than data.max_prompt_tokens = "
                    f'{data.max_prompt_tokens}: raise it, or set data.overlong = "drop"'
                )
            response = (*tokenizer.encode(text, add_special_tokens=False), *end)[: config.rollout.max_new_tokens]
            prompted = Prompt(id=name, tokens=tokens, text="")
            lessons.append(Lesson(group=group, sample=_sample(prompted, 0, response)))
    if not lessons:
        raise ValueError(
            f"every prompt has more than data.max_prompt_tokens = {data.max_prompt_tokens} tokens: raise it"
        )
    return lessons


def sampled(
    config: RunConfig,
    loaded: Loaded,
    path: Path,
    engine: Callable[[], AbstractContextManager[Engine]],
    progress: Callable[[int, int], bool],
) -> list[Lesson] | None:
    """Responses that the model gives to the prompts of `[data]`, kept in the file `path` as they come.

    What the file has already is not asked for again; with nothing missing no `engine` is started. `progress` is told
    how many of how many there are, and ends it by returning True: the result is None then. Raises `ValueError` for a
    file of other prompts or settings.
    """
    prompts = _prompts(config, loaded)
    count = config.offline.samples_per_prompt
    requests = {
        f"{i}.{j}": Request(
            id=f"{i}.{j}", tokens=p.tokens, sampling=sampling(config), seed=seed_of(config.seed, "offline", i, j)
        )
        for i, p in enumerate(prompts)
        for j in range(count)
    }
    of = seed_of(
        config.model.path, config.model.widen, [(r.id, r.tokens, r.sampling, r.seed) for r in requests.values()]
    )
    done = _kept(path, of)
    missing = [request for id, request in requests.items() if id not in done]
    stopped = progress(len(done), len(requests)) if missing else False
    if missing and not stopped:
        _rewrite(path, of, done)  # without a line that was cut off
        with engine() as started, path.open("a", encoding="utf-8", buffering=1) as file:

            def keep(completion: Completion) -> None:
                nonlocal stopped
                if completion.finish != "abort":
                    done[completion.request_id] = completion.tokens
                    file.write(_line({"id": completion.request_id, "tokens": completion.tokens}))
                if not stopped and progress(len(done), len(requests)):
                    stopped = True
                    started.abort()

            started.generate(missing, keep)
    if stopped:
        return None
    return [
        Lesson(group=p.tokens, sample=_sample(p, j, done[f"{i}.{j}"]))
        for i, p in enumerate(prompts)
        for j in range(count)
    ]


def _count(config: RunConfig) -> int | None:
    return config.offline.prompts or None


def _prompts(config: RunConfig, loaded: Loaded) -> list[Prompt]:
    # in the data's order, and without answers: nothing is scored
    data = replace(config.data, shuffle=False, answer_column="")
    source = make_source(data, loaded.tokenizer, config.seed)
    wanted = _count(config)
    if isinstance(source, Sized):
        wanted = min(wanted or len(source), len(source))
    if wanted is None:
        raise ValueError(f'offline.prompts is 0: data.source = "{data.source}" does not say how many it has; do so')
    return source.take(wanted)


def _sample(prompt: Prompt, index: int, tokens: Sequence[int]) -> Sample:
    completion = Completion(
        request_id="",
        tokens=tuple(tokens),
        logprobs=(0.0,) * len(tokens),
        accepted=(),
        versions=(),
        spec=SpecCounts(),
        finish="stop",
        text="",
    )
    return Sample(prompt=prompt, index=index, completion=completion, reward=0.0)


def _end_of_turn(loaded: Loaded, chat: bool) -> Tokens:
    """The token that the model ends a response with; none if it is not known."""
    if chat:
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        tokens = loaded.tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
        # what follows it, such as a line feed, is the template's
        if ends := [token for token in tokens if token in loaded.eos_ids]:
            return (ends[-1],)
    return loaded.eos_ids[:1]


def names_of(source: str, count: int) -> list[str]:
    """What errors call each record: `FILE:LINE` where it has a line, else as prompts are called."""
    path = Path(source).expanduser()
    if source.endswith(".jsonl"):
        with path.open(encoding="utf-8") as lines:
            return [f"{path.name}:{number}" for number, line in enumerate(lines, 1) if line.strip()]
    return [f"{Path(source.rpartition(':')[2]).stem}-{i}" for i in range(count)]


def _turns(record: Record, config: RunConfig, name: str) -> Iterator[tuple[Any, str]]:
    """Each prompt of a record with the text of its response."""
    data = config.data
    value = column(record, config.offline.response_column, "offline.response_column", name)
    if isinstance(value, str):
        if not value:
            raise ValueError(f"the response of {name} is empty")
        yield column(record, data.prompt_column, "data.prompt_column", name), value
        return
    if not isinstance(value, Sequence):
        raise ValueError(
            f"the response of {name} is neither text nor a list of messages but of type {type(value).__name__}"
        )
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("content"), str) and "role" in message):
            raise ValueError(f'{name}: each message must be a dict with "role" and "content", text, not {message!r}')
    answers = [i for i, message in enumerate(value) if message["role"] == "assistant"]
    if not answers or answers[0] == 0:
        what = "begins with an assistant's message" if answers else "has no assistant's message"
        raise ValueError(f"the conversation of {name} {what}")
    for i in answers:
        if value[i]["content"]:
            yield value[:i], value[i]["content"]


def _kept(path: Path, of: int) -> dict[str, Tokens]:
    """Responses by request that the file holds; a last line that was cut off is not."""
    if not path.exists():
        return {}
    found: dict[str, Tokens] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            values = json.loads(line)
            if number == 1:
                if values["of"] != of:
                    raise ValueError(
                        f"{path} holds responses to other prompts, or of another model, seed or sampling; remove it, "
                        "or choose another `out`"
                    )
                continue
            found[values["id"]] = tuple(values["tokens"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a line of this project's; remove the file") from error
    return found


def _rewrite(path: Path, of: int, done: Mapping[str, Tokens]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    lines = [_line({"of": of}), *(_line({"id": id, "tokens": tokens}) for id, tokens in done.items())]
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"
