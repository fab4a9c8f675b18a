//! Old rows under the active key, in place, while messages flow.
//!
//! The table has no key of its own, so rows are addressed by where they lie: a batch is some blocks of the table. It is
//! read, masked anew, and written back in one statement that changes a row only if it still has the masks that were read.
//! So a kill leaves whole batches behind and nothing else, and two runs at once do no harm. How far a run came is in the
//! data alone: a pass looks at every row there is, and the run ends with a pass that found nothing to do.

use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use login_etl::{
    login::{Field, MASKED},
    mask::Keyring,
};
use serde_json::json;
use tokio::time::sleep;
use tokio_postgres::{
    Client, Row,
    types::{ToSql, Type},
};

use super::rows_by_key;
use crate::{
    find::key_name,
    output::{BAD, Failure, GOOD, Reply, WARNING, count, duration, progress, sql},
    settings::Settings,
};

/// Passes after which a run gives up: something keeps writing under another key.
const PASSES: u32 = 5;

/// What became of the rows.
#[derive(Debug, Default)]
struct Tally {
    read: u64,
    changed: u64,
    /// Rows with a mask that no key of the ring recovers.
    unrecoverable: u64,
    /// Rows with a value whose mask under the active key would not fit the column.
    too_long: u64,
}

/// One table of rows: `user_logins`, or a partition of it.
struct Leaf {
    name: String,
    blocks: i64,
    /// Rows that a block holds, as far as is known.
    density: f64,
}

pub async fn run(settings: &Settings, rate: Option<NonZeroU32>, batch: NonZeroU32) -> Result<Reply, Failure> {
    let keyring = settings.keyring().await?;
    let connection = settings.database().await?;
    let client = &connection.client;
    let started = Instant::now();
    let mut changed = 0;
    let mut passes = 0;
    let last = loop {
        passes += 1;
        let what = if passes == 1 { "Remasking" } else { "Checking " };
        let tally = pass(client, &keyring, rate, batch, what).await?;
        changed += tally.changed;
        if tally.changed == 0 || passes == PASSES {
            break tally;
        }
    };
    // In one statement, so that no row slips past it.
    let active = keyring.active();
    let others: i64 = rows_by_key(client).await?.into_iter().filter(|(id, _)| id != active).map(|(_, rows)| rows).sum();

    let seconds = started.elapsed().as_secs_f64();
    let mut text = format!(
        "{} brought under {}, {} read, in {} ({:.0} rows/s)\n",
        count(changed, "row"),
        key_name(active),
        count(last.read, "row"),
        duration(started.elapsed()),
        changed as f64 / seconds,
    );
    let equal = last.changed == 0 && others == 0 && last.too_long == 0 && last.unrecoverable == 0;
    if equal {
        text += &format!(
            "{GOOD}Checked: every mask is the one that its value has under {}, so equal values are equal.{GOOD:#}\n",
            key_name(active)
        );
    } else {
        if last.unrecoverable > 0 {
            let rows = count(last.unrecoverable, "row");
            text += &format!("{BAD}{rows} with a mask that no key of the ring recovers: left as they are.{BAD:#}\n");
        }
        if last.too_long > 0 {
            let rows = count(last.too_long, "row");
            text += &format!(
                "{WARNING}{rows} with a value that is too long under this key: left as they are.{WARNING:#}\n"
            );
        }
        let late = others.saturating_sub_unsigned(last.unrecoverable + last.too_long);
        if late > 0 || last.changed > 0 {
            text += &format!(
                "{WARNING}Rows still come in under another key; running functions notice a new one within {}. Run this again \
                 then.{WARNING:#}\n",
                duration(settings.secrets_ttl().await?)
            );
        }
    }
    let json = json!({
        "active": active, "changed": changed, "read": last.read, "passes": passes, "unrecoverable": last.unrecoverable,
        "too_long": last.too_long, "rows_under_other_keys": others, "equal_values_are_equal": equal, "seconds": seconds,
    });
    Ok(Reply { no: !equal, ..Reply::new(text, json) })
}

/// Looks at every row that is there when it begins.
async fn pass(
    client: &Client,
    keyring: &Keyring,
    rate: Option<NonZeroU32>,
    batch: NonZeroU32,
    what: &str,
) -> Result<Tally, Failure> {
    let leaves = leaves(client).await?;
    let blocks = leaves.iter().map(|leaf| leaf.blocks).sum::<i64>().unsigned_abs();
    let bar = progress(blocks, &format!("{what} {{bar:30}} {{percent}} %  {{msg}}  {{elapsed}} gone, {{eta}} to go"));
    let mut tally = Tally::default();
    for leaf in &leaves {
        let step = ((f64::from(batch.get()) / leaf.density) as i64).max(1);
        let statements = Statements::new(&leaf.name);
        let mut first = 0;
        while first < leaf.blocks {
            let last = (first + step).min(leaf.blocks);
            let began = Instant::now();
            let before = tally.changed;
            statements.remask(client, keyring, first, last, &mut tally).await?;
            advance(&bar, last - first, &tally);
            if let Some(rate) = rate {
                let due = Duration::from_secs_f64((tally.changed - before) as f64 / f64::from(rate.get()));
                sleep(due.saturating_sub(began.elapsed())).await;
            }
            first = last;
        }
    }
    bar.finish_and_clear();
    Ok(tally)
}

fn advance(bar: &ProgressBar, blocks: i64, tally: &Tally) {
    bar.inc(blocks.unsigned_abs());
    bar.set_message(format!("{} of {} rows changed", tally.changed, tally.read));
}

