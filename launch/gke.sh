#!/usr/bin/env bash
# Trains on TPU or GPU node pools of a Google Kubernetes Engine cluster, as a JobSet; kubectl must point at the cluster:
#   bash launch/gke.sh run --name=clip --image=REGISTRY/clip_jax --accelerator=tpu-v5-lite-podslice --topology=4x8 \
#     -- --config=configs/clip.py:b16 --workdir=gs://BUCKET/clip
#   bash launch/gke.sh run --name=clip --image=REGISTRY/clip_jax --accelerator=nvidia-h100-80gb --nodes=4 -- ...
#
# run      applies the manifest; with --dry-run prints it. What follows -- goes to python -m clip_jax.train.
#          TPU: --topology=4x8, --slices=1, --chips-per-node=4. GPU: --nodes=1, --gpus-per-node=8. --spot: nodes that can be taken away.
#          --service-account=NAME: the Kubernetes service account, which needs access to the bucket. --bucket=NAME mounts a bucket at
#          /mnt/NAME by the Cloud Storage FUSE CSI driver; gs://... needs no mount. --env=VARIABLE=VALUE, which may be repeated.
#          --host-network: the pods use the network of their nodes. --gpu-network=rdma: GPUDirect RDMA of A3 Ultra and A4 nodes.
#          Pods that are preempted start again; so do, at most --max-lost=30 times each, pods that lost another one or the storage. After
#          another failure all do, at most --max-restarts=3 times; not after wrong input.
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
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-} HOST_NETWORK=${HOST_NETWORK:-} GPU_NETWORK=${GPU_NETWORK:-} MAX_LOST=${MAX_LOST:-30}
GRACE=${GRACE:-300} TAIL=${TAIL:-50} FOLLOW=''

kubernetes() { run kubectl ${NAMESPACE:+--namespace="$NAMESPACE"} "$@"; }

# json STRING...: a list of strings, in which Kubernetes expands no $(VARIABLE).
json() {
  local string separator=''
  for string in "$@"; do
    string=$(sed 's/\\/\\\\/g; s/"/\\"/g; s/[$]/&&/g' <<<"$string" | awk 'NR > 1 { printf "\\n" } { printf "%s", $0 }')
    printf '%s"%s"' "$separator" "$string"
    separator=', '
  done
}

# variable NAME VALUE: an environment variable of the container.
variable() {
  printf '\n              - {name: %s, value: %s}' "$1" "$(json "$2")"
}

