#!/usr/bin/env bash
# Start a training job with torchrun, on this machine or as one of several.
#   launch/torchrun.sh [--dry-run] CONFIG [key=value ...]
#   NPROC_PER_NODE=2 launch/torchrun.sh configs/quickstart.yaml        two processes, here on CPUs
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh configs/llama_1b_fsdp2.yaml
# The last one on every machine, each with its NODE_RANK; output_dir must be on a disk they share.
# NPROC_PER_NODE (gpu), NNODES (1), NODE_RANK (0), MASTER_ADDR, MASTER_PORT (29500), JOB_ID (amsf),
# LOCAL_ADDR (this machine's address for the others, if its host name is not one), PYTHON (python).
set -euo pipefail

dry_run=no
if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: launch/torchrun.sh [--dry-run] CONFIG [key=value ...]" >&2
  exit 2
fi
if [[ ${NNODES:-1} != 1 && -z ${MASTER_ADDR-} ]]; then
  echo "launch/torchrun.sh: NNODES=$NNODES needs MASTER_ADDR, the address of node 0" >&2
  exit 2
fi

command=("${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "${NPROC_PER_NODE:-gpu}")
if [[ ${NNODES:-1} == 1 ]]; then
  command+=(--standalone --local-addr 127.0.0.1)
else
  # Which node is the host is guessed from host names otherwise, and with two networks nobody is.
  is_host=0
  [[ ${NODE_RANK:-0} == 0 ]] && is_host=1
  command+=(--nnodes "$NNODES" --rdzv-id "${JOB_ID:-amsf}" --rdzv-backend c10d)
  command+=(--rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-conf "is_host=$is_host")
  [[ -n ${LOCAL_ADDR-} ]] && command+=(--local-addr "$LOCAL_ADDR")
fi
command+=(-m amsf_dist train "$@")

# How long torchrun lets the processes save after SIGTERM. It exits with 1 then; they have saved.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
printf '+%s\n' "$(printf ' %q' "${command[@]}")"
[[ $dry_run == yes ]] || exec "${command[@]}"
