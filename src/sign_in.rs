//! Signing in to the database: with a password from a secret, or with an IAM token.

use std::time::{Duration, SystemTime};

use aws_config::SdkConfig;
use aws_credential_types::{Credentials as AwsCredentials, provider::ProvideCredentials};
use aws_sigv4::{
    http_request::{SignableBody, SignableRequest, SignatureLocation, SigningSettings, sign},
    sign::v4::SigningParams,
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use zeroize::Zeroizing;

use crate::{
    config::SignIn,
    secrets::{Credentials, SecretError, Secrets},
};

/// How long a token is valid: <https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/UsingWithRDS.IAMDBAuth.html>.
const TOKEN_LIFE: Duration = Duration::from_secs(900);
/// All characters but the unreserved ones of RFC 3986.
const RESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Waits before refused credentials are read again: a rotation changes the database first, then the secret.
const ROTATION_WAITS: &[Duration] = &[Duration::ZERO, Duration::from_millis(500), Duration::from_secs(1)];
/// A refused token is signed again once.
const TOKEN_WAITS: &[Duration] = &[Duration::ZERO];

/// Why a token cannot be signed. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The database's region is not known.
    #[error("no AWS region for signing in to the database: set AWS_REGION")]
    NoRegion,
    /// There is no AWS identity to sign in with.
    #[error("no AWS credentials for signing in to the database: {0}")]
    NoCredentials(String),
    /// A token would be sent unencrypted.
    #[error("a token needs TLS: remove DATABASE_TLS=disable")]
    InClear,
    /// A token for this host or user cannot be signed.
    #[error("cannot sign a token for the database: {0}")]
    Unsigned(String),
}

/// Provides the credentials for each new connection.
#[derive(Debug)]
pub struct Signer {
    /// The content of the secret; with tokens, only the user.
    known: Credentials,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Secret { secrets: Secrets, id: String },
    Tokens(Box<SdkConfig>),
}

impl Signer {
    /// Reads the secret, if there is one.
    ///
    /// # Errors
    /// [`SecretError`], when it cannot be read or holds no credentials.
    pub async fn new(sign_in: SignIn, secrets: Secrets, sdk_config: SdkConfig) -> Result<Self, SecretError> {
        Ok(match sign_in {
            SignIn::Password { secret_id: id } => {
                Self { known: secrets.credentials(&id).await?, source: Source::Secret { secrets, id } }
            }
            SignIn::Iam { user } => {
                Self { known: Credentials::new(user, String::new()), source: Source::Tokens(Box::new(sdk_config)) }
            }
        })
    }

    /// The user, and the database's address if the secret has it. Signs nothing.
    pub fn known(&self) -> &Credentials {
        &self.known
    }

    /// The credentials for a new connection to this host and port.
    ///
    /// # Errors
    /// [`TokenError`], when no token can be signed.
    pub async fn credentials(&self, host: &str, port: u16) -> Result<Credentials, TokenError> {
        match &self.source {
            Source::Secret { .. } => Ok(self.known.clone()),
            Source::Tokens(sdk_config) => token(sdk_config, host, port, self.known.username()).await,
        }
    }

    /// Reads the secret again, if there is one.
    ///
    /// # Errors
    /// [`SecretError`], when it cannot be read or holds no credentials.
    pub async fn renew(&mut self) -> Result<(), SecretError> {
        if let Source::Secret { secrets, id } = &self.source {
            self.known = secrets.credentials(id).await?;
        }
        Ok(())
    }

    /// Waits before each retry, after the database has refused the credentials.
    pub fn waits(&self) -> &'static [Duration] {
        match self.source {
            Source::Secret { .. } => ROTATION_WAITS,
            Source::Tokens(_) => TOKEN_WAITS,
        }
    }
}

/// A token for this user of the database, signed with the configuration's AWS identity. It is valid for new connections for
/// 15 minutes.
///
/// # Errors
/// [`TokenError`]. The operator's fault.
pub async fn token(sdk_config: &SdkConfig, host: &str, port: u16, user: &str) -> Result<Credentials, TokenError> {
    let region = sdk_config.region().ok_or(TokenError::NoRegion)?;
    let none = |reason: String| TokenError::NoCredentials(reason);
    let provider = sdk_config.credentials_provider().ok_or_else(|| none("none are configured".to_owned()))?;
    let identity = provider.provide_credentials().await.map_err(|error| none(error.to_string()))?;
    let token = signed(&identity, region.as_ref(), host, port, user, SystemTime::now())?;
    Ok(Credentials::of_token(user.to_owned(), token))
}

/// A token signed with this identity at this time.
///
/// # Errors
/// [`TokenError::Unsigned`]. The operator's fault.
pub fn signed(
    identity: &AwsCredentials,
    region: &str,
    host: &str,
    port: u16,
    user: &str,
    time: SystemTime,
) -> Result<Zeroizing<String>, TokenError> {
    let encoded = |text: &str| utf8_percent_encode(text, &RESERVED).to_string();
    let url = format!("https://{host}:{port}/?Action=connect&DBUser={}", encoded(user));
    let mut settings = SigningSettings::default();
    settings.expires_in = Some(TOKEN_LIFE);
    settings.signature_location = SignatureLocation::QueryParams;
    let unsigned = |error: &dyn std::error::Error| TokenError::Unsigned(error.to_string());
    let identity = identity.clone().into();
    let params =
        SigningParams::builder().identity(&identity).region(region).name("rds-db").time(time).settings(settings);
    let params = params.build().map_err(|error| unsigned(&error))?.into();
    let request = SignableRequest::new("GET", &*url, std::iter::empty(), SignableBody::Bytes(&[]));
    let signed = sign(request.map_err(|error| unsigned(&error))?, &params).map_err(|error| unsigned(&error))?;
    let mut token = Zeroizing::new(url["https://".len()..].to_owned());
    for (name, value) in signed.output().params() {
        token.push_str(&format!("&{name}={}", encoded(value)));
    }
    Ok(token)
}
