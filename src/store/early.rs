//! Connects to the database, up to TLS, while the credentials are fetched. Signing in continues from there.
//!
//! This hides every failure: the normal way of connecting follows and reports it.

use std::{
    convert::Infallible,
    future,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs},
    time::Duration,
};

use native_tls::TlsConnector;
use postgres_native_tls::TlsStream;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    sync::oneshot,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tokio_postgres::tls::TlsConnect;

use super::certificate::SSL_REQUEST;

/// The driver's own value.
const KEEPALIVE: Duration = Duration::from_secs(2 * 60 * 60);

/// A connection that is being opened, and its destination.
pub(super) struct Early {
    host: String,
    port: u16,
    opening: JoinHandle<Option<TlsStream<tokio::net::TcpStream>>>,
}

#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Maximum time of each step: TCP, the server's answer, and TLS.
    pub(super) connecting: Duration,
    /// Maximum time that sent bytes may go unacknowledged.
    pub(super) unacknowledged: Duration,
}

impl Early {
    /// Starts connecting to a host, or to its `address` if known. TLS begins when `tls` is there.
    pub(super) fn begin(
        host: String,
        address: Option<IpAddr>,
        port: u16,
        limits: Limits,
        tls: oneshot::Receiver<TlsConnector>,
    ) -> Self {
        let asking = spawn_blocking({
            let host = host.clone();
            move || ready_for_tls(&host, address, port, limits)
        });
        let opening = tokio::spawn({
            let host = host.clone();
            async move {
                let stream = tokio::net::TcpStream::from_std(asking.await.ok()?.ok()?).ok()?;
                let encrypting = postgres_native_tls::TlsConnector::new(tls.await.ok()?, &host).connect(stream);
                timeout(limits.connecting, encrypting).await.ok()?.ok()
            }
        });
        Self { host, port, opening }
    }

    /// The encrypted stream, if it leads to this host and port and could be opened.
    pub(super) async fn stream(mut self, host: &str, port: u16) -> Option<TlsStream<tokio::net::TcpStream>> {
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

/// A stream over which the server has agreed to TLS. Blocks: the runtime's thread is busy with the first requests to AWS.
fn ready_for_tls(host: &str, address: Option<IpAddr>, port: u16, limits: Limits) -> io::Result<TcpStream> {
    let addresses: Vec<SocketAddr> = match address {
        Some(address) => vec![(address, port).into()],
        None => (host, port).to_socket_addrs()?.collect(),
    };
    let connected = addresses.iter().find_map(|address| TcpStream::connect_timeout(address, limits.connecting).ok());
    let mut stream = connected.ok_or(io::ErrorKind::NotConnected)?;
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&stream);
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(limits.unacknowledged))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
    stream.set_read_timeout(Some(limits.connecting))?;
    stream.write_all(&SSL_REQUEST)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer != *b"S" {
        return Err(io::ErrorKind::Unsupported.into());
    }
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Gives the driver a stream that is already encrypted.
pub(super) struct Encrypted(pub(super) TlsStream<tokio::net::TcpStream>);

impl<S> TlsConnect<S> for Encrypted {
    type Stream = TlsStream<tokio::net::TcpStream>;
    type Error = Infallible;
    type Future = future::Ready<Result<TlsStream<tokio::net::TcpStream>, Infallible>>;

    fn connect(self, _: S) -> Self::Future {
        future::ready(Ok(self.0))
    }
}
