//! A database, secrets and a handler for a single test.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime},
};

use aws_lambda_events::sqs::{SqsBatchResponse, SqsEvent};
use lambda_runtime::{Context, LambdaEvent};
use login_etl::{
    config::{self, Config},
    handler::{BatchError, Handler, Times},
    keyring::Keyring,
    mapping::Mapping,
    redelivery::Redelivery,
    roots,
    runtime::Event,
    secrets::{FreshKeyring, Secrets},
    store::{Store, StoreError},
};
use serde_json::{Value, json};
use tokio_postgres::{Client, NoTls, Row, config::SslMode};

/// An AES-256 key with an explicit IV.
pub const KEYRING: &str = r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
                              "iv": "000102030405060708090a0b0c0d0e0f"}"#;

const SCHEMA: [&str; 5] = [
    include_str!("../../schema/001_ledger.sql"),
    include_str!("../../schema/002_roles.sql"),
    include_str!("../../schema/003_audit.sql"),
    include_str!("../../schema/004_privacy.sql"),
    include_str!("../../schema/user_logins.sql"),
];

/// Reads an environment variable with a server's address or credentials.
pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run ./local/test, or ./local/demo --keep and then `set -a; . target/local/env`")
    })
}

pub struct World {
    pub database: String,
    pub admin: Client,
    secrets: aws_sdk_secretsmanager::Client,
    superuser: tokio_postgres::Config,
    /// Overrides of the function's settings.
    pub settings: HashMap<&'static str, String>,
}

impl World {
    /// A new database with the schema, and secrets with the credentials of the function's own user.
    pub async fn new() -> Self {
        Self::in_encoding("UTF8").await
    }

