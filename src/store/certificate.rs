//! Reads the certificate of a server.

use std::{io, net::IpAddr};

use native_tls::TlsConnector;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use x509_cert::{
    Certificate,
    der::Decode,
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use super::DatabaseError;

/// PostgreSQL's SSLRequest message: its length, and the request code in place of a protocol version.
pub(super) const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Maximum names in an error text. A certificate may have hundreds.
const MOST_NAMES: usize = 10;

/// Returns the server's certificate after a TLS handshake only.
pub(super) async fn shown(
    tls: TlsConnector,
    host: &str,
    address: Option<IpAddr>,
    port: u16,
) -> Result<Certificate, DatabaseError> {
    let stream = match address {
        Some(address) => TcpStream::connect((address, port)).await,
        None => TcpStream::connect((host, port)).await,
    };
    let asking = async {
        let mut stream = stream?;
        stream.write_all(&SSL_REQUEST).await?;
        Ok::<_, io::Error>((stream.read_u8().await?, stream))
    };
    let (answer, stream) = asking.await.map_err(|error| DatabaseError::of_io(&error))?;
    if answer != b'S' {
        return Err(DatabaseError::without_tls());
    }
    let stream = tokio_native_tls::TlsConnector::from(tls).connect(host, stream).await;
    let stream = stream.map_err(|error| DatabaseError::of_tls(&error))?;
    let certificate = stream.get_ref().peer_certificate().ok().flatten().and_then(|shown| shown.to_der().ok());
    let certificate = certificate.and_then(|der| Certificate::from_der(&der).ok());
    certificate.ok_or_else(|| DatabaseError::of_tls(&"the certificate cannot be read"))
}

/// The names in a server's certificate, whether it is trusted or not. Empty if they cannot be read.
pub(super) async fn names(host: &str, address: Option<IpAddr>, port: u16) -> Vec<String> {
    // Safe without verification: nothing is sent over this connection.
    let mut builder = TlsConnector::builder();
    builder.danger_accept_invalid_certs(true).danger_accept_invalid_hostnames(true).disable_built_in_roots(true);
    let Ok(tls) = builder.build() else { return Vec::new() };
    let Ok(certificate) = shown(tls, host, address, port).await else { return Vec::new() };
    let names = certificate.tbs_certificate().get_extension::<SubjectAltName>().ok().flatten();
    let names: Vec<_> = names.map_or_else(Vec::new, |(_, names)| names.0.iter().filter_map(text).collect());
    let is_plain = |name: &String| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"*_.:-".contains(&byte));
    // The names are not verified, so only harmless characters are shown.
    names.into_iter().filter(is_plain).take(MOST_NAMES).collect()
}

fn text(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::DnsName(name) => Some(name.to_string()),
        GeneralName::IpAddress(bytes) => match bytes.as_bytes().len() {
            4 => <[u8; 4]>::try_from(bytes.as_bytes()).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            _ => <[u8; 16]>::try_from(bytes.as_bytes()).ok().map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    }
}
