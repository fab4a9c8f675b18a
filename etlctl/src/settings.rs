//! Settings from flags, a stack, the environment and `.env`; and the clients and connections made from them.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use aws_config::SdkConfig;
use aws_sdk_lambda::operation::get_function_configuration::GetFunctionConfigurationOutput;
use login_etl::{
    config::{self, Config, SignIn},
    mapping::{Column, Field, Mapping, Source, quoted},
    roots,
    secrets::{Credentials, Secrets},
    sign_in,
    store::{Connection, Connector, Trial},
};

use crate::{
    cli::{Global, SETTINGS},
    output::{Failure, aws, failed, sql},
};

/// Reads settings as commands need them.
#[derive(Debug)]
pub struct Settings {
    global: Global,
    /// The stack's outputs and its function's variables, by variable name.
    stack: HashMap<String, String>,
    /// The AWS SDK's configuration.
    pub aws: SdkConfig,
    /// The mapping, as the function has it.
    pub declared: Mapping,
    /// The same mapping, with the schema of its table.
    pub mapping: Mapping,
    /// The quoted name of the schema that has the ledger, the audit and the records of migrations.
    pub schema: String,
}

/// Not a flag, as everybody on the machine can read a process's flags.
const PASSWORD: &str = "DATABASE_PASSWORD";

/// Variables that the function and the operator both have, and the names under which the function's are kept here.
const OF_FUNCTION: [(&str, &str); 2] =
    [("DATABASE_AUTH", "FUNCTION_DATABASE_AUTH"), ("DATABASE_USER", "FUNCTION_DATABASE_USER")];

/// Statements name each table's schema and call only PostgreSQL's own functions. With this path, objects of the same name in
/// other schemas are never used instead.
const SEARCH_PATH: &str = "set search_path = pg_catalog, pg_temp";

/// Sets the variables of the file that are not set yet. Without a file, reads `.env` in this directory, if it exists.
pub fn load_env_file(file: Option<&Path>) -> Result<(), Failure> {
    let result = match file {
        Some(file) => dotenvy::from_path(file),
        None => dotenvy::from_path(".env"),
    };
    match result {
        Ok(()) => Ok(()),
        Err(error) if file.is_none() && error.not_found() => Ok(()),
        // The error itself may quote a line, and a line may hold a password.
        Err(dotenvy::Error::Io(error)) => Err(failed(format!("cannot read {}: {error}", shown(file)))),
        Err(_) => Err(failed(format!("{} has a line that is not NAME=value", shown(file)))),
    }
}

/// The file of the mapping, if a flag or variable names one.
pub fn mapping_file(global: &Global) -> Option<PathBuf> {
    let variable = || std::env::var_os("MAPPING_FILE").filter(|file| !file.is_empty()).map(PathBuf::from);
    global.settings.get("MAPPING_FILE").map(PathBuf::from).or_else(variable)
}

fn shown(file: Option<&Path>) -> String {
    file.unwrap_or(Path::new(".env")).display().to_string()
}

impl Settings {
    /// Reads the settings; if a stack is named, from CloudFormation and Lambda.
    pub async fn new(global: Global) -> Result<Self, Failure> {
        let trust = roots::for_operator().map_err(|error| failed(error.to_string()))?;
        let aws = config::sdk_config(trust).await;
        let declared = Mapping::load(mapping_file(&global)).map_err(|error| failed(error.to_string()))?;
        let (mapping, schema) = (declared.clone(), String::new());
        let mut settings = Self { global, stack: HashMap::new(), aws, declared, mapping, schema };
        let schema = settings.get("DATABASE_SCHEMA").unwrap_or_else(|| "public".to_owned());
        settings.schema = quoted(&schema);
        settings.mapping = settings.declared.clone().in_schema(schema);
        if let Some(name) = settings.global.stack.clone() {
            settings.need_region()?;
            settings.stack = settings.read_stack(&name).await?;
        }
        Ok(settings)
    }

    async fn read_stack(&self, name: &str) -> Result<HashMap<String, String>, Failure> {
        let client = aws_sdk_cloudformation::Client::new(&self.aws);
        let described = client.describe_stacks().stack_name(name).send().await;
        let described = described.map_err(aws(format_args!("read the stack {name:?}")))?;
        let outputs: HashMap<_, _> = described
            .stacks()
            .iter()
            .flat_map(|stack| stack.outputs())
            .filter_map(|output| Some((output.output_key()?, output.output_value()?)))
            .collect();
        let mut values = HashMap::new();
        for (output, variable) in [
            ("QueueUrl", "QUEUE_URL"),
            ("DeadLetterQueueUrl", "DLQ_URL"),
            ("LiveFunction", "FUNCTION_NAME"),
            ("MaskingSecretArn", "MASKING_SECRET_ID"),
        ] {
            let value = outputs.get(output).ok_or_else(|| {
                failed(format!("the stack {name:?} has no output {output}: name one of login-etl's template"))
            })?;
            values.insert(variable.to_owned(), (*value).to_owned());
        }
        let variables = self.function_variables(&values["FUNCTION_NAME"]).await?;
        for (variable, value) in variables {
            let of_function = OF_FUNCTION.iter().find(|(name, _)| *name == variable);
            values.entry(of_function.map_or(variable, |(_, name)| (*name).to_owned())).or_insert(value);
        }
        Ok(values)
    }

