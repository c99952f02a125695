#!/usr/bin/env bash
# All GPU cases, each in a process of its own and at most two minutes long; their tables go into docs/benchmarks.md.
#
#     benchmarks/gpu.sh               on a GPU, some ten minutes
#     benchmarks/gpu.sh --tiny true   on any machine: small shapes, and nothing is written
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0
write=(--write) limit=120
[ $# -gt 0 ] && write=() limit=0
for case in gpu_1b gpu_7b gpu_7b_nf4 gpu_joint gpu_sweep; do
  timeout $limit "${PYTHON:-python}" -m benchmarks "$case" ${write[@]+"${write[@]}"} "$@"
  status=$?
  [ $status -eq 0 ] || { echo "$case ended with $status" >&2; failed=1; }
done
exit $failed
