//! What can be asked for, and the help that teaches it.

use std::{collections::HashMap, num::NonZeroU32, path::PathBuf};

use crate::output::{BOLD, GOOD};
use clap::{Arg, ArgGroup, Args, CommandFactory, FromArgMatches, Parser, Subcommand, builder::Styles};
use login_etl::mapping::Mapping;

const STYLES: Styles = Styles::styled().header(BOLD).usage(BOLD).literal(GOOD);

/// A setting of every command: a flag, and the environment variable that says the same.
#[derive(Debug)]
pub struct Setting {
    /// Without its dashes.
    pub flag: &'static str,
    pub variable: &'static str,
    value: &'static str,
    help: &'static str,
    /// Whether it says who asks, and by what way; the others say which pipeline it is, and come from a stack if one is named.
    pub is_ones_own: bool,
}

const fn setting(flag: &'static str, value: &'static str, variable: &'static str, help: &'static str) -> Setting {
    Setting { flag, variable, value, help, is_ones_own: false }
}

/// All settings, in the order of the help.
pub const SETTINGS: [Setting; 15] = [
    Setting { is_ones_own: true, ..setting("database-secret", "ID", "ETLCTL_DATABASE_SECRET_ID", "your own user") },
    Setting { is_ones_own: true, ..setting("database-user", "NAME", "DATABASE_USER", "with DATABASE_PASSWORD") },
    Setting { is_ones_own: true, ..setting("database-auth", "WAY", "DATABASE_AUTH", "iam: with a token") },
    setting("database-host", "HOST", "DATABASE_HOST", ""),
    Setting { is_ones_own: true, ..setting("database-hostaddr", "IP", "DATABASE_HOSTADDR", "of a tunnel to it") },
    setting("database-port", "PORT", "DATABASE_PORT", ""),
    setting("database-name", "NAME", "DATABASE_NAME", ""),
    Setting { is_ones_own: true, ..setting("database-schema", "NAME", "DATABASE_SCHEMA", "of the tables; public") },
    setting("database-tls", "MODE", "DATABASE_TLS", "verify-full or disable"),
    setting("database-ca", "ROOTS", "DATABASE_CA", "aws, system or a file"),
    setting("masking-secret", "ID", "MASKING_SECRET_ID", "the keyring"),
    setting("queue-url", "URL", "QUEUE_URL", ""),
    setting("dlq-url", "URL", "DLQ_URL", ""),
    setting("function", "NAME", "FUNCTION_NAME", ""),
    Setting { is_ones_own: true, ..setting("mapping", "FILE", "MAPPING_FILE", "not the one built in") },
];

const BEFORE_SETTINGS: &str = "\
Where the pipeline is:
`--stack NAME` reads it from the deployed stack: queues, function, secrets, database. Without it, the function's own \
environment variables say it, and QUEUE_URL, DLQ_URL and FUNCTION_NAME. Flags come first; beside a stack, only who you \
are is taken from the environment; the environment comes before a file `.env`. AWS is found as every AWS tool finds it (AWS_PROFILE, AWS_REGION …).

Who you are to the database:
The function's user may only insert. Yours, with the role login_etl_operator, is in a secret that --database-secret \
names (JSON with username and password), or in DATABASE_USER and DATABASE_PASSWORD. With --database-auth iam, your AWS \
identity signs a token for DATABASE_USER, and there is no password.

Settings, each a flag and a variable, with every command:";

const AFTER_SETTINGS: &str = "\
Exit status:
  0  done, and the answer is yes
  1  done, and the answer is no: a check failed, or something is left
  2  asked in a wrong way, or not confirmed; nothing was done
  3  not done: a setting, AWS or the database is in the way";

fn after_help() -> String {
    let lines = SETTINGS.iter().map(|Setting { flag, variable, value, help, .. }| {
        format!("  {:24} {variable:26} {help}", format!("--{flag} {value}")).trim_end().to_owned() + "\n"
    });
    format!("{BEFORE_SETTINGS}\n{}\n{AFTER_SETTINGS}", lines.collect::<String>())
}

/// Operates a login-etl pipeline: its schema, its health, its dead letters, its masks and its keys.
#[derive(Debug, Parser)]
#[command(name = "etlctl", version, styles = STYLES, max_term_width = 120, next_line_help = false, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const COMMON: &str = "With every command (more in `etlctl --help`)";

