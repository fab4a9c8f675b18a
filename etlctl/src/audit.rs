//! Audit records: who recovered what, and why. Each is committed before anything is shown.

use std::collections::BTreeSet;

use aws_config::SdkConfig;
use tokio_postgres::{Client, types::Type};

use crate::{
    output::{Failure, failed, sql},
    settings::Settings,
};

/// Above this number of masks, a record lists none of them.
const MASKS_MAX: usize = 1000;

/// The record of a recovery.
#[derive(Debug)]
pub struct Record<'a> {
    /// `recover`, `reveal` or `export`.
    pub action: &'static str,
    /// Why, in the operator's words.
    pub reason: &'a str,
    /// Where the masks came from.
    pub source: &'a str,
    /// How many values were asked for.
    pub requested: usize,
    /// How many were shown.
    pub recovered: usize,
    /// The masks that were recovered. Other input is left out, as it may be a plain value given by mistake.
    pub masks: &'a [&'a str],
}

/// Fails if the reason is blank.
pub fn check_reason(reason: &str) -> Result<(), Failure> {
    if reason.trim().is_empty() { Err(Failure::Usage("--reason is blank".to_owned())) } else { Ok(()) }
}

/// Writes the record, and returns once the server has it on disk.
pub async fn write(client: &mut Client, settings: &Settings, record: &Record<'_>) -> Result<(), Failure> {
    let operator = operator(&settings.aws).await;
    let keys: BTreeSet<&str> = record.masks.iter().map(|masked| login_etl::keyring::key_id(masked)).collect();
    let keys: Vec<&str> = keys.into_iter().collect();
    let masks = (record.masks.len() <= MASKS_MAX).then_some(record.masks);
    let number = |count: usize| i32::try_from(count).map_err(|_| failed("too many values for one record"));
    let what = || sql("record this in etl_audit, so nothing is shown");

    let transaction = client.transaction().await.map_err(what())?;
    // The server may be configured to confirm a commit before it is on disk.
    transaction.batch_execute("set local synchronous_commit = on").await.map_err(what())?;
    let insert = format!(
        "insert into {}.etl_audit (operator, action, reason, source, requested, recovered, key_ids, masks) \
         values ($1, $2, $3, $4, $5, $6, $7, $8)",
        settings.schema
    );
    let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 8] = [
        (&operator, Type::TEXT),
        (&record.action, Type::TEXT),
        (&record.reason, Type::TEXT),
        (&record.source, Type::TEXT),
        (&number(record.requested)?, Type::INT4),
        (&number(record.recovered)?, Type::INT4),
        (&keys, Type::TEXT_ARRAY),
        (&masks, Type::TEXT_ARRAY),
    ];
    let written = transaction.execute_typed(&insert, &parameters).await.map_err(what())?;
    if written != 1 {
        return Err(failed("a rule or trigger of etl_audit dropped the record, so nothing is shown"));
    }
    transaction.commit().await.map_err(what())
}

/// Who runs this: the AWS identity, which AWS has verified, and the user and host, which nobody has.
pub async fn operator(aws: &SdkConfig) -> String {
    let identity = aws_sdk_sts::Client::new(aws).get_caller_identity().send().await;
    let arn = identity.ok().and_then(|identity| identity.arn).unwrap_or_else(|| "unknown to AWS".to_owned());
    let user = ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    let host = std::fs::read_to_string("/etc/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    let or_unknown =
        |value: Option<String>| value.map_or_else(|| "unknown".to_owned(), |value| value.trim().to_owned());
    format!("{arn} ({}@{})", or_unknown(user), or_unknown(host))
}
