"""Requests as SGLang takes them, its answers as completions, and its counters."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from typing import Any

import aiohttp
import pytest

from fake_sglang import serving
from miles_spec.rollout.sglang_api import Api, Keys, json_object
from miles_spec.rollout.sglang_requests import completion, counts, payload, post
from miles_spec.types import Completion, Request, RunError, Sampling, SpecCounts


def request(tokens: int = 9, **sampling: Any) -> Request:
    return Request(id="r", tokens=(1, 2), sampling=Sampling(max_new_tokens=tokens, **sampling), seed=5)


def answer(api: Api, wanted: Request) -> dict[str, Any]:
    return json_object(api.ask("/generate", payload(wanted, "rid")), "generate")


def read(content: dict[str, Any], depth: int = 3) -> Completion:
    return completion(request(), content, depth=depth, version="0.5.21", target=4, draft=2)


def test_a_completion_has_tokens_logprobs_versions_and_counts() -> None:
    with serving(depth=3) as fake:
        done = read(answer(Api(fake.url, Keys()), request()))
    assert done.tokens == tuple(range(3, 12)) and done.text.startswith("3 4 5") and done.finish == "length"
    assert done.logprobs == (-0.25, -0.5, -0.75, -1.0) * 2 + (-0.25,)
    assert [(v.start, v.end, v.target, v.draft) for v in done.versions] == [(0, 9, 4, 2)]
    # one token of the prefill; steps accept 1, 0, 2 and 1 drafts: the last step's own token is cut off
    assert done.spec == SpecCounts(verify_steps=4, drafted=(4, 4, 4), accepted=(3, 1, 0))
    assert done.accepted == ()


def test_without_speculation_no_counter_is_asked_for() -> None:
    with serving(depth=0) as fake:
        done = read(answer(Api(fake.url, Keys()), request()), depth=0)
    assert done.spec == SpecCounts() and done.versions[0].draft is None


@pytest.mark.parametrize("tokens", [1, 2])
def test_only_a_response_of_one_token_may_lack_counters(tokens: int) -> None:
    with serving(depth=3) as fake:
        fake.faults.drop = ("spec_verify_ct",)
        content = answer(Api(fake.url, Keys()), request(tokens))
    if tokens == 1:
        assert read(content).spec == SpecCounts()
    else:
        with pytest.raises(RunError, match=r"SGLang 0\.5\.21 to request 'r' has no 'spec_verify_ct'"):
            read(content)


@pytest.mark.parametrize(
    "key",
    [
        "spec_verify_ct",
        "spec_num_correct_drafts",
        "spec_correct_drafts_histogram",
        "num_retractions",
        "output_token_logprobs",
        "finish_reason",
    ],
)
def test_a_missing_key_is_an_error_that_names_it(key: str) -> None:
    with serving(depth=3) as fake:
        fake.faults.drop = (key,)
        content = answer(Api(fake.url, Keys()), request())
    with pytest.raises(RunError, match=f"no '{key}'.*0.5.17"):
        read(content)


def test_logprobs_of_other_tokens_are_an_error() -> None:
    with serving() as fake:
        fake.faults.wrong_length = True
        content = answer(Api(fake.url, Keys()), request())
    with pytest.raises(RunError, match="8 log-probabilities for 9 tokens"):
        read(content)


@pytest.mark.parametrize("reason", [{"type": "banned"}, None])
def test_an_unknown_end_is_an_error(reason: object) -> None:
    with serving() as fake:
        content = answer(Api(fake.url, Keys()), request())
    content["meta_info"]["finish_reason"] = reason
    with pytest.raises(RunError, match="a reason that is not known"):
        read(content)


def test_an_abort_in_the_queue_has_nothing() -> None:
    meta = {"id": "x", "finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}
    done = read({"text": "", "output_ids": [], "meta_info": meta | {"output_token_logprobs": []}})
    assert done.finish == "abort" and done.tokens == () and done.spec == SpecCounts()


def test_counts_are_exact_in_total_whatever_is_cut_off() -> None:
    """Against a replay of random decodings: the pooled accepted tokens are those of the response."""
    rng = random.Random(3)
    for _ in range(300):
        depth, length = rng.randint(1, 5), rng.randint(2, 40)
        made, inside, histogram = 1, 0, [0] * (depth + 1)
        while made < length:
            correct = rng.randint(0, depth)
            histogram[correct] += 1
            inside += min(correct, length - made)
            made += correct + 1
        verify = sum(histogram)
        correct = sum(i * n for i, n in enumerate(histogram))
        got = counts(verify_steps=verify, correct=correct, histogram=histogram, tokens=length, prefills=1, depth=depth)
        assert sum(got.accepted) == inside
        assert got.drafted == (verify,) * depth
        assert all(0 <= a <= verify for a in got.accepted) and list(got.accepted) == sorted(got.accepted)[::-1]


@pytest.mark.parametrize(
    ("verify", "correct", "histogram"), [(3, 2, (1, 1)), (2, 2, (1, 1)), (1, 4, (0, 0, 0, 0, 1)), (1, 0, ())]
)
def test_counters_that_contradict_each_other_are_refused(verify: int, correct: int, histogram: tuple[int, ...]) -> None:
    with pytest.raises(RunError, match="contradict"):
        counts(verify_steps=verify, correct=correct, histogram=histogram, tokens=9, prefills=1, depth=3)


def test_a_request_says_how_to_sample() -> None:
    wanted = request(temperature=0.5, top_p=0.9, top_k=0, stop=("x",), stop_token_ids=(7,))
    body = payload(wanted, "rid", eos=(2, 7))
    params = body["sampling_params"]
    assert body["input_ids"] == [1, 2] and body["rid"] == "rid" and body["return_logprob"] is True
    assert params["top_k"] == -1 and params["top_p"] == 0.9 and params["temperature"] == 0.5
    assert params["stop_token_ids"] == [2, 7] and params["stop"] == ["x"] and params["no_stop_trim"] is True
    assert params["skip_special_tokens"] is True and params["sampling_seed"] == 5
    assert payload(request(ignore_eos=True), "rid", eos=(2,))["sampling_params"]["stop_token_ids"] == []
    with pytest.raises(ValueError, match="would ignore too"):
        payload(request(ignore_eos=True, stop_token_ids=(7,)), "rid")


def test_a_server_that_takes_no_connection_is_late_by_the_sessions_clock() -> None:
    async def send(url: str) -> None:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=0.3)
        async with aiohttp.ClientSession(timeout=limits) as http, asyncio.timeout(10.0):
            await post(http, url, {}, {})

    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        host, port = full.getsockname()
        for _ in range(4):  # nobody accepts them, so there is no room for another
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((host, port))
        with pytest.raises(aiohttp.ConnectionTimeoutError):
            asyncio.run(send(f"http://{host}:{port}/generate"))


def test_a_seed_of_any_size_fits() -> None:
    wanted = Request(id="r", tokens=(1,), sampling=Sampling(), seed=(1 << 64) + 3)
    assert payload(wanted, "rid")["sampling_params"]["sampling_seed"] == 3
