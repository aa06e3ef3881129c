"""What do our kernels cost beside public ones, and beside the matrix products and copies that the work needs anyway?

    python benchmarks/kernel_costs.py               # one GPU: everything
    python benchmarks/kernel_costs.py --ranks 2     # two GPUs: labels and states shifted, the pack cut over both

Peers are used where they are installed: liger-kernel, flash-linear-attention (with fla-core), cut-cross-entropy and
megatron-core. Every call is compared with float64 on the same inputs before it is timed.
"""

# A script named kernels.py would be found first by whoever imports Hugging Face's package of that name.

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from miles_spec.cli import main as miles_spec
from miles_spec.kernel_bench.run import kernels_of_ranks

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Runs, prints and writes `results/kernels.json` or `results/kernels_of_ranks.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="processes, each with a GPU of its own")
    ranks: int = parser.parse_args().ranks
    if ranks == 1:
        return miles_spec(["bench", "kernels", "--json", str(RESULTS / "kernels.json")])
    kernels_of_ranks(ranks, RESULTS / "kernels_of_ranks.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
