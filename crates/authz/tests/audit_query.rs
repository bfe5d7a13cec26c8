//! Reading the trail: filters, and pages that do not change.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use authz::audit::query::Cursor;
use authz::audit::{self, Actor, Entry, Outcome, Query, Record};
use authz::grant::{self, Grant};
use authz::{ActionName, ActionPattern, action, user};
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;
use sqlx::PgPool;
use support::{admin, pattern as p, user as u};

/// Whether a record is one of those.
type Holds<'h> = Box<dyn Fn(&Entry) -> bool + 'h>;

fn ids(entries: &[Entry]) -> Vec<i64> {
    entries.iter().map(|entry| entry.audit_id).collect()
}

/// All that can be read, page by page.
async fn read(pool: &PgPool, query: &Query, limit: u32) -> Vec<Entry> {
    let (mut all, mut cursor) = (Vec::new(), None);
    loop {
        let page = query.page(pool, cursor, limit).await.unwrap();
        if page.entries.is_empty() {
            return all;
        }
        all.extend(page.entries);
        cursor = Some(page.cursor);
    }
}

/// The same, once that many records are behind every transaction of the server.
async fn read_all(pool: &PgPool, query: &Query, records: usize) -> Vec<Entry> {
    let waiting = async {
        loop {
            let all = read(pool, query, 1000).await;
            if all.len() >= records {
                return all;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), waiting).await.expect("the records")
}

async fn count(pool: &PgPool) -> usize {
    let count: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log").fetch_one(pool).await.unwrap();
    usize::try_from(count).unwrap()
}

#[tokio::test]
async fn page_once_read_never_changes_whatever_commits_when() {
    let (_database, pool) = support::database().await;
    let writers = (0..6).map(|seed| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
            for n in 0..40 {
                let mut tx = pool.begin().await.unwrap();
                for _ in 0..rng.random_range(1..4) {
                    let (target, who) = (format!("{seed}-{n}"), admin());
                    let record = Record::new("workers.scale", Outcome::Succeeded).target(&target);
                    audit::record(&mut *tx, &who, &record).await.unwrap();
                    // Others begin and end meanwhile.
                    for _ in 0..rng.random_range(0..20) {
                        tokio::task::yield_now().await;
                    }
                }
                if rng.random_bool(0.2) { tx.rollback().await.unwrap() } else { tx.commit().await.unwrap() }
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let (query, mut pages, mut cursor) = (Query::new(), Vec::new(), None);
    loop {
        let over = writers.iter().all(tokio::task::JoinHandle::is_finished);
        let page = query.page(&pool, cursor, 7).await.unwrap();
        if page.entries.len() == 7 {
            pages.push((cursor, ids(&page.entries)));
        } else if over && pages.len() * 7 + page.entries.len() == count(&pool).await {
            pages.push((cursor, ids(&page.entries)));
            break;
        } else {
            tokio::task::yield_now().await;
            continue;
        }
        cursor = Some(page.cursor);
    }
    for (cursor, before) in &pages {
        assert_eq!(&ids(&query.page(&pool, *cursor, 7).await.unwrap().entries), before);
    }
    let seen: Vec<i64> = pages.into_iter().flat_map(|(_, ids)| ids).collect();
    let order: Vec<i64> =
        sqlx::query_scalar("select audit_id from authz.audit_log order by transaction_id, audit_id")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(seen, order);
    let mut newest = ids(&read(&pool, &Query::new().newest_first(), 13).await);
    newest.reverse();
    assert_eq!(newest, order);
}

#[tokio::test]
async fn record_is_held_back_until_every_earlier_transaction_has_ended() {
    let (_database, pool) = support::database().await;
    let write = |outcome| Record::new("workers.scale", outcome);
    let mut early = pool.begin().await.unwrap();
    let first = audit::record(&mut *early, &admin(), &write(Outcome::Failed)).await.unwrap();
    let second = audit::record(&pool, &admin(), &write(Outcome::Succeeded)).await.unwrap();
    assert_eq!(read(&pool, &Query::new(), 10).await, []);
    assert_eq!(read(&pool, &Query::new().newest_first(), 10).await, []);
    assert_eq!(ids(&audit::latest(&pool, 10).await.unwrap()), [second]);
    early.commit().await.unwrap();
    assert_eq!(ids(&read_all(&pool, &Query::new(), 2).await), [first, second]);
}

#[tokio::test]
async fn each_filter_gives_exactly_the_records_that_it_names() {
    let (_database, pool) = support::database().await;
    let services = ["dashboard", "scheduler"];
    let actions = ["workers", "workers.scale", "workers.scale.web", "workers-x.y", "queue.read"];
    let outcomes = [Outcome::Denied, Outcome::Started, Outcome::Succeeded, Outcome::Failed];
    for n in 0..120_usize {
        let who = Actor::new(["ada", "bob"][n % 2], services[n / 2 % 2]).request(format!("req-{}", n % 9));
        let target = format!("role {}", n % 4);
        let record = Record::new(actions[n % 5], outcomes[n / 3 % 4]).detail(json!({ "n": n }));
        let record = if n % 7 == 0 { record } else { record.target(&target) };
        audit::record(&pool, &who, &record).await.unwrap();
    }
    let all = read_all(&pool, &Query::new(), 120).await;
    assert_eq!(all.len(), 120);
    let (from, until) = (all[30].recorded_at, all[60].recorded_at);
    let below = |name: &str, entry: &Entry| {
        ActionName::parse(&entry.action)
            .is_ok_and(|action| ActionPattern::parse(name).unwrap().covers(&action))
    };
    let cases: Vec<(Query, Holds)> = vec![
        (Query::new().actor("ada"), Box::new(|e| e.actor == "ada")),
        (Query::new().service("scheduler"), Box::new(|e| e.service == "scheduler")),
        (Query::new().action(p("workers.scale")), Box::new(|e| e.action == "workers.scale")),
        (Query::new().action(p("workers.*")), Box::new(|e| below("workers.*", e))),
        (Query::new().action(p("*")), Box::new(|_| true)),
        (Query::new().target("role 1"), Box::new(|e| e.target.as_deref() == Some("role 1"))),
        (
            Query::new().outcomes(&[Outcome::Denied, Outcome::Failed]),
            Box::new(|e| matches!(e.outcome, Outcome::Denied | Outcome::Failed)),
        ),
        (Query::new().outcomes(&[]), Box::new(|_| false)),
        (Query::new().request("req-3"), Box::new(|e| e.request_id.as_deref() == Some("req-3"))),
        (Query::new().from(from).until(until), Box::new(|e| e.recorded_at >= from && e.recorded_at < until)),
        (Query::new().operation(all[5].audit_id), Box::new(|e| e.audit_id == all[5].audit_id)),
        (
            Query::new().actor("bob").action(p("workers.*")).outcomes(&[Outcome::Started]),
            Box::new(|e| e.actor == "bob" && below("workers.*", e) && e.outcome == Outcome::Started),
        ),
    ];
    for (query, holds) in cases {
        let expected: Vec<_> = all.iter().filter(|entry| holds(entry)).cloned().collect();
        // More often than it takes Postgres to consider one plan for all.
        for limit in [1000, 50, 9, 8, 7, 6, 5] {
            assert_eq!(read(&pool, &query, limit).await, expected, "{query:?} by {limit}");
        }
        let mut newest = read(&pool, &query.clone().newest_first(), 4).await;
        newest.reverse();
        assert_eq!(newest, expected, "{query:?}, the newest first");
    }
}

#[tokio::test]
async fn trail_that_was_restored_into_another_cluster_goes_on_behind_its_old_records() {
    let (_database, pool) = support::database().await;
    let write = async |target: &str| {
        let record = Record::new("workers.scale", Outcome::Succeeded).target(target);
        audit::record(&pool, &admin(), &record).await.unwrap()
    };
    // As a restored dump is: written by transactions of another count, which this cluster has not come to yet.
    sqlx::raw_sql(
        "update authz.audit_eras set cluster_id = 1;
         insert into authz.audit_log (service, actor, action, outcome, target, transaction_id)
         select 'tests', 'ada', 'workers.scale', 'succeeded', 'old', (9000000000 + 10 - n)::text::xid8
         from generate_series(1, 5) n;",
    )
    .execute(&pool)
    .await
    .unwrap();
    authz::migrate(&pool).await.unwrap();
    let old = read(&pool, &Query::new(), 2).await;
    assert_eq!(old.len(), 5, "none of them can change any more");
    assert!(old.is_sorted_by_key(|entry| -entry.audit_id), "in the order of their own transactions");
    let end: Cursor = Query::new().page(&pool, None, 5).await.unwrap().cursor;
    let new = [write("new").await, write("new").await];
    let all = read_all(&pool, &Query::new(), 7).await;
    assert_eq!(ids(&all)[..5], ids(&old));
    assert_eq!(ids(&all)[5..], new);
    assert_eq!(ids(&Query::new().page(&pool, Some(end), 10).await.unwrap().entries), new);
    let mut newest = read(&pool, &Query::new().newest_first(), 3).await;
    newest.reverse();
    assert_eq!(newest, all);
    authz::migrate(&pool).await.unwrap();
    let eras: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_eras").fetch_one(&pool).await.unwrap();
    assert_eq!(eras, 2, "a service that starts again begins no other era");
}

#[tokio::test]
async fn change_by_hand_is_recorded_with_the_database_user_and_one_by_the_library_with_its_actor() {
    let (_database, pool) = support::database().await;
    user::create(&pool, &u("ada"), "Ada", &admin()).await.unwrap();
    action::register(&pool, &[(ActionName::parse("queue.read").unwrap(), "")], &admin()).await.unwrap();
    grant::to_user(&pool, &u("ada"), &Grant::new(p("queue.read"), "she reads it"), &admin()).await.unwrap();
    sqlx::raw_sql("delete from authz.user_actions").execute(&pool).await.unwrap();
    let me: String = sqlx::query_scalar("select session_user::text").fetch_one(&pool).await.unwrap();
    let all = read_all(&pool, &Query::new().action(p("grant.*")), 2).await;
    let [added, removed] = &all[..] else { panic!("{all:?}") };
    assert_eq!((added.actor.as_str(), added.request_id.as_deref()), ("admin@example.com", Some("req-1")));
    assert_eq!(added.detail["reason"], "she reads it");
    assert_eq!((added.action.as_str(), added.target.as_deref()), ("grant.add", Some("user ada")));
    assert_eq!((removed.action.as_str(), &removed.actor, &removed.database_user), ("grant.remove", &me, &me));
    assert_eq!(added.database_user, me);
    assert!(removed.revision > added.revision);
}
