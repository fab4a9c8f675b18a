//! Checks of the connection to the database, of its schema, and of the rights of the function's user.

use std::time::{Duration, SystemTime};

use login_etl::{
    mapping::quoted,
    secrets::Credentials,
    store::{Connection, Connector, DatabaseError, LedgerKey, Trial},
};
use tokio_postgres::Client;

use super::{Checks, State, pipeline::Pipeline};
use crate::{
    mapping, migrate,
    output::{Failure, duration, failed, sql},
    settings::{Settings, connect},
};

/// A certificate that expires within this gets a warning.
const ENDS_SOON: Duration = Duration::from_secs(30 * 86_400);
/// The schedule runs every quarter of an hour; after a day without it, batches prune the ledger themselves.
const MAINTENANCE_OVERDUE: Duration = Duration::from_secs(86_400);
/// Clocks further apart than this, in seconds, get a warning. AWS refuses signatures that are five minutes off.
const CLOCKS: f64 = 5.0;

pub(super) async fn check(settings: &Settings, checks: &mut Checks, pipeline: Option<&Pipeline>) {
    checks.area = "database";
    let wrong = checks.count(State::Wrong);
    let connector = settings.connector();
    let Some(connector) = checks.have(connector) else { return };
    let credentials = settings.credentials(&connector).await;
    let Some(credentials) = checks.have(credentials) else { return };
    match certificate(&connector, &credentials).await {
        Ok(None) => checks.consider(false, "TLS is off", "set DATABASE_TLS to verify-full, except for local runs"),
        Ok(Some(left)) => checks.consider(
            left > ENDS_SOON,
            format!("TLS is verified; the certificate is good for {}", duration(left)),
            "renew the server's certificate before it expires: after that no batch is loaded",
        ),
        Err(failure) => {
            checks.check(false, failure.why(), "check DATABASE_HOST, DATABASE_CA and the server's certificate");
            return;
        }
    }
    let Some(connection) = checks.have(settings.connect(&connector, &credentials).await) else { return };
    let (user, database) = (credentials.username(), connector.name(&credentials));
    checks.right(format!("connected as {user:?} to the database {database:?}"));
    let client = &connection.client;
    for part in [
        clock(client, checks).await,
        schema(settings, client, checks).await,
        connections(client, checks, pipeline).await,
        maintenance(settings, client, checks).await,
    ] {
        checks.have(part);
    }
    checks.area = "function's database user";
    // The checks of the secrets report an unusable one.
    let Ok(function) = settings.function_credentials(&connector).await else { return };
    let host = connector.host(&function).unwrap_or_default();
    let rights = rights(settings, &host, &function, client, checks).await;
    if checks.have(rights) == Some(true) {
        let advice = format!("set one password in both: `\\password {}` in psql, and the secret", function.username());
        let connected = connect(&connector, &function).await;
        // With IAM, a failure says nothing: the caller may have no right to sign in as the function.
        let connected = if function.is_token() { checks.have(connected).map(Ok) } else { Some(connected) };
        let Some(connected) = connected else { return };
        match connected {
            Ok(connection) => {
                checks.right(format!("{:?} can log in", function.username()));
                // After an earlier failure, the row would be refused for the same reason.
                if checks.count(State::Wrong) == wrong {
                    let tried = try_row(settings, connection, checks).await;
                    checks.have(tried);
                }
            }
            Err(failure) => checks.check(false, failure.why(), advice),
        }
    }
}

/// Writes a test row as the function does, and rolls it back.
async fn try_row(settings: &Settings, connection: Connection, checks: &mut Checks) -> Result<(), Failure> {
    let mapping = &settings.declared;
    // The checks of the secrets report an unusable keyring.
    let Ok(keyring) = settings.keyring().await else { return Ok(()) };
    let Some(row) = mapping::example_row(mapping, &keyring) else { return Ok(()) };
    let names: Vec<_> = mapping.columns().iter().map(|column| column.name.clone()).collect();
    let wrong = |error: &DatabaseError| format!("a test row that it writes (and rolls back) is refused: {error}");
    let trial = match Trial::begin(connection, mapping).await {
        Ok(trial) => trial,
        Err(error) => return Err(failed(error.to_string())),
    };
    match trial
        .refusals(vec![(LedgerKey::new("login-etl-doctor", None, SystemTime::now()), row)])
        .await
        .map(|refusals| refusals.into_iter().next().flatten())
    {
        Ok(None) => checks.right("it can write a row and its ledger key (tried, and rolled back)"),
        Ok(Some(error)) if error.is_likely_row_fault(&names) => {
            checks.consider(
                false,
                wrong(&error),
                "run `etlctl dlq explain` to see whether messages are refused for this reason, too",
            );
        }
        Ok(Some(error)) | Err(error) => {
            checks.check(
                false,
                wrong(&error),
                "correct this: until then no message is loaded, and messages wait in the queue",
            );
        }
    }
    Ok(())
}

