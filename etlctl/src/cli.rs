//! The command line: its commands, options and help texts.

use std::{collections::HashMap, num::NonZeroU32, path::PathBuf};

use crate::output::{BOLD, GOOD};
use clap::{Arg, ArgGroup, Args, CommandFactory, FromArgMatches, Parser, Subcommand, builder::Styles};
use login_etl::mapping::Mapping;

const STYLES: Styles = Styles::styled().header(BOLD).usage(BOLD).literal(GOOD);

/// A setting of every command, given by a flag or an environment variable.
#[derive(Debug)]
pub struct Setting {
    /// Without the leading dashes.
    pub flag: &'static str,
    pub variable: &'static str,
    value: &'static str,
    help: &'static str,
    /// Whether it describes the operator rather than the pipeline. With `--stack`, the environment is read for these only.
    pub is_personal: bool,
}

const fn setting(flag: &'static str, value: &'static str, variable: &'static str, help: &'static str) -> Setting {
    Setting { flag, variable, value, help, is_personal: false }
}

/// All settings, in the order of the help.
pub const SETTINGS: [Setting; 15] = [
    Setting { is_personal: true, ..setting("database-secret", "ID", "ETLCTL_DATABASE_SECRET_ID", "with your user") },
    Setting { is_personal: true, ..setting("database-user", "NAME", "DATABASE_USER", "with DATABASE_PASSWORD") },
    Setting { is_personal: true, ..setting("database-auth", "METHOD", "DATABASE_AUTH", "password or iam") },
    setting("database-host", "HOST", "DATABASE_HOST", ""),
    Setting { is_personal: true, ..setting("database-hostaddr", "IP", "DATABASE_HOSTADDR", "of a tunnel to it") },
    setting("database-port", "PORT", "DATABASE_PORT", ""),
    setting("database-name", "NAME", "DATABASE_NAME", ""),
    Setting { is_personal: true, ..setting("database-schema", "NAME", "DATABASE_SCHEMA", "default: public") },
    setting("database-tls", "MODE", "DATABASE_TLS", "verify-full or disable"),
    setting("database-ca", "ROOTS", "DATABASE_CA", "aws, system or a file"),
    setting("masking-secret", "ID", "MASKING_SECRET_ID", "with the keyring"),
    setting("queue-url", "URL", "QUEUE_URL", ""),
    setting("dlq-url", "URL", "DLQ_URL", ""),
    setting("function", "NAME", "FUNCTION_NAME", ""),
    Setting { is_personal: true, ..setting("mapping", "FILE", "MAPPING_FILE", "default: built in") },
];

const BEFORE_SETTINGS: &str = "\
Where the pipeline is (the first source that has a setting wins):
  1  the flags below
  2  the stack of `--stack NAME`: its queues, function, secrets and database
  3  the environment variables below; most are the function's own
  4  the same variables in the file `.env`
With --stack, sources 3 and 4 count only for your database user, a tunnel, the schema and the mapping. AWS credentials \
and the region are found as in other AWS tools (AWS_PROFILE, AWS_REGION …).

Your database user:
The function's user may only insert. Use your own, with the role login_etl_operator: in a secret that --database-secret \
names (JSON with username and password), or in DATABASE_USER and DATABASE_PASSWORD. With --database-auth iam, your AWS \
identity signs a token for DATABASE_USER instead of a password.

Settings of every command, as a flag or an environment variable:";

const AFTER_SETTINGS: &str = "\
Exit status:
  0  done, and the answer is yes
  1  done, and the answer is no: a check failed, or something is left to do
  2  wrong usage, or not confirmed: nothing was done
  3  failed: a setting, AWS or the database prevented it";

fn after_help() -> String {
    let lines = SETTINGS.iter().map(|Setting { flag, variable, value, help, .. }| {
        format!("  {:24} {variable:26} {help}", format!("--{flag} {value}")).trim_end().to_owned() + "\n"
    });
    format!("{BEFORE_SETTINGS}\n{}\n{AFTER_SETTINGS}", lines.collect::<String>())
}

