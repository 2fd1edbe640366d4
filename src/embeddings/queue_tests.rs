//! The queue of an encoder that says its tokens back.

use std::sync::Mutex;

use hearth_models::EncoderConfig;

use super::*;
use crate::embeddings::{Dimensions, Pooling};

/// Who comes without a key.
const NOBODY: Tenant = Tenant {
    id: 0,
    weight: 1,
    max_running: None,
    queue_timeout_s: None,
    project: crate::types::ProjectId::DEFAULT,
    background: false,
};

/// Says its tokens back, after it was let go; panics on token 9, fails on 8.
struct Echo {
    config: EncoderConfig,
    gate: Mutex<Receiver<()>>,
    batches: Arc<Mutex<Vec<Vec<u32>>>>,
}

impl TextEncoder for Echo {
    fn config(&self) -> &EncoderConfig {
        &self.config
    }

    fn forward(&self, batch: &EncoderBatch) -> hearth_models::Result<Vec<f32>> {
        self.gate.lock().unwrap().recv().expect("the test opens the gate");
        self.batches.lock().unwrap().push(batch.tokens.clone());
        assert!(!batch.tokens.contains(&9), "token nine");
        if batch.tokens.contains(&8) {
            return Err(hearth_models::Error::Batch("token eight".into()));
        }
        Ok(batch.tokens.iter().flat_map(|id| [*id as f32, 1.0]).collect())
    }
}

/// A queue of two places, or more, and passes of four rows; the gate; the batches so far.
struct World {
    queue: Queue,
    thread: JoinHandle<()>,
    gate: Sender<()>,
    batches: Arc<Mutex<Vec<Vec<u32>>>>,
}

fn world() -> World {
    world_of(2)
}

fn world_of(queue_len: usize) -> World {
    let (gate, closed) = mpsc::channel();
    let batches = Arc::<Mutex<Vec<Vec<u32>>>>::default();
    let config = EncoderConfig {
        family: "echo",
        hidden_len: 2,
        ffn_len: 1,
        layer_count: 1,
        head_count: 1,
        vocab_len: 10,
        context_len: 4,
        type_count: 1,
        norm_eps: 0.0,
        gelu: hearth_models::backend::Gelu::Erf,
        names: Default::default(),
    };
    let model = Echo { config, gate: Mutex::new(closed), batches: Arc::clone(&batches) };
    let settings = Settings {
        pooling: Pooling::Mean,
        normalize: false,
        context_len: 4,
        dimensions: Dimensions::Whole,
    };
    let bounds = Bounds { queue_len, batch_tokens: 4 };
    let (queue, thread) = start(Box::new(model), settings, bounds).unwrap();
    World { queue, thread, gate, batches }
}

impl World {
    fn open(&self, passes: usize) {
        (0..passes).for_each(|_| self.gate.send(()).unwrap());
    }
}

#[tokio::test]
async fn a_long_request_and_a_short_one_share_passes() {
    let world = world();
    let long =
        world.queue.submit(NOBODY, vec![vec![1, 1], vec![2, 2], vec![3], vec![4, 6]]).unwrap();
    let short = world.queue.submit(NOBODY, vec![vec![5, 7]]).unwrap();
    world.open(9);
    assert_eq!(short.wait().await.unwrap(), [[6.0, 1.0]]);
    let want = [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [5.0, 1.0]];
    assert_eq!(long.wait().await.unwrap(), want);
    let batches = world.batches.lock().unwrap().clone();
    assert!(batches.iter().all(|batch| batch.len() <= 4), "{batches:?}");
    let position = |id: u32| batches.iter().position(|batch| batch.contains(&id)).unwrap();
    assert!(position(5) < position(4), "{batches:?}");
    assert_eq!(world.queue.stats().texts.load(Ordering::Relaxed), 5);
    assert_eq!(world.queue.stats().computed_tokens.load(Ordering::Relaxed), 9);
}

#[tokio::test]
async fn a_full_waiting_room_says_when_to_come_back_and_empties() {
    let world = world();
    let first = world.queue.submit(NOBODY, vec![vec![1]]).unwrap();
    let second = world.queue.submit(NOBODY, vec![vec![2]]).unwrap();
    let error = world.queue.submit(NOBODY, vec![vec![3]]).unwrap_err();
    let SubmitError::QueueFull { waiting, retry_after } = error else { panic!("{error}") };
    assert_eq!((waiting, retry_after), (2, Duration::from_secs(1)));
    world.open(9);
    first.wait().await.unwrap();
    second.wait().await.unwrap();
    assert!(world.queue.submit(NOBODY, vec![vec![3]]).is_ok());
}