    /// A function's configuration in Lambda.
    pub async fn function_configuration(&self, name: &str) -> Result<GetFunctionConfigurationOutput, Failure> {
        let client = aws_sdk_lambda::Client::new(&self.aws);
        let configuration = client.get_function_configuration().function_name(name).send().await;
        configuration.map_err(aws(format_args!("read the function {name:?}")))
    }

    async fn function_variables(&self, name: &str) -> Result<HashMap<String, String>, Failure> {
        let configuration = self.function_configuration(name).await?;
        Ok(configuration.environment.and_then(|environment| environment.variables).unwrap_or_default())
    }

    /// A setting by its variable's name: from its flag, else the stack, else the environment. If a stack is named, the
    /// environment counts for personal settings only.
    pub fn get(&self, variable: &str) -> Option<String> {
        let setting = SETTINGS.iter().find(|setting| setting.variable == variable);
        // Settings of two pipelines must not be mixed.
        let is_personal =
            self.global.stack.is_none() || variable == PASSWORD || setting.is_some_and(|setting| setting.is_personal);
        let environment = || std::env::var(variable).ok().filter(|_| is_personal);
        let flag = self.global.settings.get(variable);
        flag.or_else(|| self.stack.get(variable)).cloned().or_else(environment).filter(|value| !value.is_empty())
    }

    /// A setting, or an error that names its flag. Fails without an AWS region, too.
    pub fn require(&self, variable: &str) -> Result<String, Failure> {
        self.need_region()?;
        self.get(variable).ok_or_else(|| {
            let setting = SETTINGS.iter().find(|setting| setting.variable == variable);
            let flag = setting.map(|setting| format!(" (--{})", setting.flag)).unwrap_or_default();
            failed(format!("{variable} is not set: name the stack with --stack, or set it{flag}"))
        })
    }

    fn need_region(&self) -> Result<(), Failure> {
        match self.aws.region() {
            Some(_) => Ok(()),
            None => Err(failed("no AWS region: set AWS_REGION, or AWS_PROFILE to a profile that has one")),
        }
    }

    /// The function's settings, parsed by its own code.
    pub fn function(&self) -> Result<Config, Failure> {
        Config::from_variables(|name| {
            // Not every command needs these; the commands that do call `require`.
            let optional_here = matches!(name, "MASKING_SECRET_ID" | "DATABASE_SECRET_ID");
            let name = OF_FUNCTION.iter().find(|(variable, _)| *variable == name).map_or(name, |(_, name)| name);
            self.get(name).or_else(|| optional_here.then(|| "unknown".to_owned()))
        })
        .map_err(|error| failed(error.to_string()))
    }

    /// The masked column of a field. `device-id` also finds `device_id`.
    pub fn masked_field(&self, name: &str) -> Result<(&Column, &Field), Failure> {
        let found = self.mapping.masked_field(name).or_else(|| self.mapping.masked_field(&name.replace('-', "_")));
        found.ok_or_else(|| {
            let names: Vec<_> = self.mapping.masked().map(|(_, field)| &*field.path).collect();
            Failure::Usage(format!(
                "no masked field is called {name:?}: the mapping has {} (for more, try --help)",
                names.join(", ")
            ))
        })
    }

    /// The column by which a person is found: a masked field's, or the subject's if no field is named.
    pub fn person_field(&self, name: Option<&str>) -> Result<(&Column, &Field), Failure> {
        let subject = self.mapping.subject().and_then(|column| match &column.source {
            Source::Field(field) => Some((column, field)),
            Source::Envelope(_) => None,
        });
        match (name, subject) {
            (None, Some(subject)) => Ok(subject),
            (None, None) => Err(Failure::Usage(
                "no column of the mapping has `subject = true`: name a masked field with --field".to_owned(),
            )),
            (Some(name), Some((column, field))) if *field.path == *name || *field.path == name.replace('-', "_") => {
                Ok((column, field))
            }
            (Some(name), _) => self.masked_field(name),
        }
    }

    /// Reads secrets.
    pub fn secrets(&self) -> Secrets {
        Secrets::new(&self.aws)
    }

    /// The keyring. Unlike the function, this does not fail if a key that the mapping needs is missing.
    pub async fn keyring(&self) -> Result<login_etl::keyring::Keyring, Failure> {
        Ok(self.secrets().keyring(&self.require("MASKING_SECRET_ID")?, &[]).await?)
    }

