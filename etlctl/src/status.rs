//! `status`: the pipeline on one screen. Each part is read on its own; a part that cannot be read shows why.

use std::{
    collections::HashMap,
    io::{self, IsTerminal, Write},
    pin::pin,
    time::Duration,
};

use aws_sdk_cloudwatch::{
    primitives::DateTime,
    types::{Dimension, Statistic},
};
use aws_sdk_sqs::types::QueueAttributeName;
use jiff::Timestamp;
use login_etl::mapping::quoted;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    cli,
    find::key_name,
    keys::key_use,
    logs::{self, Batches},
    output::{
        BAD, BOLD, Failure, GOOD, Reply, WARNING, aws, bytes, count, duration, failed, printable, spinner, sql, time,
    },
    settings::Settings,
};

const HOUR: Duration = Duration::from_secs(3600);

pub async fn run(settings: &Settings, options: &cli::Status, as_json: bool) -> Result<Reply, Failure> {
    let Some(seconds) = options.watch else {
        let _spinner = spinner("Looking");
        return Ok(look(settings).await);
    };
    let mut interrupted = pin!(tokio::signal::ctrl_c());
    loop {
        let reply = tokio::select! {
            reply = look(settings) => reply,
            _ = &mut interrupted => return Ok(Reply::default()),
        };
        if io::stdout().is_terminal() && !as_json {
            // Clears the screen, and moves the cursor to its top.
            write!(io::stdout(), "\x1b[2J\x1b[H")?;
        }
        reply.print(as_json)?;
        tokio::select! {
            () = sleep(Duration::from_secs(seconds)) => {}
            _ = &mut interrupted => return Ok(Reply::default()),
        }
    }
}

async fn look(settings: &Settings) -> Reply {
    let (queue, dead, batches, database, keys) = tokio::join!(
        queue(settings, "QUEUE_URL"),
        queue(settings, "DLQ_URL"),
        logs::batches(settings, HOUR),
        database(settings),
        keys(settings),
    );
    let mut screen = Screen::default();
    let now = Timestamp::now();
    let name = settings.get("FUNCTION_NAME").unwrap_or_else(|| "login-etl".to_owned());
    screen.text += &format!("{BOLD}{}{BOLD:#}  {} UTC\n\n", printable(&name), now.strftime("%Y-%m-%d %H:%M:%S"));

    screen.part("queue", queue, |queue| {
        let age = queue.oldest.map_or(String::new(), |age| format!("; the oldest for {}", duration(age)));
        let later = if queue.delayed > 0 { format!(", {} delayed", queue.delayed) } else { String::new() };
        (vec![format!("{} waiting, {} in flight{later}{age}", queue.waiting, queue.in_flight)], queue.json())
    });
    screen.part("dead letters", dead, |dead| {
        let number = dead.waiting + dead.in_flight;
        let line = match number {
            0 => format!("{GOOD}none{GOOD:#}"),
            _ => format!("{BAD}{number}{BAD:#}  `etlctl dlq explain` says why"),
        };
        (vec![line], dead.json())
    });
    screen.part("last hour", batches, |batches| (batch_lines(&batches), batch_json(&batches)));
    screen.part("rows", database, |database| (database.lines(), database.json()));
    screen.part("keys", keys, |keys| {
        let lines = keys.iter().map(|(id, cipher, active, one_way)| {
            let used = key_use(*active, *one_way);
            format!("{} {cipher}{}{used}", key_name(id), if used.is_empty() { "" } else { ", " })
        });
        let json = keys.iter().map(
            |(id, cipher, active, one_way)| json!({"id": id, "cipher": cipher, "active": active, "one_way": one_way}),
        );
        (lines.collect(), json.collect())
    });
    screen.json.insert("at".to_owned(), json!(time(now)));
    Reply::new(screen.text, Value::Object(screen.json))
}

#[derive(Default)]
struct Screen {
    text: String,
    json: serde_json::Map<String, Value>,
}

