//! Checks of the function, its event source mapping, the queues and the secrets.

use std::collections::HashMap;

use aws_sdk_lambda::types::{EventSourceMappingConfiguration, FunctionResponseType};
use aws_sdk_sqs::types::QueueAttributeName;
use login_etl::{config::SignIn, secrets::SecretError};
use serde_json::Value;

use super::Checks;
use crate::{
    find::key_name,
    output::{Failure, aws, count},
    settings::Settings,
};

/// What the checks of the database need to know about the pipeline.
pub(super) struct Pipeline {
    /// The event source mapping's `MaximumConcurrency`, if it has one.
    pub(super) concurrency: Option<i32>,
}

/// With fewer receives than this, a short outage sends good messages to the dead-letter queue. AWS recommends it for Lambda.
const RECEIVES: u32 = 5;

pub(super) async fn check(settings: &Settings, checks: &mut Checks) -> Option<Pipeline> {
    checks.area = "function";
    let function = checks.have(function(settings).await);
    let timeout = function.as_ref().map(|function| function.timeout);
    if let Some(function) = &function {
        checks.right(format!("{} has {} MB and {} s", function.name, function.memory, function.timeout));
        checks.check(
            function.level.as_deref().is_none_or(|level| matches!(level, "TRACE" | "DEBUG" | "INFO")),
            format!("it logs at {}", function.level.as_deref().unwrap_or("INFO")),
            "set the template's LogLevel to INFO: above that, the function's counts and metrics are lost",
        );
        if let Some(is_latest) = function.is_latest {
            checks.consider(
                is_latest,
                if is_latest { "the live version is the latest" } else { "the live version is not the latest" },
                "wait for the deployment, or deploy again with another Release: settings go live with a new version",
            );
        }
    }

    checks.area = "event source mapping";
    let queue_url = settings.require("QUEUE_URL");
    let queue = checks.have(async { queue(settings, &queue_url?).await }.await);
    let mapping = checks.have(mapping(settings, queue.as_ref()).await).flatten();
    let window = mapping.as_ref().and_then(|mapping| mapping.maximum_batching_window_in_seconds).unwrap_or(0);
    let concurrency = mapping.as_ref().and_then(|mapping| mapping.scaling_config.as_ref()?.maximum_concurrency);
    if function.is_some() && queue.is_some() && mapping.is_none() {
        checks.check(
            false,
            "there is none from the queue to the function",
            "deploy the stack again: until then no message is loaded",
        );
    }
    if let Some(mapping) = &mapping {
        mapping_checks(checks, mapping, concurrency, function.as_ref().and_then(|function| function.reserved));
    }

    checks.area = "queue";
    let dead =
        if let Some(queue) = &queue { queue_checks(settings, checks, queue, timeout, window).await } else { None };
    checks.area = "dead-letter queue";
    if let (Some(queue), Some(dead)) = (&queue, dead) {
        let (of_queue, of_dead) = (queue.number("MessageRetentionPeriod"), dead.number("MessageRetentionPeriod"));
        checks.check(
            of_dead >= of_queue,
            format!("it keeps messages for {}, the queue for {}", days(of_dead), days(of_queue)),
            "raise its MessageRetentionPeriod: a dead message keeps its age, and would expire too early",
        );
        let waiting = dead.number("ApproximateNumberOfMessages");
        checks.consider(
            waiting == 0,
            if waiting == 0 { "it is empty".to_owned() } else { format!("it has {}", count(waiting, "message")) },
            "run `etlctl dlq explain`: it shows why they died",
        );
    }

    secrets(settings, checks).await;
    Some(Pipeline { concurrency })
}

