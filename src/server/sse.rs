//! The body of a streamed answer: events as they come, comments while nothing comes.
//!
//! Dropping the body, which is what happens when the client goes away, drops the generation behind
//! it, and that cancels it.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::Stream;
use tokio::time::{Interval, MissedTickBehavior};

use super::error::ApiError;
use crate::error::Error;
use crate::pipeline::TextEvent;

/// Writes the events of a generation as one API has them.
pub(super) trait Writer {
    /// What comes before the first event.
    fn begin(&mut self, _out: &mut Vec<u8>) {}
    /// One event, as zero or more messages at the end of `out`.
    fn event(&mut self, event: TextEvent, out: &mut Vec<u8>);
    /// The end.
    fn end(&mut self, out: &mut Vec<u8>);
    /// A failure in the middle, when the status is long gone.
    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>);
    /// How the messages are told apart.
    fn wire(&self) -> Wire {
        Wire::SSE
    }
}

/// A way to send messages one after the other.
pub(super) struct Wire {
    pub content_type: &'static str,
    /// A message that says nothing.
    pub beat: Bytes,
}

impl Wire {
    /// Server-sent events.
    pub(super) const SSE: Self = Self {
        content_type: "text/event-stream; charset=utf-8",
        beat: Bytes::from_static(b": heartbeat\n\n"),
    };
}

/// Answers with a stream. `heartbeat` is the longest silence but for one more of the same.
pub(super) fn response<S, W>(events: S, mut writer: W, heartbeat: Duration) -> Response
where
    S: Stream<Item = Result<TextEvent, Error>> + Send + Unpin + 'static,
    W: Writer + Send + Unpin + 'static,
{
    let (wire, mut first) = (writer.wire(), Vec::new());
    writer.begin(&mut first);
    let pieces = Written { first, events, writer, done: false };
    pieces_on(wire, pieces, heartbeat)
}

/// Answers with a stream of pieces, each of whole server-sent events.
pub(super) fn pieces<S>(pieces: S, heartbeat: Duration) -> Response
where
    S: Stream<Item = Vec<u8>> + Send + Unpin + 'static,
{
    pieces_on(Wire::SSE, pieces, heartbeat)
}

fn pieces_on<S>(wire: Wire, pieces: S, heartbeat: Duration) -> Response
where
    S: Stream<Item = Vec<u8>> + Send + Unpin + 'static,
{
    let content_type = HeaderValue::from_static(wire.content_type);
    let body = EventBody::new(wire.beat, pieces, heartbeat);
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks reverse proxies not to hold text back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// A piece of the body is sent once it is at least this long, even if more is ready.
const PIECE_LEN: usize = 16 * 1024;

/// The events of a generation, written down.
struct Written<S, W> {
    /// What comes before them.
    first: Vec<u8>,
    events: S,
    writer: W,
    done: bool,
}

impl<S, W> Stream for Written<S, W>
where
    S: Stream<Item = Result<TextEvent, Error>> + Unpin,
    W: Writer + Unpin,
{
    type Item = Vec<u8>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        if !self.first.is_empty() {
            return Poll::Ready(Some(std::mem::take(&mut self.first)));
        }
        let mut out = Vec::new();
        match ready!(Pin::new(&mut self.events).poll_next(cx)) {
            Some(Ok(event)) => self.writer.event(event, &mut out),
            Some(Err(error)) => {
                self.writer.fail(&error.into(), &mut out);
                self.done = true;
            }
            None => {
                self.writer.end(&mut out);
                self.done = true;
            }
        }
        Poll::Ready(Some(out))
    }
}

struct EventBody<S> {
    beat: Bytes,
    pieces: S,
    ticks: Interval,
    /// Something was written since the last tick.
    spoke: bool,
    done: bool,
}

impl<S> EventBody<S> {
    fn new(beat: Bytes, pieces: S, heartbeat: Duration) -> Self {
        let mut ticks = tokio::time::interval(heartbeat);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.reset();
        Self { beat, pieces, ticks, spoke: false, done: false }
    }
}

impl<S: Stream<Item = Vec<u8>> + Unpin> EventBody<S> {
    /// Everything that is ready now, or up to [`PIECE_LEN`] of it.
    fn drain(&mut self, cx: &mut Context<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        while !self.done && out.len() < PIECE_LEN {
            match Pin::new(&mut self.pieces).poll_next(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(piece)) => out.extend(piece),
                Poll::Ready(None) => self.done = true,
            }
        }
        out
    }
}

impl<S: Stream<Item = Vec<u8>> + Unpin> Stream for EventBody<S> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        let out = self.drain(cx);
        if !out.is_empty() {
            self.spoke = true;
            return Poll::Ready(Some(Ok(out.into())));
        }
        if self.done {
            return Poll::Ready(None);
        }
        loop {
            ready!(self.ticks.poll_tick(cx));
            if !std::mem::take(&mut self.spoke) {
                return Poll::Ready(Some(Ok(self.beat.clone())));
            }
        }
    }
}
