"""`miles-spec bench sync`: what a push of weights into a real SGLang server costs.

Beside our own pushes it measures, in the same run, the bandwidth of the way that the weights take, and SGLang's own
`update_weights_from_tensor` on the same server. Weights are random, in bfloat16, and shaped like a Llama's.

Invariant: only pushes that arrived are timed. Each of ours verified, and behind those by SGLang's own call the server's
digests are compared with the trainer's, whose weights were others before.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from miles_spec.bandwidth import bandwidth, times
from miles_spec.provenance import check, commit, versions, write_result
from miles_spec.random_models import Drawn, draw, export_for
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.rollout.sglang_process import LAUNCH
from miles_spec.sync.collective import Collective
from miles_spec.sync.digest import digests
from miles_spec.sync.dtypes import metas_of
from miles_spec.sync.session import Syncer
from miles_spec.sync.transports import Disk, Ipc, Transport, buckets
from miles_spec.types import Role, RunError

SIZES = (0.1e9, 1e9, 3e9)
TRANSPORTS = ("ipc", "nccl", "disk")
BUCKET_BYTES = 256 << 20
DRAFT_SHARE, RECEIPT_SHARE, OVER_PLAIN = 0.10, 0.05, 1.0
"""The most that a draft adds to the target's push, that receipts take of a push, and that a push takes in units of
SGLang's."""
PLAIN_S = 120.0
"""For one of SGLang's own calls."""
SERVER: dict[str, Any] = {
    "max_total_tokens": 4096,
    "mem_fraction_static": 0.5,
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "skip_server_warmup": True,
}
"""For `[sglang]`: nothing is generated, so a server starts without what only generation needs."""
OURS = "miles-spec"
TARGET, BOTH = "target", "target + draft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of push; None where it was not measured."""

    parameters: int
    """Of the target."""
    transport: str
    by: str
    """`OURS`, or which of SGLang's own formats."""
    weights: str
    """`TARGET` or `BOTH`."""
    bytes: int
    """Of the weights."""
    seconds: float | None = None
    """Median, from the call to its return: digests and the flush of the cache included."""
    turns: tuple[float, ...] = ()
    """Seconds of each."""
    gb_per_s: float | None = None
    bandwidth_gb_per_s: float | None = None
    """What the transport's way alone carries: a copy within the device, a broadcast, or a file written and read."""
    receipts_s: float | None = None
    """The digests alone, the trainer's and the server's."""
    receipts_share: float | None = None
    """Of `seconds`."""
    note: str = ""


