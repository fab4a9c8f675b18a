//! Is everything set up right? Looks, and changes nothing.

mod database;
mod pipeline;

use std::time::Duration;

use serde_json::json;

use crate::{
    logs,
    output::{BAD, BOLD, FAINT, Failure, GOOD, Reply, Spinner, WARNING, count, printable, spinner},
    settings::Settings,
};

/// How one thing was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Right,
    /// It works, and may not for long, or not as well as it could.
    Doubtful,
    Wrong,
    /// It could not be looked at.
    Unknown,
}

/// The list of what was looked at.
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

    /// Right if `is`; else wrong, with what to do.
    fn check(&mut self, is: bool, found: impl Into<String>, advice: impl Into<String>) {
        self.add(if is { State::Right } else { State::Wrong }, found, advice);
    }

    /// Right if `is`; else doubtful, with what to think of.
    fn consider(&mut self, is: bool, found: impl Into<String>, advice: impl Into<String>) {
        self.add(if is { State::Right } else { State::Doubtful }, found, advice);
    }

    fn add(&mut self, state: State, found: impl Into<String>, advice: impl Into<String>) {
        let advice = if state == State::Right { String::new() } else { advice.into() };
        self.done.push(Check { area: self.area, state, found: found.into(), advice });
    }

    /// The thing, or a note that it could not be had.
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
        checks.add(State::Unknown, "the log is too large to be searched whole: what follows is of its latest part", "");
    }
    for why in &batches.not_started {
        checks.check(false, format!("the function did not start: {why}"), "what is to be set is said there");
    }
    let broken: u64 = batches.batches_failed.values().sum();
    let kinds: Vec<_> = batches.batches_failed.keys().cloned().collect();
    let found = match broken {
        0 => "no batch came back as a whole".to_owned(),
        _ => format!("a batch came back as a whole {}: {}", count(broken, "time"), kinds.join(", ")),
    };
    checks.check(broken == 0, found, "look for `batch failed` in the function's log: its `error` says what to do");
    let reasons: Vec<_> = batches.reasons.iter().map(|(why, number)| format!("{number} × {why}")).collect();
    let found = match batches.failed {
        0 => "no message failed".to_owned(),
        // Each receive of a message counts.
        failed => format!("{failed} of {} failed: {}", count(batches.messages, "delivery"), reasons.join("; ")),
    };
    checks.consider(batches.failed == 0, found, "ask who sends them; `etlctl dlq explain` groups what has died of it");
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
    text += &format!("\n{right} ok, {doubtful} to think about, {wrong} wrong, {unknown} not known\n");
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
