//! The whole product on a real organisation of about 1,500 people, at three points in time:
//! a database, a directory API, a sync, a grant, decisions that explain themselves, an operation with its
//! audit record, and what a year and a half of people coming and going does to all that.
//!
//! `cargo run --example quickstart`; nothing has to be set up.

use std::error::Error;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use authz::audit::{self, Actor, Outcome, Record};
use authz::grant::{self, Grant};
use authz::{ActionName, Authz, Decision, DirectoryName, GroupName, UserName, action};
use dir_sync::google::{GoogleConfig, GoogleSource};
use dir_sync::{DirectorySync, Options, Report, Status, Summary};
use directory_emulator::{Directory, Emulator};
use sqlx::PgPool;
use tokio::sync::watch;

const SCALE: ActionName = ActionName::constant("workers.scale");
const APPROVE: ActionName = ActionName::constant("reviews.approve");

const SNAPSHOTS: [&str; 3] = ["2025-01", "2026-01", "2026-08"];

/// `println!`, but a reader that has seen enough is no reason to panic.
macro_rules! say {
    ($($line:tt)*) => {{
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

type Failure = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> ExitCode {
    match tour().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe quickstart stopped: {}", dir_sync::source::error_chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn tour() -> Result<(), Failure> {
    title("1. A database and a directory");
    say!("  starting a database …");
    let step = Step::begin("database and tables ready"); // testdb says on standard error which one it took
    let database = testdb::Database::empty().await?;
    let pool = PgPool::connect(database.url()).await?;
    authz::migrate(&pool).await?;
    step.done("");

    let step = Step::begin("directory API ready");
    let emulator = Emulator::start(snapshot(SNAPSHOTS[0])?).await?;
    let mut key = tempfile::NamedTempFile::new()?;
    key.write_all(emulator.service_account_key().as_bytes())?;
    step.done("speaks like Google's, serves a real organisation as of 2025-01");

    title("2. The first sync mirrors the organisation");
    sync(&pool, &emulator, key.path()).await?;

    title("3. A grant to a group, and what follows from it");
    let admin = Actor::new("platform-team@example.com", "quickstart");
    let group = GroupName::parse("sig-contributor-experience@kubernetes.example")?;
    let reviewers = GroupName::parse("production-readiness@kubernetes.example")?;
    action::register(
        &pool,
        &[(SCALE, "Set a role's number of workers"), (APPROVE, "Approve a review")],
        &admin,
    )
    .await?;
    grant::to_group(&pool, &group, &Grant::new(SCALE, "they run the contributor tools"), &admin).await?;
    grant::to_group(&pool, &reviewers, &Grant::new(APPROVE, "they own the reviews"), &admin).await?;
    say!("  granted   {SCALE} to {group}");
    say!("  granted   {APPROVE} to {reviewers}\n");

    let max = UserName::parse("max.nash.02706@kubernetes.example")?;
    let cleo = UserName::parse("cleo.quist.55618@kubernetes.example")?;
    let cleo_renamed = UserName::parse("cleo.quist.55618@etcd-io.example")?;
    let authz = Authz::new(pool.clone());
    ask(&authz, &max, &SCALE).await?;
    ask(&authz, &max, &APPROVE).await?;
    ask(&authz, &cleo, &APPROVE).await?;

    title("4. An operation: permission, change and record in one transaction");
    scale_workers(&pool, &max, 12).await?;
    say!("  {max} set the workers to 12");
    let denied = scale_workers(&pool, &cleo, 99).await;
    say!("  {cleo} tried, too: {}", denied.err().map_or_else(String::new, |e| e.to_string()));

    title("5. A year later: the guard asks before many people go");
    emulator.replace_directory(snapshot(SNAPSHOTS[1])?);
    sync(&pool, &emulator, key.path()).await?;
    say!();
    ask(&authz, &max, &SCALE).await?; // has left
    ask(&authz, &cleo, &APPROVE).await?; // has another address
    ask(&authz, &cleo_renamed, &APPROVE).await?; // and under that one still the right

    title("6. Half a year later");
    emulator.replace_directory(snapshot(SNAPSHOTS[2])?);
    sync(&pool, &emulator, key.path()).await?;
    say!();
    ask(&authz, &cleo_renamed, &APPROVE).await?; // has left as well

    title("7. The audit trail");
    trail(&pool).await?;

    say!("\nOther languages ask Postgres: select authz.can('{max}', '{SCALE}')");
    Ok(())
}

/// What a service does: decide, change and record together, so that all of it happens or nothing.
async fn scale_workers(pool: &PgPool, user: &UserName, workers: i32) -> Result<(), Failure> {
    let actor = Actor::new(user.as_str(), "ops-dashboard");
    let mut tx = authz::begin(pool).await?;
    let action = SCALE;
    let decision = authz::check(&mut *tx, user, &action).await?;
    let detail = serde_json::json!({"workers": workers});
    let record = |outcome| Record::new(action.as_str(), outcome).target("role web").decision(&decision);
    if let Decision::Deny(deny) = &decision {
        tx.rollback().await?;
        audit::record(pool, &actor, &record(Outcome::Denied).detail(detail)).await?;
        return Err(format!("denied, {}", deny.reason).into());
    }
    sqlx::query("create table if not exists roles (role text primary key, workers int)")
        .execute(&mut *tx)
        .await?;
    sqlx::query("insert into roles values ('web', $1) on conflict (role) do update set workers = $1")
        .bind(workers)
        .execute(&mut *tx)
        .await?;
    audit::record(&mut *tx, &actor, &record(Outcome::Succeeded).detail(detail)).await?;
    tx.commit().await?;
    Ok(())
}

/// Crawls the directory API and applies; a plan that the guard refuses is shown, and approved by its hash.
async fn sync(pool: &PgPool, emulator: &Emulator, key: &Path) -> Result<(), Failure> {
    let report = sync_once(pool, emulator, key, None).await?;
    let report = match report.refusal {
        None => report,
        Some(refusal) => {
            let reasons: Vec<_> = refusal.violations.iter().map(ToString::to_string).collect();
            say!("  {}", red(&format!("refused: {}", reasons.join(";\n           "))));
            say!("  a person looks at the plan and approves it: --approve {}", refusal.plan_hash);
            sync_once(pool, emulator, key, Some(refusal.plan_hash)).await?
        }
    };
    match (report.status, report.error, report.plan) {
        (Status::Applied | Status::Unchanged, _, Some(plan)) => {
            for line in Summary(&plan).to_string().lines() {
                say!("  {line}");
            }
            Ok(())
        }
        (status, error, _) => Err(format!("{status:?}: {}", error.unwrap_or_default()).into()),
    }
}

async fn sync_once(
    pool: &PgPool,
    emulator: &Emulator,
    key: &Path,
    approve: Option<String>,
) -> Result<Report, Failure> {
    let mut config = GoogleConfig::new(key);
    config.subject = Some(emulator.subject().to_owned());
    config.base_url = emulator.url();
    let source = Arc::new(GoogleSource::new(config).await?);

    Step::show("reading users, groups and members …");
    let step = Step::begin("read users, groups and members");
    let (progress, mut seen) = watch::channel(dir_sync::crawl::Progress::default());
    let showing = tokio::spawn(async move {
        while seen.changed().await.is_ok() {
            let now = *seen.borrow_and_update();
            Step::show(&format!("{} users, members of {} groups", now.users, now.groups_done));
        }
    });
    let options = Options { approve, progress: Some(progress), ..Options::default() };
    let directory = DirectoryName::parse("kubernetes")?;
    let report = DirectorySync::new(pool.clone(), directory, source).options(options).run().await;
    showing.await?;
    step.done(&format!("{} API calls", report.api_calls));
    Ok(report)
}

/// A question, its answer and the reason.
async fn ask(authz: &Authz, user: &UserName, action: &ActionName) -> Result<(), Failure> {
    let explanation = authz.explain(user, action).await?;
    match &explanation.decision {
        Decision::Allow(_) => {
            say!("  {}  {user} may {action}", green("allow"));
            for path in &explanation.paths {
                let groups: Vec<_> = path.groups.iter().map(ToString::to_string).collect();
                say!("         in {}", groups.join("\n            in "));
            }
        }
        Decision::Deny(deny) => {
            say!("  {}   {user} may not {action}", red("deny"));
            say!("         {}", deny.reason);
        }
    }
    Ok(())
}

async fn trail(pool: &PgPool) -> Result<(), Failure> {
    say!("  {:<17} {:<36} {:<10} {}", "action", "actor", "outcome", "target");
    let (states, records): (Vec<_>, Vec<_>) = audit::latest(pool, 10_000)
        .await?
        .into_iter()
        .rev()
        .partition(|entry| entry.action.starts_with("state."));
    for entry in &records {
        let target = entry.target.as_deref().unwrap_or_default();
        let outcome = format!("{:<10}", entry.outcome.as_str());
        let outcome = if entry.outcome == Outcome::Denied { red(&outcome) } else { outcome };
        say!("  {:<17} {:<36} {outcome} {target}", entry.action, entry.actor);
    }
    say!(
        "  and {} records of who and what came, changed and went, for \"who could do this then?\"",
        states.len()
    );
    Ok(())
}

fn snapshot(as_of: &str) -> Result<Directory, Failure> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("data/org-{as_of}.json.gz"));
    Ok(Directory::from_file(path)?)
}

/// Something that takes a moment: says so while it works, and how long it took.
struct Step {
    what: &'static str,
    began: Instant,
}

impl Step {
    fn begin(what: &'static str) -> Self {
        Self { what, began: Instant::now() }
    }

    /// One line that the next one overwrites; only for people.
    fn show(text: &str) {
        if std::io::stdout().is_terminal() {
            let _ = write!(std::io::stdout(), "\r\x1b[2K  {text}").and_then(|()| std::io::stdout().flush());
        }
    }

    fn done(self, result: &str) {
        Self::show("");
        let took = self.began.elapsed().as_secs_f64();
        let result = if result.is_empty() { String::new() } else { format!(": {result}") };
        say!(
            "{}  {}{result} ({took:.1} s)",
            if std::io::stdout().is_terminal() { "\r" } else { "" },
            self.what
        );
    }
}

fn title(text: &str) {
    say!("\n{}", paint("1", text));
}

fn green(text: &str) -> String {
    paint("32", text)
}

fn red(text: &str) -> String {
    paint("31", text)
}

fn paint(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}
