//! Hands events to the handler as raw bytes, without the runtime's deserialization.
//!
//! The runtime deserializes an event before a handler sees it, and its errors quote the event. It also checks every byte of JSON
//! that it hands over raw, which costs as much again as reading the event. So it gets `null` to deserialize, and the event waits
//! in a thread-local.

use std::{
    cell::Cell,
    fmt, mem,
    task::{Context, Poll},
};

use bytes::Bytes;
use lambda_runtime::{LambdaInvocation, Service, tower::Layer};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny},
};

thread_local! {
    /// The event of the invocation that is being deserialized on this thread.
    static EVENT: Cell<Option<Event>> = const { Cell::new(None) };
}

/// The payload of an invocation; needs [`PassEvents`] as a layer of the runtime. `Debug` shows none of it.
pub struct Event {
    bytes: Bytes,
    request_id: String,
}

impl Event {
    /// The event of the invocation with this request id.
    pub fn new(bytes: Bytes, request_id: String) -> Self {
        Self { bytes, request_id }
    }

    /// The event's bytes, if it belongs to the invocation with this request id. A mismatch would mean that the runtime no longer
    /// deserializes an event within `call`.
    pub fn of(&self, request_id: &str) -> Option<&[u8]> {
        (self.request_id == request_id).then_some(&self.bytes)
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer)?;
        EVENT.take().ok_or_else(|| D::Error::custom("no event: is PassEvents a layer of the runtime?"))
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").finish_non_exhaustive()
    }
}

/// A layer of the runtime that passes events on as bytes.
#[derive(Clone, Copy, Debug)]
pub struct PassEvents;

impl<S> Layer<S> for PassEvents {
    type Service = PassingEvents<S>;

    fn layer(&self, inner: S) -> Self::Service {
        PassingEvents(inner)
    }
}

/// A service wrapped by [`PassEvents`].
#[derive(Clone, Debug)]
pub struct PassingEvents<S>(S);

impl<S: Service<LambdaInvocation>> Service<LambdaInvocation> for PassingEvents<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    /// The runtime deserializes within this call, not in the future that it returns.
    fn call(&mut self, mut invocation: LambdaInvocation) -> Self::Future {
        let request_id = invocation.context.request_id.clone();
        EVENT.set(Some(Event::new(mem::replace(&mut invocation.body, Bytes::from_static(b"null")), request_id)));
        self.0.call(invocation)
    }
}
