//! Exports: the same bytes wherever they are made, and no change of them goes unseen.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;
#[path = "support/trail.rs"]
mod trail;

use std::io::Write;
use std::process::Command;

use authz::audit::{self, Checkpoint, Finding, Problem, Report, Trust, export, seal, verify, verify_exports};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sqlx::{Executor, PgPool};
use testdb::Server;
use trail::{fill, spoil};

async fn written(pool: &PgPool, first: i64, last: Option<i64>) -> String {
    let mut bytes = Vec::new();
    export(pool, first, last, &mut bytes).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

fn read(text: &str, trust: &Trust) -> Report {
    verify_exports([text.as_bytes()], trust).unwrap()
}

fn finding(lines: &[&str]) -> Option<Finding> {
    read(&(lines.join("\n") + "\n"), &Trust::new()).finding
}

/// Three seals.
async fn sealed(pool: &PgPool) -> Vec<Checkpoint> {
    let mut checkpoints = Vec::new();
    for _ in 0..3 {
        fill(pool, 10).await;
        checkpoints.push(seal(pool, None).await.unwrap().checkpoint.unwrap());
    }
    checkpoints
}

#[tokio::test]
async fn an_export_verifies_like_the_trail_itself_plain_and_gzipped() {
    let (_database, pool) = support::database().await;
    let checkpoints = sealed(&pool).await;
    fill(&pool, 1).await;
    let text = written(&pool, 1, None).await;
    let online = verify(&pool, &Trust::new()).await.unwrap();
    let trust = checkpoints.iter().cloned().fold(Trust::new(), Trust::checkpoint);
    let offline = read(&text, &trust);
    assert_eq!(offline.finding, None);
    assert_eq!((offline.seals, offline.records, offline.unsealed), (3, online.records, 0));
    assert_eq!(offline.checkpoint, online.checkpoint);
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zipped.write_all(text.as_bytes()).unwrap();
    assert_eq!(verify_exports([&zipped.finish().unwrap()[..]], &trust).unwrap(), offline);
}

#[tokio::test]
async fn parts_of_the_chain_verify_in_their_order_and_one_by_one() {
    let (_database, pool) = support::database().await;
    let checkpoints = sealed(&pool).await;
    let (first, second) = (written(&pool, 1, Some(2)).await, written(&pool, 3, None).await);
    let trust = checkpoints.iter().cloned().fold(Trust::new(), Trust::checkpoint);
    let both = verify_exports([first.as_bytes(), second.as_bytes()], &trust).unwrap();
    assert_eq!((both.finding, both.seals, both.first_seal), (None, 3, Some(1)));
    let later = read(&second, &trust);
    assert_eq!(
        (later.finding, later.seals, later.first_seal, later.unchecked_checkpoints),
        (None, 1, Some(3), 1)
    );
    let problem = |report: Report| report.finding.map(|finding| (finding.problem, finding.seal_id));
    assert_eq!(problem(read(&first, &trust)), Some((Problem::ChainTruncated, 3)));
    let turned = verify_exports([second.as_bytes(), first.as_bytes()], &Trust::new()).unwrap();
    assert_eq!(problem(turned), Some((Problem::ExportIncomplete, 4)));
    let other: Checkpoint = format!("2:{}", checkpoints[0].digest).parse().unwrap();
    assert_eq!(problem(read(&second, &Trust::new().checkpoint(other))), Some((Problem::ChainRewritten, 3)));
}

#[tokio::test]
async fn each_change_of_a_line_names_its_record() {
    let (_database, pool) = support::database().await;
    sealed(&pool).await;
    let text = written(&pool, 1, None).await;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(finding(&lines), None);
    let at = lines.iter().position(|line| line.starts_with("{\"audit_id\":15,")).unwrap();
    let expect = |lines: &[&str], problem, audit_id, line| {
        let found = finding(lines).unwrap();
        assert_eq!((found.problem, found.audit_id, found.line), (problem, audit_id, line), "{found}");
    };
    let number = u64::try_from(at).unwrap() + 1;

    let altered = lines[at].replace("\"service\":\"tests\"", "\"service\":\"test\"");
    let mut changed = lines.clone();
    changed[at] = &altered;
    expect(&changed, Problem::RecordAltered, Some(15), Some(number));

    for other in [",\"by_database\":true", ",\"by_database\":null", ""] {
        let altered = lines[at].replace(",\"by_database\":false", other);
        assert_ne!(altered, lines[at]);
        let mut changed = lines.clone();
        changed[at] = &altered;
        expect(&changed, Problem::RecordAltered, Some(15), Some(number));
    }

    let mut changed = lines.clone();
    changed.remove(at);
    let found = finding(&changed).unwrap();
    assert_eq!((found.problem, found.audit_id), (Problem::RecordRemoved, Some(15)));

    let mut changed = lines.clone();
    changed.swap(at, at + 1);
    expect(&changed, Problem::RecordMoved, Some(16), Some(number));

    let inserted = lines[at].replace("\"audit_id\":15,", "\"audit_id\":1500,");
    let mut changed = lines.clone();
    changed.insert(at, &inserted);
    expect(&changed, Problem::RecordInserted, Some(1500), Some(number));

    let mut changed = lines.clone();
    changed[at] = "{\"audit_id\":15}";
    expect(&changed, Problem::ExportUnreadable, None, Some(number));

    // Without the last seal and what belongs to it, with a count that fits.
    let seal = lines.iter().rposition(|line| line.starts_with("{\"seal\"")).unwrap();
    let before = lines[..seal].iter().rposition(|line| line.starts_with("{\"seal\"")).unwrap();
    let records = before - 2;
    let end = format!("{{\"end\":{{\"seals\":2,\"records\":{records}}}}}");
    let mut cut = lines[..=before].to_vec();
    cut.push(&end);
    assert_eq!(finding(&cut), None, "no chain shows by itself that its end is missing");
    let last = audit::checkpoint(&pool).await.unwrap().unwrap();
    let found = read(&(cut.join("\n") + "\n"), &Trust::new().checkpoint(last)).finding.unwrap();
    assert_eq!((found.problem, found.seal_id), (Problem::ChainTruncated, 3));
    for length in 0..lines.len() {
        assert!(finding(&lines[..length]).is_some(), "{length}");
    }
}

/// Written by a version that sealed records without `by_database`.
#[test]
fn an_export_of_the_first_form_verifies() {
    let text = include_str!("data/trail_of_the_first_form.ndjson");
    let last = "3:625be0fb95c74d47ec605a3584144c66749d61c968f92c9465610683f90f41c9";
    let report = read(text, &Trust::new().checkpoint(last.parse().unwrap()));
    assert_eq!((report.finding, report.seals, report.records), (None, 3, 30));
    let lines: Vec<&str> = text.lines().collect();
    let at = lines.iter().position(|line| line.starts_with("{\"audit_id\":15,")).unwrap();
    for (before, after) in [("\"tests\"", "\"test\""), ("}", ",\"by_database\":null}")] {
        let (head, tail) = lines[at].rsplit_once(before).unwrap();
        let altered = format!("{head}{after}{tail}");
        let mut changed = lines.clone();
        changed[at] = &altered;
        let found = finding(&changed).unwrap();
        assert_eq!((found.problem, found.audit_id), (Problem::RecordAltered, Some(15)), "{altered}");
    }
}

/// Whether two lines mean the same: an escape may be written in two ways.
fn same(left: &str, right: &str) -> bool {
    let parse = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
    parse(left).is_some() && parse(left) == parse(right)
}

#[tokio::test]
async fn no_random_change_goes_unseen() {
    let (_database, pool) = support::database().await;
    sealed(&pool).await;
    let text = written(&pool, 1, None).await;
    let lines: Vec<&str> = text.lines().collect();
    let seed: u64 = rand::rng().random();
    let mut random = SmallRng::seed_from_u64(seed);
    for round in 0..1_500 {
        let mut changed: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        // The first line's `first_seal` and `pruned` say what is not there, so they are the reader's to judge.
        let at = random.random_range(1..lines.len());
        let other = random.random_range(1..lines.len());
        let kind = random.random_range(0..6);
        match kind {
            0 => {
                let mut characters: Vec<char> = changed[at].chars().collect();
                let place = random.random_range(0..characters.len());
                characters[place] = char::from(random.random_range(b' '..=b'~'));
                changed[at] = characters.into_iter().collect();
            }
            1 => drop(changed.remove(at)),
            2 => {
                let line = changed[at].clone();
                changed.insert(other, line);
            }
            3 => changed.swap(at, other),
            4 => changed.truncate(at),
            _ => {
                let line = changed.remove(at);
                changed.insert(other.min(changed.len()), line);
            }
        }
        let unchanged = changed.len() == lines.len()
            && changed.iter().zip(&lines).all(|(left, right)| left == right || same(left, right));
        let joined: Vec<&str> = changed.iter().map(String::as_str).collect();
        assert!(
            unchanged || finding(&joined).is_some(),
            "seed {seed}, round {round}: {kind} at {at}, {other}"
        );
    }
}

#[tokio::test]
async fn a_record_in_the_database_changed_at_random_is_found_and_named() {
    let (_database, pool) = support::database().await;
    sealed(&pool).await;
    pool.execute("create table kept as select * from authz.audit_log").await.unwrap();
    let ids: Vec<i64> =
        sqlx::query_scalar("select audit_id from kept order by 1").fetch_all(&pool).await.unwrap();
    let seed: u64 = rand::rng().random();
    let mut random = SmallRng::seed_from_u64(seed);
    for _ in 0..25 {
        let id = ids[random.random_range(0..ids.len())];
        let (statement, problem) = [
            ("delete from authz.audit_log where audit_id = ID", Problem::RecordRemoved),
            ("update authz.audit_log set actor = actor || 'x' where audit_id = ID", Problem::RecordAltered),
            (
                "update authz.audit_log set detail = '{\"x\": 1.0}' where audit_id = ID",
                Problem::RecordAltered,
            ),
            (
                "update authz.audit_log set recorded_at = recorded_at + interval '1 us' where audit_id = ID",
                Problem::RecordAltered,
            ),
        ][random.random_range(0..4)];
        spoil(&pool, &[statement.replace("ID", &id.to_string()).leak()]).await;
        let found = verify(&pool, &Trust::new()).await.unwrap().finding.expect(statement);
        assert_eq!((found.problem, found.audit_id), (problem, Some(id)), "seed {seed}: {statement}");
        assert!(export(&pool, 1, None, &mut Vec::new()).await.is_err(), "what does not fit is not exported");
        spoil(
            &pool,
            &[
                "delete from authz.audit_log",
                "insert into authz.audit_log overriding system value select * from kept",
            ],
        )
        .await;
    }
    assert_eq!(verify(&pool, &Trust::new()).await.unwrap().finding, None);
}

#[tokio::test]
async fn settings_of_the_session_change_nothing() {
    let (database, pool) = support::database().await;
    sealed(&pool).await;
    let plain = written(&pool, 1, None).await;
    for settings in [
        [
            ("TimeZone", "Asia/Kathmandu"),
            ("DateStyle", "SQL, DMY"),
            ("bytea_output", "escape"),
            ("extra_float_digits", "0"),
        ],
        [
            ("TimeZone", "America/St_Johns"),
            ("DateStyle", "German"),
            ("bytea_output", "hex"),
            ("extra_float_digits", "3"),
        ],
        [
            ("TimeZone", "+13:45"),
            ("DateStyle", "Postgres, MDY"),
            ("default_transaction_isolation", "serializable"),
            ("lc_numeric", "C"),
        ],
    ] {
        let options: sqlx::postgres::PgConnectOptions = database.url().parse().unwrap();
        let pool = sqlx::postgres::PgPoolOptions::new()
            .max_connections(4)
            .connect_with(options.options(settings))
            .await
            .unwrap();
        assert_eq!(verify(&pool, &Trust::new()).await.unwrap().finding, None, "{settings:?}");
        let mut bytes = Vec::new();
        export(&pool, 1, Some(3), &mut bytes).await.unwrap();
        assert!(bytes == plain.as_bytes(), "{settings:?}");
        fill(&pool, 4).await;
        seal(&pool, None).await.unwrap();
    }
    let report = verify(&pool, &Trust::new()).await.unwrap();
    assert_eq!((report.finding, report.seals, report.unsealed), (None, 6, 0));
}

/// Runs one of PostgreSQL's programs that stand beside the server's; `None` if it is not there.
async fn program(pool: &PgPool, name: &str, arguments: &[&str]) -> Option<()> {
    let folder: String = sqlx::query_scalar("select setting from pg_config where name = 'BINDIR'")
        .fetch_one(pool)
        .await
        .unwrap();
    let program = std::path::Path::new(&folder).join(name);
    if !program.exists() {
        eprintln!("{} is not there, so nothing was tried", program.display());
        return None;
    }
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(())
}

#[tokio::test]
async fn restored_into_other_servers_the_trail_goes_on_without_a_false_alarm() {
    let (database, pool) = support::database().await;
    // So that the transactions of the servers to come have lower numbers.
    pool.execute("do $$ begin for n in 1..3000 loop perform pg_current_xact_id(); commit; end loop; end $$")
        .await
        .unwrap();
    let mut checkpoints = sealed(&pool).await;
    fill(&pool, 6).await;
    let mut url = database.url().to_owned();
    let mut servers = Vec::new();
    for restore in 0..2 {
        let server = Server::start().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let dump = folder.path().join("dump");
        let dump = dump.to_str().unwrap();
        let next = server.url("postgres");
        if program(&pool, "pg_dump", &["--format=custom", "--file", dump, "--dbname", &url]).await.is_none() {
            return;
        }
        program(&pool, "pg_restore", &["--dbname", &next, dump]).await;
        url = next;
        let pool = PgPool::connect(&url).await.unwrap();
        let trust = checkpoints.iter().cloned().fold(Trust::new(), Trust::checkpoint);
        let clean = async || {
            let report = verify(&pool, &trust).await.unwrap();
            assert_eq!(report.finding, None);
            report
        };
        let count = async || {
            sqlx::query_scalar::<_, i64>("select count(*) from authz.audit_log")
                .fetch_one(&pool)
                .await
                .unwrap()
                .unsigned_abs()
        };
        let newest: String =
            sqlx::query_scalar("select max(transaction_id::text::bigint)::text from authz.audit_log")
                .fetch_one(&pool)
                .await
                .unwrap();
        let now: String =
            sqlx::query_scalar("select pg_current_xact_id()::text").fetch_one(&pool).await.unwrap();
        assert!(
            restore > 0 || now.parse::<u64>().unwrap() < newest.parse().unwrap(),
            "{now} is not before {newest}"
        );

        let report = clean().await;
        assert_eq!(report.records + report.unsealed, count().await);
        // Written before the sealer has been there, and afterwards.
        fill(&pool, 6).await;
        let report = clean().await;
        assert_eq!(report.records + report.unsealed, count().await);
        checkpoints.push(seal(&pool, None).await.unwrap().checkpoint.unwrap());
        fill(&pool, 6).await;
        checkpoints.push(seal(&pool, None).await.unwrap().checkpoint.unwrap());
        let report = clean().await;
        assert_eq!((report.records, report.unsealed), (count().await, 0));
        let offline = read(&written(&pool, 1, None).await, &trust);
        assert_eq!((offline.finding, offline.records), (None, count().await));
        fill(&pool, 3).await;
        servers.push((server, pool));
    }
    // What came before the restores is guarded as before, and what came in between.
    let (_, pool) = &servers[1];
    let ids: Vec<i64> =
        sqlx::query_scalar("select audit_id from authz.audit_log order by 1").fetch_all(pool).await.unwrap();
    pool.execute("create table kept as select * from authz.audit_log").await.unwrap();
    for id in ids.iter().take(ids.len() - 3) {
        spoil(pool, &[format!("update authz.audit_log set actor = 'x' where audit_id = {id}").leak()]).await;
        let found = verify(pool, &Trust::new()).await.unwrap().finding.unwrap();
        assert_eq!((found.problem, found.audit_id), (Problem::RecordAltered, Some(*id)));
        spoil(
            pool,
            &[format!("update authz.audit_log a set actor = k.actor from kept k where a.audit_id = {id} and k.audit_id = {id}").leak()],
        )
        .await;
    }
}

#[tokio::test]
async fn a_server_that_dies_and_comes_back_gives_no_false_alarm() {
    let mut server = Server::start().await.unwrap();
    let url = server.url("postgres");
    let pool = PgPool::connect(&url).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    let checkpoints = sealed(&pool).await;
    fill(&pool, 5).await;
    server.kill().unwrap();
    server.restart().await.unwrap();
    let pool = PgPool::connect(&url).await.unwrap();
    fill(&pool, 5).await;
    seal(&pool, None).await.unwrap();
    let trust = checkpoints.into_iter().fold(Trust::new(), Trust::checkpoint);
    let report = verify(&pool, &trust).await.unwrap();
    assert_eq!((report.finding, report.unsealed), (None, 0));
}
