//! What was answered and not taken: a whole answer is in memory until its client has read it.
//!
//! A stream is made as it is read. An answer in one piece is not, and a client may be long about
//! it as long as it takes something now and then, over as many connections as it likes. So the
//! bytes of all that is not sent have a bound, and those of one key a part of it: beyond that
//! nothing more is answered until some of it is read. A key is turned away at the door, before
//! anything is computed for it, while an eighth of its part is free: what it asked before that has
//! room when it is done, unless it is more, or longer. What the system takes at once is not
//! counted, so probes are answered whatever others leave unread.
//!
//! What is collected until it is whole, of many choices perhaps with all that was probable, counts
//! from the beginning, by about what it will be as JSON; and has a bound of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use futures_util::stream::{BoxStream, StreamExt};

use super::error::ApiError;
use super::listen::SEND_BUFFER;
use crate::error::Error;
use crate::pipeline::{TextEvent, TokenLogprob};

/// Bytes of all answers that are not sent, or one answer that is longer.
const UNSENT_MAX: usize = 256 << 20;
/// The part of them that one key may have, where there are keys; and all who send none.
const SHARE: usize = 4;
/// Bytes of one answer that is collected: no more than a key may have, so it can have it.
const COLLECTED_MAX: usize = UNSENT_MAX / SHARE;
/// The part of what one may have that is for answers that are still computed.
const SPARE: usize = 8;
/// After that time it is worth asking again.
const RETRY: Duration = Duration::from_secs(1);

/// Whose answers: a tenant's, or of those of whom no key is wanted.
pub(super) type Whose = Option<u64>;

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Unsent(Arc<Mutex<HashMap<Whose, Pile>>>);

/// Those of one tenant; never empty.
#[derive(Clone, Copy, Debug, Default)]
struct Pile {
    answers: usize,
    bytes: usize,
}

impl Unsent {
    /// Whether one of these may ask for more; what others leave unread is no reason that not.
    pub fn admit(&self, whose: Whose) -> Result<(), Error> {
        let own = self.piles().get(&whose).copied();
        let own = own.map(|own| (whose, own)).into_iter().collect();
        room_for(share(whose) / SPARE, whose, &own)
    }

    /// Counts an answer in one piece until it is sent, unless the system takes all of it at once.
    ///
    /// # Errors
    /// There is no room for it until others are read.
    pub async fn hold(&self, response: Response, whose: Whose) -> Result<Response, ApiError> {
        let Some(len) = response.body().size_hint().exact() else { return Ok(response) };
        if len <= SEND_BUFFER as u64 {
            return Ok(response);
        }
        let held = self.take(usize::try_from(len).unwrap_or(usize::MAX), whose)?;
        let (head, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await;
        let bytes = bytes.map_err(|error| Error::Internal(error.to_string()))?;
        Ok(Response::from_parts(head, Body::from(Bytes::from_owner(Answer { bytes, _held: held }))))
    }

    /// The same events, counted as long as this lives: whoever takes them collects them. Scores of
    /// a prompt are told so many times.
    ///
    /// # Errors
    /// Instead of an event: there is no room for it, or it never will be.
    pub fn count(
        &self,
        events: BoxStream<'static, Result<TextEvent, Error>>,
        whose: Whose,
        times: usize,
    ) -> BoxStream<'static, Result<TextEvent, Error>> {
        let (unsent, mut held) = (self.clone(), None);
        let counted = events.map(move |event| {
            let event = event?;
            let bytes = match &event {
                TextEvent::Prompt { tokens, .. } => json_bytes(tokens) * times,
                event => bytes(event),
            };
            if held.is_none() {
                held = Some(unsent.take(0, whose)?);
            }
            held.iter_mut().try_for_each(|held| held.grow(bytes))?;
            Ok(event)
        });
        counted.boxed()
    }

    fn take(&self, bytes: usize, whose: Whose) -> Result<Held, Error> {
        let mut piles = self.piles();
        room_for(bytes, whose, &piles)?;
        let pile = piles.entry(whose).or_default();
        pile.answers += 1;
        pile.bytes += bytes;
        Ok(Held { unsent: self.clone(), whose, bytes })
    }

