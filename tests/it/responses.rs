//! The response to Lambda for each kind of failure.

use lambda_runtime::{Context, LambdaEvent};
use login_etl::runtime::Event;
use serde_json::{Value, json};

use crate::world::{World, bodies, body, event, failed, ids, invoke, message_id, sample};

#[tokio::test]
async fn bad_messages_are_reported_and_the_good_ones_inserted() {
    let world = World::new().await;
    let event = sample("mixed");
    let ids = ids(&event);
    let response = invoke(&world.handler().await, &event).await.unwrap();
    let expected = json!({"batchItemFailures": [
        {"itemIdentifier": ids[1]}, {"itemIdentifier": ids[2]}, {"itemIdentifier": ids[4]}, {"itemIdentifier": ids[5]},
    ]});
    assert_eq!(serde_json::to_string(&response).unwrap(), expected.to_string());
    assert_eq!(world.count("user_logins").await, 2);
    assert_eq!(world.count("user_logins where locale is null").await, 1);
}

#[tokio::test]
async fn an_empty_event_is_a_success() {
    let world = World::new().await;
    let response = invoke(&world.handler().await, &sample("empty")).await.unwrap();
    assert_eq!(serde_json::to_string(&response).unwrap(), r#"{"batchItemFailures":[]}"#);
}

#[tokio::test]
async fn a_message_without_an_id_fails_the_invocation_before_anything_is_written() {
    let world = World::new().await;
    let handler = world.handler().await;
    for id in [None, Some(json!(null)), Some(json!(""))] {
        let mut event: Value = serde_json::from_str(&event(0, bodies(0..3))).unwrap();
        let message = event["Records"][1].as_object_mut().unwrap();
        message.remove("messageId");
        message.extend(id.map(|id| ("messageId".to_owned(), id)));
        let error = invoke(&handler, &event.to_string()).await.unwrap_err();
        assert_eq!(error.error_type(), "NoMessageId");
    }
    assert_eq!(world.count("user_logins").await, 0);
}

#[tokio::test]
async fn an_event_that_is_not_from_sqs_fails_the_invocation_and_is_not_quoted() {
    let world = World::new().await;
    let handler = world.handler().await;
    for (event, error_type) in [
        ("{}", "InvalidEvent"),
        ("[]", "InvalidEvent"),
        ("null", "InvalidEvent"),
        (r#""canary""#, "InvalidEvent"),
        (r#"{"Records": null}"#, "InvalidEvent"),
        (r#"{"Records": "canary"}"#, "InvalidEvent"),
        (r#"{"Records": ["canary"]}"#, "InvalidEvent"),
        (r#"{"Records": [{"messageId": {"ip": "canary"}}]}"#, "InvalidEvent"),
        (r#"{"Records": [{"messageId": "1", "body": "canary"}"#, "InvalidEvent"),
        (r#"{"source": "aws.events", "detail": {"ip": "canary"}}"#, "InvalidEvent"),
        (r#"{"Records": [{"eventSource": "aws:s3", "s3": {"bucket": {"name": "canary"}}}]}"#, "NoMessageId"),
    ] {
        let error = invoke(&handler, event).await.unwrap_err();
        assert_eq!(error.error_type(), error_type, "{event}");
        assert!(!format!("{error} {error:?}").contains("canary"), "{error:?}");
    }
}

#[tokio::test]
async fn an_invocation_is_never_given_the_event_of_another() {
    let world = World::new().await;
    let mut context = Context::default();
    context.request_id = "one".to_owned();
    let event = Event::new(sample("valid").into(), "another".to_owned());
    let error = world.handler().await.invoke(LambdaEvent::new(event, context)).await.unwrap_err();
    assert_eq!(error.error_type(), "MixedUp");
    assert_eq!(world.count("user_logins").await, 0);
}

#[tokio::test]
async fn missing_bodies_and_attributes_affect_only_their_own_message() {
    let world = World::new().await;
    let event = json!({"Records": [
        {"messageId": "not-a-uuid", "body": body(1)},
        {"messageId": "a", "body": null},
        {"messageId": "b"},
        {"messageId": "c", "body": ""},
        {"messageId": "not-a-uuid-either", "body": body(2), "attributes": {"SentTimestamp": "soon"}},
    ]});
    for _ in 0..2 {
        let response = invoke(&world.handler().await, &event.to_string()).await.unwrap();
        assert_eq!(failed(&response), ["a", "b", "c"]);
    }
    assert_eq!(world.count("user_logins").await, 2);
}

#[tokio::test]
async fn a_second_copy_of_a_bad_message_is_reported_once() {
    let world = World::new().await;
    let mut event: Value = serde_json::from_str(&event(0, ["bad", &body(1)])).unwrap();
    let copy = event["Records"][0].clone();
    event["Records"].as_array_mut().unwrap().push(copy);
    let response = invoke(&world.handler().await, &event.to_string()).await.unwrap();
    assert_eq!(failed(&response), [message_id(0)]);
}

#[tokio::test]
async fn a_second_copy_of_a_refused_message_shares_its_fate() {
    let world = World::new().await;
    world.admin.batch_execute("alter table user_logins add check (user_id <> 'user-1')").await.unwrap();
    let mut event: Value = serde_json::from_str(&event(0, bodies(0..3))).unwrap();
    let copy = event["Records"][1].clone();
    event["Records"].as_array_mut().unwrap().push(copy);
    let response = invoke(&world.handler().await, &event.to_string()).await.unwrap();
    assert_eq!(failed(&response), [message_id(1)]);
    assert_eq!(world.count("user_logins").await, 2);
}

#[tokio::test]
async fn rows_that_postgresql_refuses_are_found_and_fail_alone() {
    let world = World::new().await;
    world
        .admin
        .batch_execute("alter table user_logins add check (user_id not in ('user-0', 'user-517', 'user-999'))")
        .await
        .unwrap();
    let response = invoke(&world.handler().await, &event(0, bodies(0..1000))).await.unwrap();
    assert_eq!(failed(&response), [0, 517, 999].map(message_id));
    assert_eq!(world.count("user_logins").await, 997);
    assert_eq!(world.count("etl_ledger").await, 997);
}

#[tokio::test]
async fn in_a_large_batch_each_message_has_its_own_fate() {
    let world = World::new().await;
    world
        .admin
        .batch_execute("alter table user_logins add check (user_id not in ('user-300', 'user-2999'))")
        .await
        .unwrap();
    let handler = world.handler().await;
    let event = |bad: &[u128]| {
        let mut bodies = bodies(0..3000);
        for place in bad {
            bodies[*place as usize] = "bad".to_owned();
        }
        let mut event: Value = serde_json::from_str(&event(0, bodies)).unwrap();
        // Second copies of a bad message and of a good message.
        for (copy, first) in [(1000, 5), (2000, 10)] {
            event["Records"][copy] = event["Records"][first].clone();
        }
        event.to_string()
    };
    // First without rows that PostgreSQL refuses; then with them, and with rows that are stored already.
    let all_bad = [5, 300, 700, 2500, 2999];
    let response = invoke(&handler, &event(&all_bad)).await.unwrap();
    assert_eq!(failed(&response), all_bad.map(message_id));
    assert_eq!(world.count("user_logins").await, 2993);
    let response = invoke(&handler, &event(&[700])).await.unwrap();
    assert_eq!(failed(&response), [300, 700, 2999].map(message_id));
    assert_eq!(world.count("user_logins").await, 2995);
    assert_eq!(world.count("etl_ledger").await, 2995);
}

#[tokio::test]
async fn a_refused_batch_leaves_no_transaction_open() {
    let mut world = World::new().await;
    world.admin.batch_execute("alter table user_logins add check (user_id <> 'user-7')").await.unwrap();
    for threshold in ["10000", "1"] {
        world.settings.insert("COPY_THRESHOLD", threshold.to_owned());
        let handler = world.handler().await;
        let response = invoke(&handler, &event(0, [body(7)])).await.unwrap();
        assert_eq!(failed(&response), [message_id(0)]);
        let session = world.session().await;
        world.until(&format!("(select state = 'idle' from pg_stat_activity where pid = {session})")).await;
        world.terminate_sessions().await;
        world.until(&format!("not exists (select from pg_stat_activity where pid = {session})")).await;
    }
    assert_eq!(world.count("etl_ledger").await, 0);
}

#[tokio::test]
async fn a_value_too_long_for_a_narrower_column_fails_alone() {
    let world = World::new().await;
    world.admin.batch_execute("alter table user_logins alter device_type type varchar(3)").await.unwrap();
    let bodies = [body(0), body(1).replace("android", "ios"), body(2)];
    let response = invoke(&world.handler().await, &event(0, bodies)).await.unwrap();
    assert_eq!(failed(&response), [0, 2].map(message_id));
    assert_eq!(world.count("user_logins").await, 1);
}

#[tokio::test]
async fn on_a_fifo_queue_the_first_failure_holds_back_the_rest_of_its_group() {
    let world = World::new().await;
    let event = sample("fifo");
    let ids = ids(&event);
    let response = invoke(&world.handler().await, &event).await.unwrap();
    assert_eq!(failed(&response), [&ids[2], &ids[3]]);
    assert_eq!(world.count("user_logins").await, 3);
}

#[tokio::test]
async fn on_a_fifo_queue_a_refused_row_holds_back_the_rest_of_its_group() {
    let world = World::new().await;
    world.admin.batch_execute("alter table user_logins add check (user_id <> 'user-2')").await.unwrap();
    let mut event: Value = serde_json::from_str(&event(0, bodies(0..10))).unwrap();
    for (place, message) in event["Records"].as_array_mut().unwrap().iter_mut().enumerate() {
        message["eventSourceARN"] = json!("arn:aws:sqs:us-east-1:123456789012:logins.fifo");
        message["attributes"]["MessageGroupId"] = json!(if place % 2 == 0 { "even" } else { "odd" });
    }
    let response = invoke(&world.handler().await, &event.to_string()).await.unwrap();
    assert_eq!(failed(&response), [2, 4, 6, 8].map(message_id));
    assert_eq!(world.count("user_logins").await, 6);
    assert_eq!(world.count("user_logins where user_id in ('user-0', 'user-1', 'user-9')").await, 3);
}

#[tokio::test]
async fn groups_of_a_standard_queue_hold_nothing_back() {
    let world = World::new().await;
    let mut event: Value = serde_json::from_str(&event(0, ["bad", &body(1)])).unwrap();
    for message in event["Records"].as_array_mut().unwrap() {
        message["attributes"]["MessageGroupId"] = json!("tenant");
    }
    let response = invoke(&world.handler().await, &event.to_string()).await.unwrap();
    assert_eq!(failed(&response), [message_id(0)]);
    assert_eq!(world.count("user_logins").await, 1);
}

#[tokio::test]
async fn ten_thousand_invalid_messages_are_each_reported() {
    let world = World::new().await;
    let response = invoke(&world.handler().await, &event(0, vec!["{}"; 10_000])).await.unwrap();
    assert_eq!(failed(&response), (0..10_000).map(message_id).collect::<Vec<_>>());
}

#[tokio::test]
async fn each_of_ten_thousand_groups_is_held_back_only_by_its_own_failure() {
    let world = World::new().await;
    let bodies = (0..10_000).map(|number| if number % 2 == 0 { body(number) } else { "{}".to_owned() });
    let mut event: Value = serde_json::from_str(&event(0, bodies)).unwrap();
    for (number, message) in event["Records"].as_array_mut().unwrap().iter_mut().enumerate() {
        message["eventSourceARN"] = json!("arn:aws:sqs:us-east-1:123456789012:logins.fifo");
        message["attributes"]["MessageGroupId"] = json!(number.to_string());
    }
    let response = invoke(&world.handler().await, &event.to_string()).await.unwrap();
    assert_eq!(failed(&response), (0..5_000).map(|number| message_id(2 * number + 1)).collect::<Vec<_>>());
    assert_eq!(world.count("user_logins").await, 5_000);
}

#[tokio::test]
async fn bodies_of_a_megabyte_are_loaded() {
    let world = World::new().await;
    let large =
        |number| body(number).replacen('{', &format!("{{\"other\": {:?}, ", "\\u00e9".repeat(1024 * 1024 / 6)), 1);
    assert!(failed(&invoke(&world.handler().await, &event(0, (0..5).map(large))).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 5);
}
