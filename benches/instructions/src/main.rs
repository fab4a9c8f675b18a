//! Runs one stage of a batch of 1,000 messages, in a function that callgrind can tell from the preparation before it:
//! `login-etl-instructions read|rows|cells`.

use std::{hint::black_box, time::SystemTime};

use bytes::BytesMut;
use login_etl::{
    event::{Message, messages},
    keyring::Keyring,
    mapping::{Envelope, Mapping, ROWS_CAPACITY, Row},
};

#[path = "../../src/sample.rs"]
mod sample;

const MESSAGES: usize = 1_000;
const KEYRING: &str = r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"}"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let stage = std::env::args().nth(1).unwrap_or_default();
    let text = sample::event(MESSAGES);
    let (keyring, mapping) = (Keyring::from_json(KEYRING)?, Mapping::built_in()?);

    let messages = if stage == "read" { counted(|| messages(text.as_bytes())) } else { messages(text.as_bytes()) }?;
    let rows = || rows(&mapping, &keyring, &messages);
    let rows = if stage == "rows" { counted(rows) } else { rows() };
    let len = if stage == "cells" { counted(|| cells(&rows)) } else { cells(&rows) };
    assert_eq!((rows.len(), len > 100 * MESSAGES), (MESSAGES, true), "not all of the batch was worked on");
    Ok(())
}

/// Callgrind counts only this function: `--toggle-collect='*counted*'`.
#[inline(never)]
fn counted<T>(work: impl FnOnce() -> T) -> T {
    black_box(work())
}

/// Parses and masks the bodies.
fn rows(mapping: &Mapping, keyring: &Keyring, messages: &[Message<'_>]) -> Vec<Row> {
    let mut buffer = BytesMut::with_capacity(ROWS_CAPACITY);
    let row = |message: &Message<'_>| {
        let envelope =
            Envelope { message_id: message.id()?, sent: message.sent(), queue: None, now: SystemTime::UNIX_EPOCH };
        mapping.row_of_json_string(message.body()?, &envelope, keyring, &mut buffer).ok()
    };
    messages.iter().filter_map(row).collect()
}

/// Turns rows into columns. Returns the number of bytes in all cells.
fn cells(rows: &[Row]) -> usize {
    let mut columns: Vec<Vec<Option<&[u8]>>> = (0..7).map(|_| Vec::with_capacity(rows.len())).collect();
    for row in rows {
        columns.iter_mut().zip(row.cells()).for_each(|(column, cell)| column.push(cell));
    }
    columns.iter().flatten().flatten().map(|cell| cell.len()).sum()
}
