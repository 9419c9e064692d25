#!/usr/bin/env bash
# One worker on each machine of a list, over ssh:
#   machines.sh hosts.txt STORE --model MODEL --documents DOCUMENTS ...
# Each line of hosts.txt is a machine that ssh reaches without a password, where actstore is installed.
# Run it again to continue, with any other list. Interrupted, it ends the workers.
set -euo pipefail
mapfile -t hosts < <(grep -Ev '^[[:space:]]*(#|$)' "$1")
shift
[ "${#hosts[@]}" -gt 0 ] || { echo "no machine in the list" >&2; exit 2; }
options=$(printf '%q ' "$@")

workers=()
trap 'kill "${workers[@]}" 2> /dev/null || true' INT TERM
for rank in "${!hosts[@]}"; do
    # -tt: when the connection ends, the worker gets SIGHUP, commits what it has and ends
    ssh -tt -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[rank]}" \
        "exec actstore extract $options --launcher none --num-processes ${#hosts[@]} --process-id $rank" < /dev/null &
    workers+=("$!")
done

# A worker that ends with 0 saw the store complete, whatever became of the others.
complete=0 worst=0
for rank in "${!workers[@]}"; do
    code=0
    wait "${workers[rank]}" || code=$?
    echo "${hosts[rank]} ended with $code" >&2
    if [ "$code" -eq 0 ]; then complete=1; fi
    if [ "$code" -gt "$worst" ]; then worst=$code; fi
done
if [ "$complete" -eq 1 ]; then exit 0; fi
exit "$worst"
