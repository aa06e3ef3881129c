"""One running sequence: where it ends, and that its counts and spans cover what it made."""

from __future__ import annotations

import pytest

from conftest import tiny_tokenizer
from miles_spec.rollout.sequence import Running
from miles_spec.types import Request, Sampling, VersionSpan

EOS = 2


def make(tokenizer: object = None, **sampling: object) -> Running:
    settings = {"max_new_tokens": 8, **sampling}
    request = Request(id="r", tokens=(10, 11), sampling=Sampling(**settings))  # type: ignore[arg-type]
    return Running(request, 0, frozenset({EOS}), tokenizer)


def commit(sequence: Running, new: list[int], depth: int) -> None:
    sequence.commit(new, [-0.5 - token for token in range(depth + 1)], depth)


def test_blocks_are_counted_by_position() -> None:
    sequence = make()
    commit(sequence, [20], 0)  # prefill
    commit(sequence, [21, 22, 23], 2)  # both accepted
    commit(sequence, [24], 2)  # none
    commit(sequence, [25, 26], 2)  # one, and room for one more token
    assert sequence.finish is None and sequence.tokens == [10, 11, 20, 21, 22, 23, 24, 25, 26]
    commit(sequence, [27, 28, 29], 3)  # only the first fits
    got = sequence.completion({"target": 5, "draft": 3})
    assert got.tokens == (20, 21, 22, 23, 24, 25, 26, 27) and got.finish == "length"
    assert got.accepted == (False, True, True, False, False, True, False, True)
    assert got.logprobs == (-0.5, -0.5, -1.5, -2.5, -0.5, -0.5, -1.5, -0.5)
    assert got.spec.verify_steps == 4
    assert (got.spec.drafted, got.spec.accepted) == ((4, 3, 0), (3, 1, 0))
    assert got.versions == (VersionSpan(start=0, end=8, target=5, draft=3),)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_end_of_sequence_within_a_block(place: int) -> None:
    sequence = make()
    new = [30, 31, 32]
    new[place] = EOS
    commit(sequence, new, 2)
    got = sequence.completion({"target": 0, "draft": 0})
    assert got.finish == "stop" and got.tokens == tuple(new[: place + 1])
    # accepted are those that became part of the response
    assert sum(got.spec.accepted) == sum(got.accepted) == min(place + 1, 2)


def test_end_of_sequence_beats_length() -> None:
    sequence = make(max_new_tokens=1)
    commit(sequence, [EOS], 0)
    assert sequence.finish == "stop"


def test_ignore_eos_and_tokens_of_the_request() -> None:
    sequence = make(ignore_eos=True, stop_token_ids=(40,))
    commit(sequence, [EOS, 40, 41], 2)
    assert sequence.finish == "stop" and sequence.tokens[2:] == [EOS, 40]


def test_no_draft_no_draft_version() -> None:
    sequence = make(max_new_tokens=2)
    commit(sequence, [20], 0)
    commit(sequence, [21], 0)
    got = sequence.completion({"target": 5, "draft": 3})
    assert got.versions == (VersionSpan(start=0, end=2, target=5, draft=None),)
    assert (got.spec.verify_steps, got.spec.drafted) == (0, ())


def test_nothing_asked_for() -> None:
    sequence = make(max_new_tokens=0)
    got = sequence.completion({"target": 0})
    assert (got.finish, got.tokens, got.versions, got.text) == ("length", (), (), "")


@pytest.mark.parametrize("split", [[3, 3], [1, 5], [6], [1, 1, 1, 1, 1, 1]])
def test_stop_strings_across_blocks(split: list[int]) -> None:
    tokenizer = tiny_tokenizer()
    text = "abXYcd"
    tokens = tokenizer.encode(text)
    sequence = make(tokenizer, stop=("ZZZZZZZZ", "XY"), max_new_tokens=6)
    for size in split:
        if sequence.finish is None:
            part, tokens = tokens[:size], tokens[size:]
            commit(sequence, part, size - 1)
    got = sequence.completion({"target": 0, "draft": 0})
    assert (got.text, got.finish) == ("abXY", "stop")


def test_a_stop_string_of_many_bytes_and_one_in_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    request = Request(id="r", tokens=tuple(tokenizer.encode("🙂")), sampling=Sampling(max_new_tokens=20, stop=("🙂",)))
    sequence = Running(request, 0, frozenset(), tokenizer)
    for token in tokenizer.encode("a🙂b"):
        if sequence.finish is None:
            commit(sequence, [token], 0)
    assert sequence.completion({"target": 0}).text == "a🙂"
