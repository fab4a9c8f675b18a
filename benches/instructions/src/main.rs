//! Does one stage of a batch of 1,000, in a function that callgrind can tell from what goes before:
//! `login-etl-instructions read|parse|mask|encode`.

use std::{hint::black_box, time::SystemTime};

use bytes::BytesMut;

use self::{
    event::messages,
    login::{AppVersionEncoding, Columns, Day, Login, ROWS_CAPACITY, Row},
    mask::Keyring,
};

#[allow(dead_code, reason = "used by the product")]
#[path = "../../../src/event.rs"]
mod event;
#[allow(dead_code, reason = "used by the product")]
#[path = "../../../src/login.rs"]
mod login;
#[allow(dead_code, reason = "used by the product")]
#[path = "../../../src/mask.rs"]
mod mask;
#[path = "../../src/sample.rs"]
mod sample;
#[allow(dead_code, reason = "used by the product")]
#[path = "../../../src/scan.rs"]
mod scan;

const MESSAGES: usize = 1_000;
const KEYRING: &str = r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"}"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let stage = std::env::args().nth(1).unwrap_or_default();
    let text = sample::event(MESSAGES);
    let keyring = Keyring::from_json(KEYRING)?;
    let today = Day::of(SystemTime::UNIX_EPOCH);

    let messages = if stage == "read" { counted(|| messages(text.as_bytes())) } else { messages(text.as_bytes()) }?;
    let bodies: Vec<_> = messages.iter().filter_map(|message| message.body().ok()).collect();
    let logins = if stage == "parse" { counted(|| parse(&bodies)) } else { parse(&bodies) };
    let rows =
        if stage == "mask" { counted(|| mask(&logins, &keyring, today)) } else { mask(&logins, &keyring, today) };
    let len = if stage == "encode" { counted(|| encode(&rows)) } else { encode(&rows) };
    assert_eq!((rows.len(), len > 100 * MESSAGES), (MESSAGES, true), "not all of the batch was worked on");
    Ok(())
}

/// What callgrind counts: `--toggle-collect='*counted*'`.
#[inline(never)]
fn counted<T>(work: impl FnOnce() -> T) -> T {
    black_box(work())
}

fn parse<'a>(bodies: &[&'a str]) -> Vec<Login<'a>> {
    bodies.iter().filter_map(|body| Login::scan(body, AppVersionEncoding::Digits)?.ok()).collect()
}

fn mask(logins: &[Login<'_>], keyring: &Keyring, today: Day) -> Vec<Row> {
    let mut buffer = BytesMut::with_capacity(ROWS_CAPACITY);
    logins.iter().filter_map(|login| login.mask(keyring, today, &mut buffer).ok()).collect()
}

/// Into the arrays of a statement's parameters. Returns their bytes.
fn encode(rows: &[Row]) -> usize {
    let mut buffer = BytesMut::new();
    for (column, of_type) in Columns::from_iter(rows).parameters() {
        column.to_sql_checked(&of_type, &mut buffer).ok();
    }
    buffer.len()
}