#[tokio::test]
async fn who_leaves_is_not_computed() {
    let world = world();
    let first = world.queue.submit(NOBODY, vec![vec![1, 1, 1, 1]]).unwrap();
    while world.queue.stats().waiting.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    drop(world.queue.submit(NOBODY, vec![vec![2]]).unwrap());
    world.open(9);
    first.wait().await.unwrap();
    world.queue.submit(NOBODY, vec![vec![3]]).unwrap().wait().await.unwrap();
    assert!(!world.batches.lock().unwrap().concat().contains(&2));
    assert_eq!(world.queue.stats().cancelled.load(Ordering::Relaxed), 1);
}

/// Two of three passes: the second had begun. A pass that fails is nobody's.
#[tokio::test]
async fn what_was_computed_for_who_left_is_known() {
    let world = world();
    let left = world.queue.submit(NOBODY, vec![vec![1; 4], vec![2; 3], vec![3; 4]]).unwrap();
    let computed = left.computed();
    let tokens = || computed.load(Ordering::Relaxed);
    assert!(tokens() <= 4, "it waits at the gate");
    world.open(1);
    while tokens() < 7 {
        tokio::task::yield_now().await;
    }
    drop(left);
    world.open(9);
    let failed = world.queue.submit(NOBODY, vec![vec![8]]).unwrap();
    let of_failed = failed.computed();
    failed.wait().await.unwrap_err();
    assert_eq!((tokens(), of_failed.load(Ordering::Relaxed)), (7, 0));
    assert!(!world.batches.lock().unwrap().concat().contains(&3));
}

#[tokio::test]
async fn a_failing_pass_fails_its_requests_and_no_other() {
    for (bad, word) in [(8, "token eight"), (9, "token nine")] {
        let world = world();
        world.open(9);
        let message =
            world.queue.submit(NOBODY, vec![vec![bad]]).unwrap().wait().await.unwrap_err();
        assert!(message.contains(word), "{message}");
        let good = world.queue.submit(NOBODY, vec![vec![4]]).unwrap().wait().await;
        assert_eq!(good.unwrap(), [[4.0, 1.0]]);
        assert_eq!(world.queue.stats().failures.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test]
async fn draining_finishes_what_waits() {
    let world = world();
    let vectors = world.queue.submit(NOBODY, vec![vec![1], vec![2, 2, 2, 2]]).unwrap();
    world.queue.drain();
    world.open(9);
    assert_eq!(vectors.wait().await.unwrap().len(), 2);
    world.thread.join().unwrap();
    assert_eq!(world.queue.submit(NOBODY, vec![vec![1]]).unwrap_err(), SubmitError::ShuttingDown);
    assert_eq!(world.queue.stats().waiting.load(Ordering::Relaxed), 0);
}

/// The door and the turns of keys: one with two hundred requests keeps nobody out, and nobody waits
/// for more than its own share of them.
#[tokio::test]
async fn a_greedy_key_neither_fills_the_room_nor_is_computed_first() {
    let world = world_of(16);
    let key = |id| Tenant { id, ..NOBODY };
    let mut greedy = Vec::new();
    while let Ok(vectors) = world.queue.submit(key(1), vec![vec![1, 1, 1, 1]; 3]) {
        greedy.push(vectors);
    }
    assert_eq!(greedy.len(), 14, "an eighth of the places is for others");
    let other = world.queue.submit(key(2), vec![vec![2, 2, 2, 2]]).unwrap();
    assert!(world.queue.submit(key(2), vec![vec![2]]).is_err(), "one of it is here");
    world.open(50);
    other.wait().await.unwrap();
    let batches = world.batches.lock().unwrap().clone();
    let before = batches.iter().position(|batch| batch.contains(&2)).unwrap();
    // The thread may have begun with what was there, and chosen once more before it looked.
    assert!(before <= 2, "{batches:?}");
    for vectors in greedy {
        vectors.wait().await.unwrap();
    }
    assert!(world.queue.tenants.lock().is_empty(), "places are given back");
}
