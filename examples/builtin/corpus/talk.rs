//! Small talk, help about Hearth, refusals: fixed answers to a few ways of asking.

use super::world::World;
use super::{Conversation, Task};

/// One answer and what it answers.
pub struct Talk {
    pub say: &'static [&'static str],
    pub answer: &'static str,
}

/// One to three exchanges.
pub fn talk(world: &mut World<'_>) -> Conversation {
    let mut conversation = Conversation::new(Task::Talk, world.lang);
    let talks = world.lang.talks();
    for _ in 0..1 + world.rng.below(3) {
        let talk = &talks[world.rng.below(talks.len())];
        conversation.exchange(world.rng.pick(talk.say), talk.answer);
    }
    conversation
}
