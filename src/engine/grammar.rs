//! Grammars as the engine knows them: a set of allowed tokens after every token.
//!
//! A [`MaskSource`] follows one sequence. It lives on a thread of its own, so that the set for the
//! next token is found while the model computes the logits that it will be laid over. A sequence
//! whose set is late keeps its logits and waits; nobody waits with it. Deliberately absent: what a
//! grammar is made of.

#[cfg(test)]
pub(super) mod tests;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::types::TokenId;

/// What an answer must look like. Every sequence of it starts a source of its own.
pub trait Grammar: fmt::Debug + Send + Sync {
    /// At the beginning of an answer.
    fn start(&self) -> Box<dyn MaskSource>;
}

/// A grammar that follows one answer.
pub trait MaskSource: Send {
    /// Takes the token that was chosen.
    fn advance(&mut self, token: TokenId);

    /// What may come next.
    fn allowed(&mut self) -> Allowed;
}

/// What may come next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Anything.
    Any,
    /// One of these.
    Only(Mask),
    /// Nothing: the answer is complete.
    End,
    /// The grammar cannot go on, because of this.
    Failed(String),
}

/// A set of tokens: bit `i % 32` of word `i / 32` is token `i`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask(pub Vec<u32>);

impl Mask {
    /// Makes every other token impossible. Logits beyond the set's last word are not in it.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        let mut words = self.0.iter();
        for row in logits.chunks_mut(32) {
            match words.next().copied().unwrap_or(0) {
                u32::MAX => {}
                0 => row.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in row.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

type State = (Box<dyn MaskSource>, Allowed);

/// One request to find a set.
struct Job {
    source: Box<dyn MaskSource>,
    token: Option<TokenId>,
    reply: mpsc::SyncSender<State>,
}

/// The thread that finds the sets of one engine. Ends when the last handle to it is dropped.
#[derive(Clone)]
pub(super) struct Masks {
    jobs: mpsc::Sender<Job>,
}

impl Masks {
    pub fn spawn() -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::Builder::new().name("hearth-grammar".into()).spawn(move || {
            for Job { mut source, token, reply } in queue {
                let allowed = catch_unwind(AssertUnwindSafe(|| {
                    if let Some(token) = token {
                        source.advance(token);
                    }
                    source.allowed()
                }));
                let failed = |_| Allowed::Failed("the grammar's parser panicked".to_owned());
                // A sequence that ended meanwhile does not listen any more.
                let _ = reply.send((source, allowed.unwrap_or_else(failed)));
            }
        })?;
        Ok(Self { jobs })
    }
}

/// The grammar of one sequence, wherever it is.
pub(super) struct Guide {
    masks: Masks,
    place: Place,
}

enum Place {
    Here(Box<dyn MaskSource>, Allowed),
    Away(mpsc::Receiver<State>),
    /// Its thread is gone.
    Lost,
}

impl Guide {
    /// Starts to find the first set.
    pub fn new(grammar: &dyn Grammar, masks: &Masks) -> Self {
        let mut guide = Self { masks: masks.clone(), place: Place::Lost };
        guide.ask(grammar.start(), None);
        guide
    }

    /// What may come next, if that is known by now, or within `patience`.
    pub fn allowed(&mut self, patience: Duration) -> Option<&Allowed> {
        const LOST: &Allowed = &Allowed::Failed(String::new());
        if let Place::Away(reply) = &self.place {
            let state = match patience.is_zero() {
                true => reply.try_recv().map_err(|e| e == mpsc::TryRecvError::Disconnected),
                false => reply
                    .recv_timeout(patience)
                    .map_err(|e| e == mpsc::RecvTimeoutError::Disconnected),
            };
            match state {
                Ok((source, allowed)) => self.place = Place::Here(source, allowed),
                Err(false) => return None,
                Err(true) => self.place = Place::Lost,
            }
        }
        match &self.place {
            Place::Here(_, allowed) => Some(allowed),
            Place::Away(_) | Place::Lost => Some(LOST),
        }
    }

    /// Takes the chosen token and starts to find the next set.
    pub fn advance(&mut self, token: TokenId) {
        if let Place::Here(source, _) = std::mem::replace(&mut self.place, Place::Lost) {
            self.ask(source, Some(token));
        }
    }

    fn ask(&mut self, source: Box<dyn MaskSource>, token: Option<TokenId>) {
        let (reply, answer) = mpsc::sync_channel(1);
        self.place = match self.masks.jobs.send(Job { source, token, reply }) {
            Ok(()) => Place::Away(answer),
            Err(_) => Place::Lost,
        };
    }
}
