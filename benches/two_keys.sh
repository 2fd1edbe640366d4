#!/bin/bash
# One key with two hundred requests under way, and what another key's first tokens feel of it:
# prints one table.
#
#   benches/two_keys.sh PATH_OF_HEARTH [FLAGS OF hearth serve, such as -m MODEL.gguf]
#
# A round asks with the second key alone, then again while the first key always has two hundred
# requests under way. The second key is one client that thinks between its questions. A ratio is the
# median of those of the rounds.
#
#   ROUNDS=5          rounds
#   SECONDS_EACH=30   seconds of each measurement
#   THINK=0.5         seconds that the second key thinks on average
#   GREEDY=200        requests of the first key under way
#   PROMPT=200 N=40   tokens of a prompt and of an answer of the second key
#   GREEDY_PROMPT=300 GREEDY_N=200   the same of the first key
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
hearth=$1
shift
rounds=${ROUNDS:-5} seconds=${SECONDS_EACH:-30} think=${THINK:-0.5} greedy=${GREEDY:-200}
[ -x "$hearth" ] || { echo "no program at $hearth" >&2; exit 1; }

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$folder"' EXIT
: >"$folder/address"
"$hearth" serve --port 0 --data-dir none --api-key sk-greedy --api-key sk-other "$@" \
    >"$folder/address" 2>"$folder/log" &
server=$!
for _ in $(seq 600); do
    url=$(sed -n 's/^listening on //p' "$folder/address")
    [ -z "$url" ] || break
    kill -0 $server || { tail -3 "$folder/log" >&2; exit 1; }
    sleep 0.2
done
[ -n "$url" ] || { echo "the server does not listen" >&2; exit 1; }

other() { # name, round, seed: what was asked before would be cached
    "$hearth" bench serve --url "$url/v1" --api-key sk-other --clients 1 --think "$think" \
        --duration "$seconds" --prompt-tokens "${PROMPT:-200}" -n "${N:-40}" --ignore-eos \
        --seed "$3" --json "$folder/$1-$2.json" >"$folder/said" 2>&1 \
        || { cat "$folder/said" >&2; exit 1; }
}
for round in $(seq "$rounds"); do
    other alone "$round" "$round"
    "$hearth" bench serve --url "$url/v1" --api-key sk-greedy --clients "$greedy" \
        --duration 100000 --prompt-tokens "${GREEDY_PROMPT:-300}" -n "${GREEDY_N:-200}" \
        --ignore-eos --seed $((1000 + round)) >"$folder/greedy" 2>&1 &
    load=$!
    sleep 5
    other beside "$round" $((500 + round))
    curl -s "${url%/v1}/metrics" -H "authorization: Bearer sk-other" \
        | sed -n 's/^hearth_requests_waiting{[^}]*} //p' >"$folder/waiting-$round"
    kill $load 2>/dev/null || { cat "$folder/greedy" >&2; exit 1; }
    wait $load || true
    echo "round $round of $rounds, load $(cut -d' ' -f1 /proc/loadavg)" >&2
done

python3 - "$folder" "$rounds" <<'PY'
import json, sys
from statistics import median

folder, rounds = sys.argv[1], range(1, int(sys.argv[2]) + 1)
point = lambda name, r: json.load(open(f"{folder}/{name}-{r}.json"))["points"][0]
alone, beside = [[point(name, r) for r in rounds] for name in ["alone", "beside"]]
print("| | answered | first token p50, ms | p95 | between tokens p50, ms | whole answer p50, ms |")
print("|---" * 6 + "|")
FIGURES = [("ttft_ms", "p50"), ("ttft_ms", "p95"), ("itl_ms", "p50"), ("e2e_ms", "p50")]
for name, points in [("alone", alone), ("beside", beside)]:
    cells = [f"{median(p[kind][of] for p in points):.1f}" for kind, of in FIGURES]
    print(f"| {name} | {sum(p['answered'] for p in points)} |", " | ".join(cells), "|")
ratios = [median(b[kind][of] / a[kind][of] for a, b in zip(alone, beside)) for kind, of in FIGURES]
print("| ratio | |", " | ".join(f"{ratio:.2f}" for ratio in ratios), "|")
waiting = [open(f"{folder}/waiting-{r}").read().split() for r in rounds]
print("\nrequests of the first key that wait at the end of a round:", waiting)
PY