impl Cli {
    /// Reads the command line, or ends with what is wrong with it.
    pub fn from_command_line() -> Self {
        let matches = Self::all().get_matches();
        let mut cli = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        let given = |setting: &Setting| Some((setting.variable, matches.get_one::<String>(setting.flag)?.clone()));
        cli.global.settings = SETTINGS.iter().filter_map(given).collect();
        if let (Command::Find(find), Some(matches)) = (&mut cli.command, matches.subcommand_matches("find")) {
            let mut given =
                short_forms().filter_map(|(flag, field)| Some((field, matches.get_one::<String>(&flag)?.clone())));
            find.short = given.next();
        }
        cli
    }

    /// All that can be asked for: `find` has a short form for each masked field of the mapping that is built in.
    pub fn all() -> clap::Command {
        let settings = SETTINGS
            .iter()
            .map(|setting| Arg::new(setting.flag).long(setting.flag).value_name(setting.value).global(true).hide(true))
            // What it was called before.
            .map(
                |argument| {
                    if argument.get_id() == "database-ca" { argument.alias("database-ca-file") } else { argument }
                },
            );
        let command = Self::command().args(settings).after_long_help(after_help()).version(version());
        command.mut_subcommand("find", |find| {
            let forms = short_forms().map(|(flag, field)| {
                let help = format!("Short for `--field {field} --value VALUE`");
                Arg::new(flag.clone()).long(flag).value_name("VALUE").help(help).group("short").conflicts_with("field")
            });
            let usage: String = short_forms().map(|(flag, _)| format!("|--{flag} <VALUE>")).collect();
            find.args(forms).override_usage(format!("etlctl find [OPTIONS] <--field <NAME> --value <VALUE>{usage}>"))
        })
    }
}

/// With the commit, in a release.
fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    option_env!("LOGIN_ETL_COMMIT").map_or_else(|| version.to_owned(), |commit| format!("{version} ({commit})"))
}

