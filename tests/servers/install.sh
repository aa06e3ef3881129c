#!/usr/bin/env bash
# install.sh PYTHON FOLDER: a virtual environment with SGLang for machines without a GPU. Minutes, 3 GB.
#
# SGLang's own list of what it needs is left aside: it names GPU builds that a CPU cannot load. requirements.txt has what
# a text model on a CPU imports, each in the version that was tested. It needs Python 3.11 or newer.
set -euo pipefail
"$1" -m venv --clear "$2"
"$2/bin/python" -m pip install 'torch==2.13.0'
"$2/bin/python" -m pip install --no-deps -r "$(dirname "$0")/requirements.txt"
