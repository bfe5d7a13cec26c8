//! Users are found under their keys and no others, whatever was changed.

use std::collections::{BTreeMap, HashSet};

use super::*;

fn new(user_id: i64, key: &str, nodes: &[u32]) -> NewUser {
    let name = format!("name of {user_id}");
    NewUser { id: user_id, suspended: user_id % 3 == 0, key: key.into(), name, nodes: nodes.into() }
}

fn built_as(nodes_are: Nodes, users: &[NewUser]) -> Users {
    built_by(3, nodes_are, users)
}

fn built_by(parts: usize, nodes_are: Nodes, users: &[NewUser]) -> Users {
    let mut builders = Builder::parts(users.len() / 3, nodes_are, parts);
    for user in users {
        assert_eq!(builders.iter().filter(|builder| builder.takes(&user.key)).count(), 1);
        for builder in &mut builders {
            builder.push(user.id, user.suspended, &user.key, &user.name, &user.nodes).unwrap();
        }
    }
    Users::of(builders.into_iter().map(|builder| builder.finish().unwrap()).collect()).unwrap()
}

fn built(users: &[NewUser]) -> Users {
    built_as(Nodes::Listed, users)
}

fn all(users: &Users) -> BTreeMap<Vec<u8>, (i64, bool, Vec<u32>)> {
    let found = users.shards.iter().flat_map(|shard| entries(shard, users.nodes_are));
    found.map(|(u, _)| (u.key.to_vec(), (u.id, u.suspended, u.words.to_vec()))).collect()
}

#[test]
fn every_key_is_found_and_no_other() {
    for count in [0, 1, 2, 3, 500, 5_000] {
        let list: Vec<_> = (0_u32..count)
            .map(|n| {
                let key = format!("u{n}{}", "x".repeat(n as usize % 300));
                new(i64::from(n) << 33 | i64::from(n), &key, &[n, 7 + n])
            })
            .collect();
        let users = built(&list);
        for user in &list {
            let found = users.get(Key::of_bytes(&user.key)).unwrap();
            assert_eq!((found.id, found.suspended, found.words), (user.id, user.suspended, &*user.nodes));
        }
        assert!((0..1_000).all(|n| users.get(Key::of_bytes(format!("v{n}").as_bytes())).is_none()));
        assert_eq!((users.count, users.memberships), (list.len(), 2 * list.len()));
    }
}

#[test]
fn parts_are_the_whole() {
    let list: Vec<_> = (0_u32..5_000).map(|n| new(n.into(), &format!("u{n}"), &[n, 7 + n])).collect();
    let whole = built_by(1, Nodes::Short, &list);
    for parts in [0, 2, 3, 4, 5, 100] {
        let users = built_by(parts, Nodes::Short, &list);
        assert_eq!(all(&users), all(&whole));
        let totals = |users: &Users| (users.count, users.memberships, users.bytes, users.shards.len());
        assert_eq!(totals(&users), totals(&whole), "{parts}");
        assert!(list.iter().all(|user| users.get(Key::of_bytes(&user.key)).is_some()));
    }
    assert!(Users::of(Vec::new()).is_err());
}

#[test]
fn replaced_users_are_found_under_the_new_key_alone() {
    for nodes_are in [Nodes::Listed, Nodes::Short, Nodes::Few] {
        replaced_users_are_found(nodes_are);
    }
}

fn replaced_users_are_found(nodes_are: Nodes) {
    let list: Vec<_> = (0..2_000).map(|n| new(n, &format!("u{n}"), &[1, 2])).collect();
    let users = built_as(nodes_are, &list);
    // 1 and 2 swap, 3 goes, 4 is renamed, 5 changes, 5000 is new.
    let ids = HashSet::from([1, 2, 3, 4, 5, 5000]);
    let added = [
        new(1, "u2", &[1]),
        new(2, "u1", &[]),
        new(4, "four", &[9]),
        new(5, "u5", &[3]),
        new(5000, "n", &[]),
    ];
    let replaced = users.replace(&ids, true, &added).unwrap();
    let mut wanted: Vec<_> = list.iter().filter(|u| !ids.contains(&u.id)).cloned().collect();
    wanted.extend(added);
    let wanted = built_as(nodes_are, &wanted);
    assert_eq!(all(&replaced), all(&wanted));
    assert!(replaced.get(Key::of_bytes(b"u4")).is_none() && replaced.get(Key::of_bytes(b"u3")).is_none());
    assert_eq!((replaced.count, replaced.memberships), (wanted.count, wanted.memberships));
    let bytes: usize = replaced.shards.iter().map(|s| bytes_of(s) + size_of::<Shard>()).sum();
    assert_eq!(replaced.bytes, bytes);
}

