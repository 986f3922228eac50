//! A TCP proxy that loses, delays and cuts what passes through it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the proxy does to the bytes of every connection.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Weather {
    /// Nothing arrives at the server any more, until this heals.
    pub up_lost: bool,
    /// Nothing arrives at the client any more, until this heals.
    pub down_lost: bool,
    /// Replies vanish; connections that lost one are closed when this heals.
    pub replies_swallowed: bool,
    /// Every chunk arrives so much later.
    pub delay: Duration,
    /// Only connections that have sent LISTEN lose anything.
    pub only_listeners: bool,
    /// Connections are closed after the server has sent so many bytes.
    pub cut_after: Option<usize>,
}

/// A proxy to one server at a time. Ends with the runtime that it runs in.
pub struct Proxy {
    port: u16,
    weather: watch::Sender<Weather>,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    target: SocketAddr,
    /// Connections with an older number are reset.
    resets: watch::Sender<u64>,
    connections: u64,
    cut: u64,
}

impl Proxy {
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let shared = Shared {
            target: SocketAddr::from(([127, 0, 0, 1], port)),
            resets: watch::Sender::new(0),
            connections: 0,
            cut: 0,
        };
        let proxy = Proxy {
            port: listener.local_addr().unwrap().port(),
            weather: watch::Sender::new(Weather::default()),
            shared: Arc::new(Mutex::new(shared)),
        };
        let (weather, shared) = (proxy.weather.subscribe(), Arc::clone(&proxy.shared));
        actix_rt::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                actix_rt::spawn(connection(client, weather.clone(), Arc::clone(&shared)));
            }
        });
        proxy
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// Reset every connection.
    pub fn reset(&self) {
        self.shared.lock().unwrap().resets.send_modify(|number| *number += 1);
    }

    /// New connections go to another server; those that are open are reset.
    pub fn redirect(&self, port: u16) {
        self.shared.lock().unwrap().target.set_port(port);
        self.reset();
    }

    /// How many connections there were, and how many were cut or reset.
    pub fn counts(&self) -> (u64, u64) {
        let shared = self.shared.lock().unwrap();
        (shared.connections, shared.cut)
    }
}

async fn connection(client: TcpStream, weather: watch::Receiver<Weather>, shared: Arc<Mutex<Shared>>) {
    let (target, mut resets) = {
        let mut shared = shared.lock().unwrap();
        shared.connections += 1;
        (shared.target, shared.resets.subscribe())
    };
    let Ok(server) = TcpStream::connect(target).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let listens = AtomicBool::new(false);
    let cut = tokio::select! {
        cut = pump(from_client, to_server, weather.clone(), Direction::Up, &listens) => cut,
        cut = pump(from_server, to_client, weather, Direction::Down, &listens) => cut,
        _ = resets.changed() => true,
    };
    shared.lock().unwrap().cut += u64::from(cut);
}

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    Up,
    Down,
}

/// Carry bytes until one side closes. Answers whether the weather cut it off.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
    direction: Direction,
    listens: &AtomicBool,
) -> bool {
    let mut buffer = vec![0; 64 << 10];
    let (mut carried, mut swallowed) = (0, false);
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            // What vanished cannot be made good: the connection ends when the weather does.
            _ = weather.wait_for(|weather| !weather.replies_swallowed), if swallowed => return true,
        };
        if read == 0 {
            return false;
        }
        carried += read;
        let now = *weather.borrow();
        if direction == Direction::Down && now.replies_swallowed {
            swallowed = true;
            continue;
        }
        if direction == Direction::Up && buffer[..read].windows(6).any(|word| word == b"listen") {
            listens.store(true, Ordering::Relaxed);
        }
        let lost = |weather: &Weather| {
            let lost = if direction == Direction::Up { weather.up_lost } else { weather.down_lost };
            lost && (!weather.only_listeners || listens.load(Ordering::Relaxed))
        };
        if weather.wait_for(|weather| !lost(weather)).await.is_err() {
            return false;
        }
        if !now.delay.is_zero() {
            tokio::time::sleep(now.delay).await;
        }
        if direction == Direction::Down && now.cut_after.is_some_and(|limit| carried > limit) {
            return true;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return false;
        }
    }
}
