#!/usr/bin/env bash
# Run the image on this machine's GPUs.
#   launch/docker.sh [--dry-run] amsf train configs/llama_125m_single.yaml
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/docker.sh amsf train CONFIG    on each machine
#   GPUS= SHM_SIZE=512m launch/docker.sh amsf train configs/quickstart.yaml         on CPUs
# ./runs is where it writes; ./data, ./models and ./configs are read, where they exist.
# IMAGE (amsf-dist:cuda), GPUS (all; empty: none), SHM_SIZE (16g), MEMLOCK (-1; empty: docker's),
# RUN_AS (your user and group; a root's: the image's own), NETWORK (host), STOP_SECONDS (300), NAME,
# RUNS (./runs), CACHE (a volume for what is compiled), DOCKER (docker), DOCKER_FLAGS (more of them).
set -euo pipefail

dry_run=no
if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
if [[ $# -eq 0 ]]; then
  echo "usage: launch/docker.sh [--dry-run] COMMAND [WORD ...]" >&2
  exit 2
fi

runs=${RUNS:-$PWD/runs}
command=("${DOCKER:-docker}" run --rm --network "${NETWORK:-host}")
command+=(--stop-timeout "${STOP_SECONDS:-300}" --shm-size "${SHM_SIZE:-16g}")
command+=(--ulimit stack=67108864)
[[ -z ${MEMLOCK--1} ]] || command+=(--ulimit "memlock=${MEMLOCK--1}")
[[ -z ${GPUS-all} ]] || command+=(--gpus "${GPUS-all}")
command+=(--cap-drop ALL --security-opt no-new-privileges)
[[ -z ${NAME-} ]] || command+=(--name "$NAME")
user=${RUN_AS-$(id -u):$(id -g)}
[[ -z $user || $user == 0:* ]] || command+=(--user "$user")
command+=(--volume "$runs:/workspace/runs" --volume "${CACHE:-amsf-cache}:/cache")
for folder in data models configs; do
  [[ ! -d $PWD/$folder ]] || command+=(--volume "$PWD/$folder:/workspace/$folder:ro")
done
for name in NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT JOB_ID LOCAL_ADDR MAX_RESTARTS \
  RDZV_TIMEOUT TORCH_ELASTIC_SHUTDOWN_TIMEOUT NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_HCA \
  GLOO_SOCKET_IFNAME; do
  [[ -z ${!name-} ]] || command+=(--env "$name=${!name}")
done
# Words of the user's, split at blanks as in a shell: "--device /dev/infiniband --env A=b".
read -r -a more <<<"${DOCKER_FLAGS-}"
command+=(${more[@]+"${more[@]}"} "${IMAGE:-amsf-dist:cuda}" "$@")

printf '+%s\n' "$(printf ' %q' "${command[@]}")"
[[ $dry_run == no ]] || exit 0
mkdir -p "$runs" # docker would make it as root
exec "${command[@]}"