#[test]
fn few_nodes_are_held_as_a_set() {
    let list: Vec<_> =
        (0..500_u32).map(|n| new(n.into(), &format!("u{n}"), &[n % 127, 128 + n % 127])).collect();
    let users = built_as(Nodes::Few, &list);
    assert_eq!((users.count, users.memberships), (500, 1_000));
    let row = Row::new([(5, row::NEVER), (200, row::NEVER)].into_iter());
    for user in &list {
        let reached = users.reach(users.get(Key::of_bytes(&user.key)).unwrap(), &row);
        assert_eq!(reached == Reach::Always, user.nodes.contains(&5) || user.nodes.contains(&200));
    }
    // One node too many.
    assert!(users.replace(&HashSet::from([9]), false, &[new(9, "u9", &[255])]).is_err());
    let mut builder = Builder::parts(1, Nodes::Few, 1).remove(0);
    assert!(builder.push(1, false, b"a", "a", &[255]).is_err());
    for count in (0..600).chain((0..200_000).step_by(1_000)) {
        assert!(Nodes::of(count).hold(count), "{count}");
    }
    assert!(Nodes::Few.hold(FEW_NODES) && !Nodes::Few.hold(FEW_NODES + 1));
}

#[test]
fn short_nodes_are_those_of_the_list() {
    let list: Vec<_> = (0..500_u32)
        .map(|n| new(n.into(), &format!("u{n}"), &(0..n % 9).map(|node| node * 8_191).collect::<Vec<_>>()))
        .collect();
    let users = built_as(Nodes::Short, &list);
    assert_eq!(users.memberships, list.iter().map(|user| user.nodes.len()).sum::<usize>());
    for node in (0..9).map(|node| node * 8_191) {
        for end in [row::NEVER, 7] {
            let row = Row::new([(node, end)].into_iter());
            for user in &list {
                let reached = users.reach(users.get(Key::of_bytes(&user.key)).unwrap(), &row);
                assert_eq!(reached, row.reach(&user.nodes), "{node} {user:?}");
            }
        }
    }
    // One node too many.
    assert!(users.replace(&HashSet::from([9]), false, &[new(9, "u9", &[65_536])]).is_err());
    assert!(Nodes::Short.hold(65_536) && !Nodes::Short.hold(65_537));
}

/// Sixteen bits say where an entry lies, whatever the entries of a shard take.
#[test]
fn entries_of_any_size_are_found() {
    let nodes: Vec<u32> = (0..60_000).collect();
    let list: Vec<_> = (0_i64..)
        .zip(0..200)
        .map(|(id, n)| new(id, &format!("u{id}"), nodes.get(..300 * n).unwrap()))
        .collect();
    for nodes_are in [Nodes::Listed, Nodes::Short] {
        let mut users = built_as(nodes_are, &list);
        for round in 0..2 {
            assert!(users.shards.iter().any(|shard| shard.unit > 0), "an entry past 65,535 words");
            for user in &list {
                let found = users.get(Key::of_bytes(&user.key)).unwrap();
                assert_eq!(
                    (found.id, found.suspended, found.nodes),
                    (user.id, user.suspended, user.nodes.len())
                );
            }
            assert!((200..400).all(|n| users.get(Key::of_bytes(format!("u{n}").as_bytes())).is_none()));
            assert_eq!(all(&users), all(&built_as(nodes_are, &list)), "{round}");
            users = users.replace(&HashSet::from([100]), true, &list[100..101]).unwrap();
        }
    }
}

