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

use super::objects::{self, Chunks};
use crate::error::Error;
use crate::pipeline::TextEvent;

/// Answers with a stream. `heartbeat` is the longest silence but for one more of the same.
pub(super) fn response<S>(events: S, chunks: Chunks, heartbeat: Duration) -> Response
where
    S: Stream<Item = Result<TextEvent, Error>> + Send + Unpin + 'static,
{
    pieces(Written { events, chunks, done: false }, heartbeat)
}

/// Answers with a stream of pieces, each of whole events.
pub(super) fn pieces<S>(pieces: S, heartbeat: Duration) -> Response
where
    S: Stream<Item = Vec<u8>> + Send + Unpin + 'static,
{
    let mut response = Response::new(Body::from_stream(EventBody::new(pieces, heartbeat)));
    let headers = response.headers_mut();
    let event_stream = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, event_stream);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks reverse proxies not to hold text back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

const HEARTBEAT: &[u8] = b": heartbeat\n\n";

/// A piece of the body is sent once it is at least this long, even if more is ready.
const PIECE_LEN: usize = 16 * 1024;

/// The events of a generation, written down.
struct Written<S> {
    events: S,
    chunks: Chunks,
    done: bool,
}

impl<S: Stream<Item = Result<TextEvent, Error>> + Unpin> Stream for Written<S> {
    type Item = Vec<u8>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        let mut out = Vec::new();
        match ready!(Pin::new(&mut self.events).poll_next(cx)) {
            Some(Ok(event)) => self.chunks.event(event, &mut out),
            Some(Err(error)) => {
                objects::fail(&error.into(), &mut out);
                self.done = true;
            }
            None => {
                self.chunks.end(&mut out);
                self.done = true;
            }
        }
        Poll::Ready(Some(out))
    }
}

struct EventBody<S> {
    pieces: S,
    ticks: Interval,
    /// Something was written since the last tick.
    spoke: bool,
    done: bool,
}

impl<S> EventBody<S> {
    fn new(pieces: S, heartbeat: Duration) -> Self {
        let mut ticks = tokio::time::interval(heartbeat);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.reset();
        Self { pieces, ticks, spoke: false, done: false }
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
                return Poll::Ready(Some(Ok(Bytes::from_static(HEARTBEAT))));
            }
        }
    }
}
