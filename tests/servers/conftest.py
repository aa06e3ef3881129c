"""A real SGLang server on a CPU, with a tiny target and draft, for the tests of this folder.

`make test-sglang` sets MILES_SPEC_SGLANG_PYTHON to a Python that has SGLang; without it all tests here are skipped. One
server is started per process of the tests and repaired for each test, since a start takes half a minute.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conftest import tiny_tokenizer
from miles_spec.draft.export import export, export_target, served_target, served_tensors
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.kernels import attention
from miles_spec.models import head_weight
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.serving import drafting
from miles_spec.sync.session import Syncer
from miles_spec.sync.transports import Ipc, Transport
from miles_spec.types import Completion, Receipt, Request, Sampling, TensorMeta

PYTHON = os.environ.get("MILES_SPEC_SGLANG_PYTHON", "")
HERE = Path(__file__).parent
SPAWNED, FORKED = str(HERE / "cpu_server.py"), str(HERE / "forked_server.py")
DEPTH = 3
VOCAB = 262
CONTEXT = 256
ARGUMENTS = {
    "device": "cpu",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 4096,
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "skip_server_warmup": True,
    "sleep_on_idle": True,  # else an idle server takes a core from those that start
}
"""What SGLang needs on a CPU, for `[sglang]`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.sglang)
            item.add_marker(pytest.mark.timeout(600))
            if not PYTHON:
                item.add_marker(pytest.mark.skip(reason="needs SGLang in a Python of its own: make test-sglang"))


@dataclass(frozen=True)
class Pair:
    """A target and its draft."""

    model: PreTrainedModel
    draft: DraftHead

    def target(self) -> dict[str, Tensor]:
        """The target's tensors as they are pushed."""
        return dict(served_target(self.model))

    def drafted(self) -> dict[str, Tensor]:
        """The draft's."""
        return dict(served_tensors(self.draft, head_weight(self.model)))

    def other(self, seed: int) -> Pair:
        """The same pair with every tensor a little different, as after a step."""
        pair = copy.deepcopy(self)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (*pair.model.parameters(), *pair.draft.parameters()):
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        return pair

    def embedded(self, depth: int = DEPTH) -> EmbeddedEngine:
        """Our own engine with the same weights."""
        return EmbeddedEngine(self.model, self.draft, tokenizer=tiny_tokenizer(), eos_ids=[2], depth=depth)


def make_pair(vocab_ids: Tensor | None = None) -> Pair:
    """Random, but such that some drafted tokens are accepted: the next token depends mostly on the last one."""
    torch.manual_seed(9)  # none of the greedy responses ends by itself
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,  # SGLang pads the shards on a CPU to multiples of 32
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 1.0 if "embed" in name else 0.4 if "lm_head" in name else 0.09
                parameter.copy_(scale * torch.randn_like(parameter))
    return Pair(model, DraftHead.attach(model, EAGLE, vocab_ids))


@pytest.fixture(scope="session")
def pair() -> Pair:
    return make_pair()


@pytest.fixture(scope="session")
def reduced() -> Pair:
    """Its draft proposes every other token only."""
    return make_pair(torch.arange(0, VOCAB, 2))


