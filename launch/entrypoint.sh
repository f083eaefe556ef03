#!/usr/bin/env bash
# What the image starts: the command that it is given, and nothing else, but for two things.
#   docker run IMAGE amsf train configs/quickstart.yaml
#   docker run -e NNODES=2 -e MASTER_ADDR=... IMAGE amsf train CONFIG     goes through torchrun.sh
#   docker run IMAGE --dry-run amsf train CONFIG                          prints what would run
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
dry_run=no
if [[ ${1-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
[[ $# -gt 0 ]] || set -- amsf --help

# `amsf train` starts the processes of one machine; several need a rendezvous.
if [[ ${NNODES:-1} != 1 && $1 == amsf && ${2-} =~ ^(train|preflight)$ ]]; then
  task=$2
  shift 2
  [[ $task == train ]] || set -- --preflight "$@"
  set -- "$here/torchrun.sh" "$@"
fi
printf '+%s\n' "$(printf ' %q' "$@")"
[[ $dry_run == no ]] || exit 0
# A container that is started again has the file of the run before.
[[ -z ${AMSF_HEARTBEAT-} ]] || rm -f "$AMSF_HEARTBEAT"
exec "$@"
