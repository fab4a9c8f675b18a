//! Erases a person's rows and dead messages, and records it.

use std::{num::NonZeroU32, time::Duration};

use aws_sdk_sqs::types::QueueAttributeName;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::time::sleep;
use tokio_postgres::{
    Client,
    error::SqlState,
    types::{ToSql, Type},
};

use crate::{
    audit,
    dlq::Queue,
    find::Person,
    output::{BOLD, Failure, GOOD, Reply, WARNING, aws, count, duration, failed, printable, progress, sql, table},
    settings::Settings,
};

/// Batches in a row that may erase nothing while rows are left.
const TRIES: u32 = 25;
/// The wait after each of them.
const WAIT: Duration = Duration::from_millis(200);

/// What is to be erased, and why.
pub struct Erasure<'a> {
    pub settings: &'a Settings,
    pub person: &'a Person<'a>,
    pub reason: &'a str,
    /// Most rows of a transaction.
    pub batch: NonZeroU32,
    /// Whether to delete dead messages, too, that have the value but not the field.
    pub with_mentions: bool,
}

impl Erasure<'_> {
    /// Counts the person's rows and dead messages, and changes nothing.
    pub async fn count(&self) -> Result<Reply, Failure> {
        self.check()?;
        let connection = self.settings.database().await?;
        let rows = self.rows(&connection.client).await?;
        let queue = self.queue().await?;
        let (mut messages, mut mentions) = (None, Vec::new());
        if let Some(queue) = &queue {
            let looked = queue.look_for(self.person).await?;
            (messages, mentions) = (Some(looked.theirs()), looked.mentions());
            queue.let_go(looked).await;
        }
        let hidden = queue.as_ref().map_or(0, Queue::hidden);
        let dead =
            messages.map_or(String::new(), |messages| format!(" and {}", count(messages as i128, "dead message")));
        let mut text = format!("{BOLD}{}{dead} would be erased.{BOLD:#} --yes erases them.\n", count(rows, "row"));
        text += &warnings(queue.is_none(), hidden, &mentions);
        let no = rows > 0 || messages != Some(0) || hidden > 0 || !mentions.is_empty();
        let json = json!({"rows": rows, "messages": messages, "mentions": mentions, "hidden_messages": hidden});
        Ok(Reply { no, ..Reply::new(text, json) })
    }

    /// Erases all of them, batch by batch.
    pub async fn erase(&self) -> Result<Reply, Failure> {
        self.check()?;
        let connection = self.settings.database().await?;
        let client = &connection.client;
        // The server's default may acknowledge a commit before it is on disk.
        client.batch_execute("set synchronous_commit = on").await.map_err(sql("prepare the erasure"))?;
        let operator = audit::operator(&self.settings.aws).await;
        let mut rows = self.erase_rows(client, &operator).await?;

        let queue = self.queue().await?;
        let (mut messages, mut mentions, mut unseen) = (None, Vec::new(), 0);
        if let Some(queue) = &queue {
            let mut deleted = 0;
            // SQS shows ten messages of a FIFO queue's group, and the next ten once those are deleted.
            loop {
                let mut looked = queue.look_for(self.person).await?;
                if self.with_mentions {
                    looked = looked.with_mentions();
                }
                let theirs = looked.theirs();
                // Recorded before they are deleted. The last record says that nothing was left.
                match self.erase_batch(client, &operator, i32::try_from(theirs).ok()).await {
                    Ok(more) => rows += more,
                    Err(failure) => {
                        queue.let_go(looked).await;
                        return Err(failure);
                    }
                }
                mentions = looked.mentions();
                let seen = looked.count();
                queue.delete(looked).await?;
                deleted += theirs;
                if theirs == 0 {
                    unseen = if queue.is_fifo() { queue.depth().saturating_sub((seen + deleted) as u64) } else { 0 };
                    break;
                }
            }
            messages = Some(deleted);
        }
        let hidden = queue.as_ref().map_or(0, Queue::hidden);

        let dead = match messages {
            Some(messages) => format!(", {} deleted", count(messages as i128, "dead message")),
            None => String::new(),
        };
        // Without the queue, only batches of rows are recorded.
        let record = if rows > 0 || queue.is_some() { "; recorded in etl_audit" } else { "" };
        let mut text = format!("{GOOD}{} erased{dead}{record}.{GOOD:#}\n", count(rows, "row"));
        text += &warnings(queue.is_none(), hidden, &mentions);
        if unseen > 0 {
            text += &format!(
                "{WARNING}About {} not visible, because SQS shows ten of a group: redrive or delete those before them, \
                 and run this again.{WARNING:#}\n",
                count(unseen, "dead message")
            );
        }
        let (remains, mut json) = self.what_remains().await?;
        text += &remains;
        json["rows"] = json!(rows);
        json["messages"] = json!(messages);
        json["mentions"] = json!(mentions);
        json["hidden_messages"] = json!(hidden);
        let no = queue.is_none() || hidden > 0 || unseen > 0 || !mentions.is_empty();
        Ok(Reply { no, ..Reply::new(text, json) })
    }

    /// Refuses a reason that is empty or contains the value.
    fn check(&self) -> Result<(), Failure> {
        audit::check_reason(self.reason)?;
        let reason = self.reason.to_lowercase();
        // Shorter values occur in ordinary words.
        if self.person.spellings.iter().any(|value| value.len() > 2 && reason.contains(&value.to_lowercase())) {
            return Err(Failure::Usage(
                "--reason contains the value, and stays on record: name a ticket instead".to_owned(),
            ));
        }
        Ok(())
    }

    async fn queue(&self) -> Result<Option<Queue<'_>>, Failure> {
        match self.settings.get("DLQ_URL") {
            Some(_) => Queue::new(self.settings).await.map(Some),
            None => Ok(None),
        }
    }

    /// The number of the person's rows.
    async fn rows(&self, client: &Client) -> Result<i64, Failure> {
        let counted = format!("select {}($1, $2)", self.settings.mapping.table().beside("rows_of"));
        let parameters: [(&(dyn ToSql + Sync), Type); 2] =
            [(&self.person.column.name, Type::TEXT), (&self.person.values, Type::TEXT_ARRAY)];
        let counted = client.query_typed(&counted, &parameters).await.map_err(no_right("count the person's rows"))?;
        counted.first().map(|row| row.get(0)).ok_or_else(|| failed("cannot count the person's rows: no answer"))
    }

    /// Erases rows until none is left. Returns their number.
    async fn erase_rows(&self, client: &Client, operator: &str) -> Result<i64, Failure> {
        let all = self.rows(client).await?;
        let bar = progress(all.unsigned_abs(), "Erasing {bar:30} {pos} of {len} rows  {eta} to go");
        let mut erased = 0;
        let mut in_vain = 0;
        loop {
            let batch = self.erase_batch(client, operator, None).await?;
            erased += batch;
            bar.inc(batch.unsigned_abs());
            if batch > 0 {
                in_vain = 0;
                continue;
            }
            // A batch erases nothing if another session changes its rows at the same time.
            let left = self.rows(client).await?;
            if left == 0 {
                bar.finish_and_clear();
                return Ok(erased);
            }
            in_vain += 1;
            if in_vain == TRIES {
                return Err(failed(format!(
                    "{} cannot be erased: see whether a trigger, a rule or row security keeps them; {erased} erased and recorded",
                    count(left, "row")
                )));
            }
            sleep(WAIT).await;
        }
    }

    /// Erases and records up to `batch` rows in one transaction. With `messages`, that number is recorded, too, even without a
    /// row. Returns the number of rows.
    async fn erase_batch(&self, client: &Client, operator: &str, messages: Option<i32>) -> Result<i64, Failure> {
        let erase = format!("select {}($1, $2, $3, $4, $5, $6)", self.settings.mapping.table().beside("erase"));
        let parameters: [(&(dyn ToSql + Sync), Type); 6] = [
            (&self.person.column.name, Type::TEXT),
            (&self.person.values, Type::TEXT_ARRAY),
            (&i64::from(self.batch.get()), Type::INT8),
            (&operator, Type::TEXT),
            (&self.reason, Type::TEXT),
            (&messages, Type::INT4),
        ];
        let erased = match client.query_typed(&erase, &parameters).await {
            // A conflict with another session: nothing is erased or recorded.
            Err(error) if messages.is_none() && is_conflict(&error) => return Ok(0),
            erased => erased.map_err(no_right("erase the person's rows"))?,
        };
        erased.first().map(|row| row.get(0)).ok_or_else(|| failed("cannot erase the person's rows: no answer"))
    }

    /// What may still arrive, what this cannot erase, and for how long.
    async fn what_remains(&self) -> Result<(String, serde_json::Value), Failure> {
        let (waiting, retention) = self.waiting().await?;
        let again = retention.and_then(|retention| {
            let retention = SignedDuration::try_from(retention).ok()?;
            Timestamp::now().checked_add(retention).ok().map(|at| at.strftime("%Y-%m-%d %H:%M").to_string())
        });
        let in_queue = match (waiting, retention) {
            (Some(waiting), Some(retention)) => format!(
                "{} now, from anybody; each is kept for {} at most",
                count(waiting as i128, "message"),
                duration(retention)
            ),
            _ => "unknown: QUEUE_URL is not set".to_owned(),
        };
        let name = self.settings.mapping.table().name.clone();
        let rows = [
            ["messages in the queue", &in_queue],
            ["erased rows on disk", &format!("until vacuum has run: by autovacuum, or `vacuum {name}` now")],
            ["replicas", "until they have caught up"],
            ["backups, snapshots, archived WAL", "as long as you keep them"],
            ["PostgreSQL's log", "as long as you keep it, if it logs statements with their parameters"],
            ["etl_audit", "for ever: recovered masks, and reasons and queries as typed"],
        ];
        let mut text = format!("\n{BOLD}What may still arrive, or cannot be erased from here:{BOLD:#}\n");
        text += &table(&["", ""], rows.map(|row| row.map(str::to_owned).to_vec()));
        if let Some(again) = &again {
            let field = &self.person.field.path;
            text += &format!(
                "\nAfter {again} (UTC) run this again, for messages that are in the queue now:\n  etlctl subject erase - --field {field} --reason '…' --yes\n"
            );
        }
        Ok((text, json!({"waiting_messages": waiting, "again_after": again})))
    }

    /// The approximate number of messages in the queue, and for how long it keeps one.
    async fn waiting(&self) -> Result<(Option<u64>, Option<Duration>), Failure> {
        let Some(url) = self.settings.get("QUEUE_URL") else { return Ok((None, None)) };
        let counts = [
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
            QueueAttributeName::ApproximateNumberOfMessagesDelayed,
        ];
        let retention = QueueAttributeName::MessageRetentionPeriod;
        let names = counts.iter().chain([&retention]).cloned().collect();
        let client = aws_sdk_sqs::Client::new(&self.settings.aws);
        let attributes = client.get_queue_attributes().queue_url(url).set_attribute_names(Some(names)).send().await;
        let attributes = attributes.map_err(aws("look at the queue; the rest is done"))?.attributes.unwrap_or_default();
        let number = |name: &QueueAttributeName| attributes.get(name)?.parse::<u64>().ok();
        Ok((counts.iter().map(number).sum(), number(&retention).map(Duration::from_secs)))
    }
}

