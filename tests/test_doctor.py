"""What `miles-spec doctor` finds, each fault injected; the small server is our own engine here."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fake_sglang import COMMAND, FLAGS
from miles_spec import doctor as module
from miles_spec.config import DraftConfig, FleetConfig, RolloutConfig, RunConfig
from miles_spec.doctor import DEPTH, Finding, doctor, findings, flags, gpus, loader, shared_memory, versions
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.rollout.sglang_args import Installed
from miles_spec.serve import Hosted
from miles_spec.sync.session import Syncer
from miles_spec.sync.transports import InProcess
from miles_spec.types import RunError

METRICS = {"enable_metrics": {"options": ["--enable-metrics"], "takes": "none", "default": "False"}}
KNOWN = Installed(version="0.5.21", flags={**FLAGS, **METRICS}, platforms=("cuda",))
SERVED = RunConfig(rollout=RolloutConfig(engine="sglang", temperature=0.0))


def levels(found: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in found]


def fault(found: Iterable[Finding]) -> str:
    """The text of the only fault."""
    (text,) = [finding.text for finding in found if finding.level == "FAULT"]
    return text


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise module.importlib.metadata.PackageNotFoundError
        return "9.9"

    monkeypatch.setattr(module.importlib.metadata, "version", version)
    assert [str(f.text) for f in versions()][1:] == ["transformers 9.9", "triton is not installed here"]
    assert levels(versions()) == ["ok", "ok", "note"]


def test_every_argument() -> None:
    assert levels(flags(SERVED, KNOWN)) == ["ok", "ok"]
    for name in ("speculative_token_map", "speculative_use_rejection_sampling", "enable_draft_weights_cpu_backup"):
        less = replace(KNOWN, flags={k: v for k, v in KNOWN.flags.items() if k != name})
        assert f"has no argument --{name.replace('_', '-')}" in fault(flags(SERVED, less))
    assert "no argument --enable-metrics" in fault(flags(SERVED, replace(KNOWN, flags=FLAGS)))


def test_arguments_of_the_run_file() -> None:
    assert "no argument --tp-sise" in fault(flags(replace(SERVED, sglang={"tp_sise": 2}), KNOWN))
    assert "sglang.port cannot be set" in fault(flags(replace(SERVED, sglang={"port": 2}), KNOWN))


def test_a_platform_that_is_not_exact() -> None:
    cpu, sampled = replace(KNOWN, platforms=("cpu",)), replace(SERVED, rollout=RolloutConfig(engine="sglang"))
    assert "greedily" in fault(flags(sampled, cpu))
    assert levels(flags(SERVED, cpu)) == ["ok", "ok"]
    assert levels(flags(RunConfig(), cpu)) == ["ok", "ok", "note"]
    assert levels(flags(replace(sampled, draft=replace(SERVED.draft, enabled=False)), cpu)) == ["ok", "ok"]


def test_the_loader(tmp_path: Path) -> None:
    assert levels(loader([sys.executable])) == ["ok"]
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    broken.chmod(0o755)
    assert fault(loader([str(broken)])).endswith(": no such module")
    assert levels(loader(["docker", "run"])) == ["note"]


def test_shared_memory(tmp_path: Path) -> None:
    assert levels(shared_memory(FleetConfig(bucket_mb=1), tmp_path)) == ["ok"]
    assert levels(shared_memory(FleetConfig(bucket_mb=1 << 40), tmp_path)) == ["note"]
    assert levels(shared_memory(FleetConfig(), tmp_path / "absent")) == ["note"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU, as far as torch says; no driver's tool."""
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "mem_get_info", lambda i: (3 << 30, 4 << 30))
    monkeypatch.setattr(cuda, "get_device_name", lambda i: "a GPU")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("gpu")
def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def share() -> None:
        if refused:
            raise RuntimeError("not supported")

    storage = SimpleNamespace(untyped_storage=lambda: SimpleNamespace(_share_cuda_=share))
    monkeypatch.setattr(module.torch, "zeros", lambda *_, **__: storage)
    refused = False
    assert levels(gpus()) == ["note", "ok", "ok"]
    assert "GPU 0: a GPU, 3.0 of 4.0 GiB free" in [f.text for f in gpus()]
    refused = True
    assert "not supported" in fault(gpus())
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "a:b,expandable_segments:True")
    assert "PYTORCH_ALLOC_CONF" in fault(gpus())


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert levels(gpus()) == ["note"]


def test_without_sglang(tmp_path: Path) -> None:
    absent = FleetConfig(launch=(str(tmp_path / "absent"),))
    assert "FAULT" not in levels(findings(RunConfig(fleet=absent), server=True))
    assert "check fleet.launch" in fault(findings(replace(SERVED, fleet=absent), server=True))