/// The time until the server's certificate expires, after verification as in the function; `None` without TLS.
async fn certificate(connector: &Connector, credentials: &Credentials) -> Result<Option<Duration>, Failure> {
    let (host, port) = (connector.host(credentials)?, connector.port(credentials));
    let shown = connector.certificate(credentials).await;
    let shown = shown.map_err(|error| failed(format!("{host}:{port}: {}", Failure::from(error).why())))?;
    let Some(certificate) = shown else { return Ok(None) };
    let ends = certificate.tbs_certificate().validity().not_after.to_unix_duration();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(Some(ends.saturating_sub(now)))
}

async fn clock(client: &Client, checks: &mut Checks) -> Result<(), Failure> {
    let asked = SystemTime::now();
    let row = client
        .query_one("select extract(epoch from clock_timestamp())::float8", &[])
        .await
        .map_err(sql("read the clock"))?;
    let answered = SystemTime::now();
    let since = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let apart = (row.get::<_, f64>(0) - (since(asked) + since(answered)) / 2.0).abs();
    let found = format!("its clock and this machine's are {apart:.1} s apart");
    checks.consider(
        apart <= CLOCKS,
        found,
        "correct the wrong clock: rows expire by the database's, and AWS refuses requests signed five minutes off",
    );
    Ok(())
}

async fn schema(settings: &Settings, client: &Client, checks: &mut Checks) -> Result<(), Failure> {
    let mapping = &settings.mapping;
    let table = mapping.table().to_string();
    let name = settings.declared.table().plain();
    let ledger = format!("{}.etl_ledger", settings.schema);
    let outstanding = migrate::outstanding(settings, client).await?;
    let missing = |name: &str| format!("there is no table {name}");
    let Some(misfits) = migrate::misfits(mapping, client).await? else {
        checks.check(false, missing(&name), again(&migrate::table_record(&settings.declared), &outstanding));
        return Ok(());
    };
    let has_ledger = client.query_one("select to_regclass($1) is not null", &[&ledger]).await;
    if !has_ledger.map_err(sql("look for the ledger"))?.get::<_, bool>(0) {
        checks.check(false, missing("etl_ledger"), again("001_ledger", &outstanding));
        return Ok(());
    }
    let found = match misfits.is_empty() {
        true => format!("the columns of {name} fit the mapping"),
        false => format!("{name} does not fit the mapping"),
    };
    checks.check(misfits.is_empty(), found, misfits.join("; "));
    // Whoever can create a function there can make other users' statements call it, under the name of a function that they use.
    let open = "select exists (select from pg_namespace, aclexplode(coalesce(nspacl, acldefault('n', nspowner))) as acl
                where nspname = 'public' and acl.grantee = 0 and acl.privilege_type = 'CREATE')";
    let open: bool = client.query_one(open, &[]).await.map_err(sql("look at the schema public"))?.get(0);
    let found = if open { "everybody may create" } else { "nobody but its owner may create" };
    checks.check(
        !open,
        format!("{found} in the schema public"),
        "revoke create on schema public from public: functions made there can run in other users' statements",
    );
    let key = "select exists (select from pg_index where indrelid = to_regclass($1) and indisunique and indisvalid)";
    let key: bool = client.query_one(key, &[&ledger]).await.map_err(sql("look at the ledger"))?.get(0);
    let found = if key { "the ledger has a unique index" } else { "the ledger has no unique index" };
    checks.check(key, found, "make (sent_at, message_id) its primary key: without it messages are inserted twice");
    let indexes =
        "select count(distinct attname) from pg_index join pg_attribute on attrelid = indrelid and attnum = indkey[0]
                   where indrelid = to_regclass($1) and indisvalid and attname = any ($2)";
    let masked: Vec<&str> = mapping.masked().map(|(column, _)| column.name.as_str()).collect();
    let indexes = client.query_one(indexes, &[&table, &masked]).await.map_err(sql("look at the indexes"))?;
    let all = indexes.get::<_, i64>(0) == masked.len() as i64;
    let found = match masked.len() {
        _ if !all => "a masked column has no index",
        2 => "both masked columns have an index",
        _ => "every masked column has an index",
    };
    checks.consider(all, found, again(&migrate::table_record(&settings.declared), &outstanding));
    let found = match outstanding.len() {
        0 => "every migration is recorded".to_owned(),
        _ => format!("not recorded as applied: {}", outstanding.join(", ")),
    };
    checks.consider(outstanding.is_empty(), found, "run `etlctl migrate`");
    Ok(())
}

