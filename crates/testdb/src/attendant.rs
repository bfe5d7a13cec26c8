//! One thread per process that talks to the server, so that databases can be made and dropped from any runtime,
//! also from one that is about to end, and from none.

use std::{
    future::Future,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, PgPool, error::DatabaseError, postgres::PgPoolOptions,
};
use tokio::{
    runtime::Builder,
    sync::{OnceCell, mpsc, oneshot},
    time::{Duration, Instant, sleep},
};

use crate::{
    address::Address,
    error::{Doing as _, Error, sql},
    join::{self, Hold, Joined, run},
    keeper,
    lease::{TEMPLATE, drop_database},
};

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The way to the thread.
pub(crate) struct Attendant {
    work: mpsc::UnboundedSender<Work>,
    server: Arc<Server>,
}

/// The server of the run and the names that this process gives to databases on it.
struct Server {
    pool: PgPool,
    address: Address,
    maintenance: String,
    description: String,
    hold: Hold,
    /// The number of the maintenance database, within which advisory locks count.
    scope: String,
    owner: u32,
    counter: AtomicU32,
    /// `STRATEGY file_copy`, where the server knows it.
    strategy: &'static str,
}

/// A template that is being prepared; the lock on its name is held by the session.
pub(crate) struct Draft {
    name: String,
    template: String,
    session: PgConnection,
}

static ATTENDANT: OnceCell<Result<Attendant, Arc<Error>>> = OnceCell::const_new();
static DESCRIPTION: OnceLock<String> = OnceLock::new();

/// Which server this process uses, once it uses one.
pub(crate) fn description() -> Option<&'static str> {
    DESCRIPTION.get().map(String::as_str)
}

impl Attendant {
    /// The thread of this process. If there is no server, this is not tried again and again.
    pub(crate) async fn get() -> Result<&'static Attendant, Error> {
        let attendant = ATTENDANT.get_or_init(|| async { Attendant::start().await.map_err(Arc::new) }).await;
        attendant.as_ref().map_err(|error| Error::Earlier(Arc::clone(error)))
    }

    async fn start() -> Result<Attendant, Error> {
        let (work, mut inbox) = mpsc::unbounded_channel::<Work>();
        let (started, start) = oneshot::channel();
        let body = move || {
            let runtime = match Builder::new_current_thread().enable_all().build().doing("start a runtime") {
                Ok(runtime) => runtime,
                // Nobody may be left to hear it.
                Err(error) => return drop(started.send(Err(error))),
            };
            runtime.block_on(async {
                if started.send(Server::join().await).is_err() {
                    return;
                }
                while let Some(work) = inbox.recv().await {
                    tokio::spawn(work);
                }
            });
        };
        thread::Builder::new().name("testdb".to_owned()).spawn(body).doing("start a thread")?;
        let server = start.await.map_err(|_| Error::Ending)??;
        // Only the first server is described, and there is only one.
        let _ = DESCRIPTION.set(server.description.clone());
        Ok(Attendant { work, server: Arc::new(server) })
    }

    /// A name for a new database, for which the templates stay until [`Attendant::drop_database`].
    pub(crate) async fn reserve(&self) -> Result<String, Error> {
        self.ask(async |server| {
            if let Hold::Lease(lease) = &server.hold {
                lease.acquire().await?;
            }
            let number = server.counter.fetch_add(1, Ordering::Relaxed);
            Ok(format!("testdb_{}_{:08x}_{number}", server.scope, server.owner))
        })
        .await
    }

    pub(crate) fn url(&self, name: &str) -> String {
        self.server.address.url(name)
    }

    pub(crate) async fn create_empty(&self, name: &str) -> Result<(), Error> {
        let name = name.to_owned();
        let created = self.ask(async move |server| server.create(&name, "template0").await).await?;
        if created { Ok(()) } else { Err(sql("create a database")(sqlx::Error::RowNotFound)) }
    }

    /// Copies a template; `false` if there is none of this name.
    pub(crate) async fn create_from(&self, template: &str, name: &str) -> Result<bool, Error> {
        let (name, template) = (name.to_owned(), template.to_owned());
        self.ask(async move |server| server.create(&name, &server.template(&template)).await).await
    }

    /// Makes an empty database to become the template, unless another process has made the template meanwhile.
    pub(crate) async fn draft(&self, template: &str) -> Result<Option<Draft>, Error> {
        let template = template.to_owned();
        self.ask(async move |server| server.draft(&template).await).await
    }

    pub(crate) fn draft_url(&self, draft: &Draft) -> String {
        self.url(&draft.name)
    }

    /// Makes the template of a prepared database: from now on it is there, complete.
    pub(crate) async fn publish(&self, draft: Draft) -> Result<(), Error> {
        self.ask(async move |_| publish(draft).await).await
    }

    /// Drops a database and waits for it, also outside of any runtime.
    pub(crate) fn drop_database(&self, name: &str) {
        let (done, wait) = std::sync::mpsc::channel();
        let (server, name) = (Arc::clone(&self.server), name.to_owned());
        let work = async move {
            // There is nobody to tell; the server or the next run removes what is left.
            let _ = server.drop_database(&name).await;
            let _ = done.send(());
        };
        if self.work.send(Box::pin(work)).is_ok() {
            let _ = wait.recv();
        }
    }

    /// Lets the thread do something and waits for it.
    async fn ask<T, F, Fut>(&self, question: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(Arc<Server>) -> Fut,
        Fut: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let asked = question(Arc::clone(&self.server));
        // Who asked may have given up meanwhile.
        let work = async move { drop(reply.send(asked.await)) };
        self.work.send(Box::pin(work)).map_err(|_| Error::Ending)?;
        answer.await.map_err(|_| Error::Ending)?
    }
}

