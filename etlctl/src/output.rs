//! What a command says: its reply as text or JSON, tables, questions, progress; and why it could not.

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

/// What stands out: headings of tables and screens.
pub const BOLD: Style = Style::new().bold();
/// All is well.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// Somebody should look.
pub const WARNING: Style = AnsiColor::Yellow.on_default();
/// Somebody has to act.
pub const BAD: Style = AnsiColor::Red.on_default().bold();
/// What can be skipped in reading.
pub const FAINT: Style = Style::new().dimmed();

/// What a command found, in both forms. Colours go in regardless; they come off where it is no terminal that is written to.
#[derive(Debug, Default)]
pub struct Reply {
    /// For people.
    pub text: String,
    /// Data, instead of the text: printed as it is.
    pub data: Option<Zeroizing<String>>,
    /// For programs.
    pub json: Value,
    /// Whether the answer is no: something is wrong, or left to do. The exit status is then 1.
    pub no: bool,
}

impl Reply {
    /// A reply that says yes.
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

/// A document as text, in which a terminal finds nothing to obey: JSON's own rules let some such characters through.
pub fn json_text(json: &Value) -> Zeroizing<String> {
    let text = Zeroizing::new(format!("{json:#}\n"));
    let mut shown = Zeroizing::new(String::with_capacity(text.len()));
    for character in text.chars() {
        if character != '\n' && is_harmful(character) {
            // All of them are below U+10000, and only within strings.
            shown.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Why a command did not do what it was asked to.
#[derive(Debug)]
pub enum Failure {
    /// It was asked in a wrong way. Exit status 2.
    Usage(String),
    /// A setting, AWS or the database kept it from it. Exit status 3.
    Failed(String),
    /// Nobody reads on.
    BrokenPipe,
}

/// A failure with this text.
pub fn failed(text: impl Into<String>) -> Failure {
    Failure::Failed(text.into())
}

impl Failure {
    /// What it says; nothing, if nobody reads on.
    pub fn why(&self) -> &str {
        match self {
            Self::Usage(text) | Self::Failed(text) => text,
            Self::BrokenPipe => "",
        }
    }

    /// Says it on standard error, and gives its exit status.
    pub fn report(&self) -> ExitCode {
        let (text, status) = match self {
            Self::Usage(text) => (text, 2),
            Self::Failed(text) => (text, 3),
            Self::BrokenPipe => return ExitCode::SUCCESS,
        };
        let mut stderr = anstream::stderr().lock();
        // There is nobody left to tell if this fails.
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
                "; the function's path is its own: name your copy of the file with --database-ca"
            }
            StoreError::NoHost => "; or name it with --database-host",
            _ => "",
        };
        Self::Failed(format!("{error}{hint}"))
    }
}

impl From<SecretError> for Failure {
    fn from(error: SecretError) -> Self {
        // Its own hints are for the function's role and network.
        let SecretError::Read { id, code } = error else { return Self::Failed(error.to_string()) };
        let hint = match code.as_str() {
            "AccessDeniedException" => {
                "you need secretsmanager:GetSecretValue on it, and kms:Decrypt if it has its own KMS key"
            }
            "ResourceNotFoundException" => "no secret of that name in this account and region, or it has no value yet",
            "TimeoutError" | "DispatchFailure" => NO_ANSWER,
            _ => "see what AWS says of that",
        };
        Self::Failed(format!("cannot read the secret {id:?} ({code}): {hint}"))
    }
}

const NO_ANSWER: &str = "no answer from AWS; check region, credentials and network (AWS_REGION, AWS_PROFILE)";

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
                _ => "AWS gave an answer that cannot be read".to_owned(),
            },
        };
        failed(format!("cannot {what} ({why})"))
    }
}

/// Turns an error of the database into a failure to do `what`. The server's details, which quote rows, stay out.
pub fn sql(what: impl Display) -> impl FnOnce(tokio_postgres::Error) -> Failure {
    move |error| failed(format!("cannot {what}: {}", sql_reason(&error)))
}

/// What the server said, and what to do about it where that is known.
pub fn sql_reason(error: &tokio_postgres::Error) -> String {
    let Some(answer) = error.as_db_error() else { return error.to_string() };
    let code = answer.code().code();
    // Of what is wrong with a value (classes 22 and 23), the message quotes the value.
    if code.starts_with("22") || code.starts_with("23") {
        return format!("a value does not do (SQLSTATE {code})");
    }
    let hint = match code {
        "42P01" => "; is the schema applied? `etlctl migrate` does it",
        "42501" => "; your database user needs the role login_etl_operator, and `etlctl migrate` the tables' owner",
        "42883" => "; is the schema up to date? `etlctl migrate` brings it there",
        _ => "",
    };
    format!("{} (SQLSTATE {}){hint}", answer.message(), code)
}

/// Characters that would move the cursor, change colours or reorder text are shown as escapes.
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

/// Control characters, and those that set the direction of text.
fn is_harmful(character: char) -> bool {
    let directs =
        matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || directs
}

fn printable_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}

/// Rows under headings, which may be empty; whatever a sender put into a cell is made harmless.
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

/// Asks before something that cannot be taken back. Without a terminal there is nobody to ask, and `yes` must be given.
pub fn confirm(question: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(Failure::Usage(format!("{question} Nobody can be asked here: confirm with --yes")));
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

/// Progress on standard error, where that is a terminal.
pub fn progress(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// That something goes on, for as long as what is returned lives.
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

/// A time for programs: always as long, so that it sorts as text.
pub fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// Bytes in the unit that suits them.
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
