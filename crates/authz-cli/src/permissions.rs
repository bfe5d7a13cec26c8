//! The everyday commands: checks, grants, actions, users and groups.

use authz::grant::{self, Grant, StandingGrant};
use authz::group::{self, Role};
use authz::{Revision, action, actions_of, check, explain, user, users_who_can};
use chrono::SecondsFormat;
use serde_json::{Value, json};

use crate::answer::{Answer, Failure};
use crate::cli::{Actions, Command, Groups, Holder, Member, Page, Place, Users};

pub(crate) async fn run(place: &Place, command: Command) -> Result<Answer, Failure> {
    let pool = place.connect().await?;
    match command {
        Command::Can { user, action } => {
            let decision = check(&pool, &user, &action).await?;
            Ok(Answer::new(decision.to_string(), json!(decision)).yes_if(decision.is_allow()))
        }
        Command::Explain { user, action } => {
            let explanation = explain(&pool, &user, &action).await?;
            let mut lines = vec![explanation.decision.to_string()];
            lines.extend(
                explanation
                    .paths
                    .iter()
                    .map(|path| format!("path: {path}, by {}: {}", path.granted_by, path.reason)),
            );
            lines.extend(explanation.expired.iter().map(|path| format!("ended: {path}")));
            lines.extend(explanation.missing.required.iter().map(|fact| format!("missing: {fact}")));
            lines.extend(explanation.missing.one_of.iter().map(|fact| format!("missing, one of: {fact}")));
            let allow = explanation.decision.is_allow();
            Ok(Answer::lines(lines, json!(explanation)).yes_if(allow))
        }
        Command::WhoCan { action, page } => {
            let after = page.after.map(|name| name.parse()).transpose().map_err(authz::Error::Name)?;
            let found = users_who_can(&pool, &action, after.as_ref(), page.limit).await?;
            let mut lines: Vec<String> = found.users.iter().map(ToString::to_string).collect();
            lines.extend(found.next.as_ref().map(|next| format!("… more with --after {next}")));
            Ok(Answer::lines(lines, json!(found)))
        }
        Command::Grant { holder, action, reason, until } => {
            let actor = place.actor()?;
            let mut grant = Grant::new(action, reason);
            if let Some(until) = until {
                grant = grant.until(until);
                if grant.has_ended(&pool).await? {
                    let until = until.to_rfc3339_opts(SecondsFormat::AutoSi, true);
                    return Err(Failure::usage(&format!(
                        "--until {until} is in the past; give a time to come, or leave it out for a grant without an end"
                    )));
                }
            }
            let revision = match &holder {
                Holder::User(name) => grant::to_user(&pool, name, &grant, &actor).await?,
                Holder::Group(name) => grant::to_group(&pool, name, &grant, &actor).await?,
            };
            Ok(changed("granted", revision))
        }
        Command::Revoke { holder, action } => {
            let actor = place.actor()?;
            let revision = match &holder {
                Holder::User(name) => grant::revoke_from_user(&pool, name, &action, &actor).await?,
                Holder::Group(name) => grant::revoke_from_group(&pool, name, &action, &actor).await?,
            };
            Ok(changed("revoked", revision))
        }
        Command::Actions(command) => actions(place, &pool, command).await,
        Command::Users(command) => users(place, &pool, command).await,
        Command::Groups(command) => groups(place, &pool, command).await,
        Command::Migrate | Command::Verify(_) | Command::Audit(_) => {
            Err(Failure::usage("this command is not one about permissions"))
        }
    }
}

fn changed(what: &str, revision: Revision) -> Answer {
    Answer::new(format!("{what}; revision {revision}"), json!({ "done": what, "revision": revision }))
}

async fn actions(place: &Place, pool: &sqlx::PgPool, command: Actions) -> Result<Answer, Failure> {
    match command {
        Actions::List { of: Some(user) } => {
            let names = actions_of(pool, &user).await?;
            Ok(Answer::lines(names.iter().map(ToString::to_string), json!({ "actions": names })))
        }
        Actions::List { of: None } => {
            let all = action::list(pool).await?;
            let json: Vec<Value> = all
                .iter()
                .map(|action| json!({ "name": action.name, "description": action.description }))
                .collect();
            let lines = all
                .iter()
                .map(|action| format!("{}\t{}", action.name, action.description).trim_end().to_owned());
            Ok(Answer::lines(lines, json!({ "actions": json })))
        }
        Actions::Register { action, description } => Ok(changed(
            "registered",
            action::register(pool, &[(action, &description)], &place.actor()?).await?,
        )),
        Actions::Unregister { action } => {
            Ok(changed("unregistered", action::unregister(pool, &action, &place.actor()?).await?))
        }
    }
}

