#!/usr/bin/env bash
# Submit launch/kubernetes.yaml, several machines under Kubernetes.
#   launch/kubernetes.sh [--dry-run] CONFIG [key=value ...]       --dry-run: print it, submit nothing
#   NNODES=4 IMAGE=registry/amsf-dist:cuda CLAIM=my-disk launch/kubernetes.sh configs/llama_8b_fsdp2.yaml
# CONFIG is a path in the image or on the claim. The claim, mounted at /workspace/runs, must be one
# that all nodes may write (ReadWriteMany). To stop: kubectl delete job NAME; the same command continues.
# NAME (amsf), NNODES (2; 1:4 is elastic), IMAGE (amsf-dist:cuda), CLAIM (amsf-runs), GPUS (8, a node),
# NPROC_PER_NODE (gpu), CPUS (32), MEMORY (256Gi), SHM_SIZE (16Gi), MASTER_PORT (29500),
# KUBECTL (kubectl; "kubectl -n team").
set -euo pipefail

dry_run=no
if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: launch/kubernetes.sh [--dry-run] CONFIG [key=value ...]" >&2
  exit 2
fi

# A JSON list is a YAML list.
arguments='"amsf", "train"'
for word in "$@"; do
  word=${word//\\/\\\\}
  arguments+=", \"${word//\"/\\\"}\""
done
nodes=${NNODES:-2}
text=$(<"$(dirname "$(readlink -f "$0")")/kubernetes.yaml")
fill() { text=${text//"\${$1}"/"$2"}; }
fill ARGS "[$arguments]"
fill NAME "${NAME:-amsf}"
fill NNODES "$nodes"
fill NODES "${nodes#*:}"
fill IMAGE "${IMAGE:-amsf-dist:cuda}"
fill CLAIM "${CLAIM:-amsf-runs}"
fill GPUS "${GPUS:-8}"
fill NPROC_PER_NODE "${NPROC_PER_NODE:-gpu}"
fill CPUS "${CPUS:-32}"
fill MEMORY "${MEMORY:-256Gi}"
fill SHM_SIZE "${SHM_SIZE:-16Gi}"
fill MASTER_PORT "${MASTER_PORT:-29500}"

read -r -a command <<<"${KUBECTL:-kubectl}"
command+=(apply -f -)
printf '# +%s\n' "$(printf ' %q' "${command[@]}")"
if [[ $dry_run == yes ]]; then
  printf '%s\n' "$text"
else
  "${command[@]}" <<<"$text"
fi
