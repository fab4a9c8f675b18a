//! JSON messages from SQS into PostgreSQL, as `mapping.toml` declares: personal fields masked, every message exactly once.
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
//! [`handler`] leads a batch through that; [`function`] makes the handler.
//!
//! Whose fault is it? A message's: it alone is reported, and SQS redelivers it alone. The batch's (the database is
//! down, the time is up): the invocation fails, and all of it comes back; the ledger keeps what was written from being
//! written twice. The operator's (a setting, a secret, the mapping): every batch fails and says why, until it is mended.
//!
//! To add
//! - a conversion or a normalisation: its variant in `mapping/convert.rs`, where it works in `mapping/row.rs`, which types it fits in
//!   `mapping/file.rs`;
//! - a column type: its variant in `mapping/mod.rs`, its bytes in `mapping/row.rs`, its array in `store/sql.rs`;
//! - a cipher: its name, its key and its `Cipher` in `keyring.rs`.

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
