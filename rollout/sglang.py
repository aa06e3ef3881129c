"""One SGLang server, started by us or joined by its address: its process, its requests and its memory.

It is a `Member` whose weights lie in other processes (`sglang_weights.py`). Invariant: it generates only while it
serves a target that was pushed and verified; a start, a failed push and an open session each leave it without one
(version -1).

Safe to use from several threads; `complete`, `probe` and `abort` run in the caller's event loop.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from miles_spec.rollout.dispatch import CUT
from miles_spec.rollout.sglang_api import Api, Keys, check_rule, check_served, json_object
from miles_spec.rollout.sglang_args import ServerSettings, arguments, depths, installed, refuse_greedy
from miles_spec.rollout.sglang_process import ServerProcess, environment, start_server
from miles_spec.rollout.sglang_requests import completion, context_room, payload, post
from miles_spec.rollout.sglang_weights import SGLangMember
from miles_spec.types import Completion, Request, RunError

log = logging.getLogger(__name__)

LAST_LINES = 8
"""Of the log of a server that ended, for the run's own."""
WARM_UP_TOKENS = 8
"""Of each response that a server gives before it counts as up."""


class SGLangServer(SGLangMember):
    """One server; `url` is empty until it has started."""

    def __init__(
        self,
        *,
        name: str,
        settings: ServerSettings,
        keys: Keys,
        draft_depth: int = 0,
        join: str = "",
        host: str = "127.0.0.1",
        launch: Sequence[str] = (),
        gpus: Sequence[int] = (),
        folder: Path | None = None,
        eos: Sequence[int] = (),
        vocab_size: int | None = None,
        start_timeout_s: float = 900.0,
        push_timeout_s: float = 300.0,
    ) -> None:
        """`join` is the address of a server that runs already; otherwise `launch` is the command that starts one on
        `host` and `gpus` (indices), its log in `folder`. `eos` end a response beside the model's own tokens that do;
        ids from `vocab_size` on are refused, since one of them would kill the server. `push_timeout_s` is for each
        command of a session."""
        assert join or (launch and folder is not None), "a server is either joined or started"
        super().__init__(
            name=name,
            url=join.rstrip("/"),
            joined=bool(join),
            keys=keys,
            start_timeout_s=start_timeout_s,
            push_timeout_s=push_timeout_s,
        )
        self.draft_depth = draft_depth
        """Of a joined server it is what that server says, from `start` on."""
        self.settings = settings
        self._host = host
        self._launch = tuple(launch)
        self._gpus = tuple(gpus)
        self._folder = folder
        self._eos = tuple(eos)
        self._vocab_size = vocab_size
        self._process: ServerProcess | None = None
        self._cut: dict[str, str] = {}
        """The id of each request whose connection broke, by the id that SGLang knows it by."""

    # The process

    def start(self) -> None:
        """Starts the server, or looks at the joined one, and returns when it answers.

        One of ours has by then compiled the kernels of all kinds of requests. It serves nothing: weights have to be
        pushed, and learned before if that was not done here yet; a server that starts anew learns by itself what it was
        told before. Raises `ValueError` for settings that cannot work, and `RunError`, with the end of the log, for a
        server that does not come up or cannot be used.
        """
        assert self._process is None or self._process.status() is not None, "stop the server first"
        self._forget()
        if not self.joined:
            self._start_process()
        api = Api(self.url, self._keys)
        try:
            features = api.features(self._start_timeout_s)
            check_served(features)
            if self.joined and features.depth:  # the launch command of one of ours was asked before
                refuse_greedy(self.settings.rule, [features.device])
                check_rule(features, self.settings.rule)
            if not self.joined and features.depth != self.draft_depth:
                raise RunError(
                    f"it was told to draft {self.draft_depth} tokens and says that it drafts {features.depth}"
                )
            # SGLang switches it off by itself where it cannot
            if features.depth and self.settings.max_batch and not features.info.get("speculative_adaptive"):
                raise RunError(
                    f"it was told to draft for at most {self.settings.max_batch} sequences together and drafts for any "
                    "number; its log says why (speculative_adaptive). Set draft.max_batch = 0"
                )
            if not self.joined:
                self._warm_up(api)
        except (ConnectionError, TimeoutError, RunError, ValueError) as error:
            last = "" if self.alive() else f"; the end of its log:\n{self.log_lines()}"
            self.stop()
            raise RunError(f"server {self.name!r} at {self.url} cannot be used: {error}{last}") from error
        with self._lock:
            self.draft_depth = features.depth
            self._found(features)
        log.info(
            "server %r: SGLang %s at %s, %d ranks, drafting %d tokens",
            self.name,
            features.version,
            self.url,
            features.ranks,
            features.depth,
        )
        self._learn_again()

    def stop(self) -> None:
        """Ends its processes, children included, if they are ours; may be called again, and while `start` waits."""
        with self._lock:
            process, mailbox, self._mailbox = self._process, self._mailbox, None
        if mailbox is not None:
            mailbox.close()
        if process is not None:
            process.stop()
        self._forget()

    def alive(self) -> bool:
        """False once the process has exited; true for a joined server, of which only `probe` knows."""
        process = self._process
        return self.joined or (process is not None and process.status() is None)

    def explain(self) -> None:
        """Before a server of ours that is dead is restarted: how it ended, or, of one that does not answer, has its log
        say where it stands."""
        process = self._process
        if process is None:
            return
        if (status := process.status()) is not None:
            ended = f"ended with status {status}; the end of {process.log}"
            log.warning("server %r %s:\n%s", self.name, ended, process.last_lines(LAST_LINES))
        elif process.dump_stacks():
            log.warning(
                "server %r: where its threads stand is at the end of %s, which a new start renames to %s.before",
                self.name,
                process.log,
                process.log.name,
            )

    def log_lines(self) -> str:
        """The end of its log; "" for a joined server."""
        return self._process.last_lines() if self._process is not None else ""

    def set_draft_depth(self, depth: int) -> None:
        """Restarts the server if it drafts another number of tokens: SGLang cannot change that while it runs.

        Raises `ValueError` without a draft and for a joined server, and as `start` does.
        """
        if depth < 0 or (depth and not self.settings.draft_path and not self.joined):
            raise ValueError(f"server {self.name!r} cannot draft {depth} tokens: it has no draft")
        if depth == self.draft_depth:
            return
        if self.joined:
            raise ValueError(
                f"server {self.name!r} drafts {self.draft_depth} tokens and was not started by this run; restart it "
                f"with --speculative-num-steps {depth}"
            )
        with self._lock:
            self._require_idle("change its draft depth")
        self.stop()
        self.draft_depth = depth
        self.start()

    def _warm_up(self, api: Api) -> None:
        """Has it answer a greedy and a sampled request side by side, with the weights it started from.

        Some kernels are compiled when a batch first needs them, such as those for batches of both kinds, which a probe
        of its health makes of any batch. For minutes it answers nothing then, and would pass for dead.

        Its processes' garbage collectors then leave out what is there: they would walk all of it now and then, while no
        token is made. Newer versions of SGLang tell themselves.
        """
        both: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20}]
        size = {"max_new_tokens": WARM_UP_TOKENS, "ignore_eos": True}
        body = {"input_ids": [[1, 2]] * len(both), "sampling_params": [{**kind, **size} for kind in both]}
        began = time.monotonic()
        api.ask("/generate", body, timeout_s=self._start_timeout_s)
        api.ask("/freeze_gc", {}, admin=True, timeout_s=self._start_timeout_s)
        log.debug("server %r: warm after %.1f s", self.name, time.monotonic() - began)

    def _start_process(self) -> None:
        assert self._folder is not None
        variables = environment(self._gpus)
        known = installed(self._launch, variables, self._start_timeout_s)
        by_batch = self._folder / f"{self.name}.depths.json"
        if self.settings.max_batch:
            self._folder.mkdir(parents=True, exist_ok=True)
            by_batch.write_text(depths(self.draft_depth, self.settings.max_batch))

        def command(port: int) -> list[str]:
            asked = arguments(
                self.settings, self.draft_depth, known, host=self._host, port=port, by_batch=str(by_batch)
            )
            return [*self._launch, *asked]

        def started(process: ServerProcess, url: str) -> None:
            with self._lock:
                self._process, self.url = process, url

        path = self._folder / f"{self.name}.log"
        try:
            start_server(
                command, variables, self._keys, path, host=self._host, timeout_s=self._start_timeout_s, started=started
            )
        except RunError as error:
            raise RunError(f"server {self.name!r} {error}") from None

    def _forget(self) -> None:
        """Nothing is known of what it serves and holds."""
        with self._lock:
            self._forget_weights()
            self._released, self._cut = False, {}

    # Generation

    def check(self, request: Request) -> None:
        """Raises `ValueError` for a request that can never run here."""
        payload(request, "", eos=self._eos)
        if self._vocab_size is not None and not all(0 <= token < self._vocab_size for token in request.tokens):
            raise ValueError(f"request {request.id!r} has a token id outside 0..{self._vocab_size - 1}")
        features = self._known_features()
        room, prompt_room = context_room(features, self.settings.context_length)
        prompt, response = len(request.tokens), request.sampling.max_new_tokens
        if prompt + response > room or prompt > prompt_room:
            raise ValueError(
                f"request {request.id!r} has {prompt} tokens and asks for {response} more, and server {self.name!r} "
                f"has room for {room}; lower rollout.max_new_tokens or data.max_prompt_tokens, or raise "
                "rollout.max_context"
            )

    async def complete(self, http: aiohttp.ClientSession, request: Request) -> Completion:
        """The response to one request.

        Raises `RuntimeError` while it may not generate; aiohttp's errors, with `status` where the server answered that
        it is busy (429, 503) or failed (other 5xx); `RunError` for an answer that cannot be used.
        `Completion.accepted` is empty, since SGLang does not say which tokens were drafted. For `logprobs` and the
        counters see `sglang_requests`.
        """
        features = self._known_features()
        # not the request's own id: aborting "a1" would also abort "a10"
        rid = uuid.uuid4().hex
        body = payload(request, rid, eos=self._eos)
        with self._lock:
            self._require_serving()
            if request.id in self._running:
                raise RuntimeError(f"request {request.id!r} runs already on server {self.name!r}")
            self._running[request.id] = rid
            target, draft, depth = self._versions["target"], self._versions.get("draft", -1), features.depth
        try:
            text = await post(http, self.url + "/generate", body, self._keys.header())
        except CUT as error:
            if not isinstance(error, aiohttp.ClientConnectorError):  # which never reached it
                with self._lock:
                    self._cut[rid] = request.id
            raise
        finally:
            with self._lock:
                self._running.pop(request.id, None)
        return completion(
            request,
            json_object(text, f"{self.url}/generate"),
            depth=depth,
            version=features.version,
            target=target,
            draft=draft if draft >= 0 else None,
        )

    async def abort(self, http: aiohttp.ClientSession, request_ids: Iterable[str] | None = None) -> None:
        """Ends the named requests (all if None), also those that may go on behind a connection that broke; the
        `complete` of others returns what they have."""
        with self._lock:
            ids = {*self._running, *self._cut.values()} if request_ids is None else set(request_ids)
            rids = [rid for request_id, rid in self._running.items() if request_id in ids]
            rids += [rid for rid, request_id in self._cut.items() if request_id in ids]
        for rid in rids:
            await post(http, self.url + "/abort_request", {"rid": rid}, self._keys.header(admin=True))
            with self._lock:
                self._cut.pop(rid, None)

    async def probe(self, http: aiohttp.ClientSession) -> bool:
        """Whether it answers and says that it is well, after making a token where it can. Raises aiohttp's errors."""
        with self._lock:
            # during a session SGLang keeps requests waiting; without its memory it would die of one
            able = self._session is None and not self._released
        path = "/health_generate" if able else "/health"
        async with http.get(self.url + path, headers=self._keys.header()) as answer:
            return answer.status == 200

    def pause(self) -> None:
        """Requests stop where they are, and go on with `resume`; new ones wait."""
        self._control("/pause_generation", {"mode": "retract"})

    def resume(self) -> None:
        """Requests go on after `pause`."""
        self._control("/continue_generation", {})

    # Memory

    def release(self) -> None:
        """Gives the GPU memory of `settings.release` back; weights are kept in the host's. Raises `RuntimeError` while
        requests run or a session is open."""
        if not self.settings.release:
            raise ValueError(f"server {self.name!r} cannot release its memory; set fleet.release")
        with self._lock:
            self._require_idle("release its memory")
            # from here on no request and no probe makes a token
            released, self._released = self._released, True
        if not released:
            self.flush()  # SGLang asserts that nothing runs, a probe's token included
            self._control("/release_memory_occupation", {"tags": list(self.settings.release)})

    def wake(self) -> None:
        """Takes the released memory again; weights are what they were, the cache is empty."""
        with self._lock:
            released = self._released
        if released:
            self._control("/resume_memory_occupation", {"tags": list(self.settings.release)})
            with self._lock:
                self._released = False
