//! Connections: accepted until the server stops, each with a deadline for the head of a request,
//! and one for its other end to take something of the answer.
//!
//! `axum::serve` sets no such deadlines, so a client that never finishes asking, or never reads,
//! would hold its connection, and what is computed for it, for ever. What a connection says first,
//! TLS or not, is heard in its own task: the loop below waits for nobody.
//!
//! A client that closes its side, even if it only says that it sends no more, has left: what is
//! computed for it ends at once, streamed or not. TCP does not tell the two apart until something
//! is written, which before a whole answer is minutes too late; clients that close their side and
//! then wait are rare, and HTTP asks of no server to serve them. So hyper's `half_close` stays off.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_io_timeout::TimeoutStream;
use tower::util::MapRequest;

use super::crowd::{Crowd, Guest, house};
use super::error::ApiError;
use super::linger::{BOUNDS, Lingering, Unread};
use super::tls::{Greeting, Tls};

/// After a failed accept, which is mostly a lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Bytes of an answer that the system keeps for a client, or twice that. It says that some were
/// taken once a third is free, so at the default time some kilobytes a second are reading.
pub(super) const SEND_BUFFER: usize = 128 << 10;
/// Times that time, for what is unacknowledged and for a window that stays too small.
const WINDOW: u32 = 3;
/// Looks in vain after which nobody is there: with the time before the first, that is the time to
/// take something.
const LOOKS: u32 = 3;
/// The longest time that Linux takes between two looks at a connection on which nothing happens.
const LOOK_MAX: Duration = Duration::from_secs(32_767);

/// Where connections come in.
pub(super) struct Door {
    pub listener: TcpListener,
    pub tls: Option<Tls>,
    /// Who is connected.
    pub crowd: Arc<Crowd<IpAddr>>,
    /// For the greeting of TLS, and again for the head of each request.
    pub head_timeout: Duration,
    /// For the other end to take something.
    pub send_timeout: Duration,
}

/// A connection that fails once nothing of it was taken for too long.
pub(super) type Socket = Pin<Box<TimeoutStream<Patient>>>;

/// Sets that time.
pub(super) fn impatient(socket: TcpStream, send_timeout: Duration) -> Socket {
    let window = Some(send_timeout.saturating_mul(WINDOW));
    let mut socket = TimeoutStream::new(Patient { socket, window, was_full: false });
    socket.set_write_timeout(Some(send_timeout));
    Box::pin(socket)
}

/// A connection whose client may be slow. Linux gives up an end whose window is too small for the
/// next packet for as long as `TCP_USER_TIMEOUT` says, and does not care that it has taken others
/// meanwhile, in parts. So that is longer than the time to take something, and once the buffer was
/// full it is not asked for any more: from then on it is the time between two writes that counts,
/// and TCP's keep-alive while nothing is written. Nor is it before something was: keep-alive would
/// wait as long.
pub(super) struct Patient {
    socket: TcpStream,
    /// That time, until something is written.
    window: Option<Duration>,
    was_full: bool,
}

impl Patient {
    fn written<T>(&mut self, written: Poll<T>) -> Poll<T> {
        let window = match self.window.take() {
            _ if written.is_pending() && !self.was_full => {
                self.was_full = true;
                None
            }
            None => return written,
            window => window,
        };
        #[cfg(target_os = "linux")]
        if let Err(error) = SockRef::from(&self.socket).set_tcp_user_timeout(window) {
            tracing::debug!(%error, "a connection keeps its option");
        }
        #[cfg(not(target_os = "linux"))]
        let _ = window;
        written
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, bytes);
        self.written(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, slices);
        self.written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Serves connections until `stop`. Then no connection is taken, and each open one ends after the
/// answer it is giving; what is returned resolves when all have.
pub(super) async fn until<S: Future<Output = ()>>(
    stop: S,
    door: Door,
    router: Router,
) -> impl Future<Output = ()> + use<S> {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(door.head_timeout);
    let open = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = door.listener.accept() => accepted,
            () = &mut stop => return open.shutdown(),
        };
        let (socket, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Some(guest) = door.crowd.enter(house(address.ip()), false) else {
            tracing::warn!(%address, "a connection too many, closed");
            continue;
        };
        if let Err(error) = set_up(&socket, door.send_timeout) {
            tracing::debug!(%error, "a connection without its options");
        }
        let send_timeout = door.send_timeout;
        let (http, router) = (http.clone(), router.clone());
        let watcher = open.watcher();
        let unread = Unread::default();
        let line = Line { http, router, watcher, send_timeout, unread, _guest: guest };
        match door.tls.clone() {
            None => drop(tokio::spawn(line.serve(impatient(socket, send_timeout)))),
            Some(tls) => drop(tokio::spawn(line.greet(tls, socket, door.head_timeout))),
        }
    }
}

/// Text leaves when it is there, not when a packet is full; and an end that vanished without a
/// word, or takes nothing, is found by the system too: while nothing is written, and where what
/// was written waits in its buffers.
fn set_up(socket: &TcpStream, send_timeout: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let socket = SockRef::from(socket);
    socket.set_send_buffer_size(SEND_BUFFER)?;
    let look = (send_timeout / 4).clamp(Duration::from_secs(1), LOOK_MAX);
    let looks = TcpKeepalive::new().with_time(look).with_interval(look).with_retries(LOOKS);
    socket.set_tcp_keepalive(&looks)
}

/// What serves one connection.
struct Line {
    http: http1::Builder,
    router: Router,
    watcher: Watcher,
    send_timeout: Duration,
    unread: Unread,
    _guest: Guest<IpAddr>,
}

impl Line {
    /// Until either side ends it.
    async fn serve<I>(self, io: I)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let unread = self.unread.clone();
        let told = move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(unread.clone());
            request
        };
        let service = TowerToHyperService::new(MapRequest::new(self.router, told));
        let io = Lingering::new(io, self.unread, BOUNDS);
        let connection = self.http.serve_connection(TokioIo::new(io), service);
        if let Err(error) = self.watcher.watch(connection).await {
            tracing::debug!(%error, "a connection ended");
        }
    }

    /// The same, once TLS is agreed on.
    async fn greet(mut self, tls: Tls, socket: TcpStream, limit: Duration) {
        let send_timeout = self.send_timeout;
        match tokio::time::timeout(limit, tls.greet(socket, send_timeout)).await {
            Ok(Ok(Greeting::Secret(stream))) => self.serve(stream).await,
            Ok(Ok(Greeting::Plain(socket))) => {
                self.router = Router::new().fallback(async || ApiError::wants_https());
                self.unread.note();
                self.serve(impatient(socket, send_timeout)).await;
            }
            Ok(Err(error)) => tracing::debug!(%error, "no TLS connection"),
            Err(_) => tracing::debug!("no TLS connection in time"),
        }
    }
}
