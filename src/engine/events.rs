//! What a sequence tells its client, and how much of that nobody has read yet.
//!
//! The engine never waits in a channel, so these have no bound. What is in them is counted instead,
//! in bytes and over all answers of a request: a sequence whose request has more unread than
//! [`UNREAD_MAX`] stands aside (`readers`) until half of that is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;

use super::door::Guest;
use crate::types::{FinishReason, Timings, TokenId, Usage};

/// Bytes of unread events from which on the sequences of a request stand aside. Thousands of
/// tokens; a reader who reads at all is never so far behind.
pub(super) const UNREAD_MAX: usize = 512 << 10;

/// Bytes of them that nobody minds once an answer is over: no more than its connection takes.
pub(super) const UNREAD_LITTLE: usize = 16 << 10;

/// Log-probability of a token under the raw distribution, and of the best alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Natural logarithm.
    pub logprob: f32,
    /// Best first.
    pub top: Vec<(TokenId, f32)>,
}

/// What a running sequence tells its client, in this order: one `Prompt`, any number of `Token`,
/// one `Finished`; or `Failed` or `Expired` instead of what is left of that.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt is computed.
    Prompt {
        /// Tokens of it that were found in the prefix cache.
        cached: usize,
        /// Log-probabilities of its tokens `1..`, (the first has none); empty unless asked for. All
        /// answers to one prompt share them.
        logprobs: Arc<[Logprobs]>,
    },
    /// A generated token. The stop token itself is reported, so that text can decide to hide it.
    Token {
        /// The token.
        id: TokenId,
        /// Present when asked for.
        logprobs: Option<Logprobs>,
        /// It was expected there.
        expected: bool,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens used.
        usage: Usage,
        /// Where the time went.
        timings: Timings,
    },
    /// The step that computed this sequence failed; nothing more will come.
    Failed(String),
    /// It waited too long and was not begun; nothing will come.
    Expired {
        /// How long it waited.
        waited: Duration,
    },
}

impl Event {
    /// Nothing comes after it.
    fn is_last(&self) -> bool {
        match self {
            Self::Finished { .. } | Self::Failed(_) | Self::Expired { .. } => true,
            Self::Prompt { .. } | Self::Token { .. } => false,
        }
    }

    /// About what it takes while nobody reads it.
    fn bytes(&self) -> usize {
        const TOP: usize = size_of::<(TokenId, f32)>();
        let of = |l: &Logprobs| size_of::<Logprobs>() + l.top.capacity() * TOP;
        let more = match self {
            Self::Prompt { logprobs, .. } => logprobs.iter().map(of).sum(),
            Self::Token { logprobs, .. } => logprobs.as_ref().map_or(0, of),
            Self::Failed(message) => message.capacity(),
            Self::Finished { .. } | Self::Expired { .. } => 0,
        };
        size_of::<Self>() + more
    }
}

/// A way from the engine to a client. `unread` is shared by all answers of a request; the `guest`
/// has left once all is read.
pub(super) fn channel(unread: &Arc<AtomicUsize>, guest: Arc<Guest>) -> (Outbox, Inbox) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (Outbox { sender, unread: Arc::clone(unread) }, Inbox { receiver, guest: Some(guest) })
}

/// Bytes that count as unread until this is dropped: by whoever reads the event, or with the
/// channel, whose other answers they burden no longer.
#[derive(Debug)]
struct Weight {
    bytes: usize,
    unread: Arc<AtomicUsize>,
}

impl Weight {
    fn new(bytes: usize, unread: &Arc<AtomicUsize>) -> Self {
        unread.fetch_add(bytes, Ordering::Relaxed);
        Self { bytes, unread: Arc::clone(unread) }
    }
}

impl Drop for Weight {
    fn drop(&mut self) {
        self.unread.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The engine's end.
#[derive(Debug)]
pub(super) struct Outbox {
    sender: mpsc::UnboundedSender<(Event, Weight)>,
    unread: Arc<AtomicUsize>,
}

impl Outbox {
    /// A closed channel is seen as cancellation before the next step.
    pub fn send(&self, event: Event) {
        let weight = Weight::new(event.bytes(), &self.unread);
        let _ = self.sender.send((event, weight));
    }

    /// Nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Bytes of the whole request that wait for its client.
    pub fn unread(&self) -> usize {
        self.unread.load(Ordering::Relaxed)
    }
}

/// The client's end.
#[derive(Debug)]
pub(super) struct Inbox {
    receiver: mpsc::UnboundedReceiver<(Event, Weight)>,
    /// `None` once the end was read.
    guest: Option<Arc<Guest>>,
}

impl Inbox {
    pub async fn next(&mut self) -> Option<Event> {
        let told = self.receiver.recv().await;
        self.read(told)
    }

    pub fn blocking_next(&mut self) -> Option<Event> {
        let told = self.receiver.blocking_recv();
        self.read(told)
    }

    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.receiver.poll_recv(cx).map(|told| self.read(told))
    }

    /// Takes nothing more. What was not read yet.
    pub fn close(&mut self) -> impl Iterator<Item = Event> {
        self.receiver.close();
        std::iter::from_fn(|| self.receiver.try_recv().ok().map(|(event, _)| event))
    }

    fn read(&mut self, told: Option<(Event, Weight)>) -> Option<Event> {
        let event = told.map(|(event, _)| event);
        if event.as_ref().is_none_or(Event::is_last) {
            self.guest = None;
        }
        event
    }
}
