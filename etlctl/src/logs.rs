//! Results of batches and reasons of failures, from the function's log.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use jiff::Timestamp;
use serde_json::Value;

use crate::{
    output::{Failure, aws},
    settings::Settings,
};

/// Maximum number of requests per phrase. Each searches a part of the log, latest first, and may find nothing in it.
const REQUESTS: usize = 20;

/// Lines of the function's log. `whole` is false if [`REQUESTS`] were not enough to search all of it.
#[derive(Debug)]
struct Lines {
    lines: Vec<Value>,
    whole: bool,
}

/// The results of the batches of a period.
#[derive(Debug, Default)]
pub struct Batches {
    pub loaded: u64,
    pub messages: u64,
    pub inserted: u64,
    pub deduplicated: u64,
    pub failed: u64,
    /// How many messages failed, by reason.
    pub reasons: BTreeMap<String, u64>,
    /// How many batches failed as a whole, by error type.
    pub batches_failed: BTreeMap<String, u64>,
    /// The different reasons why environments did not start.
    pub not_started: BTreeSet<String>,
    /// Whether all of the period's log was searched.
    pub whole: bool,
}

/// The results of the batches of the last `since`.
pub async fn batches(settings: &Settings, since: Duration) -> Result<Batches, Failure> {
    let loaded = lines(settings, "batch loaded", since).await?;
    let broken = lines(settings, "batch failed", since).await?;
    let messages = lines(settings, "message failed", since).await?;
    let stopped = lines(settings, "initialisation failed", since).await?;
    let number = |line: &Value, name: &str| line[name].as_u64().unwrap_or(0);
    let sum = |name: &str| loaded.lines.iter().map(|line| number(line, name)).sum::<u64>();
    let by = |lines: &[Value], name: &str| {
        lines.iter().filter_map(|line| line[name].as_str()).fold(BTreeMap::new(), |mut counts, text| {
            *counts.entry(text.to_owned()).or_insert(0) += 1;
            counts
        })
    };
    Ok(Batches {
        loaded: loaded.lines.len() as u64,
        messages: sum("messages"),
        inserted: sum("inserted"),
        deduplicated: sum("deduplicated"),
        failed: sum("failed"),
        reasons: by(&messages.lines, "reason"),
        batches_failed: by(&broken.lines, "error_type"),
        not_started: stopped.lines.iter().filter_map(|line| line["error"].as_str()).map(ToOwned::to_owned).collect(),
        whole: loaded.whole && broken.whole && messages.whole,
    })
}

/// The reason of each message's last failure, by message id; and whether all of the log was searched.
pub async fn reasons(settings: &Settings, since: Duration) -> Result<(HashMap<String, String>, bool), Failure> {
    let Lines { mut lines, whole } = lines(settings, "message failed", since).await?;
    lines.sort_by(|one, other| one["timestamp"].as_str().cmp(&other["timestamp"].as_str()));
    let text = |line: &Value, name: &str| line[name].as_str().map(ToOwned::to_owned);
    // Of several lines with one id, the last stays.
    let reasons = lines.iter().filter_map(|line| Some((text(line, "message_id")?, text(line, "reason")?)));
    Ok((reasons.collect(), whole))
}

async fn lines(settings: &Settings, phrase: &str, since: Duration) -> Result<Lines, Failure> {
    let group = group(settings).await?;
    let start = Timestamp::now().as_millisecond().saturating_sub_unsigned(since.as_millis() as u64);
    let client = aws_sdk_cloudwatchlogs::Client::new(&settings.aws);
    let mut found = Lines { lines: Vec::new(), whole: false };
    let mut token = None;
    for _ in 0..REQUESTS {
        let request = client.filter_log_events().log_group_name(&group).filter_pattern(format!("\"{phrase}\""));
        let page = request.start_time(start).start_from_head(false).set_next_token(token).send().await;
        let page = page.map_err(aws(format_args!("search the log {group}")))?;
        let lines = page.events().iter().filter_map(|event| serde_json::from_str::<Value>(event.message()?).ok());
        let says = |line: &Value| line["message"].as_str().is_some_and(|message| message.starts_with(phrase));
        found.lines.extend(lines.filter(says));
        token = page.next_token;
        if token.is_none() {
            found.whole = true;
            break;
        }
    }
    Ok(found)
}

async fn group(settings: &Settings) -> Result<String, Failure> {
    let function = settings.require("FUNCTION_NAME")?;
    let configuration = settings.function_configuration(&function).await?;
    let group = configuration.logging_config.and_then(|logging| logging.log_group);
    Ok(group.unwrap_or_else(|| format!("/aws/lambda/{}", configuration.function_name.unwrap_or(function))))
}