manifest() {
  local nodes=$NODES count=$GPUS_PER_NODE resource=nvidia.com/gpu chips command distributed='' annotations='{}' pod_annotations='' pod='' pair
  local selector="cloud.google.com/gke-accelerator: $ACCELERATOR" environment mounts='' volumes='' libraries=/usr/local/nvidia/lib64
  command=$(json python -m clip_jax.train "${TRAIN[@]}")
  if [[ $ACCELERATOR == tpu* ]]; then
    need TOPOLOGY
    [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "--topology=$TOPOLOGY is not of the form 4x8 or 2x2x4"
    [[ -z $GPU_NETWORK ]] || fail "--gpu-network is for GPUs"
    chips=$((${TOPOLOGY//x/*}))
    count=$CHIPS_PER_NODE resource=google.com/tpu nodes=$((chips / CHIPS_PER_NODE))
    [[ $((nodes * count)) -eq $chips ]] || fail "--topology=$TOPOLOGY has $chips chips, no multiple of --chips-per-node=$CHIPS_PER_NODE"
    selector="cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY"
    # Each slice is a node pool, and takes one of the jobs.
    [[ $SLICES -eq 1 ]] || annotations='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
    # A pod whose chips are not there fails; without it, it would train alone on its CPU.
    environment=$(variable JAX_PLATFORMS tpu,cpu)
  else
    [[ $SLICES -eq 1 ]] || fail "--slices is for TPUs; --nodes is the number of machines with GPUs"
    if [[ $NODES -gt 1 ]]; then # on a TPU the processes find each other by themselves
      distributed=", \"--coordinator=$NAME-train-0-0.$NAME:8476\", \"--processes=$NODES\", \"--process=\$(JOB_COMPLETION_INDEX)\""
    fi
    case $GPU_NETWORK in
      '') ;;
      rdma) # GoogleCloudPlatform/container-engine-accelerators, gpudirect-rdma/nccl-test.yaml
        [[ -z $HOST_NETWORK ]] || fail "--gpu-network=rdma gives the pod networks of its own: leave out --host-network"
        libraries=/usr/local/gib/lib64:$libraries
        command="$(json bash -c 'source /usr/local/gib/scripts/set_nccl_env.sh && exec "$@"' train), $command"
        pod_annotations+="
              networking.gke.io/default-interface: eth0
              networking.gke.io/interfaces: '$(rdma_interfaces)'"
        mounts+='
              - {name: nvidia, mountPath: /usr/local/nvidia}
              - {name: gib, mountPath: /usr/local/gib}'
        volumes+='
            - {name: nvidia, hostPath: {path: /home/kubernetes/bin/nvidia}}
            - {name: gib, hostPath: {path: /home/kubernetes/bin/gib}}'
        ;;
      *) fail "--gpu-network=$GPU_NETWORK is not known; allowed: rdma" ;;
    esac
    environment="$(variable JAX_PLATFORMS cuda,cpu)$(variable LD_LIBRARY_PATH $libraries)"
  fi
  for pair in ${VARIABLES[@]+"${VARIABLES[@]}"}; do environment+=$(variable "${pair%%=*}" "${pair#*=}"); done
  if [[ -n $SPOT ]]; then
    selector+='
              cloud.google.com/gke-spot: "true"'
  fi
  if [[ -n $BUCKET ]]; then
    pod_annotations+='
              gke-gcsfuse/volumes: "true"'
    mounts+="
              - {name: bucket, mountPath: /mnt/$BUCKET}"
    volumes+="
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: \"$BUCKET\", mountOptions: implicit-dirs${HOST_NETWORK:+, hostNetworkPodKSA: \"true\"}}"
  fi
  pod+=${SERVICE_ACCOUNT:+"
            serviceAccountName: $SERVICE_ACCOUNT"}
  pod+=${HOST_NETWORK:+"
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet"}
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
    - name: wrongInput
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: train
    replicas: $SLICES
    template:
      spec:
        completionMode: Indexed
        completions: $nodes
        parallelism: $nodes
        backoffLimitPerIndex: $MAX_LOST
        maxFailedIndexes: 0
        podFailurePolicy:
          rules:
          - action: FailJob # wrong input
            onExitCodes: {containerName: train, operator: In, values: [2]}
          - action: Ignore # preempted: the pod is replaced, and not counted
            onExitCodes: {containerName: train, operator: In, values: [42]}
          - action: Ignore
            onPodConditions: [{type: DisruptionTarget, status: "True"}]
          - action: Count # another pod is lost, or the storage failed: the pod is replaced, after a pause that grows
            onExitCodes: {containerName: train, operator: In, values: [43, 44]}
          - action: FailIndex # another failure: the whole JobSet starts again
            onExitCodes: {containerName: train, operator: NotIn, values: [2, 42, 43, 44]}
        template:
          metadata:
            annotations: ${pod_annotations:-"{}"}
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $GRACE$pod
            nodeSelector:
              $selector
            containers:
            - name: train
              image: $(json "$IMAGE")
              command: [$command$distributed]
              env:$environment
              resources:
                limits: {$resource: $count}
              volumeMounts:
              - {name: shared-memory, mountPath: /dev/shm}$mounts
            volumes:
            - {name: shared-memory, emptyDir: {medium: Memory}} # the loader's processes hand over batches in it$volumes
YAML
}

# The networks of a node, named as Google's guides and its Cluster Toolkit name them.
rdma_interfaces() {
  local index
  printf '[{"interfaceName":"eth0","network":"default"}'
  for index in {0..7}; do printf ',{"interfaceName":"eth%s","network":"rdma-%s"}' $((index + 2)) "$index"; done
  printf ']'
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
  run)
    values="image accelerator topology slices chips-per-node nodes gpus-per-node max-restarts max-lost grace"
    values+=" service-account bucket env gpu-network" switches="spot host-network"
    ;;
  logs) values="tail" switches="follow" ;;
  status | delete) values="" switches="" ;;
  *) fail "unknown command '$command'; known: run, status, logs, delete" ;;
esac
parse_flags "name namespace $values" "dry-run $switches" "$@"
no_extra
need NAME
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "--name=$NAME: lower-case letters, digits and - are allowed"
need_number SLICES CHIPS_PER_NODE NODES GPUS_PER_NODE MAX_RESTARTS MAX_LOST GRACE TAIL
check_bucket
need_program kubectl
pods=--selector=jobset.sigs.k8s.io/jobset-name=$NAME
case $command in
  run) apply ;;
  status) kubernetes get jobset "$NAME" && kubernetes get pods "$pods" --output=wide ;;
  logs) kubernetes logs "$pods" --prefix --tail="$TAIL" --max-log-requests=1000 ${FOLLOW:+--follow} ;;
  delete) kubernetes delete jobset "$NAME" ;;
esac
