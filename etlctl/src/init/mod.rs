//! Makes a mapping and the deployment's settings from sample messages and a few answers.

mod fields;

use std::{
    fs::{self, OpenOptions},
    io::{self, BufRead, IsTerminal, Read, Write},
    path::{Path, PathBuf},
};

use aws_sdk_sqs::types::{ChangeMessageVisibilityBatchRequestEntry, MessageSystemAttributeName};
use login_etl::{event, mapping::Mapping};
use serde_json::{Value, json};

use self::fields::Seen;
use crate::{
    cli::Init,
    output::{BOLD, Failure, GOOD, Reply, WARNING, aws, failed, printable},
    settings::Settings,
};

/// How a field is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    Masked,
    OneWay,
    Plain,
    Skip,
}

impl Keep {
    fn of(letter: &str) -> Option<Self> {
        match letter {
            "m" | "masked" => Some(Self::Masked),
            "o" | "one-way" => Some(Self::OneWay),
            "p" | "plain" => Some(Self::Plain),
            "s" | "skip" => Some(Self::Skip),
            _ => None,
        }
    }

    const fn letter(self) -> &'static str {
        match self {
            Self::Masked => "m",
            Self::OneWay => "o",
            Self::Plain => "p",
            Self::Skip => "s",
        }
    }
}

