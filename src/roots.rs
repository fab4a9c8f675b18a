//! The roots of AWS, which are built in: reading all of a machine's takes longer than anything else in a cold start. AWS's endpoints and
//! RDS Proxy have certificates that lead to Amazon's public roots, RDS and Aurora to their region's own.

use std::{env, fs};

use aws_smithy_http_client::tls::TrustStore;

/// Amazon Trust Services' roots.
pub(crate) const AMAZON: &str = include_str!("roots/amazon.pem");
/// RDS's roots of all regions, each below a line with its name.
const RDS: &str = include_str!("roots/rds.pem");

/// Where Linux distributions keep the roots that they trust: Amazon's and Red Hat's, and Debian's.
const OF_SYSTEM: [&str; 2] = ["/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/certs/ca-certificates.crt"];

/// Region and text of each of RDS's roots.
fn rds() -> impl Iterator<Item = (&'static str, &'static str)> {
    RDS.split_inclusive("-----END CERTIFICATE-----\n").filter_map(|root| {
        let name = root.strip_prefix("Amazon RDS ")?;
        Some((name.split(' ').next()?, root))
    })
}

/// The regions whose roots of RDS are here.
pub(crate) fn regions() -> impl Iterator<Item = &'static str> {
    rds().map(|(region, _)| region)
}

/// RDS's roots in a region.
pub(crate) fn of_region(region: &str) -> String {
    rds().filter(|(of, _)| *of == region).map(|(_, root)| root).collect()
}

/// The system's roots where they are hidden from OpenSSL: with `SSL_CERT_FILE=/dev/null`, which the template sets, it does not read
/// what is not asked for.
pub(crate) fn hidden_system() -> Option<Vec<u8>> {
    env::var_os("SSL_CERT_FILE").filter(|file| file == "/dev/null")?;
    OF_SYSTEM.iter().find_map(|file| fs::read(file).ok())
}

/// The roots for AWS's own endpoints: those of `AWS_CA_BUNDLE`, if that is set; else Amazon's, where AWS's usual regions use them; else the
/// system's.
pub fn for_aws() -> TrustStore {
    let of_file = env::var_os("AWS_CA_BUNDLE").filter(|file| !file.is_empty()).and_then(|file| fs::read(file).ok());
    let usual = |region: String| !["cn-", "us-gov-", "us-iso", "eu-iso"].iter().any(|other| region.starts_with(other));
    match (of_file, env::var("AWS_REGION").is_ok_and(usual), hidden_system()) {
        (Some(roots), ..) | (None, false, Some(roots)) => TrustStore::empty().with_pem_certificate(roots),
        (None, true, _) => TrustStore::empty().with_pem_certificate(AMAZON),
        (None, false, None) => TrustStore::default(),
    }
}

/// The roots that the system trusts.
pub fn of_system() -> TrustStore {
    TrustStore::default()
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
