//! A TCP proxy in front of the database that can break connections.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Forwards all bytes.
    Pass,
    /// A half-open connection: forwards no bytes, and closes nothing.
    Stall,
    /// Drops the server's next answer, and closes the connection.
    CutAnswer,
}

pub struct Proxy {
    pub port: u16,
    mode: Arc<watch::Sender<Mode>>,
}

impl Proxy {
    pub async fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let modes = Arc::clone(&mode);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, server, modes.subscribe()));
            }
        });
        Self { port, mode }
    }

    /// Sets the mode of all open connections. New connections pass.
    pub fn turn(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn forward(mut client: TcpStream, server: u16, mut modes: watch::Receiver<Mode>) {
    modes.mark_unchanged();
    let mut server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
    let (mut asked, mut answered) = ([0; 16_384], [0; 16_384]);
    let mut mode = Mode::Pass;
    loop {
        tokio::select! {
            biased;
            _ = modes.changed() => mode = *modes.borrow_and_update(),
            _ = std::future::pending::<()>(), if mode == Mode::Stall => {}
            read = client.read(&mut asked), if mode != Mode::Stall => match read {
                Ok(0) | Err(_) => return,
                Ok(count) => server.write_all(&asked[..count]).await.unwrap(),
            },
            read = server.read(&mut answered), if mode != Mode::Stall => match read {
                Ok(0) | Err(_) => return,
                Ok(_) if mode == Mode::CutAnswer => return,
                Ok(count) => client.write_all(&answered[..count]).await.unwrap(),
            },
        }
    }
}
