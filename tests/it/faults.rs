//! PostgreSQL refuses a batch, and either a row or the table is at fault.

use std::time::Duration;

use serde_json::{Value, json};

use crate::world::{World, bodies, body, event, failed, invoke, invoke_within, message_id};

/// Changes to the table by which PostgreSQL refuses the row of `user-1`, or a row without a locale.
const ONE_BAD: [(&str, &str); 8] = [
    (
        "a trigger",
        "create function f() returns trigger language plpgsql as
            $$ begin if new.user_id = 'user-1' then raise exception 'no'; end if; return new; end $$;
        create trigger t before insert on user_logins for each row execute function f()",
    ),
    (
        "row security",
        "alter table user_logins enable row level security;
        create policy p on user_logins for insert with check (user_id <> 'user-1')",
    ),
    (
        "a view",
        "alter table user_logins rename to every_login;
        create view user_logins as select * from every_login where user_id <> 'user-1' with check option;
        grant insert on user_logins to login_etl",
    ),
    ("a deferred constraint", "
        create function f() returns trigger language plpgsql as
            $$ begin if new.user_id = 'user-1' then raise exception 'no'; end if; return null; end $$;
        create constraint trigger t after insert on user_logins deferrable initially deferred for each row execute function f()"),
    ("a foreign key", "
        create table users (user_id varchar(128) primary key);
        insert into users values ('user-0'), ('user-2');
        alter table user_logins add foreign key (user_id) references users"),
    ("a deferred foreign key", "
        create table users (user_id varchar(128) primary key);
        insert into users values ('user-0'), ('user-2');
        alter table user_logins add foreign key (user_id) references users deferrable initially deferred"),
    ("a unique index", "
        create unique index on user_logins (user_id);
        insert into user_logins (user_id, locale) values ('user-1', '')"),
    ("a NOT NULL column", "alter table user_logins alter locale set not null"),
];

#[tokio::test]
async fn a_refused_row_does_not_affect_the_rest_of_its_batch() {
    for (what, change) in ONE_BAD {
        let world = World::new().await;
        world.admin.batch_execute(change).await.unwrap();
        let before = world.count("user_logins").await;
        let messages = [body(0), body(1).replace("\"locale\"", "\"other\""), body(2)];
        let response = invoke(&world.handler().await, &event(0, messages)).await.unwrap();
        assert_eq!(failed(&response), [message_id(1)], "{what}");
        assert_eq!(world.count("user_logins").await - before, 2, "{what}");
        assert_eq!(world.count("etl_ledger").await, 2, "{what}");
    }
}

#[tokio::test]
async fn a_table_that_refuses_every_row_fails_the_batch_with_the_reason() {
    let partitioned = "
        alter table user_logins rename to old;
        create table user_logins (like old) partition by range (create_date);
        create table early partition of user_logins for values from (minvalue) to ('2000-01-01');
        grant insert on user_logins to login_etl";
    for (change, expected) in [
        (
            "alter table user_logins add tenant text not null",
            "SQLSTATE 23502, column \"tenant\", table public.user_logins",
        ),
        (
            "drop view user_logins_masked_ip_duplicates; alter table user_logins alter masked_ip type varchar(20)",
            "SQLSTATE 22001",
        ),
        ("revoke insert on user_logins from login_etl", "SQLSTATE 42501: the user may not write"),
        ("alter table user_logins enable row level security", "SQLSTATE 42501: a row security policy forbids it"),
        (partitioned, "SQLSTATE 23514, table public.user_logins: no partition takes the row"),
    ] {
        let world = World::new().await;
        let handler = world.handler().await;
        invoke(&handler, &event(20_000, bodies(20_000..20_003))).await.unwrap();
        world.admin.batch_execute(&format!("truncate user_logins; {change}")).await.unwrap();
        for count in [3, 1000] {
            let error = invoke(&handler, &event(0, bodies(0..count))).await.unwrap_err();
            assert_eq!(error.error_type(), "Table", "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        assert_eq!(world.count("etl_ledger").await, 3);
    }
}

#[tokio::test]
async fn a_table_that_refuses_every_row_costs_few_statements() {
    let world = World::new().await;
    world.admin.batch_execute("alter table user_logins add tenant text not null").await.unwrap();
    let handler = world.handler().await;
    world.count_statements().await;
    invoke(&handler, &event(0, bodies(0..5000))).await.unwrap_err();
    let statements = world.statements().await;
    assert!(statements < 20, "{statements}");
}

#[tokio::test]
async fn a_redelivered_batch_of_refused_rows_does_not_blame_the_table() {
    let world = World::new().await;
    let refuse = "alter table user_logins add check (user_id not in ('user-1', 'user-2', 'user-3', 'user-4'))";
    world.admin.batch_execute(refuse).await.unwrap();
    let handler = world.handler().await;
    let refused = [1, 2, 3, 4].map(message_id);
    assert_eq!(failed(&invoke(&handler, &event(0, bodies(0..9))).await.unwrap()), refused);
    assert_eq!(failed(&invoke(&handler, &event(1, bodies(1..5))).await.unwrap()), refused);
}

#[tokio::test]
async fn a_batch_out_of_time_acknowledges_written_rows_and_each_delivery_gets_further() {
    let world = World::new().await;
    let slow = "
        create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.05); return null; end $$;
        create trigger slow before insert on user_logins for each statement execute function slow();
        alter table user_logins add check (right(user_id, 1) not in ('1', '4', '7'))";
    world.admin.batch_execute(slow).await.unwrap();
    let handler = world.handler().await;
    let all: Value = serde_json::from_str(&event(0, bodies(0..400))).unwrap();
    let mut messages = all["Records"].as_array().unwrap().clone();
    let mut progress = 0;
    // On a busy machine a delivery can run out of time before its first statement. Then the batch fails, and is delivered again.
    for _ in 0..10 {
        let before = messages.len();
        let event = json!({"Records": messages}).to_string();
        match invoke_within(&handler, &event, Duration::from_secs(2)).await {
            Ok(answer) => {
                let failed = failed(&answer);
                messages.retain(|message| failed.contains(&message["messageId"].as_str().unwrap()));
                assert!(messages.len() < before, "none of {before} messages was written");
                progress += 1;
            }
            Err(error) => assert_eq!(error.error_type(), "Deadline", "{error}"),
        }
        // The last statement may also have been written.
        assert!(world.count("user_logins").await >= 400 - messages.len() as i64);
        if progress == 3 {
            return;
        }
    }
    panic!("only {progress} of ten deliveries made progress");
}

#[tokio::test]
async fn many_refused_rows_take_little_more_than_a_statement_each() {
    let world = World::new().await;
    let refuse = "alter table user_logins add check (right(user_id, 1) not in ('1', '4', '7'))";
    world.admin.batch_execute(refuse).await.unwrap();
    let handler = world.handler().await;
    world.count_statements().await;
    let response = invoke(&handler, &event(0, bodies(0..1000))).await.unwrap();
    assert_eq!(failed(&response).len(), 300);
    let statements = world.statements().await;
    assert!(statements < 1200, "{statements}");
    assert_eq!(world.count("user_logins").await, 700);
}

#[tokio::test]
async fn a_warm_connection_survives_a_changed_or_replaced_table() {
    let world = World::new().await;
    let handler = world.handler().await;
    for (start, change) in [
        (0, "select"),
        (10, "alter table user_logins add column note text, alter device_type type text"),
        (20, "alter table user_logins drop column note"),
        (
            30,
            "begin;
            alter table user_logins rename to before;
            create table user_logins (like before including all);
            grant insert on user_logins to login_etl;
            commit",
        ),
    ] {
        world.admin.batch_execute(change).await.unwrap();
        assert!(failed(&invoke(&handler, &event(start as u128, bodies(start..start + 10))).await.unwrap()).is_empty());
    }
    assert_eq!((world.count("before").await, world.count("user_logins").await), (30, 10));
    assert_eq!(world.sessions().await, 1);
}

#[tokio::test]
async fn a_database_of_another_encoding_takes_the_text_it_can_store() {
    for (encoding, refused) in [("LATIN1", vec![message_id(1)]), ("SQL_ASCII", vec![])] {
        let world = World::in_encoding(encoding).await;
        let named = |name: &str, number| body(number).replace("\"user-", &format!("\"{name}-"));
        let handler = world.handler().await;
        let response = invoke(&handler, &event(0, [named("Zoë", 0), named("Łucja", 1), body(2)])).await.unwrap();
        assert_eq!(failed(&response), refused, "{encoding}");
        let known = world.count("user_logins where user_id in ('Zoë-0', 'Łucja-1', 'user-2')");
        if encoding == "SQL_ASCII" {
            assert_eq!(known.await, 3);
        }
        assert_eq!(world.count("user_logins").await, 3 - refused.len() as i64, "{encoding}");
    }
}
