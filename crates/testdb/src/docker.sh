# Runs in the container: starts the image's server, and stops it when no process of the run uses it any more.
# Each of those has a session that holds a shared lock; the lock is gone with the process, however it ended.
# Arguments: the two keys of the lock, then what `postgres` gets.
kind=$1
key=$2
shift 2
docker-entrypoint.sh postgres "$@" &
server=$!
trap 'kill -INT "$server"' INT TERM
export PGHOST=127.0.0.1 PGUSER=postgres PGDATABASE=postgres PGPASSWORD="$POSTGRES_PASSWORD"

# The server that the image starts to make the database listens on its socket only.
until pg_isready -q; do
    kill -0 "$server" || exit 1
    sleep 1
done

# The first process comes soon, or was killed while it waited; between two tests there may be none for a moment.
users="SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid::bigint = $kind AND objid::bigint = $key"
patience=60
while pg_isready -q; do
    unused=0
    while [ "$unused" -lt "$patience" ]; do
        count=$(psql -AXtqc "$users")
        unused=$((unused + 1))
        if [ "$count" != 0 ] && [ -n "$count" ]; then
            unused=0
            patience=4
        fi
        sleep 1
    done
    # The server is stopped with the lock held, so that nobody joins one that is about to stop.
    psql -Xq <<END
SELECT pg_try_advisory_lock($kind, $key) AS locked \gset
\if :locked
\! kill -INT $server; while pg_isready -q; do sleep 1; done
\endif
END
done
wait "$server"
