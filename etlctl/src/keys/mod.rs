//! Lists, adds, activates and retires the keyring's keys.

mod remask;
mod ring;
mod rows;

use std::{collections::BTreeMap, time::Duration};

use jiff::Zoned;
use login_etl::{
    keyring::{KEY_ID_MAX, is_key_id},
    mapping::{Column, Field, Mapping, quoted},
};
use serde_json::json;
use tokio_postgres::{Client, GenericClient};

use self::ring::RingSecret;
pub use self::ring::age;
use crate::{
    cli::Keys,
    find::key_name,
    output::{Failure, GOOD, Reply, WARNING, confirm, count, duration, failed, spinner, sql, table, time},
    settings::Settings,
};

/// The longest that an invocation uses the keyring that it began with: 15 minutes, and a minute more if the ring could not be
/// read again in time. While Secrets Manager refuses, an environment keeps its ring, however old; an alarm shows that.
const LONGEST_INVOCATION: Duration = Duration::from_secs(16 * 60);

/// Number of the advisory lock that remasking takes shared and retiring takes exclusively. Arbitrary.
const REMASKING: i64 = 0x6c6f_6769_6e72_6d6b;

pub async fn run(settings: &Settings, command: &Keys) -> Result<Reply, Failure> {
    if settings.mapping.masked().next().is_none() {
        return Err(failed("the mapping masks no field, so nothing depends on a key"));
    }
    match command {
        Keys::List { no_rows } => list(settings, *no_rows).await,
        Keys::Add { id, cipher } => add(settings, id.as_deref(), cipher).await,
        Keys::Activate { id, one_way } => activate(settings, id, *one_way).await,
        Keys::Remask(options) => remask::run(settings, options).await,
        Keys::Retire { id, yes } => retire(settings, id, *yes).await,
    }
}

async fn list(settings: &Settings, no_rows: bool) -> Result<Reply, Failure> {
    let secret = RingSecret::read(settings).await?;
    let keyring = settings.keyring().await?;
    let ciphers: BTreeMap<_, _> = keyring.keys().collect();
    let rows = if no_rows {
        None
    } else {
        Some(all_rows_by_key(&settings.mapping, &settings.database().await?.client).await?)
    };
    let counted = |id: &str| rows.as_ref().map(|rows| rows.get(id).copied().unwrap_or(0));

    let mut shown = Vec::new();
    let mut listed = Vec::new();
    for (id, key) in &secret.ring.keys {
        let (active, one_way) = (*id == secret.ring.active, secret.ring.one_way.as_ref() == Some(id));
        let created = key.created.map(|at| at.strftime("%Y-%m-%d").to_string());
        let age = key.created.map_or("unknown".to_owned(), |at| duration(age(at)));
        let rows = counted(id).map(|rows| rows.to_string());
        shown.push(vec![
            key_name(id).to_owned(),
            ciphers.get(id.as_str()).copied().unwrap_or_default().to_owned(),
            key_use(active, one_way).to_owned(),
            created.clone().unwrap_or_default(),
            age,
            rows.clone().unwrap_or_default(),
        ]);
        listed.push(json!({
            "id": id, "cipher": ciphers.get(id.as_str()), "active": active, "one_way": one_way, "created": key.created.map(time),
            "replaced": key.replaced.map(time), "rows": counted(id),
        }));
    }
    let strangers: Vec<_> = rows.iter().flatten().filter(|(id, _)| !secret.ring.keys.contains_key(*id)).collect();
    let mut text = table(&["key", "cipher", "", "made", "age", "rows"], shown);
    for (id, rows) in &strangers {
        text += &format!(
            "\n{WARNING}{} masked with {}, which is not in the keyring: without that key they cannot be recovered.{WARNING:#}\n",
            count(**rows, "row"),
            key_name(id)
        );
    }
    let others: i64 = rows.iter().flatten().filter(|(id, _)| !secret.ring.is_used(id)).map(|(_, rows)| rows).sum();
    if others > 0 {
        text +=
            &format!("\n{} not under the active key; `etlctl keys remask` brings them there.\n", count(others, "row"));
    }
    let no = !strangers.is_empty();
    let strangers: BTreeMap<_, _> = strangers.into_iter().collect();
    let json = json!({"active": secret.ring.active, "one_way": secret.ring.one_way, "keys": listed, "rows_of_unknown_keys": strangers});
    Ok(Reply { no, ..Reply::new(text, json) })
}

