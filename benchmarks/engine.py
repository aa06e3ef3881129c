"""Does the embedded engine without speculation keep up with `generate` of transformers?

    python benchmarks/engine.py [--model smollm2] [--batch 8] [--tokens 64]

Same model, dtype, prompts and number of tokens, greedy, turn by turn in one process. Before anything is timed, both
must give the same tokens in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from miles_spec import models
from miles_spec.config import ModelConfig
from miles_spec.provenance import check, write_result
from miles_spec.rollout.embedded import EmbeddedEngine
from miles_spec.types import Request, Sampling

QUESTIONS = (
    "What is 3 + 4?",
    "Name three colours of the rainbow.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What does a compiler do?",
    "List the days of the week.",
    "How many legs does a spider have?",
    "Say hello in French.",
)
RESULT = Path(__file__).parent / "results" / "engine.json"


def main() -> None:
    """Checks, times, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    loaded = models.load(ModelConfig(path=arguments.model))
    tokenizer = loaded.tokenizer
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}], add_generation_prompt=True, return_dict=False
        )
        for i in range(arguments.batch)
    ]
    rows = []
    for dtype in (torch.float32, loaded.dtype):
        if rows and dtype == torch.float32:
            continue
        rows.append(compare(loaded, prompts, dtype, arguments.tokens, arguments.turns))
        print(rows[-1])
    checks = [
        check(
            f"tokens/s over generate of transformers, batch {arguments.batch}, {row['dtype']}",
            row["ratio"],
            "at least 1.0",
            row["ratio"] >= 1.0,
        )
        for row in rows
    ]
    write_result(RESULT, "engine", rows, checks, model=arguments.model)


def compare(loaded: models.Loaded, prompts: list[list[int]], dtype: torch.dtype, tokens: int, turns: int) -> dict:
    """One row: median tokens/s of both over `turns` turns."""
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens, ignore_eos=True)
    requests = [Request(id=str(i), tokens=tuple(p), sampling=sampling) for i, p in enumerate(prompts)]
    engine = EmbeddedEngine(loaded.model, None, dtype=dtype, max_running=len(prompts), max_context=512)
    folder = loaded.model.config._name_or_path
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(loaded.device).eval()
    peer.generation_config.eos_token_id = None  # as our `ignore_eos`: both make all the tokens asked for
    width = max(map(len, prompts))
    pad = loaded.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=loaded.device)

    def ours() -> list[list[int]]:
        return [list(c.tokens) for c in engine.generate(requests)]

    def theirs() -> list[list[int]]:
        out = peer.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=pad)
        return out[:, width:].tolist()

    same = statistics.fmean(a == b for x, y in zip(ours(), theirs(), strict=True) for a, b in zip(x, y, strict=True))
    # float32 leaves room for one tie that goes the other way; bfloat16 for many
    if dtype == torch.float32 and same < 0.9:
        raise SystemExit(f"the two give different tokens ({same:.0%} equal): not timed")
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(turns):
        for name, run in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rate = {name: len(prompts) * tokens / statistics.median(s) for name, s in seconds.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": len(prompts),
        "tokens": tokens,
        "ours_tokens_per_s": rate["ours"],
        "transformers_tokens_per_s": rate["theirs"],
        "ratio": rate["ours"] / rate["theirs"],
        "equal_tokens": same,
    }


if __name__ == "__main__":
    main()
