#!/usr/bin/env bash
# Start a training job with torchrun, on this machine or as one of several.
#   launch/torchrun.sh [--dry-run] [--preflight] CONFIG [key=value ...]
#   NPROC_PER_NODE=2 launch/torchrun.sh configs/quickstart.yaml        two processes, here on CPUs
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh configs/llama_1b_fsdp2.yaml
#   NNODES=1:4 ...     elastic: one to four nodes; those that go are left out, those that come join
# The last two on every machine, each with its NODE_RANK; output_dir must be on a disk they share.
# --preflight tries what the job needs instead of training.
# NPROC_PER_NODE (gpu), NNODES (1), NODE_RANK (0), MASTER_ADDR, MASTER_PORT (29500), JOB_ID (amsf),
# LOCAL_ADDR (this machine's address for the others, if its host name is not one), PYTHON (python),
# MAX_RESTARTS (0, elastic: 10), RDZV_TIMEOUT (600: seconds that the nodes have to come together),
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT (240: seconds to save in after SIGTERM).
# Exit code: 0 done, 143 told to stop and saved, 2 a mistake in the config, 1 anything else.
set -euo pipefail

dry_run=no
task=train
while [[ ${1-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --preflight) task=preflight ;;
    *) break ;;
  esac
  shift
done
if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: launch/torchrun.sh [--dry-run] [--preflight] CONFIG [key=value ...]" >&2
  exit 2
fi
nodes=${NNODES:-1}
if [[ $nodes != 1 && -z ${MASTER_ADDR-} ]]; then
  echo "launch/torchrun.sh: NNODES=$nodes needs MASTER_ADDR, the address of node 0" >&2
  exit 2
fi

command=("${PYTHON:-python}" -m amsf_dist.train.elastic --nproc-per-node "${NPROC_PER_NODE:-gpu}")
restarts=0
if [[ $nodes == 1 ]]; then
  command+=(--standalone --local-addr 127.0.0.1)
else
  # Which node is the host is guessed from host names otherwise, and with two networks nobody is.
  conf=is_host=0
  [[ ${NODE_RANK:-0} == 0 ]] && conf=is_host=1
  conf+=,join_timeout=${RDZV_TIMEOUT:-600},read_timeout=${RDZV_TIMEOUT:-600}
  if [[ $nodes == *:* ]]; then
    restarts=10
    # Every round waits for late nodes, 30 s if nothing is said; a lost node is noticed by these.
    conf+=,last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=2
    # torch 2.13 gives the workers a store that a node which joins later does not find.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  fi
  command+=(--nnodes "$nodes" --rdzv-id "${JOB_ID:-amsf}" --rdzv-backend c10d)
  command+=(--rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-conf "$conf")
  [[ -n ${LOCAL_ADDR-} ]] && command+=(--local-addr "$LOCAL_ADDR")
fi
command+=(--max-restarts "${MAX_RESTARTS:-$restarts}" -m amsf_dist "$task" "$@")

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
printf '+%s\n' "$(printf ' %q' "${command[@]}")"
[[ $dry_run == yes ]] || exec "${command[@]}"