def sync(
    result: Path | None = None,
    *,
    sizes: Sequence[float] = SIZES,
    transports: Sequence[str] = TRANSPORTS,
    budget_s: float = 540.0,
    launch: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Measures every transport at every size, one server for each size, prints it, and writes it to `result`, which
    after each transport holds all that is done. What would not fit into `budget_s` is left out, and named.

    `sizes` are parameters of the target; `launch` starts a server and `settings` are SGLang's own, as in `[sglang]`.
    `nccl` is gloo without a GPU. Raises `ValueError` for a transport that does not exist, and `RunError` if a push of
    ours failed, when all the rest is done.
    """
    for name in transports:
        if name not in TRANSPORTS:
            raise ValueError(f"there is no transport {name!r} to measure; there are {', '.join(TRANSPORTS)}")
    bench = Bench(result, budget_s, launch or LAUNCH, {**SERVER, **(settings or {})})
    for size in sizes:
        bench.size(size, transports)
    failed = [f"{r.parameters:.2g} parameters, {r.transport}: {r.note}" for r in bench.rows if r.by == OURS and r.note]
    if failed:
        raise RunError(f"{len(failed)} of our own pushes failed: " + "; ".join(failed))
    return bench.rows


class Bench:
    """The rows of one call."""

    def __init__(self, result: Path | None, budget_s: float, launch: Sequence[str], settings: dict[str, Any]) -> None:
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        """What was not measured, and why."""
        self._result = result
        self._commit = commit()  # before a tracked result is written, which makes the checkout differ
        self._until = time.monotonic() + budget_s
        self._launch, self._settings = launch, settings
        self._sglang = ""
        self._start_s = 60.0
        """What a server takes to start."""
        self._console = Console()
        if not self._console.is_terminal:  # a log has no width of its own
            self._console = Console(width=150)

    def size(self, parameters: float, transports: Sequence[str]) -> None:
        """All transports at one size."""
        if time.monotonic() + self._start_s > self._until:
            self._leave_out(f"{parameters:.2g} parameters: no time was left")
            return
        gpus = torch.cuda.device_count()
        torch.cuda.empty_cache()  # of the size before; the server takes a share of what is free
        with TemporaryDirectory(prefix="miles-spec-") as name:
            folder = Path(name)
            model = export_for(parameters, folder)
            keys = Keys.random()
            server = self.server(folder, keys, (0,) if gpus else ())
            try:
                start = time.monotonic()
                drawn = draw(model, torch.device("cuda", 0) if gpus else torch.device("cpu"))
                server.start()
                assert server.features is not None
                self._sglang = server.features.version
                self._start_s = time.monotonic() - start
                for role, named in drawn.roles():
                    server.learn(role, metas_of(named.items()))
                # the one that goes to another GPU comes last, so that weights lie on one GPU at a time
                for transport in sorted(transports, key=lambda name: name == "nccl"):
                    if transport == "nccl" and gpus == 1:
                        self._leave_out(f"{parameters:.2g} parameters, nccl: it needs a second GPU")
                        continue
                    if transport == "nccl" and gpus:
                        drawn.to(torch.device("cuda", 1))
                    self._case(server, keys, drawn, transport, folder)
            except RunError as error:  # a server that does not start takes no other size's result away
                lines = str(error).splitlines()  # the first, and the last of the log
                note = "failed: " + " ".join(dict.fromkeys((lines[0], lines[-1])))
                row = Row(parameters=int(parameters), transport="all", by=OURS, weights=TARGET, bytes=0, note=note)
                self._take([row])
            finally:
                server.stop()

    def server(self, folder: Path, keys: Keys, gpus: Sequence[int]) -> SGLangServer:
        """The one that is pushed to, not started."""
        settings = ServerSettings(
            model_path=str(folder / "target"),
            draft_path=str(folder / "draft"),
            dtype="bfloat16",
            context_length=1024,
            max_running=4,
            extra=self._settings,
        )
        return SGLangServer(
            name="server",
            settings=settings,
            keys=keys,
            draft_depth=1,
            launch=self._launch,
            gpus=gpus,
            folder=folder / "logs",
            start_timeout_s=max(60.0, self._until - time.monotonic()),
        )

    def _case(self, server: SGLangServer, keys: Keys, drawn: Drawn, name: str, folder: Path) -> None:
        transport = _transport(name, drawn.device, folder)
        kind = "gloo" if name == "nccl" and drawn.device.type == "cpu" else name
        where = f"{drawn.parameters:.2g} parameters, {kind}"
        try:
            carried = bandwidth(kind, _bytes(drawn.target), drawn.device, folder / "bandwidth")
            rows = _ours(server, drawn, kind, transport, carried, self._until)
        except (RuntimeError, ValueError, OSError) as error:  # a transport that does not work here is a result too
            rows = [_failed(drawn, kind, OURS, error)]
        finally:
            transport.stop()
        if kind == "ipc":
            rows += self._plain(server, keys, drawn, where)
        if not rows:
            self._leave_out(f"{where}: no time was left")
        self._take(rows)

    def _plain(self, server: SGLangServer, keys: Keys, drawn: Drawn, where: str) -> list[Row]:
        if "sglang" not in versions():
            self._leave_out(f"{where}, SGLang's own call: this Python has no sglang to write it with")
            return []
        rows = []
        for form in PLAIN:
            try:
                drawn.change()  # so that these pushes, too, have something to change
                turns = times([lambda form=form: plain_push(server, keys, drawn.target, form)], self._until)[0]  # type: ignore[misc]
                if turns:
                    _same(server, drawn.target)
                    rows.append(_row(drawn, "ipc", f"SGLang, {form}", TARGET, turns))
                else:
                    self._leave_out(f"{where}, SGLang's own call, {form}: no time was left")
            except Exception as error:  # of whichever kind, it takes no result of ours away
                rows.append(_failed(drawn, "ipc", f"SGLang, {form}", error))
        return rows

    def _take(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if rows:
            self._console.print(table(rows))
        self._write()

    def _leave_out(self, what: str) -> None:
        self.left_out.append(what)
        self._console.print(f"left out: {what}")
        self._write()

    def _write(self) -> None:
        if self._result is not None:
            write_result(
                self._result,
                "sync",
                [asdict(row) for row in self.rows],
                checks(self.rows),
                commit=self._commit,
                sglang=self._sglang,
                settings=self._settings,
                bucket_bytes=BUCKET_BYTES,
                left_out=self.left_out,
            )


# Pushes


def _ours(
    server: SGLangServer, drawn: Drawn, kind: str, transport: Transport, carried: float, until: float
) -> list[Row]:
    """The target alone, and with its draft, in turns; none if there is no time for them."""
    syncer = Syncer(transport, bucket_bytes=BUCKET_BYTES)

    def push(**draft: Any) -> None:
        receipts = syncer.push([server], version=0, target=drawn.target, **draft)
        bad = [f"{r.role}: {'; '.join(r.mismatched[:3])}" for r in receipts if not r.verified]
        if bad or len(receipts) != 1 + bool(draft):
            raise RunError(", ".join(bad) or "there is no receipt of the draft")

    turns = times([push, lambda: push(draft_version=0, draft=drawn.draft)], until)
    if not turns[0]:
        return []
    target_s = _receipts(server, "target", drawn.target)
    both_s = target_s + _receipts(server, "draft", drawn.draft)
    return [
        _row(drawn, kind, OURS, weights, taken, carried=carried, receipts_s=receipts_s)
        for weights, taken, receipts_s in zip((TARGET, BOTH), turns, (target_s, both_s), strict=True)
    ]


def _receipts(server: SGLangServer, role: Role, named: Mapping[str, Tensor]) -> float:
    """Seconds of all digests of a role, of both sides, one side after the other as in a push."""
    server.begin_update(0, (role,))
    try:
        sides = times([lambda: digests(named.items()), lambda: server.deliver({"do": "digest"})], math.inf)
    finally:
        server.end_update()
    return sum(map(statistics.median, sides))


# SGLang's own call

PLAIN = ("flattened_bucket", "tensors")
"""One flat tensor for a bucket, with a table; or each tensor by itself."""


def plain_push(server: SGLangServer, keys: Keys, named: Mapping[str, Tensor], form: str) -> None:
    """The target in buckets of the same size as ours, by the calls that SGLang and its users make. Like ours it ends
    with a flush of the cache; there are no receipts. Raises `RunError` where the server refuses."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    assert server.features is not None
    api, selector = Api(server.url, keys), server.features.selector
    if not next(iter(named.values())).is_cuda:
        mp.set_sharing_strategy("file_system")  # file descriptors go to child processes alone
    if selector:
        api.ask("/begin_weight_update", {"selector": "target"}, admin=True, timeout_s=PLAIN_S)
    for bucket in buckets(named.items(), BUCKET_BYTES):
        content: Any = bucket
        if form == "flattened_bucket":
            flat = FlattenedTensorBucket(named_tensors=bucket)
            content = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        body = {
            "serialized_named_tensors": [MultiprocessingSerializer.serialize(content, output_str=True)] * server.ranks,
            "load_format": form if form == "flattened_bucket" else None,
            "flush_cache": False,
            **({"selector": "target"} if selector else {"disable_draft_model": True}),
        }
        api.ask("/update_weights_from_tensor", body, admin=True, timeout_s=PLAIN_S)
    if selector:
        api.ask("/end_weight_update", {}, admin=True, timeout_s=PLAIN_S)
    server.flush()


def _same(server: SGLangServer, named: Mapping[str, Tensor]) -> None:
    """Raises `RunError` unless the server says that it serves `named` as its target."""
    server.begin_update(0, ("target",))
    served = server.end_update()["target"]
    sent = digests(named.items())
    if wrong := [name for name in sent if served.get(name) != sent[name]]:
        raise RunError(f"{len(wrong)} of {len(sent)} tensors did not arrive, {wrong[0]!r} among them")


# What the weights travel by


def _transport(name: str, device: torch.device, folder: Path) -> Transport:
    if name == "ipc":
        return Ipc(device)
    if name == "disk":
        return Disk(folder / "push")
    return Collective("nccl" if device.type == "cuda" else "gloo", device)


# Results


def _row(
    drawn: Drawn,
    kind: str,
    by: str,
    weights: str,
    turns: tuple[float, ...],
    *,
    carried: float | None = None,
    receipts_s: float | None = None,
    note: str = "",
) -> Row:
    size = _bytes(drawn.target) + (_bytes(drawn.draft) if weights == BOTH else 0)
    seconds = statistics.median(turns) if turns else None
    return Row(
        parameters=drawn.parameters,
        transport=kind,
        by=by,
        weights=weights,
        bytes=size,
        seconds=seconds,
        turns=turns,
        gb_per_s=size / 1e9 / seconds if seconds else None,
        bandwidth_gb_per_s=carried,
        receipts_s=receipts_s,
        receipts_share=receipts_s / seconds if receipts_s and seconds else None,
        note=note,
    )


def _failed(drawn: Drawn, kind: str, by: str, error: Exception) -> Row:
    first = str(error).split("\n")[0]
    return _row(drawn, kind, by, TARGET, (), note=f"failed: {first}")


def _bytes(named: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in named.values())


def checks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The goals that these rows can be held against, met or not."""
    found = []
    for parameters, kind in dict.fromkeys((r.parameters, r.transport) for r in rows):
        here = [r for r in rows if (r.parameters, r.transport) == (parameters, kind) and r.seconds]
        ours = {r.weights: r for r in here if r.by == OURS}
        where = f"{parameters / 1e9:.2g} billion parameters, {kind}"
        target, both = ours.get(TARGET), ours.get(BOTH)
        if target and both:
            assert target.seconds and both.seconds
            more = both.seconds / target.seconds - 1
            goal = f"at most {DRAFT_SHARE}"
            found.append(check(f"{where}: what the draft adds to the target's push", more, goal, more <= DRAFT_SHARE))
        for weights, row in ours.items():
            share, goal = row.receipts_share, f"at most {RECEIPT_SHARE}"
            assert share is not None
            found.append(check(f"{where}, {weights}: receipts of the push", share, goal, share <= RECEIPT_SHARE))
        plain = min((r.seconds for r in here if r.by != OURS and r.seconds), default=None)
        if target and target.seconds and plain:
            ratio, goal = target.seconds / plain, f"at most {OVER_PLAIN}"
            found.append(check(f"{where}: our push over SGLang's fastest", ratio, goal, ratio <= OVER_PLAIN))
    return found


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bytes": ("GB", lambda x: f"{x / 1e9:.3f}"),
    "seconds": ("s", lambda x: f"{x:.4f}"),
    "gb_per_s": ("GB/s", lambda x: f"{x:.2f}"),
    "bandwidth_gb_per_s": ("bandwidth, GB/s", lambda x: f"{x:.2f}"),
    "receipts_s": ("receipts, s", lambda x: f"{x:.4f}"),
    "receipts_share": ("of the push", lambda x: f"{x:.1%}"),
}


def table(rows: Sequence[Row]) -> Table:
    """One case's rows for a terminal."""
    title = f"{rows[0].parameters / 1e9:.3g} billion parameters, {rows[0].transport}"
    shown = Table(title=title, title_justify="left", box=None, header_style="bold")
    shown.add_column("by", min_width=24)
    shown.add_column("weights", min_width=14)
    for head, _ in COLUMNS.values():
        shown.add_column(head, justify="right")
    shown.add_column("")
    for row in rows:
        values = [(getattr(row, name), text) for name, (_, text) in COLUMNS.items()]
        shown.add_row(row.by, row.weights, *("-" if v is None else text(v) for v, text in values), row.note)
    return shown
