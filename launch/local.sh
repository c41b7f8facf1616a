#!/usr/bin/env bash
# Trains and evaluates on this machine, from nothing but Python 3.11+ and pip:
#   bash launch/local.sh [configs/clip.py[:variant]] [--workdir=runs/NAME] [--config.FIELD=VALUE ...]
# Uses a virtual environment in .venv (made if it is not there; CLIP_JAX_VENV names another) and a GPU if there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh

config=configs/clip.py
if [[ $# -gt 0 && $1 != --* ]]; then config=$1; shift; fi
name=$(basename "${config%%:*}" .py)
[[ $config == *:* ]] && name+="_${config#*:}"
workdir=runs/$name
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#*=} ;; esac
done

make_venv $(command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && echo gpu)
"$venv/bin/python" -m clip_jax.train --config="$config" --workdir="$workdir" "$@"
echo
echo "evaluate again:   $venv/bin/python -m clip_jax.evaluate --checkpoint=$workdir"
echo "look at it:       $workdir/report.html"
echo "use it in Python: clip_jax.load(\"$workdir\")"
