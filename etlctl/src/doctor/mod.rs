//! `etlctl doctor`: checks whether everything is set up right, and changes nothing.

mod database;
mod pipeline;

use std::time::Duration;

use serde_json::json;

use crate::{
    logs,
    output::{BAD, BOLD, FAINT, Failure, GOOD, Reply, Spinner, WARNING, count, printable, spinner},
    settings::Settings,
};

/// The result of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Right,
    /// It works, but perhaps not for long, or not as well as it could.
    Doubtful,
    Wrong,
    /// It could not be checked.
    Unknown,
}

/// The checks that were made.
#[derive(Debug, Default)]
struct Checks {
    area: &'static str,
    done: Vec<Check>,
}

#[derive(Debug)]
struct Check {
    area: &'static str,
    state: State,
    found: String,
    advice: String,
}

impl Checks {
    fn right(&mut self, found: impl Into<String>) {
        self.add(State::Right, found, "");
    }

    /// Right if `is`; else wrong, with advice.
    fn check(&mut self, is: bool, found: impl Into<String>, advice: impl Into<String>) {
        self.add(if is { State::Right } else { State::Wrong }, found, advice);
    }

    /// Right if `is`; else doubtful, with advice.
    fn consider(&mut self, is: bool, found: impl Into<String>, advice: impl Into<String>) {
        self.add(if is { State::Right } else { State::Doubtful }, found, advice);
    }

    fn add(&mut self, state: State, found: impl Into<String>, advice: impl Into<String>) {
        let advice = if state == State::Right { String::new() } else { advice.into() };
        self.done.push(Check { area: self.area, state, found: found.into(), advice });
    }

    /// The value. An error is recorded as a check that could not be made.
    fn have<T>(&mut self, result: Result<T, Failure>) -> Option<T> {
        match result {
            Ok(thing) => Some(thing),
            Err(failure) => {
                self.add(State::Unknown, failure.why(), "");
                None
            }
        }
    }

    fn count(&self, state: State) -> usize {
        self.done.iter().filter(|check| check.state == state).count()
    }
}

pub async fn run(settings: &Settings) -> Result<Reply, Failure> {
    let mut checks = Checks::default();
    let looking: Spinner = spinner("Looking at the pipeline");
    let pipeline = pipeline::check(settings, &mut checks).await;
    drop(looking);
    let looking = spinner("Looking at the database");
    database::check(settings, &mut checks, pipeline.as_ref()).await;
    drop(looking);
    let looking = spinner("Looking into the log");
    last_hour(settings, &mut checks).await;
    drop(looking);
    Ok(reply(&checks))
}

async fn last_hour(settings: &Settings, checks: &mut Checks) {
    checks.area = "last hour";
    let batches = logs::batches(settings, Duration::from_secs(3600)).await;
    let Some(batches) = checks.have(batches) else { return };
    if !batches.whole {
        checks.add(State::Unknown, "the log is too large to search: what follows covers its latest part only", "");
    }
    for why in &batches.not_started {
        checks.check(false, format!("the function did not start: {why}"), "correct what this error names");
    }
    let broken: u64 = batches.batches_failed.values().sum();
    let kinds: Vec<_> = batches.batches_failed.keys().cloned().collect();
    let found = match broken {
        0 => "no batch failed as a whole".to_owned(),
        _ => format!("{} failed as a whole: {}", count(broken, "batch"), kinds.join(", ")),
    };
    checks.check(broken == 0, found, "look for `batch failed` in the function's log: its `error` says what to do");
    let reasons: Vec<_> = batches.reasons.iter().map(|(why, number)| format!("{number} × {why}")).collect();
    let found = match batches.failed {
        0 => "no message failed".to_owned(),
        // Each receive of a message counts, not each message.
        failed => format!("{failed} of {} failed: {}", count(batches.messages, "delivery"), reasons.join("; ")),
    };
    checks.consider(
        batches.failed == 0,
        found,
        "ask the sender to correct them; `etlctl dlq explain` groups dead messages by reason",
    );
}

fn reply(checks: &Checks) -> Reply {
    let mut text = String::new();
    let mut area = "";
    for check in &checks.done {
        if check.area != area {
            area = check.area;
            text += &format!("{}{BOLD}{area}{BOLD:#}\n", if text.is_empty() { "" } else { "\n" });
        }
        let (style, mark) = match check.state {
            State::Right => (GOOD, "ok  "),
            State::Doubtful => (WARNING, "warn"),
            State::Wrong => (BAD, "FAIL"),
            State::Unknown => (FAINT, "?   "),
        };
        text += &format!("  {style}{mark}{style:#}  {}\n", printable(&check.found));
        if !check.advice.is_empty() {
            text += &format!("        {style}→{style:#} {}\n", printable(&check.advice));
        }
    }
    let [right, doubtful, wrong, unknown] =
        [State::Right, State::Doubtful, State::Wrong, State::Unknown].map(|state| checks.count(state));
    text += &format!("\n{right} ok, {doubtful} warn, {wrong} failed, {unknown} unknown\n");
    let list = checks.done.iter().map(|check| {
        let state = match check.state {
            State::Right => "ok",
            State::Doubtful => "warning",
            State::Wrong => "failed",
            State::Unknown => "unknown",
        };
        let advice = (!check.advice.is_empty()).then_some(&check.advice);
        json!({"area": check.area, "state": state, "found": check.found, "advice": advice})
    });
    Reply { no: wrong + unknown > 0, ..Reply::new(text, list.collect()) }
}
