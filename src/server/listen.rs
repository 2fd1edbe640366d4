//! Connections: accepted until the server stops, each with a deadline for the head of a request.
//!
//! `axum::serve` sets no such deadline, so a client that never finishes asking would hold its
//! connection, and a file descriptor, for ever. What a connection says first, TLS or not, is heard
//! in its own task: the loop below waits for nobody.

use std::future::Future;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

use super::error::ApiError;
use super::tls::{Greeting, Tls};

/// After a failed accept, which is mostly a lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Where connections come in.
pub(super) struct Door {
    pub listener: TcpListener,
    pub tls: Option<Tls>,
    /// For the greeting of TLS, and again for the head of each request.
    pub head_timeout: Duration,
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
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // Text leaves when it is there, not when a packet is full.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        let line = Line { http: http.clone(), router: router.clone(), watcher: open.watcher() };
        match door.tls.clone() {
            None => drop(tokio::spawn(line.serve(socket))),
            Some(tls) => drop(tokio::spawn(line.greet(tls, socket, door.head_timeout))),
        }
    }
}

/// What serves one connection.
struct Line {
    http: http1::Builder,
    router: Router,
    watcher: Watcher,
}

impl Line {
    /// Until either side ends it.
    async fn serve<I>(self, io: I)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let service = TowerToHyperService::new(self.router);
        let connection = self.http.serve_connection(TokioIo::new(io), service);
        if let Err(error) = self.watcher.watch(connection).await {
            tracing::debug!(%error, "a connection ended");
        }
    }

    /// The same, once TLS is agreed on.
    async fn greet(mut self, tls: Tls, socket: TcpStream, limit: Duration) {
        match tokio::time::timeout(limit, tls.greet(socket)).await {
            Ok(Ok(Greeting::Secret(stream))) => self.serve(stream).await,
            Ok(Ok(Greeting::Plain(socket))) => {
                self.router = Router::new().fallback(async || ApiError::wants_https());
                self.serve(socket).await;
            }
            Ok(Err(error)) => tracing::debug!(%error, "no TLS connection"),
            Err(_) => tracing::debug!("no TLS connection in time"),
        }
    }
}
