//! One run of the sealer, in the database.

use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::TryStreamExt;
use serde::Serialize;
use sqlx::{Connection, PgConnection, PgPool, Postgres, Transaction};

use super::{Checkpoint, Seal, SigningKey, last_seal, moment};
use crate::audit::canonical::{COLUMNS, Digest, Encoder, Form, Place, Sealable, entries, from_hex};
use crate::audit::era;
use crate::audit::silence::{ANSWER, WORK, end_with_us, while_it_goes_on, within};
use crate::error::Error;
use crate::lent::Lent;
use crate::snapshot::copy::{Field, Rows};

/// A seal has at most so many records, so that what it says of each fits into a row.
const RECORDS_PER_SEAL: usize = 10_000;
/// One transaction of the sealer takes at most so many.
const RECORDS_PER_STEP: i64 = 100_000;

/// What a run of the sealer did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Sealed {
    /// How many seals it wrote.
    pub seals: u64,
    /// How many records they hold.
    pub records: u64,
    /// The newest seal, whoever wrote it.
    pub checkpoint: Option<Checkpoint>,
    /// Whether another sealer was at work, so that this one left it the rest.
    pub busy: bool,
}

/// Seals all records whose transactions are past the commit horizon; with `key`, signs the seals.
///
/// Safe to call from many processes: one works, the others leave with `busy`. After the trail was restored into another
/// cluster the first run stops writers of the trail for a moment, and notes it, so that the trail is read in its order.
///
/// # Errors
/// [`Error::Database`] if the database does not answer, or if it took longer than five seconds to stop writers.
pub async fn seal(pool: &PgPool, key: Option<&SigningKey>) -> Result<Sealed, Error> {
    seal_as(pool, Form::NEWEST, key).await
}

/// The same with seals of that form.
async fn seal_as(pool: &PgPool, form: Form, key: Option<&SigningKey>) -> Result<Sealed, Error> {
    let mut connection = Lent::from(pool).await?;
    within(ANSWER, async { Ok(era::note(&mut connection).await?) }).await?;
    let mut total = Sealed::default();
    loop {
        match step(&mut connection, form, key).await? {
            Step::Busy => {
                total.busy = true;
                break;
            }
            Step::Done { seals, records, checkpoint, more } => {
                total.seals += seals;
                total.records += records;
                total.checkpoint = checkpoint;
                if !more {
                    break;
                }
            }
        }
    }
    connection.give_back();
    Ok(total)
}

enum Step {
    Busy,
    Done { seals: u64, records: u64, checkpoint: Option<Checkpoint>, more: bool },
}

/// What the database says at the beginning of a step.
struct Now {
    sealed_at: i64,
    cluster_id: i64,
    horizon: u64,
    next_transaction_id: u64,
    last_audit_id: i64,
    /// Nothing is sealed yet, and there is a record of a transaction that this cluster has not come to.
    foreign: bool,
}

/// One transaction of the sealer; an error if the database falls silent.
// INVARIANT: a sealer whose database is silent can be stopped (held by the test `sealer_ends_though_the_database_is_silent`).
async fn step(connection: &mut PgConnection, form: Form, key: Option<&SigningKey>) -> Result<Step, Error> {
    let Some(tx) = within(ANSWER, take_turn(connection)).await? else { return Ok(Step::Busy) };
    let steps = AtomicU64::new(0);
    while_it_goes_on(WORK, &steps, seal_some(tx, form, key, &steps)).await
}

/// Begins a step; `None` if another sealer is at one.
async fn take_turn(connection: &mut PgConnection) -> Result<Option<Transaction<'_, Postgres>>, Error> {
    let mut tx = connection.begin_with("begin isolation level read committed").await?;
    end_with_us(&mut tx).await?;
    let mine = sqlx::query_scalar!(r#"select pg_try_advisory_xact_lock(7022914605) as "mine!""#)
        .fetch_one(&mut *tx)
        .await?;
    Ok(mine.then_some(tx))
}