impl Server {
    async fn join() -> Result<Server, Error> {
        let Joined { address, maintenance, description, hold } = join::join().await?;
        let owner = if let Hold::Lease(lease) = &hold { lease.owner() } else { rand::random() };
        let pool = PgPoolOptions::new()
            .max_connections(4)
            .acquire_timeout(Duration::from_mins(1))
            .connect(&maintenance)
            .await
            .map_err(sql("connect to the server"))?;
        let (scope, version): (String, i32) = sqlx::query_as(
            "SELECT to_hex(oid::bigint), current_setting('server_version_num')::integer
             FROM pg_database WHERE datname = current_database()",
        )
        .fetch_one(&pool)
        .await
        .map_err(sql("ask the server's version"))?;
        let strategy = if version >= 150_000 { " STRATEGY file_copy" } else { "" };
        let counter = AtomicU32::new(1);
        Ok(Server { pool, address, maintenance, description, hold, scope, owner, counter, strategy })
    }

    fn template(&self, template: &str) -> String {
        format!("testdb_{}_template_{template}", self.scope)
    }

    /// `false` if there is no such template.
    async fn create(&self, name: &str, template: &str) -> Result<bool, Error> {
        let text = format!("CREATE DATABASE {name} TEMPLATE {template}{}", self.strategy);
        match sqlx::query(AssertSqlSafe(text)).execute(&self.pool).await {
            Ok(_) => Ok(true),
            Err(error) if has_code(&error, "3D000") => Ok(false),
            Err(error) => Err(sql("create a database")(error)),
        }
    }

    async fn draft(&self, template: &str) -> Result<Option<Draft>, Error> {
        // A session of its own: whoever waits for the lock must not keep others from the pool.
        let mut session = keeper::connect(&self.maintenance).await.map_err(sql("connect to the server"))?;
        let mut hasher = DefaultHasher::new();
        template.hash(&mut hasher);
        // Any 32 bits of it will do: with the same key, two templates only wait for each other.
        let key = u32::try_from(hasher.finish() >> 32).unwrap_or_default().cast_signed();
        sqlx::query("SELECT pg_advisory_lock($1, $2)")
            .bind(TEMPLATE)
            .bind(key)
            .execute(&mut session)
            .await
            .map_err(sql("lock a template"))?;
        let name = format!("testdb_{}_new_{template}", self.scope);
        let template = self.template(template);
        let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
            .bind(&template)
            .fetch_one(&mut session)
            .await
            .map_err(sql("look for a template"))?;
        if there {
            return Ok(None);
        }
        // Under the lock, a database of this name is what a killed process left.
        drop_database(&mut session, &name).await?;
        self.create(&name, "template0").await?;
        Ok(Some(Draft { name, template, session }))
    }

    async fn drop_database(&self, name: &str) -> Result<(), Error> {
        let dropped = match self.pool.acquire().await {
            Ok(mut session) => drop_database(&mut session, name).await,
            Err(error) => Err(sql("drop a database")(error)),
        };
        if let Hold::Lease(lease) = &self.hold {
            lease.release().await?;
        }
        dropped
    }
}

async fn publish(mut draft: Draft) -> Result<(), Error> {
    let Draft { name, template, session } = &mut draft;
    let doing = "finish a template";
    // Nobody connects to a template, since it could not be copied at that time.
    run(session, format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false")).await.map_err(sql(doing))?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1")
            .bind(&*name)
            .execute(&mut *session)
            .await
            .map_err(sql(doing))?;
        match run(session, format!("ALTER DATABASE {name} RENAME TO {template}")).await {
            Ok(()) => break,
            Err(error) if has_code(&error, "55006") && Instant::now() < deadline => {
                sleep(Duration::from_millis(5)).await;
            }
            Err(error) => return Err(sql(doing)(error)),
        }
    }
    // The lock goes with the session in any case.
    let _ = draft.session.close().await;
    Ok(())
}

fn has_code(error: &sqlx::Error, code: &str) -> bool {
    error.as_database_error().and_then(DatabaseError::code).is_some_and(|found| found == code)
}
