//! What is over leaves, a little at a time, so that nobody waits for it: objects that have expired,
//! with their contents, and minutes of usage that are so old that their day is enough.
//!
//! Expired objects are shown to nobody, however late this comes to them. Runs on a task of its
//! caller's runtime; what waits for the disk goes to a thread that may. Deliberately absent: what
//! has which end, and giving the space of the database back, which holds all others up.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::files::Files;
use crate::store::Store;
use crate::types::unix_now_s;

/// Threads that may wait which this takes up.
pub(super) const THREADS: usize = 1;
/// Objects that are removed in one transaction.
const MOST: usize = 200;
/// Between two transactions, while there is more.
const PAUSE: Duration = Duration::from_millis(50);
/// Between two looks for more.
const AGAIN: Duration = Duration::from_secs(600);
/// Minutes of usage are told apart for so many days.
const MINUTES_DAYS: u64 = 90;
const DAY_S: u64 = 24 * 3600;

/// Sweeps until it is dropped.
pub async fn sweep(store: Arc<Store>, files: Arc<Files>) {
    loop {
        let (store, files) = (Arc::clone(&store), Arc::clone(&files));
        let done = tokio::task::spawn_blocking(move || piece(&store, &files)).await;
        let more = match done {
            Ok(Ok(more)) => more,
            Ok(Err(error)) => {
                tracing::warn!(%error, "what has expired cannot be removed now");
                false
            }
            Err(error) => {
                tracing::error!(%error, "what has expired was not removed");
                false
            }
        };
        tokio::time::sleep(if more { PAUSE } else { AGAIN }).await;
    }
}

/// A little of it. Says whether there is more.
fn piece(store: &Store, files: &Files) -> Result<bool, Error> {
    let swept = files.sweep(MOST)?;
    let before_s = (unix_now_s() / DAY_S).saturating_sub(MINUTES_DAYS) * DAY_S;
    let folded = store.write_unflushed(|tx| tx.fold_usage(before_s))?;
    Ok(swept >= MOST || folded)
}
