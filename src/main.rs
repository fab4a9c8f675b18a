//! The Lambda function: reads its settings and secrets, connects, and handles batches.

use std::{sync::Arc, time::Duration};

use lambda_runtime::{Diagnostic, Error, Runtime, layers::TracingLayer, service_fn};
use lambda_runtime_api_client::{Client, body::Body, build_request};
use login_etl::{
    config::{self, Config},
    handler::Handler,
    logging,
    mapping::Mapping,
    redelivery::Redelivery,
    runtime::PassEvents,
    secrets::{FreshKeyring, Secrets},
    store::{Store, StoreError},
};
use tokio::time::{Instant, timeout_at};

/// Within the 10 s that Lambda gives initialisation.
const INIT_TIME: Duration = Duration::from_secs(9);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    logging::init();
    match init().await {
        Ok(handler) => {
            // Several invocations at once where Lambda says so, on Managed Instances; elsewhere one after the other.
            let invoke = service_fn(move |event| {
                let handler = Arc::clone(&handler);
                async move { handler.invoke(event).await }
            });
            Runtime::new(invoke).layer(PassEvents).layer(TracingLayer::new()).run_concurrent().await
        }
        Err(error) => {
            tracing::error!(%error, "initialisation failed");
            report_init_error(error.to_string()).await
        }
    }
}

async fn init() -> Result<Arc<Handler>, Error> {
    let started = Instant::now();
    let config = Config::from_variables(|name| std::env::var(name).ok())?;
    let mapping = Mapping::load(config.mapping_file)?;
    let sdk_config = config::sdk_config().await;
    let secrets = Secrets::new(&sdk_config);
    let connected_store = async {
        let store = Store::new(config.database, secrets.clone(), &mapping).await?;
        // Initialisation has more CPU than an invocation. A database that is down now may be up for the first batch.
        match timeout_at(started + INIT_TIME, store.connect()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "no connection yet"),
            Err(_) => tracing::warn!(error = "no answer in time", "no connection yet"),
        }
        Ok::<_, StoreError>(store)
    };
    let reading_keyring =
        FreshKeyring::read(secrets.clone(), config.masking_secret_id, config.secrets_ttl, mapping.masks());
    let (store, keyring) = tokio::join!(connected_store, reading_keyring);
    let (keyring, store) = (keyring?, store?);
    let redelivery = Redelivery::new(sdk_config, config.outage_delay);
    Ok(Arc::new(Handler::new(mapping, keyring, store, redelivery)))
}

/// Tells Lambda why the environment cannot start, so that the reason shows in the invocation's error.
async fn report_init_error(error_message: String) -> Result<(), Error> {
    let diagnostic = Diagnostic { error_type: "Init".to_owned(), error_message };
    let request = build_request()
        .method("POST")
        .uri("/2018-06-01/runtime/init/error")
        .header("lambda-runtime-function-error-type", "Init")
        .body(Body::from(serde_json::to_vec(&diagnostic)?))?;
    Client::builder().build()?.call(request).await?;
    std::process::exit(1);
}
