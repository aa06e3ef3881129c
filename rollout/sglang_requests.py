"""Requests as SGLang's `/generate` takes them, and its answers as completions.

Invariant: an answer becomes a completion only if it has everything that training needs and does not contradict itself;
a missing key is an error that names it.

Read in SGLang 0.5.17 and in 0.5.21 to 0.5.23:

- `output_token_logprobs` are log-softmax of the logits over the temperature, before top-k and top-p, both on the plain
  path (`layers/sampler.py`) and on the speculative one (`compute_spec_logprobs`, in 0.5.17 `compute_spec_v2_logprobs`);
  at temperature 0 they are those at temperature 1. That is what `Completion.logprobs` asks for, so nothing is
  corrected. The environment variable SGLANG_RETURN_ORIGINAL_LOGPROB changes both; `sglang_args.check` refuses it.
- The counters stand in `meta_info` only of a request that took part in a verify step.
  `spec_correct_drafts_histogram[i]` is the number of verify steps with `i` accepted drafts; like
  `spec_num_correct_drafts` it includes drafts that were cut off behind the response's end, see `counts`.
- `sampling_seed` is taken always and used only by a server with `enable_deterministic_inference`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from miles_spec.rollout.sglang_api import Features, ServerBusy, refuse
from miles_spec.types import Completion, Finish, Request, RunError, SpecCounts, VersionSpan


def context_room(features: Features, context_length: int) -> tuple[int, int]:
    """Tokens that a server has room for: of prompt and response together, and of the prompt alone; `context_length` is
    for a server that does not say its own."""
    # SGLang cuts a response at two tokens less, and refuses a prompt at seven less; with a draft it keeps a block
    context = int(features.info.get("context_length") or context_length)
    room = min(context, int(features.info.get("max_total_num_tokens") or context)) - 2
    if features.depth:
        room = min(room, context - features.depth - 1)
    return room, room - 6


def payload(request: Request, rid: str, *, eos: Sequence[int] = ()) -> dict[str, Any]:
    """The body of `/generate`; `eos` are the run's end-of-sequence tokens, `rid` names the request at the server.

    Raises `ValueError` for what SGLang cannot do as asked.
    """
    sampling = request.sampling
    if sampling.ignore_eos and sampling.stop_token_ids:
        raise ValueError(
            f"request {request.id!r} ignores end-of-sequence tokens and has stop tokens, which SGLang would ignore too"
        )
    return {
        "rid": rid,
        "input_ids": list(request.tokens),
        "stream": False,
        "return_logprob": True,
        "logprob_start_len": -1,  # of the response alone
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "max_new_tokens": sampling.max_new_tokens,
            "stop": list(sampling.stop),
            "stop_token_ids": [] if sampling.ignore_eos else sorted({*sampling.stop_token_ids, *eos}),
            "ignore_eos": sampling.ignore_eos,
            "no_stop_trim": True,
            "skip_special_tokens": True,  # of the text alone; a stop string may hold one
            "sampling_seed": request.seed & (1 << 63) - 1,
        },
    }


def completion(
    request: Request, answer: Mapping[str, Any], *, depth: int, version: str, target: int, draft: int | None
) -> Completion:
    """SGLang's answer to `/generate` as a `Completion`; `depth` is how deep the server drafts, `version` SGLang's, and
    `target` and `draft` those of the weights.

    Raises `RunError` for an answer that lacks something or does not agree with itself.
    """

    def need(source: Mapping[str, Any], key: str) -> Any:
        if key not in source:
            raise RunError(
                f"the answer of SGLang {version} to request {request.id!r} has no {key!r}; "
                "it cannot be trained on, so use a version whose answers have it (0.5.17 and 0.5.21 to 0.5.23 do)"
            )
        return source[key]

    meta = need(answer, "meta_info")
    tokens = tuple(map(int, need(answer, "output_ids")))
    finish = _finish(need(meta, "finish_reason"), version)
    entries = need(meta, "output_token_logprobs")
    if tuple(int(entry[1]) for entry in entries) != tokens:
        raise RunError(
            f"SGLang {version} returned {len(entries)} log-probabilities for {len(tokens)} tokens of request "
            f"{request.id!r}, or of other tokens"
        )
    # no counters: nothing was verified, since the first token comes from the prefill and an abort may come any time
    plain = not depth or len(tokens) <= 1 or (finish == "abort" and "spec_verify_ct" not in meta)
    spec = (
        SpecCounts()
        if plain
        else counts(
            verify_steps=int(need(meta, "spec_verify_ct")),
            correct=int(need(meta, "spec_num_correct_drafts")),
            histogram=tuple(map(int, need(meta, "spec_correct_drafts_histogram"))),
            tokens=len(tokens),
            prefills=1 + int(need(meta, "num_retractions")),
            depth=depth,
        )
    )
    return Completion(
        request_id=request.id,
        tokens=tokens,
        logprobs=tuple(float(entry[0]) for entry in entries),
        accepted=(),
        versions=(VersionSpan(start=0, end=len(tokens), target=target, draft=draft if spec.verify_steps else None),),
        spec=spec,
        finish=finish,
        text=str(need(answer, "text")),
    )


def counts(
    *, verify_steps: int, correct: int, histogram: Sequence[int], tokens: int, prefills: int, depth: int
) -> SpecCounts:
    """SGLang's counters as `SpecCounts`; `histogram[i]` are verify steps with `i` accepted drafts.

    Each prefill and each verify step brings one token beside the accepted drafts. What that comes to beyond `tokens`
    was cut off behind the response's end, in the last step, and is taken away here. The total is exact; which depth it
    is taken from is not known (the deepest that fits).

    Raises `RunError` if the counters contradict each other.
    """
    if (
        sum(histogram) != verify_steps
        or sum(i * n for i, n in enumerate(histogram)) != correct
        or any(n for n in histogram[depth + 1 :])
    ):
        raise RunError(
            f"SGLang counts {verify_steps} verify steps and {correct} accepted drafts, but by step {list(histogram)} "
            f"at depth {depth}; these contradict each other"
        )
    accepted = [sum(histogram[i + 1 :]) for i in range(depth)]
    cut = prefills + verify_steps + correct - tokens
    if cut > 1:  # the first of them is the step's own token, the others are drafts
        last = max((i for i, n in enumerate(histogram) if n and i >= cut), default=0)
        for i in range(last + 1 - cut, last):
            accepted[i] -= 1
    return SpecCounts(verify_steps=verify_steps, drafted=(verify_steps,) * depth, accepted=tuple(accepted))


def _finish(reason: Any, version: str) -> Finish:
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    if kind in ("stop", "length", "abort"):
        return kind
    raise RunError(f"SGLang {version} ended a request for a reason that is not known: {reason}")


async def post(http: aiohttp.ClientSession, url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """The text of the answer, waited for as long as `http` does.

    Raises aiohttp's errors, with `status` and what was said where the server is busy or failed (429 or 5xx), and
    otherwise as `refuse` does.
    """
    async with http.post(url, json=body, headers=headers) as answer:
        text = await answer.text()
        try:
            refuse(answer.status, text, url)
        except ServerBusy as busy:
            raise aiohttp.ClientResponseError(
                answer.request_info, answer.history, status=busy.status, message=str(busy)
            ) from None
    return text
