//! A check allocates nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]
#![allow(unsafe_code, reason = "an allocator that counts is the only way to see allocations")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use authz::Snapshot;

use self::support::{action, database, user};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[tokio::test]
async fn check_allocates_nothing() {
    let (_database, pool) = database().await;
    sqlx::raw_sql(
        "insert into authz.actions values ('a'), ('b'), ('c');
         insert into authz.users (user_id, user_name, external_id, status)
             values (1, 'ada', 'sub-ada', 'active'), (2, 'bob', 'sub-bob', 'suspended');
         insert into authz.groups (group_id, group_name) values (1, 'g');
         insert into authz.group_users (group_id, user_id) values (1, 1);
         insert into authz.group_actions (group_id, action_name, expires_at)
             values (1, 'a', null), (1, 'b', now() + interval '1 day'), (1, 'c', now() - interval '1 day')",
    )
    .execute(&pool)
    .await
    .unwrap();
    let snapshot = Snapshot::options().by_sub(true).start(pool).await.unwrap();
    let names = ["ada", "bob", "nobody"].map(user);
    let actions = ["a", "b", "c"].map(action);
    let sub = authz::Sub::parse("sub-ada").unwrap();
    let ask = || {
        let by_name = names.iter().flat_map(|name| actions.iter().map(move |action| (name, action)));
        let by_name =
            by_name.filter(|(name, action)| snapshot.check(name, action).unwrap().is_allow()).count();
        let by_sub = actions.iter().filter(|action| snapshot.check_sub(&sub, action).unwrap().is_allow());
        (by_name, by_sub.count())
    };
    assert_eq!(ask(), (2, 2)); // the thread sees the state for the first time
    let before = ALLOCATIONS.with(Cell::get);
    assert_eq!(ask(), (2, 2));
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0);
    drop(Box::new(1));
    assert!(ALLOCATIONS.with(Cell::get) > before, "the counter counts");
}
