//! The log on standard output, as JSON or text according to Lambda's logging controls. It holds no data at any level.

use std::panic;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

/// Sends the log to standard output, in the format of `AWS_LAMBDA_LOG_FORMAT` (`JSON` or text) and at the level of
/// `AWS_LAMBDA_LOG_LEVEL`, or else of `RUST_LOG`.
///
/// The level applies to this crate. Dependencies log nothing below warnings: there the runtime prints events, and the database
/// driver prints parameters. Of a panic only its place is logged, as its message can quote data.
pub fn init() {
    let variable = |name| std::env::var(name).ok();
    let level = variable("AWS_LAMBDA_LOG_LEVEL").or_else(|| variable("RUST_LOG"));
    let level = level.and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::INFO);
    let filter = Targets::new()
        .with_default(level.min(LevelFilter::WARN))
        // The runtime's span, which carries the request id.
        .with_target("lambda_runtime::layers::trace", level.min(LevelFilter::INFO))
        // It would log a failed batch's error a second time.
        .with_target("lambda_runtime::layers::panic", LevelFilter::OFF)
        .with_target("login_etl", level);
    let json = variable("AWS_LAMBDA_LOG_FORMAT").is_some_and(|format| format.eq_ignore_ascii_case("json"));
    let lines = tracing_subscriber::fmt::layer();
    let lines = if json {
        // Lambda's own filter reads `timestamp` and `level` at the top level.
        lines.json().flatten_event(true).with_span_list(false).boxed()
    } else {
        lines.with_ansi(false).without_time().boxed()
    };
    tracing_subscriber::registry().with(lines.with_filter(filter)).init();

    panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, "panicked");
    }));
}
