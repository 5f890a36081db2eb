#!/bin/bash
# One run on two hosts without ssh between them: start this script on each host, with the host's number, 0 or 1.
#
#   host 0:  launch/two_hosts.sh 0 ADDRESS_OF_HOST_0 --config configs/qwen2.5-7b.yaml
#   host 1:  launch/two_hosts.sh 1 ADDRESS_OF_HOST_0 --config configs/qwen2.5-7b.yaml
#
# The environment may set SLOTS (ranks of each host, default 8) and PORT (where ranks connect, default 29500). To try it
# on one machine, run both commands there in two terminals, with ADDRESS 127.0.0.1 and SLOTS=1.
set -euo pipefail
if [[ $# -lt 3 || ! "$1" =~ ^[01]$ ]]; then
  echo "usage: $0 0|1 ADDRESS_OF_HOST_0 --config FILE [section.key=value ...]" >&2
  exit 2
fi
number=$1 address=$2
shift 2
cd "$(dirname "$0")/.."
hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
printf 'node0 slots=%d\nnode1 slots=%d\n' "${SLOTS:-8}" "${SLOTS:-8}" > "$hostfile"   # names are not looked up
"${DEEPSPEED:-.venv/bin/deepspeed}" --hostfile "$hostfile" --no_ssh --node_rank "$number" --master_addr "$address" \
  --master_port "${PORT:-29500}" launch/train.py "$@"
