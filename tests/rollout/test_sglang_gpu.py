"""A real server on GPU 0, beside this process: weights over CUDA IPC, sleep and wake, and what goes wrong there.

Needs SGLang in this Python. MILES_SPEC_TEST_SGLANG is a JSON object for `[sglang]`, such as the attention backend.
Nothing here waits for long: what is late fails with the server's stacks and the end of its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conftest import tiny_tokenizer
from miles_spec.draft.export import export, export_target, served_target, served_tensors
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE, NEXTN
from miles_spec.kernels import attention
from miles_spec.models import head_weight
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.fleet import Fleet
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.sync.collective import Collective
from miles_spec.sync.session import Syncer, TargetSyncError
from miles_spec.sync.transports import Ipc, Transport
from miles_spec.types import Completion, Receipt, Request, Role, Sampling, TensorMeta

try:
    version("sglang")
except PackageNotFoundError:
    pytest.skip("needs SGLang in this Python", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

T = TypeVar("T")
DEPTH = 3
VOCAB = 262
CONTEXT = 256
RUNNING = 8
LIMIT_S = 30.0
"""For anything but a start."""
START_S = 300.0
SETTINGS: dict[str, Any] = {
    "max_total_tokens": 8192,
    "mem_fraction_static": 0.5,
    "cuda_graph_bs_decode": [1, 2, 4, 8],  # so that batches of 3 and 5 are padded
    "skip_server_warmup": True,
    "soft_watchdog_timeout": 10,
    **json.loads(os.environ.get("MILES_SPEC_TEST_SGLANG", "{}")),
}


class Host:
    """A server, what it serves, and what tests do with it."""

    def __init__(self, server: SGLangServer, model: PreTrainedModel, draft: DraftHead) -> None:
        self.server = server
        self.syncer = Syncer(Ipc(torch.device("cuda:0")), bucket_bytes=32 << 20)
        self.take(model, draft)

    def take(self, model: PreTrainedModel, draft: DraftHead) -> None:
        """What is pushed from now on."""
        self.target: dict[str, Tensor] = dict(served_target(model))
        self.draft: dict[str, Tensor] = dict(served_tensors(draft, head_weight(model)))

    def learn(self) -> None:
        roles: list[tuple[Role, dict[str, Tensor]]] = [("target", self.target), ("draft", self.draft)]
        for role, tensors in roles:
            metas = {n: TensorMeta(shape=tuple(t.shape), dtype="bfloat16") for n, t in tensors.items()}
            self.within(2 * LIMIT_S, f"learning the {role}", partial(self.server.learn, role, metas))

    def push(self, transport: Transport | None = None, at: str = "cuda:0", number: int | None = None) -> list[Receipt]:
        """Pushes both roles from the device `at`."""
        if transport is not None:
            self.syncer.transport.stop()
            self.syncer.transport = transport
        target = {name: tensor.to(at) for name, tensor in self.target.items()}
        draft = {name: tensor.to(at) for name, tensor in self.draft.items()}
        number = max(self.server.versions().values()) + 1 if number is None else number

        def work() -> list[Receipt]:
            return self.syncer.push([self.server], version=number, target=target, draft_version=number, draft=draft)

        return self.within(LIMIT_S, "a push", work)

    def generate(self, requests: Sequence[Request], at_once: bool = False) -> list[Completion]:
        """One after another, which is bitwise the same every time; or all at once. The prefix cache is empty first."""

        async def run() -> list[Completion]:
            async with aiohttp.ClientSession() as http:
                assert await self.server.probe(http)
                if at_once:
                    return await asyncio.gather(*(self.server.complete(http, request) for request in requests))
                return [await self.server.complete(http, request) for request in requests]

        self.sleepless("a flush", self.server.flush)
        return self.within(LIMIT_S, f"{len(requests)} responses", lambda: asyncio.run(run()))

    def sleepless(self, what: str, work: Callable[[], T]) -> T:
        """`within` the usual limit."""
        return self.within(LIMIT_S, what, work)

    def within(self, limit_s: float, what: str, work: Callable[[], T]) -> T:
        """What `work` gives; fails with all that is to be known if it takes longer."""
        done: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            pytest.fail(f"{what} took longer than {limit_s:g} s\n{self.evidence()}", pytrace=False)
        if errors:
            raise errors[0]
        return done[0]

    def evidence(self) -> str:
        """What the GPU does, and the end of the log with the stacks of all of the server's processes."""
        process = self.server._process
        if process is None:
            return "the server has no process"
        for _ in range(2):  # what stands in the same place twice is stuck there
            process.dump_stacks()
            time.sleep(1.5)
        return f"exit status {process.status()}; GPU: {_gpu()}\n{process.last_lines(150)}"

    def kill(self) -> None:
        process = self.server._process
        assert process is not None
        os.killpg(process.pid, signal.SIGKILL)

    def fleet(self) -> Fleet:
        """Of this one server; `recover` pushes what it served."""
        number = self.server.versions()["target"]

        def recover(_: SGLangServer) -> None:
            self.push(Ipc(torch.device("cuda:0")), number=number)

        return Fleet(
            [self.server],
            recover=recover,
            max_running=RUNNING,
            max_context=CONTEXT,
            releases=True,
            probe_s=0.5,
            dead_after_s=LIMIT_S,
            start_timeout_s=START_S,
            request_timeout_s=LIMIT_S,
        )

    def repair(self) -> None:
        """Runs, awake, and serves what it should, whatever the test before has done."""
        if not self.server.alive():
            self.server.stop()
            self.server.start()
        self.sleepless("waking", self.server.wake)
        self.syncer._depths.clear()
        if self.server.draft_depth != DEPTH:
            self.server.set_draft_depth(DEPTH)
        if "draft" not in self.server.manifest():
            self.learn()
        assert all(receipt.verified for receipt in self.push(Ipc(torch.device("cuda:0"))))