impl Screen {
    fn part<T>(&mut self, name: &str, part: Result<T, Failure>, show: impl FnOnce(T) -> (Vec<String>, Value)) {
        let (lines, json) = match part {
            Ok(part) => show(part),
            Err(failure) => {
                let why = failure.why();
                (vec![format!("{WARNING}unknown:{WARNING:#} {}", printable(why))], json!({"unknown": why}))
            }
        };
        for (number, line) in lines.iter().enumerate() {
            self.text += &format!("{:14}{line}\n", if number == 0 { name } else { "" });
        }
        self.json.insert(name.replace(' ', "_"), json);
    }
}

/// The numbers of messages in a queue.
struct Depth {
    waiting: u64,
    in_flight: u64,
    delayed: u64,
    oldest: Option<Duration>,
}

impl Depth {
    fn json(&self) -> Value {
        let oldest = self.oldest.map(|age| age.as_secs());
        json!({"waiting": self.waiting, "in_flight": self.in_flight, "delayed": self.delayed, "oldest_seconds": oldest})
    }
}

async fn queue(settings: &Settings, variable: &str) -> Result<Depth, Failure> {
    let url = settings.require(variable)?;
    let client = aws_sdk_sqs::Client::new(&settings.aws);
    let attributes =
        client.get_queue_attributes().queue_url(&url).attribute_names(QueueAttributeName::All).send().await;
    let attributes: HashMap<_, _> = attributes.map_err(aws("look at the queue"))?.attributes.unwrap_or_default();
    let number = |name| attributes.get(&name).and_then(|number| number.parse().ok()).unwrap_or(0);
    let name = url.rsplit('/').next().unwrap_or_default();
    let mut depth = Depth {
        waiting: number(QueueAttributeName::ApproximateNumberOfMessages),
        in_flight: number(QueueAttributeName::ApproximateNumberOfMessagesNotVisible),
        delayed: number(QueueAttributeName::ApproximateNumberOfMessagesDelayed),
        oldest: None,
    };
    // The metric keeps its last value for a while after the queue is empty.
    if depth.waiting + depth.in_flight > 0 {
        depth.oldest = oldest(settings, name).await;
    }
    Ok(depth)
}

/// The age of the oldest message. Only CloudWatch has it, a minute or two late; LocalStack's does not.
async fn oldest(settings: &Settings, queue: &str) -> Option<Duration> {
    let client = aws_sdk_cloudwatch::Client::new(&settings.aws);
    let now = Timestamp::now().as_second();
    let request = client
        .get_metric_statistics()
        .namespace("AWS/SQS")
        .metric_name("ApproximateAgeOfOldestMessage")
        .dimensions(Dimension::builder().name("QueueName").value(queue).build())
        .start_time(DateTime::from_secs(now - 300))
        .end_time(DateTime::from_secs(now))
        .period(60)
        .statistics(Statistic::Maximum);
    let points = request.send().await.ok()?.datapoints?;
    let last = points.into_iter().max_by_key(|point| point.timestamp.map(|at| at.secs()))?;
    Some(Duration::from_secs_f64(last.maximum?.max(0.0)))
}

fn batch_lines(batches: &Batches) -> Vec<String> {
    let at_least = if batches.whole { "" } else { "at least " };
    let mut lines = vec![format!(
        "{at_least}{} in {}: {} inserted, {} deduplicated, {} failed",
        count(batches.messages, "delivery"),
        count(batches.loaded, "batch"),
        batches.inserted,
        batches.deduplicated,
        batches.failed,
    )];
    let by_count = |counts: &std::collections::BTreeMap<String, u64>| {
        let mut counts: Vec<_> = counts.iter().map(|(why, number)| (*number, why.clone())).collect();
        counts.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        counts
    };
    let failed = by_count(&batches.reasons).into_iter();
    lines.extend(failed.map(|(number, why)| format!("{WARNING}{number:6}{WARNING:#}  failed: {}", printable(&why))));
    let broken = by_count(&batches.batches_failed).into_iter();
    lines.extend(broken.map(|(number, why)| format!("{BAD}{number:6}{BAD:#}  batches failed: {}", printable(&why))));
    let stopped = batches.not_started.iter();
    lines.extend(stopped.map(|why| format!("{BAD}        the function did not start:{BAD:#} {}", printable(why))));
    lines
}

