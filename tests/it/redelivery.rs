//! Messages of a batch that failed for the database's sake come back later than the queue would have it.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_sqs::types::{MessageSystemAttributeName, QueueAttributeName};
use login_etl::{event::messages, redelivery::Redelivery};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::Instant,
};

use crate::world::{World, bodies, event, invoke, variable};

struct Queue {
    sqs: aws_sdk_sqs::Client,
    url: String,
    arn: String,
}

impl Queue {
    /// A queue of its own, whose messages come back after a second.
    async fn new(world: &World) -> Self {
        let sqs = aws_sdk_sqs::Client::new(&login_etl::config::sdk_config().await);
        let created = sqs.create_queue().queue_name(&world.database);
        let created = created.attributes(QueueAttributeName::VisibilityTimeout, "1").send().await.unwrap();
        let url = created.queue_url.unwrap();
        let arn = format!("arn:aws:sqs:{}:000000000000:{}", variable("AWS_REGION"), world.database);
        Self { sqs, url, arn }
    }

    /// Up to ten messages that are visible within a moment: their ids and receipt handles.
    async fn receive(&self) -> Vec<(String, String)> {
        let received = self.sqs.receive_message().queue_url(&self.url).max_number_of_messages(10).wait_time_seconds(2);
        let received = received.message_system_attribute_names(MessageSystemAttributeName::All).send().await.unwrap();
        let messages = received.messages.unwrap_or_default().into_iter();
        messages.map(|message| (message.message_id.unwrap(), message.receipt_handle.unwrap())).collect()
    }
}

/// Sends twelve messages and lets a batch of ten of them fail. Returns how many of these come back by the time that the
/// other two are back and a moment longer, and the others' number.
async fn coming_back(world: &World, queue: &Queue) -> (usize, usize) {
    let mut received = Vec::new();
    for body in bodies(0..12) {
        queue.sqs.send_message().queue_url(&queue.url).message_body(body).send().await.unwrap();
    }
    while received.len() < 12 {
        received.extend(queue.receive().await);
    }
    let mut batch: Value = serde_json::from_str(&event(0, bodies(0..10))).unwrap();
    for (message, (id, receipt_handle)) in batch["Records"].as_array_mut().unwrap().iter_mut().zip(&received) {
        message["messageId"] = json!(id);
        message["receiptHandle"] = json!(receipt_handle);
        message["eventSourceARN"] = json!(queue.arn);
    }
    let answer = invoke(&world.handler().await, &batch.to_string()).await;
    assert_eq!(answer.unwrap_err().error_type(), "DatabaseTls");
    let failed: HashSet<_> = received[..10].iter().map(|(id, _)| id.clone()).collect();
    let mut back = HashSet::new();
    while back.iter().filter(|id| !failed.contains(*id)).count() < 2 {
        back.extend(queue.receive().await.into_iter().map(|(id, _)| id));
    }
    back.extend(queue.receive().await.into_iter().map(|(id, _)| id));
    let others = back.iter().filter(|id| !failed.contains(*id)).count();
    (back.len() - others, others)
}

#[tokio::test]
async fn an_outage_hides_the_messages_of_a_failed_batch_and_no_others() {
    let mut world = World::new().await;
    world.settings.insert("DATABASE_HOST", "127.0.0.1".to_owned()); // which the certificate does not name
    let queue = Queue::new(&world).await;
    assert_eq!(coming_back(&world, &queue).await, (0, 2));
}

#[tokio::test]
async fn without_a_delay_they_come_back_when_the_queue_would_have_it() {
    let mut world = World::new().await;
    world.settings.insert("DATABASE_HOST", "127.0.0.1".to_owned());
    world.settings.insert("OUTAGE_DELAY", "0".to_owned());
    let queue = Queue::new(&world).await;
    assert_eq!(coming_back(&world, &queue).await, (10, 2));
}

#[tokio::test]
async fn without_the_permission_it_is_asked_for_once() {
    let service = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", service.local_addr().unwrap());
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = service.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            let mut request = [0; 16_384];
            let _read = client.read(&mut request).await.unwrap();
            let body = r#"{"__type":"com.amazon.coral.service#AccessDeniedException","message":"not authorized"}"#;
            let head = "HTTP/1.1 403 Forbidden\r\ncontent-type: application/x-amz-json-1.0\r\nconnection: close";
            let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            client.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let usual = login_etl::config::sdk_config().await;
    // Made anew, because the endpoint of the environment goes before one that is set.
    let sdk_config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(usual.region().cloned())
        .credentials_provider(usual.credentials_provider().unwrap())
        .http_client(usual.http_client().unwrap())
        .sleep_impl(usual.sleep_impl().unwrap())
        .time_source(usual.time_source().unwrap())
        .endpoint_url(endpoint)
        .build();
    let redelivery = Redelivery::new(sdk_config, Duration::from_secs(60));
    let event = event(0, bodies(0..20));
    let messages = messages(event.as_bytes()).unwrap();
    for _ in 0..3 {
        redelivery.delay(&messages, Instant::now() + Duration::from_secs(10)).await;
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}
