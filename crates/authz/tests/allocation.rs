//! A check of the snapshot allocates nothing. Alone in its file, since it counts what the whole process allocates.

#![allow(unsafe_code, reason = "an allocator that counts cannot be had otherwise")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use authz::Snapshot;
use support::{action, user};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[tokio::test]
async fn a_check_allocates_nothing() {
    let (_database, pool) = support::database().await;
    sqlx::raw_sql(
        "insert into authz.actions values ('a.b'), ('a.c');
         insert into authz.users (user_id, user_name, status) values (1, 'ada', 'active'), (2, 'bob', 'suspended');
         insert into authz.groups (group_id, group_name) values (1, 'ops');
         insert into authz.group_users values (1, 1);
         insert into authz.group_actions (group_id, action_name, expires_at) values
             (1, 'a.b', null), (1, 'a.c', now() + interval '1 hour')",
    )
    .execute(&pool)
    .await
    .unwrap();
    let snapshot = Snapshot::options().start(pool.clone()).await.unwrap();
    let users = ["ada", "bob", "eve"].map(user);
    let actions = ["a.b", "a.c", "no.such"].map(action);
    // What a thread sets up once, it may.
    let _ = snapshot.check(&users[0], &actions[0]).unwrap();
    let before = ALLOCATIONS.get();
    for user in &users {
        for action in &actions {
            let _ = std::hint::black_box(snapshot.check(user, action)).unwrap();
        }
    }
    assert_eq!(ALLOCATIONS.get(), before);
    assert!(ALLOCATIONS.get() > 0, "the allocator counts");
}
