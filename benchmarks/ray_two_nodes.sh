#!/usr/bin/env bash
# Two Ray nodes on this machine, each on ports of its own, and one search that uses workers of both.
# Run from the repository's root after `make search` or `make test` has made .venv; prints the line of the report
# that counts workers and nodes, and fails unless there are two of each. Stops the nodes that it started, and no other.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
folder=$(mktemp -d)
# a cluster's nodes and users show the same token; this one is made for this run and ends with it
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
nodes=()
trap 'kill "${nodes[@]}" && wait || true; rm -rf "$folder"' EXIT
common=(--num-cpus=1 --num-gpus=0 --object-store-memory=200000000 --block)
ray start --head --port=6479 --include-dashboard=false "${common[@]}" >"$folder/head.log" 2>&1 &
nodes+=($!)
until ray status --address=127.0.0.1:6479 >/dev/null 2>&1; do kill -0 "${nodes[0]}"; sleep 1; done
ray start --address=127.0.0.1:6479 "${common[@]}" >"$folder/second.log" 2>&1 &
nodes+=($!)
until ray status --address=127.0.0.1:6479 2>/dev/null | grep -q "/2.0 CPU"; do kill -0 "${nodes[1]}"; sleep 1; done
blocktune search --out "$folder/run" --set ray.address=127.0.0.1:6479 --set ray.workers=2 --set ray.cpus_per_worker=1 \
  --set search.trials=8 --set prompts.search_images=12 --set prompts.confirm_images=12 \
  --set generation.num_inference_steps=6 --set 'space.anchor_steps=[4]' --set confirm.candidates=2 --set confirm.repeats=1
grep -F "2 on 2 node(s)" "$folder/run/report.md"