def _gpu() -> str:
    ask = ["nvidia-smi", "--query-gpu=utilization.gpu,power.draw,memory.used,memory.free", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout.strip()
    return "no nvidia-smi"


def _model() -> LlamaForCausalLM:
    """About 0.1e9 weights in bfloat16, random, but such that the next token depends mostly on the last one: then the
    draft agrees often, and greedy tokens are far from ties."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                # what the layers add changes one token in six; the others follow from the last one
                writes = "o_proj" in name or "down_proj" in name
                scale = 1.0 if "embed" in name else 0.4 if "lm_head" in name else 0.0015 if writes else 0.03
                parameter.copy_(scale * torch.randn_like(parameter))
    return model.to("cuda:0", torch.bfloat16)


def _draft(model: LlamaForCausalLM) -> DraftHead:
    """Agrees often: it looks at the newest token more than a fresh draft does."""
    draft = DraftHead.attach(model, EAGLE, None, torch.Generator().manual_seed(0))
    hidden = EAGLE.concat.index("hidden") * model.config.hidden_size
    with torch.no_grad():
        draft.fc.weight[:, hidden : hidden + model.config.hidden_size].mul_(0.2)
    return draft


@contextlib.contextmanager
def _serving(name: str, folder: Path, model: PreTrainedModel, draft: DraftHead) -> Iterator[Host]:
    """A server that has learned both, serves them, and has answered."""
    export_target(model, tiny_tokenizer(), folder / "target", dtype=torch.bfloat16)
    export(draft, folder / "draft", dtype=torch.bfloat16)
    server = SGLangServer(
        name=name,
        settings=ServerSettings(
            model_path=str(folder / "target"),
            draft_path=str(folder / "draft"),
            dtype="bfloat16",
            context_length=CONTEXT,
            max_running=RUNNING,
            release=("weights", "kv_cache"),
            extra=SETTINGS,
        ),
        keys=Keys.random(),
        draft_depth=DEPTH,
        launch=[sys.executable, "-m", "miles_spec.rollout.launch"],
        gpus=[0],
        folder=folder,
        eos=[2],
        vocab_size=VOCAB,
        start_timeout_s=START_S,
        push_timeout_s=LIMIT_S,
    )
    host = Host(server, model, draft)
    try:
        server.start()
        host.learn()
        assert all(receipt.verified for receipt in host.push())
        # kernels are compiled at their first use, which may take longer than anything later
        asked = REQUESTS + [replace(r, sampling=replace(r.sampling, temperature=0.7)) for r in MANY]
        for batch in (REQUESTS[:1], asked):
            host.within(180, "the first responses", partial(_plainly, host, batch))
        yield host
    finally:
        server.stop()
        host.syncer.transport.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    model = _model()
    with _serving("gpu", tmp_path_factory.mktemp("server"), model, _draft(model)) as host:
        yield host


def _plainly(host: Host, requests: Sequence[Request]) -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            await asyncio.gather(*(host.server.complete(http, request) for request in requests))

    asyncio.run(run())


@pytest.fixture
def host(shared: Host) -> Host:
    shared.repair()
    return shared


GREEDY = Sampling(temperature=0.0, max_new_tokens=40, ignore_eos=True)
REQUESTS = [
    Request(id=f"r{i}", tokens=(1, *range(7 + 9 * i, 10 + 9 * i + 6 * i)), sampling=GREEDY, seed=i) for i in range(4)
]
MANY = [replace(REQUESTS[i % 4], id=f"m{i}", seed=i) for i in range(5)]


def alike(before: Sequence[Completion], after: Sequence[Completion]) -> None:
    """The same tokens, and as many drafted ones accepted: a draft that came back wrong shows there alone."""
    assert [c.tokens for c in after] == [c.tokens for c in before]
    assert [c.spec for c in after] == [c.spec for c in before]


def test_both_roles_arrive_over_cuda_ipc_and_the_draft_is_alive(host: Host) -> None:
    target, draft = host.push()
    assert target.verified and target.tensors == len(host.target)
    assert draft.verified and draft.tensors == len(host.draft)
    completions = host.generate(REQUESTS)
    assert all(len(c.tokens) == 40 for c in completions)
    accepted = sum(sum(c.spec.accepted) for c in completions)
    assert accepted > 0.5 * sum(sum(c.spec.drafted) for c in completions), "the draft should agree often"


@pytest.mark.parametrize("tags", [("kv_cache",), ("weights", "kv_cache")])
def test_sleep_and_wake_change_nothing(host: Host, tags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.server, "settings", replace(host.server.settings, release=tags))
    before = host.generate(REQUESTS)
    host.sleepless("a release", host.server.release)
    host.sleepless("waking", host.server.wake)
    alike(before, host.generate(REQUESTS))
    assert len(host.generate(MANY, at_once=True)) == 5
    host.sleepless("a release", host.server.release)
    host.sleepless("waking", host.server.wake)
    assert all(receipt.verified for receipt in host.push())
    alike(before, host.generate(REQUESTS))
    assert len(host.generate(MANY, at_once=True)) == 5


def test_memory_that_was_written_over_meanwhile_does_no_harm(host: Host) -> None:
    before = host.generate(REQUESTS)
    awake = torch.cuda.mem_get_info(0)[0]
    host.sleepless("a release", host.server.release)
    free = torch.cuda.mem_get_info(0)[0]
    assert free > awake + (64 << 20), "nothing was given back"
    # all but a little is filled, as training may do; 0x7f7f7f7f is no token's place and 0x7f7f a huge number
    blocks = [torch.full((1 << 30,), 0x7F, dtype=torch.uint8, device="cuda:0") for _ in range((free >> 30) - 4)]
    torch.cuda.synchronize(0)
    del blocks
    torch.cuda.empty_cache()
    host.sleepless("waking", host.server.wake)
    for count in (3, 5):  # padded to 4 and 8
        many = host.generate(MANY[:count], at_once=True)
        assert [len(c.tokens) for c in many] == [40] * count
    alike(before, host.generate(REQUESTS))


def test_twenty_cycles_hold_no_more_memory_and_serve_the_same(host: Host) -> None:
    before, asleep = host.generate(REQUESTS[:2]), []
    for cycle in range(20):
        host.sleepless("a release", host.server.release)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(0)
        asleep.append(total - free - torch.cuda.memory_reserved(0))
        host.sleepless("waking", host.server.wake)
        if cycle % 4 == 3:
            assert all(receipt.verified for receipt in host.push())
        alike(before, host.generate(REQUESTS[:2]))
    assert asleep[-1] - asleep[4] < 64 << 20, [n >> 20 for n in asleep]


def test_a_second_release_and_a_second_wake_do_nothing(host: Host) -> None:
    before = host.generate(REQUESTS[:2])
    for call in (host.server.release, host.server.release, host.server.wake, host.server.wake):
        host.sleepless(call.__name__, call)
    assert host.server.alive()
    alike(before, host.generate(REQUESTS[:2]))


@pytest.mark.parametrize("when", ["asleep", "waking"])
def test_a_server_that_dies_around_its_sleep_is_started_anew(
    host: Host, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = host.generate(REQUESTS)
    fleet, control = host.fleet(), host.server._control

    def kill_first(path: str, *rest: Any) -> None:
        if path == "/resume_memory_occupation":
            host.kill()
        control(path, *rest)

    host.sleepless("a release", fleet.release)
    if when == "asleep":
        host.kill()
        time.sleep(0.5)
    else:
        monkeypatch.setattr(host.server, "_control", kill_first)
    try:
        host.within(2 * LIMIT_S, "waking", fleet.wake)
        monkeypatch.undo()
        after = host.within(START_S, "responses of a server that is started anew", lambda: fleet.generate(REQUESTS))
        assert fleet.restarts == 1
    finally:
        fleet._health.close()
    assert [len(c.tokens) for c in after] == [40] * 4
    alike(before, host.generate(REQUESTS))


class Flipped(Ipc):
    """Flips one byte of one tensor, once, as it would on the way."""

    def __init__(self, name: str) -> None:
        super().__init__(torch.device("cuda:0"))
        self.name = name

    def send(self, members: Any, role: Any, bucket: Any) -> Any:
        named = dict(bucket)
        if self.name in named:
            named[self.name] = named[self.name].clone()
            named[self.name].view(-1).view(torch.uint8)[5] ^= 1
            self.name = ""
        return super().send(members, role, list(named.items()))


def test_a_flipped_byte_is_noticed(host: Host) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"  # served as a part of qkv_proj
    with pytest.raises(TargetSyncError, match=name):
        host.push(Flipped(name))
    assert host.server.versions()["target"] == -1
    assert all(receipt.verified for receipt in host.push(Ipc(torch.device("cuda:0"))))
    target, draft = host.push(Flipped("fc.weight"))
    assert target.verified and draft.verified and draft.attempts == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_weights_arrive_over_nccl_from_another_gpu(host: Host) -> None:
    before = host.generate(REQUESTS)
    transport = Collective("nccl", torch.device("cuda:1"), timeout_s=LIMIT_S / 2)
    for _ in range(2):  # the second time with the same group
        assert all(receipt.verified for receipt in host.push(transport, at="cuda:1"))
        alike(before, host.generate(REQUESTS))
        transport = None  # type: ignore[assignment]


def _latent(seed: int) -> tuple[PreTrainedModel, DraftHead]:
    """DeepSeek-V3 with its MTP layer, small but for the sizes of a head, which SGLang's kernels are made for. Both lean
    on their attention: with the matrices of seed 0 absorbed the others' tokens are wrong and their drafts refused."""
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=256,
        n_routed_experts=12,  # powers of two go to a kernel of flashinfer's that has to be compiled first
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    torch.manual_seed(seed)
    scales = {"embed": 1.0, "lm_head": 0.4, "o_proj": 0.02, "down_proj": 0.003}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() >= 2:
                scale = next((scale for part, scale in scales.items() if part in name), 0.03)
                tensor.copy_(scale * torch.randn_like(tensor))
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * torch.randn_like(tensor))
        draft = DraftHead.attach(model, NEXTN, None, torch.Generator().manual_seed(seed))
        draft.layer.self_attn.o_proj.weight.mul_(50)  # which starts near zero
        draft.layer.self_attn.kv_b_proj.weight.mul_(30 if seed == 0 else 1)
    return model.to("cuda:0", torch.bfloat16), draft.to("cuda:0", torch.bfloat16)