/// Users come one after another to what was loaded without any.
#[test]
fn growth_that_a_full_load_has_to_take_is_noticed() {
    let mut users = built(&[]);
    let most = (0..).step_by(1_000).find(|first| {
        let added: Vec<_> = (*first..first + 1_000).map(|n| new(n, &format!("u{n}"), &[1, 2])).collect();
        match users.replace(&HashSet::new(), false, &added) {
            Ok(more) => users = more,
            Err(Unfit) => return true,
        }
        assert!(users.bytes < 200 * (users.count + 1_000), "{} bytes of {} users", users.bytes, users.count);
        false
    });
    assert!((4_000..16_000).contains(&most.unwrap()), "{most:?}");
}

#[test]
fn sub_of_a_user_in_many_groups_is_found() {
    let nodes: Vec<u32> = (0..5_000).collect();
    let list: Vec<_> = (0..60)
        .flat_map(|id| {
            let sub = NewUser { key: sub_key(&format!("s{id}")), ..new(id, "", &nodes) };
            [new(id, &format!("u{id}"), &nodes), sub]
        })
        .collect();
    for nodes_are in [Nodes::Listed, Nodes::Short] {
        let users = built_as(nodes_are, &list);
        assert!(users.shards.iter().any(|shard| shard.unit > 0));
        let users = users.replace(&HashSet::from([7]), true, &list[14..16]).unwrap();
        for user in &list {
            assert_eq!(users.get(Key::of_bytes(&user.key)).unwrap().id, user.id);
            let named = users.name_of(Key::of_bytes(&user.key)).map(|name| name.to_string());
            assert_eq!(named, (user.key[0] == ALIAS).then(|| user.name.clone()));
        }
        assert_eq!((users.count, users.memberships), (60, 300_000));
    }
}

#[test]
fn one_key_for_two_users_is_noticed() {
    let users = built(&[new(1, "a", &[])]);
    assert!(users.replace(&HashSet::from([2]), false, &[new(2, "a", &[])]).is_err());
}

#[test]
fn what_does_not_fit_is_refused() {
    assert!(fits(&[b'a'; 2_047], &[]).is_ok());
    assert!(fits(&[b'a'; 2_048], &[]).is_err());
    assert!(fits(b"a", &vec![0; 1 << 20]).is_err());
}

#[test]
fn sub_is_an_alias_and_not_a_user() {
    let given = ["", "a", "ab", "abcd", "ada@example.com"];
    let alias = |id: i64, name: &str| NewUser { name: name.to_owned(), ..new(id, "", &[1, 2]) };
    let list: Vec<_> = (0_i64..)
        .zip(given.iter().cycle())
        .take(600)
        .flat_map(|(id, name)| {
            let sub = NewUser { key: sub_key(&format!("s{id}")), ..alias(id, name) };
            [new(id, &format!("s{id}"), &[1, 2]), sub]
        })
        .collect();
    let users = built(&list);
    assert_eq!((users.count, users.memberships), (600, 1_200));
    for user in &list {
        assert_eq!(users.get(Key::of_bytes(&user.key)).unwrap().id, user.id);
        let named = users.name_of(Key::of_bytes(&user.key)).map(|name| name.to_string());
        assert_eq!(named, (user.key[0] == ALIAS).then(|| user.name.clone()));
    }
    // Renamed: the other entries of the shards stay what they are.
    let renamed = NewUser { key: sub_key("s7"), ..alias(7, "someone.else@example.com") };
    let users = users.replace(&HashSet::from([7]), true, &[renamed]).unwrap();
    assert_eq!(users.name_of(Key::of_bytes(&sub_key("s7"))).unwrap().as_str(), "someone.else@example.com");
    for user in list.iter().filter(|user| user.id != 7) {
        assert_eq!(users.get(Key::of_bytes(&user.key)).unwrap().id, user.id);
        assert_eq!(users.name_of(Key::of_bytes(&user.key)).is_some(), user.key[0] == ALIAS);
    }
    assert!(users.get(Key::of_bytes(b"s7")).is_none());
}
