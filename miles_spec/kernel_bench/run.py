"""The command itself: every contest's calls checked, timed, printed, written, and held against the goals.

Invariant: a call that gives something wrong is named and not timed. On a GPU everything runs at the sizes of real
models; without one small inputs show that the reference is right, and Triton's kernels too where they run in its
interpreter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from miles_spec.kernel_bench.contests import CPU, GPU, TINY, Contest, Entry, Setting, Sizes
from miles_spec.kernel_bench.losses import draft_loss_contests, logprob_contests
from miles_spec.kernel_bench.measure import ENDLESS_MS, Call, Meter
from miles_spec.kernel_bench.packs import attention_contests, shift_contests
from miles_spec.kernels.backend import interpreted, triton
from miles_spec.provenance import check, commit, write_result
from miles_spec.types import RunError

KERNELS: dict[str, Callable[[Setting], Iterator[Contest]]] = {
    "draft_loss": draft_loss_contests,
    "shift": shift_contests,
    "logprob": logprob_contests,
    "attention": attention_contests,
}
PEER_TOLERANCE = 0.1
"""Peers round where we do not; this only tells another computation from the same."""
OVER_FLOOR = {4096: 1.15, 2048: 1.3}
"""By hidden size, the most that the draft's loss may take, in units of its matrix products."""
OVER_PEER = 1.5
PEAK_GIB = 1.5
ERROR = {"draft_loss": 2e-3, "logprob": 2e-3, "attention": 1e-2}
"""The largest relative error of losses, and of attention's outputs, which half precision itself rounds."""
RANKS_TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one call of a contest gave and cost; None where it was not measured."""

    kernel: str
    case: str
    figures: dict[str, float]
    """The case's size, by symbol."""
    name: str
    kind: str
    """`ours`, `peer`, `floor` or `scale`, as in `Entry`."""
    wrong: bool = False
    """Whether it failed or gave something else than it must."""
    value_error: float | None = None
    """Relative, against float64; of integers and copies 0 or not."""
    gradient_error: float | None = None
    """The largest of all gradients', likewise."""
    ms: float | None = None
    """Median."""
    spread: float | None = None
    """Between the quartiles, in units of the median."""
    host_ms: float | None = None
    """Median until the call returned to the host, with nothing queued before it; None without a GPU."""
    over_peer: float | None = None
    """Of ours: the best peer's time in units of this one's."""
    over_floor: float | None = None
    """This one's time in units of the floor's."""
    peak_gib: float | None = None
    """Memory above the inputs, results included."""
    launches: int | None = None
    """Kernels, copies and fills."""
    syncs: int | None = None
    """Waits of the host for the device."""
    note: str = ""


def kernels(result: Path | None = None, only: Sequence[str] = (), sizes: Sizes | None = None) -> list[Row]:
    """Runs everything that this machine can, or the kernels named in `only`, prints it, and writes it to `result`,
    which after each contest holds all that is done.

    Raises `ValueError` for an unknown kernel, and `RunError` if a kernel of ours is wrong, when all the rest is done.
    """
    for name in only:
        if name not in KERNELS:
            raise ValueError(f"there is no kernel {name!r} to measure; there are {', '.join(KERNELS)}")
    names = [name for name in KERNELS if name in only or not only]
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    setting = Setting(
        device=device,
        dtype=torch.bfloat16 if gpu else torch.float32,
        sizes=sizes or (GPU if gpu else CPU),
        backend="auto" if gpu else "reference",
        peers=gpu,
    )
    console = _console()
    rows: list[Row] = []
    write = _writer(result, "kernels")
    _run(setting, names, Meter(device), console, rows, write)
    if not gpu:
        console.print("There is no GPU: small inputs in float32 and the reference in plain torch; no time of Triton's.")
        if triton is not None and interpreted():
            small = replace(setting, sizes=TINY, backend="triton")
            _run(small, names, None, console, rows, write)
        else:
            console.print("Triton's kernels were not checked: its interpreter runs them under TRITON_INTERPRET=1.")
    _raise_for_wrong(rows)
    return rows