/// Checks that the schedule has run lately.
async fn maintenance(settings: &Settings, client: &Client, checks: &mut Checks) -> Result<(), Failure> {
    let retention = settings.mapping.retention_days();
    if settings.get("MAINTENANCE_SCHEDULE").is_none() {
        if let Some(days) = retention {
            checks.consider(
                false,
                format!("rows expire after {days} days, but no schedule deletes them"),
                "deploy the template's schedule, or send the function its event: see docs/forget-a-person.md",
            );
        }
        return Ok(());
    }
    let table = format!("{}.etl_maintenance", settings.schema);
    let there = client.query_one("select to_regclass($1) is not null", &[&table]).await;
    if !there.map_err(sql("look for the schedule's record"))?.get::<_, bool>(0) {
        checks.consider(false, "there is no table etl_maintenance", "run `etlctl migrate`");
        return Ok(());
    }
    let query = format!("select extract(epoch from now() - max(done_at))::float8 from {table}");
    let ago: Option<f64> = client.query_one(&query, &[]).await.map_err(sql("read the schedule's record"))?.get(0);
    let ago = ago.map(|ago| Duration::from_secs_f64(ago.max(0.0)));
    let found = match ago {
        None => "the schedule has never deleted expired keys and rows".to_owned(),
        Some(ago) => format!("the schedule last deleted expired keys and rows {} ago", duration(ago)),
    };
    checks.consider(
        ago.is_some_and(|ago| ago < MAINTENANCE_OVERDUE),
        found,
        "wait a quarter of an hour if the stack is new; else check the schedule STACK-maintenance, and look for \
         `maintenance failed` in the function's log. Batches prune the ledger meanwhile",
    );
    Ok(())
}

async fn connections(client: &Client, checks: &mut Checks, pipeline: Option<&Pipeline>) -> Result<(), Failure> {
    // A user who may not see others' sessions can still count them.
    let query =
        "select current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
                        - (select sum(numbackends)::bigint from pg_stat_database)
                        + (select count(*) from pg_stat_activity where application_name = 'login-etl')";
    let free: i64 = client.query_one(query, &[]).await.map_err(sql("count connections"))?.get(0);
    let Some(concurrency) = pipeline.and_then(|pipeline| pipeline.concurrency) else { return Ok(()) };
    checks.check(
        i64::from(concurrency) <= free,
        format!("it has {free} connections for the function, which may want {concurrency}"),
        "lower MaximumConcurrency or raise max_connections; behind RDS Proxy, fewer connections are enough",
    );
    Ok(())
}