fn is_conflict(error: &tokio_postgres::Error) -> bool {
    matches!(error.code(), Some(&SqlState::T_R_DEADLOCK_DETECTED | &SqlState::T_R_SERIALIZATION_FAILURE))
}

/// Warnings about dead messages that were not searched, were hidden, or may be another person's.
fn warnings(is_unknown: bool, hidden: u64, mentions: &[String]) -> String {
    let mut text = String::new();
    if is_unknown {
        text += &format!(
            "{WARNING}Dead messages were not searched: name the queue with --stack or --dlq-url.{WARNING:#}\n"
        );
    }
    if hidden > 0 {
        text += &format!(
            "{WARNING}{} hidden, because another command reads them or was interrupted: run this again in some \
             minutes.{WARNING:#}\n",
            count(hidden, "dead message")
        );
    }
    if !mentions.is_empty() {
        let shown: Vec<_> = mentions.iter().take(10).map(|id| printable(id)).collect();
        text += &format!(
            "{WARNING}{} the value but not the field, and may be another person's: {}{}. Look with `etlctl dlq show`; \
             delete with --mentions.{WARNING:#}\n",
            if mentions.len() == 1 {
                "1 dead message has".to_owned()
            } else {
                format!("{} dead messages have", mentions.len())
            },
            shown.join(", "),
            if mentions.len() > shown.len() { " …" } else { "" },
        );
    }
    text
}

fn no_right(what: &str) -> impl FnOnce(tokio_postgres::Error) -> Failure {
    move |error| match error.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => failed(format!(
            "cannot {what} (SQLSTATE 42501): your database user needs the role login_etl_privacy (`grant login_etl_privacy to NAME`), and usage on the table's schema"
        )),
        _ => sql(what)(error),
    }
}
