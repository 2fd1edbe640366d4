//! Who used what: sums by minute, project, key and model, which outlive the process.
//!
//! Requests note what they used when they end, however that was: answered, cut off, failed or
//! cancelled. Nobody waits for it: a thread of its own adds up what has come meanwhile and writes
//! it, so a sum is in the database a moment after the request, and survives `kill -9` from then on.
//! Where the disk is full, sums wait in memory. Whoever reads, reads behind everything that was
//! noted before. Deliberately absent: prices, budgets, and what was asked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::{Duration, Instant};

use crate::error::Error;
pub use crate::store::{Account, Group, UsageQuery, UsageRow, Used, Work};
use crate::store::{Store, StoreError};

/// What could not be written is tried again this often.
const PAUSE: Duration = Duration::from_secs(2);
/// Sums that wait for room on the disk; more of them are lost, and the log says so.
const WAITING_MAX: usize = 100_000;

/// The accounts of one data directory.
pub struct Ledger {
    store: Arc<Store>,
    sender: Sender<Message>,
}

enum Message {
    Note(Account, Used),
    /// Tells when everything before is written, or could not be.
    Flush(SyncSender<()>),
}

impl Ledger {
    /// Over an open store. The thread ends with the last owner.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn open(store: Arc<Store>) -> Result<Self, Error> {
        let (sender, receiver) = mpsc::channel();
        let writes = Arc::clone(&store);
        let thread = std::thread::Builder::new().name("ledger".to_owned());
        let started = thread.spawn(move || write(&writes, &receiver));
        started.map_err(|error| Error::Internal(format!("no thread for the ledger: {error}")))?;
        Ok(Self { store, sender })
    }

    /// Adds to an account, soon.
    pub fn note(&self, account: Account, used: Used) {
        // Without its thread nothing can be written, and the log has said why.
        let _ = self.sender.send(Message::Note(account, used));
    }

    /// Returns when everything that was noted is written. Blocks.
    pub fn flush(&self) {
        let (told, tells) = mpsc::sync_channel(1);
        if self.sender.send(Message::Flush(told)).is_ok() {
            let _ = tells.recv();
        }
    }

    /// Sums by part of the time, with all that was noted before. Blocks, maybe for seconds.
    pub fn usage(&self, query: &UsageQuery) -> Result<Vec<UsageRow>, Error> {
        self.flush();
        Ok(self.store.scan(|tx| tx.usage(query))?)
    }
}

/// Sums that are not written.
type Waiting = BTreeMap<Account, Used>;

fn write(store: &Store, receiver: &Receiver<Message>) {
    let mut waiting = Waiting::new();
    // After a failure, what comes is only added up for a while.
    let mut again: Option<Instant> = None;
    loop {
        let first = match waiting.is_empty() {
            true => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => receiver.recv_timeout(PAUSE),
        };
        let gone = matches!(first, Err(RecvTimeoutError::Disconnected));
        let mut asked = Vec::new();
        for message in first.into_iter().chain(receiver.try_iter()) {
            match message {
                Message::Note(account, used) => add(&mut waiting, account, used),
                Message::Flush(told) => asked.push(told),
            }
        }
        let now = Instant::now();
        if gone || !asked.is_empty() || again.is_none_or(|again| again <= now) {
            again = None;
            match keep(store, &waiting) {
                Ok(()) => waiting.clear(),
                Err(error) => {
                    tracing::error!(%error, "what was used cannot be written now");
                    again = Some(now + PAUSE);
                }
            }
        }
        for told in asked {
            let _ = told.send(()); // who asked may have gone
        }
        if gone {
            return;
        }
    }
}

fn add(waiting: &mut Waiting, account: Account, used: Used) {
    if waiting.len() >= WAITING_MAX && !waiting.contains_key(&account) {
        return tracing::error!(?account, ?used, "no room for what was used: it is lost");
    }
    waiting.entry(account).or_default().add(used);
}

