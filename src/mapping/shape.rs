//! Recognises bodies that the mapping does not expect, such as envelopes and encodings. The result only explains a refusal:
//! nothing is unwrapped or decoded by it.

use std::borrow::Cow;

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// What a body seems to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shape {
    /// <https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html>
    #[error(
        "it seems to be an SNS notification; turn on raw message delivery, or set `unwrap = \"sns\"` in the mapping"
    )]
    SnsNotification,
    /// <https://docs.aws.amazon.com/eventbridge/latest/ref/overiew-event-structure.html>
    #[error("it seems to be an EventBridge event; its fields are under `detail`, as in `from = \"detail.ip\"`")]
    EventBridgeEvent,
    /// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-managing-large-messages.html>
    #[error("it seems to be a pointer of the SQS extended client; messages in S3 are not supported")]
    S3Pointer,
    /// JSON inside a JSON string.
    #[error("it seems to be JSON that was encoded twice")]
    EncodedTwice,
    /// A JSON array.
    #[error("it is a list; send each element as its own message")]
    List,
    /// Base64.
    #[error("it seems to be Base64; send the text itself")]
    Base64,
    /// Gzip, in Base64 or not.
    #[error("it seems to be gzip; send the text uncompressed")]
    Gzip,
    /// U+FEFF before the text.
    #[error("it begins with a byte order mark; send it without the mark")]
    ByteOrderMark,
}

/// Minimum length at which a decodable text is called Base64.
const BASE64_MIN: usize = 16;
/// Gzip's first three bytes in Base64.
const GZIP_BASE64: &str = "H4sI";

/// Recognises a text that is not JSON.
#[cold]
pub(super) fn of_text(text: &str) -> Option<Shape> {
    let bare = text.trim();
    if text.starts_with('\u{feff}') {
        Some(Shape::ByteOrderMark)
    } else if bare.starts_with(GZIP_BASE64) || bare.starts_with('\u{1f}') {
        Some(Shape::Gzip)
    } else if bare.len() >= BASE64_MIN && BASE64.decode(bare).is_ok() {
        Some(Shape::Base64)
    } else {
        None
    }
}

/// Recognises a JSON value that is not an object.
#[cold]
pub(super) fn of_value(json: &str) -> Option<Shape> {
    const POINTERS: [&str; 2] =
        ["software.amazon.payloadoffloading.PayloadS3Pointer", "com.amazon.sqs.javamessaging.MessageS3Pointer"];

    if let Ok(text) = serde_json::from_str::<String>(json) {
        let is_encoded = text.trim_start().starts_with(['{', '[']) && serde_json::from_str::<IgnoredAny>(&text).is_ok();
        return if is_encoded { Some(Shape::EncodedTwice) } else { of_text(&text) };
    }
    if serde_json::from_str::<(Cow<'_, str>, IgnoredAny)>(json).is_ok_and(|(class, _)| POINTERS.contains(&&*class)) {
        return Some(Shape::S3Pointer);
    }
    json.trim_start().starts_with('[').then_some(Shape::List)
}

/// Recognises an object that lacks a field.
#[cold]
pub(super) fn of_object(json: &str) -> Option<Shape> {
    #[derive(Deserialize)]
    struct EventBridgeEvent {
        #[serde(rename = "detail-type")]
        _detail_type: IgnoredAny,
        #[serde(rename = "source")]
        _source: IgnoredAny,
        #[serde(rename = "detail")]
        _detail: IgnoredAny,
    }

    if sns_message(json).is_some() {
        Some(Shape::SnsNotification)
    } else if serde_json::from_str::<EventBridgeEvent>(json).is_ok() {
        Some(Shape::EventBridgeEvent)
    } else {
        None
    }
}

/// The message in an SNS notification; `None` if the body is not an SNS notification.
pub(super) fn sns_message(json: &str) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Notification<'a> {
        #[serde(borrow, rename = "Type")]
        kind: Cow<'a, str>,
        #[serde(rename = "TopicArn")]
        _topic_arn: IgnoredAny,
        #[serde(borrow, rename = "Message")]
        message: Cow<'a, str>,
    }

    let notification: Notification<'_> = serde_json::from_str(json).ok()?;
    (notification.kind == "Notification").then_some(notification.message)
}