def _behind(model: PreTrainedModel, completions: Sequence[Completion]) -> float:
    """How far the logit of a greedy response's token lies below the largest, at most, by transformers in float32."""
    plain = type(model)._from_config(model.config, attn_implementation="eager").to("cuda:0").float().eval()
    plain.load_state_dict(model.state_dict())
    most = 0.0
    for request, completion in zip(REQUESTS, completions, strict=True):
        tokens = torch.tensor([[*request.tokens, *completion.tokens]], device="cuda:0")
        with torch.no_grad():
            logits = plain(input_ids=tokens).logits[0, len(request.tokens) - 1 : -1]
        chosen = logits.gather(1, tokens[0, len(request.tokens) :, None])[:, 0]
        most = max(most, float((logits.max(-1).values - chosen).max()))
    return most


def _accepted(completions: Sequence[Completion]) -> float:
    """Drafted tokens accepted per step."""
    return sum(sum(c.spec.accepted) for c in completions) / sum(c.spec.verify_steps for c in completions)


def test_latent_attention_is_absorbed_anew_with_every_push(tmp_path_factory: pytest.TempPathFactory) -> None:
    """DeepSeek-V3: two tensors that SGLang loads only together, and matrices that it derives from a third."""
    with _serving("latent", tmp_path_factory.mktemp("latent"), *_latent(0)) as host:
        model, draft = _latent(1)
        host.take(model, draft)
        assert [(r.role, r.verified) for r in host.push()] == [("target", True), ("draft", True)]
        theirs = host.generate(REQUESTS)
        assert _behind(model, theirs) < 1  # rounded to bfloat16 0.1, with the matrices of seed 0 over 5
        engine = EmbeddedEngine(model, draft, eos_ids=[2], dtype=torch.bfloat16, depth=DEPTH)
        ours = engine.generate(REQUESTS)
        assert [len(c.tokens) for c in theirs] == [len(c.tokens) for c in ours] == [40] * 4
        assert _accepted(ours) > 0.5  # with the matrices of seed 0 below 0.1
        assert abs(_accepted(theirs) - _accepted(ours)) < 0.25
        host.sleepless("a release", host.server.release)
        host.sleepless("waking", host.server.wake)
        assert all(receipt.verified for receipt in host.push())
        alike(theirs, host.generate(REQUESTS))
