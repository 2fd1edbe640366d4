//! Work that takes its time or waits for the disk, on threads beside those that answer: so many at
//! once of each kind, so that none of it keeps all of them.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::error::Error;

/// Threads that may wait which requests take up at most.
pub const THREADS: usize = PROMPTS + READS;
/// Prompts that are encoded at once: more than the cores only share the time and hold the memory.
const PROMPTS: usize = 8;
/// Prompts from this length on take seconds and hundreds of MB; they are encoded
/// [`LONG_PROMPTS`] at a time.
pub(super) const LONG_PROMPT_BYTES: usize = 64 << 10;
const LONG_PROMPTS: usize = 2;
/// Adapters that are read at once. A disk that hangs holds so many threads, and no prompt.
const READS: usize = 2;

/// Places for each kind.
#[derive(Clone)]
pub(super) struct Apart {
    prompts: Arc<Semaphore>,
    long_prompts: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

impl Apart {
    pub fn new() -> Self {
        let places = |count| Arc::new(Semaphore::new(count));
        let (prompts, long_prompts) = (places(PROMPTS), places(LONG_PROMPTS));
        Self { prompts, long_prompts, reads: places(READS) }
    }

    /// Work on a prompt of so many bytes: a long one must not stop other streams, and many of them
    /// must not take all the memory.
    pub async fn encode<T: Send + 'static>(
        &self,
        len_bytes: usize,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        match len_bytes >= LONG_PROMPT_BYTES {
            // In this order: who waits for the first holds no place of the others.
            true => run(&[&self.long_prompts, &self.prompts], work).await,
            false => run(&[&self.prompts], work).await,
        }
    }

    /// Work that reads files.
    pub async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        run(&[&self.reads], work).await
    }
}

/// Takes a place of each of these.
async fn run<T: Send + 'static>(
    places: &[&Arc<Semaphore>],
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let failed = |why: String| Error::Internal(format!("preparing the request failed: {why}"));
    let mut taken = Vec::with_capacity(places.len());
    for places in places {
        let place = Arc::clone(places).acquire_owned().await;
        taken.push(place.map_err(|e| failed(e.to_string()))?);
    }
    let working = tokio::task::spawn_blocking(move || {
        let _taken = taken; // kept to the end even when the client goes away before
        work()
    });
    working.await.unwrap_or_else(|e| Err(failed(e.to_string())))
}