def test_a_fault_ends_with_an_error_and_starts_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "served", lambda config: pytest.fail("a server was started"))
    with pytest.raises(RunError, match="1 fault found"):  # the fake does not know --enable-metrics
        doctor(replace(SERVED, fleet=FleetConfig(launch=COMMAND)), say=said.append)
    assert [line[:6] for line in said if "enable-metrics" in line] == ["FAULT "]
    assert said[-1].startswith("note  no server was started, because")


class Local:
    """Our own engine in place of `Hosted`, with faults."""

    def __init__(self, config: RunConfig, policy: Any, *_: object) -> None:
        self.weights, self.policy, self.stops = policy.weights, policy, 0
        loaded, depth = policy.loaded, config.draft.num_steps
        self.fleet: Any = EmbeddedEngine(loaded.model, policy.draft, dtype=loaded.dtype, rule="greedy", depth=depth)
        self.fleet.features, self.fleet.ranks = SimpleNamespace(version="0.5.21", device="cpu"), 1
        self.syncer = Syncer(InProcess())
        made.append(self)

    def start(self) -> None:
        pass

    def members(self) -> list[Any]:
        return [self.fleet]

    def push(self, members: Any, *, self_test: bool = False) -> Any:
        now, send = self.weights(), self.syncer.self_test if self_test else self.syncer.push
        return send(members, version=1, target=now.target, draft_version=1, draft=now.draft)

    def stop(self) -> None:
        self.stops += 1


made: list[Local] = []


def run(monkeypatch: pytest.MonkeyPatch, hosted: type[Local]) -> list[Finding]:
    monkeypatch.setattr(module, "Hosted", hosted)
    made.clear()
    found = list(module.served(SERVED))
    assert [one.stops for one in made] == [1]
    return found


def test_a_server_that_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, Local)
    assert levels(found) == ["ok"] * 5, found
    assert f"of at most {DEPTH + 1}" in found[3].text
    assert "embed_tokens" in found[4].text


def test_weights_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their dtype is another; here it is computed on the CPU."""
    small = module.small
    monkeypatch.setattr(module, "small", lambda device: small(torch.device("cuda")))
    assert levels(run(monkeypatch, Local)) == ["ok"] * 5
    assert {t.dtype for t in made[0].policy.weights().target.values()} == {torch.bfloat16}


def test_a_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Local):
        def start(self) -> None:
            raise RunError("exited with status 3")

    (found,) = run(monkeypatch, Dead)
    assert found == Finding("FAULT", "start of a server: exited with status 3")


@pytest.mark.parametrize("draft", [{"family": "nextn", "layers": 2}, {"path": "absent"}, {"enabled": False}])
def test_the_small_server_has_a_draft_of_its_own(draft: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the run file says of another model's."""

    def start(hosted: Hosted) -> None:
        raise RunError("not started here")

    monkeypatch.setattr(Hosted, "start", start)
    (found,) = module.served(replace(SERVED, draft=DraftConfig(**draft)))
    assert found == Finding("FAULT", "start of a server: not started here")
    small = module.trial(replace(SERVED, draft=DraftConfig(**draft))).draft
    assert (small.enabled, small.fresh_family, small.layers, small.path) == (True, "eagle", 1, "")


def test_settings_of_no_server_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fault(module.served(replace(SERVED, fleet=FleetConfig(gpus=(0,))))).startswith(
        "settings of a server: fleet.gpus names GPUs"
    )


def test_a_server_that_takes_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Local):
        def start(self) -> None:
            self.fleet.load_weights = lambda role, tensors: None

    found = run(monkeypatch, Deaf)
    assert levels(found) == ["ok", "FAULT"]
    assert found[1].text.startswith("push: ")


def test_a_server_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Local):
        def push(self, members: Any, *, self_test: bool = False) -> Any:
            receipts = super().push(members, self_test=self_test)
            with torch.no_grad():
                self.fleet.model.lm_head.weight.copy_(self.fleet.model.lm_head.weight.flip(0))
            return receipts

    found = run(monkeypatch, Wrong)
    assert levels(found) == ["ok", "ok", "FAULT"]
    assert found[2].text.startswith("generation: after (1, ")


def test_a_server_that_does_not_speculate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Local):
        def push(self, members: Any, *, self_test: bool = False) -> Any:
            receipts = super().push(members, self_test=self_test)
            self.fleet.set_draft_depth(0)
            return receipts

    assert fault(run(monkeypatch, Plain)).startswith("speculation: 0 drafted tokens")


def test_a_server_that_notices_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(Local):
        def push(self, members: Any, *, self_test: bool = False) -> Any:
            if self_test:
                return super().push(members, self_test=True)
            self.syncer.transport.send([], "target", list(self.weights().target.items()))
            return []

    assert fault(run(monkeypatch, Blind)) == (
        "a flipped byte: a flipped byte of model.embed_tokens.weight was not noticed"
    )
