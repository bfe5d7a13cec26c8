//! Rows are kept by the directory's immutable id: a name may move, grants stay with the row.

mod support;

use dir_sync::{Options, Status};
use sqlx::PgPool;

use self::support::*;

#[tokio::test]
async fn renamed_user_and_group_keep_their_grants() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "ada").user("2", "bo").group("g", "ops").member("g", "2");
    applied(&pool, &org).await;
    grant_to_user(&pool, "ada").await;
    grant_to_group(&pool, "ops").await;
    let renamed = org.rename_user("1", "Ada.Lovelace").rename_group("g", "operations@other.example");
    let counts = applied(&pool, &renamed).await.counts;
    assert_eq!((counts.users.changed, counts.groups.changed, counts.memberships.changed), (1, 1, 0));
    assert!(can(&pool, "ada.lovelace").await && can(&pool, "bo").await);
    assert!(!can(&pool, "ada").await);
}

#[tokio::test]
async fn two_users_swap_their_addresses() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "ada").user("2", "bo");
    applied(&pool, &org).await;
    grant_to_user(&pool, "ada").await;
    applied(&pool, &org.rename_user("1", "bo").rename_user("2", "ada")).await;
    assert!(can(&pool, "bo").await, "the grant follows the person");
    assert!(!can(&pool, "ada").await, "the address carries no grant");
}

#[tokio::test]
async fn three_groups_pass_their_addresses_on_in_a_circle() {
    let (_database, pool) = database().await;
    let org =
        Org::new("C1").user("1", "ada").group("g1", "a").group("g2", "b").group("g3", "c").member("g1", "1");
    applied(&pool, &org).await;
    grant_to_group(&pool, "a").await;
    applied(&pool, &org.rename_group("g1", "b").rename_group("g2", "c").rename_group("g3", "a")).await;
    assert!(can(&pool, "ada").await);
    let granted =
        text(&pool, "select group_name from authz.group_actions join authz.groups using (group_id)").await;
    assert_eq!(granted, "b@example.com");
}

#[tokio::test]
async fn address_freed_in_the_same_run_can_be_taken() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .user("3", "cy")
        .group("g1", "a")
        .group("g2", "b")
        .group("g3", "c");
    applied(&pool, &org).await;
    grant_to_user(&pool, "ada").await;
    grant_to_user(&pool, "bo").await;
    grant_to_group(&pool, "a").await;
    // One takes it by a rename, another one, in a longer chain, by being new.
    let next = org
        .without_user("1")
        .rename_user("2", "ada")
        .user("4", "bo")
        .without_group("g1")
        .rename_group("g2", "a")
        .group("g4", "b")
        .member("g2", "3")
        .member("g4", "4");
    applied(&pool, &next).await;
    assert!(can(&pool, "ada").await, "the renamed user keeps the grant that it had itself");
    assert!(!can(&pool, "bo").await, "the new user has the name only");
    assert!(!can(&pool, "cy").await, "the renamed group has the name only");
}

#[tokio::test]
async fn new_user_and_group_of_a_freed_name_inherit_no_grant() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("g1", "ops")
        .group("g2", "web")
        .member("g1", "1")
        .member("g1", "2")
        .member("g2", "2");
    applied(&pool, &org).await;
    grant_to_user(&pool, "ada").await;
    grant_to_group(&pool, "ops").await;
    let next = org
        .without_user("1")
        .user("3", "ada")
        .without_group("g1")
        .group("g9", "ops")
        .member("g9", "2")
        .member("g9", "3");
    applied_with(&pool, &next, unlimited()).await;
    assert!(!can(&pool, "ada").await && !can(&pool, "bo").await);
    // Nor when the name is free for a while.
    applied(&pool, &next.clone().without_user("3").without_group("g9")).await;
    applied(&pool, &next).await;
    assert!(!can(&pool, "ada").await && !can(&pool, "bo").await);
}

#[tokio::test]
async fn restored_user_and_group_have_their_grants_and_memberships_back() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("g1", "ops")
        .group("g2", "top")
        .group("g3", "all")
        .member("g1", "2")
        .nested("g2", "g1")
        .everyone("g3", "C1");
    applied(&pool, &org).await;
    grant_to_user(&pool, "ada").await;
    grant_to_group(&pool, "top").await;
    let rows = "select string_agg(concat(user_id, ' ', external_id), ',' order by user_id) from authz.users";
    let (users, revoked) = (text(&pool, rows).await, org.clone().without_user("1").without_group("g1"));
    applied_with(&pool, &revoked, unlimited()).await;
    assert!(!can(&pool, "ada").await && !can(&pool, "bo").await);
    let restored = applied(&pool, &org).await.counts;
    assert_eq!((restored.users.added, restored.groups.added, restored.memberships.added), (1, 1, 2));
    assert!(can(&pool, "ada").await && can(&pool, "bo").await);
    assert_eq!(text(&pool, rows).await, users);
}

