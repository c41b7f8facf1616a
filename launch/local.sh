#!/usr/bin/env bash
# Trains and evaluates on this machine, from nothing but Python 3.11+ and pip:
#   bash launch/local.sh [--processes N] [configs/clip.py[:variant]] [--workdir=runs/NAME] [--config.FIELD=VALUE ...]
# Uses a virtual environment in .venv (made if it is not there; CLIP_JAX_VENV names another) and a GPU if there is one. With --processes
# several processes share the work as hosts do, over loopback, each with one GPU or the CPU. clip_jax/train.py lists the exit statuses.
# --dry-run prints the command: nothing is installed, written or run. --help prints this text.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
source launch/venv.sh

arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help) show_help && exit ;;
    --dry-run) DRY_RUN=1 ;;
    *) arguments+=("$argument") ;;
  esac
done
set -- ${arguments[@]+"${arguments[@]}"}
module=(clip_jax.train)
case ${1:-} in
  --processes=*) module=(clip_jax.runtime.hosts "$1" clip_jax.train); shift ;;
  --processes) module=(clip_jax.runtime.hosts "--processes=${2:-}" clip_jax.train); shift $(($# > 1 ? 2 : 1)) ;;
esac
config=configs/clip.py workdir=''
if [[ $# -gt 0 && $1 != --* ]]; then config=$1; shift; fi
arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --config | --workdir) [[ $# -gt 1 ]] || fail "$1 has no value: write $1=VALUE"; printf -v "${1#--}" %s "$2"; shift ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
set -- ${arguments[@]+"${arguments[@]}"}
name=$(basename "${config%%:*}" .py)
[[ $config == *:* ]] && name+="_${config#*:}"
workdir=${workdir:-runs/$name}

gpu=
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  gpu=gpu
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # JAX fails when it cannot use the GPU, instead of training on the CPU
fi
use_huge_pages
if [[ -n $DRY_RUN ]]; then
  variables=(${gpu:+"JAX_PLATFORMS=$JAX_PLATFORMS"} ${GLIBC_TUNABLES:+"GLIBC_TUNABLES=$GLIBC_TUNABLES"})
  run ${variables[0]:+env} ${variables[@]+"${variables[@]}"} "$venv/bin/python" -m "${module[@]}" --config="$config" --workdir="$workdir" "$@"
  exit
fi
make_venv "$gpu"
(trap - INT; exec "$venv/bin/python" -m "${module[@]}" --config="$config" --workdir="$workdir" "$@") &
trap 'kill -TERM $!' TERM
trap : INT # the terminal sends Ctrl-C to the run as well
status=0
while kill -0 $! 2>/dev/null; do wait $! && status=0 || status=$?; done # a signal ends a wait too
[[ $status == 0 ]] || exit "$status"
echo
echo "evaluate again:   $venv/bin/python -m clip_jax.evaluate --checkpoint=$workdir"
echo "look at it:       $workdir/report.html"
echo "use it in Python: clip_jax.load(\"$workdir\")"
