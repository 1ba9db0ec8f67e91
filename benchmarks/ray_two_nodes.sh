#!/usr/bin/env bash
# Two Ray nodes on this machine, each on ports of its own, and one search that uses workers of both.
# Run from the repository's root after `make search` or `make test` has made .venv; prints the line of the report
# that counts workers and nodes, and fails unless there are two of each.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
out=$(mktemp -d)/run
trap 'ray stop --force >/dev/null 2>&1' EXIT
ray start --head --port=6479 --num-cpus=1 --object-store-memory=200000000 --include-dashboard=false >/dev/null
ray start --address=127.0.0.1:6479 --num-cpus=1 --object-store-memory=200000000 >/dev/null
blocktune search --out "$out" --set ray.address=127.0.0.1:6479 --set ray.workers=2 --set ray.cpus_per_worker=1 \
  --set search.trials=8 --set prompts.search_images=12 --set prompts.confirm_images=12 \
  --set generation.num_inference_steps=6 --set 'space.anchor_steps=[4]' --set confirm.candidates=2 --set confirm.repeats=1
grep -F "2 on 2 node(s)" "$out/report.md"
