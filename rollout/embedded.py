"""The in-process engine: continuous batching and speculative decoding over any supported Hugging Face causal LM.

Here are scheduling, the target's forward passes and the weights; `rows` has what is kept of each sequence, `drafter`
what is drafted. Invariant: a sequence of `n` tokens has target keys for `0..n-2` and the states that the draft reads
for the same positions: its newest token is pending.

Dimensions: `B` running sequences, `q` tokens per sequence of one forward, `k` draft depth, `V` vocabulary, `H` hidden.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from miles_spec.draft import states
from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.attention import Attend
from miles_spec.models import cast, check_supported, embed_weight, head_weight, stored_tensors, trunk
from miles_spec.rollout.drafter import Drafter
from miles_spec.rollout.engine import check_room
from miles_spec.rollout.rows import Rows
from miles_spec.rollout.sampler import filtered
from miles_spec.rollout.sequence import Running
from miles_spec.rollout.verify import match_choice, match_greedy, reject
from miles_spec.sync.digest import digests
from miles_spec.sync.dtypes import metas_of
from miles_spec.types import Completion, EngineTimes, Request, Role, TensorMeta, VerifyRule


class EmbeddedEngine:
    """An `Engine` in this process, and its only member. It owns copies of the weights, in the dtype it computes in."""

    def __init__(
        self,
        model: PreTrainedModel,
        draft: DraftHead | None,
        *,
        tokenizer: Any = None,
        eos_ids: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        rule: VerifyRule = "target",
        depth: int = 0,
        max_batch: int = 0,
        max_running: int = 32,
        max_context: int = 1024,
        prefill_chunk_tokens: int = 512,
        name: str = "embedded",
    ) -> None:
        """Copies `model` and `draft`.

        `depth` tokens are drafted per block while at most `max_batch` sequences run (0: always). `tokenizer` gives
        completions their text and is needed for stop strings. Raises `ValueError` for a model that is not supported.
        """
        check_supported(model, max_context)
        self.name = name
        self.model = cast(copy.deepcopy(model), dtype).eval().requires_grad_(False)
        self.draft: DraftHead | None = None
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.rule = rule
        self.max_batch = max_batch
        self.max_batches: tuple[int, ...] = ()
        """In place of `max_batch`: up to how many sequences at least 1, 2, ... tokens are drafted, descending, and
        `draft_depth` at most. A draft of several layers drafts `draft_depth` or nothing: all are equal."""
        self.max_running = max_running
        self.max_context = max_context
        self.chunk = prefill_chunk_tokens
        self.draft_depth = 0
        self._trunk = trunk(self.model)
        self._device = embed_weight(self.model).device
        self._dtype = dtype
        self._rows = Rows(self.model.config, None, dtype, self._device)
        self._updating: tuple[int, tuple[Role, ...]] | None = None
        self._versions: dict[Role, int] = {"target": 0}
        self._aborted: set[str] | None = set()
        self._times = dict.fromkeys(("prefill_s", "draft_s", "verify_s", "other_s"), 0.0)
        self._by_batch: dict[tuple[int, int], tuple[int, float]] = {}
        self._tokens = 0
        self._mark = 0.0
        self._refresh_heads()
        if draft is not None:
            self.attach_draft(draft)
        self.set_draft_depth(depth)

    def attach_draft(self, draft: DraftHead) -> None:
        """Takes a copy of `draft` as version 0; speculation starts with `set_draft_depth`."""
        assert not self._rows.running and self._updating is None
        self.draft = cast(copy.deepcopy(draft), self._dtype).eval().requires_grad_(False)
        self._versions["draft"] = 0
        self._rows = Rows(self.model.config, self.draft, self._dtype, self._device)
        self._refresh_heads()

    # Engine: generation

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], on_done: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """See `Engine.generate`."""
        for request in requests:
            check_room(request, self.max_context)
            if request.sampling.stop and self.tokenizer is None:
                raise ValueError(f"request {request.id!r} has stop strings, which need a tokenizer")
        if self._updating is not None:
            raise RuntimeError(f"{self.name}: a weight update is open")
        if self._versions["target"] < 0:
            raise RuntimeError(f"{self.name}: its last weights were not verified; push again")
        limit, running = min(self.max_running, len(requests)), self._rows.running
        self._rows.reserve(limit, self.max_context, self.draft_depth)
        self._aborted = set()
        waiting = deque(Running(r, i, self.eos_ids, self.tokenizer) for i, r in enumerate(requests))
        done: list[Completion | None] = [None] * len(requests)
        self._mark = self._clock()
        try:
            while waiting or running:
                self._drop_aborted(waiting)
                for sequence in self._retire(waiting):
                    completion = sequence.completion(self._versions)
                    done[sequence.index] = completion
                    self._tokens += len(completion.tokens)
                    if on_done is not None:
                        on_done(completion)
                began, decoding = self._mark, 0
                if waiting and len(running) < limit:
                    room = limit - len(running)
                    self._admit([waiting.popleft() for _ in range(min(room, len(waiting)))])
                elif running:
                    decoding = len(running)
                    self._step()
                self._lap("other_s")
                if decoding:
                    steps, seconds = self._by_batch.get(kind := (decoding, self._depth_for(decoding)), (0, 0.0))
                    self._by_batch[kind] = steps + 1, seconds + self._mark - began
        finally:
            running.clear()
        assert all(c is not None for c in done)
        return done  # type: ignore[return-value]

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """See `Engine.abort`; call it from `on_done` or from another thread."""
        if request_ids is None:
            self._aborted = None
        elif self._aborted is not None:
            self._aborted.update(request_ids)

    def set_draft_depth(self, depth: int) -> None:
        """See `Engine.set_draft_depth`."""
        if depth and self.draft is None:
            raise ValueError(f"{self.name}: a draft depth of {depth} needs a draft model")
        self.draft_depth = depth

    def take_times(self) -> EngineTimes:
        """See `Engine.take_times`."""
        taken = EngineTimes(
            prefill_s=self._times["prefill_s"],
            draft_s=self._times["draft_s"],
            verify_s=self._times["verify_s"],
            other_s=self._times["other_s"],
            tokens=self._tokens,
            by_batch=self._by_batch,
        )
        self._times = dict.fromkeys(self._times, 0.0)
        self._tokens, self._by_batch = 0, {}
        return taken

    def release(self) -> None:
        """See `Engine.release`: its weights are few beside the trainer's, its buffers are kept."""

    def wake(self) -> None:
        """See `Engine.wake`."""

    # Member: weights

    def members(self) -> Sequence[EmbeddedEngine]:
        """See `Engine.members`."""
        return [self]

    def leave(self, reason: str) -> None:
        """See `Member.leave`."""
        self._versions["target"] = -1

    def versions(self) -> Mapping[Role, int]:
        """See `Member.versions`."""
        return dict(self._versions)

    def manifest(self) -> Mapping[Role, Mapping[str, TensorMeta]]:
        """See `Member.manifest`."""
        return {role: metas_of(named.items()) for role, named in self._served().items()}

    def begin_update(self, version: int, roles: Sequence[Role]) -> None:
        """See `Member.begin_update`."""
        if self._updating is not None:
            raise RuntimeError(f"{self.name}: a weight update is open already")
        if self._rows.running:
            raise RuntimeError(f"{self.name}: {len(self._rows.running)} sequences run; abort them before an update")
        self._updating = (version, tuple(roles))

    @torch.no_grad()
    def load_weights(self, role: Role, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `LocalMember.load_weights`."""
        if self._updating is None or role not in self._updating[1]:
            raise RuntimeError(f"{self.name}: no update of role {role!r} is open")
        served = self._served()[role]
        for name, tensor in tensors:
            if name not in served:
                raise ValueError(f"{self.name}: there is no {role} tensor {name!r}")
            if tensor.shape != served[name].shape:
                raise ValueError(
                    f"{self.name}: {role} tensor {name!r} has shape {tuple(served[name].shape)}, "
                    f"but {tuple(tensor.shape)} came"
                )
            served[name].copy_(tensor)

    def end_update(self) -> Mapping[Role, Mapping[str, str]]:
        """See `Member.end_update`."""
        if self._updating is None:
            raise RuntimeError(f"{self.name}: no weight update is open")
        version, roles = self._updating
        self._updating = None
        self._versions.update(dict.fromkeys(roles, version))
        self._refresh_heads()
        served = self._served()
        return {role: digests(served[role].items()) for role in roles}

    def _served(self) -> dict[Role, dict[str, Tensor]]:
        """The served tensors themselves, tied ones once."""
        served: dict[Role, dict[str, Tensor]] = {"target": stored_tensors(self.model)}
        if self.draft is not None:
            served["draft"] = self.draft.exported()
        return served

    def _refresh_heads(self) -> None:
        """What is derived from served weights: the LM head, and the drafter with its rows of it."""
        self._head = head_weight(self.model)
        self._drafter = None if self.draft is None else Drafter(self.draft, self.model, self.chunk)

    # Scheduling

    def _retire(self, waiting: deque[Running]) -> list[Running]:
        """Takes finished sequences out."""
        finished = [s for s in self._rows.running if s.finish is not None]
        for sequence in finished:
            self._rows.remove(sequence)
        unstarted = [s for s in waiting if s.finish is not None]
        for sequence in unstarted:
            waiting.remove(sequence)
        return finished + unstarted

    def _drop_aborted(self, waiting: deque[Running]) -> None:
        if self._aborted is None or self._aborted:
            for sequence in (*self._rows.running, *waiting):
                if sequence.finish is None and (self._aborted is None or sequence.request.id in self._aborted):
                    sequence.finish = "abort"

    def _depth_for(self, batch: int) -> int:
        if self.max_batches:
            return min(self.draft_depth, sum(batch <= most for most in self.max_batches))
        return self.draft_depth if not self.max_batch or batch <= self.max_batch else 0

    # Forward passes

    def _forward(self, rows: Tensor, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`[B, q, H]`: final hidden states of `ids` `[B, q]`; what the draft reads is kept in `rows` `[B, 1]`."""
        hidden, read = states.run(
            self._trunk, self.draft, input_ids=ids, position_ids=positions, attend=attend, use_cache=False
        )
        if self._rows.states:
            self._rows.states[0][rows, positions] = read
        return hidden

    def _admit(self, sequences: list[Running]) -> None:
        """Prefills new sequences, each distinct prompt once, and samples their first tokens."""
        rows = self._rows
        new = rows.add(sequences)
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for row, sequence in enumerate(sequences, new.start):
            by_prompt.setdefault(sequence.request.tokens, []).append(row)
        own = [same[0] for same in by_prompt.values()]
        longest = max(map(len, by_prompt))
        width = max(1, self.chunk // len(own))
        for row, tokens in zip(own, by_prompt, strict=True):
            rows.ids[row, : len(tokens)] = torch.tensor(tokens)
        index = torch.tensor(own, device=self._device)
        last: dict[int, Tensor] = {}
        for start in range(0, longest, width):
            # rows whose prompt has ended are padded: what they write lies beyond their length
            going = index[[len(t) > start for t in by_prompt]]
            positions = torch.arange(start, min(start + width, longest), device=self._device).expand(len(going), -1)
            attend = rows.cache.attend(going, positions, start + positions.shape[1])
            hidden = self._forward(going[:, None], rows.ids[going[:, None], positions], positions, attend)
            for at, (tokens, same) in enumerate((t, s) for t, s in by_prompt.items() if len(t) > start):
                if len(tokens) <= start + positions.shape[1]:
                    last |= dict.fromkeys(same, hidden[at, len(tokens) - 1 - start])
        if self._depth_for(len(rows.running)):
            assert self._drafter is not None
            self._lap("prefill_s")
            self._drafter.prefill(rows, index, [len(t) for t in by_prompt])
            for sequence in sequences:
                sequence.draft_rows = len(sequence.request.tokens) - 1
            self._lap("draft_s")
        for tokens, same in by_prompt.items():
            if len(same) > 1:
                rows.copy(same[0], same[1:], len(tokens))
        ends = torch.tensor([[len(s.tokens)] for s in sequences], device=self._device)
        self._choose(new, torch.stack([last[row] for row in range(new.start, new.stop)])[:, None], ends, "prefill_s")

    def _step(self) -> None:
        """One decoding step of all running sequences: a block where speculation is on, else one token each."""
        rows, batch = self._rows, len(self._rows.running)
        depth = self._depth_for(batch)
        lengths = [len(s.tokens) for s in rows.running]
        ends = torch.tensor(lengths, device=self._device)[:, None]
        live = slice(0, batch)
        ids = rows.ids[live].gather(1, ends - 1)
        drafted = proposal = None
        if depth:
            assert self._drafter is not None
            drafted, proposal = self._drafter.propose(rows, lengths, depth, sampled=self.rule == "rejection")
            ids = torch.cat([ids, drafted], 1)
            self._lap("draft_s")
        positions = ends - 1 + torch.arange(depth + 1, device=self._device)
        attend = rows.cache.attend(live, positions, max(lengths) + depth)
        hidden = self._forward(torch.arange(batch, device=self._device)[:, None], ids, positions, attend)
        self._choose(live, hidden, positions + 1, "verify_s", drafted, proposal)

    def _choose(
        self,
        at: slice,
        hidden: Tensor,
        positions: Tensor,
        phase: str,
        drafted: Tensor | None = None,
        proposal: Tensor | None = None,
    ) -> None:
        """Samples or verifies the tokens at `positions` `[B, q]` of rows `at` from `hidden` `[B, q, H]`, and commits
        them.

        The time up to the logits is booked on `phase`.
        """
        rows, running = self._rows, self._rows.running[at]
        batch, count = positions.shape
        logits = (hidden @ self._head.T).view(batch * count, -1)
        self._lap(phase)
        seeds = rows.seeds[at]
        if drafted is None:
            drafted = positions[:, :0]
        if all(s.request.sampling.temperature == 0 for s in running):
            # all on one token each, whatever the rule: nothing to draw
            tokens, log_probs, accepted = match_greedy(logits.view(batch, count, -1), drafted)
        else:
            settings = (s[at].repeat_interleave(count) for s in (rows.temperature, rows.top_k, rows.top_p))
            probs, all_log_probs = filtered(logits, *settings)
            probs = probs.view(batch, count, -1)
            if proposal is None:
                tokens, accepted = match_choice(probs, drafted, seeds, positions)
            else:
                tokens, accepted = reject(probs, drafted, proposal, seeds, positions)
            log_probs = all_log_probs.gather(1, tokens.view(-1, 1)).view(batch, count)
        # what lies beyond the accepted ones is never read before it is written again
        rows.ids[at].scatter_(1, positions, tokens)
        host = zip(running, tokens.tolist(), log_probs.tolist(), accepted.tolist(), strict=True)
        for sequence, new, scores, stands in host:
            sequence.commit(new[: stands + 1], scores, count - 1)

    # Time

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _lap(self, phase: str) -> None:
        """Books the time since the last lap on `phase`."""
        now = self._clock()
        self._times[phase] += now - self._mark
        self._mark = now
