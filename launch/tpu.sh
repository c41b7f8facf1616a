#!/usr/bin/env bash
# Trains on Cloud TPU slices, v2 to v6e, of any size, through the queued resources of gcloud:
#   bash launch/tpu.sh create --name=clip --zone=us-central2-b --type=v4-32 --spot
#   bash launch/tpu.sh setup  --name=clip --zone=us-central2-b
#   bash launch/tpu.sh run    --name=clip --zone=us-central2-b -- --config=configs/clip.py:b16 --workdir=gs://BUCKET/clip
#
# create   requests the slice: --type=v5litepod-256 and --spot, --reserved or neither (on demand); --slices=2 requests several, which train
#          together; --version=RUNTIME, by default the one that fits the type. Other options go to gcloud (--service-account=...,
#          --network=..., --internal-ips, --valid-until-duration=6h)
# setup    waits until the slice is there (asks every --poll=60 seconds), copies the files that git tracks and installs them on all workers.
#          --bucket=NAME mounts that bucket at /mnt/NAME by gcsfuse. --setup=SCRIPT runs a script of yours in ~/clip_jax on each worker after
#          that. The first setup of a name keeps the versions of all packages in runs/tpu/NAME.lock, and later ones install the same
# run      starts training on all workers, detached; what follows -- goes to python -m clip_jax.train. A trainer that was preempted starts
#          again; one that failed does so at most --max-restarts=3 times in a row; both --pause=10 seconds later. --env=VARIABLE=VALUE, which
#          may be repeated, sets a variable of the trainer.
#          With --keep the command stays, takes the options of create and setup, does create and setup where needed, makes a slice that was
#          taken away again and trains on; so it does when a worker has not answered for --dead-after=10 minutes. It ends when training
#          ends, with the trainer's exit status, and leaves the slice there
# status   the state of the queued resource, and of the run on each worker
# logs     the log of each worker, each line with the worker's number: --tail=50 lines, --follow
# stop     sends SIGTERM and waits up to --grace=600 seconds for the state to be saved
# delete   deletes the queued resource and its slices
#
# --name, --zone, --project (by default gcloud's), --type, ... can also be given as NAME, ZONE, ... in the environment. status and logs take
# --worker=0 or 1-3 instead of all, and --node=0 for one slice of several. --internal-ip, --tunnel-through-iap, --ssh-key-file=FILE,
# --ssh-flag=FLAG and --strict-host-key-checking=no go to gcloud's ssh, or all of them as SSH_FLAGS in the environment. gcloud asks 64 workers
# at a time. --dry-run prints the commands and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
source launch/venv.sh

NAME=${NAME:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} TYPE=${TYPE:-} VERSION=${VERSION:-} SPOT=${SPOT:-} RESERVED=${RESERVED:-}
SLICES=${SLICES:-1} POLL=${POLL:-60} GRACE=${GRACE:-600} TAIL=${TAIL:-50} WORKER=${WORKER:-all} NODE=${NODE:-all} SETUP=${SETUP:-}
DEAD_AFTER=${DEAD_AFTER:-10} KEEP='' FOLLOW='' AGAIN='' LOCKED='' LIMIT=()
RUN=$HOME/clip_jax_run # on a worker: the log, the pid or the exit status of the run, and the name of the mounted bucket

tpus() { run ${LIMIT[@]+"${LIMIT[@]}"} gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }

# reach ssh|scp ARGUMENT...: the workers, 64 at a time.
reach() { tpus queued-resources "$@" --node="$NODE" --worker="$WORKER" --batch-size=64 ${SSH[@]+"${SSH[@]}"}; }

# on_workers COMMAND [ARGUMENT...]: a command of this script on the workers, whatever characters are in its arguments.
on_workers() { reach ssh "$NAME" --command="cd clip_jax && bash launch/tpu.sh $(quoted "$@")"; }

# Prints the state of the queued resource; nothing if there is none.
queue_state() { tpus queued-resources list --filter="name ~ /queuedResources/$NAME\$" --format='value(state.state)'; }

# Moves the flags that gcloud's ssh takes from the array EXTRA to the array SSH.
take_ssh_flags() {
  local flag rest=()
  read -ra SSH <<<"${SSH_FLAGS:-}"
  for flag in ${EXTRA[@]+"${EXTRA[@]}"}; do
    case $flag in
      --internal-ip | --tunnel-through-iap | --ssh-key-file=* | --ssh-flag=* | --strict-host-key-checking=*) SSH+=("$flag") ;;
      *) rest+=("$flag") ;;
    esac
  done
  EXTRA=(${rest[@]+"${rest[@]}"})
}

check_request() {
  need TYPE
  [[ -z $SPOT || -z $RESERVED ]] || fail "--spot and --reserved exclude each other"
  [[ $TYPE != tpu7* ]] || fail "--type=$TYPE: Google's Cloud TPU API serves no TPU7x; launch/gke.sh does"
  [[ -z $VERSION ]] || return 0
  case $TYPE in
    v2-* | v3-* | v4-*) VERSION=tpu-ubuntu2204-base ;;
    v5litepod-*) VERSION=v2-alpha-tpuv5-lite ;;
    v5p-*) VERSION=v2-alpha-tpuv5 ;;
    v6e-*) VERSION=v2-alpha-tpuv6e ;;
    *) fail "--version=... is missing (or VERSION in the environment): no runtime version is known for --type=$TYPE" ;;
  esac
}

