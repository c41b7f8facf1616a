#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, from a folder that all nodes see:
#   bash launch/slurm.sh --nodes=4 --gpus-per-node=8 --time=24:00:00 --partition=gpu -- --config=configs/clip.py:b16 --workdir=/shared/clip
#
# Installs the package in .venv, if it is not there, and submits a job that runs python -m clip_jax.train with what follows --, one process
# per GPU or, with --per-node, per node. Options not named here go to sbatch (--time, --partition, --account, --cpus-per-task, ...).
# --container=IMAGE runs the trainer in a container, whose python has the dependencies, with the code of this folder: an image of enroot (the
# plugin pyxis: REGISTRY#IMAGE:TAG or a file.sqsh), or one of Apptainer (a file.sif). --container-mounts=/data,/scratch are folders that it
# sees besides this one. The trainer gets SIGTERM --grace=300 seconds before the time limit; preempted with its state saved, the job is put
# into the queue again. A trainer that failed starts again at most --max-restarts=3 times in a row, --pause=10 seconds later. --nodes (1 by
# default), --gpus-per-node, ... can also be given as NODES, GPUS_PER_NODE, ... in the environment. --dry-run prints the commands and runs none.
set -euo pipefail
launch=${CLIP_JAX_LAUNCH:-launch} # clip-jax launch sets it and CLIP_JAX_PYTHON: jobs then run in the current folder
if [[ ${1:-} == job ]]; then # SLURM runs a copy of the script from elsewhere
  cd "$SLURM_SUBMIT_DIR"
elif [[ -z ${CLIP_JAX_LAUNCH:-} ]]; then
  cd "$(dirname "$0")/.."
fi
# shellcheck source=launch/common.sh
source "$launch/common.sh"
# shellcheck source=launch/venv.sh
source "$launch/venv.sh"

NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-} PER_NODE=${PER_NODE:-} GRACE=${GRACE:-300}
CONTAINER=${CONTAINER:-} CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}

submit() {
  local tasks=$GPUS_PER_NODE
  [[ -z $PER_NODE ]] || tasks=1
  run mkdir -p runs/slurm
  if [[ -z $DRY_RUN && -z $CONTAINER ]]; then make_venv gpu; fi
  run sbatch --job-name=clip_jax --nodes="$NODES" --gpus-per-node="$GPUS_PER_NODE" --ntasks-per-node="$tasks" \
    --requeue --signal="TERM@$GRACE" --output=runs/slurm/%x-%j.log --open-mode=append ${EXTRA[@]+"${EXTRA[@]}"} \
    "$launch/slurm.sh" job --gpus-per-node="$GPUS_PER_NODE" ${PER_NODE:+--per-node} --max-restarts="$MAX_RESTARTS" --pause="$PAUSE" \
    ${CONTAINER:+--container="$CONTAINER"} ${CONTAINER_MOUNTS:+--container-mounts="$CONTAINER_MOUNTS"} -- "${TRAIN[@]}"
}

job() {
  local status=0 folders="$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" options=() python=("${CLIP_JAX_PYTHON:-$venv/bin/python}")
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # a process whose GPU is not there fails; without it, it would train alone on its CPU
  if [[ -n $PER_NODE ]]; then # JAX would take one GPU for each process of SLURM
    JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((GPUS_PER_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  case $CONTAINER in
    '') ;;
    *.sif) python=(apptainer exec --nv --bind="$folders" --pwd="$PWD" "$CONTAINER" python) ;;
    *) # mounts of pyxis are OUTSIDE:INSIDE
      options=(--container-image="$CONTAINER" --container-workdir="$PWD" --no-container-mount-home)
      options+=(--container-mounts="$(tr , '\n' <<<"$folders" | sed 's/.*/&:&/' | paste -sd , -)")
      python=(python)
      ;;
  esac
  supervise srun --label --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    ${options[@]+"${options[@]}"} "${python[@]}" -m clip_jax.train "${TRAIN[@]}" || status=$?
  if [[ $status -eq 42 && -z $stopping ]]; then # at SIGTERM to this script, SLURM itself ends the job or puts it into the queue
    echo "launcher: preempted; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

command=submit
if [[ ${1:-} == job ]]; then command=job && shift; fi
[[ $# -gt 0 ]] || set -- --help
parse_flags "nodes gpus-per-node grace max-restarts pause container container-mounts" "per-node dry-run" "$@"
need GPUS_PER_NODE
need_number NODES GPUS_PER_NODE GRACE MAX_RESTARTS PAUSE
need_train
[[ $command == job ]] || need_program sbatch
"$command"
