#!/usr/bin/env bash
# Start a real SLURM of two nodes on this machine, for tests: tests/slurm/start.sh DIR
#
# Two slurmd of two processors each, named after this host and HOST-second (it has that host name in a
# UTS namespace of its own, which needs root); all listen on loopback. Both see an /etc/hosts, in mount
# namespaces, in which the nodes know each other. All files lie in DIR.
# Afterwards: export SLURM_CONF=DIR/slurm.conf; sinfo. tests/slurm/stop.sh DIR ends it.
# Nothing is installed: apt-get install slurm-wlm munge.
# Exit status: 0 both nodes are idle; 1 something did not start; 2 wrong arguments.
set -euo pipefail
if [ $# -ne 1 ] || [ "${1:0:1}" = - ]; then
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  if [ "${1:-}" = --help ]; then exit 0; else exit 2; fi
fi
PATH="$PATH:/usr/sbin:/sbin"
for program in munged slurmctld slurmd sbatch unshare; do
  command -v "$program" >/dev/null && continue
  echo "error: no $program here: apt-get install slurm-wlm munge util-linux" >&2
  exit 1
done
mkdir -p "$1"
dir="$(cd "$1" && pwd -P)"
mkdir -p "$dir"/{state,munge}
chmod 0755 "$dir" "$dir/munge"
host="$(hostname -s)"
second="$host-second"
user="$(id -un)"
read -r ctl_port first_port second_port < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for port in range(3)]
print(*[s.getsockname()[1] for s in sockets])')

(umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctl_port
SlurmUser=$user
SlurmdUser=$user
# A requeued job waits until its old credential has expired: 120 s unless told otherwise.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
SchedulerParameters=sched_interval=1,bf_interval=1
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
NodeName=$host NodeAddr=127.0.0.1 Port=$first_port CPUs=2
NodeName=$second NodeAddr=127.0.0.1 Port=$second_port CPUs=2
PartitionName=test Nodes=$host,$second Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$dir/slurm.conf"

munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
  --log-file="$dir/munge/log" --pid-file="$dir/munged.pid" --seed-file="$dir/munge/seed"
slurmctld -i -f "$SLURM_CONF"
printf '127.0.0.1 localhost %s %s\n' "$host" "$second" >"$dir/hosts"
chmod 0644 "$dir/hosts"
for node in "$host" "$second"; do
  unshare --uts --mount sh -c 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -f "$SLURM_CONF"' \
    sh "$node" "$dir/hosts"
done
for _ in $(seq 100); do
  idle="$(sinfo -h -N -t idle -o %N 2>/dev/null | sort | tr '\n' ' ')"
  [ "$idle" = "$host $second " ] && exit 0
  sleep 0.2
done
echo "error: the nodes did not come up within 20 s" >&2
for log in "$dir"/*.log; do tail -n 5 "$log" >&2; done
bash "$(dirname "${BASH_SOURCE[0]}")/stop.sh" "$dir"
exit 1