    /// Counts are whole whoever panicked beside them.
    fn piles(&self) -> MutexGuard<'_, HashMap<Whose, Pile>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that these may leave unread.
fn share(whose: Whose) -> usize {
    if whose == Some(0) { UNSENT_MAX } else { UNSENT_MAX / SHARE }
}

/// Whether so much more of these may wait. Where nothing does, anything may.
fn room_for(bytes: usize, whose: Whose, piles: &HashMap<Whose, Pile>) -> Result<(), Error> {
    let own = piles.get(&whose).copied().unwrap_or_default();
    let (mut answers, mut all) = (0, 0);
    for pile in piles.values() {
        answers += pile.answers;
        all += pile.bytes;
    }
    let retry_after = RETRY;
    if own.bytes > 0 && own.bytes.saturating_add(bytes) > share(whose) {
        return Err(Error::Unread { unread: own.answers, retry_after });
    }
    match all > 0 && all.saturating_add(bytes) > UNSENT_MAX {
        true => Err(Error::QueueFull { waiting: answers, retry_after }),
        false => Ok(()),
    }
}

/// Counted until it is dropped.
#[derive(Debug)]
struct Held {
    unsent: Unsent,
    whose: Whose,
    bytes: usize,
}

impl Held {
    /// Of an answer that is collected.
    fn grow(&mut self, bytes: usize) -> Result<(), Error> {
        if self.bytes + bytes > COLLECTED_MAX {
            let message = format!(
                "Invalid 'stream': an answer that is not streamed, is stored, or is told again at \
                 its end has at most {} MiB, and this one has more. Stream it, or ask for fewer \
                 choices or log-probabilities.",
                COLLECTED_MAX >> 20
            );
            return Err(Error::invalid("stream", message));
        }
        let mut piles = self.unsent.piles();
        room_for(bytes, self.whose, &piles)?;
        if let Some(pile) = piles.get_mut(&self.whose) {
            pile.bytes += bytes;
            self.bytes += bytes;
        }
        Ok(())
    }
}

/// About what an event adds to an answer.
fn bytes(event: &TextEvent) -> usize {
    match event {
        TextEvent::Delta { text, logprobs, .. }
        | TextEvent::Reasoning { text, logprobs, .. }
        | TextEvent::ToolArguments { text, logprobs, .. } => text.len() + json_bytes(logprobs),
        TextEvent::Echo { text, .. } => text.len(),
        TextEvent::Prompt { tokens, .. } => json_bytes(tokens),
        TextEvent::Tokens { ids, .. } => 8 * ids.len(),
        TextEvent::ToolCall { id, name, .. } => id.len() + name.len(),
        TextEvent::Finished { .. } => 0,
    }
}

/// Tokens are told with names and numbers, each as a text and byte by byte.
fn json_bytes(tokens: &[TokenLogprob]) -> usize {
    const EACH: usize = 64;
    let of = |bytes: &[u8]| EACH + 6 * bytes.len();
    let all = |token: &TokenLogprob| token.top.iter().map(|top| of(&top.bytes)).sum::<usize>();
    tokens.iter().map(|token| of(&token.bytes) + all(token)).sum()
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut piles = self.unsent.piles();
        if let Some(pile) = piles.get_mut(&self.whose) {
            pile.answers -= 1;
            pile.bytes -= self.bytes;
            if pile.answers == 0 {
                piles.remove(&self.whose);
            }
        }
    }
}

/// The bytes of an answer. The connection lets go of them when the last one is written.
struct Answer {
    bytes: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    fn answer(len: usize) -> Response {
        Response::new(Body::from(vec![b'x'; len]))
    }

    #[tokio::test]
    async fn an_answer_counts_until_its_bytes_are_gone() {
        let unsent = Unsent::default();
        let len = SEND_BUFFER + 1;
        let held = unsent.hold(answer(len), Some(1)).await.unwrap();
        assert_eq!(held.body().size_hint().exact(), Some(len as u64));
        let bytes = axum::body::to_bytes(held.into_body(), len).await.unwrap();
        let pile = |unsent: &Unsent| unsent.piles().get(&Some(1)).map(|pile| pile.bytes);
        let part = bytes.slice(len - 1..);
        drop(bytes);
        assert_eq!(pile(&unsent), Some(len), "its end is not sent");
        drop(part);
        assert_eq!(pile(&unsent), None);
        let short = unsent.hold(answer(SEND_BUFFER), Some(1)).await.unwrap();
        let stream = Body::from_stream(futures_util::stream::pending::<Result<Bytes, Error>>());
        let stream = unsent.hold(Response::new(stream), Some(1)).await.unwrap();
        assert_eq!(pile(&unsent), None);
        drop((short, stream));
    }

