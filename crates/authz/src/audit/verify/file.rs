//! Verifies exports, without a database.

use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::bufread::MultiGzDecoder;
use memchr::memchr;

use super::{Chain, Finding, Problem, Report, Trust};
use crate::audit::canonical::{Encoder, Sealable};
use crate::audit::export::{EXPORT, End, EndOf, Head, HeadOf, RecordLine, SealLine, fits};
use crate::audit::seal::{Seal, moment};
use crate::error::Error;

/// So much of a file is read at once and given to a thread.
const PIECE: usize = 256 * 1024;
/// A line is at most so long: a seal's line is the longest, a record holds at most 1 GiB.
const LONGEST_LINE: usize = 2 << 30;

/// Holds exports, in their order, against the chain and against `trust`: every record against its seal, every seal
/// against the one before, each file against the end of the one before. Reads plain and gzipped files; uses the
/// processors that there are.
///
/// # Errors
/// [`Error::Export`] if a file cannot be read. What does not fit is no error, it is in the report.
pub fn verify_exports<R: Read + Send>(
    files: impl IntoIterator<Item = R>,
    trust: &Trust,
) -> Result<Report, Error> {
    let mut chain = Chain::new(trust.clone());
    for file in files {
        if let Some(finding) = verify_one(file, &mut chain)? {
            chain.report.finding = Some(finding);
            break;
        }
    }
    chain.end();
    Ok(chain.report)
}

/// What a line holds.
enum Line {
    Head(HeadOf),
    Record(Sealable),
    /// With its entries, as they stand in the file.
    Seal(Box<Seal>, String),
    End(EndOf),
    Unreadable,
}

fn verify_one<R: Read + Send>(file: R, chain: &mut Chain) -> Result<Option<Finding>, Error> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).clamp(1, 8);
    std::thread::scope(|scope| {
        let (to_workers, mut from_workers): (Vec<_>, Vec<_>) = (0..threads)
            .map(|_| {
                let (to, pieces) = sync_channel::<Vec<u8>>(2);
                let (lines, from) = sync_channel(2);
                scope.spawn(move || work(&pieces, &lines));
                (to, from)
            })
            .unzip();
        let reader = scope.spawn(move || read(file, &to_workers));
        let mut state =
            State { chain, records: Vec::new(), line: 0, head: None, counts: (0, 0), ended: false };
        let finding = state.follow(&mut from_workers);
        // Nobody takes more lines: the workers end, and so does the reader.
        drop(from_workers);
        let read =
            reader.join().unwrap_or_else(|_| Err(std::io::Error::other("the reading thread ended early")));
        if finding.is_none() {
            read.map_err(Error::Export)?;
        }
        Ok(finding.or_else(|| state.end()))
    })
}

/// Cuts the file into pieces of whole lines and deals them out in turn.
fn read(file: impl Read, workers: &[SyncSender<Vec<u8>>]) -> std::io::Result<()> {
    let mut file = BufReader::with_capacity(PIECE, file);
    if file.fill_buf()?.starts_with(&[0x1f, 0x8b]) {
        deal(MultiGzDecoder::new(file), workers)
    } else {
        deal(file, workers)
    }
}

fn deal(mut file: impl Read, workers: &[SyncSender<Vec<u8>>]) -> std::io::Result<()> {
    let mut turns = workers.iter().cycle();
    let mut rest = Vec::new();
    loop {
        let mut piece = std::mem::take(&mut rest);
        let size = u64::try_from(PIECE).unwrap_or(u64::MAX);
        let read = file.by_ref().take(size).read_to_end(&mut piece)?;
        if read > 0 {
            let end = piece.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
            rest = piece.split_off(end);
            if rest.len() > LONGEST_LINE {
                return Err(std::io::Error::other("a line is longer than any record can be"));
            }
        }
        if !piece.is_empty() && turns.next().is_none_or(|worker| worker.send(piece).is_err()) {
            return Ok(()); // nobody wants more
        }
        if read == 0 {
            return Ok(());
        }
    }
}

fn work(pieces: &Receiver<Vec<u8>>, lines: &SyncSender<Vec<Line>>) {
    let mut encoder = Encoder::new();
    while let Ok(piece) = pieces.recv() {
        let read = lines_of(&piece).map(|line| parse(line, &mut encoder)).collect();
        if lines.send(read).is_err() {
            return;
        }
    }
}