    /// How long a running function may use a keyring that has been replaced: the function's own SECRETS_TTL.
    pub async fn secrets_ttl(&self) -> Result<Duration, Failure> {
        let ttl = match self.get("FUNCTION_NAME") {
            Some(name) => self.function_variables(&name).await?.remove("SECRETS_TTL"),
            None => self.get("SECRETS_TTL"),
        };
        let config = Config::from_variables(|name| match name {
            "SECRETS_TTL" => ttl.clone(),
            _ => Some("unknown".to_owned()).filter(|_| name.ends_with("_SECRET_ID")),
        });
        Ok(config.map_err(|error| failed(error.to_string()))?.secrets_ttl)
    }

    /// The connector to the database.
    pub fn connector(&self) -> Result<Connector, Failure> {
        Ok(Connector::new(self.function()?.database, "etlctl")?)
    }

    /// A token for a database user, signed with the operator's AWS identity.
    async fn token(&self, connector: &Connector, user: String) -> Result<Credentials, Failure> {
        let user = self.located(connector, Credentials::new(user, String::new())).await?;
        let (host, port) = (connector.host(&user)?, connector.port(&user));
        let token = sign_in::token(&self.aws, &host, port, user.username()).await;
        Ok(token.map_err(|error| failed(error.to_string()))?.at(&user))
    }

    /// Adds the database's host to a user: from the function's secret, if no setting has it.
    async fn located(&self, connector: &Connector, user: Credentials) -> Result<Credentials, Failure> {
        match self.get("DATABASE_SECRET_ID") {
            Some(id) if connector.host(&user).is_err() => Ok(user.at(&self.secrets().credentials(&id).await?)),
            _ => Ok(user),
        }
    }

    /// The function's credentials.
    pub async fn function_credentials(&self, connector: &Connector) -> Result<Credentials, Failure> {
        match self.function()?.database.sign_in {
            SignIn::Password { .. } => Ok(self.secrets().credentials(&self.require("DATABASE_SECRET_ID")?).await?),
            SignIn::Iam { user } => self.token(connector, user).await,
        }
    }

    /// The operator's own database credentials, with the database's host.
    pub async fn credentials(&self, connector: &Connector) -> Result<Credentials, Failure> {
        let by_flag = |variable| self.global.settings.contains_key(variable);
        let by_secret = by_flag("ETLCTL_DATABASE_SECRET_ID");
        match self.get("DATABASE_AUTH").as_deref() {
            Some("iam") if !by_secret || by_flag("DATABASE_AUTH") => {
                let user = self.get("DATABASE_USER");
                let user = user.ok_or_else(|| failed("set DATABASE_USER (--database-user) for the token"))?;
                return self.token(connector, user).await;
            }
            None | Some("password" | "iam") => {}
            Some(_) => {
                return Err(Failure::Usage("--database-auth takes password or iam (for more, try --help)".to_owned()));
            }
        }
        let user = self.get("DATABASE_USER").filter(|_| !by_secret);
        let credentials = if let Some(user) = user {
            let password = self.get(PASSWORD).ok_or_else(|| failed("set DATABASE_PASSWORD for DATABASE_USER"))?;
            Credentials::new(user, password)
        } else if let Some(id) = self.get("ETLCTL_DATABASE_SECRET_ID") {
            self.need_region()?;
            self.secrets().credentials(&id).await?
        } else {
            return Err(failed(
                "no user for the database: set ETLCTL_DATABASE_SECRET_ID (--database-secret) to a secret with your own \
                 \"username\" and \"password\", or DATABASE_USER and DATABASE_PASSWORD. The function's user may only insert",
            ));
        };
        self.located(connector, credentials).await
    }

    /// A trial of rows as the function's user, with its own credentials.
    pub async fn trial(&self) -> Result<Trial, Failure> {
        let connector = self.connector()?;
        let credentials = self.function_credentials(&connector).await?;
        let connection = connect(&connector, &credentials).await?;
        Trial::begin(connection, &self.declared).await.map_err(|error| failed(error.to_string()))
    }

    /// A connection as the operator.
    pub async fn database(&self) -> Result<Connection, Failure> {
        let connector = self.connector()?;
        let credentials = self.credentials(&connector).await?;
        self.connect(&connector, &credentials).await
    }

    /// A connection as this user, with the search path of this tool's statements.
    pub async fn connect(&self, connector: &Connector, credentials: &Credentials) -> Result<Connection, Failure> {
        let connection = connect(connector, credentials).await?;
        connection.client.batch_execute(SEARCH_PATH).await.map_err(sql("set the search path"))?;
        Ok(connection)
    }
}

/// Connects as a user. An error names the user.
pub async fn connect(connector: &Connector, credentials: &Credentials) -> Result<Connection, Failure> {
    let connected = connector.connect(credentials).await;
    connected.map_err(|error| {
        failed(format!("as the database user {:?}: {}", credentials.username(), Failure::from(error).why()))
    })
}
