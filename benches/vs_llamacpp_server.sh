#!/bin/bash
# Hearth's server beside llama.cpp's under the same load: prints one table.
#
#   benches/vs_llamacpp_server.sh PATH_TO_BUILT_LLAMA_CPP MODEL.gguf
#
# PATH holds llama-server, itself or in bin/. Both servers run, so each finds its memory; one at a
# time is asked, by closed-loop clients that ask again when they have their answer. A round asks
# both with each number of clients, one right after the other; a figure is the median over the
# rounds, a ratio the median of the ratios of the rounds (above 1: Hearth does better).
#
#   ROUNDS=3          rounds
#   THREADS=2         threads of each server
#   CLIENTS="1 8 30 100"
#   EACH=2            questions of a client, but at least 8 together
#   STAGGER=0         seconds between the first question of a client and that of the next
#   PROMPT=200 N=64   tokens of a prompt and of an answer; no two prompts share a beginning
#   SLOTS=32          sequences of the peer at once, each with room for twice a question and answer
#   HEARTH=...        the program, default target/release/hearth
set -euo pipefail

if [ $# -ne 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
peer=$1 model=$2
[ -x "$peer/llama-server" ] || peer=$peer/bin
hearth=${HEARTH:-target/release/hearth}
rounds=${ROUNDS:-3} threads=${THREADS:-2} clients=${CLIENTS:-1 8 30 100} each=${EACH:-2}
stagger=() prompt=${PROMPT:-200} tokens=${N:-64} slots=${SLOTS:-32}
[ "${STAGGER:-0}" = 0 ] || stagger=(--stagger "$STAGGER")
for program in "$hearth" "$peer/llama-server"; do
    [ -x "$program" ] || { echo "no program at $program" >&2; exit 1; }
done

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
ours=http://127.0.0.1:18431/v1 theirs=http://127.0.0.1:18432/v1
"$hearth" serve -m "$model" -t "$threads" --port 18431 --data-dir none \
    >"$folder/ours.log" 2>&1 &
servers=$!
"$peer/llama-server" -m "$model" -t "$threads" --port 18432 -np "$slots" \
    -c $((slots * 2 * (prompt + tokens))) >"$folder/theirs.log" 2>&1 &
servers="$servers $!"
for url in ${ours%/v1}/health ${theirs%/v1}/health; do
    for _ in $(seq 300); do
        # One that was here before would answer too, and ours could not have its port.
        kill -0 $servers && curl -fs "$url" >"$folder/health" && continue 2
        sleep 0.2
    done
    echo "$url does not answer: $(tail -3 "$folder"/*.log)" >&2
    exit 1
done

load() { # side, url, clients, round
    local requests=$(($3 * each))
    [ "$requests" -ge 8 ] || requests=8
    "$hearth" bench serve --url "$2" --clients "$3" --requests "$requests" --seed $((1000 * $4 + $3)) \
        --prompt-tokens "$prompt" -n "$tokens" --ignore-eos --completions \
        "${stagger[@]}" --json "$folder/$1-$3-$4.json" >"$folder/said" 2>&1 || { cat "$folder/said" >&2; exit 1; }
}
for round in $(seq "$rounds"); do
    for count in $clients; do
        load ours "$ours" "$count" "$round"
        load theirs "$theirs" "$count" "$round"
        echo "round $round of $rounds, $count clients, load $(cut -d' ' -f1 /proc/loadavg)" >&2
    done
done

python3 - "$folder" "$rounds" $clients <<'PY'
import json, sys
from statistics import median

folder, rounds = sys.argv[1], range(1, int(sys.argv[2]) + 1)
FIGURES = [
    ("output, tok/s", 1, lambda p: p["output_tokens_per_s"]),
    ("first token p50, ms", -1, lambda p: p["ttft_ms"]["p50"]),
    ("p95, ms", -1, lambda p: p["ttft_ms"]["p95"]),
    ("between tokens p50, ms", -1, lambda p: p["itl_ms"]["p50"]),
    ("p95, ms", -1, lambda p: p["itl_ms"]["p95"]),
    ("whole answer p50, ms", -1, lambda p: p["e2e_ms"]["p50"]),
]
print("| clients | server | answered |", " | ".join(name for name, _, _ in FIGURES), "|")
print("|---" * (3 + len(FIGURES)) + "|")
for clients in sys.argv[3:]:
    sides = {}
    for side in ["ours", "theirs"]:
        files = [open(f"{folder}/{side}-{clients}-{r}.json") for r in rounds]
        points = sides[side] = [json.load(file)["points"][0] for file in files]
        answered = f"{sum(p['answered'] for p in points)} of {sum(p['requests'] for p in points)}"
        cells = [f"{median(map(figure, points)):.1f}" for _, _, figure in FIGURES]
        print(f"| {clients} | {side} | {answered} |", " | ".join(cells), "|")
    pairs = list(zip(sides["ours"], sides["theirs"]))
    better = [median((of(a) / of(b)) ** sign for a, b in pairs) for _, sign, of in FIGURES]
    print(f"| {clients} | ratio | |", " | ".join(f"{ratio:.2f}" for ratio in better), "|")
PY
