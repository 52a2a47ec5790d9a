#!/usr/bin/env bash
# One machine as a cluster: a head and N raylets, in the foreground. Ctrl-C ends exactly these processes.
#
#   cluster/local.sh 2
#
# The head computes nothing, as on a real cluster. GPUs are dealt out to the raylets. Environment:
#   RAY_PORT             first of four ports of the head (6379: GCS, client server, agent, metrics)
#   DASHBOARD_PORT       dashboard and job server, on loopback (8265)
#   CPUS_PER_RAYLET      default: this machine's CPUs divided by N, at least 2 (trainers and data tasks side by side)
#   OBJECT_STORE_MEMORY  bytes per raylet; default: 30 % of the free memory divided by N + 1
#   RAY_TMPDIR           where logs and sockets go (/tmp; a long path breaks Ray's sockets)
set -euo pipefail

raylets=${1:-}
if [[ ! $raylets =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: cluster/local.sh N      N: number of raylets beside the head, got '$raylets'" >&2
  exit 2
fi

port=${RAY_PORT:-6379}
dashboard=${DASHBOARD_PORT:-8265}
cpus=$(($(nproc) / raylets))
cpus=${CPUS_PER_RAYLET:-$((cpus > 2 ? cpus : 2))}
object_store=${OBJECT_STORE_MEMORY:-$(awk -v nodes=$((raylets + 1)) \
  '/^MemAvailable/ {printf "%d", $2 * 1024 * 0.3 / nodes}' /proc/meminfo)}
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null |
  paste -sd, || true)}"

scratch=$(mktemp -d "${RAY_TMPDIR:-/tmp}/ncfm-XXXXXX") # mode 700: the token and the logs are ours alone
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$scratch/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$scratch/token RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # everything ends together: a raylet need not wait for its work (30 s)
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard # Ray's own actors look for it, and may find another cluster
unset RAY_ADDRESS RAY_AUTH_TOKEN

pids=() # the head first

# shellcheck disable=SC2329 # the trap calls it
stop() {
  local status=$? pid
  trap '' INT TERM HUP
  trap - EXIT
  for pid in "${pids[@]:1}" "${pids[@]:0:1}"; do # raylets first: they say goodbye to the head
    kill -TERM "$pid" 2>/dev/null || true
  done
  for pid in "${pids[@]}"; do
    timeout 30 tail --pid="$pid" -f /dev/null || kill -KILL "$pid" 2>/dev/null || true # its children die with it
  done
  if ((status == 1)); then
    echo "Logs are kept in $scratch" >&2
  else
    rm -rf "$scratch"
  fi
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

start() { # start NAME OPTION...: a directory each, because nodes in one directory number their logs and sockets
  local name=$1
  shift
  ray start --block --log-color=false --temp-dir="$scratch/$name" --object-store-memory="$object_store" "$@" \
    >"$scratch/$name.log" 2>&1 &
  pids+=($!)
}

alive() {
  ray list nodes --address="$RAY_API_SERVER_ADDRESS" --limit=1000 --format=json 2>/dev/null |
    grep -o '"state": "ALIVE"' | wc -l || true
}

wait_for() { # wait_for NODES: until that many are alive
  local deadline=$((SECONDS + 180)) pid
  until (($(alive) == $1)); do
    for pid in "${pids[@]}"; do
      kill -0 "$pid" 2>/dev/null || { tail -n 20 "$scratch"/*.log >&2; exit 1; }
    done
    ((SECONDS < deadline)) || { echo "not $1 nodes after 180 s" >&2; exit 1; }
    sleep 1
  done
}

CUDA_VISIBLE_DEVICES="" start head --head --port="$port" --ray-client-server-port=$((port + 1)) \
  --dashboard-agent-listen-port=$((port + 2)) --metrics-export-port=$((port + 3)) \
  --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --num-cpus=0 --num-gpus=0
wait_for 1
for ((i = 0; i < raylets; i++)); do
  mine=()
  for ((g = i; g < ${#gpus[@]}; g += raylets)); do mine+=("${gpus[g]}"); done
  CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${mine[*]}") start "$i" --address="127.0.0.1:$port" \
    --num-cpus="$cpus" --num-gpus="${#mine[@]}" --dashboard-agent-listen-port=0
  wait_for $((i + 2)) # one after the other: Ray gives a raylet 30 s to start, too little if all start on a few cores
done

cat <<EOF
A head and $raylets raylets are up ($cpus CPUs each, ${#gpus[@]} GPUs in all). Submit from the repository's root, in another shell:

  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH RAY_API_SERVER_ADDRESS=$RAY_API_SERVER_ADDRESS
  ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- \\
    python pipeline/run.py --config pipeline/presets/X.toml --storage_path "\$PWD/runs"

Dashboard: http://127.0.0.1:$dashboard (it asks for the token: cat $RAY_AUTH_TOKEN_PATH)
Ctrl-C ends the cluster and deletes $scratch.
EOF

wait -n "${pids[@]}" || true
echo "A node ended by itself:" >&2
tail -n 20 "$scratch"/*.log >&2
exit 1
