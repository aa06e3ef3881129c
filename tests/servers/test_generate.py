"""What a server generates, against our own engine and against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def test_greedy_with_speculation_equals_our_engine(host: Any, sampled: Any) -> None:
    requests = sampled(max_new_tokens=24)
    for ours, theirs in zip(host.pair.embedded().generate(requests), host.generate(requests), strict=True):
        assert theirs.tokens == ours.tokens
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=2e-5)
        assert theirs.text == ours.text
        assert theirs.finish == ours.finish
        assert theirs.spec.verify_steps == ours.spec.verify_steps > 0
        assert sum(theirs.spec.accepted) == sum(ours.spec.accepted)


def test_a_server_takes_it_that_its_collector_leaves_out_what_it_began_with(host: Any) -> None:
    assert '"POST /freeze_gc HTTP/1.1" 200 OK' in host.server._process.log.read_text()


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_drafts_beyond_the_end_do_not_count(host: Any, sampled: Any, length: int) -> None:
    requests = sampled(max_new_tokens=length)
    for ours, theirs in zip(host.pair.embedded().generate(requests), host.generate(requests), strict=True):
        assert theirs.tokens == ours.tokens
        assert len(theirs.tokens) == length
        assert theirs.spec.verify_steps == ours.spec.verify_steps
        assert sum(theirs.spec.accepted) == sum(ours.spec.accepted)


def test_drafts_behind_a_stop_token_do_not_count(host: Any, sampled: Any) -> None:
    whole = host.pair.embedded().generate(sampled())[0].tokens
    for stop in dict.fromkeys(whole[1:7]):
        requests = sampled(stop_token_ids=(stop,))[:1]
        ours, theirs = host.pair.embedded().generate(requests)[0], host.generate(requests)[0]
        assert theirs.tokens == ours.tokens
        assert theirs.tokens[-1] == stop
        assert theirs.finish == "stop"
        assert theirs.spec.verify_steps == ours.spec.verify_steps
        assert sum(theirs.spec.accepted) == sum(ours.spec.accepted)


def test_the_draft_makes_a_difference(host: Any, sampled: Any) -> None:
    """A zeroed draft accepts nearly nothing: the counts above are of the draft that was pushed."""
    good = sum(sum(c.spec.accepted) for c in host.generate(sampled()))
    bad = host.pair.other(0)
    with torch.no_grad():
        bad.model.load_state_dict(host.pair.model.state_dict())
        bad.draft.fc.weight.zero_()
    assert all(r.verified for r in host.push(bad))
    completions = host.generate(sampled())
    assert sum(sum(c.spec.accepted) for c in completions) < good / 2
    assert [c.tokens for c in completions] == [c.tokens for c in bad.embedded(0).generate(sampled())]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 1.0), (1.0, 0.8), (0.7, 0.8)])
def test_logprobs_are_the_targets(host: Any, sampled: Any, temperature: float, top_p: float) -> None:
    requests = sampled(temperature=temperature, top_p=top_p, max_new_tokens=12)
    for request, completion in zip(requests, host.generate(requests), strict=True):
        torch.testing.assert_close(torch.tensor(completion.logprobs), host.reference(request, completion), **CLOSE)
