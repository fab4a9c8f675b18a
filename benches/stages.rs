//! Times the stages of a batch of 100 messages, without a database: `cargo bench -p login-etl-benches`.

use std::{
    hint::black_box,
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use login_etl::{
    event::messages,
    keyring::Keyring,
    mapping::{Envelope, Mapping, ROWS_CAPACITY},
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
    let mapping = Mapping::built_in().unwrap();
    let text = sample::event(MESSAGES);
    let read = || messages(black_box(text.as_bytes())).unwrap();
    let messages = read();
    let mut buffer = BytesMut::with_capacity(ROWS_CAPACITY);

    let mut group = criterion.benchmark_group("of 100 messages");
    group.throughput(Throughput::Elements(MESSAGES as u64)).sample_size(50).measurement_time(Duration::from_secs(3));
    group.bench_function("read the event", |bencher| {
        bencher.iter(|| black_box(read()).len());
    });
    for (name, keyring) in [("bodies into rows, aes-cbc", &cbc), ("bodies into rows, aes-siv", &siv)] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for message in &messages {
                    let envelope = Envelope {
                        message_id: message.id().unwrap(),
                        sent: message.sent(),
                        queue: None,
                        now: SystemTime::UNIX_EPOCH,
                    };
                    let row = mapping.row_of_json_string(message.body().unwrap(), &envelope, keyring, &mut buffer);
                    drop(black_box(row));
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, stages);
criterion_main!(benches);