fn batch_json(batches: &Batches) -> Value {
    json!({
        "batches": batches.loaded, "messages": batches.messages, "inserted": batches.inserted,
        "deduplicated": batches.deduplicated, "failed": batches.failed, "failed_by_reason": batches.reasons,
        "batches_failed": batches.batches_failed, "not_started": batches.not_started, "complete": batches.whole,
    })
}

struct Database {
    today: Option<i64>,
    all: i64,
    table_bytes: i64,
    ledger: i64,
    ledger_bytes: i64,
    oldest_key: Option<String>,
}

impl Database {
    fn lines(&self) -> Vec<String> {
        let today = self.today.map_or("today's took too long to count".to_owned(), |today| format!("{today} today"));
        let oldest = self.oldest_key.as_ref().map_or(String::new(), |at| format!(", the oldest of {at}"));
        vec![
            format!("{today}, about {} in all, {}", self.all, bytes(self.table_bytes)),
            format!("ledger: about {}, {}{oldest}", count(self.ledger, "key"), bytes(self.ledger_bytes)),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "today": self.today, "estimate": self.all, "bytes": self.table_bytes,
            "ledger": {"estimate": self.ledger, "bytes": self.ledger_bytes, "oldest": self.oldest_key},
        })
    }
}

async fn database(settings: &Settings) -> Result<Database, Failure> {
    let table = settings.mapping.table().to_string();
    let ledger_name = format!("{}.etl_ledger", settings.schema);
    let connection = settings.database().await?;
    let client = &connection.client;
    // The counts below may have no index to use.
    client.batch_execute("set statement_timeout = '5s'").await.map_err(sql("set a limit"))?;
    // The planner's estimates, summed over the partitions without their parents. Small tables without an estimate are counted.
    let sizes = "
        with recursive tree (oid) as (
            select to_regclass($1::text)::oid
            union all
            select inhrelid from pg_inherits join tree on inhparent = tree.oid
        )
        select coalesce(sum(greatest(reltuples, 0)) filter (where relkind <> 'p'), 0)::bigint, sum(pg_total_relation_size(tree.oid))::bigint
        from pg_class join tree on pg_class.oid = tree.oid
        having count(*) > 0";
    let size = async |name: &str| {
        let row = client.query_opt(sizes, &[&name]).await.map_err(sql(format_args!("look at {name}")))?;
        let row = row.ok_or_else(|| {
            failed(format!(
                "there is no table {name}: `etlctl migrate` makes it; or name its schema with --database-schema"
            ))
        })?;
        let (estimate, bytes): (i64, i64) = (row.get(0), row.get(1));
        if estimate > 0 || bytes > 100_000_000 {
            return Ok((estimate, bytes));
        }
        let counted = client.query_one(&format!("select count(*) from {name}"), &[]).await.map_err(sql("count"))?;
        Ok::<_, Failure>((counted.get(0), bytes))
    };
    let (all, table_bytes) = size(&table).await?;
    let (ledger, ledger_bytes) = size(&ledger_name).await?;
    let oldest = format!(
        "select to_char(min(sent_at) at time zone 'UTC', 'YYYY-MM-DD') from {ledger_name} where sent_at > 'epoch'"
    );
    let oldest_key = client.query_one(&oldest, &[]).await.map_err(sql("look at the ledger"))?.get(0);
    let today = match settings.mapping.day() {
        Some(day) => {
            let day = quoted(&day.name);
            let today = format!("select count(*) from {table} where {day} = (now() at time zone 'UTC')::date");
            client.query_one(&today, &[]).await.ok().map(|row| row.get(0))
        }
        None => None,
    };
    Ok(Database { today, all, table_bytes, ledger, ledger_bytes, oldest_key })
}

async fn keys(settings: &Settings) -> Result<Vec<(String, &'static str, bool, bool)>, Failure> {
    let keyring = settings.keyring().await?;
    let used = |id: &str| (id == keyring.active(), Some(id) == keyring.one_way());
    let keys = keyring.keys().map(|(id, cipher)| (id.to_owned(), cipher, used(id).0, used(id).1));
    Ok(keys.collect())
}
