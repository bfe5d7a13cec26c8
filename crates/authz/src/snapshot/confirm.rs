//! Answers from memory that the database confirms: certain as those of [`check`](crate::check()), for the price of
//! reading its revision.

use std::sync::Arc;

use sqlx::PgConnection;

use super::Snapshot;
use super::lend::Lend;
use super::poll::Mark;
use super::state::State;
use crate::decision::{Decision, Revision, Verdict};
use crate::directory;
use crate::error::Error;
use crate::name::{ActionName, UserKey, UserName};
use crate::permit::{Action, Named, On, Permit, Question, Refusal};

/// Who gave the answer, each with the user's name where the user was found by `sub`.
enum Confirmed {
    /// The snapshot, which is the state that the connection sees.
    Here(Verdict, Option<UserName>),
    /// The database: the snapshot is of another revision.
    There(Decision, Option<UserName>),
}

/// What a connection sees.
struct Seen {
    revision: Revision,
    /// Of the newest change of all, if that belongs to the revision.
    mark: Mark,
    /// The clock that ends of grants are compared with.
    now: i64,
}

impl Seen {
    /// Whether `state` is what the connection sees.
    ///
    /// INVARIANT: a revision that the connection's own transaction has made and not committed is never that of a
    /// snapshot, and neither is one of another database or of a restored one, though the number may be the same: the
    /// mark is another then. A revision without a mark is taken for another (held by `tests/snapshot_confirmed.rs`).
    fn is(&self, state: &State) -> bool {
        self.mark.change_id.is_some() && (self.revision, self.mark) == (state.revision, state.mark)
    }
}

impl Snapshot {
    /// Whether `user` may do `action` in what the connection sees: what [`check`](crate::check()) would say, from memory.
    ///
    /// The database is asked for its revision and its clock. If the snapshot is of that very revision, it answers;
    /// otherwise the database does, with a second statement: after a change that the snapshot has yet to follow, for
    /// one that the transaction has made itself, in a transaction that began before, on a database that is not the
    /// snapshot's. So the answer is never older than the question, however old the snapshot is. In
    /// `read committed` the next statement may see more; in `repeatable read` it sees the same.
    ///
    /// By `sub` the snapshot answers with [`Options::by_sub`](super::Options::by_sub); without, the database always does, so
    /// that [`check`](crate::check()) is the better question. With
    /// [`Options::max_directory_age`](super::Options::max_directory_age) there is one more round trip.
    ///
    /// ```no_run
    /// # use authz::{ActionName, Snapshot, UserName};
    /// # const SCALE: ActionName = ActionName::constant("workers.scale");
    /// # async fn scale(pool: &sqlx::PgPool, snapshot: &Snapshot, ada: &UserName) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut transaction = authz::begin(&pool).await?;
    /// if snapshot.check_confirmed(&mut *transaction, ada, &SCALE).await?.is_allow() {
    ///     // … change what there is to change, in the same transaction …
    ///     transaction.commit().await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer, [`Error::DirectoryStale`], [`Error::SnapshotClosed`]: the
    /// caller cannot tell, and must not go on.
    pub async fn check_confirmed<'c, 'u>(
        &self,
        connection: impl Lend<'c>,
        user: impl Into<UserKey<'u>>,
        action: &ActionName,
    ) -> Result<Verdict, Error> {
        let user = user.into();
        let mut connection = connection.lend().await?;
        Ok(match self.ask_confirmed(&mut connection, user, action).await? {
            Confirmed::Here(verdict, _) => verdict,
            Confirmed::There(decision, _) => decision.verdict(),
        })
    }

