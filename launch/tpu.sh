#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any type and size, through the queued resources of gcloud:
#   bash launch/tpu.sh create --name=clip --zone=us-central2-b --type=v4-32 --spot
#   bash launch/tpu.sh setup  --name=clip --zone=us-central2-b
#   bash launch/tpu.sh run    --name=clip --zone=us-central2-b -- --config=configs/clip.py:b16 --workdir=/mnt/bucket/clip
#
# create   requests the slice: --type=v5litepod-256 and --spot, --reserved or neither (on demand); --version=RUNTIME, by default the one
#          that fits the type. Other options go to gcloud (--service-account=..., --network=..., --valid-until-duration=6h)
# setup    waits until the slice is there (asks every --poll=60 seconds), copies the files that git tracks and installs them on all workers
# run      starts training on all workers, detached; what follows -- goes to python -m clip_jax.train. A trainer that was preempted starts
#          again; one that failed does so at most --max-restarts=3 times in a row; both --pause=10 seconds later.
#          With --keep the command stays, takes the options of create, does create and setup where needed, makes a slice that was taken
#          away again and trains on; it ends when training ends, with the trainer's exit status
# status   the state of the queued resource, and of the run on each worker
# logs     the log of each worker, each line with the worker's number: --tail=50 lines, --follow
# stop     sends SIGTERM and waits up to --grace=600 seconds for the state to be saved
# delete   deletes the queued resource and its slice
#
# --name, --zone, --project (by default gcloud's), --type, ... can also be given as NAME, ZONE, ... in the environment. status and logs take
# --worker=0 or 1-3 instead of all. --dry-run prints the commands and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
source launch/venv.sh

NAME=${NAME:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} TYPE=${TYPE:-} VERSION=${VERSION:-} SPOT=${SPOT:-} RESERVED=${RESERVED:-}
POLL=${POLL:-60} GRACE=${GRACE:-600} TAIL=${TAIL:-50} WORKER=${WORKER:-all} KEEP='' FOLLOW='' AGAIN=''
RUN=$HOME/clip_jax_run # on a worker: the log, and the pid or the exit status of the run

tpus() { run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }

# on_workers COMMAND [ARGUMENT...]: a command of this script on the workers, whatever characters are in its arguments.
on_workers() { tpus tpu-vm ssh "$NAME" --worker="$WORKER" --command="cd clip_jax && bash launch/tpu.sh $(quoted "$@")"; }

# Prints the state of the queued resource; nothing if there is none.
queue_state() { tpus queued-resources list --filter="name ~ /queuedResources/$NAME\$" --format='value(state.state)'; }

check_request() {
  need TYPE
  [[ -z $SPOT || -z $RESERVED ]] || fail "--spot and --reserved exclude each other"
  [[ -z $VERSION ]] || return 0
  case $TYPE in
    v2-* | v3-* | v4-*) VERSION=tpu-ubuntu2204-base ;;
    v5litepod-*) VERSION=v2-alpha-tpuv5-lite ;;
    v5p-*) VERSION=v2-alpha-tpuv5 ;;
    v6e-*) VERSION=v2-alpha-tpuv6e ;;
    *) fail "--version=... is missing (or VERSION in the environment): no runtime version is known for --type=$TYPE" ;;
  esac
}

create() {
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    ${SPOT:+--spot} ${RESERVED:+--reserved} ${EXTRA[@]+"${EXTRA[@]}"}
}

delete() { tpus queued-resources delete "$NAME" --force --quiet; }

wait_active() {
  local now before=''
  while now=$(queue_state) && [[ $now != ACTIVE ]]; do
    case $now in
      '') fail "there is no queued resource $NAME in $ZONE: create it first" ;;
      SUSPEND* | FAILED | DELETING) fail "the queued resource $NAME is $now: delete it and create it again" ;;
    esac
    [[ $now == "$before" ]] || echo "$NAME: $now"
    before=$now
    sleep "$POLL"
  done
  [[ $now == ACTIVE ]]
}

install_code() {
  local folder missing status=0
  missing=$(git ls-files --deleted | tr '\n' ' ')
  [[ -z $missing ]] || fail "files that git tracks are missing: $missing"
  folder=$(mktemp -d)
  if [[ -n $DRY_RUN ]]; then
    echo "git ls-files -z | tar --null --files-from=- -czf $folder/clip_jax.tar.gz"
  else
    git ls-files -z | tar --null --files-from=- -czf "$folder/clip_jax.tar.gz" || status=$?
  fi
  [[ $status -ne 0 ]] || tpus tpu-vm scp "$folder/clip_jax.tar.gz" "$NAME:" --worker=all || status=$?
  [[ $status -ne 0 ]] || tpus tpu-vm ssh "$NAME" --worker=all \
    --command="mkdir -p clip_jax && tar -xzf clip_jax.tar.gz -C clip_jax && cd clip_jax && bash launch/tpu.sh worker-setup" || status=$?
  rm -r "$folder"
  return "$status"
}

start() { on_workers worker-start --max-restarts="$MAX_RESTARTS" --pause="$PAUSE" "$@" -- "${TRAIN[@]}"; }