/// Counts up with each record and each seal.
async fn seal_some(
    mut tx: Transaction<'_, Postgres>,
    form: Form,
    key: Option<&SigningKey>,
    steps: &AtomicU64,
) -> Result<Step, Error> {
    let last = last_seal(&mut *tx).await?;
    let base_audit_id = last
        .as_ref()
        .map_or(i64::MIN, |seal| if seal.ends_era() { seal.last_audit_id } else { seal.base_audit_id });
    let mut now = now(&mut tx, last.is_none()).await?;
    let (era, from) = last.as_ref().map_or((1, Place::START), Seal::next_place);
    let closing = last.as_ref().is_some_and(|seal| seal.closing && !seal.ends_era());
    let elsewhere = now.foreign
        || last.as_ref().is_some_and(|seal| {
            seal.cluster_id != now.cluster_id || seal.next_transaction_id > now.next_transaction_id
        });

    let mut chain = Chain { last, form, key, written: 0, records: 0 };
    if elsewhere && !closing {
        // INVARIANT: every record is sealed once, wherever the trail was restored to (held by the test
        // `restored_into_other_servers_the_trail_goes_on_without_a_false_alarm`).
        // From here to commit nobody writes to the trail; so every record up to the number noted is there, and every
        // later one has a higher number.
        sqlx::query!("set local lock_timeout = '5s'").execute(&mut *tx).await?;
        sqlx::query!("select authz.hold_audit_trail(exclusive => false)").fetch_one(&mut *tx).await?;
        now = self::now(&mut tx, chain.last.is_none()).await?;
        let marker = chain.next(&now, era, base_audit_id, true, Place::START);
        chain.write(&mut tx, marker, &[]).await?;
        let (written, checkpoint) = (chain.written, chain.last.as_ref().map(Seal::checkpoint));
        tx.commit().await?;
        return Ok(Step::Done { seals: written, records: 0, checkpoint, more: true });
    }

    let range = if closing {
        let cap = chain.last.as_ref().map_or(i64::MAX, |seal| seal.last_audit_id);
        now.last_audit_id = cap;
        let (sealed_until, sealed_last) = normal_end(&mut tx, era).await?;
        Range {
            base_audit_id,
            cap,
            from,
            until: Place::END,
            sealed_until,
            sealed_last,
            limit: RECORDS_PER_STEP,
        }
    } else {
        Range {
            base_audit_id,
            cap: i64::MAX,
            from,
            until: Place::before(now.horizon),
            sealed_until: Place::START,
            sealed_last: i64::MAX,
            limit: RECORDS_PER_STEP,
        }
    };
    let mut records = Vec::new();
    let mut encoder = Encoder::new();
    copy_range(&mut tx, &range, |row| {
        records.push(encoder.row(row, |_| form)?);
        steps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    })
    .await?;
    let more = i64::try_from(records.len()).is_ok_and(|count| count >= RECORDS_PER_STEP);
    let mut rest = records.as_slice();
    while !rest.is_empty() || (closing && !more) {
        let (chunk, left) = rest.split_at(rest.len().min(RECORDS_PER_SEAL));
        rest = left;
        let until = match chunk.last() {
            Some(last) if more || !rest.is_empty() => last.place().after(),
            _ => range.until,
        };
        let next = chain.next(&now, era, base_audit_id, closing, until);
        chain.write(&mut tx, next, chunk).await?;
        steps.fetch_add(1, Ordering::Relaxed);
        if rest.is_empty() {
            break;
        }
    }
    let checkpoint = chain.last.as_ref().map(Seal::checkpoint);
    let (seals, records) = (chain.written, chain.records);
    tx.commit().await?;
    Ok(Step::Done { seals, records, checkpoint, more })
}

async fn now(connection: &mut PgConnection, first: bool) -> Result<Now, Error> {
    // INVARIANT: no transaction below the horizon writes a record any more (held by the tests
    // `an_open_transaction_holds_back_those_after_it_and_nothing_is_lost` and
    // `no_false_alarm_and_no_loss_under_32_writers`).
    // The time of the statement's beginning, the snapshot after it, the sequence after that: so a transaction that
    // begins after this seal is later than its time, and one below its horizon has drawn all its numbers.
    let row = sqlx::query!(
        r#"
        select (extract(epoch from statement_timestamp()) * 1000000 - 946684800000000)::bigint as "sealed_at!",
               (select system_identifier from pg_control_system()) as "cluster_id!",
               -- Of those running when this statement began, the first that still is and is not another database's: the
               -- plain xmin would wait for them as well. One that has ended meanwhile is seen by the statements to come.
               coalesce((select min(running.xid::text::bigint) from pg_snapshot_xip(pg_current_snapshot()) running (xid)
                         where case
                             when exists (select from pg_stat_activity a
                                          where a.datid <> (select oid from pg_database where datname = current_database())
                                            and a.backend_xid
                                                = (running.xid::text::numeric % 4294967296)::bigint::text::xid)
                             then false
                             else pg_xact_status(running.xid) = 'in progress'
                         end),
                        pg_snapshot_xmax(pg_current_snapshot())::text::bigint) as "horizon!",
               pg_snapshot_xmax(pg_current_snapshot())::text::bigint as "next_transaction_id!",
               (select case when is_called then last_value else last_value - 1 end
                from authz.audit_log_audit_id_seq) as "last_audit_id!",
               -- With a seal its cluster tells, and looking at all records is not called for.
               $1 and exists (select from authz.audit_log
                              where transaction_id >= pg_snapshot_xmax(pg_current_snapshot())) as "foreign!"
        "#,
        first,
    )
    .fetch_one(connection)
    .await?;
    Ok(Now {
        sealed_at: row.sealed_at,
        cluster_id: row.cluster_id,
        horizon: row.horizon.cast_unsigned(),
        next_transaction_id: row.next_transaction_id.cast_unsigned(),
        last_audit_id: row.last_audit_id,
        foreign: row.foreign,
    })
}