    /// The same of many questions, all of what the connection sees at one moment; see
    /// [`check_many`](crate::check_many()). In the order of the questions.
    ///
    /// # Errors
    /// As [`check_confirmed`](Self::check_confirmed): none of the questions is answered then.
    pub async fn check_many_confirmed<'c>(
        &self,
        connection: impl Lend<'c>,
        questions: &[(UserName, ActionName)],
    ) -> Result<Vec<Verdict>, Error> {
        let mut connection = connection.lend().await?;
        if let Some((seen, state)) = self.confirm(&mut connection).await? {
            return questions
                .iter()
                .map(|(user, action)| {
                    let (answer, _) = state.ask(user.into(), action, || seen.now);
                    self.verdict(answer, seen.revision, action)
                })
                .collect();
        }
        let decisions = crate::check_many(&mut *connection, questions).await?;
        Ok(decisions.iter().map(Decision::verdict).collect())
    }

    /// A permit for `A`, decided as [`check_confirmed`](Self::check_confirmed) decides. It names the grant only if the
    /// database had to be asked.
    ///
    /// # Errors
    /// [`Refusal::Denied`] if the user may not, [`Refusal::Undecided`] if nobody can tell.
    pub async fn authorize_confirmed<'c, 'u, A: Action>(
        &self,
        connection: impl Lend<'c>,
        user: impl Into<UserKey<'u>>,
    ) -> Result<Permit<A>, Refusal> {
        let user = user.into();
        let mut connection = connection.lend().await.map_err(Error::from)?;
        self.permit_confirmed(Question::about(), &mut connection, user).await
    }

    /// The same on one resource; see [`authorize_on`](crate::authorize_on()).
    ///
    /// # Errors
    /// As [`authorize_confirmed`](Self::authorize_confirmed), and [`Refusal::NotAResource`].
    pub async fn authorize_on_confirmed<'c, 'u, A: Action>(
        &self,
        connection: impl Lend<'c>,
        user: impl Into<UserKey<'u>>,
        resource: &str,
    ) -> Result<Permit<On<A>>, Refusal> {
        let (user, question) = (user.into(), Question::on(resource)?);
        let mut connection = connection.lend().await.map_err(Error::from)?;
        self.permit_confirmed(question, &mut connection, user).await
    }

    /// The same for an action whose name is only known at run time.
    ///
    /// # Errors
    /// As [`authorize_confirmed`](Self::authorize_confirmed).
    pub async fn authorize_named_confirmed<'c, 'u>(
        &self,
        connection: impl Lend<'c>,
        user: impl Into<UserKey<'u>>,
        action: &ActionName,
    ) -> Result<Permit<Named>, Refusal> {
        let (user, question) = (user.into(), Question::named(action));
        let mut connection = connection.lend().await.map_err(Error::from)?;
        self.permit_confirmed(question, &mut connection, user).await
    }
}

impl Snapshot {
    /// The state that the connection sees, if the snapshot has it.
    async fn confirm(&self, connection: &mut PgConnection) -> Result<Option<(Seen, Arc<State>)>, Error> {
        if self.shared.is_closed() {
            return Err(Error::SnapshotClosed);
        }
        if let Some(max) = self.shared.max_directory_age() {
            directory::require_fresh(&mut *connection, max).await?;
        }
        let seen = look(connection).await?;
        // Taken after the look: the state may have caught up meanwhile, and is compared as it is.
        let state = arc_swap::Guard::into_inner(self.shared.state());
        Ok(seen.is(&state).then_some((seen, state)))
    }

    /// The answer for whatever the connection sees, changes of its own transaction included.
    async fn ask_confirmed(
        &self,
        connection: &mut PgConnection,
        user: UserKey<'_>,
        action: &ActionName,
    ) -> Result<Confirmed, Error> {
        let confirmed = self.confirm(&mut *connection).await?;
        if let Some((seen, state)) = confirmed
            && (self.by_sub || matches!(user, UserKey::Name(_)))
        {
            let (answer, name) = state.ask(user, action, || seen.now);
            return Ok(Confirmed::Here(self.verdict(answer, seen.revision, action)?, name));
        }
        let (decision, name) = crate::check::ask(connection, user, action).await?;
        Ok(Confirmed::There(decision, name))
    }

    async fn permit_confirmed<A>(
        &self,
        question: Question<A>,
        connection: &mut PgConnection,
        user: UserKey<'_>,
    ) -> Result<Permit<A>, Refusal> {
        match self.ask_confirmed(connection, user, question.action()).await? {
            Confirmed::Here(verdict, name) => question.judged(user, name, verdict),
            Confirmed::There(decision, name) => question.decided(user, name, decision),
        }
    }
}

/// The newest change is the end of an index, and it belongs to the newest revision, because both are made under one
/// lock; to look for the newest change of a revision costs more where a revision has many.
async fn look(connection: &mut PgConnection) -> Result<Seen, Error> {
    let row = sqlx::query!(
        r#"
        select r.revision, statement_timestamp() as "now!",
               c.change_id as "change_id?", c.changed_at as "changed_at?"
        from authz.revision r
        left join (
            select c.change_id, c.revision, c.changed_at from authz.changes c order by c.change_id desc limit 1
        ) c on c.revision = r.revision
        "#
    )
    .fetch_one(connection)
    .await?;
    Ok(Seen {
        revision: Revision(row.revision),
        mark: Mark { change_id: row.change_id, micros: row.changed_at.map(|at| at.timestamp_micros()) },
        now: row.now.timestamp_micros(),
    })
}
