//! The lists: what a user may do, and who may do an action.

use sqlx::PgExecutor;

use crate::error::Error;
use crate::name::{ActionName, UserKey, UserName};

/// Most users that [`users_who_can`] gives at once.
pub const PAGE_LIMIT: u32 = 1000;

/// The registered actions that `user` may do now, by name: exactly those that [`check`](crate::check()) allows.
/// None for a user who is unknown or suspended.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn actions_of<'u>(
    executor: impl PgExecutor<'_>,
    user: impl Into<UserKey<'u>>,
) -> Result<Vec<ActionName>, Error> {
    let key = user.into();
    let names = sqlx::query_scalar!(
        r#"
        with subject as (
            select u.user_id, u.directory_id
            from authz.users u
            where (u.user_name = $1 or u.external_id = $2) and u.status in ('active', 'external')
        ),
        pattern as materialized (
            select ua.action_name
            from subject s
            join authz.user_actions ua on ua.user_id = s.user_id
            where ua.expires_at is null or ua.expires_at > statement_timestamp()
            union
            select ga.action_name
            from (
                select gu.group_id from subject s join authz.group_users gu on gu.user_id = s.user_id
                union all
                select gd.group_id from subject s join authz.group_directories gd on gd.directory_id = s.directory_id
            ) mine
            join authz.group_reach re on re.group_id = mine.group_id
            join authz.group_actions ga
                on ga.group_id = re.holder_id and ga.action_name = (re.action_name collate "default")
            join authz.groups g on g.group_id = re.holder_id and g.status = 'active'
            where ga.expires_at is null or ga.expires_at > statement_timestamp()
        )
        select a.action_name as "action_name!"
        from pattern p
        join authz.actions a on a.action_name = p.action_name
        union
        select a.action_name
        from pattern p
        join authz.actions a on starts_with(a.action_name, rtrim(p.action_name, '*'))
        where p.action_name like '%*'
        order by 1
        "#,
        key.name(),
        key.sub(),
    )
    .fetch_all(executor)
    .await?;
    Ok(names.into_iter().map(ActionName::stored).collect())
}

/// A page of users.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Page {
    /// The users, by name.
    pub users: Vec<UserName>,
    /// Where the next page begins: pass it as `after`. `None` on the last page.
    pub next: Option<UserName>,
}

/// The users who may do `action` now, by name: exactly those whom [`check`](crate::check()) allows.
///
/// Gives at most `limit` (1 to [`PAGE_LIMIT`]) names that come after `after`. Pages are told apart by name and not
/// by position, so a change between two pages neither skips nor repeats anybody whom it does not concern.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn users_who_can(
    executor: impl PgExecutor<'_>,
    action: &ActionName,
    after: Option<&UserName>,
    limit: u32,
) -> Result<Page, Error> {
    let limit = limit.clamp(1, PAGE_LIMIT);
    let names = sqlx::query_scalar!(
        r#"
        with entry as materialized (
            select distinct re.group_id
            from authz.group_actions ga
            join authz.groups g on g.group_id = ga.group_id and g.status = 'active'
            join authz.group_reach re on re.holder_id = ga.group_id and re.action_name = ga.action_name
            where ga.action_name = any ($2) and (ga.expires_at is null or ga.expires_at > statement_timestamp())
        ),
        allowed as (
            select gu.user_id from entry e join authz.group_users gu on gu.group_id = e.group_id
            union
            select u.user_id
            from entry e
            join authz.group_directories gd on gd.group_id = e.group_id
            join authz.users u on u.directory_id = gd.directory_id and u.status <> 'deleted'
            union
            select ua.user_id
            from authz.user_actions ua
            where ua.action_name = any ($2) and (ua.expires_at is null or ua.expires_at > statement_timestamp())
        )
        select u.user_name
        from allowed
        join authz.users u on u.user_id = allowed.user_id and u.status in ('active', 'external')
        where exists (select from authz.actions a where a.action_name = $1)
          and ($3::text is null or u.user_name > $3)
        order by u.user_name
        limit $4
        "#,
        action.as_str(),
        &action.covering(),
        after.map(UserName::as_str),
        i64::from(limit) + 1,
    )
    .fetch_all(executor)
    .await?;
    let mut users: Vec<UserName> = names.into_iter().map(UserName::stored).collect();
    let more = users.len() > limit as usize;
    users.truncate(limit as usize);
    let next = if more { users.last().cloned() } else { None };
    Ok(Page { users, next })
}