/// Where the seals of an era end that are not closing ones, and the highest number that the last of them knew of.
pub(crate) async fn normal_end(connection: &mut PgConnection, era: i32) -> Result<(Place, i64), Error> {
    let row = sqlx::query!(
        r#"
        select until_transaction_id::text::bigint as "transaction_id!", until_audit_id, last_audit_id
        from authz.audit_seals
        where era = $1 and not closing
        order by seal_id desc
        limit 1
        "#,
        era,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map_or((Place::START, i64::MAX), |row| {
        let place =
            Place { transaction_id: row.transaction_id.cast_unsigned(), audit_id: row.until_audit_id };
        (place, row.last_audit_id)
    }))
}

/// The end of the chain, and what was added to it.
struct Chain<'k> {
    last: Option<Seal>,
    form: Form,
    key: Option<&'k SigningKey>,
    written: u64,
    records: u64,
}

impl Chain<'_> {
    fn next(&self, now: &Now, era: i32, base_audit_id: i64, closing: bool, until: Place) -> Seal {
        Seal {
            seal_id: self.last.as_ref().map_or(1, |seal| seal.seal_id.saturating_add(1)),
            sealed_at: now.sealed_at,
            format: self.form.format(),
            era,
            cluster_id: now.cluster_id,
            base_audit_id,
            last_audit_id: now.last_audit_id,
            horizon: now.horizon,
            next_transaction_id: now.next_transaction_id,
            closing,
            until_transaction_id: until.transaction_id,
            until_audit_id: until.audit_id,
            records: 0,
            records_digest: Digest([0; 32]),
            previous_digest: self.last.as_ref().map(|seal| seal.digest),
            digest: Digest([0; 32]),
            key_id: None,
            signature: None,
        }
    }

    async fn write(
        &mut self,
        connection: &mut PgConnection,
        mut seal: Seal,
        records: &[Sealable],
    ) -> Result<(), Error> {
        let entries = entries(records);
        seal.records = i64::try_from(records.len()).unwrap_or(i64::MAX);
        seal.records_digest = Digest::of(&entries);
        seal.complete(self.key);
        let sealed_at = moment(seal.sealed_at)
            .ok_or_else(|| Error::Unreadable { what: "a clock beyond all dates".to_owned() })?;
        sqlx::query!(
            r#"
            insert into authz.audit_seals
                (seal_id, sealed_at, format, era, cluster_id, base_audit_id, last_audit_id, horizon, next_transaction_id,
                 closing, until_transaction_id, until_audit_id, records, records_digest, previous_digest, digest,
                 key_id, signature, entries)
            values ($1, $2, $3, $4, $5, $6, $7, $8::text::xid8, $9::text::xid8, $10, $11::text::xid8, $12, $13, $14, $15,
                    $16, $17, $18, $19)
            "#,
            seal.seal_id,
            sealed_at,
            seal.format,
            seal.era,
            seal.cluster_id,
            seal.base_audit_id,
            seal.last_audit_id,
            seal.horizon.to_string(),
            seal.next_transaction_id.to_string(),
            seal.closing,
            seal.until_transaction_id.to_string(),
            seal.until_audit_id,
            seal.records,
            &seal.records_digest.0[..],
            seal.previous_digest.as_ref().map(|digest| &digest.0[..]),
            &seal.digest.0[..],
            seal.key_id,
            seal.signature.as_deref().and_then(from_hex),
            entries,
        )
        .execute(connection)
        .await?;
        self.written += 1;
        self.records += seal.records.unsigned_abs();
        self.last = Some(seal);
        Ok(())
    }
}

/// Records of one era, in the order of the chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    /// Only those with higher numbers than this.
    pub(crate) base_audit_id: i64,
    /// None with a higher number than this.
    pub(crate) cap: i64,
    pub(crate) from: Place,
    pub(crate) until: Place,
    /// Not those before this place with numbers up to `sealed_last`: other seals have them.
    pub(crate) sealed_until: Place,
    pub(crate) sealed_last: i64,
    pub(crate) limit: i64,
}