/// Checks that the function's user has the rights it needs, and no others. Returns whether it may log in.
async fn rights(
    settings: &Settings,
    host: &str,
    function: &Credentials,
    client: &Client,
    checks: &mut Checks,
) -> Result<bool, Failure> {
    let user = function.username();
    let role = "select rolsuper or rolcreaterole or rolcreatedb or rolbypassrls or rolreplication, rolcanlogin, \
                       coalesce(array_to_string(rolconfig, ','), '') from pg_roles where rolname = $1";
    let role = client.query_opt(role, &[&user]).await.map_err(sql("look at the user"))?;
    let Some(role) = role else {
        checks.check(
            false,
            format!("there is no user {user:?}"),
            "run `etlctl migrate`, which makes login_etl, and name login_etl in the secret",
        );
        return Ok(false);
    };
    let query = "select
        has_table_privilege($1, $2::text::regclass, 'insert'),
        has_table_privilege($1, $3::text::regclass, 'select') and has_table_privilege($1, $3::text::regclass, 'insert'),
        has_table_privilege($1, $3::text::regclass, 'delete') and has_table_privilege($1, $3::text::regclass, 'update'),
        has_any_column_privilege($1, $2::text::regclass, 'select') or has_any_column_privilege($1, $2::text::regclass, 'update')
            or has_table_privilege($1, $2::text::regclass, 'delete') or has_table_privilege($1, $2::text::regclass, 'truncate')";
    let mapping = &settings.mapping;
    let table = mapping.table().to_string();
    let ledger = format!("{}.etl_ledger", settings.schema);
    let can = client.query_one(query, &[&user, &table, &ledger]).await.map_err(sql("look at the user's rights"))?;
    let outstanding = migrate::outstanding(settings, client).await?;
    let of_roles = again("002_roles", &outstanding);
    let of_table = again(&migrate::table_record(&settings.declared), &outstanding);
    let found = |can: bool, what: &str| format!("{user:?} {} {what}", if can { "may" } else { "may not" });
    let (rows, keys): (bool, bool) = (can.get(0), can.get(1));
    let advice = if rows { of_roles.clone() } else { of_table };
    checks.check(rows && keys, found(rows && keys, "insert rows and ledger keys"), advice);
    checks.consider(can.get(2), found(can.get(2), "delete expired ledger keys"), of_roles);
    let (powers, reads): (bool, bool) = (role.get(0), can.get(3));
    checks.check(
        !powers,
        if powers {
            format!("{user:?} is a superuser, or close to one")
        } else {
            format!("{user:?} has no administrative rights")
        },
        "give the function a user of its own: login_etl",
    );
    checks.consider(
        !reads,
        found(reads, "read or change existing rows"),
        format!(
            "revoke select, update, delete and truncate on {} from it: it needs none of them",
            mapping.table().name
        ),
    );
    // Set for the role, for the database, or for the server.
    let durable = "select coalesce(
            (select split_part(setting, '=', 2) from pg_db_role_setting, pg_roles, unnest(setconfig) as setting
             where setrole in (pg_roles.oid, 0) and setdatabase in (0, (select oid from pg_database where datname = current_database()))
                 and rolname = $1 and setting like 'synchronous_commit=%' order by setrole = 0, setdatabase = 0 limit 1),
            (select reset_val from pg_settings where name = 'synchronous_commit')) not in ('off', 'local')";
    let durable: bool = client.query_one(durable, &[&user]).await.map_err(sql("look at the commits"))?.get(0);
    checks.check(
        durable,
        if durable { "its commits are on disk" } else { "its commits may be lost when the server crashes" },
        format!("alter role {user} set synchronous_commit = on: otherwise a crash loses rows whose messages are gone"),
    );
    let unlogged = "select string_agg(relname, ', ') from pg_class where oid in ($1::text::regclass, $2::text::regclass) and relpersistence = 'u'";
    let unlogged: Option<String> =
        client.query_one(unlogged, &[&table, &ledger]).await.map_err(sql("look at the tables"))?.get(0);
    if let Some(unlogged) = unlogged {
        checks.check(
            false,
            format!("{unlogged} is emptied when the server crashes"),
            format!("alter table {unlogged} set logged"),
        );
    }
    let of_iam =
        "select exists (select from pg_auth_members where roleid = to_regrole('rds_iam') and member = to_regrole($1))";
    let of_iam: bool =
        client.query_one(of_iam, &[&quoted(user)]).await.map_err(sql("look at its way to sign in"))?.get(0);
    // A proxy signs in to the database with a secret, even if its own clients use tokens.
    let is_behind_proxy = host.split('.').any(|label| label.starts_with("proxy-"));
    match (function.is_token() && !is_behind_proxy, of_iam) {
        (true, false) => checks.add(
            State::Wrong,
            format!("{user:?} is not in the role rds_iam: the server treats its token as a password"),
            format!("grant rds_iam to {user}"),
        ),
        (false, true) => checks.add(
            State::Wrong,
            format!("{user:?} is in the role rds_iam: the server accepts its tokens, and no password"),
            format!("deploy with DatabaseAuth=iam, or revoke rds_iam from {user}"),
        ),
        _ => {}
    }
    let limited = role.get::<_, &str>(2).contains("statement_timeout");
    checks.consider(
        limited,
        if limited { "its statements have a time limit" } else { "its statements have no time limit" },
        format!("alter role {user} set statement_timeout to the function's timeout"),
    );
    let may_log_in: bool = role.get(1);
    if !may_log_in {
        checks.add(State::Wrong, format!("{user:?} may not log in"), format!("alter role {user} login"));
    }
    Ok(may_log_in)
}

/// How to restore what a migration made. `etlctl migrate` does not run a recorded migration again.
fn again(name: &str, outstanding: &[String]) -> String {
    if outstanding.iter().any(|outstanding| outstanding == name) {
        "run `etlctl migrate`".to_owned()
    } else if name.starts_with(migrate::TABLE) {
        "it was made once, and is gone: run `etlctl mapping ddl | psql`".to_owned()
    } else {
        format!("it was made once, and is gone: run schema/{name}.sql with psql")
    }
}