/// The answers, from flags or the terminal.
struct Answers {
    kept: Vec<(Seen, Keep)>,
    subject: Option<String>,
    table: String,
    stack: String,
    parameters: Vec<(&'static str, String)>,
}

/// Writes mapping.toml and samconfig.toml. `host` is the database's, if a flag gives it. Without `settings`, the samples must be
/// in a file.
pub async fn run(settings: Option<&Settings>, host: Option<&str>, options: &Init) -> Result<Reply, Failure> {
    let mapping_file = options.directory.join("mapping.toml");
    let config_file = options.directory.join("samconfig.toml");
    for file in [&mapping_file, &config_file] {
        if file.exists() {
            let file = file.display();
            return Err(Failure::Usage(format!("{file} exists, and is not overwritten: name another --directory")));
        }
    }
    let bodies = match (&options.sample, settings) {
        (Some(file), _) => of_file(file)?,
        (None, Some(settings)) => of_queue(settings).await?,
        (None, None) => return Err(Failure::Usage("give --sample FILE, or --from-queue".to_owned())),
    };
    let (samples, is_sns) = unwrapped(&bodies)?;
    let (seen, undeclared) = fields::of_samples(&samples);
    let answers = ask(options, host, seen)?;
    let mapping = mapping_text(&answers, is_sns);
    // `mapping_text` writes valid TOML, so any error is about a name that the user gave.
    Mapping::from_toml(&mapping, "the mapping").map_err(|error| Failure::Usage(error.to_string()))?;

    fs::create_dir_all(&options.directory)
        .map_err(|error| failed(format!("cannot make {}: {error}", options.directory.display())))?;
    write_new(&mapping_file, &mapping)?;
    write_new(&config_file, &config_text(&answers))?;

    let (mapping_file, config_file) = (mapping_file.display().to_string(), config_file.display().to_string());
    let mut text = format!("{GOOD}Written:{GOOD:#} {} and {}\n", printable(&mapping_file), printable(&config_file));
    if !undeclared.is_empty() {
        let names: Vec<_> = undeclared.iter().map(|name| printable(name)).collect();
        text += &format!("{WARNING}Left out, as a mapping cannot declare them:{WARNING:#} {}\n", names.join(", "));
    }
    let sample = options.sample.as_ref().map_or("messages.jsonl".to_owned(), |file| file.display().to_string());
    let commands = [
        format!("etlctl mapping try {sample} --mapping {mapping_file}"),
        format!("etlctl migrate --mapping {mapping_file}"),
        format!("cp {mapping_file} function/ && sam deploy --config-file \"$PWD/{config_file}\""),
    ];
    text += &format!(
        "\n{BOLD}Next:{BOLD:#}\n  {}    # shows each message's row\n  {}    # as the tables' owner\n  {}\n",
        commands[0], commands[1], commands[2]
    );
    text += "In a checkout, copy the mapping to mapping.toml instead, and run `sam build` before `sam deploy`.\n";
    Ok(Reply::new(text, json!({"mapping": mapping_file, "samconfig": config_file, "next": commands})))
}

/// The bodies of a file of bodies or SQS events: one a line, or a single one.
fn of_file(file: &Path) -> Result<Vec<String>, Failure> {
    let mut text = String::new();
    let read = match file.as_os_str() == "-" {
        true => io::stdin().read_to_string(&mut text).map(drop),
        false => fs::read_to_string(file).map(|read| text = read),
    };
    read.map_err(|error| failed(format!("cannot read {}: {error}", file.display())))?;
    let is_one = serde_json::from_str::<Value>(&text).is_ok();
    let parts: Vec<&str> = if is_one { vec![&text] } else { text.lines().collect() };
    let mut bodies = Vec::new();
    for part in parts.into_iter().filter(|part| !part.trim().is_empty()) {
        match event::messages(part.as_bytes()) {
            Ok(messages) if messages.iter().all(|message| message.id().is_some()) && !messages.is_empty() => {
                let texts = messages.iter().filter_map(|message| serde_json::from_str(message.body()?).ok());
                bodies.extend(texts);
            }
            _ => bodies.push(part.to_owned()),
        }
    }
    Ok(bodies)
}

/// The bodies of up to ten messages in the queue. The messages are made visible again at once.
async fn of_queue(settings: &Settings) -> Result<Vec<String>, Failure> {
    let url = settings.require("QUEUE_URL")?;
    let client = aws_sdk_sqs::Client::new(&settings.aws);
    let receive = client.receive_message().queue_url(&url).max_number_of_messages(10).wait_time_seconds(5);
    let receive =
        receive.visibility_timeout(30).message_system_attribute_names(MessageSystemAttributeName::SentTimestamp);
    let messages = receive.send().await.map_err(aws("read the queue"))?.messages.unwrap_or_default();
    let entries = messages.iter().enumerate().filter_map(|(number, message)| {
        let entry = ChangeMessageVisibilityBatchRequestEntry::builder().id(number.to_string()).visibility_timeout(0);
        entry.receipt_handle(message.receipt_handle()?).build().ok()
    });
    let entries: Vec<_> = entries.collect();
    if entries.is_empty() {
        return Err(failed("no message is visible in the queue: give --sample FILE"));
    }
    let release = client.change_message_visibility_batch().queue_url(&url).set_entries(Some(entries)).send().await;
    release.map_err(aws("make the messages visible again; they become visible by themselves within 30 s"))?;
    Ok(messages.into_iter().filter_map(|message| message.body).collect())
}

/// The messages, unwrapped, and whether they were in SNS notifications.
fn unwrapped(bodies: &[String]) -> Result<(Vec<Value>, bool), Failure> {
    let mut samples = Vec::new();
    let mut wrapped = 0;
    for body in bodies {
        let parsed: Option<Value> = serde_json::from_str(body).ok();
        let message = parsed.filter(Value::is_object);
        let message = message.ok_or_else(|| {
            Failure::Usage(format!(
                "sample {} is not a JSON object: `etlctl mapping try` says what is wrong",
                samples.len() + 1
            ))
        })?;
        let inner = message["Message"].as_str().filter(|_| message["Type"] == "Notification");
        match inner.map(serde_json::from_str::<Value>) {
            Some(Ok(inner)) if inner.is_object() => {
                wrapped += 1;
                samples.push(inner);
            }
            _ => samples.push(message),
        }
    }
    match wrapped {
        _ if samples.is_empty() => Err(Failure::Usage("there is no sample message".to_owned())),
        0 => Ok((samples, false)),
        _ if wrapped == samples.len() => Ok((samples, true)),
        _ => Err(Failure::Usage("some samples are SNS notifications and some are not: give only one kind".to_owned())),
    }
}

/// Asks for the answers that no flag gives.
fn ask(options: &Init, host: Option<&str>, seen: Vec<Seen>) -> Result<Answers, Failure> {
    let by_flag = |path: &str| {
        let given = |fields: &[String]| fields.iter().any(|field| field == path);
        [
            (&options.masked, Keep::Masked),
            (&options.one_way, Keep::OneWay),
            (&options.plain, Keep::Plain),
            (&options.skip, Keep::Skip),
        ]
        .into_iter()
        .find(|(fields, _)| given(fields))
        .map(|(_, keep)| keep)
    };
    for field in [&options.masked, &options.one_way, &options.plain, &options.skip].into_iter().flatten() {
        if !seen.iter().any(|seen| seen.path == *field) {
            return Err(Failure::Usage(format!("no sample has a field {field:?}")));
        }
    }
    if let Some(field) = options
        .masked
        .iter()
        .chain(&options.one_way)
        .find(|field| seen.iter().any(|seen| seen.path == **field && !seen.is_text))
    {
        return Err(Failure::Usage(format!("the field {field:?} is not always a string, and only strings are masked")));
    }
    let mut asking = Asking::new();
    let open: Vec<_> = seen.iter().filter(|seen| by_flag(&seen.path).is_none()).map(|seen| seen.path.clone()).collect();
    if !asking.is_possible && !open.is_empty() {
        return Err(Failure::Usage(format!(
            "no terminal to ask on: give --masked, --one-way, --plain or --skip for each field. Open: {}",
            open.join(", ")
        )));
    }
    let mut kept = Vec::new();
    for field in seen {
        let keep = match by_flag(&field.path) {
            Some(keep) => keep,
            None => {
                let guess =
                    if field.is_text && fields::is_likely_personal(&field.path) { Keep::Masked } else { Keep::Plain };
                let choice = if field.is_text { "[m]asked, [o]ne-way, [p]lain, [s]kip" } else { "[p]lain, [s]kip" };
                let question = format!("{} ({}): {choice}?", printable(&field.path), field.column_type);
                asking.until(&question, guess.letter(), |answer| {
                    Keep::of(answer).filter(|keep| field.is_text || matches!(keep, Keep::Plain | Keep::Skip))
                })?
            }
        };
        kept.push((field, keep));
    }
    kept.retain(|(_, keep)| *keep != Keep::Skip);
    if kept.is_empty() {
        return Err(Failure::Usage("every field is skipped, so there is nothing to store".to_owned()));
    }
    let is_kept = |path: &str| kept.iter().any(|(seen, _)| seen.path == path);
    let subject = match &options.subject {
        Some(path) if is_kept(path) => Some(path.clone()),
        Some(path) => return Err(Failure::Usage(format!("--subject {path:?} is not a kept field"))),
        None if !asking.is_possible => None,
        None => {
            let answer = asking.until("Which field names the person a row is about? (empty: none)", "", |answer| {
                (answer.is_empty() || is_kept(answer)).then(|| answer.to_owned())
            })?;
            Some(answer).filter(|answer| !answer.is_empty())
        }
    };
    let mut one = |given: &Option<String>, question: &str, usual: &str| match given {
        Some(given) => Ok(given.clone()),
        None if !asking.is_possible => Ok(usual.to_owned()),
        None => asking.until(question, usual, |answer| Some(answer.to_owned())),
    };
    let table = one(&options.table, "Which table?", "messages")?;
    let stack = one(&options.stack_name, "What is the stack called?", "login-etl")?;
    let mut parameters = Vec::new();
    for (name, given, question) in [
        (
            "DatabaseSecretArn",
            &options.database_secret_arn,
            "ARN of the secret with the database's credentials? (empty: later)",
        ),
        ("DatabaseHost", &host.map(ToOwned::to_owned), "The database's host? (empty: from the secret)"),
        ("VpcSubnetIds", &options.subnets, "Subnets of its VPC, separated by commas? (empty: none)"),
        (
            "VpcSecurityGroupIds",
            &options.security_groups,
            "Security groups of the function, separated by commas? (empty: none)",
        ),
    ] {
        let answer = one(given, question, "")?;
        if !answer.is_empty() {
            parameters.push((name, answer));
        }
    }
    Ok(Answers { kept, subject, table, stack, parameters })
}

/// Asks on the terminal.
struct Asking {
    is_possible: bool,
}

impl Asking {
    fn new() -> Self {
        Self { is_possible: io::stdin().is_terminal() && io::stderr().is_terminal() }
    }