/// Without their ends; the last one may have none.
fn lines_of(piece: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = piece;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (line, after) = rest.split_at(memchr(b'\n', rest).unwrap_or(rest.len()));
        rest = after.get(1..).unwrap_or_default();
        Some(line)
    })
}

fn parse(line: &[u8], encoder: &mut Encoder) -> Line {
    let Ok(text) = std::str::from_utf8(line) else { return Line::Unreadable };
    let read = if text.starts_with("{\"audit_id\":") {
        serde_json::from_str::<RecordLine<'_>>(text)
            .ok()
            .and_then(|record| record.sealable(encoder))
            .map(Line::Record)
    } else if text.starts_with("{\"seal\":") {
        serde_json::from_str::<SealLine<'_>>(text)
            .ok()
            .map(|line| Line::Seal(Box::new(line.seal), line.entries.into_owned()))
    } else if text.starts_with("{\"end\":") {
        serde_json::from_str::<End>(text).ok().map(|line| Line::End(line.end))
    } else {
        serde_json::from_str::<Head>(text).ok().map(|line| Line::Head(line.export))
    };
    read.unwrap_or(Line::Unreadable)
}

struct State<'c> {
    chain: &'c mut Chain,
    records: Vec<Sealable>,
    line: u64,
    head: Option<HeadOf>,
    /// Seals and records of this file.
    counts: (u64, u64),
    ended: bool,
}

impl State<'_> {
    fn follow(&mut self, workers: &mut [Receiver<Vec<Line>>]) -> Option<Finding> {
        loop {
            for worker in &mut *workers {
                let Ok(lines) = worker.recv() else { return None };
                for line in lines {
                    self.line += 1;
                    if let Err(mut finding) = self.take(line) {
                        finding.line = finding.line.or(Some(self.line));
                        return Some(finding);
                    }
                }
            }
        }
    }

    fn take(&mut self, line: Line) -> Result<(), Finding> {
        let next = self.next_seal();
        if self.ended {
            return Err(Finding::seal(Problem::ExportUnreadable, next));
        }
        match (line, &self.head) {
            (Line::Head(head), None) => {
                if !(1..=EXPORT).contains(&head.format) {
                    return Err(Finding::seal(Problem::ExportUnreadable, head.first_seal));
                }
                let goes_on = match self.chain.previous() {
                    Some(previous) => head.previous_digest == Some(previous.digest),
                    None => true,
                };
                if !goes_on {
                    return Err(Finding::seal(Problem::ExportIncomplete, next));
                }
                self.chain.begins_at(head.first_seal);
                self.chain.report.pruned_before =
                    self.chain.report.pruned_before.max(head.pruned.and_then(|pruned| moment(pruned.before)));
                self.head = Some(head);
                Ok(())
            }
            (Line::Record(record), Some(_)) => {
                self.records.push(record);
                Ok(())
            }
            (Line::Seal(seal, entries), Some(head)) => {
                let pruned = head.pruned;
                let entries = STANDARD
                    .decode(entries.as_bytes())
                    .map_err(|_| Finding::seal(Problem::ExportUnreadable, seal.seal_id))?;
                fits(self.chain, &seal, &self.records, &entries, pruned)
                    .map_err(|finding| self.placed(finding))?;
                self.counts.0 += 1;
                self.counts.1 += u64::try_from(self.records.len()).unwrap_or(u64::MAX);
                self.records.clear();
                Ok(())
            }
            (Line::End(end), Some(_)) => {
                if (end.seals, end.records) != self.counts || !self.records.is_empty() {
                    return Err(Finding::seal(Problem::ExportIncomplete, next));
                }
                self.ended = true;
                Ok(())
            }
            _ => Err(Finding::seal(Problem::ExportUnreadable, next)),
        }
    }

    /// With the line of the record that it names, if that is there.
    fn placed(&self, mut finding: Finding) -> Finding {
        let from_end = finding
            .audit_id
            .and_then(|id| self.records.iter().rev().position(|record| record.entry.audit_id == id))
            .and_then(|position| u64::try_from(position).ok());
        finding.line = from_end.map(|position| self.line.saturating_sub(position + 1));
        finding
    }

    fn next_seal(&self) -> i64 {
        let first = self.head.as_ref().map_or(1, |head| head.first_seal);
        self.chain.previous().map_or(first, |seal| seal.seal_id.saturating_add(1))
    }

    fn end(&self) -> Option<Finding> {
        (!self.ended).then(|| Finding::seal(Problem::ExportIncomplete, self.next_seal()))
    }
}
