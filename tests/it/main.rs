//! Tests the function's library against a real PostgreSQL over TLS, with its secrets in LocalStack's Secrets Manager.
//!
//! `./local/test` starts both, and sets environment variables with their addresses. Without them, every test fails.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

mod faults;
mod hostile;
mod keyrings;
mod ledger;
mod loading;
mod mappings;
mod masks;
mod outages;
mod proxy;
mod redelivery;
mod responses;
mod sign_in;
mod tls;
mod world;