/// Operate login-etl: its schema, health, dead letters, masks and keys
#[derive(Debug, Parser)]
#[command(name = "etlctl", version, styles = STYLES, max_term_width = 120, next_line_help = false, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const COMMON: &str = "Options of every command (more in `etlctl --help`)";

impl Cli {
    /// Parses the command line, or exits with a usage error.
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

    /// The whole command line. `find` has a short form for each masked field of the built-in mapping.
    pub fn all() -> clap::Command {
        let settings = SETTINGS
            .iter()
            .map(|setting| Arg::new(setting.flag).long(setting.flag).value_name(setting.value).global(true).hide(true))
            // Its former name.
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

/// The version; in a release, with the commit.
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

/// The options of every command.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// CloudFormation stack to take the settings from
    #[arg(long, global = true, value_name = "NAME", help_heading = COMMON)]
    pub stack: Option<String>,
    /// Output as JSON
    #[arg(long, global = true, help_heading = COMMON)]
    pub json: bool,
    /// File of environment variables, instead of `.env`
    #[arg(long, global = true, value_name = "FILE", help_heading = COMMON)]
    pub env_file: Option<PathBuf>,
    /// The settings given by flags, by variable name.
    #[arg(skip)]
    pub settings: HashMap<&'static str, String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a mapping and deployment settings from sample messages
    ///
    /// Asks whether to mask each field, then about the table and the database, and writes mapping.toml and samconfig.toml. Flags
    /// answer questions in advance. Without a terminal, they must answer for every field. Existing files are never overwritten.
    #[command(after_help = "\
Examples:
  etlctl init --sample messages.jsonl
  etlctl init --from-queue --stack login-etl --directory mine
  etlctl init --sample messages.jsonl --masked ip --plain user_id --skip trace")]
    Init(Init),
    /// Bring the database's schema up to date
    ///
    /// Applies what is missing: the ledger, the roles, the audit, and what `etlctl mapping ddl` prints. Each part runs in its
    /// own transaction and is recorded with its checksum in login_etl_migrations. An existing table is kept as it is, if its
    /// columns fit. A second run at the same time waits for the first. Needs the tables' owner and, the first time, the right
    /// to create roles.
    Migrate(Migrate),
    /// Check the whole setup, and change nothing
    ///
    /// Checks the function, its event source mapping, both queues, the secrets, the database and the last hour's failures.
    /// For each problem, it says what to do.
    Doctor,
    /// Show a value's masks, one for each key of the keyring
    Mask(Mask),
    /// Find the rows with a value of a masked field
    ///
    /// Masks the value with every key of the keyring, and finds the rows that have one of the masks. Nothing is decrypted.
    /// A value that is read from standard input stays out of the shell's history and the process list.
    #[command(after_help = "\
Examples:
  etlctl find --ip 199.172.111.135 --stack login-etl
  etlctl find --device-id - --since 2026-11-01 < device.txt")]
    Find(Find),
    /// Recover masked values, on record
    ///
    /// Before a value is shown, a record is committed to etl_audit: who, when, why, how many values were asked for and
    /// recovered, and with which keys. Values go only to standard output, or to a new file that only you can read. A value
    /// that cannot be recovered stays empty, whatever the cause.
    #[command(after_help = "\
Examples:
  etlctl recover --field ip --reason 'Order 12/345' '2026-11:kzXo…=='
  etlctl recover --field ip --reason '…' --file masks.txt --output addresses.txt
  etlctl recover --reason '…' --csv logins.csv --output recovered.csv
  etlctl recover --reason '…' --query 'select * from user_logins limit 9'")]
    Recover(Recover),
    /// Find, export or erase a person's data
    ///
    /// A person is identified by a value of the mapping's subject, or of any masked field. A masked field is searched with
    /// every key of the keyring. A value that is read from standard input stays out of the shell's history and the process
    /// list.
    #[command(after_help = "\
Examples:
  etlctl subject find alice --stack login-etl
  etlctl subject export - --reason 'Request 7' --output alice.jsonl < user.txt
  etlctl subject erase 199.172.111.135 --field ip --reason 'Request 7'")]
    Subject {
        #[command(subcommand)]
        command: Subject,
    },
    /// Manage the keyring, and rotate its keys
    ///
    /// To rotate the key while messages flow: `add` creates a key, and `activate` masks new rows with it. `remask` re-masks
    /// the old rows, so that equal values have equal masks again. `retire` removes the old key from the keyring.
    Keys {
        #[command(subcommand)]
        command: Keys,
    },
    /// Inspect, redrive or delete dead messages
    ///
    /// `list`, `explain` and `show` hide messages from other readers while they read, for a minute at most.
    Dlq {
        #[command(subcommand)]
        command: Dlq,
    },
    /// Check and try a mapping of message fields to columns
    ///
    /// Needs neither AWS nor a database. Uses the mapping that `--mapping FILE` or MAPPING_FILE names, else the built-in one.
    #[command(after_help = "\
Examples:
  etlctl mapping check mapping.toml
  etlctl mapping try events/mixed.json --mapping mapping.toml
  etlctl mapping ddl --mapping mapping.toml | psql")]
    Mapping {
        #[command(subcommand)]
        command: MappingCommand,
    },
    /// Show the pipeline on one screen
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
    /// File of sample bodies or SQS events, one per line or a single one; `-` for standard input
    #[arg(long, value_name = "FILE", required_unless_present = "from_queue")]
    pub sample: Option<PathBuf>,
    /// Use up to ten messages of the queue as samples; they stay there, and one more receive is counted
    #[arg(long, conflicts_with = "sample")]
    pub from_queue: bool,
    /// Directory to write to
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub directory: PathBuf,
    /// Field to mask, so that it can be recovered; repeat for more fields
    #[arg(long, value_name = "FIELD")]
    pub masked: Vec<String>,
    /// Field to mask so that nobody can recover it; repeat for more fields
    #[arg(long, value_name = "FIELD")]
    pub one_way: Vec<String>,
    /// Field to store as it is; repeat for more fields
    #[arg(long, value_name = "FIELD")]
    pub plain: Vec<String>,
    /// Field to leave out; repeat for more fields
    #[arg(long, value_name = "FIELD")]
    pub skip: Vec<String>,
    /// Field that identifies the person a row is about
    #[arg(long, value_name = "FIELD")]
    pub subject: Option<String>,
    /// Name of the table, as TABLE or SCHEMA.TABLE
    #[arg(long, value_name = "NAME")]
    pub table: Option<String>,
    /// Name of the stack
    #[arg(long, value_name = "NAME")]
    pub stack_name: Option<String>,
    /// ARN of the secret with the credentials of the function's database user
    #[arg(long, value_name = "ARN")]
    pub database_secret_arn: Option<String>,
    /// Subnets of the database's VPC, separated by commas
    #[arg(long, value_name = "IDS")]
    pub subnets: Option<String>,
    /// Security groups for the function, separated by commas
    #[arg(long, value_name = "IDS")]
    pub security_groups: Option<String>,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// Show what is applied, and apply nothing; the exit status is 1 if anything is missing or changed
    #[arg(long)]
    pub check: bool,
    /// Let login_etl sign in with IAM tokens only, not with a password: grants it rds_iam, which RDS and Aurora have
    #[arg(long, conflicts_with = "check")]
    pub iam: bool,
}

#[derive(Debug, Subcommand)]
pub enum MappingCommand {
    /// Show each column: type, source, how it is kept, what is refused
    Show,
    /// Check a mapping, and show where it breaks a rule
    Check {
        /// File of the mapping
        file: Option<PathBuf>,
    },
    /// Print the SQL of the table, its indexes, duplicate views and grants
    Ddl,
    /// Show the row of each message, or why it would be refused
    ///
    /// The masks are made with a made-up key, unless --keyring gives another.
    Try {
        /// File of bodies or SQS events, one per line or a single one; `-` for standard input
        file: PathBuf,
        /// File with the text of a keyring's secret
        #[arg(long, value_name = "FILE")]
        keyring: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct Mask {
    /// Masked field that the value belongs to
    #[arg(long, value_name = "NAME")]
    pub field: String,
    /// The value, or `-` to read it from standard input
    pub value: String,
}

#[derive(Debug, Args)]
pub struct Find {
    /// Masked field that the value belongs to
    #[arg(long, value_name = "NAME", requires = "value", required_unless_present = "short")]
    pub field: Option<String>,
    /// The value, or `-` to read it from standard input
    #[arg(long, value_name = "VALUE", requires = "field")]
    pub value: Option<String>,
    /// Field and value, if they were given in a short form.
    #[arg(skip)]
    pub short: Option<(String, String)>,
    /// First day (UTC) of the rows to find
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub since: Option<jiff::civil::Date>,
    /// Maximum number of rows to show, latest first
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("source").required(true).args(["masks", "file", "csv", "query"])))]
pub struct Recover {
    /// Reason, which is recorded: a ticket, an order, a request
    #[arg(long)]
    pub reason: String,
    /// Field of the masks; optional with --csv and --query, unless --column is given
    #[arg(long, value_name = "NAME")]
    pub field: Option<String>,
    /// Masks, as the table has them
    #[arg(value_name = "MASK", requires = "field")]
    pub masks: Vec<String>,
    /// File with one mask per line; `-` for standard input
    #[arg(long, requires = "field")]
    pub file: Option<PathBuf>,
    /// CSV file with a header line, or `-` for standard input; its masked columns are recovered, or --column
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Query to run read-only; the masked columns of its rows are recovered, or --column
    #[arg(long, value_name = "SQL")]
    pub query: Option<String>,
    /// Other column with masks of --field
    #[arg(long, value_name = "NAME", requires = "field", conflicts_with_all = ["masks", "file"])]
    pub column: Option<String>,
    /// New file to write to, instead of standard output
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Skip the confirmation, however many values there are
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct Who {
    /// The value that identifies the person, or `-` to read it from standard input
    pub value: String,
    /// Masked field that the value belongs to (default: the mapping's subject)
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
        /// Maximum number of rows to show, latest first
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Write all rows of the person to a new file, as JSON Lines
    ///
    /// With --reason, masked fields are recovered. That is recorded in etl_audit before anything is written to the file. Only
    /// you can read the file. Needs the role login_etl_operator.
    Export {
        #[command(flatten)]
        who: Who,
        /// File to create; it must not exist yet
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// Reason to recover the masked fields: a ticket, a request. They stay masked without it
        #[arg(long)]
        reason: Option<String>,
    },
    /// Erase the person's rows and dead messages, on record
    ///
    /// Without --yes, it only counts. Rows are erased in batches, each in one transaction with its record in etl_audit: who,
    /// when, why and how many, never the value. It can be killed at any point and run again. The ledger keeps its keys, so no
    /// redelivery inserts a row again. Needs the role login_etl_privacy.
    Erase {
        #[command(flatten)]
        who: Who,
        /// Reason, which is recorded: a ticket, a request. Do not name the person
        #[arg(long)]
        reason: String,
        /// Erase instead of counting
        #[arg(long)]
        yes: bool,
        /// Also delete dead messages that contain the value but not the field; they may be about another person
        #[arg(long)]
        mentions: bool,
        /// Maximum number of rows per transaction
        #[arg(long, value_name = "N", default_value = "5000")]
        batch: NonZeroU32,
    },
}

#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Show each key's cipher, age and rows
    List {
        /// Skip counting the rows, which reads the whole table
        #[arg(long)]
        no_rows: bool,
    },
    /// Add a random key to the keyring; `activate` puts it to use
    Add {
        /// Id of the key, 1 to 32 characters of a-z 0-9 . _ - ; part of every mask (default: this month)
        id: Option<String>,
        /// Cipher of the key: aes-siv also detects damage and keeps the columns apart; aes-cbc is the original script's;
        /// masks of hmac-sha256 are one-way
        #[arg(long, default_value = "aes-siv", value_parser = ["aes-siv", "aes-cbc", "hmac-sha256"])]
        cipher: String,
    },
    /// Mask new rows with this key
    ///
    /// Running functions use it within SECRETS_TTL. Old rows keep their masks until `etlctl keys remask`.
    Activate {
        /// Id of the key
        id: String,
        /// Use it for columns with `keep = "one-way"`; it must be an hmac-sha256 key
        #[arg(long)]
        one_way: bool,
    },
    /// Re-mask all rows with the active key, while messages flow
    ///
    /// Reads the whole table in batches and rewrites masks that are not the active key's, until a pass finds nothing to
    /// rewrite. That pass has checked that every recoverable mask is the active key's: equal values have equal masks again.
    /// Inserts are not blocked. It can be killed at any point and run again.
    ///
    /// Rewriting enlarges the table and its indexes, to twice their size at worst, until vacuum has run.
    Remask(Remask),
    /// Remove a key from the keyring
    ///
    /// Refused while a row is masked with the key, and until running functions have had time to read the new keyring. A
    /// function that cannot read the keyring goes on with the old key, so check that the alarm keyring-not-read is off. The
    /// secret's version with the key is kept under the label ETLCTL-RETIRED-ID: backups and copies of the table need it.
    Retire {
        /// Id of the key; "" for the unnamed key
        id: String,
        /// Skip the confirmation
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub struct Remask {
    /// Maximum number of rows to rewrite per second
    #[arg(long, value_name = "N")]
    pub rate: Option<NonZeroU32>,
    /// Maximum number of rows per batch
    #[arg(long, value_name = "N", default_value = "5000")]
    pub batch: NonZeroU32,
    /// Continue although most masks cannot be recovered, which suggests the keyring of another table
    #[arg(long)]
    pub anyway: bool,
}

#[derive(Debug, Subcommand)]
pub enum Dlq {
    /// List dead messages with their reasons
    List {
        /// Maximum number of messages to read
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: usize,
    },
    /// Group dead messages by their reasons
    ///
    /// Runs the function's own validation on each message, then tries the valid ones in the database, in a transaction that
    /// is rolled back. The reason of a message that passes both is taken from the function's log.
    Explain {
        /// Maximum number of messages to read
        #[arg(long, value_name = "N", default_value_t = 10_000)]
        limit: usize,
    },
    /// Show one dead message, with its values hidden
    Show {
        /// Id of the message
        message_id: String,
        /// Show the body as it is; recorded like a recovery
        #[arg(long, requires = "reason")]
        reveal: bool,
        /// Reason for --reveal, which is recorded
        #[arg(long)]
        reason: Option<String>,
    },
    /// Send dead messages back through the pipeline
    ///
    /// Without --fixed, SQS moves all messages back to the queue. Each gets a new id, and dies again if nothing was fixed.
    ///
    /// With --fixed, only messages that are valid now go to the function, under their own ids. So the ledger prevents
    /// duplicate rows, except from a FIFO queue, where SQS gives dead messages a new time. Messages are deleted once the
    /// function has taken them. Until then they are hidden from other readers, for up to 15 minutes if the command is killed.
    Redrive {
        /// Only messages that are valid now
        #[arg(long)]
        fixed: bool,
        /// Maximum number of messages per second
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=500))]
        rate: Option<i32>,
        /// Skip the confirmation
        #[arg(long)]
        yes: bool,
    },
    /// Delete all dead messages
    Purge {
        /// Skip the confirmation
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub struct Status {
    /// Refresh every so many seconds (5 by default), until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "5", value_parser = clap::value_parser!(u64).range(1..))]
    pub watch: Option<u64>,
}
