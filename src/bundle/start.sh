#!/bin/sh
# Serves the models of this folder. Needs no network. Flags of `hearth serve` may follow.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
hearth=$here/@BINARY@
HF_HUB_OFFLINE=1
export HF_HUB_OFFLINE
if [ -x "$hearth" ]; then
    exec "$hearth" serve --config "$here/hearth.toml" "$@"
fi
# Many USB sticks hold no permission to run a program: run a copy.
copy=$(mktemp -d) || exit 1
trap 'rm -rf "$copy"' EXIT
cp "$hearth" "$copy/hearth" && chmod 700 "$copy/hearth" || exit 1
"$copy/hearth" serve --config "$here/hearth.toml" "$@" &
child=$!
# Ctrl-C reaches the program by itself; what ends this script alone is handed on.
trap : INT
trap 'kill -TERM "$child" 2>/dev/null' TERM HUP
wait "$child"
code=$?
# A signal ends a wait; answers that still run are waited for.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
exit "$code"
