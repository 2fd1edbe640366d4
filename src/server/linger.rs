//! What a client still sends after it was refused: read and dropped for a while, so that it comes
//! to read why.
//!
//! An answer that is given before the whole request was read is lost to a client that writes first
//! and reads then: whoever closes a connection over bytes that nobody read resets it, and the end
//! that is reset may forget what it has received. So our side is closed, the other one is heard to
//! its end, within bounds, and only then the connection is let go. Nothing of it is kept, and it
//! holds no place but that of its connection. A client that waits for a `100 Continue` is never
//! told to go on: the final status says enough.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// How long the rest of a request is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    bytes: usize,
    /// Without a byte more.
    silence: Duration,
    whole: Duration,
}

/// As long as nginx does it, and more bytes than any body that is not refused has.
pub(super) const BOUNDS: Bounds =
    Bounds { bytes: 1 << 30, silence: Duration::from_secs(5), whole: Duration::from_secs(30) };

/// Bytes that are read at once, and so often before others have their turn.
const PIECE: usize = 16 << 10;
const PIECES: usize = 16;

/// Whether a request of a connection was refused before it was read: in the extensions of each.
#[derive(Clone, Debug, Default)]
pub(super) struct Unread(Arc<AtomicBool>);

impl Unread {
    /// It was.
    pub(super) fn note(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A connection that ends politely: to shut it down takes until the other end has said all.
pub(super) struct Lingering<I> {
    io: I,
    unread: Unread,
    bounds: Bounds,
    rest: Option<Rest>,
}

impl<I> Lingering<I> {
    pub(super) fn new(io: I, unread: Unread, bounds: Bounds) -> Self {
        Self { io, unread, bounds, rest: None }
    }
}

/// Our side is closed, the other one is not.
struct Rest {
    bytes_left: usize,
    silence: Duration,
    silent: Pin<Box<Sleep>>,
    over: Pin<Box<Sleep>>,
}

impl Rest {
    fn new(bounds: Bounds) -> Self {
        let Bounds { bytes, silence, whole } = bounds;
        let over = Box::pin(sleep(whole));
        Self { bytes_left: bytes, silence, silent: Box::pin(sleep(silence)), over }
    }

    /// Ready when there is no more, or no more of it is read.
    fn poll_drop<I: AsyncRead + Unpin>(&mut self, io: &mut I, cx: &mut Context<'_>) -> Poll<()> {
        let mut piece = [std::mem::MaybeUninit::uninit(); PIECE];
        let mut pieces = 0;
        while pieces < PIECES {
            let mut piece = ReadBuf::uninit(&mut piece);
            match Pin::new(&mut *io).poll_read(cx, &mut piece) {
                Poll::Pending => break,
                Poll::Ready(Ok(())) if !piece.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(()),
            }
            self.bytes_left = self.bytes_left.saturating_sub(piece.filled().len());
            if self.bytes_left == 0 {
                return Poll::Ready(());
            }
            pieces += 1;
        }
        if pieces > 0 {
            self.silent.as_mut().reset(Instant::now() + self.silence);
        }
        if self.silent.as_mut().poll(cx).is_ready() || self.over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        if pieces == PIECES {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Lingering<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Lingering<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, unread, bounds, rest } = &mut *self;
        let rest = match rest {
            Some(rest) => rest,
            None => {
                ready!(Pin::new(&mut *io).poll_shutdown(cx))?;
                if !unread.0.load(Ordering::Acquire) {
                    return Poll::Ready(Ok(()));
                }
                rest.insert(Rest::new(*bounds))
            }
        };
        rest.poll_drop(io, cx).map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// Long enough for a machine that does something else.
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(50);

    /// The server's end, whose client was refused or not, and the client's.
    fn pair(refused: bool, bounds: Bounds) -> (Lingering<DuplexStream>, DuplexStream) {
        let (server, client) = duplex(1 << 10);
        let unread = Unread::default();
        if refused {
            unread.note();
        }
        (Lingering::new(server, unread, bounds), client)
    }

    async fn ends(mut server: Lingering<DuplexStream>) -> Duration {
        let begun = std::time::Instant::now();
        tokio::time::timeout(LONG, server.shutdown()).await.expect("in time").unwrap();
        begun.elapsed()
    }

    #[tokio::test]
    async fn a_client_that_writes_first_reads_the_answer_then() {
        let bounds = Bounds { bytes: 1 << 20, silence: LONG, whole: LONG };
        let (mut server, mut client) = pair(true, bounds);
        server.write_all(b"no").await.unwrap();
        let client = tokio::spawn(async move {
            let mut said = String::new();
            client.write_all(&vec![b'x'; 100 << 10]).await.unwrap();
            client.read_to_string(&mut said).await.unwrap();
            said
        });
        ends(server).await;
        assert_eq!(client.await.unwrap(), "no");
    }

    #[tokio::test]
    async fn nobody_is_waited_for_whose_request_was_read() {
        let (server, _client) = pair(false, Bounds { bytes: 1 << 20, silence: LONG, whole: LONG });
        ends(server).await;
    }

    #[tokio::test]
    async fn who_says_nothing_more_is_let_go() {
        let (server, _client) = pair(true, Bounds { bytes: 1 << 20, silence: SHORT, whole: LONG });
        assert!(ends(server).await >= SHORT);
    }

    #[tokio::test]
    async fn who_never_ends_is_let_go_by_bytes_and_by_time() {
        let by_bytes = Bounds { bytes: 100 << 10, silence: LONG, whole: LONG };
        let (server, mut client) = pair(true, by_bytes);
        let writes = tokio::spawn(async move {
            let mut sent = 0;
            while client.write_all(&[0; 1 << 10]).await.is_ok() {
                sent += 1 << 10;
            }
            sent
        });
        ends(server).await;
        let sent: usize = writes.await.unwrap();
        assert!((100 << 10..=102 << 10).contains(&sent), "{sent}");
        let by_time = Bounds { bytes: usize::MAX, silence: LONG, whole: 4 * SHORT };
        let (server, mut client) = pair(true, by_time);
        let writes = tokio::spawn(async move {
            while client.write_all(b"x").await.is_ok() {
                tokio::time::sleep(SHORT / 10).await;
            }
        });
        assert!(ends(server).await >= 4 * SHORT);
        writes.await.unwrap();
    }
}
