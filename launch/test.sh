#!/usr/bin/env bash
# Runs the tests here, from nothing but Python 3.11+ and pip:  bash launch/test.sh [--fast] [pytest arguments]
# --fast runs the quick tests, which tests/conftest.py lists.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
make_venv dev
use_huge_pages
"$venv/bin/ruff" check .
"$venv/bin/python" -m pytest -n "${CLIP_JAX_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