# Keeps the slice, and training on it, until training ends. Returns the trainer's exit status.
keep() {
  local now before='' report started='' failures=0
  if [[ -n $DRY_RUN ]]; then
    queue_state && create && install_code && start --again && on_workers worker-status
    return
  fi
  if [[ $(queue_state) == ACTIVE ]] && report=$(on_workers worker-status 2>/dev/null) && [[ $report == *": running"* ]]; then started=1; fi
  while [[ $failures -le $MAX_RESTARTS ]]; do
    now=$(queue_state) || now="no answer from gcloud"
    [[ $now == "$before" ]] || echo "$NAME: ${now:-not there}"
    before=$now
    case $now in
      '') started='' && create || failures=$((failures + 1)) ;;
      SUSPENDED) started='' && delete || failures=$((failures + 1)) ;;
      FAILED) started='' failures=$((failures + 1)) && delete || true ;;
      ACTIVE)
        if [[ -z $started ]]; then
          if install_code && start --again; then started=1; else failures=$((failures + 1)); fi
        elif ! report=$(on_workers worker-status); then
          echo "$NAME: not all workers answer"
        elif [[ $report == *": lost"* || $report == *": not started"* ]]; then
          start --again || failures=$((failures + 1))
        elif [[ $report == *": running"* ]]; then
          failures=0
        else
          echo "$report"
          return "$(sed -n 's/.*: ended with status //p' <<<"$report" | sort -n | tail -n 1)"
        fi
        ;;
    esac
    sleep "$POLL"
  done
  echo "error: given up after $failures failures in a row" >&2
  return 1
}

# What follows runs on a worker.

worker_number() {
  curl -sf --max-time 5 -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || hostname
}

running_pid() { # the file goes when the run ends, perhaps just now
  local pid
  pid=$(cat "$RUN/pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null && echo "$pid"
}

worker_setup() {
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then # the TPU images come with Python 3.10
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
    export PYTHON
  fi
  make_venv tpu
}

worker_start() {
  local pid
  if pid=$(running_pid); then
    [[ -z $AGAIN ]] || return 0
    fail "worker $number: a run is going on (pid $pid): stop it first"
  fi
  [[ -x $venv/bin/python ]] || fail "worker $number: the package is not installed: run setup first"
  mkdir -p "$RUN"
  rm -f "$RUN/status"
  (
    echo "$BASHPID" >"$RUN/pid"
    exec setsid nohup bash launch/tpu.sh worker-loop --max-restarts="$MAX_RESTARTS" --pause="$PAUSE" -- "${TRAIN[@]}"
  ) </dev/null >>"$RUN/worker-$number.log" 2>&1 &
  echo "worker $number: started"
}

worker_loop() {
  local status
  while true; do
    status=0
    supervise "$venv/bin/python" -m clip_jax.train "${TRAIN[@]}" || status=$?
    [[ $status -eq 42 && -z $stopping ]] || break
    echo "launcher: preempted; restart in $PAUSE s"
    sleep "$PAUSE"
  done
  echo "$status" >"$RUN/status"
  rm "$RUN/pid"
}

worker_status() {
  local state="not started" pid
  if pid=$(running_pid); then
    state="running (pid $pid)"
  elif [[ -e $RUN/pid ]]; then
    state="lost" # killed, or the machine was started again
  elif [[ -e $RUN/status ]]; then
    state="ended with status $(<"$RUN/status")"
  fi
  echo "worker $number: $state"
}

worker_stop() {
  local pid second
  if pid=$(running_pid); then
    kill -TERM "$pid"
    for ((second = 0; second < GRACE; second++)); do
      running_pid >/dev/null || break
      sleep 1
    done
    if running_pid >/dev/null; then
      kill -KILL -- "-$pid"
      echo 137 >"$RUN/status"
      rm "$RUN/pid"
    fi
  fi
  worker_status
}

worker_logs() { tail -n "$TAIL" ${FOLLOW:+-F} "$RUN/worker-$number.log" | sed -u "s/^/[$number] /"; }

command=${1:---help}
[[ $# -eq 0 ]] || shift
case $command in
  -h | --help) show_help && exit ;;
  create) values="type version" switches="spot reserved" ;;
  setup) values="poll" switches="" ;;
  run) values="max-restarts pause poll type version" switches="keep spot reserved" ;;
  status) values="worker" switches="" ;;
  logs) values="worker tail" switches="follow" ;;
  stop) values="grace" switches="" ;;
  delete | worker-setup | worker-status) values="" switches="" ;;
  worker-start | worker-loop) values="max-restarts pause" switches="again" ;;
  worker-logs) values="tail" switches="follow" ;;
  worker-stop) values="grace" switches="" ;;
  *) fail "unknown command '$command'; known: create, setup, run, status, logs, stop, delete" ;;
esac
parse_flags "name zone project $values" "dry-run $switches" "$@"
need_number MAX_RESTARTS PAUSE POLL GRACE TAIL
[[ $command == create || -n $KEEP ]] || no_extra
case $command in
  worker-*) number=$(worker_number) ;;
  *) need NAME ZONE && need_program gcloud ;;
esac

case $command in
  create) check_request && create ;;
  setup)
    if [[ -n $DRY_RUN ]]; then queue_state; else wait_active; fi
    install_code
    ;;
  run)
    need_train
    if [[ -n $KEEP ]]; then check_request && keep; else start; fi
    ;;
  status)
    now=$(queue_state)
    echo "${now:-there is no queued resource $NAME in $ZONE}"
    if [[ -n $DRY_RUN || $now == ACTIVE ]]; then on_workers worker-status && on_workers worker-logs --tail=1; fi
    ;;
  logs) on_workers worker-logs --tail="$TAIL" ${FOLLOW:+--follow} ;;
  stop) on_workers worker-stop --grace="$GRACE" ;;
  *) "${command//-/_}" ;;
esac
