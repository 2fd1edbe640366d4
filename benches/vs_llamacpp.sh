#!/bin/bash
# Hearth beside llama.cpp on the same GGUF files: prints one table of medians and ratios.
#
#   benches/vs_llamacpp.sh PATH_TO_BUILT_LLAMA_CPP MODEL.gguf...
#
# PATH holds llama-bench and llama-batched-bench, itself or in bin/. A round measures every cell
# once on our side and once on theirs, one right after the other; a cell is the median over the
# rounds, the ratio is the median of the ratios of the rounds (above 1: Hearth is faster).
#
#   ROUNDS=5        rounds
#   THREADS=2       threads of every cell that does not say 1
#   CELLS="..."     cells: pN prefill of N tokens, dN decode behind N keys, bN N sequences decode,
#                   p512@1 and d0@1 with one thread
#   KV=             type of keys and values on both sides, q8_0 for one (theirs with flash attention);
#                   else, and with q16_0, each side's own of two bytes: ours q16_0, theirs f16
#   HEARTH=...      the program, default target/release/hearth
#   RUN=...         a command that every measured process is started with
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
peer=$1
shift
[ -x "$peer/llama-bench" ] || peer=$peer/bin
hearth=${HEARTH:-target/release/hearth}
rounds=${ROUNDS:-5}
threads=${THREADS:-2}
cells=${CELLS:-p512 p512@1 p2048 d0 d0@1 d2048 d8192 b8}
run=${RUN:-}
kv=${KV:-}
tokens=32 # decoded by each sequence in a cell
for program in "$hearth" "$peer/llama-bench" "$peer/llama-batched-bench"; do
    [ -x "$program" ] || { echo "no program at $program" >&2; exit 1; }
done

# The number behind a key of a line of JSON.
field() { sed -n "s/.*\"$1\": *\([0-9.]*\).*/\1/p" | tail -1; }
median() { sort -g | awk '{ x[NR] = $1 } END { print x[int((NR + 1) / 2)] }'; }

# Tokens per second of a cell.
ours() { # model, cell, threads
    local number=${2:1}
    case $2 in
        p*) flags="-p $number -b 1 -n 1" kind=prefill ;;
        d*) flags="-p 1 -b 1 -d $number -n $tokens" kind=decode ;;
        b*) flags="-p 1 -b $number -n $tokens" kind=decode ;;
    esac
    $run "$hearth" bench --json -m "$1" -t "$3" -r 1 ${kv:+--kv-dtype "$kv"} $flags | grep "\"$kind\"" | field tokens_per_s
}

theirs() {
    local number=${2:1} bench=$peer/llama-bench batched=$peer/llama-batched-bench types=
    case $kv in '' | f16 | q16_0) ;; *) types="-ctk $kv -ctv $kv -fa on" ;; esac
    case $2 in
        p*) $run "$bench" -m "$1" -t "$3" -r 1 -o jsonl $types -p "$number" -n 0 ;;
        d*) $run "$bench" -m "$1" -t "$3" -r 1 -o jsonl $types -p 0 -n $tokens -d "$number" ;;
        b*) $run "$batched" -m "$1" -t "$3" $types -npp 16 -ntg $tokens -npl "$number" -c 4096 \
            --output-format jsonl ;;
    esac 2>/dev/null | case $2 in b*) field speed_tg ;; *) field avg_ts ;; esac
}

results=$(mktemp)
trap 'rm -f "$results"' EXIT
for round in $(seq "$rounds"); do
    for model in "$@"; do
        for cell in $cells; do
            case $cell in *@*) count=${cell#*@} ;; *) count=$threads ;; esac
            mine=$(ours "$model" "${cell%@*}" "$count")
            peers=$(theirs "$model" "${cell%@*}" "$count")
            [ -n "$mine" ] && [ -n "$peers" ] || { echo "$model: $cell failed" >&2; exit 1; }
            echo "$model $cell $count $mine $peers" | tee -a "$results" >&2
        done
    done
    echo "round $round of $rounds, load $(cut -d' ' -f1 /proc/loadavg)" >&2
done

echo "| file | cell | threads | ours, tok/s | peer, tok/s | ratio | rounds |"
echo "|---|---|---|---|---|---|---|"
for model in "$@"; do
    for cell in $cells; do
        rows=$(awk -v m="$model" -v c="$cell" '$1 == m && $2 == c' "$results")
        column() { echo "$rows" | awk "{ print $1 }" | median; }
        printf '| %s | %s | %s | %.1f | %.1f | %.2f | %s |\n' "$(basename "$model" .gguf)" \
            "$cell" "$(echo "$rows" | awk 'NR == 1 { print $3 }')" "$(column '$4')" \
            "$(column '$5')" "$(column '$4 / $5')" "$(echo "$rows" | wc -l)"
    done
done