    /// Asks until an answer is valid. An empty answer stands for the usual one.
    fn until<T>(&mut self, question: &str, usual: &str, read: impl Fn(&str) -> Option<T>) -> Result<T, Failure> {
        loop {
            let shown = if usual.is_empty() { String::new() } else { format!(" [{usual}]") };
            write!(anstream::stderr(), "{question}{shown} ")?;
            let mut line = String::new();
            if io::stdin().lock().read_line(&mut line)? == 0 {
                return Err(Failure::Usage("no answer; nothing was written".to_owned()));
            }
            let answer = line.trim();
            if let Some(answer) = read(if answer.is_empty() { usual } else { answer }) {
                return Ok(answer);
            }
        }
    }
}

fn mapping_text(answers: &Answers, is_sns: bool) -> String {
    let mut text = "# Maps fields of a message to columns. Fields that are not named here are not stored.\n".to_owned();
    text += &format!("table = {}\n", quoted(&answers.table));
    if is_sns {
        text += "unwrap = \"sns\"\n";
    }
    let mut names: Vec<String> = Vec::new();
    for (seen, keep) in &answers.kept {
        let bare = seen.path.replace('.', "_");
        let name = if matches!(keep, Keep::Plain) { bare } else { format!("masked_{bare}") };
        // The fields `a.b` and `a_b` give the same name.
        let name = (1..)
            .map(|number| if number == 1 { name.clone() } else { format!("{name}_{number}") })
            .find(|name| !names.contains(name))
            .unwrap_or_default();
        text += &format!("\n[[column]]\nname = {}\nfrom = {}\n", quoted(&name), quoted(&seen.path));
        text += match keep {
            Keep::Masked => "keep = \"masked\"\n",
            Keep::OneWay => "keep = \"one-way\"\n",
            Keep::Plain | Keep::Skip => "keep = \"plain\"\n",
        };
        let is_address = matches!(seen.path.rsplit('.').next(), Some("ip" | "ip_address" | "ip_addr"));
        match keep {
            Keep::Masked | Keep::OneWay if is_address => text += "normalize = \"ip\"\n",
            Keep::Masked | Keep::OneWay => {}
            Keep::Plain | Keep::Skip => text += &format!("type = {}\n", quoted(seen.column_type)),
        }
        if seen.optional {
            text += "optional = true\n";
        }
        if answers.subject.as_deref() == Some(&*seen.path) {
            text += "subject = true\n";
        }
        names.push(name);
    }
    let day = (1..)
        .map(|number| if number == 1 { "received_on".to_owned() } else { format!("received_on_{number}") })
        .find(|name| !names.contains(name))
        .unwrap_or_default();
    text + &format!("\n[[column]]\nname = {}\nvalue = \"processing-date\"\ntype = \"date\"\n", quoted(&day))
}

fn config_text(answers: &Answers) -> String {
    let overrides: Vec<_> = answers
        .parameters
        .iter()
        .map(|(name, value)| format!("    {},\n", quoted(&format!("{name}={value}"))))
        .collect();
    format!(
        "version = 0.1\n\n[default.deploy.parameters]\nstack_name = {}\nresolve_s3 = true\ncapabilities = \"CAPABILITY_IAM\"\n\
         confirm_changeset = true\nfail_on_empty_changeset = false\nparameter_overrides = [\n{}]\n",
        quoted(&answers.stack),
        overrides.concat()
    )
}

/// The text as a TOML string; JSON's syntax is valid TOML.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn write_new(file: &PathBuf, text: &str) -> Result<(), Failure> {
    let written =
        OpenOptions::new().write(true).create_new(true).open(file).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| failed(format!("cannot write {}: {error}", file.display())))
}
