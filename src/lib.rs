//! Loads JSON messages from SQS into PostgreSQL, as `mapping.toml` declares: personal fields masked, every message exactly once.
//!
//! ```text
//! bytes ─ event ─→ messages
//! prepare   mapping   body → row, or why it is invalid
//!           keyring   a personal field → its mask
//! store     rows and ledger entries → PostgreSQL, in one transaction
//! settle    every message has one fate
//!           redelivery  after an outage: exponential backoff
//!           metrics     one event a batch
//! ─→ SqsBatchResponse
//! ```
//!
//! [`handler`] takes a batch through these stages; [`function`] makes the handler.
//!
//! A failure is the fault of
//! - a message: only this message is reported, and SQS redelivers only this one;
//! - the batch (the database is down, the time is up): the invocation fails, and the whole batch returns to the queue. The ledger
//!   keeps rows from being written twice;
//! - the operator (a setting, a secret, the mapping): every batch fails with the reason, until it is fixed.
//!
//! To add
//! - a conversion: its variant goes in `mapping/convert.rs`, its use in `mapping/row.rs`, the types it fits in `mapping/file.rs`;
//! - a normalisation: `mapping/convert.rs`. `etlctl find` and `keys remask` apply normalisations before they mask, but no conversions;
//! - a column type: its variant goes in `mapping/mod.rs`, its bytes in `mapping/row.rs`, its array in `store/sql.rs`;
//! - a cipher: its name and key go in `keyring/text.rs`, its `Cipher` in `keyring/cipher.rs`.
//!
//! `docs/develop.md` has what a log line, a metric, a setting and a migration need besides.

#[cfg(feature = "lambda")]
pub mod config;
pub mod event;
#[cfg(feature = "lambda")]
pub mod function;
#[cfg(feature = "lambda")]
pub mod handler;
pub mod keyring;
#[cfg(feature = "lambda")]
pub mod logging;
pub mod mapping;
#[cfg(feature = "lambda")]
pub mod metrics;
#[cfg(feature = "lambda")]
pub mod redelivery;
#[cfg(feature = "lambda")]
pub mod roots;
#[cfg(feature = "lambda")]
pub mod runtime;
#[cfg(feature = "lambda")]
pub mod secrets;
#[cfg(feature = "lambda")]
pub mod sign_in;
#[cfg(feature = "lambda")]
pub mod store;
