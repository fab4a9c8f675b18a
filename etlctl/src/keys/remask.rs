//! Remasks old rows under the active key, in place, while messages flow.
//!
//! A batch is read, masked again, and written back with one statement. It changes a row only if the row still has the masks
//! that were read. So a killed run leaves only whole batches, and two runs at once do no harm. Progress is stored nowhere but
//! in the rows: the first pass skips rows that are already under the active key. Later passes read every row, and the run ends
//! with a pass that changed nothing.

use std::{
    cell::Cell,
    time::{Duration, Instant, SystemTime},
};

use anstyle::Style;
use login_etl::{
    keyring::{Keyring, key_id},
    mapping::{Field, Mapping, quoted},
};
use serde_json::json;
use tokio::time::sleep;
use tokio_postgres::{Client, Row};

use super::{
    REMASKING,
    rows::{Changes, Column, RowId, Statements, leaves},
    rows_by_key, unsettled_for, writable,
};
use crate::{
    cli::Remask,
    find::key_name,
    output::{BAD, Failure, GOOD, Reply, WARNING, count, duration, failed, progress, sql},
    settings::Settings,
};

/// Most passes of a run. If the last one still changes rows, something keeps writing under another key.
const PASSES: u32 = 5;

/// How often a run checks that its key is still the active one.
const CHECK: Duration = Duration::from_secs(30);
/// How long a run continues while that check gets no answer.
const UNCHECKED: Duration = Duration::from_secs(300);

/// The keyring of a run. The run ends when another key becomes active.
struct FreshRing<'a> {
    settings: &'a Settings,
    ring: Keyring,
    /// Wall-clock time, because the monotonic clock stops while the machine sleeps.
    checked: Cell<SystemTime>,
}

impl<'a> FreshRing<'a> {
    async fn read(settings: &'a Settings) -> Result<Self, Failure> {
        Ok(Self { settings, ring: settings.keyring().await?, checked: Cell::new(SystemTime::now()) })
    }

    /// Fails if another key has become active. Reads the keyring only if the last check is at least `age` ago.
    async fn check(&self, age: Duration) -> Result<(), Failure> {
        if self.checked.get().elapsed().is_ok_and(|elapsed| elapsed < age) {
            return Ok(());
        }
        let now = match self.settings.keyring().await {
            Ok(now) => now,
            // A short network failure must not end hours of work.
            Err(_) if self.checked.get().elapsed().is_ok_and(|elapsed| elapsed < UNCHECKED) => return Ok(()),
            Err(failure) => return Err(failure),
        };
        self.checked.set(SystemTime::now());
        if now.active() == self.ring.active() {
            return Ok(());
        }
        Err(failed(format!(
            "{} was made active meanwhile: run this again, to bring all rows under it",
            key_name(now.active())
        )))
    }
}

/// Counts of rows by outcome.
#[derive(Debug, Default)]
struct Tally {
    read: u64,
    changed: u64,
    /// Rows with a mask that no key of the ring recovers.
    unrecoverable: u64,
    /// Rows with a one-way mask.
    one_way: u64,
    /// Rows with a value that is too long to mask under the active key.
    too_long: u64,
}

pub async fn run(settings: &Settings, options: &Remask) -> Result<Reply, Failure> {
    if settings.mapping.recoverable().next().is_none() {
        return Err(failed("every masked column of the mapping is one-way: its masks stay as they are"));
    }
    let connection = settings.database().await?;
    let client = &connection.client;
    writable(client).await?;
    // Held until the session ends, so that the key that rows are remasked with is not retired meanwhile.
    let locked = client.query_one("select pg_try_advisory_lock_shared($1)", &[&REMASKING]).await;
    if !locked.map_err(sql("see whether a key is being retired"))?.get::<_, bool>(0) {
        return Err(failed("a key is being retired just now: try again"));
    }
    let keyring = FreshRing::read(settings).await?;
    if keyring.ring.is_one_way(keyring.ring.active()) {
        return Err(failed(
            "the active key is an hmac-sha256 key: nobody could recover rows that are remasked under it. Activate another \
             key first",
        ));
    }
    if !options.anyway {
        is_of_this_table(client, &settings.mapping, &keyring.ring).await?;
    }
    // Read before the work, so that an error shows early.
    let unsettled = unsettled_for(settings).await?;
    let started = Instant::now();
    let mut changed = 0;
    let mut passes = 0;
    let last = loop {
        passes += 1;
        let what = if passes == 1 { "Remasking" } else { "Checking " };
        let tally = pass(client, &keyring, options, passes > 1, what).await?;
        keyring.check(Duration::ZERO).await?;
        changed += tally.changed;
        // The first pass skips rows under the active key, so it does not check every row.
        if passes > 1 && (tally.changed == 0 || passes == PASSES) {
            break tally;
        }
    };
    // One statement sees one snapshot, so no row is missed.
    let active = keyring.ring.active();
    let others = rows_by_key(&settings.mapping, settings.mapping.recoverable(), client)
        .await?
        .into_iter()
        .filter(|(id, _)| id != active)
        .map(|(_, rows)| rows)
        .sum();
    let took = started.elapsed();
    Ok(Run { active, changed, passes, last, others, unsettled: unsettled.saturating_sub(took), took }.reply())
}

