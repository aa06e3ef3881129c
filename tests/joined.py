"""A server that was joined, which is the fake of SGLang, and requests to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp

from fake_sglang import FakeSGLang
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.types import Completion, Request, Sampling, TensorMeta

SETTINGS = ServerSettings(model_path="/m", draft_path="/d", context_length=200, max_running=4)
METAS = {"w": TensorMeta(shape=(2, 3), dtype="float32")}


def joined(fake: FakeSGLang, **settings: Any) -> SGLangServer:
    server = SGLangServer(
        name="e0", settings=SETTINGS, keys=Keys(api=fake.api_key, admin=fake.admin_key), join=fake.url, **settings
    )
    server.start()
    return server


def serve(server: SGLangServer, version: int = 1) -> None:
    """Pushes nothing under a version, which the fake takes."""
    server.begin_update(version, ["target"])
    server.end_update()


def request(name: str = "r", tokens: int = 6, **sampling: Any) -> Request:
    return Request(id=name, tokens=(1, 2), sampling=Sampling(max_new_tokens=tokens, **sampling))


def ask(server: SGLangServer, *requests: Request) -> list[Completion | BaseException]:
    async def run() -> list[Completion | BaseException]:
        async with aiohttp.ClientSession() as http:
            return await asyncio.gather(*(server.complete(http, r) for r in requests), return_exceptions=True)

    return asyncio.run(run())


def during(server: SGLangServer, act: Callable[[aiohttp.ClientSession], Any], fake: FakeSGLang) -> list[Any]:
    """What two slow requests return, and `act`, which is called while they run."""

    async def run() -> list[Any]:
        async with aiohttp.ClientSession() as http:
            tasks = [asyncio.create_task(server.complete(http, request(n, 100))) for n in ("r1", "r10")]
            while len(fake.running) < 2:
                await asyncio.sleep(0.01)
            acted = act(http)
            if asyncio.iscoroutine(acted):
                await acted
            return await asyncio.gather(*tasks)

    return asyncio.run(run())
