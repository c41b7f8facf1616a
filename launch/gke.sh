#!/usr/bin/env bash
# Trains on TPU or GPU node pools of a Google Kubernetes Engine cluster, as a JobSet; kubectl must point at the cluster:
#   bash launch/gke.sh run --name=clip --image=REGISTRY/clip_jax --accelerator=tpu-v5-lite-podslice --topology=4x8 \
#     -- --config=configs/clip.py:b16 --workdir=/mnt/bucket/clip
#   bash launch/gke.sh run --name=clip --image=REGISTRY/clip_jax --accelerator=nvidia-h100-80gb --nodes=4 -- ...
#
# run      applies the manifest; with --dry-run prints it. What follows -- goes to python -m clip_jax.train.
#          TPU: --topology=4x8, --slices=1, --chips-per-node=4. GPU: --nodes=1, --gpus-per-node=8. --spot: nodes that can be taken away.
#          Pods that are preempted start again; after another failure all do, at most --max-restarts=3 times; not after wrong input.
#          Before it is killed a pod has --grace=300 seconds to save the state
# status   the JobSet and its pods
# logs     the logs of all pods, each line with the pod's name: --tail=50 lines, --follow
# delete   deletes the JobSet: the pods save their state and stop
#
# --name, --image, --namespace (by default kubectl's), ... can also be given as NAME, IMAGE, ... in the environment. --dry-run prints the
# commands and runs none. docs/launching.md says how to build the image.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

NAME=${NAME:-} NAMESPACE=${NAMESPACE:-} IMAGE=${IMAGE:-} ACCELERATOR=${ACCELERATOR:-} TOPOLOGY=${TOPOLOGY:-} SPOT=${SPOT:-}
SLICES=${SLICES:-1} CHIPS_PER_NODE=${CHIPS_PER_NODE:-4} NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
GRACE=${GRACE:-300} TAIL=${TAIL:-50} FOLLOW=''

kubernetes() { run kubectl ${NAMESPACE:+--namespace="$NAMESPACE"} "$@"; }

# json STRING...: a list of strings, in which Kubernetes expands no $(VARIABLE).
json() {
  local string separator=''
  for string in "$@"; do
    string=$(sed 's/\\/\\\\/g; s/"/\\"/g; s/[$][(]/$&/g' <<<"$string" | awk 'NR > 1 { printf "\\n" } { printf "%s", $0 }')
    printf '%s"%s"' "$separator" "$string"
    separator=', '
  done
}

manifest() {
  local nodes=$NODES count=$GPUS_PER_NODE resource=nvidia.com/gpu chips distributed='' annotations='{}'
  local selector="cloud.google.com/gke-accelerator: $ACCELERATOR"
  if [[ $ACCELERATOR == tpu* ]]; then
    need TOPOLOGY
    [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "--topology=$TOPOLOGY is not of the form 4x8 or 2x2x4"
    chips=$((${TOPOLOGY//x/*}))
    count=$CHIPS_PER_NODE resource=google.com/tpu nodes=$((chips / CHIPS_PER_NODE))
    [[ $((nodes * count)) -eq $chips ]] || fail "--topology=$TOPOLOGY has $chips chips, no multiple of --chips-per-node=$CHIPS_PER_NODE"
    selector="cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY"
    # Each slice is a node pool, and takes one of the jobs.
    [[ $SLICES -eq 1 ]] || annotations='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
  elif [[ $SLICES -ne 1 ]]; then
    fail "--slices is for TPUs; --nodes is the number of machines with GPUs"
  elif [[ $NODES -gt 1 ]]; then # on a TPU the processes find each other by themselves
    distributed=", \"--coordinator=$NAME-train-0-0.$NAME:8476\", \"--processes=$NODES\", \"--process=\$(JOB_COMPLETION_INDEX)\""
  fi
  if [[ -n $SPOT ]]; then
    selector+='
              cloud.google.com/gke-spot: "true"'
  fi
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations: $annotations
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: train
    replicas: $SLICES
    template:
      spec:
        completionMode: Indexed
        completions: $nodes
        parallelism: $nodes
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob # wrong input
            onExitCodes: {containerName: train, operator: In, values: [2]}
          - action: Ignore # preempted, or a peer was: the pod is replaced, and not counted
            onExitCodes: {containerName: train, operator: In, values: [42, 43]}
          - action: Ignore
            onPodConditions: [{type: DisruptionTarget, status: "True"}]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $GRACE
            nodeSelector:
              $selector
            containers:
            - name: train
              image: $(json "$IMAGE")
              command: [$(json python -m clip_jax.train "${TRAIN[@]}")$distributed]
              resources:
                limits: {$resource: $count}
              volumeMounts:
              - {name: shared-memory, mountPath: /dev/shm}
            volumes:
            - {name: shared-memory, emptyDir: {medium: Memory}} # the loader's processes hand over batches in it
YAML
}

apply() {
  local yaml
  need IMAGE ACCELERATOR
  need_train
  yaml=$(manifest)
  if [[ -n $DRY_RUN ]]; then
    echo "$yaml"
  else
    kubernetes apply -f - <<<"$yaml"
  fi
}

command=${1:---help}
[[ $# -eq 0 ]] || shift
case $command in
  -h | --help) show_help && exit ;;
  run) values="image accelerator topology slices chips-per-node nodes gpus-per-node max-restarts grace" switches="spot" ;;
  logs) values="tail" switches="follow" ;;
  status | delete) values="" switches="" ;;
  *) fail "unknown command '$command'; known: run, status, logs, delete" ;;
esac
parse_flags "name namespace $values" "dry-run $switches" "$@"
no_extra
need NAME
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "--name=$NAME: lower-case letters, digits and - are allowed"
need_number SLICES CHIPS_PER_NODE NODES GPUS_PER_NODE MAX_RESTARTS GRACE TAIL
need_program kubectl
pods=--selector=jobset.sigs.k8s.io/jobset-name=$NAME
case $command in
  run) apply ;;
  status) kubernetes get jobset "$NAME" && kubernetes get pods "$pods" --output=wide ;;
  logs) kubernetes logs "$pods" --prefix --tail="$TAIL" --max-log-requests=1000 ${FOLLOW:+--follow} ;;
  delete) kubernetes delete jobset "$NAME" ;;
esac