fn keep(store: &Store, waiting: &Waiting) -> Result<(), StoreError> {
    if waiting.is_empty() {
        return Ok(());
    }
    store.write_unflushed(|tx| {
        waiting.iter().try_for_each(|(account, used)| tx.add_usage(account, *used))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::NewKey;
    use crate::types::ProjectId;

    fn account(minute_s: u64, key: i64, model: &str) -> Account {
        let (project, model, tier) = (ProjectId::DEFAULT.0, model.to_owned(), "default");
        Account { minute_s, project, key, model, work: Work::Completions, batch: key == 0, tier }
    }

    fn used(input: u64) -> Used {
        Used { requests: 1, input, cached: 1, output: 2 }
    }

    fn query() -> UsageQuery {
        UsageQuery {
            work: Work::Completions,
            from_s: 0,
            to_s: 7200,
            width_s: 3600,
            only: None,
            projects: Vec::new(),
            keys: Vec::new(),
            models: Vec::new(),
            batch: None,
            groups: Vec::new(),
        }
    }

    fn ledger() -> Ledger {
        let ledger = Ledger::open(Arc::new(Store::in_memory().unwrap())).unwrap();
        for (minute_s, key, model, input) in
            [(0, 1, "a", 1), (60, 1, "a", 2), (60, 1, "a", 4), (60, 2, "b", 8), (3600, 0, "a", 16)]
        {
            ledger.note(account(minute_s, key, model), used(input));
        }
        ledger
    }

    #[test]
    fn sums_are_told_by_part_of_the_time() {
        let rows = ledger().usage(&query()).unwrap();
        let sums: Vec<_> = rows.iter().map(|row| (row.start_s, row.used.input)).collect();
        assert_eq!(sums, [(0, 15), (3600, 16)]);
        assert_eq!(rows[0].used, Used { requests: 4, input: 15, cached: 4, output: 8 });
        assert_eq!((&rows[0].project, &rows[0].key, rows[0].batch), (&None, &None, None));
    }

    #[test]
    fn sums_are_told_apart_and_chosen() {
        let ledger = ledger();
        let ask = |change: &dyn Fn(&mut UsageQuery)| {
            let mut query = query();
            query.to_s = 3600;
            change(&mut query);
            let rows = ledger.usage(&query).unwrap();
            rows.into_iter().map(|row| (row.key.or(row.model), row.used.input)).collect::<Vec<_>>()
        };
        let named = |name: &str, input| (Some(name.to_owned()), input);
        let by_key = ask(&|query| query.groups = vec![Group::Key]);
        assert_eq!(by_key, [named("key_1", 7), named("key_2", 8)]);
        let by_model = ask(&|query| query.groups = vec![Group::Model]);
        assert_eq!(by_model, [named("a", 7), named("b", 8)]);
        assert_eq!(ask(&|query| query.keys = vec![2]), [(None, 8)]);
        assert_eq!(ask(&|query| query.models = vec!["a".into(), "c".into()]), [(None, 7)]);
        assert_eq!(ask(&|query| query.from_s = 60), [(None, 14)]);
        assert_eq!(ask(&|query| query.batch = Some(true)), []);
        assert_eq!(ask(&|query| query.projects = vec!["default".into()]), [(None, 15)]);
        assert_eq!(ask(&|query| query.projects = vec!["other".into()]), []);
        assert_eq!(ask(&|query| query.only = Some(ProjectId(2))), []);
        assert_eq!(ask(&|query| query.work = Work::Embeddings), []);
    }

    /// A project that is not there yet stands for a disk that is full: what names it cannot be
    /// written, nor can what waits beside it.
    #[test]
    fn what_cannot_be_written_rests_and_is_written_once() {
        let store = Arc::new(Store::in_memory().unwrap());
        let ledger = Ledger::open(Arc::clone(&store)).unwrap();
        let written = || store.scan(|tx| tx.usage(&query())).unwrap();
        let begun = Instant::now();
        ledger.note(account(0, 1, "a"), used(1));
        ledger.note(Account { project: 2, ..account(0, 1, "b") }, used(10));
        ledger.flush();
        assert_eq!(written(), [], "it could not be written");
        let new = NewKey::named("k", "other");
        let made: Result<i64, StoreError> = store.write(|tx| tx.insert_key(&new, &[0; 32], "", 1));
        made.unwrap();
        let mut more = 0;
        while written().is_empty() {
            assert!(begun.elapsed() < 10 * PAUSE, "it was given up");
            ledger.note(account(60 * more, 1, "a"), used(100));
            more += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(begun.elapsed() >= PAUSE, "it did not rest, but was tried with every request");
        let sums = ledger.usage(&UsageQuery { to_s: 60 * more + 3600, ..query() }).unwrap();
        let mut all = Used::default();
        sums.iter().for_each(|row| all.add(row.used));
        let requests = 2 + more;
        let input = 11 + 100 * more;
        assert_eq!(all, Used { requests, input, cached: requests, output: 2 * requests });
    }

    #[test]
    fn old_minutes_become_days_and_days_stay_what_they_are() {
        const DAY: u64 = 86_400;
        let ledger = Ledger::open(Arc::new(Store::in_memory().unwrap())).unwrap();
        // Two accounts of two days and the morning of a third, midnight included.
        for minute in (0..49 * 60).step_by(20) {
            ledger.note(account(minute * 60, 1, "a"), used(minute + 1));
            ledger.note(account(minute * 60, 2, "b"), used(1));
        }
        let ask = |width_s: u64, groups: &[Group]| {
            let groups = groups.to_vec();
            let query = UsageQuery { to_s: 3 * DAY, width_s, groups, ..query() };
            ledger.usage(&query).unwrap()
        };
        let by_model = [Group::Model];
        let days = ask(DAY, &by_model);
        assert_eq!(days.len(), 6);
        let hours = ask(3600, &[]);
        let fold = || ledger.store.write(|tx| tx.fold_usage(2 * DAY)).unwrap();
        for hour in 0..48 {
            assert!(fold(), "hour {hour}");
            assert_eq!(ask(DAY, &by_model), days, "hour {hour}");
        }
        assert!(!fold() && !fold());
        assert_eq!(ask(DAY, &by_model), days);
        // What is not old is told apart by minute, what is stands in its first hour.
        let folded = ask(3600, &[]);
        let starts: Vec<_> = folded.iter().map(|row| row.start_s).collect();
        assert_eq!(starts, [0, DAY, 2 * DAY]);
        assert_eq!(folded[2], hours[48]);
        // A sum that comes late is of its day, too.
        ledger.note(account(DAY + 60, 1, "a"), used(5));
        ledger.flush();
        assert!(fold() && !fold());
        assert_eq!(ask(3600, &[])[1].used.input, folded[1].used.input + 5);
    }

    #[test]
    fn sums_outlive_the_process_and_go_on() {
        let folder = tempfile::tempdir().unwrap();
        for round in 1..=2 {
            let store = Arc::new(Store::open(folder.path()).unwrap());
            let ledger = Ledger::open(store).unwrap();
            ledger.note(account(0, 1, "a"), used(5));
            assert_eq!(ledger.usage(&query()).unwrap()[0].used.input, 5 * round);
        }
    }
}
