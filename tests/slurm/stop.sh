#!/usr/bin/env bash
# End the SLURM that start.sh began in DIR, its jobs included: tests/slurm/stop.sh DIR
set -euo pipefail
if [ $# -ne 1 ] || [ "${1:0:1}" = - ]; then
  sed -n '2s/^# //p' "${BASH_SOURCE[0]}"
  exit $(($# == 1 ? 0 : 2))
fi
dir="$(cd "$1" && pwd -P)"
export SLURM_CONF="$dir/slurm.conf"

mapfile -t jobs < <(squeue -h -o %A 2>/dev/null || true)
if [ "${#jobs[@]}" -gt 0 ]; then
  scancel --signal=KILL --full "${jobs[@]}" 2>/dev/null || true
  scancel "${jobs[@]}" 2>/dev/null || true
  for _ in $(seq 50); do
    [ -z "$(squeue -h -o %A 2>/dev/null || true)" ] && break
    sleep 0.2
  done
fi
for file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
  [ -f "$file" ] || continue
  pid="$(cat "$file")"
  kill "$pid" 2>/dev/null || continue
  for _ in $(seq 50); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
done
