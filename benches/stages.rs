//! What the parts of a batch of 100 take, without a database: `cargo bench -p login-etl-benches`.

use std::{
    hint::black_box,
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use login_etl::{
    event::messages,
    login::{AppVersionEncoding, Columns, Day, Login, ROWS_CAPACITY, Row},
    mask::Keyring,
};
use login_etl_benches::sample;
use serde_json::json;

const MESSAGES: usize = 100;

#[expect(clippy::unwrap_used, reason = "the event is ours")]
fn stages(criterion: &mut Criterion) {
    let keyring = |cipher| {
        let key = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4";
        let keys = json!({"active": "k", "keys": {"k": {"cipher": cipher, "key": key}}});
        Keyring::from_json(&keys.to_string()).unwrap()
    };
    let (cbc, siv) = (keyring("aes-cbc"), keyring("aes-siv"));
    let today = Day::of(SystemTime::now());
    let text = sample::event(MESSAGES);
    let read = || messages(black_box(text.as_bytes())).unwrap();
    let bodies: Vec<_> = read().iter().map(|message| message.body().unwrap()).collect();
    let parse = || bodies.iter().map(|body| Login::scan(body, AppVersionEncoding::Digits).unwrap().unwrap());
    let logins: Vec<_> = parse().collect();
    let mut buffer = BytesMut::with_capacity(ROWS_CAPACITY);
    let rows: Vec<Row> = logins.iter().map(|login| login.mask(&cbc, today, &mut buffer).unwrap()).collect();

    let mut group = criterion.benchmark_group("of 100 messages");
    group.throughput(Throughput::Elements(MESSAGES as u64)).sample_size(50).measurement_time(Duration::from_secs(3));
    group.bench_function("read the event", |bencher| {
        bencher.iter(|| black_box(read()).len());
    });
    group.bench_function("parse the bodies", |bencher| {
        bencher.iter(|| parse().for_each(|login| drop(black_box(login))))
    });
    for (name, keyring) in [("mask, aes-cbc", &cbc), ("mask, aes-siv", &siv)] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| logins.iter().for_each(|login| drop(black_box(login.mask(keyring, today, &mut buffer)))));
        });
    }
    group.bench_function("turn rows into columns", |bencher| {
        bencher.iter(|| Columns::from_iter(black_box(&rows)));
    });
    group.finish();
}

criterion_group!(benches, stages);
criterion_main!(benches);
