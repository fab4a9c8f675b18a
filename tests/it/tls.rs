//! The connection to the database is encrypted, and the server's certificate is verified.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    masks::output,
    world::{World, bodies, event, invoke, variable},
};

#[tokio::test]
async fn the_connection_is_encrypted_unless_that_is_disabled() {
    let mut world = World::new().await;
    let query = "select ssl, version from pg_stat_ssl join pg_stat_activity using (pid) \
                 where datname = current_database() and application_name = 'login-etl'";
    let handler = world.handler().await;
    invoke(&handler, &event(0, bodies(0..1))).await.unwrap();
    let sessions = world.rows(query).await;
    assert_eq!(sessions.len(), 1);
    assert!(sessions[0].get::<_, bool>("ssl"));
    assert!(["TLSv1.2", "TLSv1.3"].contains(&sessions[0].get("version")));
    world.terminate_sessions().await;

    world.settings.insert("DATABASE_TLS", "disable".to_owned());
    let handler = world.handler().await;
    invoke(&handler, &event(1, bodies(0..1))).await.unwrap();
    world.until(&format!("(select count(*) from ({query}) as sessions) = 1")).await;
    assert!(!world.rows(query).await[0].get::<_, bool>("ssl"));
}

/// Starts a server that answers the request for TLS with `answer`, and then closes. Returns its port, and how often it was asked.
async fn server_that_answers(answer: &'static [u8]) -> (u16, Arc<AtomicU32>) {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = server.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            let mut ssl_request = [0; 8];
            client.read_exact(&mut ssl_request).await.unwrap();
            client.write_all(answer).await.unwrap();
        }
    });
    (port, asked)
}

#[tokio::test]
async fn a_connection_that_breaks_in_the_handshake_is_tried_again() {
    let mut world = World::new().await;
    let (port, asked) = server_that_answers(b"S").await;
    world.settings.insert("DATABASE_PORT", port.to_string());
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseUnavailable", "{error}");
    // Once at the start while the secrets are read, then four tries.
    assert_eq!(asked.load(Ordering::Relaxed), 1 + 4);
}

#[tokio::test]
async fn a_server_without_tls_is_refused() {
    let mut world = World::new().await;
    let (port, _) = server_that_answers(b"N").await;
    world.settings.insert("DATABASE_PORT", port.to_string());
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseTls");
    assert!(error.to_string().contains("the server does not offer TLS"), "{error}");
}

/// Prints a certificate for localhost that signs itself and has expired, and its key.
const EXPIRED: &str = "
from datetime import datetime
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP256R1())
name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'expired')])
builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
builder = builder.not_valid_before(datetime(2020, 1, 1)).not_valid_after(datetime(2021, 1, 1))
builder = builder.add_extension(x509.BasicConstraints(True, None), True)
builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName('localhost')]), False)
print(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode())
pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
print(key.private_bytes(pem, pkcs8, serialization.NoEncryption()).decode())";

#[tokio::test]
async fn an_expired_certificate_is_to_be_renewed() {
    let mut world = World::new().await;
    let mut python = Command::new(variable("PYTHON"));
    python.args(["-c", EXPIRED]);
    let printed = output(python, "");
    let (certificate, key) = printed.split_once("\n\n").unwrap();
    let identity = native_tls::Identity::from_pkcs8(certificate.as_bytes(), key.as_bytes()).unwrap();
    let tls = tokio_native_tls::TlsAcceptor::from(native_tls::TlsAcceptor::new(identity).unwrap());
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.settings.insert("DATABASE_PORT", server.local_addr().unwrap().port().to_string());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = server.accept().await {
            client.read_exact(&mut [0; 8]).await.unwrap();
            client.write_all(b"S").await.unwrap();
            // The client ends it.
            tls.accept(client).await.unwrap_err();
        }
    });
    let roots = concat!(env!("CARGO_TARGET_TMPDIR"), "/expired.pem");
    std::fs::write(roots, certificate).unwrap();
    world.settings.insert("DATABASE_CA", roots.to_owned());
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseTls");
    assert!(error.to_string().contains("certificate has expired"), "{error}");
    assert!(error.to_string().ends_with("renew the server's certificate, or check this machine's clock"), "{error}");
}

#[tokio::test]
async fn a_certificate_for_another_host_name_is_refused() {
    let mut world = World::new().await;
    world.settings.insert("DATABASE_HOST", "127.0.0.1".to_owned());
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseTls");
    let expected = "TLS failed: the database's certificate is not for \"127.0.0.1\", but for localhost: \
                    connect by a name in the certificate";
    assert_eq!(error.to_string(), expected);
    assert_eq!(world.count("user_logins").await, 0);
}

#[tokio::test]
async fn a_certificate_of_an_unknown_authority_is_refused() {
    let mut world = World::new().await;
    let other = concat!(env!("CARGO_MANIFEST_DIR"), "/src/roots/amazon.pem");
    for (roots, trusted) in [("aws", "the system's"), ("system", "the system's"), (other, "those in ")] {
        world.settings.insert("DATABASE_CA", roots.to_owned());
        let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
        assert_eq!(error.error_type(), "DatabaseTls");
        let expected = format!("no trusted root signed the database's certificate; trusted are {trusted}");
        assert!(error.to_string().contains(&expected), "{error}");
    }
}

#[tokio::test]
async fn with_tls_off_a_refusal_suggests_tls_before_the_password() {
    let mut world = World::new().await;
    // Like a server without an entry in pg_hba.conf for unencrypted connections.
    let (port, _) = server_that_answers(b"E\0\0\0\x29SFATAL\0VFATAL\0C28000\0Mno entry here\0\0").await;
    world.settings.insert("DATABASE_PORT", port.to_string());
    world.settings.insert("DATABASE_TLS", "disable".to_owned());
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseCredentials");
    assert!(error.to_string().contains("if the server requires TLS"), "{error}");
}

#[tokio::test]
async fn an_unknown_host_name_is_reported() {
    let mut world = World::new().await;
    world.settings.insert("DATABASE_HOST", "nowhere.invalid".to_owned());
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseUnavailable");
    assert!(error.to_string().contains("the host name is unknown"), "{error}");
}

#[tokio::test]
async fn a_file_without_certificates_keeps_the_environment_from_starting() {
    let mut world = World::new().await;
    for path in ["/nowhere.pem", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")] {
        world.settings.insert("DATABASE_CA", path.to_owned());
        let error = world.try_handler().await.unwrap_err();
        assert_eq!(error.error_type(), "Configuration");
        assert!(error.to_string().contains(path), "{error}");
    }
}
