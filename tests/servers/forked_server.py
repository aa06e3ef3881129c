"""`cpu_server.py`, but SGLang forks its processes instead of spawning them.

So they import SGLang once together, which is most of what a start takes. The server that most tests share has its
processes spawned, as SGLang does it by itself.
"""

from __future__ import annotations

import multiprocessing

import cpu_server  # noqa: F401  # patches SGLang

from miles_spec.rollout.launch import main

multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
