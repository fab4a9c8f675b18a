//! The function without its runtime: from an event's bytes to the response's bytes, or from the schedule's event to the end of
//! maintenance.
//!
//! With `--observe` it only emits an event's metrics and log line. With `--profile FILE` it writes sampled stacks and their
//! counts to the file.

use std::{
    error::Error,
    fmt::Write,
    fs,
    time::{Duration, Instant, SystemTime},
};

use lambda_runtime::{Context, LambdaEvent};
use login_etl::{
    config::{self, Config},
    event,
    handler::{Handler, Times},
    logging,
    mapping::Mapping,
    metrics,
    redelivery::Redelivery,
    roots,
    runtime::Event,
    secrets::{FreshKeyring, Secrets},
    store::Store,
};
use login_etl_benches::{Answer, Answers, cpu_time, events, files, timed};
use pprof::ProfilerGuard;

/// Prime, so that samples do not fall in step with periodic work.
const SAMPLES_A_SECOND: i32 = 997;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    logging::init();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let observing = arguments.first().is_some_and(|option| option == "--observe");
    let profile = match arguments.as_slice() {
        [option, file] if option == "--profile" => Some((ProfilerGuard::new(SAMPLES_A_SECOND)?, file)),
        _ => None,
    };
    let config = Config::from_variables(|name| std::env::var(name).ok())?;
    let sdk_config = config::sdk_config(roots::for_aws()).await;
    let secrets = Secrets::new(&sdk_config);
    let mapping = Mapping::load(config.mapping_file)?;
    let (id, ttl) = (config.masking_secret_id, config.secrets_ttl);
    let keyring = FreshKeyring::read(secrets.clone(), id, ttl, mapping.masks()).await?;
    let store = Store::new(config.database, secrets, sdk_config.clone(), &mapping).await?;
    store.connect().await?;
    let redelivery = Redelivery::new(sdk_config, config.outage_delay);
    let handler = Handler::new(mapping, keyring, store, redelivery);

    let mut answers = Answers::open()?;
    for file in files() {
        let mut answer = Answer::default();
        let events = events(&file?)?;
        let cpu = cpu_time();
        for event in events {
            if observing {
                timed(&mut answer.times, observe);
                continue;
            }
            let started = Instant::now();
            let context = context()?;
            if event::maintenance(&event).is_some() {
                handler.maintain(&Times::of(&context), &context).await;
                answer.times.push(started.elapsed());
                continue;
            }
            let event = LambdaEvent::new(Event::new(event, context.request_id.clone()), context);
            let response = handler.invoke(event).await?;
            serde_json::to_vec(&response)?;
            answer.times.push(started.elapsed());
            answer.failures += response.batch_item_failures.len();
        }
        answer.cpu = cpu_time() - cpu;
        if let Some((profiler, file)) = &profile {
            fs::write(file, stacks(profiler)?)?;
        }
        answers.tell(&answer)?;
    }
    Ok(())
}

fn context() -> Result<Context, Box<dyn Error>> {
    let mut context = Context::default();
    let deadline = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)? + Duration::from_secs(60);
    context.deadline = deadline.as_millis() as u64;
    context.request_id = "8476a536-e9f4-11e8-9739-2dfe598c3fcd".to_owned();
    Ok(context)
}

/// The stacks so far, a line each: its functions, outermost first, and the number of samples.
fn stacks(profiler: &ProfilerGuard<'_>) -> Result<String, Box<dyn Error>> {
    let mut lines = String::new();
    for (stack, samples) in profiler.report().build()?.data {
        let functions: Vec<_> =
            stack.frames.iter().rev().flat_map(|frame| frame.iter().rev()).map(ToString::to_string).collect();
        writeln!(lines, "{} {samples}", functions.join(";"))?;
    }
    Ok(lines)
}

fn observe() {
    metrics::Metrics {
        timestamp: SystemTime::now(),
        function_name: "login-etl".to_owned(),
        request_id: "8476a536-e9f4-11e8-9739-2dfe598c3fcd".to_owned(),
        outcome: "Ok",
        messages: 100,
        inserted: 100,
        deduplicated: 0,
        failed: 0,
        batches_failed: 0,
        duration: Duration::from_micros(900),
        age_of_oldest_message: Some(Duration::from_millis(1500)),
        highest_receive_count: Some(1),
        credential_refreshes: 0,
        keyring_failures: 0,
        prune_failures: 0,
    }
    .emit();
    tracing::info!(
        target: "login_etl::handler", messages = 100, inserted = 100, deduplicated = 0, failed = 0, duration_ms = 0, "batch loaded"
    );
}