async fn add(settings: &Settings, id: Option<&str>, cipher: &str) -> Result<Reply, Failure> {
    let this_month = Zoned::now().strftime("%Y-%m").to_string();
    let id = id.unwrap_or(&this_month);
    if id.is_empty() || !is_key_id(id) {
        return Err(Failure::Usage(format!("invalid key id {id:?}: use 1 to {KEY_ID_MAX} of a-z 0-9 . _ -")));
    }
    let mut secret = RingSecret::read(settings).await?;
    if secret.was_retired(id).await? {
        return Err(Failure::Usage(format!(
            "a key {id:?} was retired: its masks in backups and copies would look like those of the new one. Give the new key another id"
        )));
    }
    secret.ring.add(id, cipher)?;
    secret.write().await?;
    let text = format!(
        "{GOOD}The key {id:?} is in the keyring.{GOOD:#} It masks nothing yet: run `etlctl keys activate {id}` to mask new \
         rows with it.\nBack the keyring up first: without the key, its masks cannot be recovered.\n"
    );
    Ok(Reply::new(text, json!({"added": id, "cipher": cipher})))
}

async fn activate(settings: &Settings, id: &str, one_way: bool) -> Result<Reply, Failure> {
    let mut secret = RingSecret::read(settings).await?;
    let now = if one_way { secret.ring.one_way.as_deref() } else { Some(&*secret.ring.active) };
    if now == Some(id) {
        let text = format!("{} is active already.\n", key_name(id));
        return Ok(Reply::new(text, json!({"active": id, "before": id})));
    }
    let ttl = settings.secrets_ttl().await?;
    let fitted = settings.keyring().await?.longest();
    let before = secret.ring.activate(id, one_way)?;
    secret.write().await?;
    let fit = settings.keyring().await?.longest();
    if one_way {
        let text = format!(
            "{GOOD}{} is active for one-way masks.{GOOD:#} Running functions use it within {}, new ones at once. Masks of another \
             key stay, because nobody can recover their values: equal values of old and new rows have different masks.\n",
            key_name(id),
            duration(ttl)
        );
        return Ok(Reply::new(text, json!({"one_way": id, "before": before, "in_use_within_seconds": ttl.as_secs()})));
    }
    let mut text = format!(
        "{GOOD}{} is active.{GOOD:#} Running functions use it within {}, new ones at once. Then run `etlctl keys remask`:\n\
         until it has finished, equal values of old and new rows have different masks.\n",
        key_name(id),
        duration(ttl)
    );
    if fit < fitted {
        text += &format!(
            "{WARNING}Values of {} to {fitted} bytes were masked until now, but are too long for this key: their messages are refused.{WARNING:#}\n",
            fit + 1
        );
    }
    Ok(Reply::new(
        text,
        json!({"active": id, "before": before, "longest_value": fit, "in_use_within_seconds": ttl.as_secs()}),
    ))
}

