//! The running choices of one request, as one stream of events.
//!
//! Where more choices are made than the client gets, nothing can be told before all have ended:
//! events are kept, and those of the best are given then.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use super::choice::Choice;
use super::{TextEvent, TextRequest};
use crate::engine::handle::{GenerateRequest, Generation};
use crate::error::Error;
use crate::registry::ServedModel;
use crate::types::{Place, TokenId};

/// The running choices of one request. Dropping it cancels them.
pub struct TextStream {
    choices: Vec<Choice>,
    prompt: Vec<TokenId>,
    place: Place,
    /// Where the next round begins, so that no choice starves the others.
    next: usize,
    contest: Option<Contest>,
}

/// More candidates than choices.
struct Contest {
    /// How many win.
    n: usize,
    /// What all of them said; after the end, what is left of the winners.
    events: VecDeque<TextEvent>,
    decided: bool,
}

impl TextStream {
    pub(super) fn new(
        model: &Arc<ServedModel>,
        request: &TextRequest,
        template: GenerateRequest,
        generations: Vec<Generation>,
    ) -> Self {
        let place = generations.first().map_or_else(Place::default, |g| g.place);
        let choice =
            |(index, generation)| Choice::new(index, generation, model, request, &template);
        let choices = generations.into_iter().enumerate().map(choice).collect();
        let contest = (request.best_of > request.n).then(|| {
            let (events, decided) = (VecDeque::new(), false);
            Contest { n: request.n, events, decided }
        });
        Self { choices, prompt: template.prompt, place, next: 0, contest }
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.len()
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
        while self.contest.as_ref().is_some_and(|contest| !contest.decided) {
            let event = self.any().await;
            let contest = self.contest.as_mut()?;
            match event {
                Some(Ok(event)) => contest.events.push_back(event),
                Some(Err(error)) => return Some(Err(error)),
                None => contest.decide(&self.choices),
            }
        }
        match &mut self.contest {
            Some(contest) => contest.events.pop_front().map(Ok),
            None => self.any().await,
        }
    }

    async fn any(&mut self) -> Option<Result<TextEvent, Error>> {
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

impl Contest {
    /// The candidates with the highest mean log-probability win, and are numbered by it. What the
    /// others cost is counted with the first winner.
    fn decide(&mut self, candidates: &[Choice]) {
        self.decided = true;
        let mean = |i: &usize| candidates[*i].mean_logprob();
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        order.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        let rank = |candidate: usize| order.iter().position(|c| *c == candidate);
        let mut wasted = 0;
        self.events.retain_mut(|event| {
            let choice = event.choice_mut();
            *choice = rank(*choice).unwrap_or(usize::MAX);
            let wins = *choice < self.n;
            if let (false, TextEvent::Finished { usage, .. }) = (wins, &event) {
                wasted += usage.completion;
            }
            wins
        });
        for event in &mut self.events {
            if let TextEvent::Finished { choice: 0, usage, .. } = event {
                usage.completion += wasted;
            }
        }
    }
}
