//! The way to the database, the schema in it, and the rights of the function's user.

use std::time::{Duration, SystemTime};

use login_etl::{mapping::Mapping, secrets::Credentials, store::Connector};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_postgres::Client;
use x509_cert::{Certificate, der::Decode};

use super::{Checks, State, pipeline::Pipeline};
use crate::{
    migrate,
    output::{Failure, duration, failed, sql},
    settings::{Settings, connect},
};

/// A certificate that ends within this is worth a word.
const ENDS_SOON: Duration = Duration::from_secs(30 * 86_400);
/// Clocks further apart than this write wrong days around midnight, and AWS refuses signatures at five minutes.
const CLOCKS: f64 = 5.0;

pub(super) async fn check(settings: &Settings, checks: &mut Checks, pipeline: Option<&Pipeline>) {
    checks.area = "database";
    let connector = settings.connector();
    let Some(connector) = checks.have(connector) else { return };
    let credentials = settings.credentials(&connector).await;
    let Some(credentials) = checks.have(credentials) else { return };
    match certificate(&connector, &credentials).await {
        Ok(None) => checks.consider(false, "TLS is off", "set DATABASE_TLS to verify-full, but for local runs"),
        Ok(Some(left)) => checks.consider(
            left > ENDS_SOON,
            format!("TLS is verified; the certificate is good for {}", duration(left)),
            "renew the server's certificate before it ends: no batch is loaded after",
        ),
        Err(failure) => {
            checks.check(false, failure.why(), "check DATABASE_HOST, DATABASE_CA_FILE and the server's certificate");
            return;
        }
    }
    let Some(connection) = checks.have(connect(&connector, &credentials).await) else { return };
    let client = &connection.client;
    let mapping = &settings.mapping;
    for part in [
        clock(client, checks).await,
        schema(mapping, client, checks).await,
        connections(client, checks, pipeline).await,
    ] {
        checks.have(part);
    }
    checks.area = "function's database user";
    // What is wrong with the secret itself is said elsewhere.
    let Some(id) = settings.get("DATABASE_SECRET_ID") else { return };
    let Ok(function) = settings.secrets().credentials(&id).await else { return };
    let rights = rights(mapping, &function, client, checks).await;
    if checks.have(rights) == Some(true) {
        let advice = format!("`\\password {}` in psql, and the same in the secret", function.username());
        match connect(&connector, &function).await {
            Ok(_) => checks.right(format!("{:?} can log in", function.username())),
            Err(failure) => checks.check(false, failure.why(), advice),
        }
    }
}

/// How long the server's certificate is good for, verified as the function verifies it; `None` without TLS.
async fn certificate(connector: &Connector, credentials: &Credentials) -> Result<Option<Duration>, Failure> {
    /// The protocol's request to go on in TLS: its length, and a number that is no version.
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
    let Some(tls) = connector.tls() else { return Ok(None) };
    let (host, port) = (connector.host(credentials)?, connector.port(credentials));
    let not_reached = |error: &dyn std::fmt::Display| failed(format!("{host}:{port} is not reached: {error}"));
    let shaking = async {
        let stream = match connector.hostaddr() {
            Some(address) => TcpStream::connect((address, port)).await,
            None => TcpStream::connect((host, port)).await,
        };
        let mut stream = stream.map_err(|error| not_reached(&error))?;
        stream.write_all(&SSL_REQUEST).await.map_err(|error| not_reached(&error))?;
        if stream.read_u8().await.map_err(|error| not_reached(&error))? != b'S' {
            return Err(failed(format!("{host}:{port} does not offer TLS")));
        }
        let tls = tokio_native_tls::TlsConnector::from(tls.clone());
        tls.connect(host, stream).await.map_err(|error| failed(format!("{host}:{port} cannot be trusted: {error}")))
    };
    let stream = timeout(Duration::from_secs(5), shaking).await.map_err(|_| not_reached(&"no answer in 5 s"))??;
    let unreadable = || failed("the server's certificate cannot be read");
    let certificate = stream.get_ref().peer_certificate().ok().flatten().ok_or_else(unreadable)?;
    let der = certificate.to_der().map_err(|_| unreadable())?;
    let certificate = Certificate::from_der(&der).map_err(|_| unreadable())?;
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
    checks.consider(apart <= CLOCKS, found, "see which of the two is wrong: the day of a row is the database's");
    Ok(())
}

