//! The Lambda function's program.

use std::sync::Arc;

use lambda_runtime::{Error, Runtime, layers::TracingLayer, service_fn};
use login_etl::{function::Function, logging, runtime::PassEvents};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    logging::init();
    let function = Arc::new(Function::start().await);
    // On Lambda Managed Instances, several invocations run at once; elsewhere, one after the other.
    let invoke = service_fn(move |event| {
        let function = Arc::clone(&function);
        async move { function.invoke(event).await }
    });
    Runtime::new(invoke).layer(PassEvents).layer(TracingLayer::new()).run_concurrent().await
}