def kernels_of_ranks(ranks: int, result: Path, sizes: Sizes | None = None) -> None:
    """The shift again with the pack cut over `ranks` processes of this machine, over NCCL on as many GPUs, over gloo
    without any; prints it and writes it to `result`, which after each contest holds all that is done.

    Raises `ValueError` if there are fewer GPUs, and `RunError` if a kernel of ours is wrong.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise ValueError(f"{ranks} ranks need as many GPUs, and there are {gpus}")
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, f"{folder}/store", str(result), sizes), nprocs=ranks)  # type: ignore[attr-defined]
    _raise_for_wrong([Row(**row) for row in json.loads(result.read_text())["rows"]])


def _rank(rank: int, ranks: int, store: str, result: str, sizes: Sizes | None) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=RANKS_TIMEOUT,
        device_id=device if gpu else None,
    )
    setting = Setting(
        device=device,
        dtype=torch.bfloat16 if gpu else torch.float32,
        sizes=sizes or (GPU if gpu else CPU),
        backend="auto" if gpu else "reference",
        peers=gpu,
        group=dist.group.WORLD,
    )
    write = _writer(Path(result) if rank == 0 else None, "kernels_of_ranks", ranks=ranks)
    _run(setting, ["shift"], Meter(device, setting.group), _console(quiet=rank > 0), [], write)
    dist.destroy_process_group()


def _run(
    setting: Setting,
    names: Sequence[str],
    meter: Meter | None,
    console: Console,
    rows: list[Row],
    write: Callable[[Sequence[Row]], None],
) -> None:
    """Adds every contest's rows to `rows`, and hands all of them to `write` each time."""
    for name in names:
        for contest in KERNELS[name](setting):
            settled = settle(contest, meter, setting)
            console.print(table(settled))
            rows += settled
            write(rows)


def _writer(result: Path | None, name: str, **more: Any) -> Callable[[Sequence[Row]], None]:
    """What puts rows and their checks in the file `result`, if there is one, in the place of what it held."""
    if result is None:
        return lambda rows: None
    at = commit()  # a tracked result that was written once would make the checkout differ

    def write(rows: Sequence[Row]) -> None:
        write_result(result, name, [asdict(r) for r in rows], checks(rows), commit=at, **more)

    return write


def settle(contest: Contest, meter: Meter | None, setting: Setting) -> list[Row]:
    """Checks every call, then times those that are right, in turns; without a meter it checks alone."""
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    ours = "ours" if setting.backend != "triton" else "ours in Triton's interpreter"
    for entry in contest.entries:
        row = Row(
            kernel=contest.kernel,
            case=contest.case,
            figures=dict(contest.figures),
            name=entry.name.replace("ours", ours, 1) if entry.kind == "ours" else entry.name,
            kind=entry.kind,
            note=entry.note,
        )
        if meter is None and entry.kind != "ours":
            continue
        row, call = _checked(row, entry, contest)
        usable = call is not None
        if meter is not None and meter.largest(float(not usable)) > 0:  # all ranks go on with the same calls
            row, usable = row if not usable else replace(row, note="failed on another rank"), False
        rows[entry.name] = row
        if usable and call is not None:
            calls[entry.name] = call
    if meter is None:
        return list(rows.values())
    for name, time in meter.times(calls).items():
        peak = meter.peak_gib(calls[name])
        rows[name] = replace(rows[name], ms=time.ms, spread=time.spread, host_ms=time.host_ms, peak_gib=peak)
        if contest.count and time.ms < ENDLESS_MS:
            launches, syncs = meter.launches(calls[name]), meter.syncs(calls[name])
            rows[name] = replace(rows[name], launches=launches, syncs=syncs)
    best = min((r.ms for r in rows.values() if r.kind == "peer" and r.ms), default=None)
    for entry in contest.entries:
        row = rows[entry.name]
        if row.ms and best and entry.kind == "ours" and entry.rival:
            row = replace(row, over_peer=best / row.ms)
        least = rows[entry.floor].ms if entry.floor else None
        if row.ms and least:
            row = replace(row, over_floor=row.ms / least)
        rows[entry.name] = row
    return list(rows.values())


def _checked(row: Row, entry: Entry, contest: Contest) -> tuple[Row, Call | None]:
    """The row with its errors, and the call if it may be timed."""
    try:
        call = entry.load()
        given = call()
        errors = (0.0, None) if entry.truth is None else entry.truth.errors(entry.view(given))
    except ModuleNotFoundError as e:
        return replace(row, note=f"not installed: {e}"), None
    except ImportError as e:
        return replace(row, note=f"cannot be imported: {e}"), None
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return replace(row, wrong=True, note="does not fit in the GPU's memory"), None
    except Exception as e:  # a call that fails takes no other's result away
        text = str(e).strip().split("\n")[0]
        return replace(row, wrong=True, note=f"failed: {type(e).__name__}: {text}"), None
    if entry.truth is None:
        return row, call
    row = replace(row, value_error=_finite(errors[0]), gradient_error=_finite(errors[1]))
    limits = entry.tolerance or contest.tolerance
    if entry.kind != "ours":
        limits = max(PEER_TOLERANCE, limits[0]), max(PEER_TOLERANCE, limits[1])
    if all(e is None or e <= limit for e, limit in zip(errors, limits, strict=True)):
        return row, call
    found = " and ".join("none" if e is None else f"{e:.1e}" for e in errors)
    return replace(row, wrong=True, note=f"WRONG, not timed: relative error of value and gradient {found}"), None


