#!/usr/bin/env bash
# Start a training job with DeepSpeed's launcher; the config says parallel: deepspeed.
#   launch/deepspeed.sh [--dry-run] CONFIG [key=value ...]
#   NPROC_PER_NODE=2 launch/deepspeed.sh configs/quickstart_zero3.yaml    two processes, here on CPUs
#   HOSTFILE=hosts launch/deepspeed.sh CONFIG     on every machine in the file, from here, over ssh
# NPROC_PER_NODE (every GPU), HOSTFILE, MASTER_PORT (29500), PYTHON (python),
# DS_ACCELERATOR (cpu: leave the GPUs alone, with device=cpu).
set -euo pipefail

dry_run=no
if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: launch/deepspeed.sh [--dry-run] CONFIG [key=value ...]" >&2
  exit 2
fi

command=("${PYTHON:-python}" -m deepspeed.launcher.runner)
[[ -n ${NPROC_PER_NODE-} ]] && command+=(--num_gpus "$NPROC_PER_NODE")
[[ -n ${HOSTFILE-} ]] && command+=(--hostfile "$HOSTFILE")
command+=(--master_port "${MASTER_PORT:-29500}" --no_local_rank --module amsf_dist train "$@")

printf '+%s\n' "$(printf ' %q' "${command[@]}")"
[[ $dry_run == no ]] || exit 0

# SIGTERM to the launcher alone would leave its processes behind, so it goes to all of them: they
# save and leave. 143 tells a scheduler that this is what happened.
set -m # a process group of their own
"${command[@]}" &
group=$!
trap 'stopped=yes; kill -TERM -- "-$group" 2>/dev/null' TERM INT HUP
code=0
wait "$group" || code=$?
if [[ ${stopped-} == yes ]]; then
  while kill -0 -- "-$group" 2>/dev/null; do sleep 0.5; done
  code=143
fi
exit "$code"