#[tokio::test]
async fn restored_user_whose_name_is_taken_stays_deleted_and_is_reported() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "ada");
    applied(&pool, &org).await;
    grant_to_user(&pool, "ada").await;
    applied(&pool, &org.clone().without_user("1").user("2", "bo")).await;
    execute(&pool, "insert into authz.users (user_name) values ('ada@example.com')").await;
    let report = sync(&pool, MAIN, &org.clone().user("2", "bo")).await;
    assert_eq!(report.status, Status::Unchanged, "{report}");
    assert_eq!(conflicts(&report)[0].1, "1");
    assert!(!can(&pool, "ada").await, "the local user has no grant");
}

/// A local user `ada`, a local group `ops` with `ada` in it and the action granted to the group.
async fn local_world(pool: &PgPool) {
    execute(
        pool,
        "insert into authz.users (user_name, display_name) values ('ada@example.com', 'by hand');
         insert into authz.groups (group_name, description) values ('ops@example.com', 'by hand');
         insert into authz.group_users (group_id, user_id)
             select group_id, user_id from authz.groups g, authz.users u where g.directory_id = 0 and u.directory_id = 0;",
    )
    .await;
    grant_to_group(pool, "ops").await;
}

const LOCAL_ROWS: &str = "select concat(
    (select string_agg(concat(ctid, xmin, u), ' ' order by user_id) from authz.users u where directory_id = 0),
    (select string_agg(concat(ctid, xmin, g), ' ' order by group_id) from authz.groups g where directory_id = 0),
    (select string_agg(concat(m.ctid, m.xmin, m), ' ' order by m.user_id)
     from authz.group_users m join authz.groups using (group_id) where directory_id = 0))";

#[tokio::test]
async fn name_of_a_local_row_is_a_conflict_and_the_rest_goes_on() {
    let (_database, pool) = database().await;
    local_world(&pool).await;
    let local = text(&pool, LOCAL_ROWS).await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("g1", "ops")
        .group("g2", "web")
        .member("g1", "2")
        .member("g2", "1")
        .member("g2", "2")
        .nested("g2", "g1");
    let report = sync(&pool, MAIN, &org).await;
    assert_eq!((report.status, report.exit_code()), (Status::Applied, 0), "{report}");
    let found: Vec<_> = conflicts(&report).iter().map(|c| (c.0, c.1, c.2)).collect();
    assert_eq!(found, [("group", "g1", "ops@example.com"), ("user", "1", "ada@example.com")]);
    assert!(conflicts(&report).iter().all(|c| c.3.contains("--adopt-local")), "{report}");
    assert!(report.to_string().contains("ada@example.com"), "{report}");

    let rest = org.clone().without_user("1").without_group("g1");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&rest.json(), false));
    assert_eq!(text(&pool, LOCAL_ROWS).await, local);
    assert!(can(&pool, "ada").await && !can(&pool, "bo").await);
    let again = sync(&pool, MAIN, &org).await;
    assert_eq!((again.status, conflicts(&again).len()), (Status::Unchanged, 2));
}

#[tokio::test]
async fn adopted_local_rows_keep_their_grants_and_are_the_directorys_from_then_on() {
    let (_database, pool) = database().await;
    local_world(&pool).await;
    grant_to_user(&pool, "ada").await;
    let org = Org::new("C1").user("1", "ada").user("2", "bo").group("g1", "ops").member("g1", "2");
    let report = sync_with(&pool, MAIN, &org, adopt_local()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(conflicts(&report), []);
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), false));
    assert!(can(&pool, "ada").await, "by the grant of its own");
    assert!(can(&pool, "bo").await, "by the grant of the group");
    assert_eq!(number(&pool, "select count(*) from authz.users").await, 2);
    assert_eq!(number(&pool, "select count(*) from authz.groups").await, 1);

    let before = written_rows(&pool).await;
    assert_eq!(sync_with(&pool, MAIN, &org, adopt_local()).await.status, Status::Unchanged);
    assert_eq!(sync(&pool, MAIN, &org).await.status, Status::Unchanged);
    assert_eq!(written_rows(&pool).await, before);
    applied(&pool, &org.without_user("1")).await;
    assert!(!can(&pool, "ada").await);
}

#[tokio::test]
async fn rename_onto_a_local_name_waits_but_a_suspension_does_not() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "eve").group("g1", "web").member("g1", "1");
    applied(&pool, &org).await;
    local_world(&pool).await;
    grant_to_user(&pool, "eve").await;
    let local = text(&pool, LOCAL_ROWS).await;
    assert!(can(&pool, "eve").await);
    let next = org.clone().rename_user("1", "ada").set_user("1", "suspended", true).rename_group("g1", "ops");
    let report = sync(&pool, MAIN, &next).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(conflicts(&report).len(), 2);
    let kept = org.set_user("1", "suspended", true);
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&kept.json(), false));
    assert!(!can(&pool, "eve").await);
    assert_eq!(text(&pool, LOCAL_ROWS).await, local);
    assert!(can(&pool, "ada").await, "the local user is not the suspended one");
    // The local rows make way: now the names move.
    execute(
        &pool,
        "delete from authz.group_users m using authz.groups g where m.group_id = g.group_id and directory_id = 0;
         update authz.users set status = 'deleted' where directory_id = 0;
         update authz.groups set status = 'deleted' where directory_id = 0;",
    )
    .await;
    applied(&pool, &next).await;
}

