//! Rows written by a binary `COPY … FROM STDIN`.

use sqlx::{PgConnection, PgPool};

use crate::error::Error;
use crate::lent::Lent;

const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// Rows as they are sent.
pub(super) struct CopyRows(Vec<u8>);

impl CopyRows {
    pub(super) fn new() -> Self {
        Self(HEADER.to_vec())
    }

    /// A row of so many values, which come next.
    pub(super) fn begin(&mut self, values: i16) {
        self.0.extend(values.to_be_bytes());
    }

    pub(super) fn value(&mut self, value: &[u8]) {
        // No value is longer than a page of the source.
        self.0.extend(u32::try_from(value.len()).unwrap_or_default().to_be_bytes());
        self.0.extend(value);
    }

    pub(super) fn value_or_null(&mut self, value: Option<&[u8]>) {
        match value {
            Some(value) => self.value(value),
            None => self.0.extend((-1_i32).to_be_bytes()),
        }
    }

    /// Bytes that were not taken yet.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes what there is so far, to be sent before the rest.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }

    /// No row comes any more.
    pub(super) fn end(mut self) -> Vec<u8> {
        self.0.extend((-1_i16).to_be_bytes());
        self.0
    }
}

/// Sends rows to a table, on a connection of its own. Says how many there were.
pub(super) async fn send(pool: PgPool, statement: &'static str, rows: Vec<u8>) -> Result<u64, Error> {
    let mut connection = Lent::from(&pool).await?;
    let rows = copy_in(&mut connection, statement, rows).await?;
    connection.give_back();
    Ok(rows)
}

/// The same on a connection that goes back to no pool if this does not come to its end. Where it holds locks, it has to be
/// [watched](super::watch).
pub(super) async fn copy_in(
    connection: &mut PgConnection,
    statement: &'static str,
    rows: Vec<u8>,
) -> Result<u64, Error> {
    let mut copy = connection.copy_in_raw(statement).await?;
    copy.send(rows).await?;
    Ok(copy.finish().await?)
}