async fn secrets(settings: &Settings, checks: &mut Checks) {
    checks.area = "secrets";
    if let Some(id) = checks.have(settings.require("MASKING_SECRET_ID")) {
        let masks: Vec<_> = settings.mapping.masks().collect();
        match settings.secrets().keyring(&id, &masks).await {
            Ok(keyring) => {
                let ciphers: Vec<_> = keyring.keys().map(|(id, cipher)| format!("{} {cipher}", key_name(id))).collect();
                let active = key_name(keyring.active());
                let one_way = keyring.one_way().map(|id| format!("; one-way: {id}")).unwrap_or_default();
                checks.right(format!("the keyring parses: {}; active: {active}{one_way}", ciphers.join(", ")));
            }
            Err(error) => {
                let advice = "restore its last good version (Secrets Manager keeps one as AWSPREVIOUS), or correct it: \
                              docs/settings.md shows its two forms";
                unusable(checks, error, advice);
            }
        }
    }
    let function = settings.function();
    // The database checks report invalid settings.
    if let Ok(SignIn::Iam { user }) = function.map(|function| function.database.sign_in) {
        checks.right(format!("the function needs no credentials: it signs in as {user:?} with tokens"));
    } else if let Some(id) = checks.have(settings.require("DATABASE_SECRET_ID")) {
        match settings.secrets().credentials(&id).await {
            Ok(credentials) => {
                checks.right(format!("the function's credentials parse: user {:?}", credentials.username()));
            }
            Err(error) => unusable(checks, error, "correct it: the function then reads it again by itself"),
        }
    }
}

/// Records a wrong secret as failed, and an unreadable secret as unknown.
fn unusable(checks: &mut Checks, error: SecretError, advice: &str) {
    let known = match &error {
        SecretError::Read { code, .. } => {
            matches!(code.as_str(), "ResourceNotFoundException" | "InvalidRequestException")
        }
        _ => true,
    };
    let failure = Failure::from(error);
    if known {
        checks.check(false, failure.why(), advice);
    } else {
        checks.have(Err::<(), _>(failure));
    }
}

struct Function {
    name: String,
    timeout: i64,
    memory: i32,
    level: Option<String>,
    reserved: Option<i32>,
    /// Whether the live version is the latest one. `None` without an alias.
    is_latest: Option<bool>,
}

async fn function(settings: &Settings) -> Result<Function, Failure> {
    let name = settings.require("FUNCTION_NAME")?;
    let configuration = settings.function_configuration(&name).await?;
    let unqualified = unqualified(&name);
    let is_latest = if unqualified == name {
        None
    } else {
        let latest = settings.function_configuration(unqualified).await?;
        Some(
            latest.code_sha256() == configuration.code_sha256()
                && latest.environment() == configuration.environment()
                && latest.memory_size() == configuration.memory_size()
                && latest.timeout() == configuration.timeout(),
        )
    };
    let client = aws_sdk_lambda::Client::new(&settings.aws);
    let concurrency = client.get_function_concurrency().function_name(unqualified).send().await;
    let concurrency = concurrency.map_err(aws(format_args!("read the concurrency of {name:?}")))?;
    let level = configuration.logging_config().and_then(|logging| logging.application_log_level());
    Ok(Function {
        timeout: i64::from(configuration.timeout().unwrap_or(3)),
        memory: configuration.memory_size().unwrap_or(128),
        level: level.map(|level| level.as_str().to_owned()),
        reserved: concurrency.reserved_concurrent_executions,
        is_latest,
        name,
    })
}

/// A queue's attributes by name.
struct Queue(HashMap<QueueAttributeName, String>);

impl Queue {
    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(&QueueAttributeName::from(name)).map(String::as_str)
    }

    fn number(&self, name: &str) -> i64 {
        self.text(name).and_then(|number| number.parse().ok()).unwrap_or(0)
    }
}

async fn queue(settings: &Settings, url: &str) -> Result<Queue, Failure> {
    let client = aws_sdk_sqs::Client::new(&settings.aws);
    let attributes = client.get_queue_attributes().queue_url(url).attribute_names(QueueAttributeName::All).send().await;
    let attributes = attributes.map_err(aws(format_args!("look at the queue {url}")))?;
    Ok(Queue(attributes.attributes.unwrap_or_default()))
}

/// A function's name without its alias.
fn unqualified(name: &str) -> &str {
    match name.rsplit_once(':') {
        // An ARN without an alias ends with the name: arn:aws:lambda:region:account:function:name
        Some((function, _)) if !function.ends_with(":function") => function,
        _ => name,
    }
}

async fn mapping(
    settings: &Settings,
    queue: Option<&Queue>,
) -> Result<Option<EventSourceMappingConfiguration>, Failure> {
    let name = settings.require("FUNCTION_NAME")?;
    let client = aws_sdk_lambda::Client::new(&settings.aws);
    let arn = queue.and_then(|queue| queue.text("QueueArn")).map(ToOwned::to_owned);
    // A queue and a function have one event source mapping at most.
    let request = client.list_event_source_mappings().function_name(&name).set_event_source_arn(arn);
    let mappings = request.send().await.map_err(aws("read the event source mappings"))?;
    Ok(mappings.event_source_mappings.unwrap_or_default().into_iter().next())
}

