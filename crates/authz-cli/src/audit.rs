//! The audit trail: read, sealed, verified, exported and pruned.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use authz::audit::{self, Report, Sealer, SigningKey, Trust, retention};
use chrono::TimeDelta;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use crate::answer::{Answer, Failure};
use crate::cli::{Audit, Key, Place, Verify};

pub(crate) async fn run(place: &Place, command: Audit) -> Result<Answer, Failure> {
    match command {
        Audit::List { limit } => {
            let entries = audit::latest(&place.connect().await?, limit).await?;
            let lines = entries.iter().map(|entry| {
                let target = entry.target.as_deref().unwrap_or("");
                format!(
                    "{}\t{}\t{}\t{}\t{}\t{target}",
                    entry.audit_id,
                    entry.recorded_at.to_rfc3339(),
                    entry.outcome.as_str(),
                    entry.actor,
                    entry.action
                )
            });
            Ok(Answer::lines(lines, json!({ "records": entries })))
        }
        Audit::Seal { key, every } => seal(place, &key, every).await,
        Audit::Verify(what) => verify(place, what).await,
        Audit::Checkpoint => {
            let checkpoint = audit::checkpoint(&place.connect().await?).await?;
            let text = checkpoint.as_ref().map(ToString::to_string).unwrap_or_default();
            Ok(Answer::new(text.clone(), json!({ "checkpoint": checkpoint.map(|_| text) })))
        }
        Audit::Export { file, from_seal, to_seal } => {
            export(place, file.as_deref(), from_seal, to_seal).await
        }
        Audit::Prune { keep_months, folder, key } => {
            let pool = place.connect().await?;
            let before = retention::months_ago(&pool, keep_months).await?;
            let pruned =
                retention::prune(&pool, before, &folder, key.read()?.as_ref(), &place.actor()?).await?;
            let text = match &pruned.file {
                Some(file) => {
                    format!("dropped {}; exported to {}", pruned.dropped.join(", "), file.display())
                }
                None => "nothing to drop".to_owned(),
            };
            Ok(Answer::new(text, json!(pruned)))
        }
        Audit::Key { signing_key_file } => {
            let key = SigningKey::generate()?;
            let mut options = File::options();
            options.write(true).create_new(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            options
                .open(&signing_key_file)
                .and_then(|mut file| {
                    writeln!(file, "{}", key.to_secret_text()).and_then(|()| file.sync_all())
                })
                .map_err(|error| about(&signing_key_file, &error))?;
            let public = key.public();
            Ok(Answer::new(
                public.to_string(),
                json!({ "public_key": public.to_string(), "key_id": public.key_id() }),
            ))
        }
    }
}

pub(crate) async fn verify(place: &Place, what: Verify) -> Result<Answer, Failure> {
    let mut trust =
        Trust::new().signed_from(what.signed_from).tolerance(TimeDelta::seconds(what.tolerance.into()));
    for checkpoint in what.checkpoint {
        trust = trust.checkpoint(checkpoint);
    }
    for key in what.trusted_key {
        trust = trust.key(key);
    }
    let (report, differences) = if what.files.is_empty() {
        let pool = place.connect().await?;
        let report = audit::verify(&pool, &trust).await?;
        let differences = if what.state { Some(audit::verify_state(&pool).await?) } else { None };
        (report, differences)
    } else {
        let files = what.files.iter().map(|path| File::open(path).map_err(|error| about(path, &error)));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        (audit::verify_exports(files, &trust)?, None)
    };
    let clean = report.is_clean() && differences.as_ref().is_none_or(Vec::is_empty);
    let mut lines = lines(&report);
    if let Some(differences) = &differences {
        lines.extend(differences.iter().map(ToString::to_string));
        lines.push(match differences.len() {
            0 => "grants and local memberships are what the trail says".to_owned(),
            count => format!("NOT AS THE TRAIL SAYS: {count} rows"),
        });
    }
    let mut json = json!(report);
    if let Some(fields) = json.as_object_mut() {
        fields.insert("clean".to_owned(), json!(clean));
        fields.insert("checkpoint".to_owned(), json!(report.checkpoint.as_ref().map(ToString::to_string)));
        fields.insert("message".to_owned(), json!(report.finding.as_ref().map(ToString::to_string)));
        if differences.is_some() {
            fields.insert("differences".to_owned(), json!(differences));
        }
    }
    Ok(Answer::lines(lines, json).yes_if(clean))
}

fn lines(report: &Report) -> Vec<String> {
    let mut lines = vec![format!(
        "{} records in {} seals fit; {} are not sealed yet",
        report.records, report.seals, report.unsealed
    )];
    if report.pruned > 0 {
        let before = report.pruned_before.map(|before| format!(", from before {}", before.date_naive()));
        lines.push(format!("{} records are gone by retention{}", report.pruned, before.unwrap_or_default()));
    }
    if let Some(first) = report.first_seal.filter(|first| *first > 1) {
        lines.push(format!("what comes before seal {first} was not looked at"));
    }
    if report.unchecked_checkpoints > 0 {
        lines.push(format!("{} checkpoints are older than that", report.unchecked_checkpoints));
    }
    if let Some(checkpoint) = &report.checkpoint {
        lines.push(format!("checkpoint {checkpoint}"));
    }
    match &report.finding {
        Some(finding) => lines.push(format!("TAMPERED: {finding}")),
        None => lines.push("clean".to_owned()),
    }
    lines
}

async fn seal(place: &Place, key: &Key, every: Option<u32>) -> Result<Answer, Failure> {
    let key = key.read()?;
    let pool = place.connect().await?;
    if let Some(seconds) = every {
        let sealer = Sealer::start(pool.clone(), Duration::from_secs(seconds.into()), key.map(Arc::new));
        stopped().await.map_err(|error| Failure::because("signals cannot be waited for", &error))?;
        sealer.shutdown().await;
        let checkpoint = audit::checkpoint(&pool).await?.map(|checkpoint| checkpoint.to_string());
        let text = checkpoint.clone().unwrap_or_default();
        return Ok(Answer::new(text, json!({ "checkpoint": checkpoint })));
    }
    let sealed = audit::seal(&pool, key.as_ref()).await?;
    let checkpoint = sealed.checkpoint.as_ref().map(ToString::to_string);
    let mut text = format!("{} records sealed in {} seals", sealed.records, sealed.seals);
    if sealed.busy {
        text.push_str("; another sealer is at work");
    }
    if let Some(checkpoint) = &checkpoint {
        text = format!("{text}\ncheckpoint {checkpoint}");
    }
    let json = json!({ "records": sealed.records, "seals": sealed.seals, "busy": sealed.busy, "checkpoint": checkpoint });
    Ok(Answer::new(text, json))
}

/// Until somebody asks the program to end.
async fn stopped() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            done = tokio::signal::ctrl_c() => done,
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

async fn export(
    place: &Place,
    file: Option<&Path>,
    first: i64,
    last: Option<i64>,
) -> Result<Answer, Failure> {
    let pool = place.connect().await?;
    let Some(path) = file else {
        // The lines are the answer.
        audit::export(&pool, first, last, &mut BufWriter::new(std::io::stdout())).await?;
        return Ok(Answer::new("", serde_json::Value::Null).silent());
    };
    let out = File::options().write(true).create_new(true).open(path).map_err(|error| about(path, &error))?;
    let mut out = BufWriter::new(out);
    let exported = if path.extension().is_some_and(|extension| extension == "gz") {
        let mut zipped = GzEncoder::new(&mut out, Compression::default());
        let exported = audit::export(&pool, first, last, &mut zipped).await?;
        zipped.finish().map_err(|error| about(path, &error))?;
        exported
    } else {
        audit::export(&pool, first, last, &mut out).await?
    };
    out.flush().and_then(|()| out.get_ref().sync_all()).map_err(|error| about(path, &error))?;
    let text =
        format!("{} records in {} seals written to {}", exported.records, exported.seals, path.display());
    Ok(Answer::new(text, json!(exported)))
}

impl Key {
    fn read(&self) -> Result<Option<SigningKey>, Failure> {
        let Some(path) = &self.signing_key_file else { return Ok(None) };
        let text = std::fs::read_to_string(path).map_err(|error| about(path, &error))?;
        Ok(Some(SigningKey::parse(&text)?))
    }
}

fn about(path: &Path, error: &std::io::Error) -> Failure {
    Failure::because(&format!("`{}`", path.display()), error)
}
