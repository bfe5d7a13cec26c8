use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const DIRECTORY: &str = r#"{"customerId": "C01example", "users": [], "groups": [], "members": {}}"#;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_directory-emulator"))
}

fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn program_serves_until_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("org.json");
    let key_file = folder.path().join("key.json");
    std::fs::write(&file, DIRECTORY).unwrap();
    std::fs::write(&key_file, "an old key that everyone may read").unwrap();
    for name in ["-TERM", "-INT"] {
        let mut child = program()
            .args([file.as_os_str(), "--key-file".as_ref(), key_file.as_os_str()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let key: Value = serde_json::from_slice(&std::fs::read(&key_file).unwrap()).unwrap();
        signal(&child, name);
        assert!(child.wait().unwrap().success(), "{name}");

        let url = line.strip_prefix("listening on ").unwrap().trim_end();
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
        assert_eq!(key["token_uri"], format!("{url}token"));
        assert_eq!(std::fs::metadata(&key_file).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn program_refuses_what_it_cannot_serve() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let good = write("good.json", DIRECTORY.as_bytes());
    let broken = write("broken.json", b"{\"customerId\": ");
    let cut = write("cut.json.gz", &[0x1f, 0x8b, 8, 0]);
    let missing = folder.path().join("missing.json").to_str().unwrap().to_owned();
    let no_folder = folder.path().join("no/key.json").to_str().unwrap().to_owned();
    for (arguments, expected) in [
        (vec![missing.as_str()], "cannot read directory file"),
        (vec![broken.as_str()], "is not a directory as JSON"),
        (vec![cut.as_str()], "cut short"),
        (vec![good.as_str(), "--key-file", no_folder.as_str()], "cannot write key file"),
        (vec![good.as_str(), "--listen", "192.0.2.1:1"], "cannot listen on `192.0.2.1:1`"),
        (vec![], "FILE"),
    ] {
        let output = run(&arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}
