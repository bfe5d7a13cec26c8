//! The URL of a server, into which a database's name is put.

use std::{fmt::Write as _, path::Path};

/// A server's URL, cut where the database's name goes. It may hold a password, so it has no `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Address {
    before: String,
    after: String,
}

impl Address {
    /// A server that listens on a Unix socket in `folder`.
    pub(crate) fn of_socket(folder: &Path) -> Address {
        // The port is written out because libpq and sqlx would otherwise take it from PGPORT.
        let before = format!("postgres://postgres@{}:5432", percent(&folder.to_string_lossy()));
        Address { before, after: String::new() }
    }

    /// A server on a TCP port, with the password of `postgres`.
    pub(crate) fn of_port(host: &str, port: u16, password: &str) -> Address {
        Address { before: format!("postgres://postgres:{password}@{host}:{port}"), after: String::new() }
    }

    /// Cuts a URL that somebody wrote; what it says besides the database (user, password, options) is kept.
    pub(crate) fn parse(url: &str) -> Address {
        let authority = url.find("://").map_or(0, |at| at + 3);
        let (start, rest) = url.split_at(authority);
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (host, rest) = rest.split_at(end);
        let query = rest.split_once('?').map_or("", |(_, query)| query);
        let query: Vec<_> =
            query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("dbname=")).collect();
        let after = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
        Address { before: format!("{start}{host}"), after }
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!("{}/{database}{}", self.before, self.after)
    }

    /// One line from which [`Address::parse`] makes the same address again.
    pub(crate) fn line(&self) -> String {
        format!("{}{}", self.before, self.after)
    }
}

fn percent(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a `String` cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn database_is_put_where_it_belongs() {
        let cases = [
            ("postgres://a:b@h:1/old?sslmode=disable", "postgres://a:b@h:1/new?sslmode=disable"),
            ("postgres://a@h", "postgres://a@h/new"),
            ("postgresql://h/?dbname=old&host=/tmp", "postgresql://h/new?host=/tmp"),
        ];
        for (given, wanted) in cases {
            assert_eq!(Address::parse(given).url("new"), wanted);
        }
    }

    #[test]
    fn socket_folder_is_escaped() {
        let address = Address::of_socket(Path::new("/tmp/a b"));
        assert_eq!(address.url("x"), "postgres://postgres@%2Ftmp%2Fa%20b:5432/x");
        assert!(Address::parse(&address.line()) == address);
    }
}