    /// Like [`new`](Self::new), with a database in this encoding.
    pub async fn in_encoding(encoding: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let database = format!("test_{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));

        let aws = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .endpoint_url(variable("AWS_ENDPOINT_URL"))
            .load()
            .await;
        let secrets = aws_sdk_secretsmanager::Client::new(&aws);
        let known = secrets.get_secret_value().secret_id(variable("DATABASE_SECRET_ID")).send().await.unwrap();
        let known: Value = serde_json::from_str(known.secret_string().unwrap()).unwrap();
        let [user, password] = ["username", "password"].map(|name| known[name].as_str().unwrap().to_owned());

        let mut superuser = tokio_postgres::Config::new();
        superuser.host("127.0.0.1").port(variable("DATABASE_PORT").parse().unwrap());
        superuser.user("postgres").password(variable("DATABASE_ADMIN_PASSWORD"));
        superuser.ssl_mode(SslMode::Disable);
        let server = connect(superuser.dbname("postgres")).await;
        let create = format!("create database {database} encoding '{encoding}' locale 'C' template template0");
        server.batch_execute(&create).await.unwrap();
        let admin = connect(superuser.dbname(&database)).await;
        // `./local/test` runs all tests with each way of writing a batch.
        let way = |name| (name, std::env::var(name).unwrap_or_default());
        let settings = HashMap::from([
            way("COPY_THRESHOLD"),
            way("PREPARED_STATEMENTS"),
            ("MASKING_SECRET_ID", format!("{database}/masking")),
            ("DATABASE_SECRET_ID", format!("{database}/database")),
            ("DATABASE_HOST", "localhost".to_owned()),
            ("DATABASE_PORT", variable("DATABASE_PORT")),
            ("DATABASE_CA", variable("DATABASE_CA")),
        ]);
        let world = Self { secrets, superuser, admin, settings, database };
        world.apply_schema().await;
        world.create_secret("masking", KEYRING).await;
        world.create_secret("database", &world.credentials(&user, &password)).await;
        world
    }

    pub async fn apply_schema(&self) {
        // The role belongs to the whole server, and two sessions cannot alter it at once.
        static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let _alone = ALONE.lock().await;
        for file in SCHEMA {
            self.admin.batch_execute(file).await.unwrap();
        }
    }

    pub fn credentials(&self, username: &str, password: &str) -> String {
        json!({"username": username, "password": password, "dbname": self.database}).to_string()
    }

    async fn create_secret(&self, name: &str, text: &str) {
        self.create_secret_named(&format!("{}/{name}", self.database), text).await;
    }

    /// Returns its ARN.
    pub async fn create_secret_named(&self, name: &str, text: &str) -> String {
        let created = self.secrets.create_secret().name(name).secret_string(text).send().await.unwrap();
        created.arn.unwrap()
    }

    pub async fn put_secret(&self, name: &str, text: &str) {
        let id = format!("{}/{name}", self.database);
        self.secrets.put_secret_value().secret_id(id).secret_string(text).send().await.unwrap();
    }

    /// Sets the function's mapping.
    pub fn use_mapping(&mut self, text: &str) {
        let file = std::env::temp_dir().join(format!("{}.toml", self.database));
        std::fs::write(&file, text).unwrap();
        self.settings.insert("MAPPING_FILE", file.display().to_string());
    }

    pub async fn handler(&self) -> Handler {
        self.try_handler().await.unwrap()
    }

    pub async fn try_handler(&self) -> Result<Handler, StoreError> {
        let config = Config::from_variables(|name| self.settings.get(name).cloned()).unwrap();
        let sdk_config = config::sdk_config(roots::for_aws()).await;
        let secrets = Secrets::new(&sdk_config);
        let mapping = Mapping::load(config.mapping_file).unwrap();
        let (id, ttl) = (config.masking_secret_id, config.secrets_ttl);
        let keyring = FreshKeyring::read(secrets.clone(), id, ttl, mapping.masks()).await?;
        let store = Store::new(config.database, secrets, sdk_config.clone(), &mapping).await?;
        let redelivery = Redelivery::new(sdk_config, config.outage_delay);
        Ok(Handler::new(mapping, keyring, store, redelivery))
    }

    pub async fn count(&self, table: &str) -> i64 {
        self.admin.query_one(&format!("select count(*) from {table}"), &[]).await.unwrap().get(0)
    }

    pub async fn rows(&self, query: &str) -> Vec<Row> {
        self.admin.query(query, &[]).await.unwrap()
    }

    /// Waits until `condition`, an SQL expression, holds.
    pub async fn until(&self, condition: &str) {
        let query = format!("select {condition}");
        for _ in 0..1000 {
            if self.admin.query_one(&query, &[]).await.unwrap().get(0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not within 10 s: {condition}");
    }

    /// A session that locks the table until it runs `commit`.
    pub async fn lock_table(&self) -> Client {
        let session = connect(&self.superuser).await;
        session.batch_execute("begin; lock table user_logins").await.unwrap();
        session
    }

    /// An SQL expression: how many sessions of the function wait for a lock.
    pub fn waiting(&self) -> String {
        format!(
            "(select count(*) from pg_stat_activity where datname = '{}' \
             and application_name = 'login-etl' and wait_event_type = 'Lock')",
            self.database
        )
    }

    /// Makes the server count the statements that write to the table, including those that fail.
    pub async fn count_statements(&self) {
        let counting = "
            create sequence statements;
            create function count_statement() returns trigger language plpgsql security definer as
                $$ begin perform nextval('statements'); return null; end $$;
            create trigger count_statement before insert on user_logins for each statement execute function count_statement()";
        self.admin.batch_execute(counting).await.unwrap();
    }

    pub async fn statements(&self) -> i64 {
        self.admin.query_one("select last_value from statements", &[]).await.unwrap().get(0)
    }

    /// How many sessions the function has.
    pub async fn sessions(&self) -> i64 {
        self.count("pg_stat_activity where datname = current_database() and application_name = 'login-etl'").await
    }

    /// The server process id of the function's only session.
    pub async fn session(&self) -> i32 {
        let query = "select pid from pg_stat_activity \
                     where datname = current_database() and application_name = 'login-etl'";
        self.admin.query_one(query, &[]).await.unwrap().get(0)
    }

    /// Terminates the function's sessions with a notice to the client, as at a shutdown. Returns how many.
    pub async fn terminate_sessions(&self) -> i64 {
        let query = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
                     where datname = current_database() and application_name = 'login-etl'";
        self.admin.query_one(query, &[]).await.unwrap().get(0)
    }
}

async fn connect(config: &tokio_postgres::Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Invokes the handler with an event's JSON, as the runtime does, with a minute until the deadline: enough on a busy machine.
pub async fn invoke(handler: &Handler, event: &str) -> Result<SqsBatchResponse, BatchError> {
    invoke_within(handler, event, Duration::from_secs(60)).await
}

pub async fn invoke_within(handler: &Handler, event: &str, time: Duration) -> Result<SqsBatchResponse, BatchError> {
    let mut context = Context::default();
    let deadline = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() + time;
    context.deadline = deadline.as_millis() as u64;
    let event = LambdaEvent::new(Event::new(event.to_owned().into(), context.request_id.clone()), context);
    let answer = tokio::time::timeout(time + Duration::from_secs(10), handler.invoke(event)).await;
    answer.expect("no response long after the deadline")
}

/// Handles an event of the schedule.
pub async fn maintain(handler: &Handler) {
    let mut context = Context::default();
    let deadline = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() + Duration::from_secs(20);
    context.deadline = deadline.as_millis() as u64;
    handler.maintain(&Times::of(&context), &context).await;
}

pub fn failed(response: &SqsBatchResponse) -> Vec<&str> {
    response.batch_item_failures.iter().map(|failure| failure.item_identifier.as_str()).collect()
}

/// One of the sample events.
pub fn sample(name: &str) -> String {
    std::fs::read_to_string(format!("{}/events/{name}.json", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// The ids of a sample's messages.
pub fn ids(event: &str) -> Vec<String> {
    let event: SqsEvent = serde_json::from_str(event).unwrap();
    event.records.into_iter().map(|message| message.message_id.unwrap()).collect()
}

/// An event of messages with these bodies. Their ids count up from `first`.
pub fn event<B: AsRef<str>>(first: u128, bodies: impl IntoIterator<Item = B>) -> String {
    event_of((first..).zip(bodies))
}

/// An event of messages with these bodies. The numbers give their ids.
pub fn event_of<B: AsRef<str>>(messages: impl IntoIterator<Item = (u128, B)>) -> String {
    let messages = messages.into_iter().enumerate().map(|(place, (number, body))| {
        json!({
            "messageId": message_id(number),
            "receiptHandle": "handle",
            "body": body.as_ref(),
            "attributes": {"SentTimestamp": (1_763_800_000_000 + place).to_string(), "ApproximateReceiveCount": "1"},
            "messageAttributes": {},
            "eventSource": "aws:sqs",
            "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:logins",
            "awsRegion": "us-east-1",
        })
    });
    json!({"Records": messages.collect::<Vec<_>>()}).to_string()
}

pub fn message_id(number: u128) -> String {
    uuid::Uuid::from_u128(number).to_string()
}

/// A valid body. The number makes its values unique.
pub fn body(number: usize) -> String {
    json!({
        "user_id": format!("user-{number}"),
        "app_version": "2.3.0",
        "device_type": "android",
        "ip": format!("10.{}.{}.{}", number >> 16 & 255, number >> 8 & 255, number & 255),
        "locale": "RU",
        "device_id": format!("device-{number}"),
    })
    .to_string()
}

pub fn bodies(numbers: std::ops::Range<usize>) -> Vec<String> {
    numbers.map(body).collect()
}

/// The plain value of a masked column.
pub fn recover(field: &str, masked: &str) -> String {
    Keyring::from_json(KEYRING).unwrap().recover(field, masked).unwrap().to_string()
}
