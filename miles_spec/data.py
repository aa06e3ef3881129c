"""Prompts: from a source's records to tokens, and the buffer that serves them in epochs.

Invariant: a prompt is served as it was checked at start-up, and the order of all prompts of a run is a function of the
data, `seed` and `data.shuffle` alone; a resumed run either goes on where it was or refuses, and never skips data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from miles_spec.config import DataConfig
from miles_spec.plugins import check_signature, load, require, suggest
from miles_spec.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Record = Mapping[str, Any]


class PromptSource(Protocol):
    """Where the loop takes its prompts from. It samples each prompt several times itself."""

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts. One may occur twice in a call, at the turn of an epoch or with few prompts."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the source stands, as JSON values; kept in checkpoints."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`. Raises `ValueError` if the data is not what it was then."""
        ...


class DataBuffer:
    """Serves a list of prompts in epochs, each in an order of its own drawn from `(seed, epoch)`."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        """Raises `ValueError` without prompts or if two have the same id."""
        if not prompts:
            raise ValueError("the data set is empty: there is nothing to sample from")
        if len({p.id for p in prompts}) < len(prompts):
            raise ValueError("two prompts have the same id; ids must be unique within the data")
        self.prompts = list(prompts)
        self._seed, self._shuffle = seed, shuffle
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(json.dumps([prompt.id, prompt.tokens]).encode())
        self._fingerprint = digest.hexdigest()
        self._epoch, self._cursor = 0, 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self.prompts)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts, going over to the next epoch as often as needed."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self._cursor == len(self._order):
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            part = self._order[self._cursor : self._cursor + n - len(taken)]
            taken += [self.prompts[i] for i in part]
            self._cursor += len(part)
        return taken

    def state(self) -> dict[str, Any]:
        """Epoch, position in it, and what both depend on."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": self._fingerprint,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`. Raises `ValueError` if the prompts, the seed or the shuffling have changed since."""
        if missing := self.state().keys() - state.keys():
            raise ValueError(f"the checkpoint's data state lacks {', '.join(sorted(missing))}")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the data has changed since the checkpoint (other prompts, template, tokenizer or limits): "
                "restore it, or start a new run with another `out`"
            )
        for key, now, setting in (("seed", self._seed, "seed"), ("shuffle", self._shuffle, "data.shuffle")):
            if state[key] != now:
                raise ValueError(
                    f"the checkpoint was made with {setting} = {json.dumps(state[key])}, this run has "
                    f"{json.dumps(now)}, which would change the order of prompts; set it back, or start a new run"
                )
        epoch, cursor = state["epoch"], state["cursor"]
        if not (isinstance(epoch, int) and isinstance(cursor, int) and epoch >= 0 and 0 <= cursor <= len(self)):
            raise ValueError(f"the checkpoint's data state is damaged: epoch {epoch!r}, cursor {cursor!r}")
        self._epoch, self._cursor = epoch, cursor
        self._order = self._order_of(epoch)


def make_source(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptSource:
    """The source that `[data]` describes: the user's own class if it has `take`, else a `DataBuffer`.

    A class is constructed as `Class(tokenizer=tokenizer, **options)` and does everything else itself. Raises
    `ValueError` for whatever is wrong with the settings or the data.
    """
    if _is_plugin(config.source):
        found = load(config.source, what="data.source")
        if isinstance(found, type) and hasattr(found, "take"):
            return _construct(found, config, tokenizer)
    return DataBuffer(build_prompts(config, tokenizer, seed), seed=seed, shuffle=config.shuffle)


def _construct(cls: type, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSource:
    what = f'data.source = "{config.source}"'
    if lacking := [name for name in ("state", "load_state") if not hasattr(cls, name)]:
        raise ValueError(f"{what} has take() but not {' and '.join(lacking)}(), which checkpoints need")
    check_signature(cls, ["tokenizer", *config.options], what)
    try:
        source: PromptSource = cls(tokenizer=tokenizer, **config.options)
    except Exception as error:
        raise ValueError(f"{what} raised {type(error).__name__}: {error}") from error
    return source


# Records


def _is_plugin(source: str) -> bool:
    return ":" in source and not source.startswith(("datasets:", "reasoning_gym:"))


def read(config: DataConfig, seed: int) -> list[Record]:
    """Everything the source holds, in its order; at least one record.

    `seed` is that of a generator such as reasoning-gym. Raises `ValueError` if the source cannot be read or is empty.
    """
    records = _records(config, seed)
    if not records:
        raise ValueError(f'the data set is empty: data.source = "{config.source}" holds no record')
    return records


def _records(config: DataConfig, seed: int) -> list[Record]:
    source = config.source
    kind, _, name = source.partition(":")
    if config.options and source.endswith((".jsonl", ".parquet")):
        raise ValueError(f"data.options has no meaning for the file {source}; remove it")
    if kind == "datasets" and name:
        return _from_datasets(name, config.split, config.options)
    if kind == "reasoning_gym" and name:
        return _from_reasoning_gym(name, config.size, seed, config.options)
    if source.endswith(".jsonl"):
        return _from_jsonl(_existing(source))
    if source.endswith(".parquet"):
        return _from_parquet(_existing(source))
    if _is_plugin(source):
        return _from_function(source, config.options)
    raise ValueError(
        f'data.source = "{source}" is none of: a .jsonl or .parquet file, "datasets:PATH", "reasoning_gym:TASK", '
        '"pkg.mod:function"'
    )


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"data.source: there is no file {path.absolute()}")
    return path


def _from_jsonl(path: Path) -> list[Record]:
    records: list[Record] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error.msg}, column {error.colno}") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{path}, line {number} is a JSON {type(record).__name__}, not an object")
                records.append(record)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return records


def _from_parquet(path: Path) -> list[Record]:
    pyarrow = require("pyarrow", package="pyarrow", what=f"data.source = {str(path)!r}")
    parquet = require("pyarrow.parquet", package="pyarrow", what=f"data.source = {str(path)!r}")
    try:
        records: list[Record] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    return records


def _from_datasets(name: str, split: str, options: Mapping[str, Any]) -> list[Record]:
    what = f'data.source = "datasets:{name}"'
    datasets = require("datasets", package="datasets", what=what)
    path = Path(name).expanduser()
    saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if saved and options:
        raise ValueError(f"{what} is a saved folder, for which data.options has no meaning; remove it")
    try:
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # the library raises of every kind for a wrong name, split or option
        raise ValueError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f'{what} has no split "{split}" (data.split); it has {", ".join(found)}')
        found = found[split]
    return [dict(record) for record in found]


def _from_reasoning_gym(task: str, size: int, seed: int, options: Mapping[str, Any]) -> list[Record]:
    what = f'data.source = "reasoning_gym:{task}"'
    require("reasoning_gym", package="reasoning-gym", what=what)
    factory = require("reasoning_gym.factory", package="reasoning-gym", what=what)
    if task not in factory.DATASETS:
        raise ValueError(f"{what}: there is no such task{suggest(task, factory.DATASETS)}")
    if reserved := sorted({"size", "seed"} & options.keys()):
        raise ValueError(
            f"{what}: set data.size and the run's seed instead of {' and '.join(reserved)} in data.options"
        )
    if size < 1:
        raise ValueError(f"data.size must be at least 1, not {size}")
    try:
        entries = list(factory.create_dataset(task, size=size, seed=seed, **options))
    except Exception as error:  # unknown options are TypeErrors, impossible values AssertionErrors
        raise ValueError(f"{what} refuses data.options = {dict(options)}: {error}") from error
    # some tasks judge by their options, so the reward is to have them
    return [{**entry, "task": task, "options": dict(options)} for entry in entries]


def _from_function(path: str, options: Mapping[str, Any]) -> list[Record]:
    fn: Callable[..., Iterable[Any]] = load(path, what="data.source")
    what = f'data.source = "{path}"'
    check_signature(fn, list(options), what)
    try:
        records = list(fn(**options))
    except Exception as error:
        raise ValueError(f"{what} raised {type(error).__name__}: {error}") from error
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"{what}: record {index} is not a dict but of type {type(record).__name__}")
    return [dict(record) for record in records]


# Prompts


def build_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Prompt]:
    """Every prompt of the source, tokenized, in the source's order.

    An id is the source's name and the record's index in it, from 0. `seed` is that of a generator such as
    reasoning-gym. Raises `ValueError`: the source cannot be read or is empty, a column is missing, a record does not
    fit the settings or JSON, or a prompt has no token or more than `max_prompt_tokens`.
    """
    check_template(config, tokenizer)
    records = read(config, seed)
    prompt_column = config.prompt_column
    if config.source.startswith("reasoning_gym:") and prompt_column == "prompt":
        prompt_column = "question"
    name = Path(config.source.rpartition(":")[2]).stem
    prompts: list[Prompt] = []
    dropped = 0
    for index, record in enumerate(records):
        id = f"{name}-{index}"
        value = column(record, prompt_column, "data.prompt_column", id)
        answer = column(record, config.answer_column, "data.answer_column", id) if config.answer_column else None
        _check_json(record, id)
        tokens = tokenize(value, config, tokenizer, id)
        if not tokens:
            raise ValueError(f"prompt {id} has no tokens: its text is empty")
        if len(tokens) > config.max_prompt_tokens:
            if config.overlong == "error":
                raise ValueError(
                    f"prompt {id} has {len(tokens)} tokens, more than data.max_prompt_tokens = "
                    f'{config.max_prompt_tokens}: raise it, or set data.overlong = "drop"'
                )
            dropped += 1
            continue
        text = tokenizer.decode(list(tokens))
        prompts.append(Prompt(id=id, tokens=tokens, text=text, answer=answer, metadata=record))
    if not prompts:
        raise ValueError(
            f"all {dropped} prompts have more than data.max_prompt_tokens = {config.max_prompt_tokens} tokens and were "
            "dropped: raise it"
        )
    if dropped:
        log.warning(
            "dropped %d of %d prompts with more than data.max_prompt_tokens = %d tokens",
            dropped,
            len(records),
            config.max_prompt_tokens,
        )
    return prompts


def check_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` for settings of prompts that contradict each other or the tokenizer."""
    if "{prompt}" not in config.template:
        raise ValueError(f'data.template = "{config.template}" does not contain {{prompt}}')
    if config.max_prompt_tokens < 1:
        raise ValueError(f"data.max_prompt_tokens must be at least 1, not {config.max_prompt_tokens}")
    if config.system and not config.chat_template:
        raise ValueError("data.system needs data.chat_template = true; without it, write it into data.template")
    if config.chat_template and not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template: set data.chat_template = false")


def column(record: Record, name: str, setting: str, id: str) -> Any:
    """The value of a column that `setting` names. Raises `ValueError` naming both where record `id` has none."""
    if name in record:
        return record[name]
    none = ' (set it to "" if there is none)' if setting == "data.answer_column" else ""
    raise ValueError(
        f'{setting} = "{name}"{none}: the record of prompt {id} has no such column, only '
        f"{', '.join(map(str, record)) or 'none at all'}{suggest(name, map(str, record))}"
    )


def _check_json(record: Record, id: str) -> None:
    for column, value in record.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'column "{column}" of prompt {id} holds what JSON cannot ({error}); remove it or turn it into text'
            ) from error


def tokenize(value: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase, id: str) -> tuple[int, ...]:
    """A prompt, text or a list of messages, as the model sees it. Raises `ValueError` naming `id` for any other."""
    if isinstance(value, str):
        text = config.template.replace("{prompt}", value)
        if not config.chat_template:
            return tuple(tokenizer.encode(text))
        messages = [{"role": "user", "content": text}]
    elif isinstance(value, Sequence):
        messages = _messages(value, config, id)
    else:
        raise ValueError(f"prompt {id} is neither text nor a list of messages but of type {type(value).__name__}")
    if config.system:
        messages = [{"role": "system", "content": config.system}, *messages]
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template refuses by raising; which errors, Jinja and the template decide
        raise ValueError(f"the chat template refuses prompt {id}: {error}") from error
    return tuple(ids)


def _messages(value: Sequence[Any], config: DataConfig, id: str) -> list[dict[str, Any]]:
    if not config.chat_template:
        raise ValueError(f"prompt {id} is a list of messages, which needs data.chat_template = true")
    if config.template != "{prompt}":
        raise ValueError(f"prompt {id} is a list of messages, to which data.template cannot apply; remove it")
    for message in value:
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys()):
            raise ValueError(f'prompt {id}: each message must be a dict with "role" and "content", not {message!r}')
    if not value:
        raise ValueError(f"prompt {id} is an empty list of messages")
    if config.system and value[0]["role"] == "system":
        raise ValueError(f"prompt {id} has a system message of its own; leave data.system empty")
    if value[-1]["role"] == "assistant":
        raise ValueError(f"prompt {id} ends with an assistant's message, which is the policy's to write; remove it")
    return [dict(message) for message in value]