async fn users(place: &Place, pool: &sqlx::PgPool, command: Users) -> Result<Answer, Failure> {
    let revision = match command {
        Users::List(Page { after, limit }) => {
            let after = after.map(|name| name.parse()).transpose().map_err(authz::Error::Name)?;
            let all = user::list(pool, after.as_ref(), limit).await?;
            let lines =
                all.iter().map(|user| format!("{}\t{}\t{}", user.name, status(user), directory(user)));
            return Ok(Answer::lines(
                lines,
                json!({ "users": all.iter().map(user_json).collect::<Vec<_>>() }),
            ));
        }
        Users::Show { user } => {
            let Some(found) = user::find(pool, &user).await? else {
                return Err(authz::Error::UnknownUser(user).into());
            };
            let grants = grant::of_user(pool, &user).await?;
            let actions = actions_of(pool, &user).await?;
            let mut lines = vec![format!("{}\t{}\t{}", found.name, status(&found), directory(&found))];
            lines.extend(grants.iter().map(grant_line));
            lines.extend(actions.iter().map(|action| format!("may: {action}")));
            let mut json = user_json(&found);
            if let Some(fields) = json.as_object_mut() {
                fields.insert("grants".to_owned(), grants.iter().map(grant_json).collect());
                fields.insert("actions".to_owned(), json!(actions));
            }
            return Ok(Answer::lines(lines, json));
        }
        Users::Create { user, display_name } => {
            user::create(pool, &user, &display_name, &place.actor()?).await?
        }
        Users::Suspend { user } => user::set_suspended(pool, &user, true, &place.actor()?).await?,
        Users::Resume { user } => user::set_suspended(pool, &user, false, &place.actor()?).await?,
        Users::Delete { user } => user::delete(pool, &user, &place.actor()?).await?,
    };
    Ok(changed("done", revision))
}

async fn groups(place: &Place, pool: &sqlx::PgPool, command: Groups) -> Result<Answer, Failure> {
    let revision = match command {
        Groups::List(Page { after, limit }) => {
            let after = after.map(|name| name.parse()).transpose().map_err(authz::Error::Name)?;
            let all = group::list(pool, after.as_ref(), limit).await?;
            let lines =
                all.iter().map(|group| format!("{}\t{}\t{}", group.name, group.directory, group.description));
            return Ok(Answer::lines(
                lines,
                json!({ "groups": all.iter().map(group_json).collect::<Vec<_>>() }),
            ));
        }
        Groups::Show { group } => {
            let Some(found) = group::find(pool, &group).await? else {
                return Err(authz::Error::UnknownGroup(group).into());
            };
            let grants = grant::of_group(pool, &group).await?;
            let mut lines = vec![format!("{}\t{}\t{}", found.name, found.directory, found.description)];
            lines.extend(grants.iter().map(grant_line));
            let mut json = group_json(&found);
            if let Some(fields) = json.as_object_mut() {
                fields.insert("grants".to_owned(), grants.iter().map(grant_json).collect());
            }
            return Ok(Answer::lines(lines, json));
        }
        Groups::Create { group, description } => {
            group::create(pool, &group, &description, &place.actor()?).await?
        }
        Groups::Delete { group } => group::delete(pool, &group, &place.actor()?).await?,
        Groups::Add { group, member } => {
            let actor = place.actor()?;
            match member {
                Member::User(user) => group::add_user(pool, &group, &user, Role::Member, &actor).await?,
                Member::Group(child) => group::add_group(pool, &group, &child, &actor).await?,
                Member::Everyone(directory) => group::add_everyone(pool, &group, &directory, &actor).await?,
            }
        }
        Groups::Remove { group, member } => {
            let actor = place.actor()?;
            match member {
                Member::User(user) => group::remove_user(pool, &group, &user, &actor).await?,
                Member::Group(child) => group::remove_group(pool, &group, &child, &actor).await?,
                Member::Everyone(directory) => {
                    group::remove_everyone(pool, &group, &directory, &actor).await?
                }
            }
        }
    };
    Ok(changed("done", revision))
}

fn status(user: &user::User) -> String {
    json!(user.status).as_str().unwrap_or_default().to_owned()
}

fn directory(user: &user::User) -> &str {
    user.directory.as_ref().map_or("", |directory| directory.as_str())
}

fn user_json(user: &user::User) -> Value {
    json!({
        "name": user.name, "status": user.status, "directory": user.directory, "external_id": user.external_id,
        "display_name": user.display_name,
    })
}

fn group_json(group: &group::Group) -> Value {
    json!({
        "name": group.name, "directory": group.directory, "external_id": group.external_id,
        "display_name": group.display_name, "description": group.description,
    })
}

fn grant_line(grant: &StandingGrant) -> String {
    let until = grant.expires_at.map(|until| format!(" until {}", until.to_rfc3339())).unwrap_or_default();
    format!("granted: {}{until}, by {}: {}", grant.pattern, grant.granted_by, grant.reason)
}

fn grant_json(grant: &StandingGrant) -> Value {
    json!({
        "pattern": grant.pattern, "granted_by": grant.granted_by, "granted_at": grant.granted_at,
        "expires_at": grant.expires_at, "reason": grant.reason,
    })
}
