//! The running choices of a request as one stream of events.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use super::Meter;
use super::TextEvent;
use super::choice::Choice;
use crate::error::Error;
use crate::types::{Place, TokenId};

/// The running choices of one request. Dropping it cancels them.
pub struct TextStream {
    pub(super) choices: Vec<Choice>,
    pub(super) prompt: Vec<TokenId>,
    pub(super) meter: Arc<Meter>,
    pub(super) place: Place,
    /// Where the next round begins, so that no choice starves the others.
    pub(super) next: usize,
}

impl TextStream {
    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// What its choices have used, of those that were dropped.
    pub fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    /// The prompt as the model sees it.
    pub fn prompt_ids(&self) -> &[TokenId] {
        &self.prompt
    }

    /// Where it came into the queue.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The next event of any choice; `None` after every choice has finished.
    pub async fn next(&mut self) -> Option<Result<TextEvent, Error>> {
        poll_fn(|cx| {
            let count = self.choices.len();
            let mut open = false;
            for step in 0..count {
                let place = (self.next + step) % count;
                match self.choices[place].poll(cx) {
                    Poll::Ready(Some(event)) => {
                        self.next = (place + 1) % count;
                        return Poll::Ready(Some(event));
                    }
                    Poll::Ready(None) => {}
                    Poll::Pending => open = true,
                }
            }
            if open { Poll::Pending } else { Poll::Ready(None) }
        })
        .await
    }
}
