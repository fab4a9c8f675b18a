//! Opens TCP and TLS to the database while the credentials are still being fetched. Signing in then uses the stream.
//!
//! Errors here are dropped: the caller then connects in the usual way, and reports its error.

use std::{convert::Infallible, future, net::IpAddr, time::Duration};

use native_tls::TlsConnector;
use postgres_native_tls::TlsStream;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};
use tokio_postgres::tls::TlsConnect;

use super::certificate::SSL_REQUEST;

/// The driver's own value.
const KEEPALIVE: Duration = Duration::from_secs(2 * 60 * 60);

/// A connection being opened, and its target.
pub(super) struct Early {
    host: String,
    port: u16,
    opening: JoinHandle<Option<TlsStream<TcpStream>>>,
}

/// Maximum time to connect, and maximum time that sent bytes may go unacknowledged.
pub(super) struct Limits {
    pub(super) connecting: Duration,
    pub(super) unacknowledged: Duration,
}

impl Early {
    /// Starts connecting to a host, at its `address` if that is known.
    pub(super) fn begin(tls: TlsConnector, host: String, address: Option<IpAddr>, port: u16, limits: Limits) -> Self {
        let opening = tokio::spawn({
            let host = host.clone();
            let opening = async move {
                let stream = match address {
                    Some(address) => TcpStream::connect((address, port)).await.ok()?,
                    None => TcpStream::connect((&*host, port)).await.ok()?,
                };
                encrypted(tls, stream, &host, limits.unacknowledged).await
            };
            async move { timeout(limits.connecting, opening).await.ok().flatten() }
        });
        Self { host, port, opening }
    }

    /// The encrypted stream, if it could be opened and leads to this host and port.
    pub(super) async fn stream(mut self, host: &str, port: u16) -> Option<TlsStream<TcpStream>> {
        if self.host != host || self.port != port {
            return None;
        }
        (&mut self.opening).await.ok().flatten()
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.opening.abort();
    }
}

async fn encrypted(
    tls: TlsConnector,
    mut stream: TcpStream,
    host: &str,
    unacknowledged: Duration,
) -> Option<TlsStream<TcpStream>> {
    stream.set_nodelay(true).ok()?;
    let socket = SockRef::from(&stream);
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(unacknowledged)).ok()?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE)).ok()?;
    stream.write_all(&SSL_REQUEST).await.ok()?;
    if stream.read_u8().await.ok()? != b'S' {
        return None;
    }
    postgres_native_tls::TlsConnector::new(tls, host).connect(stream).await.ok()
}

/// Gives the driver a stream that is already encrypted.
pub(super) struct Encrypted(pub(super) TlsStream<TcpStream>);

impl<S> TlsConnect<S> for Encrypted {
    type Stream = TlsStream<TcpStream>;
    type Error = Infallible;
    type Future = future::Ready<Result<TlsStream<TcpStream>, Infallible>>;

    fn connect(self, _: S) -> Self::Future {
        future::ready(Ok(self.0))
    }
}
