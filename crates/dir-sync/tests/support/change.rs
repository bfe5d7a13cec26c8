//! A directory that changes step by step, a little each time.

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

use super::Org;

/// With users and groups that come and go in [`changed`].
pub(crate) fn with_changing_parts(mut org: Org) -> Org {
    for n in 0..8 {
        org = org.user(&format!("u{n}"), &format!("u{n}"));
    }
    for n in 0..5 {
        org = org.group(&format!("g{n}"), &format!("g{n}"));
    }
    org
}

/// One small change, so that most listings stay as they were.
pub(crate) fn changed(org: Org, random: &mut SmallRng) -> Org {
    let json = org.json();
    let ids = |kind: &str| -> Vec<String> {
        json[kind].as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect()
    };
    let (users, groups) = (ids("users"), ids("groups"));
    let group = groups.choose(random).unwrap().clone();
    let members: Vec<String> = json["members"][&group]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap().to_owned())
        .collect();
    let number = random.random_range(0..8);
    let (user, other) = (format!("u{number}"), format!("g{number}"));
    let is_member = |id: &str| members.iter().any(|member| member == id);
    match random.random_range(0..9) {
        0 if users.contains(&user) => org.unlisted_user(&user),
        0 => org.user(&user, &user),
        1 if users.contains(&user) => org.without_user(&user),
        1 => org.user(&user, &format!("{user}-{}", random.random_range(0..3))),
        2 | 3 if is_member(&user) => org.without_member(&group, &user),
        2 if users.contains(&user) => org.member(&group, &user),
        2 | 3 => org.external(&group, &user, &user),
        4 if users.contains(&user) => {
            org.rename_user(&user, &format!("{user}-{}", random.random_range(0..3)))
        }
        5 if groups.contains(&other) && groups.len() > 2 => org.without_group(&other),
        5 => org.group(&other, &other),
        6 if is_member(&other) => org.without_member(&group, &other),
        6 if groups.contains(&other) && other != group => org.nested(&group, &other),
        7 if is_member("C1") => org.without_member(&group, "C1"),
        7 => org.everyone(&group, "C1"),
        8 if users.contains(&user) => org.set_user(&user, "suspended", random.random_bool(0.5)),
        _ => org,
    }
}
