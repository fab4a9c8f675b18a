//! The database fails: between invocations, during an invocation, and while connecting.

use std::{
    collections::BTreeSet,
    sync::Mutex,
    time::{Duration, Instant},
};

use login_etl::handler::Handler;
use serde_json::{Value, json};

use crate::{
    proxy::{Mode, Proxy},
    world::{World, bodies, body, event, event_of, failed, invoke, invoke_within, message_id, variable},
};

const SESSIONS: &str =
    "select state from pg_stat_activity where datname = current_database() and application_name = 'login-etl'";

/// A trigger function that makes a transaction wait while another session holds a lock.
const STOP: &str = "create function stop() returns trigger language plpgsql as
    'begin perform pg_advisory_xact_lock_shared(1); return new; end';";

#[tokio::test]
async fn a_connection_that_was_ended_between_invocations_is_replaced() {
    let world = World::new().await;
    let handler = world.handler().await;
    for round in 0..3 {
        assert!(failed(&invoke(&handler, &event(round * 10, bodies(0..10))).await.unwrap()).is_empty());
        assert_eq!(world.terminate_sessions().await, 1, "the environment keeps one connection");
    }
    assert_eq!(world.count("user_logins").await, 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_ended_during_the_insert_is_replaced_and_the_batch_tried_again() {
    let world = World::new().await;
    let handler = world.handler().await;
    let event = event(0, bodies(0..10));
    let lock = world.lock_table().await;
    let ((), response) = tokio::join!(
        async {
            world.until(&format!("{} = 1", world.waiting())).await;
            world.terminate_sessions().await;
            world.until(&format!("{} = 1", world.waiting())).await;
            lock.batch_execute("commit").await.unwrap();
        },
        invoke(&handler, &event),
    );
    assert!(failed(&response.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_batch_whose_connection_breaks_half_way_is_written_once() {
    let mut world = World::new().await;
    let proxy = Proxy::start(variable("DATABASE_PORT").parse().unwrap()).await;
    world.settings.insert("DATABASE_PORT", proxy.port.to_string());
    // At a row in the middle.
    let stop = format!(
        "{STOP}
        create trigger stop before insert on user_logins for each row
            when (new.user_id in ('user-2000', 'user-12000')) execute function stop()"
    );
    world.admin.batch_execute(&stop).await.unwrap();
    let handler = world.handler().await;
    for (first, is_told) in [(0, true), (10_000, false)] {
        let event = event(first, bodies(first as usize..first as usize + 4000));
        world.admin.batch_execute("select pg_advisory_lock(1)").await.unwrap();
        let breaking = async {
            world.until(&format!("{} = 1", world.waiting())).await;
            if is_told {
                world.terminate_sessions().await;
                world.until(&format!("{} = 1", world.waiting())).await;
            } else {
                proxy.turn(Mode::CutAnswer);
            }
            world.admin.batch_execute("select pg_advisory_unlock(1)").await.unwrap();
        };
        let ((), response) = tokio::join!(breaking, invoke(&handler, &event));
        assert!(failed(&response.unwrap()).is_empty());
    }
    assert_eq!(world.count("user_logins").await, 8000);
    assert_eq!(world.count("etl_ledger").await, 8000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_cannot_finish_fails_before_its_deadline_and_loads_on_redelivery() {
    let world = World::new().await;
    let handler = world.handler().await;
    let event = event(0, bodies(0..10));
    let lock = world.lock_table().await;
    let started = Instant::now();
    let error = invoke_within(&handler, &event, Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(error.error_type(), "Deadline");
    assert!(started.elapsed() < Duration::from_secs(5));
    lock.batch_execute("commit").await.unwrap();
    assert!(failed(&invoke(&handler, &event).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_does_not_outlive_its_invocation() {
    let world = World::new().await;
    let lock = world.lock_table().await;
    let error =
        invoke_within(&world.handler().await, &event(0, bodies(0..10)), Duration::from_secs(1)).await.unwrap_err();
    assert_eq!(error.error_type(), "Deadline");
    world.until(&format!("{} = 0", world.waiting())).await;
    lock.batch_execute("commit").await.unwrap();
    assert_eq!(world.count("user_logins").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_invocations_of_one_environment_share_its_connection_each_within_its_own_deadline() {
    let world = World::new().await;
    let handler = world.handler().await;
    let lock = world.lock_table().await;
    let events = [event(0, bodies(0..10)), event(10, bodies(10..20)), event(20, bodies(20..30))];
    let (short, long, also_long, ()) = tokio::join!(
        invoke_within(&handler, &events[0], Duration::from_secs(1)),
        invoke_within(&handler, &events[1], Duration::from_secs(20)),
        invoke_within(&handler, &events[2], Duration::from_secs(20)),
        async {
            world.until(&format!("{} = 1", world.waiting())).await;
            let first = world.session().await;
            // The first times out, the server ends its session, and only the next one waits.
            world
                .until(&format!(
                    "{} = 1 and not exists (select from pg_stat_activity where pid = {first})",
                    world.waiting()
                ))
                .await;
            lock.batch_execute("commit").await.unwrap();
        },
    );
    assert_eq!(short.unwrap_err().error_type(), "Deadline");
    assert!(failed(&long.unwrap()).is_empty() && failed(&also_long.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 20);
    assert_eq!(world.sessions().await, 1);
}

#[tokio::test]
async fn a_conflict_with_another_session_is_tried_again() {
    let world = World::new().await;
    // A sequence keeps counting when its transaction is rolled back: the first two tries conflict.
    let conflicts = "
        create sequence tries;
        create function conflict() returns trigger language plpgsql security definer as $$ begin
            if nextval('tries') <= 2 then raise exception using errcode = '40001'; end if;
            return null;
        end $$;
        create trigger conflict after insert on user_logins for each statement execute procedure conflict()";
    world.admin.batch_execute(conflicts).await.unwrap();
    assert!(failed(&invoke(&world.handler().await, &event(0, bodies(0..10))).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 10);
}

/// An environment with a connection through a proxy, which has inserted `event(0, bodies(0..1))`.
async fn behind_a_proxy(world: &mut World) -> (Proxy, Handler) {
    let proxy = Proxy::start(variable("DATABASE_PORT").parse().unwrap()).await;
    world.settings.insert("DATABASE_PORT", proxy.port.to_string());
    let handler = world.handler().await;
    invoke(&handler, &event(0, bodies(0..1))).await.unwrap();
    (proxy, handler)
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_not_repeated() {
    let mut world = World::new().await;
    let (proxy, handler) = behind_a_proxy(&mut world).await;
    proxy.turn(Mode::CutAnswer);
    assert!(failed(&invoke(&handler, &event(1, bodies(1..11))).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 11);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_batch_whose_commit_s_answer_is_lost_is_not_repeated() {
    let mut world = World::new().await;
    let (proxy, handler) = behind_a_proxy(&mut world).await;
    world
        .admin
        .batch_execute(&format!(
            "{STOP}
        create constraint trigger stop after insert on etl_ledger deferrable initially deferred for each row
            when (new.message_id = '{}') execute function stop()",
            message_id(2000)
        ))
        .await
        .unwrap();
    world.admin.batch_execute("select pg_advisory_lock(1)").await.unwrap();
    let losing = async {
        // The batch is at its commit, and has received all other answers.
        world.until(&format!("{} = 1", world.waiting())).await;
        proxy.turn(Mode::CutAnswer);
        world.admin.batch_execute("select pg_advisory_unlock(1)").await.unwrap();
    };
    let event = event(1, bodies(1..3001));
    let ((), response) = tokio::join!(losing, invoke(&handler, &event));
    assert!(failed(&response.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 3001);
}

#[tokio::test]
async fn a_half_open_connection_fails_one_batch_at_its_deadline_and_is_replaced() {
    let mut world = World::new().await;
    let (proxy, handler) = behind_a_proxy(&mut world).await;
    proxy.turn(Mode::Stall);
    let error = invoke_within(&handler, &event(1, bodies(1..11)), Duration::from_secs(1)).await.unwrap_err();
    assert_eq!(error.error_type(), "Deadline");
    assert!(failed(&invoke(&handler, &event(1, bodies(1..11))).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 11);
}

#[tokio::test]
async fn after_a_pause_a_half_open_connection_is_detected_and_replaced() {
    let mut world = World::new().await;
    let (proxy, handler) = behind_a_proxy(&mut world).await;
    proxy.turn(Mode::Stall);
    // The environment checks its connection only after a pause.
    tokio::time::sleep(Duration::from_millis(5100)).await;
    assert!(
        failed(&invoke_within(&handler, &event(1, bodies(1..11)), Duration::from_secs(5)).await.unwrap()).is_empty()
    );
    assert_eq!(world.count("user_logins").await, 11);
}

#[tokio::test]
async fn a_standby_after_a_failover_fails_the_batch_until_the_primary_is_found() {
    let world = World::new().await;
    let handler = world.handler().await;
    let set = format!("alter role login_etl in database {} set default_transaction_read_only = ", world.database);
    world.admin.batch_execute(&format!("{set} on")).await.unwrap();
    let error = invoke(&handler, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseUnavailable");
    world.admin.batch_execute(&format!("{set} off")).await.unwrap();
    invoke(&handler, &event(0, bodies(0..1))).await.unwrap();
    assert_eq!(world.count("user_logins").await, 1);
}

#[tokio::test]
async fn too_many_connections_fail_the_batch_until_there_is_room() {
    let world = World::new().await;
    let handler = world.handler().await;
    let limit = format!("alter database {} connection limit", world.database);
    world.admin.batch_execute(&format!("{limit} 0")).await.unwrap();
    let error = invoke(&handler, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseUnavailable");
    world.admin.batch_execute(&format!("{limit} -1")).await.unwrap();
    invoke(&handler, &event(0, bodies(0..1))).await.unwrap();
    assert_eq!(world.count("user_logins").await, 1);
}

#[tokio::test]
async fn a_full_disk_fails_the_batch_and_no_message() {
    let world = World::new().await;
    let full = "
        create function full_disk() returns trigger language plpgsql as $$ begin
            raise exception using errcode = '53100';
        end $$;
        create trigger full_disk after insert on user_logins for each statement execute procedure full_disk()";
    world.admin.batch_execute(full).await.unwrap();
    let handler = world.handler().await;
    let error = invoke(&handler, &event(0, bodies(0..10))).await.unwrap_err();
    assert_eq!(error.error_type(), "Database");
    world.admin.batch_execute("drop trigger full_disk on user_logins").await.unwrap();
    assert!(failed(&invoke(&handler, &event(0, bodies(0..10))).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 10);
}

#[tokio::test]
async fn a_password_rotation_in_progress_is_retried() {
    let world = World::new().await;
    let role = &world.database;
    world.admin.batch_execute(&format!("create role {role} login password 'before' in role login_etl")).await.unwrap();
    world.put_secret("database", &world.credentials(role, "before")).await;
    let handler = world.handler().await;
    // The rotation changes the database first, and the secret a moment later.
    world.admin.batch_execute(&format!("alter role {role} password 'after'")).await.unwrap();
    let event = event(0, bodies(0..1));
    let (response, ()) = tokio::join!(invoke(&handler, &event), async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        world.put_secret("database", &world.credentials(role, "after")).await;
    });
    response.unwrap();
    assert_eq!(world.count("user_logins").await, 1);
}

#[tokio::test]
async fn a_wrong_password_fails_the_batch_and_says_where_to_look() {
    let world = World::new().await;
    world.put_secret("database", &world.credentials("login_etl", "canary-password")).await;
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseCredentials");
    assert_eq!(
        error.to_string(),
        "cannot connect to the database: SQLSTATE 28P01: check username and password in the database secret"
    );
    assert!(!format!("{error:?}").contains("canary"));
}

#[tokio::test]
async fn a_rotated_password_is_read_again() {
    let world = World::new().await;
    let role = &world.database;
    let set_password = async |password: &str| {
        world.admin.batch_execute(&format!("alter role {role} password '{password}'")).await.unwrap();
        world.put_secret("database", &world.credentials(role, password)).await;
    };
    world.admin.batch_execute(&format!("create role {role} login in role login_etl")).await.unwrap();
    set_password("before").await;
    let handler = world.handler().await;
    invoke(&handler, &event(0, bodies(0..1))).await.unwrap();
    set_password("after").await;
    world.terminate_sessions().await;
    invoke(&handler, &event(1, bodies(0..1))).await.unwrap();
    assert_eq!(world.count("user_logins").await, 2);
}

#[tokio::test]
async fn an_unreachable_database_fails_the_batch() {
    let mut world = World::new().await;
    // A port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    world.settings.insert("DATABASE_PORT", free.to_string());
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseUnavailable");
    // Invalid messages are still reported one by one.
    let bad = ["bad"; 3000];
    assert_eq!(failed(&invoke(&world.handler().await, &event(0, bad)).await.unwrap()).len(), 3000);
}

#[tokio::test]
async fn a_missing_table_and_a_missing_right_fail_the_batch_and_say_what_to_do() {
    let world = World::new().await;
    let role = &world.database;
    world.admin.batch_execute(&format!("create role {role} login password 'password'")).await.unwrap();
    world.put_secret("database", &world.credentials(role, "password")).await;
    let handler = world.handler().await;
    let event = event(0, bodies(0..2));
    let error = invoke(&handler, &event).await.unwrap_err();
    assert_eq!(error.error_type(), "Table");
    assert!(error.to_string().contains("SQLSTATE 42501: the user may not write"), "{error}");
    world.admin.batch_execute("drop table user_logins cascade").await.unwrap();
    let error = invoke(&handler, &event).await.unwrap_err().to_string();
    assert!(error.contains("run `etlctl migrate`"), "{error}");
    let place = format!("database {role}, user {role}, schema public, search path \"$user\", public");
    assert!(error.contains(&place), "{error}");
}

#[tokio::test]
async fn a_missing_or_malformed_secret_fails_initialisation_and_is_not_quoted() {
    let mut world = World::new().await;
    world.put_secret("database", r#"{"username": "canary"}"#).await;
    let error = world.try_handler().await.unwrap_err().to_string();
    assert!(error.contains(r#"is not a JSON object with "username" and "password""#), "{error}");
    world.put_secret("database", r#"{"username": "canary", "password": "canary", "port": "canary"}"#).await;
    assert_eq!(world.try_handler().await.unwrap_err().error_type(), "Secret");
    let host = world.settings.remove("DATABASE_HOST").unwrap();
    for odd in ["postgres://canary:canary@db", "db:0", "a b", "db:5433"] {
        let secret = json!({"username": "canary", "password": "canary", "host": odd, "port": 5432});
        world.put_secret("database", &secret.to_string()).await;
        let error = world.try_handler().await.unwrap_err();
        assert!(error.to_string().contains("\"host\" of the database secret is not valid"), "{error}");
        assert!(!format!("{error} {error:?}").contains("canary"));
        // If the settings have a host, the secret's is ignored.
        world.settings.insert("DATABASE_HOST", host.clone());
        world.try_handler().await.unwrap();
        world.settings.remove("DATABASE_HOST");
    }
    world
        .put_secret("database", r#"{"username": "canary", "password": "canary", "host": "", "port": "", "db": ""}"#)
        .await;
    let error = world.try_handler().await.unwrap_err().to_string();
    assert!(error.starts_with("no database host: set DATABASE_HOST"), "{error}");
    world.put_secret("masking", r#"{"key": "canary"}"#).await;
    let error = world.try_handler().await.unwrap_err();
    assert!(error.to_string().contains("32, 48 or 64 hex digits"), "{error}");
    assert!(!format!("{error} {error:?}").contains("canary"));
    world.settings.insert("MASKING_SECRET_ID", "nowhere".to_owned());
    let error = world.try_handler().await.unwrap_err().to_string();
    assert!(error.starts_with(r#"cannot read the secret "nowhere" (ResourceNotFoundException)"#), "{error}");
}

#[tokio::test]
async fn a_session_that_the_server_ends_for_being_idle_is_replaced() {
    let world = World::new().await;
    world
        .admin
        .batch_execute(&format!("alter database {} set idle_session_timeout = 50", world.database))
        .await
        .unwrap();
    let handler = world.handler().await;
    for number in 0..3 {
        assert!(failed(&invoke(&handler, &event(number, bodies(0..1))).await.unwrap()).is_empty());
        world.until(&format!("not exists ({SESSIONS})")).await;
    }
    assert_eq!(world.count("user_logins").await, 3);
}

#[tokio::test]
async fn a_server_side_timeout_fails_the_batch() {
    for timeout in ["statement_timeout", "lock_timeout"] {
        let world = World::new().await;
        let set = format!("alter role login_etl in database {} set {timeout} = 100", world.database);
        world.admin.batch_execute(&set).await.unwrap();
        let handler = world.handler().await;
        let lock = world.lock_table().await;
        let error = invoke(&handler, &event(0, bodies(0..3))).await.unwrap_err();
        assert_eq!(error.error_type(), "Database", "{timeout}: {error}");
        lock.batch_execute("commit").await.unwrap();
        assert!(failed(&invoke(&handler, &event(0, bodies(0..3))).await.unwrap()).is_empty());
        assert_eq!(world.count("user_logins").await, 3, "{timeout}");
    }
}

/// Passwords with unusual characters, and very long ones.
#[tokio::test]
async fn any_password_signs_in() {
    for password in ["é\u{202e}😀 \\'\"%s", &"long".repeat(325)] {
        let world = World::new().await;
        let role = &world.database;
        let quoted = password.replace('\'', "''").replace('\\', "\\\\");
        world
            .admin
            .batch_execute(&format!("create role {role} login password E'{quoted}' in role login_etl"))
            .await
            .unwrap();
        world.put_secret("database", &world.credentials(role, password)).await;
        assert!(failed(&invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap()).is_empty());
    }
}

#[tokio::test]
async fn a_secret_may_have_a_port_in_its_host_and_another_key_for_the_database() {
    for name in ["dbname", "database", "db"] {
        let mut world = World::new().await;
        let credentials: Value = serde_json::from_str(&world.credentials(&world.database, "p")).unwrap();
        world
            .admin
            .batch_execute(&format!("create role {} login password 'p' in role login_etl", world.database))
            .await
            .unwrap();
        let host = format!("localhost:{}", world.settings.remove("DATABASE_PORT").unwrap());
        world.settings.remove("DATABASE_HOST");
        let secret = json!({"username": credentials["username"], "password": "p", "host": host, "port": "", name: credentials["dbname"]});
        world.put_secret("database", &secret.to_string()).await;
        assert!(failed(&invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap()).is_empty());
        assert_eq!(world.count("user_logins").await, 1);
    }
}

/// A secret that RDS manages has no host.
#[tokio::test]
async fn a_secret_that_rds_manages_signs_in() {
    let mut world = World::new().await;
    let name = world.database.clone();
    world.admin.batch_execute(&format!("create role {name} login password 'p' in role login_etl")).await.unwrap();
    let id = world
        .create_secret_named(&format!("rds-db-{name}"), &format!(r#"{{"username":"{name}","password":"p"}}"#))
        .await;
    world.settings.insert("DATABASE_SECRET_ID", id);
    world.settings.insert("DATABASE_NAME", name);
    assert!(failed(&invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap()).is_empty());
}

/// Several environments get overlapping windows of the messages with very short deadlines, and lose their sessions now and then.
/// In the end one environment gets enough time for the rest.
#[tokio::test]
async fn short_deadlines_and_lost_sessions_lose_and_double_nothing() {
    const COUNT: usize = 2500;
    const ROUNDS: usize = 25;
    let world = World::new().await;
    let handlers = [world.handler().await, world.handler().await, world.handler().await];
    let waiting = Mutex::new((0..COUNT).collect::<BTreeSet<_>>());
    let deliver = async |handler: &Handler, skipped: usize, time: Duration| {
        let window: Vec<_> = waiting.lock().unwrap().iter().skip(skipped).take(500).copied().collect();
        let messages = window.iter().map(|&number| (number as u128, body(number)));
        if let Ok(response) = invoke_within(handler, &event_of(messages), time).await {
            let failed = failed(&response);
            waiting
                .lock()
                .unwrap()
                .retain(|&number| !window.contains(&number) || failed.contains(&&*message_id(number as u128)));
        }
    };
    let rounds = async |environment: usize| {
        for round in 0..ROUNDS {
            let chance = (environment * ROUNDS + round) * 7919;
            // An invocation reserves 200 ms for its response.
            deliver(&handlers[environment], chance % 2000, Duration::from_millis(203 + chance as u64 % 298)).await;
        }
    };
    let attack = async {
        loop {
            tokio::time::sleep(Duration::from_millis(150)).await;
            world.terminate_sessions().await;
        }
    };
    tokio::select! {
        () = attack => {}
        _ = async { tokio::join!(rounds(0), rounds(1), rounds(2)) } => {}
    }
    while !waiting.lock().unwrap().is_empty() {
        deliver(&handlers[0], 0, Duration::from_secs(20)).await;
    }
    assert_eq!(world.count("user_logins").await, COUNT as i64);
    assert_eq!(world.count("(select distinct user_id from user_logins) as users").await, COUNT as i64);
    world.until(&format!("not exists (select from ({SESSIONS}) as sessions where state <> 'idle')")).await;
}
