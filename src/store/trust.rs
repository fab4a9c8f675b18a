//! The root certificates that are trusted to verify the server.

use std::{fmt, fs, path::PathBuf};

use native_tls::{Certificate, Protocol, TlsConnector};

use super::StoreError;
use crate::{config::Roots, roots};

/// The roots for one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trusted {
    /// Amazon's public roots, and the roots of RDS in this region.
    Aws(&'static str),
    System,
    File(PathBuf),
}

impl Trusted {
    pub(super) fn of(roots: &Roots, host: &str) -> Self {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let is_aws = [".amazonaws.com", ".amazonaws.com.cn"].iter().any(|domain| host.ends_with(domain));
        let of_region = || roots::regions().find(|region| host.split('.').any(|label| label == *region));
        match roots {
            // The roots of some RDS regions are not built in.
            Roots::Aws if is_aws => of_region().map_or(Self::System, Self::Aws),
            Roots::Aws | Roots::System => Self::System,
            Roots::File(path) => Self::File(path.clone()),
        }
    }

    /// A connector that trusts these roots and no others.
    ///
    /// # Errors
    /// [`StoreError`], if the roots cannot be used. The operator's fault.
    pub(super) fn connector(&self) -> Result<TlsConnector, StoreError> {
        let mut builder = TlsConnector::builder();
        builder.min_protocol_version(Some(Protocol::Tlsv12));
        let pem = match self {
            Self::System => roots::hidden_system(),
            Self::Aws(region) => Some(format!("{}{}", roots::AMAZON, roots::of_region(region)).into_bytes()),
            Self::File(path) => Some(fs::read(path).map_err(|error| self.unusable(error.kind().to_string()))?),
        };
        if let Some(pem) = pem {
            let roots = Certificate::stack_from_pem(&pem).map_err(|error| self.unusable(error.to_string()))?;
            if roots.is_empty() {
                return Err(self.unusable("no certificate in it".to_owned()));
            }
            builder.disable_built_in_roots(true);
            for root in roots {
                builder.add_root_certificate(root);
            }
        }
        builder.build().map_err(|error| StoreError::Tls(error.to_string()))
    }

    fn unusable(&self, reason: String) -> StoreError {
        match self {
            Self::File(path) => StoreError::CaFile { path: path.clone(), reason },
            _ => StoreError::Tls(reason),
        }
    }
}

impl fmt::Display for Trusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aws(region) => write!(f, "Amazon's and RDS's in {region}"),
            Self::System => f.write_str("the system's"),
            Self::File(path) => write!(f, "those in {}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_decides_which_roots_are_trusted() {
        let aws = Trusted::Aws;
        for (host, trusted) in [
            ("db.abc.eu-west-1.rds.amazonaws.com", aws("eu-west-1")),
            ("DB.cluster-abc.US-EAST-1.rds.amazonaws.com.", aws("us-east-1")),
            ("p.proxy-abc.ap-southeast-2.rds.amazonaws.com", aws("ap-southeast-2")),
            ("db.abc.us-gov-west-1.rds.amazonaws.com", Trusted::System),
            ("db.abc.rds.cn-north-1.amazonaws.com.cn", Trusted::System),
            ("db.example.com", Trusted::System),
            ("eu-west-1.rds.amazonaws.com.example.com", Trusted::System),
            ("10.0.0.1", Trusted::System),
        ] {
            assert_eq!(Trusted::of(&Roots::Aws, host), trusted, "{host}");
            assert_eq!(Trusted::of(&Roots::System, host), Trusted::System, "{host}");
        }
    }

    #[test]
    fn the_built_in_roots_are_usable() {
        for region in roots::regions() {
            Trusted::Aws(region).connector().unwrap();
        }
    }
}
