# shellcheck shell=bash
# Sourced by the launchers, from the repository's root.
MAX_RESTARTS=${MAX_RESTARTS:-3} PAUSE=${PAUSE:-10} DRY_RUN=${DRY_RUN:-} BUCKET=${BUCKET:-} stopping=

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the head of the script, whose path may be relative to the folder that the user is in.
show_help() {
  local installed='' # clip-jax launch
  [[ -z ${CLIP_JAX_LAUNCH:-} ]] || installed='gsub(/bash launch\//, "clip-jax launch "); gsub(/\.sh /, " ");'
  awk "NR > 1 { if (!/^#/) exit; sub(/^# ?/, \"\"); $installed print }" "${CLIP_JAX_LAUNCH:-launch}/${0##*/}"
}

# parse_flags "name max-restarts" "dry-run" ARGUMENT...: --name=VALUE sets NAME, --dry-run sets DRY_RUN. --env=VARIABLE=VALUE, if it is
# among the names, may be repeated and is collected in the array VARIABLES. Other options are left in the array EXTRA, what follows -- in the
# array TRAIN.
parse_flags() {
  local values=" $1 " switches=" $2 " key variable
  shift 2
  EXTRA=() TRAIN=() VARIABLES=()
  while [[ $# -gt 0 ]]; do
    key=${1%%=*} key=${key#--}
    variable=$(tr 'a-z-' 'A-Z_' <<<"$key")
    case $1 in
      --) TRAIN=("${@:2}"); return ;;
      -h | --help) show_help; exit 0 ;;
      --config | --config.* | --config=* | --workdir | --workdir=*) fail "$key is an argument of the trainer: write it after --" ;;
      --env=*)
        [[ $values == *" env "* ]] || fail "unknown option --env; see --help"
        [[ ${1#--env=} =~ ^[a-zA-Z_][a-zA-Z0-9_]*= ]] || fail "$1: write --env=VARIABLE=VALUE"
        VARIABLES+=("${1#--env=}")
        ;;
      --*=*) if [[ $values == *" $key "* ]]; then printf -v "$variable" %s "${1#*=}"; else EXTRA+=("$1"); fi ;;
      --*)
        [[ $values != *" $key "* ]] || fail "--$key has no value: write --$key=VALUE"
        if [[ $switches == *" $key "* ]]; then printf -v "$variable" 1; else EXTRA+=("$1"); fi
        ;;
      *) fail "unexpected argument '$1'; see --help" ;;
    esac
    shift
  done
}

no_extra() { [[ ${#EXTRA[@]} -eq 0 ]] || fail "unknown option ${EXTRA[0]}; see --help"; }

# need VARIABLE...: each must have been given, by its flag or in the environment.
need() {
  local variable
  for variable in "$@"; do
    [[ -n ${!variable:-} ]] || fail "--$(tr 'A-Z_' 'a-z-' <<<"$variable")=... is missing (or $variable in the environment)"
  done
}

need_number() {
  local variable
  for variable in "$@"; do
    [[ ${!variable} =~ ^[0-9]+$ ]] || fail "--$(tr 'A-Z_' 'a-z-' <<<"$variable")=${!variable} is not a whole number"
  done
}

check_bucket() {
  [[ -z $BUCKET || $BUCKET =~ ^[a-z0-9][a-z0-9._-]*$ ]] || fail "--bucket=$BUCKET is no name of a bucket; gs://... goes into --workdir"
}

need_train() { [[ ${#TRAIN[@]} -gt 0 ]] || fail "no arguments for the trainer: -- --config=configs/clip.py:b16 --workdir=..."; }

need_program() { [[ -n $DRY_RUN ]] || command -v "$1" >/dev/null || fail "$1 is not installed, or not on PATH"; }

# quoted ARGUMENT...: the arguments as a part of a command line that any POSIX shell reads back unchanged.
quoted() {
  local argument separator='' mark="'" escaped="'\\''"
  for argument in "$@"; do
    if [[ -z $argument || $argument == *[!a-zA-Z0-9_./:=,@%+-]* ]]; then argument="'${argument//$mark/$escaped}'"; fi
    printf '%s%s' "$separator" "$argument"
    separator=' '
  done
}

# Runs a command, or only prints it.
run() {
  if [[ -z $DRY_RUN ]]; then "$@"; else quoted "$@" && echo; fi
}

# supervise COMMAND...: starts it again while its exit status says so. Returns at 0 (done), 2 (wrong input) and 42 (preempted, state saved);
# after any other status it restarts, MAX_RESTARTS times in a row at most, where a run of ten minutes begins a new row. After 44 (storage
# failed) it restarts up to 30 times in a row, and the pause doubles up to 32 times PAUSE: a service may fail for an hour. SIGTERM is passed on
# to the command and ends the restarts.
supervise() {
  local status=143 child='' signalled='' restarts=0 start limit pause
  trap 'stopping=1 signalled=1; [[ -z ${child:-} ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  while [[ -z $stopping ]]; do
    start=$(date +%s)
    "$@" &
    child=$!
    [[ -z $stopping ]] || kill -TERM "$child"
    # A signal ends the wait, not the command: its own status comes from the next wait.
    while status=0 && { wait "$child" || status=$?; } && [[ -n $signalled ]]; do signalled=''; done
    child=''
    case $status in 0 | 2 | 42) return "$status" ;; esac
    [[ -z $stopping ]] || break
    if [[ $(($(date +%s) - start)) -ge 600 ]]; then restarts=0; fi
    limit=$MAX_RESTARTS pause=$PAUSE
    if [[ $status -eq 44 ]]; then limit=30 pause=$((PAUSE * 2 ** (restarts < 5 ? restarts : 5))); fi
    if [[ $restarts -ge $limit ]]; then
      echo "launcher: exit status $status; given up after $restarts restarts in a row"
      break
    fi
    restarts=$((restarts + 1))
    echo "launcher: exit status $status; restart $restarts of $limit in $pause s"
    sleep "$pause" & # so that SIGTERM ends it
    child=$!
    [[ -z $stopping ]] || kill "$child"
    wait "$child" || true
    child=''
  done
  return "$status"
}
