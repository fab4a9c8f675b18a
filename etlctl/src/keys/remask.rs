//! Old rows under the active key, in place, while messages flow.
//!
//! The table has no key of its own, so rows are addressed by where they lie: a batch is some blocks of the table. It is
//! read, masked anew, and written back in one statement that changes a row only if it still has the masks that were read.
//! So a kill leaves whole batches behind and nothing else, and two runs at once do no harm. How far a run came is in the
//! data alone: a pass looks at every row there is, and the run ends with a pass that found nothing to do.

use std::{
    cell::Cell,
    time::{Duration, Instant, SystemTime},
};

use login_etl::{
    login::{Field, MASKED},
    mask::Keyring,
};
use serde_json::json;
use tokio::time::sleep;
use tokio_postgres::{
    Client,
    error::SqlState,
    types::{ToSql, Type},
};

use super::{REMASKING, rows_by_key, unsettled_for, writable};
use crate::{
    cli::Remask,
    find::key_name,
    output::{BAD, Failure, GOOD, Reply, WARNING, count, duration, failed, progress, sql},
    settings::Settings,
};

/// Passes after which a run gives up: something keeps writing under another key.
const PASSES: u32 = 5;

/// Rows that a full block holds, roughly. Where there are more, a batch ends amid its last block.
const ROWS_A_BLOCK: i64 = 50;
/// How often a run looks whether the key that it brings rows under is still the active one.
const CHECK: Duration = Duration::from_secs(30);
/// For how long it may go on without an answer to that.
const UNCHECKED: Duration = Duration::from_secs(300);

/// The keyring of a run, which ends when another key becomes active.
struct FreshRing<'a> {
    settings: &'a Settings,
    ring: Keyring,
    /// By the wall clock: the monotonic one stands still while the machine sleeps.
    checked: Cell<SystemTime>,
}

impl<'a> FreshRing<'a> {
    async fn read(settings: &'a Settings) -> Result<Self, Failure> {
        Ok(Self { settings, ring: settings.keyring().await?, checked: Cell::new(SystemTime::now()) })
    }

