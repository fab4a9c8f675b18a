//! `etlctl`: operates a login-etl pipeline from the command line.
//!
//! ```text
//! cli       commands, options and help texts
//! settings  flags, stack, environment → clients and connections
//! output    a command's reply, as text or JSON; tables, questions, progress
//!
//! init      a mapping and settings from samples
//! migrate   the database's schema and table    find     values to masks, and the rows that have them
//! doctor    checks of the whole setup          recover  masks to values, on record
//! status    the pipeline on one screen         keys     the keyring's keys, and re-masking of rows
//! mapping   which fields become which columns  dlq      the dead letters
//! subject   a person's rows: found, exported, erased
//! ```
//!
//! A command returns its [`Reply`] and prints nothing itself, so that its audit record is committed before anything is shown.

mod audit;
mod cli;
mod dlq;
mod doctor;
mod find;
mod init;
mod keys;
mod logs;
mod mapping;
mod migrate;
mod output;
mod recover;
mod settings;
mod status;
mod subject;

use std::{io::Write, process::ExitCode};

use cli::{Cli, Command};
use output::{Failure, Reply};
use settings::Settings;

fn main() -> ExitCode {
    let cli = Cli::from_command_line();
    if let Command::Completions { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::all(), "etlctl", &mut script);
        let printed = std::io::stdout().write_all(&script).map_err(Failure::from);
        return printed.map_or_else(|failure| failure.report(), |()| ExitCode::SUCCESS);
    }
    let json = cli.global.json;
    // It sets environment variables, so it runs before there are threads.
    let result = settings::load_env_file(cli.global.env_file.as_deref()).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(run(cli))
    });
    match result.and_then(|reply| reply.print(json)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(failure) => failure.report(),
    }
}

async fn run(cli: Cli) -> Result<Reply, Failure> {
    let json = cli.global.json;
    if let Command::Mapping { command } = &cli.command {
        return mapping::run(settings::mapping_file(&cli.global).as_deref(), command);
    }
    if let Command::Init(options) = &cli.command
        && !options.from_queue
    {
        return init::run(None, cli.global.settings.get("DATABASE_HOST").map(String::as_str), options).await;
    }
    let host = cli.global.settings.get("DATABASE_HOST").cloned();
    let settings = Settings::new(cli.global).await?;
    match cli.command {
        Command::Init(options) => init::run(Some(&settings), host.as_deref(), &options).await,
        Command::Migrate(options) => migrate::run(&settings, &options).await,
        Command::Doctor => doctor::run(&settings).await,
        Command::Mask(options) => find::mask(&settings, &options).await,
        Command::Find(options) => find::find(&settings, &options).await,
        Command::Recover(options) => recover::run(&settings, &options, json).await,
        Command::Subject { command } => subject::run(&settings, &command).await,
        Command::Keys { command } => keys::run(&settings, &command).await,
        Command::Dlq { command } => dlq::run(&settings, &command).await,
        Command::Status(options) => status::run(&settings, &options, json).await,
        Command::Completions { .. } | Command::Mapping { .. } => Ok(Reply::default()),
    }
}
