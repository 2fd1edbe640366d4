#!/bin/bash
# The CUDA backend on the GPU of this machine: is it right, how fast is it, and what else is
# installed here. Builds nothing, takes less than nine minutes, prints one table last.
#
#   benches/gpu.sh [WORD]...
#
# A word is `equality`, `sanitize`, `peer`, or one of benches/gpu.rs (a part: limits prefill decode
# host kv mask lora serve embed profile; a model: 8b-bf16, 0.6b, q4_k_m, ...). Without words
# everything runs but `profile` and `sanitize`, else what is named; a model alone is all parts of
# it. `profile` needs `ncu` and says how long each kernel of a pass takes alone; `sanitize` runs the
# suite of the kernels under each of `compute-sanitizer`'s tools. The exit status is 1 if an equality
# failed or did not finish, 2 if only a measurement did, 3 for a word that means nothing.
#
# Each equality runs in a process of its own, so one that loses the device takes no other along, and
# under its own limit; what never ran on a GPU comes first. On a machine with little time:
#
#   benches/gpu.sh equality && benches/gpu.sh 0.6b-bf16 kv mask serve
#
#   HEARTH_GPU_BIN=target/gpu   the folder of `kernels_cuda` and `models_cuda` (the suites of the
#                               two packages) and `gpu` (the benchmark), built with
#                               `--features cuda`
#   PYTHON=python3              the Python that may have PyTorch
#   OUT=DIR                     where what every equality said is kept
#   JOBS=4                      equalities that run at once
#   PATIENCE=120                seconds of one under a tool
set -uo pipefail

bin=${HEARTH_GPU_BIN:-target/gpu}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
parts="limits prefill decode host kv mask lora serve embed profile"
models="8b-bf16 8b-q4_k_m 0.6b-bf16 0.6b-q4_k_m"
jobs=${JOBS:-4} patience=${PATIENCE:-120} ends=525 # seconds; all of it takes less than nine minutes
counters=gpu__time_duration.sum,dram__bytes.sum
counters=$counters,smsp__issue_active.avg.pct_of_peak_sustained_active
counters=$counters,sm__warps_active.avg.pct_of_peak_sustained_active
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
rows=$scratch/rows said=${OUT:-$scratch}
: >"$rows"

# Suites and beginnings of names of tests, in the order in which they run; then all others.
first="
kernels_cuda:experts:: kernels_cuda:attention::
kernels_cuda:overlap:: kernels_cuda:graph:: kernels_cuda:sampling::
kernels_cuda:rows:: models_cuda:cuda::tables_of_rotations_grow
models_cuda:cuda::passes_ahead models_cuda:cuda::chosen_tokens models_cuda:cuda::kept_rows
models_cuda:cuda::every_knob models_cuda:cuda::copied_blocks models_cuda:cuda::long_contexts
models_cuda:cuda::replayed_passes models_cuda:cuda::recorded_adapters kernels_cuda:nccl::"

