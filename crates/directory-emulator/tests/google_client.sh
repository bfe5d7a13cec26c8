#!/usr/bin/env bash
# Holds the emulator to Google's own Python client, unmodified and from PyPI. CI calls this.
# Needs cargo and python3 with venv; leaves nothing running.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
workspace=$(cd "$here/../../.." && pwd)
target=${CARGO_TARGET_DIR:-$workspace/target}
venv=$target/google-client-venv
requirements=$here/google_client_requirements.txt

if ! cmp -s "$requirements" "$venv/installed.txt"; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
    cp "$requirements" "$venv/installed.txt"
fi

cargo build --quiet --manifest-path "$workspace/Cargo.toml" --package directory-emulator
exec "$venv/bin/python" "$here/google_client.py" \
    "$target/debug/directory-emulator" "$workspace"/examples/data/org-*.json.gz
