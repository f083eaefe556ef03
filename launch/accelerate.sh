#!/usr/bin/env bash
# Start a script of yours (examples/accelerate_train.py) with accelerate's launcher.
#   launch/accelerate.sh [--dry-run] CONFIG SCRIPT [ARG ...]
#   DEVICE=cpu NPROC_PER_NODE=2 launch/accelerate.sh configs/accelerate/ddp.yaml SCRIPT
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 NPROC_PER_NODE=8 launch/accelerate.sh CONFIG SCRIPT
# The last one on every machine, each with its NODE_RANK.
# NPROC_PER_NODE (what CONFIG says), NNODES (1), NODE_RANK (0), MASTER_ADDR, MASTER_PORT (29500),
# DEVICE (gpu; cpu: DDP over gloo), PYTHON (python).
set -euo pipefail

dry_run=no
if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
if [[ $# -lt 2 || $1 == -* ]]; then
  echo "usage: launch/accelerate.sh [--dry-run] CONFIG SCRIPT [ARG ...]" >&2
  exit 2
fi

refuse() {
  echo "launch/accelerate.sh: $1" >&2
  exit 2
}
config=$1 nodes=${NNODES:-1}
shift
[[ -r $config ]] || refuse "$config: no such file; see configs/accelerate/"
if [[ $nodes != 1 ]]; then
  [[ -n ${MASTER_ADDR-} ]] || refuse "NNODES=$nodes needs MASTER_ADDR, the address of node 0"
  [[ -n ${NPROC_PER_NODE-} ]] || refuse "NNODES=$nodes needs NPROC_PER_NODE"
fi

# What accelerate does on a CPU without a word: one process where more were asked for, processes that
# train alone side by side, or DDP in the place of FSDP and DeepSpeed.
if grep -Eiq '^(use_cpu: *true|distributed_type: *.?multi_cpu)' "$config"; then
  refuse "$config: accelerate starts a single process with use_cpu or MULTI_CPU, whatever num_processes says; take configs/accelerate/ddp.yaml and DEVICE=cpu"
fi
command=("${PYTHON:-python}" -m accelerate.commands.launch --config_file "$config")
case ${DEVICE:-gpu} in
  cpu)
    if grep -Eq '^distributed_type: *.?(FSDP|DEEPSPEED)' "$config"; then
      refuse "$config: on a CPU accelerate leaves FSDP and DeepSpeed out without a word; try it with: amsf doctor $config"
    fi
    command=(env ACCELERATE_USE_CPU=true "${command[@]}")
    ;;
  gpu)
    if [[ $dry_run == no ]] && ! "${PYTHON:-python}" -c \
      'import sys, torch; sys.exit(0 if torch.cuda.is_available() or torch.xpu.is_available() else 1)'; then
      refuse "torch sees no GPU, and every process would train alone; DEVICE=cpu for DDP on CPUs"
    fi
    ;;
  *) refuse "DEVICE=$DEVICE is neither gpu nor cpu" ;;
esac
if [[ -n ${NPROC_PER_NODE-} ]]; then
  command+=(--num_processes "$((NPROC_PER_NODE * nodes))")
fi
command+=(--num_machines "$nodes")
if [[ $nodes != 1 ]]; then
  command+=(--machine_rank "${NODE_RANK:-0}" --main_process_ip "$MASTER_ADDR")
fi
command+=(--main_process_port "${MASTER_PORT:-29500}" "$@")

printf '+%s\n' "$(printf ' %q' "${command[@]}")"
[[ $dry_run == yes ]] || exec "${command[@]}"