def _finite(error: float | None) -> float | None:
    return error if error is None or math.isfinite(error) else None


def checks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The goals that these rows can be held against, met or not."""
    found = []
    ours = [r for r in rows if r.kind == "ours"]
    for case in dict.fromkeys((r.kernel, r.case) for r in ours):
        here = [r for r in ours if (r.kernel, r.case) == case]
        where = ": ".join(case)
        right = not any(r.wrong for r in here)
        if case[0] == "shift":
            worst = _largest([e for r in here for e in (r.value_error, r.gradient_error)])
            found.append(check(f"{where}, entries that differ", worst, "0", right and worst == 0))
        else:
            worst = _largest([r.value_error for r in here])
            limit = ERROR[case[0]]
            holds = right and worst is not None and worst <= limit
            found.append(check(f"{where}, relative error of values", worst, f"at most {limit}", holds))
        for row in here:
            found += _cost_checks(row, where)
        peak = _largest([r.peak_gib for r in here])
        if case[0] == "draft_loss" and peak is not None:
            found.append(
                check(f"{where}, GiB above the inputs", peak, f"at most {PEAK_GIB}", right and peak <= PEAK_GIB)
            )
    return found


def _cost_checks(row: Row, where: str) -> list[dict[str, Any]]:
    found = []
    if row.kernel == "draft_loss" and row.over_peer is not None and row.peak_gib is not None:
        holds = row.over_peer >= OVER_PEER
        found.append(check(f"{where}, {row.name}, over the best peer", row.over_peer, f"at least {OVER_PEER}", holds))
        limit = None if "depths" in row.figures else OVER_FLOOR.get(int(row.figures["H"]))
        if limit is not None and row.over_floor is not None:
            holds = row.over_floor <= limit
            found.append(check(f"{where}, {row.name}, over the floor", row.over_floor, f"at most {limit}", holds))
    if row.syncs is not None:
        found.append(check(f"{where}, {row.name}, host synchronisations", row.syncs, "0", row.syncs == 0))
    if row.launches is not None and row.name == "ours, draft_targets" and row.figures["cp"] == 1:
        found.append(check(f"{where}, {row.name}, launches", row.launches, "1", row.launches == 1))
    return found


def _largest(values: Sequence[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _raise_for_wrong(rows: Sequence[Row]) -> None:
    wrong = [f"{r.kernel} ({r.case}): {r.name}: {r.note}" for r in rows if r.kind == "ours" and r.wrong]
    if wrong:
        raise RunError(f"{len(wrong)} of our own calls went wrong: " + "; ".join(wrong))


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ms": ("ms", lambda x: f"{x:.3f}"),
    "spread": ("spread", lambda x: f"{x:.1%}"),
    "host_ms": ("host ms", lambda x: f"{x:.3f}"),
    "over_peer": ("faster than best peer", lambda x: f"{x:.2f}x"),
    "over_floor": ("of floor", lambda x: f"{x:.2f}x"),
    "peak_gib": ("GiB", lambda x: f"{x:.2f}"),
    "value_error": ("error", lambda x: f"{x:.0e}" if x else "0"),
    "gradient_error": ("gradient's", lambda x: f"{x:.0e}" if x else "0"),
    "launches": ("launches", str),
    "syncs": ("syncs", str),
}


def table(rows: Sequence[Row]) -> Table:
    """One contest's rows for a terminal, without the columns that nothing has."""
    shown = Table(title=f"{rows[0].kernel}: {rows[0].case}", title_justify="left", box=None, header_style="bold")
    shown.add_column("", min_width=42)
    columns = [c for c in COLUMNS if any(getattr(r, c) is not None for r in rows)]
    for column in columns:
        shown.add_column(COLUMNS[column][0], justify="right")
    shown.add_column("")
    for row in rows:
        values = [(getattr(row, c), COLUMNS[c][1]) for c in columns]
        shown.add_row(row.name, *("-" if v is None else text(v) for v, text in values), row.note)
    return shown


def _console(quiet: bool = False) -> Console:
    console = Console(quiet=quiet)
    # a log has no width of its own, and 80 columns would break every row
    return console if console.is_terminal else Console(quiet=quiet, width=170)
