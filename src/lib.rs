//! Login events from SQS into PostgreSQL: masked, exactly once.
//!
//! ```text
//! bytes ─ handler ─┬─ event   its messages
//!                  ├─ login   body → Login, validated
//!                  ├─ mask    ip, device_id → Masked
//!                  ├─ store   rows and ledger entries → PostgreSQL, in one transaction
//!                  ├─ metrics one event a batch
//!                  └─ redelivery  after an outage: later and later
//!       ─→ SqsBatchResponse
//! ```
//!
//! Whose fault is it? A message's: it alone is reported, and SQS redelivers it alone. The batch's (the database is
//! down, the time is up): the invocation fails, and all of it comes back; the ledger keeps what was written from being
//! written twice. The operator's (a setting, a secret): the environment does not start, and says why.
//!
//! To load another kind of message, change [`login`], the inserts in `store/`, and `schema/`.

pub mod config;
pub mod event;
pub mod handler;
pub mod logging;
pub mod login;
pub mod mask;
pub mod metrics;
pub mod redelivery;
pub mod runtime;
mod scan;
pub mod secrets;
pub mod store;
