"""`miles-spec` as a script, on megatron-core without a GPU. Not a test module: the ranks of a run start it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import megatron_cpu
from miles_spec import assemble, cli, processes

make_trainer = assemble.make_trainer


def _make(*arguments: Any) -> Any:
    # not before the model is there: transformers loads it wrong with what that patches
    megatron_cpu.install()
    return make_trainer(*arguments)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    assemble.make_trainer = _make
    processes.COMMAND = (sys.executable, __file__)
    sys.exit(cli.main())
