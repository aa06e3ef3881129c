"""`miles-spec bench sync` against the fake of SGLang, whose loader is the real one with a model in this process."""

from __future__ import annotations

import base64
import json
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fake_sglang
import miles_spec.bandwidth
from fake_sglang import FakeSGLang
from miles_spec import sync_bench
from miles_spec.bandwidth import bandwidth, times
from miles_spec.random_models import Shapes, draw, export_for
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.sync import loader
from miles_spec.sync_bench import BOTH, OURS, TARGET, Bench, Row, checks, sync, table
from miles_spec.types import RunError

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake serves from a CPU")


class Served(nn.Module):
    """Takes tensors by name; those in `drop` it ignores once it has learned."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.named = {name: nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()}
        for i, parameter in enumerate(self.named.values()):
            self.register_parameter(f"p{i}", parameter)
        self.drop: set[str] = set()

    def load_weights(self, named: list[tuple[str, Tensor]]) -> None:
        for name, tensor in named:
            if name not in self.drop:
                self.named[name].data.copy_(tensor.clone())  # more than a copy, so that every push comes here


class Engine:
    """Both models, and SGLang's way to each."""

    def __init__(self, version: str, shapes: tuple[Shapes, Shapes]) -> None:
        self.target, self.draft = map(Served, shapes)
        self.plain = 0
        self.drop_plain: str = ""
        self.fake = FakeSGLang(version=version, depth=1, ring=self.ring)

    def ring(self, rank: int, bell: dict[str, Any]) -> None:
        if "payload" in bell:
            self.plain += 1
            for name, tensor in bell["payload"]:
                if name != self.drop_plain:
                    self.target.named[name].data.copy_(tensor)
            return
        models = [self.target] if bell["role"] == "target" else [self.draft, self.target]
        for model in models[: 1 if self.fake.selector else 2]:
            loader.load(model, [("miles_spec", torch.tensor(list(json.dumps(bell).encode()), dtype=torch.uint8))])


