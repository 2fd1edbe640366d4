#!/bin/bash
# Half an hour of students: clients that ask, read, think and ask again, and what the server's
# latency and memory do meanwhile. Prints one table.
#
#   benches/soak.sh PATH_OF_HEARTH MINUTES CLIENTS
#
# The built-in model on a free port. Windows of five minutes (the last one shorter where MINUTES
# says so); resident memory is read from /proc every ten seconds. Readings of the first five minutes
# (WARM_UP) are a warm-up and do not count in the spread.
#
#   THINK=3           seconds that a client thinks before each question, on average
#   PROMPT=200 N=64   tokens of a prompt and of an answer; no two prompts share a beginning
#   WINDOW=300        seconds of a window
#   WARM_UP=300       seconds whose readings of memory do not count in the spread
#   OUT=...           folder to keep the figures in (default: one that goes away)
set -euo pipefail

if [ $# -ne 3 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '/^set/d'
    exit 2
fi
hearth=$1 seconds=$(($2 * 60)) clients=$3
think=${THINK:-3} prompt=${PROMPT:-200} tokens=${N:-64}
window=${WINDOW:-300} warm_up=${WARM_UP:-300}
[ -x "$hearth" ] || { echo "no program at $hearth" >&2; exit 1; }

scratch=$(mktemp -d)
folder=${OUT:-$scratch}
mkdir -p "$folder"
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$scratch"' EXIT
: >"$scratch/address"
"$hearth" serve --port 0 --data-dir none >"$scratch/address" 2>"$folder/server.log" &
server=$!
for _ in $(seq 150); do
    url=$(sed -n 's/^listening on //p' "$scratch/address")
    [ -z "$url" ] || break
    kill -0 $server || { tail -3 "$folder/server.log" >&2; exit 1; }
    sleep 0.2
done
[ -n "$url" ] || { echo "the server does not listen" >&2; exit 1; }

begin=$(date +%s)
while kill -0 $server 2>/dev/null; do
    echo "$(($(date +%s) - begin)) $(awk '/^VmRSS/{print $2}' /proc/$server/status)"
    sleep 10
done >"$folder/resident" &
number=0
for ((from = 0; from < seconds; from += window)); do
    number=$((number + 1))
    length=$((seconds - from < window ? seconds - from : window))
    "$hearth" bench serve --url "$url/v1" --clients "$clients" --think "$think" \
        --duration "$length" --prompt-tokens "$prompt" -n "$tokens" --ignore-eos \
        --seed $number --json "$folder/$number.json" >"$folder/said" 2>&1 \
        || { cat "$folder/said" >&2; exit 1; }
    echo "$(($(date +%s) - begin))" >>"$folder/ends"
    echo "window $number, load $(cut -d' ' -f1 /proc/loadavg)" >&2
done

python3 - "$folder" "$warm_up" <<'PY'
import json, sys
from statistics import median

folder, warm_up = sys.argv[1], float(sys.argv[2])
readings = [tuple(map(int, line.split())) for line in open(f"{folder}/resident")]
ends = [int(line) for line in open(f"{folder}/ends")]
print("| minutes | answered | errors | first token p50, ms | p95 | whole answer p50, ms | p95 "
      "| resident, median, KB |")
print("|---|---|---|---|---|---|---|---|")
for number, (begin, end) in enumerate(zip([0, *ends], ends), 1):
    point = json.load(open(f"{folder}/{number}.json"))["points"][0]
    errors = sum(error["count"] for error in point["errors"].values())
    times = [f"{point[kind][p]:.1f}" for kind in ["ttft_ms", "e2e_ms"] for p in ["p50", "p95"]]
    resident = median(kb for s, kb in readings if begin <= s < end)
    print(f"| {begin / 60:.0f} to {end / 60:.0f} | {point['answered']:,} | {errors} |",
          " | ".join(times), f"| {resident:,.0f} |")
warm = [kb for s, kb in readings if s >= warm_up] or sys.exit("no reading after the warm-up")
low, middle, high = min(warm), median(warm), max(warm)
print(f"\nresident, {len(warm)} readings after {warm_up:.0f} s: least {low:,} KB, "
      f"median {middle:,.0f} KB, most {high:,} KB, spread {(high - low) / middle * 100:.2f} %")
PY