has() { # word, words
    local word=$1 each
    shift
    for each in "$@"; do [ "$each" = "$word" ] && return 0; done
    return 1
}
words=("$@")
all=$([ $# -eq 0 ] && echo yes)
named_parts=() named_models=()
for word in "${words[@]}"; do
    if has "$word" equality sanitize peer; then continue; fi
    if has "$word" $parts; then
        named_parts+=("$word")
        continue
    fi
    found=
    for model in $models; do
        case "-$model-" in *"-$word-"*) found=yes && named_models+=("$model") ;; esac
    done
    [ "$found" ] || { echo "\`$word\` is no part and no model; see $0" >&2; exit 3; }
done
measures=$([ "$all" ] || [ ${#named_parts[@]} -gt 0 ] || [ ${#named_models[@]} -gt 0 ] && echo yes)

# A part under its own time limit, its output as it comes; rows of the table are kept.
part() { # seconds, command
    local limit=$1 begun=$SECONDS left=$((ends - SECONDS)) status
    shift
    [ "$left" -ge "$limit" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "== no time for ${*##*/}"
        echo "| ${*##*/} | left out |  |  |  | no time |  |" >>"$rows"
        return 124
    fi
    echo "== ${*##*/} (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee >(grep '^| ' | grep -v '^| model |' >>"$rows")
    status=${PIPESTATUS[0]}
    [ "$status" -eq 124 ] && echo "== out of time"
    echo "== status $status after $((SECONDS - begun)) s"
    return "$status"
}

# Tests of both suites that need a GPU, as SUITE:NAME, in order.
tests() {
    local suite
    for suite in kernels_cuda models_cuda; do
        "$bin/$suite" --list --format terse 2>>"$said/list" | sed -n "s/: test$//; s/^/$suite:/p"
    done | grep -E '^(kernels_cuda:|models_cuda:cuda::)' | awk -v first="$first" '
        { rank = count = split(first, begin)
          for (i = count; i > 0; i--) if (index($0, begin[i]) == 1) rank = i - 1
          print rank, NR, $0 }' | sort -n -k 1,1 -k 2,2 | cut -d " " -f 3
}

# One test, alone or under a tool; its row, and of a failure its first lines.
equality() { # suite:test, tool
    local suite=${1%%:*} name=${1#*:} limit=60 begun=$SECONDS left=$((ends - SECONDS)) status
    local log=${1//::/-} outcome=passed under=()
    log=$said/${log/:/-}${2:+-$2}
    if [ "${2:-}" ]; then
        under=(compute-sanitizer --tool "$2" --error-exitcode 9) suite="$2 $suite" limit=$patience
    fi
    [ "$left" -ge "$limit" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        outcome="no time" status=124
    else
        timeout --kill-after=5 "$limit" "${under[@]}" "$bin/${suite#* }" --exact "$name" \
            --nocapture >"$log" 2>&1
        status=$?
        # A test that is not there passes too.
        grep -q '^running 1 test' "$log" || [ "$status" -ne 0 ] || status=4
        [ "$status" -ne 124 ] || outcome="FAILED, out of time"
        [ "$status" -eq 0 ] || [ "$status" -eq 124 ] || outcome="FAILED, status $status"
    fi
    echo "== $suite $name: $outcome after $((SECONDS - begun)) s"
    echo "| $suite | $name |  |  |  | $outcome, $((SECONDS - begun)) s |  |" >>"$rows"
    [ "$status" -eq 0 ] && return 0
    { grep -sm 1 -A 6 'panicked at' "$log" || tail -n 5 "$log"; } 2>/dev/null |
        cut -c 1-240 | sed 's/^/    /'
    return 1
}

# All of them; those that should be there and are not are failures too.
equalities() {
    local sound=0 suite test all begin
    all=$(tests)
    for suite in kernels_cuda models_cuda; do
        grep -q "^$suite:" <<<"$all" && continue
        sound=1
        echo "== $suite says nothing of its tests:" && tail -n 3 "$said/list"
        echo "| $suite | equality |  |  |  | FAILED, does not start |  |" >>"$rows"
    done
    for begin in $first; do
        grep -q "^$begin" <<<"$all" && continue
        echo "== no test begins with $begin, which is to be among the first"
    done
    for test in $all; do side_by_side "$test"; done
    wait
    grep -Eq 'FAILED|no time' "$rows" && sound=1
    return $sound
}

side_by_side() { # as equality
    [ "$(jobs -rp | wc -l)" -lt "$jobs" ] || wait -n
    equality "$@" &
}

# The kernels under the tools that find what they should not touch.
sanitized() {
    local tool test
    for tool in memcheck racecheck synccheck; do
        for test in $(tests | grep '^kernels_cuda:' | grep -v ':nccl::'); do
            side_by_side "$test" "$tool"
        done
    done
    wait
    ! grep -Eq 'FAILED|no time' "$rows"
}

# What each kernel of a pass takes, alone: those of one name and grid in a row.
profile() { # model
    local log=$said/profile-$1.csv
    echo "== profile of $1"
    timeout --kill-after=5 120 ncu --csv --profile-from-start off --clock-control none \
        --cache-control none --metrics "$counters" \
        "$bin/gpu" "$1" profile >"$log" 2>&1 || { tail -n 5 "$log"; return 1; }
    "$python" "$here/gpu_profile.py" "$log"
}

# CUDA's libraries, where PyTorch brought them.
cuda=$("$python" -c 'import nvidia.cu13 as m; print(list(m.__path__)[0] + "/lib")' 2>/dev/null)
[ -z "$cuda" ] || cuda=$cuda:${cuda%cu13/lib}nccl/lib # what a build for several GPUs links
[ -z "$cuda" ] || export LD_LIBRARY_PATH=$cuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export HEARTH_GPU=1 PYTHONUNBUFFERED=1 RUST_BACKTRACE=0
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null ||
    echo "nvidia-smi does not run here"
echo "$(nproc) processors, CUDA libraries in ${cuda:-the system}"

wrong=0 failed=0
if [ "$all" ] || has equality "${words[@]}"; then
    equalities || wrong=1
fi
if has sanitize "${words[@]}"; then sanitized || wrong=1; fi
if [ "$measures" ]; then
    if [ ${#named_parts[@]} -eq 0 ]; then
        named_parts=(prefill decode host kv mask lora serve)
        [ ${#named_models[@]} -gt 0 ] || named_parts=(${parts% profile})
    fi
    [ ${#named_models[@]} -gt 0 ] || named_models=($models)
    of_models=()
    for word in "${named_parts[@]}"; do
        has "$word" limits embed profile || of_models+=("$word")
    done
    if has limits "${named_parts[@]}"; then part 20 "$bin/gpu" limits || failed=1; fi
    for model in $models; do
        has "$model" "${named_models[@]}" || continue
        if [ ${#of_models[@]} -gt 0 ]; then
            part 85 "$bin/gpu" "$model" "${of_models[@]}" || failed=1
        fi
        if has profile "${named_parts[@]}"; then profile "$model" || failed=1; fi
    done
    if has embed "${named_parts[@]}"; then part 30 "$bin/gpu" embed || failed=1; fi
fi
if [ "$all" ] || has peer "${words[@]}"; then
    part 75 "$python" "$here/gpu_peer.py" || failed=1
fi

sleep 0.2 # the last rows are on their way
echo
echo "| model | what | ms | tokens/s | rate | of what is possible | target (H200) |"
echo "|---|---|---|---|---|---|---|"
# Every process measures the limits; the first to do so speaks for all.
limit='[|] (copy, read and written|bf16 product, [0-9^]*) [|]'
awk -v limit="$limit" '$0 !~ limit || !seen[/copy/, /^[|] torch/]++' "$rows"
[ "$wrong" -eq 0 ] || exit 1
[ "$failed" -eq 0 ] || exit 2