async fn schema(mapping: &Mapping, client: &Client, checks: &mut Checks) -> Result<(), Failure> {
    let table = mapping.table().to_string();
    let name = mapping.table().plain();
    let outstanding = migrate::outstanding(mapping, client).await?;
    let missing = |name: &str| format!("there is no table {name}");
    let Some(misfits) = migrate::misfits(mapping, client).await? else {
        checks.check(false, missing(&name), again(&migrate::table_record(mapping), &outstanding));
        return Ok(());
    };
    let ledger = client.query_one("select to_regclass('etl_ledger') is not null", &[]).await;
    if !ledger.map_err(sql("look for the ledger"))?.get::<_, bool>(0) {
        checks.check(false, missing("etl_ledger"), again("001_ledger", &outstanding));
        return Ok(());
    }
    let found = match misfits.is_empty() {
        true => format!("the columns of {name} fit"),
        false => format!("{name} does not fit"),
    };
    checks.check(misfits.is_empty(), found, misfits.join("; "));
    let key =
        "select exists (select from pg_index where indrelid = 'etl_ledger'::regclass and indisunique and indisvalid)";
    let key: bool = client.query_one(key, &[]).await.map_err(sql("look at the ledger"))?.get(0);
    let found = if key { "the ledger has its key" } else { "the ledger has no key" };
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
    checks.consider(all, found, again(&migrate::table_record(mapping), &outstanding));
    let found = match outstanding.len() {
        0 => "every migration is recorded".to_owned(),
        _ => format!("not recorded as applied: {}", outstanding.join(", ")),
    };
    checks.consider(outstanding.is_empty(), found, "run `etlctl migrate`");
    Ok(())
}

async fn connections(client: &Client, checks: &mut Checks, pipeline: Option<&Pipeline>) -> Result<(), Failure> {
    // Who may not see others' sessions can still count them.
    let query =
        "select current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
                        - (select sum(numbackends)::bigint from pg_stat_database)
                        + (select count(*) from pg_stat_activity where application_name = 'login-etl')";
    let free: i64 = client.query_one(query, &[]).await.map_err(sql("count connections"))?.get(0);
    let Some(concurrency) = pipeline.and_then(|pipeline| pipeline.concurrency) else { return Ok(()) };
    checks.check(
        i64::from(concurrency) <= free,
        format!("it has {free} connections for the function, which may want {concurrency}"),
        "lower MaximumConcurrency or raise max_connections; behind RDS Proxy, fewer will do",
    );
    Ok(())
}

/// What the function's user may do: what it has to, and not more.
///
/// Returns whether it may log in at all.
async fn rights(
    mapping: &Mapping,
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
            "`etlctl migrate` makes login_etl; name it in the secret",
        );
        return Ok(false);
    };
    let query = "select
        has_table_privilege($1, $2::text::regclass, 'insert'),
        has_table_privilege($1, 'etl_ledger', 'select') and has_table_privilege($1, 'etl_ledger', 'insert'),
        has_table_privilege($1, 'etl_ledger', 'delete') and has_table_privilege($1, 'etl_ledger', 'update'),
        has_any_column_privilege($1, $2::text::regclass, 'select') or has_any_column_privilege($1, $2::text::regclass, 'update')
            or has_table_privilege($1, $2::text::regclass, 'delete') or has_table_privilege($1, $2::text::regclass, 'truncate')";
    let table = mapping.table().to_string();
    let can = client.query_one(query, &[&user, &table]).await.map_err(sql("look at the user's rights"))?;
    let outstanding = migrate::outstanding(mapping, client).await?;
    let of_roles = again("002_roles", &outstanding);
    let of_table = again(&migrate::table_record(mapping), &outstanding);
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
            format!("{user:?} has no powers over the server")
        },
        "give the function a user of its own: login_etl",
    );
    checks.consider(
        !reads,
        found(reads, "read or change rows that are there"),
        format!(
            "revoke select, update, delete and truncate on {} from it: it needs none of them",
            mapping.table().name
        ),
    );
    let limited = role.get::<_, &str>(2).contains("statement_timeout");
    checks.consider(
        limited,
        if limited { "its statements have a time limit" } else { "its statements have no time limit" },
        format!("alter role {user} set statement_timeout = the function's timeout"),
    );
    let may_log_in: bool = role.get(1);
    if !may_log_in {
        checks.add(State::Wrong, format!("{user:?} may not log in"), format!("alter role {user} login"));
    }
    Ok(may_log_in)
}

/// How to get back what a migration makes: one that is recorded is not run again.
fn again(name: &str, outstanding: &[String]) -> String {
    if outstanding.iter().any(|outstanding| outstanding == name) {
        "run `etlctl migrate`".to_owned()
    } else if name.starts_with(migrate::TABLE) {
        "it was there once: `etlctl mapping ddl | psql` makes it again".to_owned()
    } else {
        format!("it was there once: run schema/{name}.sql again, with psql")
    }
}