check_setup() {
  check_bucket
  [[ -z $SETUP || -f $SETUP ]] || fail "--setup=$SETUP: there is no such file"
}

create() {
  local nodes=(--node-id="$NAME")
  [[ $SLICES -eq 1 ]] || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  tpus queued-resources create "$NAME" "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
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
  local folder missing files lock=runs/tpu/$NAME.lock locked='' status=0
  missing=$(git ls-files --deleted | tr '\n' ' ')
  [[ -z $missing ]] || fail "files that git tracks are missing: $missing"
  [[ ! -s $lock ]] || locked=--locked
  folder=$(mktemp -d)
  files=("$folder/clip_jax.tar.gz" ${SETUP:+"$folder/setup.sh"} ${locked:+"$folder/clip_jax.lock"})
  [[ -z $SETUP ]] || cp "$SETUP" "$folder/setup.sh"
  [[ -z $locked ]] || cp "$lock" "$folder/clip_jax.lock"
  if [[ -n $DRY_RUN ]]; then
    echo "git ls-files -z | tar --null --files-from=- -czf $folder/clip_jax.tar.gz"
  else
    git ls-files -z | tar --null --files-from=- -czf "$folder/clip_jax.tar.gz" || status=$?
  fi
  [[ $status -ne 0 ]] || reach scp "${files[@]}" "$NAME:" || status=$?
  [[ $status -ne 0 ]] || reach ssh "$NAME" --command="mkdir -p clip_jax && cd clip_jax && \
tar --quoting-style=literal -xvzf ../clip_jax.tar.gz >.unpacked.new && touch .unpacked && \
{ grep -vxFf .unpacked.new .unpacked || true; } | xargs -r -d '\n' rm -f -- && mv .unpacked.new .unpacked && \
bash launch/tpu.sh worker-setup${BUCKET:+ --bucket=$BUCKET}${locked:+ $locked}${SETUP:+ && bash ../setup.sh}" || status=$?
  if [[ $status -eq 0 && -z $locked ]]; then keep_versions "$lock" || status=$?; fi
  rm -r "$folder"
  return "$status"
}

# keep_versions FILE: writes the versions that the first worker has installed.
keep_versions() {
  if [[ -n $DRY_RUN ]]; then
    NODE=0 WORKER=0 on_workers worker-versions
    return
  fi
  mkdir -p "$(dirname "$1")"
  NODE=0 WORKER=0 on_workers worker-versions | grep '==' >"$1.new" && mv "$1.new" "$1"
}

start() {
  local variable options=(--max-restarts="$MAX_RESTARTS" --pause="$PAUSE" "$@")
  for variable in ${VARIABLES[@]+"${VARIABLES[@]}"}; do options+=(--env="$variable"); done
  on_workers worker-start "${options[@]}" -- "${TRAIN[@]}"
}

ask_workers() {
  [[ ${#LIMIT[@]} -eq 0 ]] || LIMIT=(timeout 300)
  on_workers worker-status
}

# Keeps the slice, and training on it, until training ends. Returns the trainer's exit status.
keep() {
  local now before='' report started='' failures=0 silent=''
  if [[ -n $DRY_RUN ]]; then
    queue_state && create && install_code && start --again && on_workers worker-status
    return
  fi
  ! command -v timeout >/dev/null || LIMIT=(timeout --foreground 3600) # a worker that hangs must not keep gcloud waiting for ever
  if [[ $(queue_state) == ACTIVE ]] && report=$(ask_workers 2>/dev/null) && [[ $report == *": running"* ]]; then started=1; fi
  while [[ $failures -le $MAX_RESTARTS ]]; do
    now=$(queue_state) || now="no answer from gcloud"
    [[ $now == "$before" ]] || echo "$NAME: ${now:-not there}"
    before=$now
    [[ $now == ACTIVE ]] || silent=''
    case $now in
      '') started='' && create || failures=$((failures + 1)) ;;
      SUSPENDED) started='' && delete || failures=$((failures + 1)) ;;
      FAILED) started='' failures=$((failures + 1)) && delete || true ;;
      ACTIVE)
        if [[ -z $started ]]; then
          if install_code && start --again; then started=1 silent=''; else failures=$((failures + 1)); fi
        elif ! report=$(ask_workers); then
          echo "$NAME: not all workers answer"
          silent=${silent:-$SECONDS}
          if [[ $((SECONDS - silent)) -ge $((60 * DEAD_AFTER)) ]]; then
            echo "$NAME: not for $DEAD_AFTER minutes: the slice is made again"
            started='' silent='' failures=$((failures + 1))
            delete || true
          fi
        elif silent='' && [[ $report == *": lost"* || $report == *": not started"* ]]; then
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
  echo "error: given up after $failures failures in a row; the slice, if it is still there, is billed until you delete it" >&2
  return 1
}