/// Flag and field of each short form.
fn short_forms() -> impl Iterator<Item = (String, String)> {
    let mapping = Mapping::built_in().ok();
    let fields: Vec<_> = mapping.iter().flat_map(Mapping::masked).map(|(_, field)| field.path.to_string()).collect();
    fields.into_iter().map(|field| (field.replace('_', "-"), field))
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Take all settings from this CloudFormation stack
    #[arg(long, global = true, value_name = "NAME", help_heading = COMMON)]
    pub stack: Option<String>,
    /// Answer in JSON
    #[arg(long, global = true, help_heading = COMMON)]
    pub json: bool,
    /// Read variables from this file instead of `.env`
    #[arg(long, global = true, value_name = "FILE", help_heading = COMMON)]
    pub env_file: Option<PathBuf>,
    /// The settings that were given by flags, each under its variable.
    #[arg(skip)]
    pub settings: HashMap<&'static str, String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a mapping and the deployment's settings, from sample messages
    ///
    /// Asks of each field whether it is personal, for the table and the database, and writes mapping.toml and samconfig.toml. Flags
    /// answer beforehand; where nobody can be asked, they have to answer for every field. Writes over no file.
    #[command(after_help = "\
Examples:
  etlctl init --sample messages.jsonl
  etlctl init --from-queue --stack login-etl --directory mine
  etlctl init --sample messages.jsonl --masked ip --plain user_id --skip trace")]
    Init(Init),
    /// Bring the database's schema up to date
    ///
    /// Applies what is missing: the ledger, the roles and the audit, and what `etlctl mapping ddl` prints; each in a
    /// transaction of its own, recorded with its checksum in login_etl_migrations. Takes a table that is there already as it
    /// is, if its columns fit. Two at once wait for each other. Needs the tables' owner, and the right to create roles the
    /// first time.
    Migrate(Migrate),
    /// Check that everything is set up right; changes nothing
    ///
    /// Looks at the function, its event source mapping, both queues, the secrets, the database and the last hour's
    /// failures, and says for each thing that is wrong what to do about it.
    Doctor,
    /// Show a value's masks, one for each key of the ring
    Mask(Mask),
    /// Find the rows with a value of a masked field
    ///
    /// Masks the value under every key of the ring, and looks for rows that have one of the masks. Nothing is decrypted.
    /// Read from standard input, a value stays out of the shell's history and the list of processes.
    #[command(after_help = "\
Examples:
  etlctl find --ip 199.172.111.135 --stack login-etl
  etlctl find --device-id - --since 2026-11-01 < device.txt")]
    Find(Find),
    /// Recover masked values, for a reason that is recorded
    ///
    /// Who asks, when, why, for how many, under which keys and with what outcome is committed to etl_audit before
    /// anything is shown. Values go to standard output or to a new file that only you can read, and nowhere else. What
    /// cannot be recovered reads alike, whatever is wrong with it.
    #[command(after_help = "\
Examples:
  etlctl recover --field ip --reason 'Order 12/345' '2026-11:kzXo…=='
  etlctl recover --field ip --reason '…' --file masks.txt --output addresses.txt
  etlctl recover --reason '…' --csv logins.csv --output recovered.csv
  etlctl recover --reason '…' --query 'select * from user_logins limit 9'")]
    Recover(Recover),
    /// A person's data: find it, export it, erase it
    ///
    /// The person is a value of the mapping's subject, or of any masked field: it is masked under every key of the ring. Read
    /// from standard input, a value stays out of the shell's history and the list of processes.
    #[command(after_help = "\
Examples:
  etlctl subject find alice --stack login-etl
  etlctl subject export - --reason 'Request 7' --output alice.jsonl < user.txt
  etlctl subject erase 199.172.111.135 --field ip --reason 'Request 7'")]
    Subject {
        #[command(subcommand)]
        command: Subject,
    },
    /// The keyring: its keys, and rows from one key to the next
    ///
    /// A rotation, while messages flow: `add` makes a key, `activate` has new rows masked under it, `remask` brings the
    /// old rows over, so that equal values are equal again, and `retire` takes the old key out of the ring.
    Keys {
        #[command(subcommand)]
        command: Keys,
    },
    /// The dead-letter queue: what died, why, and back again
    ///
    /// Looking hides a message from others, for a minute at most.
    Dlq {
        #[command(subcommand)]
        command: Dlq,
    },
    /// The mapping: which fields of a message become which columns
    ///
    /// Needs neither AWS nor a database. The mapping is the one that `--mapping FILE` or MAPPING_FILE names, else the
    /// built-in one.
    #[command(after_help = "\
Examples:
  etlctl mapping check mapping.toml
  etlctl mapping try events/mixed.json --mapping mapping.toml
  etlctl mapping ddl --mapping mapping.toml | psql")]
    Mapping {
        #[command(subcommand)]
        command: MappingCommand,
    },
    /// The pipeline on one screen
    Status(Status),
    /// Print a completion script for your shell
    #[command(after_help = "\
Examples:
  etlctl completions bash > ~/.local/share/bash-completion/completions/etlctl
  etlctl completions zsh  > \"${fpath[1]}/_etlctl\"
  etlctl completions fish > ~/.config/fish/completions/etlctl.fish")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub struct Init {
    /// A file of sample bodies or SQS events, one a line, or of one alone; `-` for standard input
    #[arg(long, value_name = "FILE", required_unless_present = "from_queue")]
    pub sample: Option<PathBuf>,
    /// Take up to ten messages that wait in the queue for samples; they stay there, received once more
    #[arg(long, conflicts_with = "sample")]
    pub from_queue: bool,
    /// Where to write
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub directory: PathBuf,
    /// A field to mask, so that it can be recovered; may be given several times
    #[arg(long, value_name = "FIELD")]
    pub masked: Vec<String>,
    /// A field to mask so that nobody can recover it
    #[arg(long, value_name = "FIELD")]
    pub one_way: Vec<String>,
    /// A field to keep as it is
    #[arg(long, value_name = "FIELD")]
    pub plain: Vec<String>,
    /// A field to leave out
    #[arg(long, value_name = "FIELD")]
    pub skip: Vec<String>,
    /// The field that says whom a row is about
    #[arg(long, value_name = "FIELD")]
    pub subject: Option<String>,
    /// The table, or schema and table with a dot
    #[arg(long, value_name = "NAME")]
    pub table: Option<String>,
    /// The stack's name
    #[arg(long, value_name = "NAME")]
    pub stack_name: Option<String>,
    /// ARN of the secret with the credentials of the function's database user
    #[arg(long, value_name = "ARN")]
    pub database_secret_arn: Option<String>,
    /// Subnets of the database's VPC, with commas between them
    #[arg(long, value_name = "IDS")]
    pub subnets: Option<String>,
    /// Security groups for the function, with commas between them
    #[arg(long, value_name = "IDS")]
    pub security_groups: Option<String>,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// Only say what is missing; the exit status is 1 if anything is
    #[arg(long)]
    pub check: bool,
    /// Have login_etl sign in with IAM's tokens, and by no password any more: grants it rds_iam, which RDS and Aurora have
    #[arg(long, conflicts_with = "check")]
    pub iam: bool,
}

