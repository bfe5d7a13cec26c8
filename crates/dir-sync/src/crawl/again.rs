//! A second look at listings that miss what the mirror has, before its absence is believed.

use std::sync::Arc;

use authz::mirror::{Missing, MissingMembers};
use futures_util::stream::{self, StreamExt};
use tokio::sync::mpsc;

use super::walk::{Groups, MembersOf, Step, Stop, Users, Walk};
use super::{Batch, Crawl, CrawlError, CrawlOptions, Listing, NOT_FOUND, Run, incomplete, warn_of};
use crate::source::{Group, Source, SourceError, error_chain};

/// Lists users, groups or both once more and sends on what is on their pages, as [`crawl()`](super::crawl()) does, and the members of groups
/// that the crawl before has not listed. Adds to it what was found.
///
/// For a listing whose pages are of different moments can miss what moved from one to the other: see
/// [`missing`](authz::mirror::Run::missing).
///
/// # Errors
/// As [`crawl()`](super::crawl()).
pub async fn crawl_again<P: From<Batch> + Send>(
    source: Arc<dyn Source>,
    options: CrawlOptions,
    missing: Missing,
    mut before: Crawl,
    pages: mpsc::Sender<P>,
) -> Result<Crawl, CrawlError> {
    let calls_before = source.calls();
    let run = Run::new(source.as_ref(), &options, pages);
    if missing.users {
        let mut walk = Walk::new(&run.permits, Users(run.source));
        loop {
            match walk.next().await.map_err(|stop| stop.of(Listing::Users))? {
                Step::Page(users) => run.send(Batch::Users(users)).await?,
                // What came of either pass is listed.
                Step::Restarted => {}
                Step::Done => break,
            }
        }
    }
    if missing.groups {
        let mut new = Vec::new();
        let mut walk = Walk::new(&run.permits, Groups(run.source));
        loop {
            match walk.next().await.map_err(|stop| stop.of(Listing::Groups))? {
                Step::Page(mut groups) => {
                    // Those that were not found before are listed again as new ones.
                    groups.retain(|group| {
                        run.filter.keeps(&group.email)
                            && (before.vanished.contains(&group.id) || !before.listed.contains(&group.id))
                    });
                    before.vanished.retain(|id| groups.iter().all(|group| group.id != *id));
                    before.listed.extend(groups.iter().map(|group| group.id.clone()));
                    run.send(Batch::Groups(groups.clone())).await?;
                    new.extend(groups);
                }
                Step::Restarted => {}
                Step::Done => break,
            }
        }
        before.groups += u64::try_from(new.len()).unwrap_or(u64::MAX);
        let mut tally = run.list_all_members(stream::iter(new)).await?;
        run.keep_unknown_everyone(&mut tally).await?;
        let never_found = std::mem::take(&mut tally.vanished);
        tally.incomplete.extend(never_found.into_iter().map(|group| incomplete(group, NOT_FOUND.to_owned())));
        warn_of(&tally.incomplete);
        before.memberships += tally.memberships;
        before.unsure.extend(tally.unsure);
        before.incomplete.extend(tally.incomplete);
        before.incomplete.sort_unstable_by(|a, b| a.group_email.cmp(&b.group_email));
        for (kind, count) in tally.unknown_member_types {
            *before.unknown_member_types.entry(kind).or_default() += count;
        }
    }
    before.calls += source.calls().saturating_sub(calls_before);
    Ok(before)
}

/// Asks once more for the members that are missing in these groups and sends on as [`Batch::MembersAgain`] who is there. Where many
/// are missing, or an answer does not come, the members are listed again. Adds to the crawl before the groups for which that
/// failed, as incomplete.
///
/// # Errors
/// [`CrawlError`] if the directory refuses us, or if the receiver is gone.
pub async fn crawl_members_again<P: From<Batch> + Send>(
    source: Arc<dyn Source>,
    options: CrawlOptions,
    groups: Vec<(Group, MissingMembers)>,
    mut before: Crawl,
    pages: mpsc::Sender<P>,
) -> Result<Crawl, CrawlError> {
    let calls_before = source.calls();
    let run = &Run::new(source.as_ref(), &options, pages);
    let looks = stream::iter(groups).map(|(group, missing)| async move {
        let looked = run.look_at_members_again(&group, &missing).await;
        (looked, group)
    });
    let mut looks = std::pin::pin!(looks.buffer_unordered(run.concurrency));
    let mut failed = Vec::new();
    while let Some((looked, group)) = looks.next().await {
        if let Some(stop) = looked? {
            failed.push(incomplete(group, stop.nonfatal()?));
        }
    }
    warn_of(&failed);
    before.incomplete.extend(failed);
    before.incomplete.sort_unstable_by(|a, b| a.group_email.cmp(&b.group_email));
    before.calls += source.calls().saturating_sub(calls_before);
    Ok(before)
}

impl<P: From<Batch> + Send> Run<'_, P> {
    /// Says why it is not known who is there, if it is not.
    async fn look_at_members_again(
        &self,
        group: &Group,
        missing: &MissingMembers,
    ) -> Result<Option<Stop>, CrawlError> {
        if let MissingMembers::Each(ids) = missing {
            match self.ask_for_members(group, ids).await? {
                None => return Ok(None),
                Some(error) => {
                    let reason = error_chain(&error);
                    tracing::info!(group = group.email, reason, "lists the members again instead");
                }
            }
        }
        self.list_members_again(group).await
    }

    /// Says which answer did not come, if one did not.
    async fn ask_for_members(
        &self,
        group: &Group,
        ids: &[String],
    ) -> Result<Option<SourceError>, CrawlError> {
        for id in ids {
            let answer = {
                let _permit = self.permits.acquire().await.ok();
                self.source.member(group, id).await
            };
            match answer {
                Ok(Some(member)) => {
                    let members = vec![member];
                    self.send(Batch::MembersAgain { group_id: group.id.clone(), members }).await?;
                }
                Ok(None) => {}
                Err(error) if error.is_fatal() => return Err(CrawlError::Fatal(error)),
                Err(error) => return Ok(Some(error)),
            }
        }
        Ok(None)
    }

    /// Says why the listing did not come to its end, if it did not.
    async fn list_members_again(&self, group: &Group) -> Result<Option<Stop>, CrawlError> {
        let mut walk = Walk::new(&self.permits, MembersOf(self.source, group));
        loop {
            match walk.next().await {
                Ok(Step::Page(members)) if members.is_empty() => {}
                Ok(Step::Page(members)) => {
                    self.send(Batch::MembersAgain { group_id: group.id.clone(), members }).await?;
                }
                // What came of either pass is listed.
                Ok(Step::Restarted) => {}
                Ok(Step::Done) => return Ok(None),
                Err(stop) => return Ok(Some(stop)),
            }
        }
    }
}
