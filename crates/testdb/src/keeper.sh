# The keeper: starts PostgreSQL, and stops and removes it when no process uses it any more, however those ended.
# Its stdin is the file on which each user holds a shared lock, stdout a file that is locked as long as this
# script lives, stderr the log, locked as long as this script or any process of the server lives.
# Arguments: the server's folder, the folder of the programs (empty: there is no server to start, only a folder
# to remove), for how many seconds it stays without a user, the folder of the server that it is a standby of
# (empty: of none), then settings of the server, each as `name=value`.
trap '' HUP INT TERM
folder=$1
programs=$2
linger=$3
primary=$4
shift 4
data=$folder/data
# A shell gives what it starts in the background another stdin, so it is kept here.
exec 3<&0

# Takes the lock on stdin, tries to, or frees it.
lock() {
    case $1 in
    take) flag=-x number=2 ;;
    try) flag=-xn number=6 ;;
    free) flag=-u number=8 ;;
    esac
    if command -v flock >/dev/null 2>&1; then
        flock "$flag" 0
    else
        perl -e 'flock(STDIN, $ARGV[0]) or exit 1' "$number"
    fi
}

# Waits until nobody has used the server for a while, and from then on lets nobody use it. Each user has added
# a byte to `alive`.
wait_for_users() {
    while lock take; do
        [ "$linger" -gt 0 ] || return
        uses=$(wc -c <"$folder/alive")
        lock free
        sleep "$linger"
        if lock try; then
            if [ "$uses" = "$(wc -c <"$folder/alive")" ]; then
                : >"$folder/closing"
                return
            fi
            lock free
        fi
    done
}

# Removes the block of shared memory that a killed server has left behind.
remove_shared_memory() {
    [ -s "$data/postmaster.pid" ] || return
    block=$(sed -n '7s/^ *[0-9]* *//p' "$data/postmaster.pid")
    [ -z "$block" ] || ipcrm -m "$block" 2>/dev/null
}

start() {
    # Processes of a killed server have ended once the log is free.
    lock take <&2 || return
    remove_shared_memory
    # Their numbers may still be taken, since not every process 1 takes notice of the dead; PostgreSQL would
    # then believe that the old server runs.
    rm -f "$data/postmaster.pid" "$folder/.s.PGSQL.5432.lock"
    if [ -s "$data/PG_VERSION" ]; then
        :
    elif [ -n "$primary" ]; then
        "$programs/pg_basebackup" -D "$data" -h "$primary" -p 5432 -U postgres -R -X stream -c fast --no-sync \
            </dev/null >&2 || return
    else
        "$programs/initdb" -D "$data" -U postgres --auth=trust --encoding=UTF8 --locale=C --no-sync \
            </dev/null >&2 || return
    fi
    # A server that was killed on purpose stays down until its user frees this lock.
    lock take <"$folder/hold" || return
    # Who would have used it may have ended meanwhile.
    ! lock try || return
    for setting in "$@"; do
        set -- "$@" -c "$setting"
        shift
    done
    "$programs/postgres" -D "$data" -k "$folder" -p 5432 "$@" </dev/null >&2 3<&- &
    server=$!
    (
        wait_for_users
        # A server that has only just been started does not hear the first signal.
        tries=0
        until [ -e "$folder/ended" ] || [ "$tries" -ge 300 ]; do
            kill -QUIT "$server" || break
            tries=$((tries + 1))
            sleep 0.1 2>/dev/null || sleep 1
        done
    ) <&3 &
    waiter=$!
    wait "$server"
}

waiter=
if [ -n "$programs" ]; then
    start "$@"
    : >"$folder/ended"
fi
if [ -n "$waiter" ]; then
    wait "$waiter"
else
    wait_for_users
fi

remove_shared_memory
rm -rf "$folder"

# The folder of the run goes with its last server. A process that waits for `start.lock` sees that it is no
# longer the file of that name; so does this one.
run=${folder%/*}
inode=$(ls -di "$run/start.lock" 2>/dev/null) || exit 0
(
    lock take
    [ "$inode" = "$(ls -di "$run/start.lock" 2>/dev/null)" ] || exit 0
    for other in "$run"/srv-*; do
        [ ! -e "$other" ] || exit 0
    done
    rm -f "$run/start.lock"
    rmdir "$run"
) <"$run/start.lock" 2>/dev/null
