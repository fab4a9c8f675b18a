//! AWS's root certificates, built in: reading all of the system's takes longer than anything else in a cold start. Certificates
//! of AWS's endpoints and RDS Proxy chain to Amazon's public roots, those of RDS and Aurora to roots of their region.

use std::{env, fs, path::PathBuf};

use aws_smithy_http_client::tls::TrustStore;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

/// Amazon Trust Services' roots.
pub(crate) const AMAZON: &str = include_str!("roots/amazon.pem");
/// RDS's roots of all regions, each below a line with its name.
const RDS: &str = include_str!("roots/rds.pem");

/// Where Linux distributions keep their trusted roots: Amazon Linux and Red Hat, and Debian.
const OF_SYSTEM: [&str; 2] = ["/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/certs/ca-certificates.crt"];

/// Region and text of each of RDS's roots.
fn rds() -> impl Iterator<Item = (&'static str, &'static str)> {
    RDS.split_inclusive("-----END CERTIFICATE-----\n").filter_map(|root| {
        let name = root.strip_prefix("Amazon RDS ")?;
        Some((name.split(' ').next()?, root))
    })
}

/// The regions whose RDS roots are built in.
pub(crate) fn regions() -> impl Iterator<Item = &'static str> {
    rds().map(|(region, _)| region)
}

/// RDS's roots in a region.
pub(crate) fn of_region(region: &str) -> String {
    rds().filter(|(of, _)| *of == region).map(|(_, root)| root).collect()
}

/// The system's roots, if OpenSSL does not see them itself: the template sets `SSL_CERT_FILE=/dev/null`, so that OpenSSL does not
/// read them all at every start.
pub(crate) fn hidden_system() -> Option<Vec<u8>> {
    env::var_os("SSL_CERT_FILE").filter(|file| file == "/dev/null")?;
    OF_SYSTEM.iter().find_map(|file| fs::read(file).ok())
}

/// `AWS_CA_BUNDLE` cannot be used. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use AWS_CA_BUNDLE {path:?}: {reason}")]
pub struct BundleError {
    path: PathBuf,
    reason: String,
}

/// The roots of `AWS_CA_BUNDLE`, if that is set.
///
/// # Errors
/// [`BundleError`], when the file cannot be read, has no certificate, or has one that cannot be used.
pub fn of_bundle() -> Result<Option<Vec<u8>>, BundleError> {
    let Some(path) = env::var_os("AWS_CA_BUNDLE").filter(|file| !file.is_empty()).map(PathBuf::from) else {
        return Ok(None);
    };
    let unusable = |reason: String| BundleError { path: path.clone(), reason };
    let pem = fs::read(&path).map_err(|error| unusable(error.kind().to_string()))?;
    // The SDK's client panics at a certificate that it cannot use.
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(&pem) {
        let added =
            root.map_err(|error| error.to_string()).and_then(|root| roots.add(root).map_err(|error| error.to_string()));
        added.map_err(unusable)?;
    }
    if roots.is_empty() { Err(unusable("no certificate in it".to_owned())) } else { Ok(Some(pem)) }
}

/// The roots for AWS's endpoints: those of `AWS_CA_BUNDLE`, if it can be used; else Amazon's, in a commercial region without
/// custom endpoints; else the system's.
pub fn for_aws() -> TrustStore {
    let is_other = |region: &str| ["cn-", "us-gov-", "us-iso", "eu-iso"].iter().any(|other| region.starts_with(other));
    let is_usual = env::var("AWS_REGION").is_ok_and(|region| !is_other(&region))
        && !env::vars_os().any(|(name, _)| name.to_string_lossy().starts_with("AWS_ENDPOINT_URL"));
    match (of_bundle(), hidden_system()) {
        (Ok(Some(roots)), _) => TrustStore::empty().with_pem_certificate(roots),
        _ if is_usual => TrustStore::empty().with_pem_certificate(AMAZON),
        (_, Some(roots)) => TrustStore::empty().with_pem_certificate(roots),
        (_, None) => TrustStore::default(),
    }
}

/// The roots for AWS's endpoints on an operator's machine: those of `AWS_CA_BUNDLE`; else the system's, among which may be a
/// proxy's, and Amazon's, as a container may have none.
///
/// # Errors
/// [`BundleError`], as for [`of_bundle`].
pub fn for_operator() -> Result<TrustStore, BundleError> {
    let only = |roots| TrustStore::empty().with_pem_certificate(roots);
    Ok(match of_bundle()? {
        Some(bundle) => only(bundle),
        None => hidden_system().map_or_else(TrustStore::default, only).with_pem_certificate(AMAZON),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_region_has_a_root_of_each_kind() {
        for region in regions() {
            assert_eq!(of_region(region).matches("BEGIN").count(), 3, "{region}");
        }
    }
}