#[tokio::test]
async fn name_that_a_blocked_rename_does_not_free_is_a_conflict_too() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "a").user("2", "b").group("g1", "x").group("g2", "y");
    applied(&pool, &org).await;
    execute(
        &pool,
        "insert into authz.users (user_name) values ('held@example.com');
         insert into authz.groups (group_name) values ('held@example.com');",
    )
    .await;
    let chain = org
        .clone()
        .rename_user("1", "held")
        .rename_user("2", "a")
        .user("3", "b")
        .user("4", "free")
        .rename_group("g1", "held")
        .rename_group("g2", "x")
        .group("g3", "y")
        .group("g4", "free");
    let report = sync(&pool, MAIN, &chain).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    let mut found: Vec<_> = conflicts(&report).iter().map(|c| c.1).collect();
    found.sort_unstable();
    assert_eq!(found, ["1", "2", "3", "g1", "g2", "g3"]);
    let rest = org.user("4", "free").group("g4", "free");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&rest.json(), false));
    // Names that have to stay are no changes.
    let before = written_rows(&pool).await;
    let again = sync(&pool, MAIN, &chain).await;
    assert_eq!((again.status, conflicts(&again).len()), (Status::Unchanged, 6), "{again}");
    assert_eq!(written_rows(&pool).await, before);
}

#[tokio::test]
async fn directory_user_put_in_a_local_group_by_hand_stays_there() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "eve")
        .user("2", "bo")
        .group("g1", "web")
        .member("g1", "1")
        .member("g1", "2");
    applied(&pool, &org).await;
    local_world(&pool).await;
    execute(
        &pool,
        "insert into authz.group_users (group_id, user_id)
             select group_id, user_id from authz.groups, authz.users
             where group_name = 'ops@example.com' and user_name = 'eve@example.com';
         insert into authz.group_groups
             select p.group_id, c.group_id from authz.groups p, authz.groups c
             where p.group_name = 'ops@example.com' and c.group_name = 'web@example.com';",
    )
    .await;
    let local = text(&pool, LOCAL_ROWS).await;
    assert!(can(&pool, "eve").await && can(&pool, "bo").await);
    assert_eq!(sync(&pool, MAIN, &org).await.status, Status::Unchanged);
    applied(&pool, &org.clone().without_member("g1", "1").rename_user("2", "bob")).await;
    assert_eq!(text(&pool, LOCAL_ROWS).await, local);
    assert!(can(&pool, "eve").await && can(&pool, "bob").await);
    // A removed user is denied, and is where it was when it comes back.
    applied(&pool, &org.clone().without_user("1")).await;
    assert!(!can(&pool, "eve").await);
    applied(&pool, &org.without_member("g1", "1")).await;
    assert!(can(&pool, "eve").await);
    assert_eq!(text(&pool, LOCAL_ROWS).await, local);
}

#[tokio::test]
async fn address_that_cannot_be_a_name_keeps_the_row_and_its_name() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "ada").group("g1", "ops").member("g1", "1");
    applied(&pool, &org).await;
    grant_to_group(&pool, "ops").await;
    let odd = org
        .clone()
        .rename_user("1", "ada l@example.com")
        .set_user("1", "suspended", true)
        .rename_group("g1", "o ps@example.com")
        .user("2", "new one@example.com")
        .group("g2", "new one@example.com")
        .user("3", "bo")
        .member("g1", "3")
        .member("g1", "2");
    let report = sync(&pool, MAIN, &odd).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    let found: Vec<_> = conflicts(&report).iter().map(|c| (c.0, c.1, c.3)).collect();
    let reason = "its address cannot be a name";
    assert_eq!(
        found,
        [("group", "g2", reason), ("group", "g1", reason), ("user", "2", reason), ("user", "1", reason)]
    );
    let kept = org.set_user("1", "suspended", true).user("3", "bo").member("g1", "3");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&kept.json(), false));
    assert!(!can(&pool, "ada").await && can(&pool, "bo").await);
    let again = sync(&pool, MAIN, &odd).await;
    assert_eq!((again.status, conflicts(&again).len()), (Status::Unchanged, 4));
}

#[tokio::test]
async fn addresses_are_compared_without_regard_to_case() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "Ada@Example.COM").group("g1", "OPS@example.com").member("g1", "1");
    applied(&pool, &org).await;
    let lower = org.rename_user("1", "ada").rename_group("g1", "ops");
    assert_eq!(sync_with(&pool, MAIN, &lower, Options::default()).await.status, Status::Unchanged);
}
