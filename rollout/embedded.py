"""The in-process engine: continuous batching and speculative decoding over any supported Hugging Face causal LM.

Invariants. A sequence of `n` tokens has target keys for `0..n-2` and the states that the draft reads for the same
positions: its newest token is pending. The running sequences are rows `0..B-1` of every buffer. Draft row `t` joins
state `h_t` with token `t+1`; a block of depth `k` starts at row `n-2`, whose state proposes token `n`. A draft with a
layer for each depth has rows, keys and states at each: row `t` of depth `d` joins the state of row `t` of depth `d-1`
with token `t+d`, and the last `d-1` rows of a block, whose token was only guessed, are made again in the next one.

Dimensions: `B` running sequences, `q` tokens per sequence of one forward, `k` draft depth, `V` vocabulary, `H` hidden,
`S` width of what the draft reads.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from miles_spec.draft import states
from miles_spec.draft.modules import DraftHead
from miles_spec.kernels.attention import Attend
from miles_spec.models import cast, check_supported, embed_weight, head_weight, stored_tensors, trunk
from miles_spec.rollout.kv_cache import RaggedCache, row_index
from miles_spec.rollout.sampler import Stream, draw, filtered, uniform
from miles_spec.rollout.sequence import Sequence as Running
from miles_spec.rollout.verify import match_choice, match_greedy, reject
from miles_spec.sync.digest import digests
from miles_spec.sync.dtypes import metas_of
from miles_spec.types import Completion, EngineTimes, Request, Role, TensorMeta, VerifyRule

logger = logging.getLogger(__name__)


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
        self._updating: tuple[int, tuple[Role, ...]] | None = None
        self._versions: dict[Role, int] = {"target": 0}
        self._aborted: set[str] | None = set()
        self._running: list[Running] = []
        self._times = dict.fromkeys(("prefill_s", "draft_s", "verify_s", "other_s"), 0.0)
        self._by_batch: dict[tuple[int, int], tuple[int, float]] = {}
        self._tokens = 0
        self._mark = 0.0
        self._rows = 0
        self._slack = 0
        if draft is None:
            self._refresh_heads()
        else:
            self.attach_draft(draft)
        self.set_draft_depth(depth)

    def attach_draft(self, draft: DraftHead) -> None:
        """Takes a copy of `draft` as version 0; speculation starts with `set_draft_depth`."""
        assert not self._running and self._updating is None
        self.draft = cast(copy.deepcopy(draft), self._dtype).eval().requires_grad_(False)
        self._versions["draft"] = 0
        self._rows = 0  # the buffers lack a cache for the draft: made anew at the next call
        self._refresh_heads()

    # Engine: generation

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], on_done: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """See `Engine.generate`."""
        for request in requests:
            self._check(request)
        if self._updating is not None:
            raise RuntimeError(f"{self.name}: a weight update is open")
        if self._versions["target"] < 0:
            raise RuntimeError(f"{self.name}: its last weights were not verified; push again")
        limit = min(self.max_running, len(requests))
        self._reserve(limit)
        self._aborted = set()
        waiting = deque(Running(r, i, self.eos_ids, self.tokenizer) for i, r in enumerate(requests))
        done: list[Completion | None] = [None] * len(requests)
        self._mark = self._clock()
        try:
            while waiting or self._running:
                self._drop_aborted(waiting)
                for sequence in self._retire(waiting):
                    completion = sequence.completion(self._versions)
                    done[sequence.index] = completion
                    self._tokens += len(completion.tokens)
                    if on_done is not None:
                        on_done(completion)
                began, decoding = self._mark, 0
                if waiting and len(self._running) < limit:
                    room = limit - len(self._running)
                    self._admit([waiting.popleft() for _ in range(min(room, len(waiting)))])
                elif self._running:
                    decoding = len(self._running)
                    self._step()
                self._lap("other_s")
                if decoding:
                    steps, seconds = self._by_batch.get(kind := (decoding, self._depth_for(decoding)), (0, 0.0))
                    self._by_batch[kind] = steps + 1, seconds + self._mark - began
        finally:
            self._running = []
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
        if depth + 2 > self._slack:
            self._rows = 0  # the buffers have no room for blocks this long: made anew at the next call

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
        if self._running:
            raise RuntimeError(f"{self.name}: {len(self._running)} sequences run; abort them before an update")
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
        """What is derived from served weights: the rows of the head that the draft's vocabulary needs."""
        self._head = head_weight(self.model)
        self._embed = embed_weight(self.model)
        self._draft_head = None if self.draft is None else self.draft.head_rows(self._head)

    # Buffers and rows

    def _reserve(self, rows: int) -> None:
        if rows <= self._rows:
            return
        self._rows = rows
        self._slack = self.draft_depth + 2  # a block runs over the end of a sequence, and padding beside it
        capacity = self.max_context + self._slack
        config: Any = self.model.config
        place: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        room: dict[str, Any] = {"rows": rows, "capacity": capacity, **place}
        self._cache = RaggedCache(layers=config.num_hidden_layers, **_heads(config), **room)
        self._draft_caches: list[RaggedCache] = []
        self._states: list[Tensor] = []
        if self.draft is not None:
            depths = max(1, min(self.draft.layers, self.draft_depth))
            # a draft from elsewhere may have other heads than the target
            heads = _heads(self.draft.config)
            self._draft_caches = [RaggedCache(layers=1, **heads, **room) for _ in range(depths)]
            widths = [self.draft.width] + [self.draft.config.hidden_size] * (depths - 1)
            self._states = [torch.zeros(rows, capacity, width, **place) for width in widths]
        self._ids = torch.zeros(rows, capacity, dtype=torch.int64, device=self._device)
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._top_k = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._temperature = torch.zeros(rows, device=self._device)
        self._top_p = torch.zeros(rows, device=self._device)

    def _copy_row(self, source: int, targets: list[int], length: int) -> None:
        """All state of the first `length` tokens of one row to others."""
        for cache in (self._cache, *self._draft_caches):
            cache.copy(source, targets, length)
        for buffer in (*self._states, self._ids):
            buffer[targets, :length] = buffer[source, :length]

    def _retire(self, waiting: deque[Running]) -> list[Running]:
        """Takes finished sequences out, closing each hole with the last row."""
        finished = [s for s in self._running if s.finish is not None]
        for sequence in finished:
            row = self._running.index(sequence)
            last = self._running.pop()
            if last is not sequence:
                self._running[row] = last
                self._copy_row(len(self._running), [row], len(last.tokens))
                for setting in (self._seeds, self._temperature, self._top_k, self._top_p):
                    setting[row] = setting[len(self._running)].clone()
        unstarted = [s for s in waiting if s.finish is not None]
        for sequence in unstarted:
            waiting.remove(sequence)
        return finished + unstarted

    def _drop_aborted(self, waiting: deque[Running]) -> None:
        if self._aborted is None or self._aborted:
            for sequence in (*self._running, *waiting):
                if sequence.finish is None and (self._aborted is None or sequence.request.id in self._aborted):
                    sequence.finish = "abort"

    def _check(self, request: Request) -> None:
        if not request.tokens:
            raise ValueError(f"request {request.id!r} has an empty prompt")
        most = len(request.tokens) + request.sampling.max_new_tokens
        if most > self.max_context:
            raise ValueError(
                f"request {request.id!r} has {len(request.tokens)} prompt tokens and asks for "
                f"{request.sampling.max_new_tokens} more, but the context holds {self.max_context}; shorten the "
                "prompt, lower rollout.max_new_tokens or raise rollout.max_context"
            )
        if request.sampling.stop and self.tokenizer is None:
            raise ValueError(f"request {request.id!r} has stop strings, which need a tokenizer")

    # Forward passes

    def _forward(self, rows: Tensor, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`[B, q, H]`: final hidden states of `ids` `[B, q]`; what the draft reads is kept in `rows` `[B, 1]`."""
        hidden, read = states.run(
            self._trunk, self.draft, input_ids=ids, position_ids=positions, attend=attend, use_cache=False
        )
        if self._states:
            self._states[0][rows, positions] = read
        return hidden

    def _admit(self, sequences: list[Running]) -> None:
        """Prefills new sequences, each distinct prompt once, and samples their first tokens."""
        first = len(self._running)
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for offset, sequence in enumerate(sequences):
            by_prompt.setdefault(sequence.request.tokens, []).append(first + offset)
        self._running += sequences
        sampling = [s.request.sampling for s in sequences]
        rows = slice(first, first + len(sequences))
        self._seeds[rows] = torch.tensor([s.request.seed for s in sequences])
        self._temperature[rows] = torch.tensor([s.temperature for s in sampling])
        self._top_k[rows] = torch.tensor([s.top_k for s in sampling])
        self._top_p[rows] = torch.tensor([s.top_p for s in sampling])

        own = [same[0] for same in by_prompt.values()]
        longest = max(map(len, by_prompt))
        width = max(1, self.chunk // len(own))
        for row, tokens in zip(own, by_prompt, strict=True):
            self._ids[row, : len(tokens)] = torch.tensor(tokens)
        index = torch.tensor(own, device=self._device)
        last: dict[int, Tensor] = {}
        for start in range(0, longest, width):
            # rows whose prompt has ended are padded: what they write lies beyond their length
            going = index[[len(t) > start for t in by_prompt]]
            positions = torch.arange(start, min(start + width, longest), device=self._device).expand(len(going), -1)
            attend = self._cache.attend(going, positions, start + positions.shape[1])
            hidden = self._forward(going[:, None], self._ids[going[:, None], positions], positions, attend)
            for at, (tokens, same) in enumerate((t, s) for t, s in by_prompt.items() if len(t) > start):
                if len(tokens) <= start + positions.shape[1]:
                    last |= dict.fromkeys(same, hidden[at, len(tokens) - 1 - start])
        if self._depth_for(len(self._running)):
            self._lap("prefill_s")
            lengths = [len(t) for t in by_prompt]
            for depth in range(1, len(self._draft_caches) + 1 if longest > 1 else 1):
                self._extend(depth, index, [0] * len(own), [n - 1 for n in lengths])
            for sequence in sequences:
                sequence.draft_rows = len(sequence.request.tokens) - 1
            self._lap("draft_s")
        for tokens, same in by_prompt.items():
            if len(same) > 1:
                self._copy_row(same[0], same[1:], len(tokens))
        ends = torch.tensor([[len(s.tokens)] for s in sequences], device=self._device)
        self._choose(
            rows, torch.stack([last[row] for row in range(first, len(self._running))])[:, None], ends, "prefill_s"
        )

    def _depth_for(self, batch: int) -> int:
        if self.max_batches:
            return min(self.draft_depth, sum(batch <= most for most in self.max_batches))
        return self.draft_depth if not self.max_batch or batch <= self.max_batch else 0

    def _step(self) -> None:
        """One decoding step of all running sequences: a block where speculation is on, else one token each."""
        batch = len(self._running)
        rows = slice(0, batch)
        depth = self._depth_for(batch)
        lengths = [len(s.tokens) for s in self._running]
        ends = torch.tensor(lengths, device=self._device)[:, None]
        ids = self._ids[rows].gather(1, ends - 1)
        drafted = proposal = None
        if depth:
            drafted, proposal = self._propose(rows, lengths, depth)
            ids = torch.cat([ids, drafted], 1)
            self._lap("draft_s")
        positions = ends - 1 + torch.arange(depth + 1, device=self._device)
        attend = self._cache.attend(rows, positions, max(lengths) + depth)
        hidden = self._forward(torch.arange(batch, device=self._device)[:, None], ids, positions, attend)
        self._choose(rows, hidden, positions + 1, "verify_s", drafted, proposal)

    def _choose(
        self,
        rows: slice,
        hidden: Tensor,
        positions: Tensor,
        phase: str,
        drafted: Tensor | None = None,
        proposal: Tensor | None = None,
    ) -> None:
        """Samples or verifies the tokens at `positions` `[B, q]` from `hidden` `[B, q, H]` and commits them.

        The time up to the logits is booked on `phase`.
        """
        batch, count = positions.shape
        logits = (hidden @ self._head.T).view(batch * count, -1)
        self._lap(phase)
        seeds = self._seeds[rows]
        if drafted is None:
            drafted = positions[:, :0]
        if all(s.request.sampling.temperature == 0 for s in self._running[rows]):
            # all on one token each, whatever the rule: nothing to draw
            tokens, log_probs, accepted = match_greedy(logits.view(batch, count, -1), drafted)
        else:
            settings = (s[rows].repeat_interleave(count) for s in (self._temperature, self._top_k, self._top_p))
            probs, all_log_probs = filtered(logits, *settings)
            probs = probs.view(batch, count, -1)
            if proposal is None:
                tokens, accepted = match_choice(probs, drafted, seeds, positions)
            else:
                tokens, accepted = reject(probs, drafted, proposal, seeds, positions)
            log_probs = all_log_probs.gather(1, tokens.view(-1, 1)).view(batch, count)
        # what lies beyond the accepted ones is never read before it is written again
        self._ids[rows].scatter_(1, positions, tokens)
        host = zip(self._running[rows], tokens.tolist(), log_probs.tolist(), accepted.tolist(), strict=True)
        for sequence, new, scores, stands in host:
            sequence.commit(new[: stands + 1], scores, count - 1)

    # The draft

    def _extend(self, depth: int, rows: slice | Tensor, starts: list[int], stops: list[int]) -> tuple[Tensor, Tensor]:
        """Computes draft rows `start..stop-1` of each sequence at `depth`, from the states that the target or the depth
        before has for them; `[B, H]` twice: what the last one has for the next depth, and for the LM head.

        Shorter ranges are padded at their end; what padding writes lies beyond their rows.
        """
        assert self.draft is not None
        widest = max(b - a for a, b in zip(starts, stops, strict=True))
        width = max(1, self.chunk // len(starts))
        start = torch.tensor(starts, device=self._device)[:, None]
        last = torch.tensor(stops, device=self._device)[:, None] - 1
        ids, read = self._ids[rows], self._states[depth - 1][rows]
        size = self.draft.config.hidden_size
        ends = torch.empty(2, len(starts), size, dtype=self._dtype, device=self._device)
        for offset in range(0, widest, width):
            count = min(width, widest - offset)
            positions = (start + offset + torch.arange(count, device=self._device)).clamp(max=ids.shape[1] - 1 - depth)
            cache = self._draft_caches[depth - 1]
            attend = cache.attend(rows, positions, min(max(starts) + offset + count, ids.shape[1]))
            embed = F.embedding(ids.gather(1, positions + depth), self._embed)
            index = positions[..., None].expand(-1, -1, read.shape[-1])
            before = read.gather(1, index)
            if depth == 1:
                before = self.draft.enter(before)
            both = torch.stack(self.draft(embed, before, positions + depth - 1, attend, depth))
            if depth < len(self._states):
                self._states[depth][row_index(rows, self._device), positions] = both[0]
            at = last - start - offset
            inside = (at >= 0) & (at < count)
            picked = both.gather(2, at.clamp(0, count - 1)[..., None].expand(2, -1, 1, size))[:, :, 0]
            ends = torch.where(inside, picked, ends)
        return ends[0], ends[1]

    def _propose(self, rows: slice, lengths: list[int], depth: int) -> tuple[Tensor, Tensor | None]:
        """`[B, k]` drafted tokens, and under `rejection` the `[B, k, V]` distributions they were drawn from."""
        assert self.draft is not None and self._draft_head is not None
        layers = self.draft.layers
        done, stops = [s.draft_rows for s in self._running], [n - 1 for n in lengths]
        for sequence, stop in zip(self._running, stops, strict=True):
            sequence.draft_rows = stop
        ends = torch.tensor(lengths, device=self._device)[:, None]
        tokens: list[Tensor] = []
        proposals: list[Tensor] = []
        for d in range(1, depth + 1):
            if d <= layers:
                # the last rows of the block before read tokens that were only guessed
                state, out = self._extend(d, rows, [max(0, row - d + 1) for row in done], stops)
            else:
                place = ends - 2 + d - layers
                attend = self._draft_caches[-1].attend(rows, place, max(lengths) - 1 + d - layers)
                embed = F.embedding(tokens[-1], self._embed)
                state, out = (x[:, 0] for x in self.draft(embed, state[:, None], place + layers - 1, attend, d))
            logits = out @ self._draft_head.T
            if self.rule == "rejection":
                temperature = self._temperature[rows]
                probs, _ = filtered(
                    logits, temperature, torch.zeros_like(self._seeds[rows]), torch.ones_like(temperature)
                )
                choice = draw(probs, uniform(self._seeds[rows], (ends + d - 1)[:, 0], Stream.DRAFT))
                proposals.append(self._full(probs))
            else:
                choice = logits.argmax(-1)
            if self.draft.vocab_ids is not None:
                choice = self.draft.vocab_ids[choice]
            tokens.append(choice[:, None])
            if d < min(layers, depth):
                self._ids[rows].scatter_(1, ends + d - 1, choice[:, None])  # the next depth's rows read it
        return torch.cat(tokens, 1), torch.stack(proposals, 1) if proposals else None

    def _full(self, probs: Tensor) -> Tensor:
        """`[B, V]` from `[B, Vd]`: probability 0 outside the draft's vocabulary."""
        assert self.draft is not None
        if self.draft.vocab_ids is None:
            return probs
        full = probs.new_zeros(len(probs), self._head.shape[0])
        return full.index_copy_(1, self.draft.vocab_ids, probs)

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


def _heads(config: Any) -> dict[str, Any]:
    """How many heads keys and values have in the layers of a model, and how wide they are."""
    if getattr(config, "kv_lora_rank", None):
        # latent attention: every head has keys and values of its own by the time that they are attended to
        size = config.qk_nope_head_dim + config.qk_rope_head_dim
        return {"heads": config.num_attention_heads, "head_size": size, "value_size": config.v_head_dim}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"heads": config.num_key_value_heads, "head_size": size}
