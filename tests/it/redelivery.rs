//! Messages of a batch that failed with the database are redelivered later than after the queue's visibility timeout.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aws_config::{BehaviorVersion, SdkConfig};
use aws_lambda_events::sqs::SqsBatchResponse;
use aws_sdk_sqs::types::{MessageSystemAttributeName, QueueAttributeName};
use login_etl::{event::messages, handler::Handler, redelivery::Redelivery};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::Instant,
};

use crate::world::{World, bodies, body, event, failed, invoke, variable};

struct Queue {
    sqs: aws_sdk_sqs::Client,
    url: String,
    arn: String,
}

impl Queue {
    /// A new queue with a visibility timeout of four seconds, in which a batch is handled also on a busy machine.
    async fn new(world: &World) -> Self {
        Self::with_visibility(world, 4).await
    }

    async fn with_visibility(world: &World, seconds: u32) -> Self {
        Self::named(&world.database, seconds).await
    }

    /// A FIFO queue if the name ends in `.fifo`.
    async fn named(name: &str, seconds: u32) -> Self {
        let sqs = aws_sdk_sqs::Client::new(&login_etl::config::sdk_config(login_etl::roots::for_aws()).await);
        let mut created = sqs.create_queue().queue_name(name);
        if name.ends_with(".fifo") {
            created = created.attributes(QueueAttributeName::FifoQueue, "true");
        }
        let created = created.attributes(QueueAttributeName::VisibilityTimeout, seconds.to_string());
        let created = created.send().await.unwrap();
        let url = created.queue_url.unwrap();
        let arn = format!("arn:aws:sqs:{}:000000000000:{name}", variable("AWS_REGION"));
        Self { sqs, url, arn }
    }

    /// Receives up to ten messages within two seconds: their ids and receipt handles.
    async fn receive(&self) -> Vec<(String, String)> {
        let received = self.sqs.receive_message().queue_url(&self.url).max_number_of_messages(10).wait_time_seconds(2);
        let received = received.message_system_attribute_names(MessageSystemAttributeName::All).send().await.unwrap();
        let messages = received.messages.unwrap_or_default().into_iter();
        messages.map(|message| (message.message_id.unwrap(), message.receipt_handle.unwrap())).collect()
    }
}

/// Sends messages with these bodies, receives them, and invokes the handler with them in the same order.
async fn hand_over(handler: &Handler, queue: &Queue, bodies: &[String], groups: &[&str]) -> SqsBatchResponse {
    for (index, body) in bodies.iter().enumerate() {
        let message = queue.sqs.send_message().queue_url(&queue.url).message_body(body);
        let group = groups.get(index).map(ToString::to_string);
        let id = group.as_ref().map(|_| index.to_string());
        message.set_message_group_id(group).set_message_deduplication_id(id).send().await.unwrap();
    }
    let mut received = Vec::new();
    while received.len() < bodies.len() {
        received.extend(queue.receive().await);
    }
    let mut batch: Value = serde_json::from_str(&event(0, bodies)).unwrap();
    for (message, (id, receipt_handle)) in batch["Records"].as_array_mut().unwrap().iter_mut().zip(&received) {
        message["messageId"] = json!(id);
        message["receiptHandle"] = json!(receipt_handle);
        message["eventSourceARN"] = json!(queue.arn);
    }
    for (message, group) in batch["Records"].as_array_mut().unwrap().iter_mut().zip(groups) {
        message["attributes"]["MessageGroupId"] = json!(group);
    }
    invoke(handler, &batch.to_string()).await.unwrap()
}

#[tokio::test]
async fn messages_that_can_never_succeed_are_redelivered_at_once() {
    let world = World::new().await;
    world.admin.batch_execute("alter table user_logins add check (user_id <> 'user-2')").await.unwrap();
    let queue = Queue::with_visibility(&world, 600).await;
    let bodies = [body(0), "bad".to_owned(), body(2), body(3), body(4)];
    let response = hand_over(&world.handler().await, &queue, &bodies, &[]).await;
    let failed: HashSet<_> = failed(&response).into_iter().map(ToOwned::to_owned).collect();
    let mut back = HashSet::new();
    while back.len() < 2 {
        back.extend(queue.receive().await.into_iter().map(|(id, _)| id));
    }
    assert_eq!(back, failed);
}

