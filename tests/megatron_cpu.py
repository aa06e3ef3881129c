"""Processes for tests of megatron-core without a GPU: four workers over gloo, started once, that run functions of test
modules in any layout of ranks.

`run(fn, table, size, *args)` calls `fn(arguments, *args)` in the first `size` workers, `arguments` being what the table
`[megatron]` makes of it and its groups being there, and returns what each gave, in rank order. A worker's exception is
raised with its traceback in the message. The patches of `install` are global, so no test may call it itself.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.distributed as dist

WORLD = 4
TIMEOUT_S = 120
installed = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")

FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "empty_like",
    "zeros_like",
    "ones_like",
)


def install() -> None:
    """Makes what megatron-core asks of `torch.cuda` happen on the CPU, in this process from now on, and all of it
    eagerly: what it has compiled would be compiled by every process anew."""
    torch._dynamo.config.disable = True

    def replaced(function: Callable[..., Any]) -> Callable[..., Any]:
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            return function(*map(_here, args), **{name: _here(value) for name, value in kwargs.items()})

        return on_cpu

    for name in FACTORIES:
        setattr(torch, name, replaced(getattr(torch, name)))
    tensor, cuda = torch.Tensor, torch.cuda
    kind = tensor.type
    tensor.to = replaced(tensor.to)
    # optimizers know their parameters by this text
    tensor.type = lambda self, *args, **kwargs: (
        kind(self, *args, **kwargs) if args or kwargs else kind(self).replace("torch.", "torch.cuda.")
    )
    tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("synchronize", "empty_cache", "set_device", "current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Nothing())
    cuda.Stream = cuda.Event = _Nothing
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    exchange = dist.all_to_all_single

    def all_to_all(output: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        # sizes are brought to the host as lists, but those that lie there already stay tensors
        kwargs = {k: v.tolist() if torch.is_tensor(v) else v for k, v in kwargs.items()}
        return exchange(output, data, *args, **kwargs)

    dist.all_to_all_single = all_to_all
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = cuda.get_rng_state
    random._set_cuda_rng_state = cuda.set_rng_state


class _Nothing:
    """A stream, an event, and what is done with them: on a CPU everything happens in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> type[_Nothing]:
        return _Nothing


def _here(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value


def _nurse(pairs: Sequence[tuple[Connection, Connection]]) -> None:
    """Rank 0, which becomes the others too once everything is imported: that takes longer than most tests."""
    os.setsid()  # so that all end together
    for tests, _ in pairs:
        tests.close()  # so that no test process means no more tasks
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    install()
    from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from miles_spec.train import megatron  # noqa: F401

    rank = next((r for r in range(1, WORLD) if not os.fork()), 0)
    pipe = pairs[rank][1]
    with contextlib.suppress(EOFError):
        while True:
            task = pipe.recv()
            # a process for each task: hundreds of process groups with their threads end with it
            child = os.fork()
            if not child:
                _answer(rank, pipe, *task)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if status:
                pipe.send((False, f"the process ended with wait status {status}"))


def _answer(
    rank: int, pipe: Connection, store: str, fn: Callable[..., Any], table: Any, size: int, args: tuple[Any, ...]
) -> None:
    from miles_spec.train.megatron_args import MegatronArguments
    from miles_spec.train.megatron_model import initialize

    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S)
        )
        arguments = MegatronArguments.make(table, size)
        initialize(arguments)
        pipe.send((True, fn(arguments, *args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    pipe.recv()  # tensors are shared while they are received


class _Workers:
    """Forked at first use, so they know every test module that pytest has collected by then; they end with pytest."""

    def __init__(self) -> None:
        self.pipes: list[Connection] = []
        self.stores = itertools.count()

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.folder = tempfile.TemporaryDirectory()
        pairs = [context.Pipe() for _ in range(WORLD)]
        self.pipes = [ours for ours, _ in pairs]
        self.process = context.Process(target=_nurse, args=(pairs,), daemon=True)
        self.process.start()
        for _, theirs in pairs:
            theirs.close()
        atexit.register(self.stop)

    def stop(self) -> None:
        if self.pipes:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
            self.folder.cleanup()
            atexit.unregister(self.stop)
        self.pipes = []


_workers = _Workers()


def run(
    fn: Callable[..., Any], table: Mapping[str, Any], size: int, *args: Any, timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """Raises `AssertionError` for a worker that raised, and for one that does not answer in time."""
    if not _workers.pipes:
        _workers.start()
    store = Path(_workers.folder.name) / str(next(_workers.stores))
    for pipe in _workers.pipes[:size]:
        pipe.send((str(store), fn, table, size, args))
    answers: dict[Connection, Any] = {}
    pipes = _workers.pipes[:size]
    while len(answers) < size:
        ready = wait([pipe for pipe in pipes if pipe not in answers], timeout_s)
        told = {pipe: pipe.recv() for pipe in ready}
        failed = [f"rank {pipes.index(pipe)} of {size}: {text}" for pipe, (ok, text) in told.items() if not ok]
        if failed or not ready:
            _workers.stop()  # the others may wait for this one for ever
            raise AssertionError("\n".join(failed) or f"a rank of {size} did not answer within {timeout_s} s")
        answers |= {pipe: value for pipe, (_, value) in told.items()}
    for pipe in pipes:
        pipe.send("received")
    return [answers[pipe] for pipe in pipes]
