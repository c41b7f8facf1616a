#!/usr/bin/env bash
# All checks and measurements of one GPU, in at most nine minutes:  bash benchmarks/gpu.sh [arguments of benchmarks/gpu.py]
# PYTHON names another interpreter than python3. docs/gpu_checklist.md says what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
