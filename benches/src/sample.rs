//! An event as SQS delivers it, of some 1,000 bytes a message.

use serde_json::json;

/// The JSON of an event with this many messages, always the same.
pub fn event(messages: usize) -> String {
    let records = (0..messages).map(|number| {
        let body = json!({
            "user_id": format!("424cdd21-063a-43a7-b91b-7ca1a83{number:05x}"),
            "app_version": "2.3.0",
            "device_type": "android",
            "ip": format!("199.172.{}.{}", number >> 8 & 255, number & 255),
            "locale": if number % 3 == 0 { None } else { Some("RU") },
            "device_id": format!("593-47-{number:04}"),
        });
        json!({
            "messageId": format!("059f36b4-87a3-44ab-83d2-6619758{number:05x}"),
            "receiptHandle": "A".repeat(412),
            "body": body.to_string(),
            "attributes": {
                "ApproximateReceiveCount": "1",
                "SentTimestamp": "1545082649183",
                "SenderId": "AIDAIENQZJOLO23YVJ4VO",
                "ApproximateFirstReceiveTimestamp": "1545082649185",
            },
            "messageAttributes": {},
            "md5OfBody": "e4e68fb7bd0e697a0ae8f1bb342846b3",
            "eventSource": "aws:sqs",
            "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:logins",
            "awsRegion": "us-east-1",
        })
    });
    json!({"Records": records.collect::<Vec<_>>()}).to_string()
}