/// Streams the records of a range; within a transaction, and on a connection that is [`Lent`].
pub(crate) async fn copy_range(
    connection: &mut PgConnection,
    range: &Range,
    mut each: impl FnMut(&[Field<'_>; COLUMNS]) -> Result<(), Error>,
) -> Result<(), Error> {
    let Range { base_audit_id, cap, from, until, sealed_until, sealed_last, limit } = range;
    // `copy` takes no parameters. All of these are numbers, and as constants they let the planner see how small the range is.
    let place = |place: &Place| format!("('{}'::xid8, '{}'::bigint)", place.transaction_id, place.audit_id);
    let statement = format!(
        "copy (
            select audit_id, recorded_at, service, actor, action, outcome, target, detail::text, request_id,
                   decision::text, revision, database_user, transaction_id, operation_id, by_database
            from authz.audit_log
            where audit_id > '{base_audit_id}'::bigint and audit_id <= '{cap}'::bigint
              and (transaction_id, audit_id) >= {} and (transaction_id, audit_id) < {}
              and ((transaction_id, audit_id) >= {} or audit_id > '{sealed_last}'::bigint)
            order by transaction_id, audit_id
            limit '{limit}'::bigint
        ) to stdout (format binary)",
        place(from),
        place(until),
        place(sealed_until),
    );
    let mut chunks = connection.copy_out_raw(&statement).await?;
    let mut rows = Rows::default();
    while let Some(chunk) = chunks.try_next().await? {
        rows.feed(&chunk, |row: [Field<'_>; COLUMNS]| each(&row))?;
    }
    rows.end()
}

#[cfg(test)]
mod tests {
    use sqlx::Executor;

    use super::*;
    use crate::audit::{Actor, Outcome, Problem, Record, Trust, export, record, verify, verify_exports};

    async fn write(pool: &PgPool, count: usize) {
        for _ in 0..count {
            let told = Record::new("workers.scale", Outcome::Succeeded);
            record(pool, &Actor::new("user", "tests"), &told).await.unwrap();
        }
    }

    /// What an administrator of the server can do.
    async fn spoil(pool: &PgPool, statement: &'static str) {
        let mut tx = pool.begin().await.unwrap();
        tx.execute("set local session_replication_role = replica").await.unwrap();
        assert_eq!(tx.execute(statement).await.unwrap().rows_affected(), 1, "{statement}");
        tx.commit().await.unwrap();
    }

    #[tokio::test]
    async fn seals_of_both_forms_stand_in_one_chain() {
        let database = testdb::Database::empty().await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        crate::migrate(&pool).await.unwrap();
        // As where an older sealer works on beside a newer one.
        for form in [Form::One, Form::Two, Form::One, Form::Two] {
            write(&pool, 5).await;
            seal_as(&pool, form, None).await.unwrap();
        }
        let of: Vec<(i64, i16, i64)> = sqlx::query_as(
            "select s.seal_id, s.format, (select count(*) from authz.audit_log a
                where (a.transaction_id, a.audit_id) < (s.until_transaction_id, s.until_audit_id))
             from authz.audit_seals s order by 1",
        )
        .fetch_all(&pool)
        .await
        .unwrap();
        assert_eq!(of, [(1, 1, 5), (2, 2, 10), (3, 1, 15), (4, 2, 20)]);
        let newest = last_seal(&pool).await.unwrap().unwrap().checkpoint();
        let trust = Trust::new().checkpoint(newest);
        let found = async || verify(&pool, &trust).await.unwrap().finding;
        assert_eq!(found().await, None);
        let mut out = Vec::new();
        export(&pool, 1, None, &mut out).await.unwrap();
        assert_eq!(verify_exports([out.as_slice()], &trust).unwrap().finding, None);
        let marked = String::from_utf8(out).unwrap().matches("\"by_database\":false").count();
        assert_eq!(marked, 10, "where the seal covers it");

        spoil(&pool, "update authz.audit_log set by_database = true where audit_id = 12").await;
        assert_eq!(found().await, None, "the first form does not cover it");
        spoil(&pool, "update authz.audit_log set by_database = true where audit_id = 17").await;
        let one = found().await.unwrap();
        assert_eq!((one.problem, one.audit_id), (Problem::RecordAltered, Some(17)));
        assert!(export(&pool, 1, None, &mut Vec::new()).await.is_err());
    }

    #[tokio::test]
    async fn a_seal_of_a_later_version_is_called_that() {
        let database = testdb::Database::empty().await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        crate::migrate(&pool).await.unwrap();
        write(&pool, 1).await;
        seal(&pool, None).await.unwrap();
        spoil(&pool, "update authz.audit_seals set format = 3").await;
        let finding = verify(&pool, &Trust::new()).await.unwrap().finding.unwrap();
        assert_eq!(finding.problem, Problem::SealAltered);
        let mut seal = last_seal(&pool).await.unwrap().unwrap();
        seal.complete(None);
        let digest = format!("update authz.audit_seals set digest = '\\x{}'", seal.digest);
        spoil(&pool, digest.leak()).await;
        let finding = verify(&pool, &Trust::new()).await.unwrap().finding.unwrap();
        assert_eq!(finding.problem, Problem::SealNewer);
    }
}