/// The results of a run.
struct Run<'a> {
    active: &'a str,
    changed: u64,
    passes: u32,
    /// The last pass, which read every row.
    last: Tally,
    /// Rows that are not under the active key.
    others: i64,
    /// How much longer functions may mask under another key.
    unsettled: Duration,
    took: Duration,
}

impl Run<'_> {
    fn reply(&self) -> Reply {
        let Self { last, others, .. } = self;
        let active = key_name(self.active);
        let rate = self.changed as f64 / self.took.as_secs_f64();
        let (changed, read) = (count(self.changed, "row"), count(last.read, "row"));
        let took = duration(self.took);
        let mut text = format!("{changed} remasked with {active}, {read} read, in {took} ({rate:.0} rows/s)\n");
        let mut say = |style: Style, said: String| text += &format!("{style}{said}{style:#}\n");

        let equal =
            last.changed == 0 && *others == 0 && last.too_long == 0 && last.unrecoverable == 0 && last.one_way == 0;
        if equal {
            say(GOOD, format!("Checked: every value has its mask under {active}, so equal values have equal masks."));
        }
        if last.unrecoverable > 0 {
            let rows = count(last.unrecoverable, "row");
            say(BAD, format!("{rows} with a mask that no key of the keyring recovers: left as they are."));
        }
        if last.one_way > 0 {
            let rows = count(last.one_way, "row");
            say(WARNING, format!("{rows} with a one-way mask (hmac-sha256): they keep it for ever."));
        }
        if last.too_long > 0 {
            let rows = count(last.too_long, "row");
            say(WARNING, format!("{rows} with a value that is too long under this key: left as they are."));
        }
        let late = others.saturating_sub_unsigned(last.unrecoverable + last.one_way + last.too_long);
        if late > 0 || last.changed > 0 {
            say(WARNING, "Rows still come in under another key: run this again.".to_owned());
        }
        if !self.unsettled.is_zero() {
            let time = duration(self.unsettled);
            let until = format!("Functions that have not read the new keyring may use another key for up to {time}.");
            say(WARNING, format!("{until}\nThen run this again."));
        }
        let json = json!({
            "active": self.active, "changed": self.changed, "read": last.read, "passes": self.passes,
            "unrecoverable": last.unrecoverable, "one_way": last.one_way, "too_long": last.too_long, "rows_under_other_keys": others,
            "equal_values_are_equal": equal, "settled_in_seconds": self.unsettled.as_secs(),
            "seconds": self.took.as_secs_f64(),
        });
        Reply { no: !equal, ..Reply::new(text, json) }
    }
}

/// Fails if most masks of a sample cannot be recovered. Not all need to fail: a wrong key sometimes recovers an `aes-cbc` mask,
/// to garbage.
async fn is_of_this_table(client: &Client, mapping: &Mapping, keyring: &Keyring) -> Result<(), Failure> {
    let (columns, fields): (Vec<_>, Vec<_>) =
        mapping.recoverable().map(|(column, field)| (quoted(&column.name), field)).unzip();
    let query = format!("select {} from {} limit 1000", columns.join(", "), mapping.table());
    let some = client.query(&query, &[]).await.map_err(sql("read rows"))?;
    let masks = some.iter().flat_map(|row| {
        fields.iter().enumerate().filter_map(|(number, field)| Some((*field, row.get::<_, Option<&str>>(number)?)))
    });
    let masks = masks.filter(|(_, mask)| !keyring.is_one_way(key_id(mask)));
    let lost = |(field, mask): &(&Field, &str)| keyring.recover(&field.path, mask).is_err();
    let (lost, good): (Vec<_>, Vec<_>) = masks.partition(lost);
    if lost.len() > good.len() {
        return Err(failed(format!(
            "{} of {} masks cannot be recovered: is this the keyring of this table? Nothing was written; --anyway goes on",
            lost.len(),
            lost.len() + good.len()
        )));
    }
    Ok(())
}

