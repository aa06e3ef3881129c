"""Which of SGLang's settings make rollouts fastest on one GPU, for each number `k` of drafted tokens?

    python benchmarks/sglang_settings.py                                    # all cases; goes on where it stopped
    python benchmarks/sglang_settings.py --only 0 3 --backends flashinfer   # some of them
    python benchmarks/sglang_settings.py --budget-s 540                     # as many as fit

One server per case, several started at the same time on the one GPU, then measured one after another: a server without
requests costs no GPU time. Every case is measured at several batch sizes, from the difference of a long and a short
generation, so that prefill and HTTP are not in it. Weights are SGLang's dummy ones, since a step costs the same
whatever they are; hardly a drafted token is accepted, so read steps, not tokens. What a depth is worth follows from the
accept length: `breakeven_accept_length` is where it begins to pay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from miles_spec import models
from miles_spec.draft.export import export, export_target
from miles_spec.draft.modules import DraftHead
from miles_spec.draft.spec import EAGLE
from miles_spec.provenance import check, commit, hardware, versions, write_result
from miles_spec.rollout.sglang import SGLangServer
from miles_spec.rollout.sglang_api import Api, Keys
from miles_spec.rollout.sglang_args import ServerSettings
from miles_spec.types import RunError
from miles_spec.widen import mlp_width

RESULT = Path(__file__).parent / "results" / "sglang_settings.json"
PROMPT_TOKENS = 32
SHORT_TOKENS, LONG_TOKENS = 16, 80
"""New tokens of the two generations whose difference is measured."""
FIRST_WAVE_S = 150.0
"""What the first servers are expected to take, started and measured, before one was seen."""
BASE: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "fa3-attention": {"attention_backend": "fa3"},  # what SGLang chooses by itself on Hopper
    "flashinfer-attention": {"attention_backend": "flashinfer"},
    "flashinfer-sampling": {"sampling_backend": "flashinfer"},
    "flashinfer": {"attention_backend": "flashinfer", "sampling_backend": "flashinfer"},
    # one switch for the target's steps, the draft's and verification: SGLang has no finer one
    "no-graphs": {"disable_cuda_graph": True},
    "no-overlap": {"disable_overlap_schedule": True},
    "verify-as-decode": {"speculative_attention_mode": "decode"},
    "plain-above-1": {},
}
"""Name to what differs from `BASE`. All but `base` run only at the depths of `--variant-depths`."""
MAX_BATCH = {"plain-above-1": 1}
"""`draft.max_batch` of variants that have one: what larger batches cost on a server that could draft for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One server."""

    variant: str
    depth: int
    """Tokens drafted per block; 0 is without speculation."""

    def __str__(self) -> str:
        return f"{self.variant}, k = {self.depth}"


def main() -> None:
    """Runs what is asked for and not yet in the result, wave by wave; writes the result after every case."""
    arguments = _arguments()
    until = time.monotonic() + arguments.budget_s
    with tempfile.TemporaryDirectory() as folder:
        print(f"exporting {arguments.model} at about {arguments.parameters:.3g} parameters", flush=True)
        bench = Bench(arguments, Path(folder))
        wave_s = FIRST_WAVE_S
        while bench.left:
            if time.monotonic() + wave_s > until:
                print(f"{len(bench.left)} cases do not fit into {arguments.budget_s:g} s; run again to go on with them")
                break
            start = time.monotonic()
            bench.wave(bench.left[: arguments.at_once], until)
            wave_s = time.monotonic() - start
    print(table(bench.rows))


class Bench:
    """The cases of one call and the rows measured so far, those of earlier calls included."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.path: Path = arguments.out
        self.batches: list[int] = arguments.batches
        self.turns: int = arguments.turns
        self.mem_fraction: float = arguments.mem_fraction_static
        self.launch: list[str] = arguments.launch
        self.keys = Keys.random()
        self.folder = folder
        self.context: dict[str, Any] = {
            "model": arguments.model,
            "draft": "fresh EAGLE head",
            "parameters": _export(arguments.model, arguments.parameters, folder),
            "base": BASE,
            "variants": VARIANTS,
            "tokens": [PROMPT_TOKENS, SHORT_TOKENS, LONG_TOKENS],
        }
        earlier = self._earlier()
        self.rows = [row for row in earlier if "error" not in row]
        done = {(row["variant"], row["k"]) for row in self.rows}
        failed = {(row["variant"], row["k"]) for row in earlier if "error" in row}
        # what failed may only have been late; it is tried again, last
        cases = sorted(_cases(arguments), key=lambda case: (case.variant, case.depth) in failed)
        self.left = [case for case in cases if (case.variant, case.depth) not in done]
        self.vocabulary: int = AutoConfig.from_pretrained(folder / "target").vocab_size

    def wave(self, cases: Sequence[Case], until: float) -> None:
        """Starts a server for each of `cases`, measures one after another, and stops them."""
        servers = [self._server(case, until) for case in cases]
        try:
            with ThreadPoolExecutor(len(servers)) as pool:
                starts = [pool.submit(_timed, server.start) for server in servers]
            for case, server, start in zip(cases, servers, starts, strict=True):
                try:
                    start_s = start.result()
                    rows = [self._measure(server, case, batch) | {"start_s": start_s} for batch in self.batches]
                except (RunError, ValueError, OSError) as error:  # a setting that does not work here is a result too
                    print(f"{case}: {error}", flush=True)
                    lines = str(error).splitlines()
                    why = lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1]}"
                    rows = [{"variant": case.variant, "k": case.depth, "error": why}]
                self.rows += rows
                self.left.remove(case)
                self._write()
                for row in rows:
                    print(row, flush=True)
        finally:
            for server in servers:
                server.stop()

    def _server(self, case: Case, until: float) -> SGLangServer:
        room = max(self.batches) * (PROMPT_TOKENS + LONG_TOKENS + 32)
        graphs = {"cuda_graph_bs_decode": self.batches}
        memory = {"max_total_tokens": room, "mem_fraction_static": self.mem_fraction}
        settings = ServerSettings(
            model_path=str(self.folder / "target"),
            draft_path=str(self.folder / "draft"),
            dtype="bfloat16",
            context_length=4 * LONG_TOKENS,
            max_running=max(self.batches),
            max_batch=MAX_BATCH.get(case.variant, 0),
            extra=BASE | graphs | memory | VARIANTS[case.variant],
        )
        return SGLangServer(
            name=f"{case.variant}-{case.depth}",
            settings=settings,
            keys=self.keys,
            draft_depth=case.depth,
            launch=self.launch,
            folder=self.folder / "logs",
            start_timeout_s=max(60.0, until - time.monotonic()),
        )

    def _measure(self, server: SGLangServer, case: Case, batch: int) -> dict[str, Any]:
        """One row: what a step costs, the median over turns."""
        self._generate(server, case, batch, LONG_TOKENS, 0)  # kernels are compiled and buffers made
        per_step, steps = [], []
        for turn in range(1, self.turns + 1):
            short_s, short_steps = self._generate(server, case, batch, SHORT_TOKENS, 2 * turn)
            long_s, long_steps = self._generate(server, case, batch, LONG_TOKENS, 2 * turn + 1)
            steps.append(long_steps - short_steps)
            per_step.append((long_s - short_s) / steps[-1])
        step_s = statistics.median(per_step)
        accept_length = (LONG_TOKENS - SHORT_TOKENS) / statistics.fmean(steps)
        return {
            "variant": case.variant,
            "k": case.depth,
            "batch": batch,
            "ms_per_step": 1e3 * step_s,
            "ms_per_step_turns": [1e3 * s for s in per_step],
            "steps_per_s": 1 / step_s,
            "tokens_per_s": batch * accept_length / step_s,
            "accept_length": accept_length,
        }

    def _generate(self, server: SGLangServer, case: Case, batch: int, tokens: int, seed: int) -> tuple[float, int]:
        """Seconds, and verify steps (without a draft: decoding steps) of the sequence that took most.

        All prompts differ from each other and from those of other calls, and go in one request, so that all sequences
        decode together. Raises `RunError` for an answer that is not what was asked for.
        """
        generator = torch.Generator().manual_seed(1000 * batch + seed)
        prompts = torch.randint(self.vocabulary, (batch, PROMPT_TOKENS), generator=generator).tolist()
        body = {
            "input_ids": prompts,
            "return_logprob": True,  # as rollouts ask for
            "logprob_start_len": -1,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True},
        }
        start = time.perf_counter()
        text = Api(server.url, self.keys).ask("/generate", body, timeout_s=120.0)
        seconds = time.perf_counter() - start
        answers = json.loads(text)
        if [len(a["output_ids"]) for a in answers] != [tokens] * batch:
            raise RunError(f"{case}: not {batch} answers of {tokens} tokens each")
        if not case.depth:
            return seconds, tokens - 1  # the first token comes from the prefill
        if any("spec_verify_ct" not in a["meta_info"] for a in answers):
            raise RunError(f"{case}: the answers count no verify steps, so nothing was drafted")
        return seconds, max(a["meta_info"]["spec_verify_ct"] for a in answers)

    def _earlier(self) -> list[dict[str, Any]]:
        """Rows of earlier calls, if they were made with the same code, hardware, versions and model."""
        if not self.path.exists():
            return []
        old = json.loads(self.path.read_text())
        now = json.loads(
            json.dumps({"commit": commit(), "hardware": hardware(), "versions": versions(), **self.context})
        )
        if differs := [key for key, value in now.items() if old.get(key) != value]:
            print(f"{self.path} was made with another {', '.join(differs)}: starting anew")
            return []
        rows: list[dict[str, Any]] = old["rows"]
        return rows

    def _write(self) -> None:
        write_result(self.path, "sglang_settings", self.rows, checks(self.rows), **self.context)


def checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether `base` is the setting to use: at each depth and batch size that several variants were measured at."""
    found = []
    for depth, batch in sorted({(row["k"], row["batch"]) for row in rows if "batch" in row}):
        ms = {r["variant"]: r["ms_per_step"] for r in rows if (r["k"], r.get("batch")) == (depth, batch)}
        if "base" in ms and len(ms) > 1:
            best = min(ms, key=ms.__getitem__)
            ratio = ms["base"] / ms[best]
            what = f"base over the fastest, {best}: ms per step at k = {depth}, batch {batch}"
            found.append(check(what, ratio, "at most 1.05", ratio <= 1.05))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text; `breakeven` is the accept length at which the case is as fast as the best without a draft."""
    plain: dict[int, float] = {}
    for row in rows:
        if row["k"] == 0 and "batch" in row:
            plain[row["batch"]] = min(row["ms_per_step"], plain.get(row["batch"], float("inf")))
    lines = [f"{'variant':22}{'k':>3}{'batch':>7}{'ms/step':>9}{'steps/s':>9}{'tokens/s':>10}{'breakeven':>11}"]
    for row in sorted(rows, key=lambda r: (r["k"], r.get("batch", 0), r.get("ms_per_step", 0.0))):
        head = f"{row['variant']:22}{row['k']:>3}"
        if "error" in row:
            lines.append(f"{head}  {row['error']}")
            continue
        worth = f"{row['ms_per_step'] / plain[row['batch']]:.2f}" if row["batch"] in plain else "-"
        lines.append(
            f"{head}{row['batch']:>7}{row['ms_per_step']:>9.2f}{row['steps_per_s']:>9.1f}{row['tokens_per_s']:>10.0f}"
            f"{worth:>11}"
        )
    return "\n".join(lines)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """In the order of what is most worth knowing: `base` at all depths, then the other variants."""
    has_flashinfer = importlib.util.find_spec("flashinfer") is not None
    cases = []
    for name in sorted(arguments.variants, key=list(VARIANTS).index):
        settings = BASE | VARIANTS[name]
        if "flashinfer" in settings.values() and not has_flashinfer:
            print(f"{name} is left out: flashinfer is not installed")
        elif settings["attention_backend"] in arguments.backends:
            depths = arguments.only if name == "base" else [k for k in arguments.only if k in arguments.variant_depths]
            # without a draft the settings of speculation are no settings
            needs_draft = name in MAX_BATCH or any(key.startswith("speculative_") for key in VARIANTS[name])
            cases += [Case(variant=name, depth=k) for k in depths if k or not needs_draft]
    return cases