fn mapping_checks(
    checks: &mut Checks,
    mapping: &EventSourceMappingConfiguration,
    concurrency: Option<i32>,
    reserved: Option<i32>,
) {
    let state = mapping.state().unwrap_or("unknown");
    checks.check(state == "Enabled", format!("it is {state}"), "enable it: until then messages wait, and expire");
    let reports = mapping.function_response_types().contains(&FunctionResponseType::ReportBatchItemFailures);
    checks.check(
        reports,
        if reports { "it has ReportBatchItemFailures" } else { "it lacks ReportBatchItemFailures" },
        "set FunctionResponseTypes to [ReportBatchItemFailures]: without it, failed messages are deleted as if they were loaded",
    );
    let filters: Vec<_> = mapping.filter_criteria().map(|criteria| criteria.filters()).unwrap_or_default().to_vec();
    let filters: Vec<_> =
        filters.iter().filter_map(|filter| filter.pattern()).filter(|pattern| !is_empty(pattern)).collect();
    checks.check(
        filters.is_empty(),
        if filters.is_empty() {
            "no filter deletes messages".to_owned()
        } else {
            format!("it filters: {}", filters.join(", "))
        },
        "remove the filter: Lambda deletes every message that does not match it",
    );
    match (concurrency, reserved) {
        (Some(most), Some(reserved)) => checks.check(
            most <= reserved,
            format!("MaximumConcurrency is {most}, the function's reserved concurrency {reserved}"),
            "lower MaximumConcurrency to the reserved concurrency: throttled batches count as receives",
        ),
        (Some(most), None) => checks.right(format!("MaximumConcurrency is {most}")),
        (None, _) => checks.consider(
            mapping.provisioned_poller_config().is_some(),
            "it has no MaximumConcurrency",
            "set MaximumConcurrency: it limits the connections to the database",
        ),
    }
}

fn days(seconds: i64) -> String {
    count(seconds / 86_400, "day")
}

fn is_empty(pattern: &str) -> bool {
    serde_json::from_str::<Value>(pattern)
        .is_ok_and(|pattern| pattern.as_object().is_some_and(serde_json::Map::is_empty))
}

/// Checks the queue. Returns the dead-letter queue.
async fn queue_checks(
    settings: &Settings,
    checks: &mut Checks,
    queue: &Queue,
    timeout: Option<i64>,
    window: i32,
) -> Option<Queue> {
    if let Some(timeout) = timeout {
        let visibility = queue.number("VisibilityTimeout");
        let wanted = 6 * timeout + i64::from(window);
        checks.check(
            visibility >= wanted,
            format!("its visibility timeout is {visibility} s, for a function timeout of {timeout} s and a window of {window} s"),
            format!(
                "raise VisibilityTimeout to {wanted} s (6 × timeout + window): otherwise messages are redelivered while they \
                 are still being handled"
            ),
        );
    }
    let policy = queue.text("RedrivePolicy").and_then(|policy| serde_json::from_str::<Value>(policy).ok());
    let Some(policy) = policy else {
        let advice = "give it a RedrivePolicy: otherwise a bad message is redelivered until it expires, and is lost";
        checks.check(false, "it has no dead-letter queue", advice);
        return None;
    };
    // A number, with or without quotes.
    let receives = policy["maxReceiveCount"].to_string().trim_matches('"').parse::<u32>().unwrap_or(0);
    checks.consider(
        receives >= RECEIVES,
        format!("a message is received up to {}", count(receives, "time")),
        format!("raise MaxReceiveCount to {RECEIVES} or more: throttling and short outages count as receives, too"),
    );
    let arn = policy["deadLetterTargetArn"].as_str().unwrap_or_default();
    let configured = checks.have(async { self::queue(settings, &settings.require("DLQ_URL")?).await }.await)?;
    checks.check(
        configured.text("QueueArn") == Some(arn),
        format!("its dead letters go to {arn}"),
        format!("correct DLQ_URL, which names {}, or the RedrivePolicy", configured.text("QueueArn").unwrap_or("none")),
    );
    Some(configured)
}
