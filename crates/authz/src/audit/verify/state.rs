//! Whether grants and memberships made by hand are what the trail says: shows what was changed with the triggers off.

use serde::Serialize;
use sqlx::{PgConnection, PgPool};

use crate::audit::reading::begin_reading;
use crate::error::Error;
use crate::lent::Lent;

/// A row that the trail does not account for, or the reverse.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Difference {
    /// The table: `user_actions`, `group_actions`, `group_users`, `group_groups` or `group_directories`.
    pub table: String,
    /// The row as it stands, in the form of a record's detail; `None` if the trail has it and the table has not.
    pub live: Option<serde_json::Value>,
    /// The row as the trail has it; `None` if the table has it and the trail has not.
    pub trail: Option<serde_json::Value>,
    /// The record that told of it last.
    pub audit_id: Option<i64>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { table, live, trail, audit_id } = self;
        let record = audit_id.map(|id| format!(" (record {id})")).unwrap_or_default();
        match (live, trail) {
            (Some(live), Some(trail)) => write!(f, "{table}: is {live}, but the trail says {trail}{record}"),
            (Some(live), None) => write!(f, "{table}: {live} is in no record{record}"),
            (None, Some(trail)) => write!(f, "{table}: {trail} is gone without a record{record}"),
            (None, None) => write!(f, "{table}"),
        }
    }
}

/// Replays grants, and memberships of local groups, from the trail, and compares them with the live tables. Begins from
/// the latest baseline (the rows that there were before the trail knew them by number, or when old months were
/// removed). Gives what differs; nothing if nothing does.
///
/// Works in one snapshot, so a change under way is no difference. Whether the trail itself is what was sealed is for
/// [`verify`](super::verify()) to say.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn verify_state(pool: &PgPool) -> Result<Vec<Difference>, Error> {
    let mut connection = Lent::from(pool).await?;
    let mut tx = begin_reading(&mut connection).await?;
    // What grants and memberships there are, too: the view stands for the tables under it. A `truncate` that comes between would
    // take rows away that its record, which is not seen, accounts for.
    sqlx::query!("lock table authz.audited_state, authz.groups in access share mode")
        .execute(&mut *tx)
        .await?;
    let found = differences(&mut tx).await?;
    tx.rollback().await?;
    connection.give_back();
    Ok(found)
}

/// The same within a transaction; one statement, so one snapshot.
pub(crate) async fn differences(connection: &mut PgConnection) -> Result<Vec<Difference>, Error> {
    // INVARIANT: what is recorded is no difference (held by the test
    // `what_is_recorded_is_no_difference_whoever_did_it_and_however`). The changes of one row follow each other, whatever the order of their transactions' numbers: a row is locked from
    // its change to commit, and the number of a record is drawn in between. So the last number tells.
    let found = sqlx::query_as!(
        Difference,
        r#"
        with last as (
            select audit_id, transaction_id from authz.audit_log
            where action = 'audit.baseline' and outcome = 'succeeded' and coalesce(by_database, true)
            order by audit_id desc limit 1
        ), changes as (
            select l.audit_id, row_of ->> 'table' as table_name, row_of -> 'detail' as detail, false as removed
            from last l
            join authz.audit_log b on b.action = 'audit.baseline' and b.transaction_id = l.transaction_id
                                  and b.outcome = 'succeeded' and coalesce(b.by_database, true),
                 jsonb_array_elements(b.detail -> 'rows') row_of
            union all
            select a.audit_id,
                   case when a.detail ? 'emptied' then a.detail ->> 'emptied'
                        when a.action like 'grant.%' and a.detail ? 'user_id' then 'user_actions'
                        when a.action like 'grant.%' then 'group_actions'
                        when a.detail ? 'member_group_id' then 'group_groups'
                        when a.detail ? 'directory_id' then 'group_directories'
                        else 'group_users' end,
                   a.detail, a.action like '%.remove'
            from authz.audit_log a
            where a.action in ('grant.add', 'grant.change', 'grant.remove',
                               'membership.add', 'membership.change', 'membership.remove')
              and a.outcome = 'succeeded' and coalesce(a.by_database, true)
              and a.audit_id > coalesce((select audit_id from last), '-9223372036854775808'::bigint)
        ), keyed as (
            select c.audit_id, c.table_name, c.detail, c.removed,
                   case c.table_name when 'user_actions' then c.detail ->> 'user_id' else c.detail ->> 'group_id' end as holder,
                   case when c.table_name in ('user_actions', 'group_actions') then c.detail ->> 'grant'
                        when c.table_name = 'group_users' then c.detail ->> 'user_id'
                        when c.table_name = 'group_groups' then c.detail ->> 'member_group_id'
                        else c.detail ->> 'directory_id' end as held
            from changes c
            where not c.detail ? 'emptied'
              and c.audit_id > all (select e.audit_id from changes e
                                    where e.detail ? 'emptied' and e.table_name = c.table_name)
        ), replayed as (
            select distinct on (k.table_name, k.holder, k.held) k.*
            from keyed k
            where k.holder is not null and k.held is not null
            order by k.table_name, k.holder, k.held, k.audit_id desc
        ), trail as (
            select r.* from replayed r
            -- The memberships of a group that belongs to a directory by now are that directory's.
            left join authz.groups g on g.group_id::text = r.holder and r.table_name like 'group\_%'
                                     and r.table_name <> 'group_actions'
            where coalesce(g.directory_id, 0) = 0
        ), live as (
            select s.table_name, s.detail,
                   case s.table_name when 'user_actions' then s.detail ->> 'user_id' else s.detail ->> 'group_id' end as holder,
                   case when s.what = 'grant' then s.detail ->> 'grant'
                        when s.table_name = 'group_users' then s.detail ->> 'user_id'
                        when s.table_name = 'group_groups' then s.detail ->> 'member_group_id'
                        else s.detail ->> 'directory_id' end as held
            from authz.audited_state s
        )
        select coalesce(l.table_name, t.table_name) as "table!", l.detail as "live?",
               case when not t.removed then t.detail end as "trail?", t.audit_id as "audit_id?"
        from live l
        full join trail t on t.table_name = l.table_name and t.holder = l.holder and t.held = l.held
        where case
                  when l.holder is null then not t.removed
                  when t.holder is null or t.removed then true
                  else l.detail ->> 'granted_by' is distinct from t.detail ->> 'granted_by'
                      or l.detail ->> 'reason' is distinct from t.detail ->> 'reason'
                      or l.detail ->> 'role' is distinct from t.detail ->> 'role'
                      or (l.detail ->> 'expires_at')::timestamptz is distinct from (t.detail ->> 'expires_at')::timestamptz
              end
        order by 1, coalesce(l.holder, t.holder), coalesce(l.held, t.held)
        "#
    )
    .fetch_all(connection)
    .await?;
    Ok(found)
}
