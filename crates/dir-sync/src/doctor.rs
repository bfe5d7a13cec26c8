//! `dir-sync doctor`: each thing that a run needs, tried by itself, and where to set right what is missing.

use std::error::Error;
use std::fmt;

use authz::mirror::{Holder, freshness, holder, missing_privileges};
use authz::{SchemaState, schema_state};
use serde::Serialize;
use sqlx::PgPool;

use crate::cli::{Job, SourceChoice, read_file};
use crate::google::probe;
use crate::source::error_chain;

const DATABASE: &str = "database";
const LEASE: &str = "lease";

/// How one step went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Which one.
    pub step: &'static str,
    /// Whether it works.
    pub works: bool,
    /// What was found, or what is missing and where to set it right.
    pub says: String,
}

impl Step {
    pub(crate) fn passed(step: &'static str, says: impl Into<String>) -> Self {
        Self { step, works: true, says: says.into() }
    }

    pub(crate) fn failed(step: &'static str, error: &dyn Error) -> Self {
        Self { step, works: false, says: error_chain(error) }
    }

    fn lacking(step: &'static str, says: impl Into<String>) -> Self {
        Self { step, works: false, says: says.into() }
    }
}

/// All steps that could be tried. What depends on one that failed is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Examination {
    /// In the order of a run.
    pub steps: Vec<Step>,
}

impl Examination {
    /// Whether a run would have all that it needs.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.steps.iter().all(|step| step.works)
    }
}

impl fmt::Display for Examination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Step { step, works, says } in &self.steps {
            writeln!(f, "{}  {step:<17} {says}", if *works { "ok    " } else { "FAILED" })?;
        }
        Ok(())
    }
}

/// Tries what a run of this job needs. Changes nothing.
pub async fn examine(job: &Job) -> Examination {
    let mut steps = match &job.source {
        SourceChoice::Google => match job.google.config() {
            Ok(config) => probe(config).await,
            Err(error) => vec![Step::failed("credentials", &error)],
        },
        SourceChoice::File(path) => vec![match read_file(path.clone()).await {
            Ok(_) => Step::passed("file", "can be read"),
            Err(error) => Step::failed("file", &error),
        }],
    };
    match job.database.connect().await {
        Ok(pool) => {
            steps.push(writable(&pool).await.unwrap_or_else(|error| Step::failed(DATABASE, &error)));
            database(&pool, job, &mut steps).await;
        }
        Err(error) => steps.push(Step::failed(DATABASE, &error)),
    }
    Examination { steps }
}

/// Whether the server takes changes. This asks about the server; what asks about the tables is in `authz`.
async fn writable(pool: &PgPool) -> Result<Step, sqlx::Error> {
    let (standby, read_only): (bool, bool) =
        sqlx::query_as("select pg_is_in_recovery(), current_setting('transaction_read_only')::boolean")
            .fetch_one(pool)
            .await?;
    Ok(match (standby, read_only) {
        (true, _) => Step::lacking(
            DATABASE,
            "answers, but it is a hot standby, where nothing can be changed; name the primary in the database URL",
        ),
        (false, true) => Step::lacking(
            DATABASE,
            "answers, but its transactions are read-only (`default_transaction_read_only`), so that nothing can be changed; \
             name the primary in the database URL, or set that off for this role",
        ),
        (false, false) => Step::passed(DATABASE, "answers"),
    })
}

async fn database(pool: &PgPool, job: &Job, steps: &mut Vec<Step>) {
    const SCHEMA: &str = "tables";
    let well = match schema_state(pool).await {
        Ok(SchemaState::Current(version)) => Ok(Step::passed(SCHEMA, format!("are of version {version}"))),
        Ok(SchemaState::Missing) => Err(Step::lacking(SCHEMA, "are missing; run `dir-sync migrate`")),
        Ok(SchemaState::Behind { found, wanted }) => Err(Step::lacking(
            SCHEMA,
            format!("are of version {found}, this program needs {wanted}; run `dir-sync migrate`"),
        )),
        Ok(SchemaState::Ahead { found, known }) => Err(Step::lacking(
            SCHEMA,
            format!(
                "are of version {found}, this program knows {known}; use the newer program that made them"
            ),
        )),
        Err(error) => Err(Step::failed(SCHEMA, &error)),
    };
    match well {
        Ok(step) => steps.push(step),
        Err(step) => return steps.push(step),
    }
    steps.push(match missing_privileges(pool).await {
        Ok(missing) if missing.is_empty() => Step::passed("privileges", "suffice for a run"),
        Ok(missing) => Step::lacking(
            "privileges",
            format!(
                "this database role may not {}; grant it the role `authz_sync` (deploy/sql/roles.sql)",
                missing.join(", ")
            ),
        ),
        Err(error) => Step::failed("privileges", &error),
    });
    steps.push(lease(pool, job).await.unwrap_or_else(|error| Step::failed(LEASE, &error)));
}

async fn lease(pool: &PgPool, job: &Job) -> Result<Step, authz::Error> {
    let free = Step::passed(LEASE, "is free");
    let known = match freshness(pool, Some(&job.directory)).await {
        Err(authz::Error::UnknownDirectory(name)) => {
            return Ok(Step::passed(LEASE, format!("is free; `{name}` was never synced")));
        }
        known => known?,
    };
    let lease = known.first().and_then(|directory| directory.lease_run_id.zip(directory.lease_seconds));
    let Some((run, left)) = lease else { return Ok(free) };
    // A run that plans or applies renews its lease no more, however long it takes.
    let holder = if left > 0.0 { Holder::Applying } else { holder(pool, &job.directory).await? };
    Ok(match holder {
        Holder::None => free,
        Holder::Applying => Step::lacking(
            LEASE,
            format!(
                "is held by run {run}, which is at work; a run would end with exit code 5 until that is done"
            ),
        ),
        Holder::NotApplying => Step::passed(
            LEASE,
            format!("was left over by run {run}, which was killed; the next run takes it"),
        ),
        Holder::NotKnown => Step::passed(
            LEASE,
            format!(
                "was not renewed by run {run}, which was killed or is still applying: this database role cannot see \
                 which; the next run waits and takes it, or ends with exit code 5"
            ),
        ),
    })
}