#[derive(Debug, Subcommand)]
pub enum MappingCommand {
    /// Show each column: its type, where it comes from, how it is kept, what is refused
    Show,
    /// Check a mapping, and say where it breaks a rule
    Check {
        /// The mapping's file
        file: Option<PathBuf>,
    },
    /// Print the SQL that makes the table, its indexes, its views of duplicates, and the grants
    Ddl,
    /// Show which row would come of each message, and which would be refused, and why
    ///
    /// The masks are made under a key that is made up, unless --keyring gives another.
    Try {
        /// A file of bodies or of SQS events, one a line, or of one event or body; `-` for standard input
        file: PathBuf,
        /// A file with the text of a keyring's secret
        #[arg(long, value_name = "FILE")]
        keyring: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct Mask {
    /// Which field's value it is
    #[arg(long, value_name = "NAME")]
    pub field: String,
    /// The value, or `-` to read it from standard input
    pub value: String,
}

#[derive(Debug, Args)]
pub struct Find {
    /// The masked field that the value is of
    #[arg(long, value_name = "NAME", requires = "value", required_unless_present = "short")]
    pub field: Option<String>,
    /// The value, or `-` to read it from standard input
    #[arg(long, value_name = "VALUE", requires = "field")]
    pub value: Option<String>,
    /// Field and value, where they were given in a short form.
    #[arg(skip)]
    pub short: Option<(String, String)>,
    /// Only rows of this day (UTC) and later
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub since: Option<jiff::civil::Date>,
    /// Most rows to show, the latest first
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("source").required(true).args(["masks", "file", "csv", "query"])))]
pub struct Recover {
    /// Why: a ticket, an order, a request. It is recorded
    #[arg(long)]
    pub reason: String,
    /// Which field's masks they are; of --csv and --query, the field of --column
    #[arg(long, value_name = "NAME")]
    pub field: Option<String>,
    /// Masks as they stand in the table
    #[arg(value_name = "MASK", requires = "field")]
    pub masks: Vec<String>,
    /// A file with a mask a line, or `-` for standard input
    #[arg(long, requires = "field")]
    pub file: Option<PathBuf>,
    /// A CSV file with a line of headings, or `-`: its masked columns, or --column
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// The rows of a query, which cannot change anything: the same columns
    #[arg(long, value_name = "SQL")]
    pub query: Option<String>,
    /// Another column with masks, of --field
    #[arg(long, value_name = "NAME", requires = "field", conflicts_with_all = ["masks", "file"])]
    pub column: Option<String>,
    /// A new file to write to instead of standard output
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Do not ask, however many values it is
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct Who {
    /// The value that the person is known by, or `-` to read it from standard input
    pub value: String,
    /// The field that the value is of: the subject, if not given, or a masked field
    #[arg(long, value_name = "NAME")]
    pub field: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Subject {
    /// Find the person's rows
    ///
    /// Nothing is decrypted. Needs the role login_etl_operator.
    Find {
        #[command(flatten)]
        who: Who,
        /// Most rows to show, the latest first
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Write all rows of the person to a new file, as JSON Lines
    ///
    /// With --reason, masked fields are recovered, which is recorded in etl_audit before the file has anything in it. Only you
    /// can read the file. Needs the role login_etl_operator.
    Export {
        #[command(flatten)]
        who: Who,
        /// The file, which must not be there yet
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// Recover masked fields, for this reason: a ticket, a request
        #[arg(long)]
        reason: Option<String>,
    },
    /// Erase the person's rows and dead messages, on record
    ///
    /// Without --yes, it counts and changes nothing. Rows go in batches, each in one transaction with its record in etl_audit:
    /// who, when, why and how many, never the value. It can be killed at any point and run again. The ledger keeps its keys, so
    /// no redelivery brings a row back. Needs the role login_etl_privacy.
    Erase {
        #[command(flatten)]
        who: Who,
        /// Why: a ticket, a request. It is recorded, so do not name the person
        #[arg(long)]
        reason: String,
        /// Erase, instead of counting
        #[arg(long)]
        yes: bool,
        /// Delete dead messages, too, that have the value somewhere and not the field; they may be another's
        #[arg(long)]
        mentions: bool,
        /// Most rows a transaction
        #[arg(long, value_name = "N", default_value = "5000")]
        batch: NonZeroU32,
    },
}

#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Show each key's cipher, age and rows
    List {
        /// Do not count rows, which reads the whole table
        #[arg(long)]
        no_rows: bool,
    },
    /// Put a new random key into the ring; it masks nothing until it is activated
    Add {
        /// Its id, 1 to 32 of a-z 0-9 . _ - ; this month if not given. It shows in every mask
        id: Option<String>,
        /// aes-siv also detects damage and keeps the columns apart; aes-cbc is the original's; nobody can recover what
        /// hmac-sha256 masks
        #[arg(long, default_value = "aes-siv", value_parser = ["aes-siv", "aes-cbc", "hmac-sha256"])]
        cipher: String,
    },
    /// Have new rows masked under this key
    ///
    /// Running functions notice within SECRETS_TTL. Rows from before keep their masks until `etlctl keys remask`.
    Activate {
        /// The key's id
        id: String,
        /// For columns with `keep = "one-way"`; it is an hmac-sha256 key
        #[arg(long)]
        one_way: bool,
    },
    /// Bring all rows under the active key, while messages flow
    ///
    /// Reads the table from end to end, in batches, and rewrites masks that are not those of the active key, until a pass
    /// finds nothing to do. That pass has then checked every row: each mask is the one that its value has under the active
    /// key, so that equal values are equal again. Inserts are not held up. It can be killed at any point and run again.
    ///
    /// Rewriting makes the table and its indexes larger for a while, to twice their size at worst, until vacuum has been.
    Remask(Remask),
    /// Take a key out of the ring
    ///
    /// Refused while a row is masked under it, and until running functions have had the time to notice the new one; one that
    /// cannot read the keyring goes on with the old key, so see that the alarm keyring-not-read is off. The secret's
    /// version that had it is kept under the label ETLCTL-RETIRED-ID: backups and copies of the table need it.
    Retire {
        /// The key's id; "" is the unnamed key's
        id: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub struct Remask {
    /// Rewrite no more than this many rows a second
    #[arg(long, value_name = "N")]
    pub rate: Option<NonZeroU32>,
    /// Most rows a batch
    #[arg(long, value_name = "N", default_value = "5000")]
    pub batch: NonZeroU32,
    /// Go on though most masks cannot be recovered, which else is taken for another table's keyring
    #[arg(long)]
    pub anyway: bool,
}

#[derive(Debug, Subcommand)]
pub enum Dlq {
    /// List the dead messages, with the reason for each
    List {
        /// Most messages to read
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: usize,
    },
    /// Group the dead messages by why they died
    ///
    /// Runs the function's own validation on each. One that passes was refused by the database, or its batch failed too
    /// often: the function's log is asked for the reason.
    Explain {
        /// Most messages to read
        #[arg(long, value_name = "N", default_value_t = 10_000)]
        limit: usize,
    },
    /// Show one dead message, its values hidden
    Show {
        /// The message's id
        message_id: String,
        /// Show its body as it is; recorded like a recovery
        #[arg(long, requires = "reason")]
        reveal: bool,
        /// Why
        #[arg(long)]
        reason: Option<String>,
    },
    /// Send dead messages back through the pipeline
    ///
    /// All of them, by SQS's own move task: each gets a new id, and dies again if nothing was fixed. With --fixed, only those
    /// that are valid now: they are given to the function under their own ids, so that the ledger keeps what was written
    /// already from being written twice (but for FIFO queues, where SQS gives dead messages a new time), and are deleted once
    /// the function has taken them. They are hidden from others meanwhile, for up to 15 minutes if it is killed.
    Redrive {
        /// Only what is valid now
        #[arg(long)]
        fixed: bool,
        /// Most messages a second
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=500))]
        rate: Option<i32>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Delete all dead messages
    Purge {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub struct Status {
    /// Refresh every so many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "5", value_parser = clap::value_parser!(u64).range(1..))]
    pub watch: Option<u64>,
}
