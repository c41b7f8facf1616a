#!/usr/bin/env bash
# Runs the tests here, from nothing but Python 3.11+ and pip:  bash launch/test.sh [--fast] [pytest arguments]
# --fast runs the quick tests, which tests/conftest.py lists.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
# Tests start many processes. Without bytecode each would compile all modules again, so the environment keeps it.
no_bytecode=${PYTHONDONTWRITEBYTECODE:-}
unset PYTHONDONTWRITEBYTECODE
make_venv dev
if [[ -n $no_bytecode ]]; then export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$(cd "$venv" && pwd)/bytecode}; fi
use_huge_pages
"$venv/bin/ruff" check .
"$venv/bin/python" -m pytest -n "${CLIP_JAX_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