#[tokio::test]
async fn messages_held_back_in_their_group_are_redelivered_at_once() {
    let world = World::new().await;
    let queue = Queue::named(&format!("{}.fifo", world.database), 600).await;
    let bodies = [body(0), "bad".to_owned(), body(2), body(3), body(4), body(5)];
    let groups = ["calm", "held-up", "held-up", "calm", "calm", "calm"];
    let response = hand_over(&world.handler().await, &queue, &bodies, &groups).await;
    let failed: HashSet<_> = failed(&response).into_iter().map(ToOwned::to_owned).collect();
    assert_eq!(failed.len(), 2);
    let mut back = HashSet::new();
    while back.len() < 2 {
        back.extend(queue.receive().await.into_iter().map(|(id, _)| id));
    }
    assert_eq!(back, failed);
}

#[tokio::test]
async fn redelivery_is_not_hastened_if_half_of_the_messages_are_invalid() {
    let world = World::new().await;
    let queue = Queue::with_visibility(&world, 600).await;
    let bodies = [body(0), "bad".to_owned(), "bad".to_owned(), body(3)];
    assert_eq!(failed(&hand_over(&world.handler().await, &queue, &bodies, &[]).await).len(), 2);
    assert_eq!(queue.receive().await, []);
}

#[tokio::test]
async fn a_lone_row_is_redelivered_later_if_the_table_may_be_at_fault() {
    let world = World::new().await;
    world.admin.batch_execute("alter table user_logins add tenant text not null").await.unwrap();
    let queue = Queue::new(&world).await;
    assert_eq!(failed(&hand_over(&world.handler().await, &queue, &[body(0)], &[]).await).len(), 1);
    // Six seconds, in which the visibility timeout passes.
    for _ in 0..3 {
        assert_eq!(queue.receive().await, []);
    }
}

/// Sends twelve messages, and lets a batch of ten of them fail. Waits until the other two are redelivered, and a moment longer.
/// Returns how many of the ten were redelivered by then, and how many others.
async fn coming_back(world: &World, queue: &Queue) -> (usize, usize) {
    let mut received = Vec::new();
    for body in bodies(0..12) {
        queue.sqs.send_message().queue_url(&queue.url).message_body(body).send().await.unwrap();
    }
    let handler = world.handler().await;
    while received.len() < 12 {
        received.extend(queue.receive().await);
    }
    let mut batch: Value = serde_json::from_str(&event(0, bodies(0..10))).unwrap();
    for (message, (id, receipt_handle)) in batch["Records"].as_array_mut().unwrap().iter_mut().zip(&received) {
        message["messageId"] = json!(id);
        message["receiptHandle"] = json!(receipt_handle);
        message["eventSourceARN"] = json!(queue.arn);
    }
    let answer = invoke(&handler, &batch.to_string()).await;
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
    world.settings.insert("DATABASE_HOST", "127.0.0.1".to_owned()); // not in the certificate
    let queue = Queue::new(&world).await;
    assert_eq!(coming_back(&world, &queue).await, (0, 2));
}

#[tokio::test]
async fn without_an_outage_delay_the_visibility_timeout_applies() {
    let mut world = World::new().await;
    world.settings.insert("DATABASE_HOST", "127.0.0.1".to_owned());
    world.settings.insert("OUTAGE_DELAY", "0".to_owned());
    let queue = Queue::new(&world).await;
    assert_eq!(coming_back(&world, &queue).await, (10, 2));
}

#[tokio::test]
async fn without_the_permission_only_one_request_is_sent() {
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
    let usual = login_etl::config::sdk_config(login_etl::roots::for_aws()).await;
    // A new configuration, as the environment's endpoint takes precedence over one set on a copy.
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
        redelivery.delay(messages.iter(), Instant::now() + Duration::from_secs(10)).await;
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}