async fn retire(settings: &Settings, id: &str, yes: bool) -> Result<Reply, Failure> {
    let mut secret = RingSecret::read(settings).await?;
    let key = secret.ring.key(id)?;
    if secret.ring.is_used(id) {
        return Err(failed(format!("{} is active: activate another key first", key_name(id))));
    }
    // Without `replaced`, the key was replaced when the ring was last written, at the latest.
    let (since, event) = key.replaced.map_or((secret.written, "the keyring was changed"), |at| (at, "it was replaced"));
    let unused_for = age(since);
    if settings.get("FUNCTION_NAME").or_else(|| settings.get("SECRETS_TTL")).is_none() {
        return Err(failed(
            "cannot tell how long functions keep a keyring: name the stack (--stack) or the function (--function)",
        ));
    }
    let wait = settings.secrets_ttl().await? + LONGEST_INVOCATION;
    if unused_for < wait {
        return Err(failed(format!(
            "running functions may still mask under {}: {event} {} ago, and they keep a keyring for up to {}. Try again in {}",
            key_name(id),
            duration(unused_for),
            duration(wait),
            duration(wait - unused_for + Duration::from_secs(1)),
        )));
    }
    let connection = settings.database().await?;
    writable(&connection.client).await?;
    let alone = connection.client.query_one("select pg_try_advisory_lock($1)", &[&REMASKING]).await;
    if !alone.map_err(sql("see whether rows are being remasked"))?.get::<_, bool>(0) {
        return Err(failed("a remask is running, perhaps to this key: wait for its end, or stop it"));
    }
    let rows = all_rows_by_key(&settings.mapping, &connection.client).await?.get(id).copied().unwrap_or(0);
    if rows > 0 {
        return Err(failed(format!(
            "{} masked under {}: `etlctl keys remask` brings them under the active key, and says which it cannot recover",
            count(rows, "row"),
            key_name(id)
        )));
    }
    let question = format!(
        "Remove {} from the keyring? No row of this database uses it, but masks in backups and copies are lost without it.",
        key_name(id)
    );
    confirm(&question, yes)?;
    let label = secret.keep_as(&ring::retired(id)).await?;
    secret.ring.keys.remove(id);
    secret.write().await?;
    let text = format!(
        "{GOOD}{} is removed from the keyring.{GOOD:#} The secret's version that has it is kept under the label {label} until you \
         remove the label.\n",
        key_name(id)
    );
    Ok(Reply::new(text, json!({"retired": id})))
}

/// How much longer functions may mask under a key that was replaced.
async fn unsettled_for(settings: &Settings) -> Result<Duration, Failure> {
    let ring = RingSecret::read(settings).await?.ring;
    let wait = settings.secrets_ttl().await? + LONGEST_INVOCATION;
    let latest = ring.keys.values().filter_map(|key| key.replaced).max();
    Ok(latest.map_or(Duration::ZERO, |at| wait.saturating_sub(age(at))))
}

/// Refuses a standby: it has its own locks, and may lag behind.
async fn writable(client: &Client) -> Result<(), Failure> {
    let standby = client.query_one("select pg_is_in_recovery()", &[]).await.map_err(sql("look at the server"))?;
    if standby.get(0) { Err(failed("this server is a standby: connect to the primary")) } else { Ok(()) }
}

/// The key's use, for a table's cell.
pub fn key_use(active: bool, one_way: bool) -> &'static str {
    match (active, one_way) {
        (true, true) => "active, one-way",
        (true, false) => "active",
        (false, true) => "one-way",
        (false, false) => "",
    }
}

/// The number of rows with a mask of each key in any column, by key id. Reads the whole table.
async fn all_rows_by_key(mapping: &Mapping, client: &impl GenericClient) -> Result<BTreeMap<String, i64>, Failure> {
    rows_by_key(mapping, mapping.masked(), client).await
}

/// The number of rows with a mask of each key in any of these columns.
async fn rows_by_key<'a>(
    mapping: &Mapping,
    columns: impl Iterator<Item = (&'a Column, &'a Field)>,
    client: &impl GenericClient,
) -> Result<BTreeMap<String, i64>, Failure> {
    let _spinner = spinner("Counting rows by key");
    // A mask is `id:Base64`, or bare Base64 under the unnamed key. Base64 has no colon.
    let id = |column: &str| {
        format!("case when {column} like '%:%' then split_part({column}, ':', 1) when {column} is not null then '' end")
    };
    let ids: Vec<_> = columns.map(|(column, _)| id(&quoted(&column.name))).collect();
    let (ids, table) = (ids.join(", "), mapping.table());
    // A row with two keys counts for both; a row with one key twice counts once.
    let query = format!(
        "select key, sum(rows)::bigint
         from (select array[{ids}] as ids, count(*) as rows from {table} group by 1) as alike,
              lateral (select distinct key from unnest(ids) as key where key is not null) as keys
         group by key"
    );
    let rows = client.query(&query, &[]).await.map_err(sql("count rows"))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