/// `user_logins`, or all of its partitions.
async fn leaves(client: &Client) -> Result<Vec<Leaf>, Failure> {
    let query = "
        with recursive tree (oid) as (
            select 'user_logins'::regclass::oid
            union all
            select inhrelid from pg_inherits join tree on inhparent = tree.oid
        )
        select oid::regclass::text,
               pg_relation_size(oid) / current_setting('block_size')::bigint,
               case when relpages > 0 and reltuples > 0 then reltuples::float8 / relpages else 50 end
        from pg_class join tree using (oid)
        where relkind = 'r'";
    let rows = client.query(query, &[]).await.map_err(sql("look at the table"))?;
    let leaf = |row: &Row| Leaf { name: row.get(0), blocks: row.get(1), density: row.get::<_, f64>(2).max(1.0) };
    Ok(rows.iter().map(leaf).collect())
}

/// The two statements of a batch.
struct Statements {
    read: String,
    write: String,
}

impl Statements {
    fn new(leaf: &str) -> Self {
        let columns = MASKED.map(|(_, column)| column);
        let each = |form: fn(&str) -> String, separator: &str| columns.map(form).join(separator);
        // A list of places works on every version; ranges of them are scanned from version 14 on only. A block has room for
        // no more line pointers than this, as a row has a header of 24 bytes at least.
        let read = format!(
            "select ctid::text, {} from only {leaf} where ctid = any (array(
                 select format('(%s,%s)', block, line)::tid
                 from generate_series($1::bigint, $2::bigint - 1) block,
                      generate_series(1, (current_setting('block_size')::integer - 24) / 28) line
             ))",
            columns.join(", ")
        );
        let write = format!(
            "update only {leaf} as login set {}
             from unnest($1::text[]::tid[], {}) as batch (ctid, {})
             where login.ctid = any ($1::text[]::tid[]) and login.ctid = batch.ctid and {}",
            each(|column| format!("{column} = batch.new_{column}"), ", "),
            (2..2 + 2 * columns.len()).map(|number| format!("${number}::text[]")).collect::<Vec<_>>().join(", "),
            each(|column| format!("old_{column}, new_{column}"), ", "),
            each(|column| format!("login.{column} is not distinct from batch.old_{column}"), " and "),
        );
        Self { read, write }
    }

    /// Brings the rows of the blocks from `first` to before `end` under the active key.
    async fn remask(
        &self,
        client: &Client,
        keyring: &Keyring,
        first: i64,
        end: i64,
        tally: &mut Tally,
    ) -> Result<(), Failure> {
        let rows = client.query_typed(&self.read, &[(&first, Type::INT8), (&end, Type::INT8)]).await;
        let rows = rows.map_err(sql("read rows"))?;
        tally.read += rows.len() as u64;
        let mut places: Vec<&str> = Vec::new();
        let mut columns: [Column<'_>; MASKED.len()] = Default::default();
        for row in &rows {
            let old: [Option<&str>; MASKED.len()] = std::array::from_fn(|number| row.get(number + 1));
            let new: [_; MASKED.len()] =
                std::array::from_fn(|number| old[number].map(|old| remasked(keyring, MASKED[number].0, old)));
            let says = |answer| new.iter().flatten().any(|new| *new == answer);
            tally.unrecoverable += u64::from(says(Remasked::Unrecoverable));
            tally.too_long += u64::from(says(Remasked::TooLong));
            if !new.iter().flatten().any(|new| matches!(new, Remasked::Changed(_))) {
                continue;
            }
            places.push(row.get(0));
            for (column, (old, new)) in columns.iter_mut().zip(old.into_iter().zip(new)) {
                column.old.push(old);
                column.new.push(match new {
                    Some(Remasked::Changed(masked)) => Some(masked),
                    // One that cannot be changed keeps no other from it.
                    _ => old.map(ToOwned::to_owned),
                });
            }
        }
        if places.is_empty() {
            return Ok(());
        }
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = vec![(&places, Type::TEXT_ARRAY)];
        for column in &columns {
            parameters.push((&column.old, Type::TEXT_ARRAY));
            parameters.push((&column.new, Type::TEXT_ARRAY));
        }
        tally.changed += client.execute_typed(&self.write, &parameters).await.map_err(sql("write rows"))?;
        Ok(())
    }
}

/// A column's masks in the rows of a batch that change, before and after.
#[derive(Default)]
struct Column<'a> {
    old: Vec<Option<&'a str>>,
    new: Vec<Option<String>>,
}

#[derive(PartialEq, Eq)]
enum Remasked {
    Same,
    Changed(String),
    Unrecoverable,
    TooLong,
}

fn remasked(keyring: &Keyring, field: Field, old: &str) -> Remasked {
    let Ok(value) = keyring.recover(field.name(), old) else { return Remasked::Unrecoverable };
    match keyring.mask(field.name(), &field.canonical(&value)) {
        Err(_) => Remasked::TooLong,
        Ok(new) if new.as_str() == old => Remasked::Same,
        Ok(new) => {
            let new = new.as_str();
            // What is about to replace the only copy of a value must be the value's.
            let recovered = keyring.recover(field.name(), new);
            let right = recovered.is_ok_and(|recovered| *recovered == *field.canonical(&value));
            if right { Remasked::Changed(new.to_owned()) } else { Remasked::Unrecoverable }
        }
    }
}
