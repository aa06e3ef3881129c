"""One sequence while it is generated: its tokens, its counts, and when it ends.

Invariant: `tokens` is the prompt and the committed response, nothing drafted; once `finish` is set it does not grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_spec.types import Completion, Finish, Request, Role, SpecCounts, VersionSpan


class Running:
    """The host's side of a running request."""

    def __init__(self, request: Request, index: int, eos_ids: frozenset[int], tokenizer: Any) -> None:
        self.request = request
        self.index = index
        """Place in the caller's order."""
        self.tokens = list(request.tokens)
        self.finish: Finish | None = None if request.sampling.max_new_tokens > 0 else "length"
        self.draft_rows = 0
        """Draft rows computed from true hidden states."""
        self._ends = (frozenset() if request.sampling.ignore_eos else eos_ids) | set(request.sampling.stop_token_ids)
        self._tokenizer = tokenizer
        self._logprobs: list[float] = []
        self._accepted: list[bool] = []
        self._verify_steps = 0
        self._drafted_by_position: list[int] = []
        self._accepted_by_position: list[int] = []

    @property
    def response_tokens(self) -> int:
        """Committed so far."""
        return len(self._logprobs)

    def commit(self, new: list[int], logprobs: list[float], depth: int) -> None:
        """Appends the tokens of one step up to where the response ends.

        `new` are the accepted ones of `depth` drafted tokens and the one that follows them, `logprobs` one for each and
        perhaps more.
        """
        room = self.request.sampling.max_new_tokens - self.response_tokens
        if depth:
            self._verify_steps += 1
            missing = depth - len(self._drafted_by_position)
            self._drafted_by_position += [0] * missing
            self._accepted_by_position += [0] * missing
            for position in range(min(depth, room)):
                self._drafted_by_position[position] += 1
        for position, (token, logprob) in enumerate(zip(new, logprobs, strict=False)):
            was_drafted = position < len(new) - 1
            if was_drafted:
                self._accepted_by_position[position] += 1
            self.tokens.append(token)
            self._logprobs.append(logprob)
            self._accepted.append(was_drafted)
            if token in self._ends or self._stopped(position + 1):
                self.finish = "stop"
            elif self.response_tokens == self.request.sampling.max_new_tokens:
                self.finish = "length"
            if self.finish is not None:
                return

    def _stopped(self, fresh: int) -> bool:
        """Whether the response so far contains a stop string; only `fresh` tokens can have completed one."""
        stop = self.request.sampling.stop
        if not stop:
            return False
        # a stop string of c characters is spread over at most 4c tokens, one per byte
        tail = 4 * max(map(len, stop)) + fresh
        text = self._tokenizer.decode(self.tokens[-min(tail, self.response_tokens) :])
        return any(s in text for s in stop)

    def completion(self, versions: Mapping[Role, int]) -> Completion:
        """The finished sequence, made by weights of `versions`."""
        assert self.finish is not None
        response = tuple(self.tokens[len(self.request.tokens) :])
        span = VersionSpan(
            start=0,
            end=len(response),
            target=versions["target"],
            draft=versions["draft"] if self._verify_steps else None,
        )
        return Completion(
            request_id=self.request.id,
            tokens=response,
            logprobs=tuple(self._logprobs),
            accepted=tuple(self._accepted),
            versions=(span,) if response else (),
            spec=SpecCounts(
                verify_steps=self._verify_steps,
                drafted=tuple(self._drafted_by_position),
                accepted=tuple(self._accepted_by_position),
            ),
            finish=self.finish,
            text=self._tokenizer.decode(response, skip_special_tokens=True) if self._tokenizer else "",
        )
