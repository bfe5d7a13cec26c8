//! What syncs changed is in the audit trail: it tells who could do what between any two of them.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod support;

use std::sync::Arc;

use authz::audit::{self, Moment};
use authz::grant::{self, Grant};
use authz::{ActionName, ActionPattern, action};
use chrono::{DateTime, Utc};
use dir_sync::file::FileSource;
use dir_sync::{Options, Status};
use sqlx::PgPool;
use support::{ACTION, MAIN, actor, approve, database, organisation, run};

async fn now(pool: &PgPool) -> DateTime<Utc> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(pool).await.unwrap()
}

async fn can(pool: &PgPool, action: &ActionName) -> Vec<String> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = authz::users_who_can(pool, action, after.as_ref(), 1000).await.unwrap();
        all.extend(page.users.iter().map(ToString::to_string));
        match page.users.last() {
            Some(last) if page.users.len() == 1000 => after = Some(last.clone()),
            _ => return all,
        }
    }
}

#[tokio::test]
async fn trail_tells_who_could_do_what_after_each_sync_of_a_real_organisation() {
    let (_database, pool) = database().await;
    let scale: ActionName = ACTION.parse().unwrap();
    action::register(&pool, &[(scale.clone(), "")], &actor()).await.unwrap();
    let mut moments = Vec::new();
    for file in ["2025-01", "2026-01", "2026-08"] {
        let source = Arc::new(FileSource::open(organisation(file)).unwrap());
        let mut report = run(&pool, MAIN, source.clone(), Options::default()).await;
        if report.status == Status::Refused {
            report = run(&pool, MAIN, source, approve(&report)).await;
        }
        assert_eq!(report.status, Status::Applied, "{report}");
        if moments.is_empty() {
            let largest: Vec<String> = sqlx::query_scalar(
                "select group_name from authz.groups join authz.group_ancestors an on an.ancestor_id = groups.group_id
                 join authz.group_users gu on gu.group_id = an.group_id group by 1 order by count(*) desc, 1 limit 6",
            )
            .fetch_all(&pool)
            .await
            .unwrap();
            for group in largest {
                let all = Grant::new(ActionPattern::parse("workers.*").unwrap(), "the largest groups");
                grant::to_group(&pool, &group.parse().unwrap(), &all, &actor()).await.unwrap();
            }
        }
        moments.push((file, now(&pool).await, can(&pool, &scale).await));
    }
    assert!(moments[0].2.len() > 100 && moments[0].2 != moments[1].2 && moments[1].2 != moments[2].2);
    for (file, at, expected) in &moments {
        let then = audit::who_could(&pool, &scale, Moment::At(*at)).await.unwrap();
        let names: Vec<_> = then.iter().map(|access| access.user.to_string()).collect();
        assert_eq!(&names, expected, "after the sync of {file}");
    }

    // The record that a way names leads to the sync that made the membership.
    let last = audit::who_could(&pool, &scale, Moment::At(moments[2].1)).await.unwrap();
    let record = last[0].ways[0].membership_record.unwrap();
    let action: String = sqlx::query_scalar("select action from authz.audit_log where audit_id = $1")
        .bind(record)
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(action, "state.members");

    // A sync that finds nothing to change records nothing but itself.
    let before: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log").fetch_one(&pool).await.unwrap();
    let source = Arc::new(FileSource::open(organisation("2026-08")).unwrap());
    assert_eq!(run(&pool, MAIN, source, Options::default()).await.status, Status::Unchanged);
    let after: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log").fetch_one(&pool).await.unwrap();
    assert_eq!(after - before, 1);
}