    /// Fails if another key has become active since; asks only if the last answer is older than this.
    async fn check(&self, age: Duration) -> Result<(), Failure> {
        if self.checked.get().elapsed().is_ok_and(|elapsed| elapsed < age) {
            return Ok(());
        }
        let now = match self.settings.keyring().await {
            Ok(now) => now,
            // A glitch of the network need not end hours of work.
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
}

pub async fn run(settings: &Settings, options: &Remask) -> Result<Reply, Failure> {
    let connection = settings.database().await?;
    let client = &connection.client;
    writable(client).await?;
    // Held until the session ends, however that comes about, so that no key goes that rows are being brought under.
    let locked = client.query_one("select pg_try_advisory_lock_shared($1)", &[&REMASKING]).await;
    if !locked.map_err(sql("see whether a key is being retired"))?.get::<_, bool>(0) {
        return Err(failed("a key is being retired just now: try again"));
    }
    let keyring = FreshRing::read(settings).await?;
    if !options.anyway {
        is_of_this_table(client, &keyring.ring).await?;
    }
    let started = Instant::now();
    let mut changed = 0;
    let mut passes = 0;
    let last = loop {
        passes += 1;
        let what = if passes == 1 { "Remasking" } else { "Checking " };
        let tally = pass(client, &keyring, options, passes > 1, what).await?;
        keyring.check(Duration::ZERO).await?;
        changed += tally.changed;
        // The first pass leaves out what has the active key already.
        if passes > 1 && (tally.changed == 0 || passes == PASSES) {
            break tally;
        }
    };
    // In one statement, so that no row slips past it.
    let active = keyring.ring.active();
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
    let unsettled = unsettled_for(settings).await?;
    if equal && !unsettled.is_zero() {
        text += &format!(
            "{WARNING}Functions that have not noticed the new key may still add rows under another, for {} at most: run this again \
             then.{WARNING:#}\n",
            duration(unsettled)
        );
    }
    let json = json!({
        "settled_in_seconds": unsettled.as_secs(), "active": active, "changed": changed, "read": last.read, "passes": passes, "unrecoverable": last.unrecoverable,
        "too_long": last.too_long, "rows_under_other_keys": others, "equal_values_are_equal": equal, "seconds": seconds,
    });
    Ok(Reply { no: !equal, ..Reply::new(text, json) })
}

/// A key that is not the table's recovers next to nothing; but now and then an `aes-cbc` mask, to garbage.
async fn is_of_this_table(client: &Client, keyring: &Keyring) -> Result<(), Failure> {
    let columns = MASKED.map(|(_, column)| column).join(", ");
    let some = client.query(&format!("select {columns} from user_logins limit 1000"), &[]).await;
    let some = some.map_err(sql("read rows"))?;
    let masks = some
        .iter()
        .flat_map(|row| (0..MASKED.len()).filter_map(|number| Some((number, row.get::<_, Option<&str>>(number)?))));
    let lost = |(number, mask): &(usize, &str)| keyring.recover(MASKED[*number].0.name(), mask).is_err();
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

/// Looks at every row that is there when it begins.
async fn pass(
    client: &Client,
    keyring: &FreshRing<'_>,
    options: &Remask,
    all: bool,
    what: &str,
) -> Result<Tally, Failure> {
    let leaves = leaves(client).await?;
    let blocks = leaves.iter().map(|leaf| leaf.blocks).sum::<i64>().unsigned_abs();
    let bar = progress(blocks, &format!("{what} {{bar:30}} {{percent}} %  {{msg}}  {{elapsed}} gone, {{eta}} to go"));
    let mut tally = Tally::default();
    for leaf in &leaves {
        let rows = i64::from(options.rate.map_or(options.batch, |rate| rate.min(options.batch)).get());
        let active = keyring.ring.active();
        let statements = Statements::new(&leaf.name, rows, if all { None } else { Some(active) });
        let mut place = Place { block: 0, line: 0 };
        while place.block < leaf.blocks {
            let end = (place.block + rows / ROWS_A_BLOCK + 1).min(leaf.blocks);
            let began = Instant::now();
            let before = tally.changed;
            keyring.check(CHECK).await?;
            let next = statements.remask(client, &keyring.ring, place, end, &mut tally).await?;
            bar.inc((next.block - place.block).unsigned_abs());
            bar.set_message(format!("{} of {} rows changed", tally.changed, tally.read));
            if let Some(rate) = options.rate {
                let due = Duration::from_secs_f64((tally.changed - before) as f64 / f64::from(rate.get()));
                sleep(due.saturating_sub(began.elapsed())).await;
            }
            place = next;
        }
    }
    bar.finish_and_clear();
    Ok(tally)
}

/// Where a row lies: its block, from 0, and its line pointer there, from 1. What comes after it is still to be done.
#[derive(Clone, Copy)]
struct Place {
    block: i64,
    line: i32,
}

impl Place {
    /// From the text form of a `ctid`, `(block,line)`.
    fn parse(ctid: &str) -> Option<Self> {
        let (block, line) = ctid.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
        Some(Self { block: block.parse().ok()?, line: line.parse().ok()? })
    }
}

/// `user_logins`, or all of its partitions.
async fn leaves(client: &Client) -> Result<Vec<Leaf>, Failure> {
    let query = "
        with recursive tree (oid) as (
            select 'user_logins'::regclass::oid
            union all
            select inhrelid from pg_inherits join tree on inhparent = tree.oid
        )
        select tree.oid::regclass::text, pg_relation_size(tree.oid) / current_setting('block_size')::bigint
        from pg_class join tree on pg_class.oid = tree.oid
        where relkind = 'r'";
    let rows = client.query(query, &[]).await.map_err(sql("look at the table"))?;
    Ok(rows.iter().map(|row| Leaf { name: row.get(0), blocks: row.get(1) }).collect())
}

/// The two statements of a batch.
struct Statements {
    leaf: String,
    /// Most rows of a batch.
    rows: i64,
    read: String,
    write: String,
}

impl Statements {
    /// Rows that are under the key `but` are not read.
    fn new(leaf: &str, rows: i64, but: Option<&str>) -> Self {
        let columns = MASKED.map(|(_, column)| column);
        let each = |form: fn(&str) -> String, separator: &str| columns.map(form).join(separator);
        let done = match but {
            None => "false".to_owned(),
            Some("") => columns.map(|column| format!("coalesce(position(':' in {column}) = 0, true)")).join(" and "),
            // A key's id has no quotes in it.
            Some(id) => columns
                .map(|column| format!("coalesce(left({column}, {}) = '{id}:', true)", id.len() + 1))
                .join(" and "),
        };
        // A list of places works on every version; ranges of them are scanned from version 14 on only. A block has room for
        // no more line pointers than this, as a row has a header of 24 bytes at least.
        let read = format!(
            "select login.ctid::text, {} from only {leaf} as login where login.ctid = any (array(
                 select format('(%s,%s)', block, line)::tid
                 from generate_series($1::bigint, $3::bigint - 1) block,
                      generate_series(1, (current_setting('block_size')::integer - 24) / 28) line
                 where block > $1 or line > $2::integer
             )) and not ({done}) order by login.ctid limit {rows}",
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
        Self { leaf: leaf.to_owned(), rows, read, write }
    }

    fn no_right(&self, error: tokio_postgres::Error, what: &str) -> Failure {
        if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
            return sql(what)(error);
        }
        let columns = MASKED.map(|(_, column)| column).join(", ");
        failed(format!(
            "your database user may not remask {0}: be in the role login_etl_operator, and let the owner `grant select, update \
             ({columns}) on {0} to login_etl_operator`",
            self.leaf
        ))
    }

    /// Brings rows under the active key: those after `place`, up to the block before `end` or as many as a batch may have.
    /// Returns where to go on.
    async fn remask(
        &self,
        client: &Client,
        keyring: &Keyring,
        place: Place,
        end: i64,
        tally: &mut Tally,
    ) -> Result<Place, Failure> {
        let parameters: [(&(dyn ToSql + Sync), Type); 3] =
            [(&place.block, Type::INT8), (&place.line, Type::INT4), (&end, Type::INT8)];
        let rows = client.query_typed(&self.read, &parameters).await;
        let rows = rows.map_err(|error| self.no_right(error, "read rows"))?;
        tally.read += rows.len() as u64;
        let is_full = rows.len() as i64 == self.rows;
        let last = rows.last().filter(|_| is_full).and_then(|row| Place::parse(row.get(0)));
        let next = last.unwrap_or(Place { block: end, line: 0 });
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
            return Ok(next);
        }
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = vec![(&places, Type::TEXT_ARRAY)];
        for column in &columns {
            parameters.push((&column.old, Type::TEXT_ARRAY));
            parameters.push((&column.new, Type::TEXT_ARRAY));
        }
        tally.changed +=
            client.execute_typed(&self.write, &parameters).await.map_err(|error| self.no_right(error, "write rows"))?;
        Ok(next)
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
