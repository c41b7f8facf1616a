#!/usr/bin/env bash
# Builds the documentation site in site/, from nothing but Python 3.11+ and pip:
#   bash launch/docs.sh [--serve]
# --serve also serves it at http://127.0.0.1:8000 and builds it again when a page changes, until Ctrl-C. --dry-run prints the command: nothing
# is installed, written or run. --help prints this text.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
source launch/venv.sh

SERVE=${SERVE:-}
parse_flags "" "serve dry-run" "$@"
no_extra
[[ ${#TRAIN[@]} -eq 0 ]] || fail "unexpected argument '${TRAIN[0]}'; see --help"
[[ -n $DRY_RUN ]] || make_venv docs
export NO_MKDOCS_2_WARNING=1
if [[ -n $SERVE ]]; then run "$venv/bin/mkdocs" serve; else run "$venv/bin/mkdocs" build --strict; fi