@dataclass
class Host:
    """A server, what it serves, and what tests do with it."""

    server: SGLangServer
    keys: Keys
    syncer: Syncer
    pair: Pair

    def learn(self, roles: Sequence[str] = ("target", "draft")) -> None:
        """Has the server find out where the tensors go."""
        weights = {"target": self.pair.target(), "draft": self.pair.drafted()}
        for role in roles:
            if role in self.server.versions():
                metas = {n: TensorMeta(shape=tuple(t.shape), dtype="float32") for n, t in weights[role].items()}
                self.server.learn(role, metas)  # type: ignore[arg-type]

    def push(
        self, pair: Pair | None = None, transport: Transport | None = None, version: int | None = None
    ) -> list[Receipt]:
        """Pushes both roles (`self.pair` from then on)."""
        self.pair = pair or self.pair
        if transport is not None:
            self.syncer.transport.stop()
            self.syncer.transport = transport
        version = max(self.server.versions().values()) + 1 if version is None else version
        return self.syncer.push(
            [self.server],
            version=version,
            target=self.pair.target(),
            draft_version=version,
            draft=self.pair.drafted(),
        )

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All at once."""

        async def run() -> list[Completion]:
            async with aiohttp.ClientSession() as http:
                return await asyncio.gather(*(self.server.complete(http, request) for request in requests))

        return asyncio.run(run())

    def reference(self, request: Request, completion: Completion) -> Tensor:
        """`[n]` log-probabilities of the response at the request's temperature, by transformers alone."""
        plain = LlamaForCausalLM._from_config(self.pair.model.config, attn_implementation="eager").eval()
        plain.load_state_dict(self.pair.model.state_dict())
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([[*request.tokens, *completion.tokens]])).logits[0]
        scores = logits[len(request.tokens) - 1 : -1] / (request.sampling.temperature or 1.0)
        return scores.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]

    def checksums(self) -> Mapping[str, str]:
        """SGLang's own, by served tensor; a draft's names start with `draft.`."""
        return json.loads(self.control("/weights_checker", {"action": "checksum"}))["ranks"][0]["checksums"]

    def control(self, path: str, body: Mapping[str, Any]) -> str:
        """A control call with the admin key."""
        return Api(self.server.url, self.keys).ask(path, body, admin=True)

    def repair(self, pair: Pair) -> None:
        """Runs, drafts, and serves `pair`, verified."""
        self.pair = pair
        if not self.server.alive():
            self.server.stop()
            self.server.start()
        if self.server.draft_depth != DEPTH:
            self.server.set_draft_depth(DEPTH)
        self.syncer.transport.stop()  # of the test before
        self.syncer.transport = Ipc(torch.device("cpu"))
        self.syncer._depths.clear()
        if "draft" not in self.server.manifest():
            self.learn()
        assert all(receipt.verified for receipt in self.push())


Start = Callable[..., Host]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server that serves nothing yet: `start(name, pair, depth=..., from_folder=..., max_batch=...,
    script=..., **[sglang])`. With `from_folder` SGLang reads the draft's weights from its folder."""
    servers: list[SGLangServer] = []

    def run(
        name: str,
        pair: Pair,
        depth: int = DEPTH,
        from_folder: bool = False,
        max_batch: int = 0,
        script: str = FORKED,
        **extra: object,
    ) -> Host:
        folder = tmp_path_factory.mktemp(name)
        export_target(pair.model, tiny_tokenizer(), folder / "target", dtype=torch.float32)
        export(pair.draft, folder / "draft", dtype=torch.float32)
        keys = Keys.random()
        settings = ServerSettings(
            model_path=str(folder / "target"),
            dtype="float32",
            context_length=CONTEXT,
            max_running=8,
            max_batch=max_batch,
            extra={**ARGUMENTS, **extra},
        )
        settings = drafting(settings, pair.draft, folder / "draft")
        server = SGLangServer(
            name=name,
            settings=replace(settings, draft_vocabulary=from_folder or settings.draft_vocabulary),
            keys=keys,
            draft_depth=depth,
            launch=[PYTHON, script],
            folder=folder,
            eos=[2],
            push_timeout_s=60,
        )
        servers.append(server)
        server.start()
        return Host(server, keys, Syncer(Ipc(torch.device("cpu")), bucket_bytes=64 << 10), pair)

    yield run
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def shared(start: Start, pair: Pair) -> Host:
    return start("shared", pair, script=SPAWNED)


@pytest.fixture
def host(shared: Host, pair: Pair) -> Host:
    """The shared server, which drafts and serves `pair`, whatever the test before has done to it."""
    shared.repair(pair)
    return shared


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    """Eight prompts, greedy."""
    prompts = [(1, 5 + i, 40, 41, 42) for i in range(4)] + [(1, 30 + i, *range(60, 60 + 3 * i)) for i in range(4)]
    sampling = Sampling(temperature=0.0, max_new_tokens=20)
    return [Request(id=f"r{i}", tokens=tokens, sampling=sampling, seed=i) for i, tokens in enumerate(prompts)]


Sampled = Callable[..., list[Request]]


@pytest.fixture(scope="session")
def sampled(requests: list[Request]) -> Sampled:
    """The same prompts with other settings of `Sampling`."""
    return lambda **sampling: [replace(r, sampling=replace(r.sampling, **sampling)) for r in requests]
