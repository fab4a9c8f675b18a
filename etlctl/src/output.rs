//! Output of commands: replies as text or JSON, tables, questions, progress and errors.

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use anstyle::{AnsiColor, Style};
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use login_etl::{secrets::SecretError, store::StoreError};
use serde_json::Value;
use zeroize::Zeroizing;

/// Headings of tables and screens.
pub const BOLD: Style = Style::new().bold();
/// All is well.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// Somebody should look.
pub const WARNING: Style = AnsiColor::Yellow.on_default();
/// Somebody has to act.
pub const BAD: Style = AnsiColor::Red.on_default().bold();
/// Remarks that need not be read.
pub const FAINT: Style = Style::new().dimmed();

/// A command's result, as text and as JSON. The text has colours, which are removed unless it is written to a terminal.
#[derive(Debug, Default)]
pub struct Reply {
    /// For people.
    pub text: String,
    /// Data to print unchanged, instead of the text.
    pub data: Option<Zeroizing<String>>,
    /// For programs.
    pub json: Value,
    /// Whether the answer is no: something is wrong, or left to do. The exit status is then 1.
    pub no: bool,
}

impl Reply {
    /// A reply whose answer is yes.
    pub fn new(text: String, json: Value) -> Self {
        Self { text, json, ..Self::default() }
    }

    /// Prints it; returns whether the answer is yes.
    pub fn print(self, json: bool) -> Result<bool, Failure> {
        match (json, &self.data) {
            (true, _) => print(io::stdout().lock(), &json_text(&self.json))?,
            (false, Some(data)) => print(io::stdout().lock(), data)?,
            (false, None) => print(anstream::stdout().lock(), &self.text)?,
        }
        Ok(!self.no)
    }
}

fn print(mut to: impl Write, text: &str) -> Result<(), Failure> {
    to.write_all(text.as_bytes())?;
    Ok(to.flush()?)
}

/// A JSON document as text that cannot steer a terminal: JSON itself leaves some harmful characters unescaped.
pub fn json_text(json: &Value) -> Zeroizing<String> {
    let text = Zeroizing::new(format!("{json:#}\n"));
    let mut shown = Zeroizing::new(String::with_capacity(text.len()));
    for character in text.chars() {
        if character != '\n' && is_harmful(character) {
            // They are all below U+10000, and occur only within strings.
            shown.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// Wrong usage. Exit status 2.
    Usage(String),
    /// A setting, AWS or the database prevented it. Exit status 3.
    Failed(String),
    /// The reader closed the pipe. Exit status 0.
    BrokenPipe,
}

/// A failure with this text.
pub fn failed(text: impl Into<String>) -> Failure {
    Failure::Failed(text.into())
}

impl Failure {
    /// The error text; empty for a broken pipe.
    pub fn why(&self) -> &str {
        match self {
            Self::Usage(text) | Self::Failed(text) => text,
            Self::BrokenPipe => "",
        }
    }

    /// Prints the error to standard error, and returns the exit status.
    pub fn report(&self) -> ExitCode {
        let (text, status) = match self {
            Self::Usage(text) => (text, 2),
            Self::Failed(text) => (text, 3),
            Self::BrokenPipe => return ExitCode::SUCCESS,
        };
        let mut stderr = anstream::stderr().lock();
        // If this fails, there is no way left to report it.
        drop(writeln!(stderr, "{BAD}error:{BAD:#} {}", printable_lines(text)));
        ExitCode::from(status)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::BrokenPipe } else { Self::Failed(error.to_string()) }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let hint = match error {
            StoreError::CaFile { .. } => {
                "; that is the function's path: name your own copy of the file with --database-ca"
            }
            StoreError::NoHost => "; or name it with --database-host",
            _ => "",
        };
        Self::Failed(format!("{error}{hint}"))
    }
}

impl From<SecretError> for Failure {
    fn from(error: SecretError) -> Self {
        // The error's own hints are about the function's role and network.
        let SecretError::Read { id, code } = error else { return Self::Failed(error.to_string()) };
        let hint = match code.as_str() {
            "AccessDeniedException" => {
                "you need secretsmanager:GetSecretValue on it, and kms:Decrypt if it has its own KMS key"
            }
            "ResourceNotFoundException" => "no secret of that name in this account and region, or it has no value yet",
            "TimeoutError" | "DispatchFailure" => NO_ANSWER,
            _ => "look this error up at AWS",
        };
        Self::Failed(format!("cannot read the secret {id:?} ({code}): {hint}"))
    }
}

const NO_ANSWER: &str = "no answer from AWS; check region, credentials and network (AWS_REGION, AWS_PROFILE), and AWS_CA_BUNDLE behind \
     a proxy that inspects TLS";

/// Turns an AWS error into a failure to do `what`.
pub fn aws<E>(what: impl Display) -> impl FnOnce(SdkError<E>) -> Failure
where
    E: ProvideErrorMetadata,
{
    move |error| {
        let why = match (error.code(), error.message()) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code.to_owned(),
            _ => match &error {
                SdkError::DispatchFailure(_) | SdkError::TimeoutError(_) => NO_ANSWER.to_owned(),
                _ => "AWS sent an unreadable answer".to_owned(),
            },
        };
        failed(format!("cannot {what} ({why})"))
    }
}

