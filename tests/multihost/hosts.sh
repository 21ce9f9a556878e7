#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a cable (a veth pair). Needs root and iproute2.
#
# tests/multihost/hosts.sh up NAME     makes NAME-a (10.99.0.1) and NAME-b (10.99.0.2)
# tests/multihost/hosts.sh cut NAME    sets the link down;  mend NAME sets it up again
# tests/multihost/hosts.sh down NAME   removes both
# A command on a host: ip netns exec NAME-a COMMAND. Addresses outside the namespaces are not touched.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"
name="${2:-}"
if ! [[ "$name" =~ ^[a-z0-9]{1,8}$ ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  if [ "${1:-}" = --help ]; then exit 0; else exit 2; fi
fi
case "$1" in
  up)
    ip netns add "$name-a"
    ip netns add "$name-b"
    ip link add "${name}0" netns "$name-a" type veth peer name "${name}0" netns "$name-b"
    ip -n "$name-a" address add 10.99.0.1/24 dev "${name}0"
    ip -n "$name-b" address add 10.99.0.2/24 dev "${name}0"
    for host in "$name-a" "$name-b"; do
      ip -n "$host" link set lo up
      ip -n "$host" link set "${name}0" up
    done
    ;;
  cut) ip -n "$name-a" link set "${name}0" down ;;
  mend) ip -n "$name-a" link set "${name}0" up ;;
  down)
    ip netns delete "$name-a" 2>/dev/null || true
    ip netns delete "$name-b" 2>/dev/null || true
    ;;
  *) exit 2 ;;
esac