@pytest.fixture(params=["0.5.17", "0.5.21"])
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Engine]]:
    """One for each server that the bench asks for."""
    loader._models.clear()
    made: list[Engine] = []
    with ExitStack() as stack:

        def server(bench: Bench, folder: Path, keys: Keys, gpus: object) -> SGLangServer:
            assert (folder / "target" / "tokenizer.json").exists() and (folder / "draft" / "model.safetensors").exists()
            engine = Engine(request.param, export_for(1e6, folder / "again"))
            made.append(engine)
            engine.fake.start()
            stack.callback(engine.fake.stop)
            settings = ServerSettings(model_path="", context_length=64, max_running=1)
            return SGLangServer(name="s", settings=settings, keys=Keys(), join=engine.fake.url)

        monkeypatch.setattr(Bench, "server", server)
        yield made


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's two classes, by which its own call is written, and a fake that reads it."""

    class MultiprocessingSerializer:
        @staticmethod
        def serialize(content: Any, output_str: bool) -> str:
            assert output_str
            return "plain:" + base64.b64encode(pickle.dumps(content)).decode()

    class FlattenedTensorBucket:
        def __init__(self, named_tensors: list[tuple[str, Tensor]]) -> None:
            self.named = named_tensors

        def get_flattened_tensor(self) -> Tensor:
            return torch.cat([tensor.flatten() for _, tensor in self.named])

        def get_metadata(self) -> list[tuple[str, list[int]]]:
            return [(name, list(tensor.shape)) for name, tensor in self.named]

    def read(serialized: str) -> dict[str, Any]:
        if not serialized.startswith("plain:"):
            return original(serialized)
        content = pickle.loads(base64.b64decode(serialized.removeprefix("plain:")))
        if isinstance(content, dict):
            flat, tensors = content["flattened_tensor"], []
            for name, shape in content["metadata"]:
                size = torch.Size(shape).numel()
                tensors.append((name, flat[:size].view(shape)))
                flat = flat[size:]
            content = tensors
        return {"payload": content}

    original = fake_sglang.read_bell
    monkeypatch.setattr(fake_sglang, "read_bell", read)
    for name, members in {
        "sglang.srt.utils": {"MultiprocessingSerializer": MultiprocessingSerializer},
        "sglang.srt.weight_sync.tensor_bucket": {"FlattenedTensorBucket": FlattenedTensorBucket},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        for parent in ("sglang", "sglang.srt", "sglang.srt.weight_sync"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sync_bench, "versions", lambda: {"sglang": "0.5.21"})
    monkeypatch.setattr(loader, "_rank", lambda: 0)


def without_a_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth's process of its own takes seconds to start."""
    monkeypatch.setattr(sync_bench, "bandwidth", lambda *_: 2.0)


def test_every_transport(engines: list[Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_a_broadcast(monkeypatch)
    rows = sync(tmp_path / "s.json", sizes=[1e6])
    assert [(r.transport, r.weights) for r in rows] == [
        (transport, weights) for transport in ("ipc", "disk", "gloo") for weights in (TARGET, BOTH)
    ]
    (engine,) = engines
    drawn = draw(export_for(1e6, tmp_path / "again"), CPU)
    for role, served in ((drawn.target, engine.target), (drawn.draft, engine.draft)):
        assert all(torch.equal(served.named[name], tensor) for name, tensor in role.items())
    sizes = {TARGET: 2 * drawn.parameters, BOTH: 2 * (drawn.parameters + sum(t.numel() for t in drawn.draft.values()))}
    for row in rows:
        assert row.by == OURS and not row.note and row.parameters == drawn.parameters
        assert row.bytes == sizes[row.weights] and len(row.turns) == 5 and row.bandwidth_gb_per_s == 2.0
        assert row.seconds == sorted(row.turns)[2] and row.gb_per_s == pytest.approx(row.bytes / 1e9 / row.seconds)
        assert row.receipts_s and row.receipts_share == pytest.approx(row.receipts_s / row.seconds)
    for target, both in zip(rows[::2], rows[1::2], strict=True):
        assert both.receipts_s > target.receipts_s

    content = json.loads((tmp_path / "s.json").read_text())
    assert content["name"] == "sync" and content["sglang"] == engine.fake.version and len(content["rows"]) == 6
    assert len(content["checks"]) == 9 and content["settings"]["max_total_tokens"] == 4096
    assert [what for what in content["left_out"] if "no sglang" in what and "ipc" in what] == content["left_out"]


def test_sglangs_own_call(engines: list[Engine], plain: None) -> None:
    rows = sync(sizes=[1e6], transports=["ipc"])
    assert [r.by for r in rows] == [OURS, OURS, "SGLang, flattened_bucket", "SGLang, tensors"]
    assert all(len(r.turns) == 5 and not r.note for r in rows) and rows[2].bytes == rows[0].bytes
    (engine,) = engines
    assert engine.plain == 14
    bodies = [body for _, path, body in engine.fake.calls if path == "/update_weights_from_tensor"]
    own = [b for b in bodies if b["serialized_named_tensors"][0].startswith("plain:")]
    assert [b["load_format"] for b in own] == ["flattened_bucket"] * 7 + [None] * 7
    assert not any(b["flush_cache"] for b in own)
    key, value = ("selector", "target") if engine.fake.selector else ("disable_draft_model", True)
    assert all(b[key] == value for b in own)
    whats = [c["what"] for c in checks(rows)]
    assert sum("over SGLang's fastest" in what for what in whats) == 1


def test_what_sglangs_own_call_did_not_load_is_no_result(engines: list[Engine], plain: None) -> None:
    def drop(*arguments: Any) -> list[Row]:
        engines[0].drop_plain = "model.norm.weight"
        return original(*arguments)

    original = Bench._plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "_plain", drop)
        rows = sync(sizes=[1e6], transports=["ipc"])
    assert [r.seconds is None for r in rows] == [False, False, True, True]
    assert "1 of" in rows[2].note and "'model.norm.weight'" in rows[2].note


@pytest.mark.parametrize("engines", ["0.5.21"], indirect=True)
def test_a_push_that_does_not_arrive_is_no_result(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Forgetful(sync_bench.Disk):
        def open(self, *arguments: Any) -> Any:
            engines[0].target.drop = {"model.norm.weight"}
            engines[0].target.named["model.norm.weight"].data.zero_()
            return super().open(*arguments)

        def stop(self) -> None:
            engines[0].target.drop = set()
            super().stop()

    without_a_broadcast(monkeypatch)
    monkeypatch.setattr(sync_bench, "Disk", Forgetful)
    with pytest.raises(RunError, match=r"(?s)1 of our own.*disk: failed.*model\.norm\.weight"):
        sync(tmp_path / "s.json", sizes=[1e6], transports=["ipc", "disk"])
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [(r["transport"], r["seconds"] is None) for r in rows] == [("ipc", False), ("ipc", False), ("disk", True)]


def test_a_server_that_does_not_start_takes_no_other_size_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def start(self) -> None:
            raise RunError("the server did not come up:\na line\nno memory")

        def stop(self) -> None:
            stopped.append(self)

    stopped: list[Absent] = []
    monkeypatch.setattr(Bench, "server", lambda *_: Absent())
    with pytest.raises(RunError, match=r"2 of our own.*did not come up: no memory; 2e\+06"):
        sync(sizes=[1e6, 2e6])
    assert len(stopped) == 2


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    assert sync(tmp_path / "s.json", sizes=[1e6, 3e9], budget_s=1.0) == []
    assert json.loads((tmp_path / "s.json").read_text())["left_out"] == [
        "1e+06 parameters: no time was left",
        "3e+09 parameters: no time was left",
    ]


def test_an_unknown_transport() -> None:
    with pytest.raises(ValueError, match=r"no transport 'rdma'.*ipc, nccl, disk"):
        sync(transports=["rdma"])


def test_the_server_that_is_started(tmp_path: Path) -> None:
    bench = Bench(None, 100.0, ["launch"], {**sync_bench.SERVER, "attention_backend": "triton"})
    server = bench.server(tmp_path, Keys(), (0,))
    assert server.draft_depth == 1 and not server.joined
    assert server.settings.dtype == "bfloat16" and server.settings.draft_path == str(tmp_path / "draft")
    assert server.settings.extra["attention_backend"] == "triton"


def row(weights: str = TARGET, seconds: float = 1.0, by: str = OURS, share: float | None = 0.04) -> Row:
    return Row(
        parameters=10**9,
        transport="ipc",
        by=by,
        weights=weights,
        bytes=2 * 10**9,
        seconds=seconds,
        receipts_share=share if by == OURS else None,
    )


def test_checks() -> None:
    plain = [row(by="SGLang, a", seconds=0.8), row(by="SGLang, b", seconds=2.0)]
    found = checks([row(), row(BOTH, 1.2, share=0.06), *plain])
    assert [(round(c["value"], 6), c["holds"]) for c in found] == [
        (0.2, False),
        (0.04, True),
        (0.06, False),
        (1.25, False),
    ]
    assert all("1 billion parameters, ipc" in c["what"] for c in found)
    found = checks([row(), row(BOTH, 1.05), row(by="SGLang, a", seconds=1.5)])
    assert [c["holds"] for c in found] == [True] * 4
    assert checks([replace(row(), seconds=None, note="failed")]) == []


def test_table_shows_what_was_not_measured() -> None:
    shown = table([row(), replace(row(BOTH), seconds=None, receipts_share=None, note="failed: no room")])
    assert [list(column.cells)[1] for column in shown.columns][-2:] == ["-", "failed: no room"]


@pytest.mark.parametrize(("size", "layers"), [(0.1e9, 12), (1e9, 15), (3e9, 33)])
def test_shapes(size: float, layers: int, tmp_path: Path) -> None:
    target, draft = export_for(size, tmp_path)
    count = sum(torch.Size(shape).numel() for shape in target.values())
    assert (
        count == pytest.approx(size, rel=0.05) and len({n.split(".")[2] for n in target if ".layers." in n}) == layers
    )
    assert sum(torch.Size(shape).numel() for shape in draft.values()) < 0.1 * count and "lm_head.weight" not in target


def test_weights_are_changed_and_moved(tmp_path: Path) -> None:
    drawn = draw(export_for(1e6, tmp_path), CPU)
    before = {name: tensor.clone() for name, tensor in drawn.target.items()}
    for factor in (-2, 4):
        drawn.change()
        assert all(torch.equal(drawn.target[name], factor * tensor) and tensor.any() for name, tensor in before.items())
    drawn.to(torch.device("meta"))
    assert drawn.device.type == "meta" and all(t.device.type == "meta" for t in drawn.draft.values())
    with pytest.raises(ValueError, match="needs parameters"):
        export_for(0, tmp_path)


# Times and bandwidths


def test_times_are_taken_in_turns() -> None:
    order: list[str] = []
    first, second = times(
        [lambda: order.append("a"), lambda: (order.append("b"), time.sleep(0.05))], time.monotonic() + 9
    )
    assert order == ["a", "b"] * 7
    assert len(first) == len(second) == 5 and min(second) >= 0.05 > sorted(first)[2]


@pytest.mark.parametrize(
    ("call_s", "budget_s", "calls", "taken"),
    [(1.0, 4.5, 1, 0), (1.0, 5.5, 5, 3), (1.0, 6.5, 6, 4), (1.0, 99.0, 7, 5), (6.0, 99.0, 5, 3)],
    ids=["too short", "least", "one more", "all", "long"],
)
def test_times_end_in_time(
    call_s: float, budget_s: float, calls: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]

    def call() -> None:
        now[0] += call_s

    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(miles_spec.bandwidth, "time", clock)
    assert times([call], 100.0 + budget_s) == [(call_s,) * taken]
    assert now[0] == 100.0 + calls * call_s


@pytest.mark.parametrize("kind", ["ipc", "disk", "gloo"])
def test_bandwidth(kind: str, tmp_path: Path) -> None:
    assert 1e-3 < bandwidth(kind, 1 << 20, CPU, tmp_path / "path") < 1e3
    assert list(tmp_path.iterdir()) == []