# What follows runs on a worker.

metadata() {
  curl -sf --max-time 5 -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

worker_number() { # 3, or 1.3 in the second of several slices
  local number slice
  if number=$(metadata agent-worker-number); then
    slice=$(metadata tpu-env | sed -n "s/^ *MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\)'\{0,1\} *$/\1/p") || slice=''
    echo "${slice:+$slice.}$number"
  else
    hostname
  fi
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
  if [[ -n $LOCKED ]]; then export PIP_CONSTRAINT=$HOME/clip_jax.lock; fi
  make_venv tpu,gcs
  mkdir -p "$RUN"
  echo "$BUCKET" >"$RUN/bucket"
  mount_bucket
}

worker_versions() { "$venv/bin/python" -m pip freeze --exclude-editable; }

# Mounts the bucket of setup, also after the machine was started again.
mount_bucket() {
  local bucket folder list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
  bucket=$(cat "$RUN/bucket" 2>/dev/null) || true
  folder=/mnt/$bucket
  if [[ -z $bucket ]] || mountpoint -q "$folder"; then return; fi
  if ! command -v gcsfuse >/dev/null; then # cloud.google.com/storage/docs/cloud-storage-fuse/install
    curl -sf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee "$list" >/dev/null
    sudo apt-get -qq update
    sudo apt-get -qq install -y gcsfuse
  fi
  sudo mkdir -p "$folder"
  sudo chown "$(id -u)" "$folder"
  gcsfuse --implicit-dirs "$bucket" "$folder"
}

worker_start() {
  local pid
  if pid=$(running_pid); then
    [[ -z $AGAIN ]] || return 0
    fail "worker $number: a run is there (pid $pid): stop it first"
  fi
  [[ -x $venv/bin/python ]] || fail "worker $number: the package is not installed: run setup first"
  mkdir -p "$RUN"
  rm -f "$RUN/status"
  mount_bucket
  (
    echo "$BASHPID" >"$RUN/pid"
    for variable in ${VARIABLES[@]+"${VARIABLES[@]}"}; do export "${variable?}"; done
    exec setsid nohup bash launch/tpu.sh worker-loop --max-restarts="$MAX_RESTARTS" --pause="$PAUSE" -- "${TRAIN[@]}"
  ) </dev/null >>"$RUN/worker-$number.log" 2>&1 &
  echo "worker $number: started"
}

worker_loop() {
  local status
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} # a worker whose chips are not there fails; without it, it would train alone on its CPU
  while true; do
    status=0
    supervise "$venv/bin/python" -m clip_jax.train "${TRAIN[@]}" || status=$?
    [[ $status -eq 42 && -z $stopping ]] || break
    echo "launcher: preempted; restart in $PAUSE s"
    sleep "$PAUSE"
  done
  write_status "$status"
  rm "$RUN/pid"
}

# In one step, because another command may read it at any time.
write_status() {
  echo "$1" >"$RUN/status.new"
  mv "$RUN/status.new" "$RUN/status"
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
      write_status 137
      rm "$RUN/pid"
    fi
  fi
  worker_status
}

worker_logs() {
  [[ -n $FOLLOW || -e $RUN/worker-$number.log ]] || return 0 # nothing has run yet
  tail -n "$TAIL" ${FOLLOW:+-F} "$RUN/worker-$number.log" | sed -u "s/^/[$number] /"
}

command=${1:---help}
[[ $# -eq 0 ]] || shift
request="type version slices" installation="poll bucket setup"
case $command in
  -h | --help) show_help && exit ;;
  create) values=$request switches="spot reserved" ;;
  setup) values=$installation switches="" ;;
  run)
    values="max-restarts pause env" switches="keep"
    [[ " $* " != *" --keep "* ]] || values+=" dead-after $request $installation" switches+=" spot reserved"
    ;;
  status) values="worker node" switches="" ;;
  logs) values="worker node tail" switches="follow" ;;
  stop) values="grace" switches="" ;;
  delete | worker-versions | worker-status) values="" switches="" ;;
  worker-setup) values="bucket" switches="locked" ;;
  worker-start | worker-loop) values="max-restarts pause env" switches="again" ;;
  worker-logs) values="tail" switches="follow" ;;
  worker-stop) values="grace" switches="" ;;
  *) fail "unknown command '$command'; known: create, setup, run, status, logs, stop, delete" ;;
esac
parse_flags "name zone project $values" "dry-run $switches" "$@"
take_ssh_flags
need_number MAX_RESTARTS PAUSE POLL GRACE TAIL SLICES DEAD_AFTER
[[ $command == create || -n $KEEP ]] || no_extra
case $command in
  worker-*) number=$(worker_number) ;;
  *) need NAME ZONE && need_program gcloud ;;
esac

case $command in
  create) check_request && create ;;
  setup)
    check_setup
    if [[ -n $DRY_RUN ]]; then queue_state; else wait_active; fi
    install_code
    ;;
  run)
    need_train
    if [[ -n $KEEP ]]; then check_request && check_setup && keep; else start; fi
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
