//! The limit: writes rows that are masked already, and their ledger keys, by `COPY BINARY` in one transaction and one round trip.
//! It speaks PostgreSQL's protocol itself, as a driver would wait for answers in between.

use std::{
    error::Error,
    io::{Read, Write},
    net::TcpStream,
    time::{Instant, SystemTime},
};

use bytes::{BufMut, BytesMut};
use fallible_iterator::FallibleIterator;
use login_etl::{
    config,
    event::{Message, messages},
    keyring::Keyring,
    mapping::{Envelope, Mapping, ROWS_CAPACITY},
    store::LedgerKey,
};
use login_etl_benches::{Answer, Answers, cpu_time, events, files};
use native_tls::{Certificate, TlsConnector};
use postgres_protocol::{
    authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    message::{
        backend::{ErrorResponseBody, Message as Answered},
        frontend,
    },
};

const COPY: &str = "copy etl_ledger (sent_at, message_id) from stdin (format binary);
    copy user_logins (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date)
    from stdin (format binary)";
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const TRAILER: i16 = -1;

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let secrets = aws_sdk_secretsmanager::Client::new(&config::sdk_config(login_etl::roots::for_aws()).await);
    let secret = async |id: &str| -> Result<String, Box<dyn Error>> {
        let secret = secrets.get_secret_value().secret_id(std::env::var(id)?).send().await?;
        Ok(secret.secret_string.unwrap_or_default())
    };
    let keyring = Keyring::from_json(&secret("MASKING_SECRET_ID").await?)?;
    let credentials = serde_json::from_str(&secret("DATABASE_SECRET_ID").await?)?;
    let mut server = Server::connect(&credentials)?;

    let mut answers = Answers::open()?;
    for file in files() {
        let mut answer = Answer::default();
        for event in events(&file?)? {
            let (request, failures) = prepare(&event, &keyring)?;
            let (started, cpu) = (Instant::now(), cpu_time());
            server.send(&request)?;
            answer.times.push(started.elapsed());
            answer.cpu += cpu_time() - cpu;
            answer.failures += failures;
        }
        answers.tell(&answer)?;
    }
    Ok(())
}

/// The whole request for an event, and the number of messages that are left out.
fn prepare(event: &[u8], keyring: &Keyring) -> Result<(BytesMut, usize), Box<dyn Error>> {
    let messages = messages(event)?;
    let (mapping, now) = (Mapping::built_in()?, SystemTime::now());
    let mut buffer = BytesMut::with_capacity(ROWS_CAPACITY);
    let row = |message: &Message<'_>| {
        let envelope = Envelope { message_id: message.id()?, sent: message.sent(), queue: message.queue_name(), now };
        let row = mapping.row_of_json_string(message.body()?, &envelope, keyring, &mut buffer).ok()?;
        let key = LedgerKey::new(message.id()?, message.sent_timestamp(), SystemTime::UNIX_EPOCH);
        Some((key, row))
    };
    let mut rows: Vec<_> = messages.iter().filter_map(row).collect();
    rows.sort_unstable_by_key(|(key, _)| *key);

    let (mut ledger, mut logins) = (HEADER.to_vec(), HEADER.to_vec());
    for (key, row) in &rows {
        key.copy(&mut ledger);
        logins.put_i16(mapping.columns().len() as i16);
        logins.extend_from_slice(row.as_bytes());
    }
    let mut request = BytesMut::new();
    frontend::query(COPY, &mut request)?;
    for mut data in [ledger, logins] {
        data.put_i16(TRAILER);
        frontend::CopyData::new(data.as_slice())?.write(&mut request);
        frontend::copy_done(&mut request);
    }
    Ok((request, messages.len() - rows.len()))
}

struct Server {
    stream: Box<dyn Stream>,
    received: BytesMut,
}

impl Server {
    fn connect(credentials: &serde_json::Value) -> Result<Self, Box<dyn Error>> {
        let (host, port) = (std::env::var("DATABASE_HOST")?, std::env::var("DATABASE_PORT")?.parse::<u16>()?);
        let socket = TcpStream::connect((host.as_str(), port))?;
        socket.set_nodelay(true)?;
        let [username, password] = ["username", "password"].map(|name| credentials[name].as_str().unwrap_or_default());
        let mut server = Self { stream: encrypted(socket, &host)?, received: BytesMut::new() };

        let mut request = BytesMut::new();
        let database = std::env::var("DATABASE_NAME")?;
        frontend::startup_message([("user", username), ("database", database.as_str())], &mut request)?;
        server.stream.write_all(&request)?;
        server.expect(|answer| matches!(answer, Answered::AuthenticationSasl(_)))?;
        let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        request.clear();
        frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), &mut request)?;
        server.stream.write_all(&request)?;
        let Answered::AuthenticationSaslContinue(more) =
            server.expect(|answer| matches!(answer, Answered::AuthenticationSaslContinue(_)))?
        else {
            return Err("no answer to the first message of SCRAM".into());
        };
        scram.update(more.data())?;
        request.clear();
        frontend::sasl_response(scram.message(), &mut request)?;
        server.send(&request)?;
        Ok(server)
    }

    /// Sends a request and waits until the server is ready for the next one.
    fn send(&mut self, request: &[u8]) -> Result<(), Box<dyn Error>> {
        self.stream.write_all(request)?;
        self.expect(|answer| matches!(answer, Answered::ReadyForQuery(_))).map(drop)
    }

    fn expect(&mut self, wanted: impl Fn(&Answered) -> bool) -> Result<Answered, Box<dyn Error>> {
        let mut piece = [0; 8192];
        loop {
            match Answered::parse(&mut self.received)? {
                Some(Answered::ErrorResponse(error)) => return Err(sqlstate(&error).into()),
                Some(answer) if wanted(&answer) => return Ok(answer),
                Some(_) => {}
                None => match self.stream.read(&mut piece)? {
                    0 => return Err("the server closed the connection".into()),
                    len => self.received.extend_from_slice(&piece[..len]),
                },
            }
        }
    }
}

fn sqlstate(error: &ErrorResponseBody) -> String {
    let mut fields = error.fields();
    while let Ok(Some(field)) = fields.next() {
        if field.type_() == b'C' {
            return format!("SQLSTATE {}", field.value_bytes().escape_ascii());
        }
    }
    "an error without SQLSTATE".to_owned()
}

fn encrypted(mut socket: TcpStream, host: &str) -> Result<Box<dyn Stream>, Box<dyn Error>> {
    if std::env::var("DATABASE_TLS").is_ok_and(|tls| tls == "disable") {
        return Ok(Box::new(socket));
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request)?;
    let mut answer = [0];
    socket.read_exact(&mut answer)?;
    let root = Certificate::from_pem(&std::fs::read(std::env::var("DATABASE_CA")?)?)?;
    let connector = TlsConnector::builder().disable_built_in_roots(true).add_root_certificate(root).build()?;
    Ok(Box::new(connector.connect(host, socket)?))
}
