#!/usr/bin/env bash
# Renders the manifests and holds them to the schemas of Kubernetes. CI calls this.
# Needs cargo, python3 with venv, and kubectl or kustomize; talks to no cluster.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../target}
venv=$target/deploy-venv

if command -v kustomize >/dev/null; then
    renderer=(kustomize build)
elif command -v kubectl >/dev/null; then
    renderer=(kubectl kustomize)
else
    echo "deploy: neither kustomize nor kubectl is installed, so the manifests cannot be rendered" >&2
    exit 1
fi

if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/installed.txt"
fi

cargo build --quiet --locked --manifest-path "$here/../Cargo.toml" --package dir-sync
exec "$venv/bin/python" "$here/check.py" "$target/debug/dir-sync" "$here" "${renderer[@]}"
