//! Delays the traffic between a client and a server on this machine, each way: `delay LISTEN_PORT SERVER_PORT MICROSECONDS`.

use std::{
    error::Error,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [listen, server, delay] = arguments.as_slice() else {
        return Err("usage: delay LISTEN_PORT SERVER_PORT MICROSECONDS".into());
    };
    let (server, delay) = (server.parse::<u16>()?, Duration::from_micros(delay.parse()?));
    for client in TcpListener::bind((Ipv4Addr::LOCALHOST, listen.parse()?))?.incoming() {
        let (client, server) = (client?, TcpStream::connect((Ipv4Addr::LOCALHOST, server))?);
        carry(client.try_clone()?, server.try_clone()?, delay)?;
        carry(server, client, delay)?;
    }
    Ok(())
}

/// Carries data from one side to the other, each piece `delay` later. Two threads, so that several pieces travel at once.
fn carry(from: TcpStream, to: TcpStream, delay: Duration) -> io::Result<()> {
    to.set_nodelay(true)?;
    let (sender, receiver) = channel();
    thread::spawn(move || take(from, &sender, delay));
    thread::spawn(move || give(to, &receiver));
    Ok(())
}

fn take(mut from: TcpStream, sender: &Sender<(Instant, Vec<u8>)>, delay: Duration) {
    let mut piece = vec![0; 1 << 16];
    while let Ok(len @ 1..) = from.read(&mut piece) {
        if sender.send((Instant::now() + delay, piece[..len].to_vec())).is_err() {
            break;
        }
    }
}

fn give(mut to: TcpStream, receiver: &Receiver<(Instant, Vec<u8>)>) {
    for (due, piece) in receiver {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Both).ok();
}