def _export(path: str, parameters: float, folder: Path) -> int:
    """Writes the folders `target` and `draft`; returns the number of parameters of the widened target."""
    source = models.smollm2_folder() if path == models.SMOLLM2 else Path(path).expanduser()
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):  # shapes are enough: the servers make up their weights
        config.intermediate_size = mlp_width(AutoModelForCausalLM.from_config(config), parameters)
        model = AutoModelForCausalLM.from_config(config)
    export_target(model, AutoTokenizer.from_pretrained(source), folder / "target", dtype=torch.bfloat16)
    export(DraftHead(EAGLE, config), folder / "draft", dtype=torch.bfloat16)
    count: int = model.num_parameters()
    return count


def _timed(call: Callable[[], None]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.SMOLLM2, help="a Hugging Face folder, or smollm2")
    parser.add_argument("--parameters", type=float, default=2.6e9, help="to widen the model to")
    parser.add_argument("--only", type=int, nargs="+", default=list(range(8)), metavar="K", help="depths to measure")
    parser.add_argument("--variant-depths", type=int, nargs="+", default=[0, 3], metavar="K")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--backends", nargs="+", default=["triton", "fa3", "flashinfer"], metavar="ATTENTION")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=6, help="servers on the GPU at the same time")
    # what bounds a server's memory is its number of tokens: SGLang takes the fraction of what was free when it started
    # and demands that much less the fraction be free once its weights are there, though the others fill up meanwhile
    parser.add_argument("--mem-fraction-static", type=float, default=0.85, help="per server")
    launch = shlex.join([sys.executable, "-m", "miles_spec.rollout.launch"])
    parser.add_argument("--launch", type=shlex.split, default=launch, help="command that starts a server")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no more servers are started beyond this")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
