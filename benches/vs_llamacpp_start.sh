#!/bin/bash
# Hearth's server beside llama.cpp's as they start: seconds until /health answers 200, and resident
# memory then, and after eight answers at once that fill eight sequences of 1,024 tokens almost.
# Prints one table.
#
#   benches/vs_llamacpp_start.sh PATH_TO_BUILT_LLAMA_CPP MODEL.gguf
#
# PATH holds llama-server, itself or in bin/. Servers start one at a time, in turns, the file in the
# page cache; the first start of each is not counted. Then eight clients ask each of them once, with
# about 960 tokens, for 24. A figure is the median, a ratio the median of the ratios of the rounds,
# ours by theirs (below 1: Hearth takes less).
#
#   ROUNDS=5       starts of each
#   THREADS=2      threads of each server
#   HEARTH=...     the program, default target/release/hearth
set -euo pipefail
export LC_ALL=C

if [ $# -ne 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
peer=$1 model=$2
[ -x "$peer/llama-server" ] || peer=$peer/bin
hearth=${HEARTH:-target/release/hearth} rounds=${ROUNDS:-5} threads=${THREADS:-2}
for program in "$hearth" "$peer/llama-server"; do
    [ -x "$program" ] || { echo "no program at $program" >&2; exit 1; }
done

folder=$(mktemp -d) port=18433 server=
trap 'kill $server 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
url=http://127.0.0.1:$port

# Starts a side; sets $server and $ready, in seconds.
start() { # ours | theirs
    ! curl -fs "$url/health" >"$folder/health" || { echo "port $port is taken" >&2; exit 1; }
    local command=("$hearth" serve -m "$model" -t "$threads" --port $port --data-dir none)
    [ "$1" = ours ] ||
        command=("$peer/llama-server" -m "$model" -t "$threads" --port $port -np 8 -c 8192)
    local began=$EPOCHREALTIME
    "${command[@]}" >"$folder/$1.log" 2>&1 &
    server=$!
    until curl -fs "$url/health" >"$folder/health"; do
        kill -0 "$server" || { tail -3 "$folder/$1.log" >&2; exit 1; }
        sleep 0.01
    done
    ready=$(echo "$EPOCHREALTIME $began" | awk '{ print $1 - $2 }')
}
stop() { kill "$server"; wait "$server" || true; server=; }
# Kilobytes that the server has in memory.
resident() { awk '/^VmRSS/ { print $2 }' "/proc/$server/status"; }

results=$folder/results
for round in 0 $(seq "$rounds"); do
    for side in ours theirs; do
        start $side
        [ "$round" = 0 ] || echo "$round $side ready,s $ready" >>"$results"
        [ "$round" = 0 ] || echo "$round $side resident,KiB $(resident)" >>"$results"
        stop
    done
done
for side in ours theirs; do
    start $side
    "$hearth" bench serve --url "$url/v1" --clients 8 --requests 8 --prompt-tokens 960 -n 24 \
        --ignore-eos --completions --json "$folder/load.json" >"$folder/said" 2>&1 &&
        grep -q '"answered": *8' "$folder/load.json" || { cat "$folder/said" >&2; exit 1; }
    echo "1 $side full,KiB $(resident)" >>"$results"
    stop
done

median() { sort -g | awk '{ x[NR] = $1 } END { print x[int((NR + 1) / 2)] }'; }
of() { awk -v w="$1" -v s="$2" '$3 == w && $2 == s { print $4 }' "$results"; }
echo "| what | ours | llama.cpp | ours / llama.cpp |"
echo "|---|---|---|---|"
for what in ready,s resident,KiB full,KiB; do
    echo "| $what | $(of $what ours | median) | $(of $what theirs | median) |" \
        "$(paste <(of $what ours) <(of $what theirs) | awk '{ print $1 / $2 }' | median) |"
done