    #[tokio::test]
    async fn a_connection_holds_its_answer_until_it_is_taken() {
        const LEN: usize = 16 << 20; // more than the system takes at once
        let unsent = Unsent::default();
        let counts = unsent.clone();
        let handler = move || async move { counts.hold(answer(LEN), Some(1)).await };
        let router = axum::Router::new().fallback(handler);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        let mut client = TcpStream::connect(address).await.unwrap();
        let ask = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        client.write_all(ask).await.unwrap();
        client.readable().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let pile = || unsent.piles().get(&Some(1)).map(|pile| pile.bytes);
        assert_eq!(pile(), Some(LEN), "nobody has read it");
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.unwrap();
        assert!(got.len() > LEN && got.starts_with(b"HTTP/1.1 200"));
        let begun = Instant::now();
        while pile().is_some() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", pile());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn what_is_let_in_has_room_when_it_is_computed() {
        for (whose, part) in [(Some(1), UNSENT_MAX / SHARE), (Some(0), UNSENT_MAX)] {
            let unsent = Unsent::default();
            let most = unsent.take(part - part / SPARE, whose).unwrap();
            assert!(unsent.admit(whose).is_ok(), "an eighth is free");
            let one = unsent.take(part / SPARE / 2, whose).unwrap();
            let refused = unsent.admit(whose).unwrap_err();
            assert!(matches!(refused, Error::Unread { unread: 2, .. }), "{refused}");
            let late = unsent.take(part / SPARE / 2, whose);
            assert!(late.is_ok(), "it was on its way");
            drop((one, late));
            assert!(unsent.admit(whose).is_ok());
            drop(most);
        }
    }

    #[test]
    fn a_key_has_a_part_and_all_have_a_bound() {
        const PART: usize = UNSENT_MAX / SHARE;
        let unsent = Unsent::default();
        let take = |bytes, whose| unsent.take(bytes, whose);
        let first = take(PART, Some(1)).unwrap();
        let refused = take(1, Some(1)).unwrap_err();
        assert!(matches!(refused, Error::Unread { unread: 1, .. }), "{refused}");
        assert!(unsent.admit(Some(1)).is_err() && unsent.admit(Some(2)).is_ok());
        let others = [Some(2), Some(3), None].map(|whose| take(PART, whose).unwrap());
        let refused = take(1, Some(4)).unwrap_err();
        assert!(matches!(refused, Error::QueueFull { waiting: 4, .. }), "{refused}");
        drop(first);
        assert!(unsent.admit(Some(1)).is_ok(), "there is room again");
        drop(others);
        assert!(unsent.piles().is_empty());
        let long = take(2 * UNSENT_MAX, Some(1)).unwrap();
        assert!(take(1, Some(2)).is_err(), "one that is longer may be alone");
        drop(long);
        let half = take(UNSENT_MAX / 2, Some(0)).unwrap();
        assert!(take(UNSENT_MAX / 2, Some(0)).is_ok(), "who has no key may be many");
        drop(half);
    }

    fn tokens(count: usize) -> Result<TextEvent, Error> {
        Ok(TextEvent::Tokens { choice: 0, ids: vec![7; count] })
    }

    #[tokio::test]
    async fn what_is_collected_counts_from_the_beginning_and_has_a_bound() {
        const PART: usize = COLLECTED_MAX / 8; // ids
        let unsent = Unsent::default();
        let count = |events: Vec<_>, whose| {
            unsent.count(futures_util::stream::iter(events).boxed(), whose, 1)
        };
        let mut half = count(vec![tokens(10), tokens(PART / 2)], Some(1));
        assert!(half.next().await.is_some() && half.next().await.unwrap().is_ok());
        assert_eq!(unsent.piles()[&Some(1)].bytes, 80 + PART / 2 * 8);
        // A second one finds the rest of what its key may have; another key hears nothing of it.
        let refused = count(vec![tokens(PART)], Some(1)).next().await.unwrap().unwrap_err();
        assert!(matches!(refused, Error::Unread { unread: 2, .. }), "{refused}");
        let mut growing = count(vec![tokens(10), tokens(PART)], Some(1));
        assert!(growing.next().await.unwrap().is_ok());
        assert!(growing.next().await.unwrap().is_err());
        assert!(count(vec![tokens(PART / 2)], Some(2)).next().await.unwrap().is_ok());
        drop((half, growing));
        assert!(unsent.piles().is_empty());
        // No room helps one that is longer than all that it may have.
        for first in [10, PART + 1] {
            let mut long = count(vec![tokens(first), tokens(PART)], Some(1));
            let mut last = long.next().await.unwrap();
            if last.is_ok() {
                last = long.next().await.unwrap();
            }
            let Error::InvalidValue { param, .. } = last.unwrap_err() else { panic!("{first}") };
            assert_eq!(param, "stream");
        }
    }

    #[test]
    fn bytes_of_tokens_are_about_those_of_their_json() {
        use crate::pipeline::TopLogprob;
        let text = || "token".to_owned();
        let top = TopLogprob { id: 1, text: text(), bytes: text().into(), logprob: -12.345_678 };
        let (text, bytes, chars, logprob) = (text(), text().into(), 5, Some(-12.345_678));
        let token = [TokenLogprob { id: 1, text, bytes, chars, logprob, top: vec![top; 20] }];
        let json = super::super::chat::whole_choice(0, "", "", &[], Some(&token), "stop");
        let (guess, real) = (json_bytes(&token), json.to_string().len());
        assert!((real / 2..real * 2).contains(&guess), "{guess} for {real}");
    }
}