/// Reads every row that exists when the pass begins, or with `all` unset, only those not under the active key.
async fn pass(
    client: &Client,
    keyring: &FreshRing<'_>,
    options: &Remask,
    all: bool,
    what: &str,
) -> Result<Tally, Failure> {
    let mapping = &keyring.settings.mapping;
    let leaves = leaves(mapping, client).await?;
    let blocks = leaves.iter().map(|leaf| leaf.blocks).sum::<i64>().unsigned_abs();
    let bar = progress(blocks, &format!("{what} {{bar:30}} {{percent}} %  {{msg}}  {{elapsed}} gone, {{eta}} to go"));
    let mut tally = Tally::default();
    for leaf in &leaves {
        let rows = i64::from(options.rate.map_or(options.batch, |rate| rate.min(options.batch)).get());
        let active = keyring.ring.active();
        let statements = Statements::new(mapping, &leaf.name, rows, if all { None } else { Some(active) });
        let mut from = RowId::START;
        while from.block < leaf.blocks {
            let began = Instant::now();
            let before = tally.changed;
            keyring.check(CHECK).await?;
            let (rows, next) = statements.read(client, from, leaf.blocks).await?;
            remask(client, mapping, &keyring.ring, &statements, &rows, &mut tally).await?;
            bar.inc((next.block - from.block).unsigned_abs());
            bar.set_message(format!("{} of {} rows changed", tally.changed, tally.read));
            if let Some(rate) = options.rate {
                let due = Duration::from_secs_f64((tally.changed - before) as f64 / f64::from(rate.get()));
                sleep(due.saturating_sub(began.elapsed())).await;
            }
            from = next;
        }
    }
    bar.finish_and_clear();
    Ok(tally)
}

/// Brings a batch's rows under the active key.
async fn remask(
    client: &Client,
    mapping: &Mapping,
    keyring: &Keyring,
    statements: &Statements,
    rows: &[Row],
    tally: &mut Tally,
) -> Result<(), Failure> {
    let mut changes =
        Changes { row_ids: Vec::new(), columns: mapping.recoverable().map(|_| Column::default()).collect() };
    tally.read += rows.len() as u64;
    for row in rows {
        let (old, new): (Vec<Option<&str>>, Vec<_>) = (1..)
            .zip(mapping.recoverable())
            .map(|(number, (_, field))| {
                let old: Option<&str> = row.get(number);
                (old, old.map(|old| remasked(keyring, field, old)))
            })
            .unzip();
        let says = |answer| new.iter().flatten().any(|new| *new == answer);
        tally.unrecoverable += u64::from(says(Remasked::Unrecoverable));
        tally.one_way += u64::from(says(Remasked::OneWay));
        tally.too_long += u64::from(says(Remasked::TooLong));
        if !new.iter().flatten().any(|new| matches!(new, Remasked::Changed(_))) {
            continue;
        }
        changes.row_ids.push(row.get(0));
        for (column, (old, new)) in changes.columns.iter_mut().zip(old.into_iter().zip(new)) {
            column.old.push(old);
            column.new.push(match new {
                Some(Remasked::Changed(masked)) => Some(masked),
                // If this column cannot be changed, the others still are.
                _ => old.map(ToOwned::to_owned),
            });
        }
    }
    if !changes.row_ids.is_empty() {
        tally.changed += statements.write(client, &changes).await?;
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Remasked {
    Same,
    Changed(String),
    Unrecoverable,
    OneWay,
    TooLong,
}

fn remasked(keyring: &Keyring, field: &Field, old: &str) -> Remasked {
    if keyring.is_one_way(key_id(old)) {
        return Remasked::OneWay;
    }
    let Ok(value) = keyring.recover(&field.path, old) else { return Remasked::Unrecoverable };
    let value = field.normalized(&value).unwrap_or(std::borrow::Cow::Borrowed(&value));
    match keyring.mask(&field.path, &value) {
        Err(_) => Remasked::TooLong,
        Ok(new) if new.as_str() == old => Remasked::Same,
        Ok(new) => {
            let new = new.as_str();
            // The new mask replaces the only copy of the value, so check that it recovers the value.
            let recovered = keyring.recover(&field.path, new);
            let right = recovered.is_ok_and(|recovered| *recovered == *value);
            if right { Remasked::Changed(new.to_owned()) } else { Remasked::Unrecoverable }
        }
    }
}
