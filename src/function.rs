//! Starts the function, and keeps it running while a setting, a secret or the mapping cannot be used.
//!
//! If it exited, Lambda would start the environment again and again, and each start would cost its messages a receive. Instead it
//! delays their redelivery, as in an outage, and retries initialisation with each batch.

use std::{fmt, panic::AssertUnwindSafe, sync::Arc, time::SystemTime};

use aws_config::SdkConfig;
use aws_lambda_events::sqs::SqsBatchResponse;
use futures_util::FutureExt;
use lambda_runtime::{Error, LambdaEvent};
use tokio::{
    sync::Mutex,
    time::{Duration, Instant, timeout_at},
};

use crate::{
    config::{self, Config},
    event,
    handler::{BatchError, Handler, Times},
    mapping::Mapping,
    metrics::Metrics,
    redelivery::Redelivery,
    roots,
    runtime::Event,
    secrets::{FreshKeyring, Secrets},
    store::{Store, StoreError},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit of a release.
const COMMIT: &str = match option_env!("LOGIN_ETL_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};
/// Below Lambda's limit of 10 s for initialisation.
const INIT_TIME: Duration = Duration::from_secs(9);

/// Lives as long as its execution environment.
pub struct Function {
    sdk_config: SdkConfig,
    /// The handler, or why there is none.
    handler: Mutex<Result<Arc<Handler>, String>>,
    /// Delays the messages that arrive while there is no handler.
    redelivery: Redelivery,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").finish_non_exhaustive()
    }
}

impl Function {
    /// Reads settings and secrets, and connects. A failure is logged, and the next batch retries.
    pub async fn start() -> Self {
        let until = Instant::now() + INIT_TIME;
        tracing::info!(version = VERSION, commit = COMMIT, "started");
        let sdk_config = config::sdk_config(roots::for_aws()).await;
        let handler = make_handler_until(&sdk_config, until).await;
        let handler = handler.inspect_err(|error| tracing::error!(error, "initialisation failed")).map(Arc::new);
        let outage_delay = read_config().map_or(config::OUTAGE_DELAY, |config| config.outage_delay);
        let redelivery = Redelivery::new(sdk_config.clone(), outage_delay);
        Self { sdk_config, handler: Mutex::new(handler), redelivery }
    }

    /// Handles an invocation, as [`Handler::invoke`] does.
    ///
    /// # Errors
    /// [`BatchError`]: the whole batch returns to the queue.
    pub async fn invoke(&self, event: LambdaEvent<Event>) -> Result<SqsBatchResponse, BatchError> {
        // The runtime would put a panic's message into its response, and such a message can quote data.
        AssertUnwindSafe(self.try_to_invoke(event)).catch_unwind().await.unwrap_or(Err(BatchError::Panic))
    }

    async fn try_to_invoke(&self, event: LambdaEvent<Event>) -> Result<SqsBatchResponse, BatchError> {
        let times = Times::of(&event.context);
        let schedule = event.payload.of(&event.context.request_id).and_then(event::maintenance);
        match (self.handler(times.deadline).await, schedule) {
            (Ok(handler), None) => handler.invoke(event).await,
            (Ok(handler), Some(schedule)) => {
                // Not kept from the start, as maintenance is rare.
                let expected = read_config().ok().and_then(|config| config.maintenance_schedule);
                if expected != Some(schedule) {
                    let error = BatchError::NotTheSchedule;
                    tracing::error!(error_type = error.error_type(), %error, "maintenance refused");
                    return Err(error);
                }
                handler.maintain(&times, &event.context).await;
                Ok(SqsBatchResponse::default())
            }
            (Err(error), _) => Err(self.give_back(&event, &times, error).await),
        }
    }

    async fn handler(&self, deadline: Instant) -> Result<Arc<Handler>, String> {
        let Ok(mut current) = timeout_at(deadline, self.handler.lock()).await else {
            return Err("another invocation is still reading settings and secrets".to_owned());
        };
        if current.is_err() {
            let until = deadline.min(Instant::now() + INIT_TIME);
            // If time runs out, the error of the attempt before is kept: it says more.
            if let Ok(made) = timeout_at(until, make_handler(&self.sdk_config, until)).await {
                *current = made.map(Arc::new).map_err(|error| error.to_string());
            }
        }
        current.clone()
    }

    async fn give_back(&self, event: &LambdaEvent<Event>, times: &Times, error: String) -> BatchError {
        let LambdaEvent { payload, context, .. } = event;
        let messages = payload.of(&context.request_id).map(event::messages).and_then(Result::ok).unwrap_or_default();
        self.redelivery.delay(messages.iter(), times.last()).await;
        let error = BatchError::Init(error);
        let count = messages.len() as u64;
        let oldest = messages.iter().filter_map(event::Message::sent).min();
        Metrics {
            timestamp: times.timestamp,
            function_name: context.env_config.function_name.clone(),
            request_id: context.request_id.clone(),
            outcome: error.error_type(),
            messages: count,
            inserted: 0,
            deduplicated: 0,
            failed: 0,
            batches_failed: 1,
            duration: times.started.elapsed(),
            age_of_oldest_message: oldest.and_then(|sent| SystemTime::now().duration_since(sent).ok()),
            highest_receive_count: messages.iter().filter_map(event::Message::receive_count).max(),
            credential_refreshes: 0,
            keyring_failures: 0,
            prune_failures: 0,
        }
        .emit();
        tracing::error!(error_type = error.error_type(), %error, messages = count, "batch failed; all its messages return to the queue");
        error
    }
}

fn read_config() -> Result<Config, config::ConfigError> {
    Config::from_variables(|name| std::env::var(name).ok())
}

/// Makes the handler, or returns why it cannot.
async fn make_handler_until(sdk_config: &SdkConfig, until: Instant) -> Result<Handler, String> {
    match timeout_at(until, make_handler(sdk_config, until)).await {
        Ok(made) => made.map_err(|error| error.to_string()),
        Err(_) => Err("no answer in time: check that Secrets Manager and the database are reachable".to_owned()),
    }
}

async fn make_handler(sdk_config: &SdkConfig, until: Instant) -> Result<Handler, Error> {
    let config = read_config()?;
    roots::of_bundle()?;
    let mapping = Mapping::load(config.mapping_file)?;
    let secrets = Secrets::new(sdk_config);
    let connected_store = async {
        let store = Store::new(config.database, secrets.clone(), sdk_config.clone(), &mapping).await?;
        // Initialisation has more CPU than an invocation. A failure is not an error: the database may be up for the first batch.
        match timeout_at(until - (until - Instant::now()) / 10, store.connect()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot connect yet; the first batch retries"),
            Err(_) => tracing::warn!(error = "no answer in time", "cannot connect yet; the first batch retries"),
        }
        Ok::<_, StoreError>(store)
    };
    let reading_keyring =
        FreshKeyring::read(secrets.clone(), config.masking_secret_id, config.secrets_ttl, mapping.masks());
    let (store, keyring) = tokio::join!(connected_store, reading_keyring);
    let (keyring, store) = (keyring?, store?);
    let redelivery = Redelivery::new(sdk_config.clone(), config.outage_delay);
    Ok(Handler::new(mapping, keyring, store, redelivery))
}