/// Turns a database error into a failure to do `what`, without the server's details, which quote rows.
pub fn sql(what: impl Display) -> impl FnOnce(tokio_postgres::Error) -> Failure {
    move |error| failed(format!("cannot {what}: {}", sql_reason(&error)))
}

/// The server's message, with advice if there is any.
pub fn sql_reason(error: &tokio_postgres::Error) -> String {
    let Some(answer) = error.as_db_error() else { return error.to_string() };
    let code = answer.code().code();
    // The messages of classes 22 and 23 quote the value.
    if code.starts_with("22") || code.starts_with("23") {
        return format!("invalid value (SQLSTATE {code})");
    }
    let hint = match code {
        "42P01" => {
            "; check database and user (`etlctl doctor` names them); if the schema is not applied, run `etlctl migrate`"
        }
        "42501" => "; your database user needs the role login_etl_operator; `etlctl migrate` needs the tables' owner",
        "42883" => "; if the schema is out of date, run `etlctl migrate`",
        _ => "",
    };
    format!("{} (SQLSTATE {}){hint}", answer.message(), code)
}

/// Escapes characters that would move the cursor, change colours or reorder text.
pub fn printable(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, character| {
        if is_harmful(character) {
            shown.extend(character.escape_unicode());
        } else {
            shown.push(character);
        }
        shown
    })
}

/// Whether it is a control character or a text direction mark.
fn is_harmful(character: char) -> bool {
    let directs =
        matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || directs
}

fn printable_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}

/// A table of rows under headings, which may be empty. Cells are escaped, as they may hold what a sender chose.
pub fn table<C: AsRef<str>>(headings: &[&str], rows: impl IntoIterator<Item = Vec<C>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(headings);
    for row in rows {
        table.add_row(row.iter().map(|cell| printable(cell.as_ref())));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    let mut lines = text.lines().map(str::trim_end);
    let mut shown = String::new();
    if let Some(heading) = lines.next().filter(|heading| !heading.is_empty()) {
        shown.push_str(&format!("{BOLD}{heading}{BOLD:#}\n"));
    }
    for line in lines {
        shown.push_str(line);
        shown.push('\n');
    }
    shown
}

/// Asks before something irreversible. Without a terminal, it cannot ask, and fails unless `yes` is set.
pub fn confirm(question: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(Failure::Usage(format!("{question} There is no terminal to ask on: confirm with --yes")));
    }
    write!(anstream::stderr(), "{WARNING}{question}{WARNING:#} [y/N] ")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Failure::Usage("not confirmed, nothing was done".to_owned()))
    }
}

/// A progress bar on standard error, if that is a terminal.
pub fn progress(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Shows that something is going on, until the returned value is dropped.
pub fn spinner(what: impl Into<String>) -> Spinner {
    let bar = ProgressBar::new_spinner();
    bar.set_message(what.into());
    bar.enable_steady_tick(Duration::from_millis(200));
    Spinner(bar)
}

/// Clears its line when dropped.
#[derive(Debug)]
pub struct Spinner(ProgressBar);

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A duration in its two largest units: `3 d 4 h`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let mut shown = String::new();
    let mut rest = seconds;
    for (length, unit) in units.into_iter().skip_while(|(length, _)| seconds < *length).take(2) {
        if rest >= length {
            let space = if shown.is_empty() { "" } else { " " };
            shown += &format!("{space}{} {unit}", rest / length);
            rest %= length;
        }
    }
    if shown.is_empty() { "0 s".to_owned() } else { shown }
}

/// A time for programs, of fixed length, so that it sorts as text.
pub fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// A number of bytes, in the largest unit that leaves it at least 1.
pub fn bytes(count: i64) -> String {
    let (mut amount, mut unit) = (count as f64, "B");
    for larger in ["kB", "MB", "GB", "TB"] {
        if amount < 1000.0 {
            break;
        }
        (amount, unit) = (amount / 1000.0, larger);
    }
    if unit == "B" { format!("{count} B") } else { format!("{amount:.1} {unit}") }
}

/// `1 message`, `2 messages`, `2 batches`, `2 deliveries`.
pub fn count(number: impl Into<i128>, one: &str) -> String {
    let number = number.into();
    if number == 1 {
        return format!("1 {one}");
    }
    match one.strip_suffix("ry") {
        Some(stem) => format!("{number} {stem}ries"),
        None if one.ends_with("ch") => format!("{number} {one}es"),
        None => format!("{number} {one}s"),
    }
}
