//! Every step on the way into the directory tried by itself, so that the first that fails is known by its name.

use std::time::Duration;

use super::auth::SignIn;
use super::{GROUP_SCOPE, GoogleConfig, GoogleSource, RetryPolicy, USER_SCOPE, connector};
use crate::doctor::Step;
use crate::source::{Source, SourceError};

/// A person waits for the answer.
const WITHIN: Duration = Duration::from_secs(15);

/// Signs in and lists a page of users and one of groups, step by step.
pub(crate) async fn probe(mut config: GoogleConfig) -> Vec<Step> {
    config.request_timeout = WITHIN;
    config.retry = RetryPolicy {
        attempts: 2,
        rate_limited_attempts: 2,
        total: WITHIN,
        base_delay: Duration::from_millis(250),
        ..config.retry
    };
    let mut steps = Vec::new();
    let sign_in = match prepared(&config).await {
        Ok(sign_in) => {
            steps.push(Step::passed("credentials", sign_in.describe()));
            sign_in
        }
        Err(error) => {
            steps.push(Step::failed("credentials", &error));
            return steps;
        }
    };
    if sign_in.is_keyless() {
        if !step(&mut steps, "identity", sign_in.try_own_token().await) {
            return steps;
        }
        if !step(&mut steps, "signature", sign_in.try_signature().await) {
            return steps;
        }
    }
    let mut may = true;
    for (name, scope) in [("scope for users", USER_SCOPE), ("scope for groups", GROUP_SCOPE)] {
        let asked = sign_in.try_scope(scope).await.map(|()| format!("there is a token for {scope}"));
        let asked = asked.map_err(|error| SourceError::Credentials {
            message: format!("no token for {scope}"),
            cause: Some(error.into()),
        });
        may &= step(&mut steps, name, asked);
    }
    if !may {
        return steps;
    }
    let source = match GoogleSource::signed_in(config, sign_in) {
        Ok(source) => source,
        Err(error) => {
            steps.push(Step::failed("API", &error));
            return steps;
        }
    };
    let users = source.users(None).await;
    step(&mut steps, "list users", users.map(|page| format!("{} on the first page", page.items.len())));
    let groups = source.groups(None).await;
    step(&mut steps, "list groups", groups.map(|page| format!("{} on the first page", page.items.len())));
    steps
}

async fn prepared(config: &GoogleConfig) -> Result<SignIn, SourceError> {
    SignIn::new(config, connector()?).await
}

/// Notes how a step went; says whether well.
fn step(steps: &mut Vec<Step>, name: &'static str, outcome: Result<String, SourceError>) -> bool {
    let passed = outcome.is_ok();
    steps.push(match outcome {
        Ok(found) => Step::passed(name, found),
        Err(error) => Step::failed(name, &error),
    });
    passed
}
