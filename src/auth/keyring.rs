//! From a bearer token to whoever sent it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::admin::hash;
use super::limits::Limiter;
use crate::error::Error;
use crate::store::{KeyRow, Store};
use crate::types::{ProjectId, Tenant, unix_now_s};

/// The table is read again this often: what another process revokes is shut out within a second.
const FRESH: Duration = Duration::from_millis(500);

/// Whoever makes a request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Whose objects it sees.
    pub project: ProjectId,
    /// Its place in the queue.
    pub tenant: Tenant,
    /// It may manage keys.
    pub admin: bool,
    /// What it may use in a minute; `None` is as much as it likes.
    pub limiter: Option<Arc<Limiter>>,
}

/// Why a request may not in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// A key is wanted and none was sent.
    Missing,
    /// Nobody's key.
    Unknown,
    /// It was one, and is revoked.
    Revoked,
    /// It was one, until lately.
    Expired,
}

/// All keys that open this server.
pub struct Keyring {
    store: Arc<Store>,
    /// Hashes of keys that stand on the command line and in no table.
    ephemeral: Vec<[u8; 32]>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    read: Option<Instant>,
    rows: Arc<Vec<KeyRow>>,
    limiters: HashMap<i64, Arc<Limiter>>,
}

impl Keyring {
    /// Keys of the table, and `ephemeral` ones, which belong to the default project, may not
    /// manage keys, and have no limits.
    pub fn new(store: Arc<Store>, ephemeral: &[String]) -> Self {
        let ephemeral = ephemeral.iter().map(|key| hash(key)).collect();
        Self { store, ephemeral, state: Mutex::default() }
    }

    /// Whether anybody may in. Never again after the first key was made, even if all are revoked.
    pub fn is_open(&self) -> Result<bool, Error> {
        Ok(self.ephemeral.is_empty() && self.rows()?.is_empty())
    }

    /// Who sent this token.
    pub fn caller(&self, bearer: Option<&str>) -> Result<Result<Caller, Denied>, Error> {
        let rows = self.rows()?;
        if self.ephemeral.is_empty() && rows.is_empty() {
            return Ok(Ok(default_caller(0)));
        }
        let Some(bearer) = bearer else { return Ok(Err(Denied::Missing)) };
        let given = hash(bearer);
        if let Some(place) = find(self.ephemeral.iter(), &given) {
            return Ok(Ok(default_caller(u64::MAX - place as u64)));
        }
        let Some(place) = find(rows.iter().map(|row| &row.hash), &given) else {
            return Ok(Err(Denied::Unknown));
        };
        let row = &rows[place];
        Ok(still_opens(row).map(|()| self.known(row)))
    }

    /// Whether the key that began some work still opens anything. What came without a key of the
    /// table goes on.
    pub fn still(&self, tenant: Tenant) -> Result<Result<(), Denied>, Error> {
        let Some(key) = tenant.row() else { return Ok(Ok(())) };
        let rows = self.rows()?;
        let row = rows.iter().find(|row| row.id == key);
        Ok(row.map_or(Err(Denied::Unknown), still_opens))
    }

    /// Reads the table again at the next request, because this process has changed it.
    pub fn forget(&self) {
        self.state().read = None;
    }

    /// Where keys are kept.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// What a key may use in a minute, by the tenant that it is, for work that its own request has
    /// left behind; `None` is as much as it likes.
    pub fn limiter(&self, tenant: Tenant) -> Result<Option<Arc<Limiter>>, Error> {
        let rows = self.rows()?;
        let row = rows.iter().find(|row| Some(row.id) == tenant.row());
        Ok(row.and_then(|row| self.limiter_of(row)))
    }

    fn limiter_of(&self, row: &KeyRow) -> Option<Arc<Limiter>> {
        let (requests, tokens) = (row.key.requests_per_min, row.key.tokens_per_min);
        if (requests, tokens) == (None, None) {
            return None;
        }
        let fresh = || Arc::new(Limiter::new(requests, tokens, Instant::now()));
        Some(Arc::clone(self.state().limiters.entry(row.id).or_insert_with(fresh)))
    }

    fn known(&self, row: &KeyRow) -> Caller {
        let limiter = self.limiter_of(row);
        let tenant = Tenant {
            // The table counts from 1.
            id: row.id.unsigned_abs(),
            weight: row.key.weight,
            max_running: row.key.max_running.map(|max| max as usize),
            queue_timeout_s: row.key.queue_timeout_s,
            project: row.project,
            background: false,
        };
        Caller { project: row.project, tenant, admin: row.key.admin, limiter }
    }

    fn rows(&self) -> Result<Arc<Vec<KeyRow>>, Error> {
        let mut state = self.state();
        if state.read.is_none_or(|read| read.elapsed() > FRESH) {
            state.rows = Arc::new(self.store.read(|tx| tx.keys())?);
            state.read = Some(Instant::now());
        }
        Ok(Arc::clone(&state.rows))
    }

    /// Whoever panicked in here left old rows at worst.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn still_opens(row: &KeyRow) -> Result<(), Denied> {
    if row.revoked_s.is_some() {
        return Err(Denied::Revoked);
    }
    match row.key.expires_s {
        Some(expires_s) if expires_s <= unix_now_s() => Err(Denied::Expired),
        _ => Ok(()),
    }
}

fn default_caller(id: u64) -> Caller {
    let tenant = Tenant { id, ..Tenant::default() };
    Caller { project: ProjectId::DEFAULT, tenant, admin: false, limiter: None }
}

/// Looks at every byte of every hash, so that the time taken tells nothing about any.
fn find<'a>(hashes: impl Iterator<Item = &'a [u8; 32]>, given: &[u8; 32]) -> Option<usize> {
    hashes.enumerate().fold(None, |found, (place, hash)| {
        let differ = hash.iter().zip(given).fold(0, |differ, (a, b)| differ | (a ^ b));
        if std::hint::black_box(differ) == 0 { Some(place) } else { found }
    })
}

#[cfg(test)]
mod tests {
    use super::super::admin;
    use super::*;
    use crate::store::NewKey;

    fn new(name: &str) -> NewKey {
        let (max_running, requests_per_min) = (Some(2), Some(60));
        NewKey { weight: 3, max_running, requests_per_min, ..NewKey::named(name, name) }
    }

    fn store() -> Arc<Store> {
        Arc::new(Store::in_memory().unwrap())
    }

    #[test]
    fn without_any_key_everybody_is_the_default_project() {
        let ring = Keyring::new(store(), &[]);
        assert!(ring.is_open().unwrap());
        for bearer in [None, Some("anything")] {
            let caller = ring.caller(bearer).unwrap().unwrap();
            assert_eq!((caller.project, caller.tenant), (ProjectId::DEFAULT, Tenant::default()));
            assert!(!caller.admin && caller.limiter.is_none());
        }
    }

    #[test]
    fn ephemeral_keys_are_tenants_of_the_default_project() {
        let ring = Keyring::new(store(), &["sk-one".into(), "sk-two".into()]);
        assert!(!ring.is_open().unwrap());
        let one = ring.caller(Some("sk-one")).unwrap().unwrap();
        let two = ring.caller(Some("sk-two")).unwrap().unwrap();
        assert_eq!(one.project, ProjectId::DEFAULT);
        assert_ne!(one.tenant.id, two.tenant.id);
        assert_eq!(ring.caller(Some("sk-on")).unwrap().unwrap_err(), Denied::Unknown);
        assert_eq!(ring.caller(None).unwrap().unwrap_err(), Denied::Missing);
    }

    #[test]
    fn a_key_brings_its_project_weight_and_limits() {
        let store = store();
        let made = admin::create(&store, &new("class")).unwrap();
        let ring = Keyring::new(store, &[]);
        let caller = ring.caller(Some(&made.secret)).unwrap().unwrap();
        assert_eq!(caller.project, made.row.project);
        assert_ne!(caller.project, ProjectId::DEFAULT);
        assert_eq!((caller.tenant.weight, caller.tenant.max_running), (3, Some(2)));
        // One limiter for all requests of a key.
        let again = ring.caller(Some(&made.secret)).unwrap().unwrap();
        let limiter = again.limiter.unwrap();
        assert!(Arc::ptr_eq(&caller.limiter.unwrap(), &limiter));
        let later = ring.limiter(caller.tenant.in_background()).unwrap().unwrap();
        assert!(Arc::ptr_eq(&later, &limiter));
        assert!(ring.limiter(Tenant::default()).unwrap().is_none());
    }

    #[test]
    fn the_database_does_not_have_the_key() {
        let store = store();
        let made = admin::create(&store, &new("a")).unwrap();
        let rows = format!("{:?}", admin::list(&store).unwrap());
        assert!(made.secret.len() > 50 && !rows.contains(&made.secret[..20]));
        assert_ne!(admin::create(&store, &new("a")).unwrap().secret, made.secret);
    }

    #[test]
    fn what_another_process_revokes_is_out_within_a_second_and_the_door_stays_shut() {
        let folder = tempfile::tempdir().unwrap();
        let here = Arc::new(Store::open(folder.path()).unwrap());
        let there = Store::open(folder.path()).unwrap();
        let ring = Keyring::new(here, &[]);
        assert!(ring.is_open().unwrap());
        let made = admin::create(&there, &new("a")).unwrap();
        let within_a_second = |wanted: Option<Denied>| {
            let started = Instant::now();
            while ring.caller(Some(&made.secret)).unwrap().err() != wanted
                || ring.is_open().unwrap()
            {
                assert!(started.elapsed() < Duration::from_secs(1));
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        within_a_second(None);
        admin::revoke(&there, "a").unwrap();
        within_a_second(Some(Denied::Revoked));
        assert_eq!(ring.caller(None).unwrap().unwrap_err(), Denied::Missing);
    }

    #[test]
    fn an_expired_key_opens_nothing() {
        let store = store();
        let soon = NewKey { expires_s: Some(unix_now_s() + 1), ..new("a") };
        let made = admin::create(&store, &soon).unwrap();
        let ring = Keyring::new(store, &[]);
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(ring.caller(Some(&made.secret)).unwrap().unwrap_err(), Denied::Expired);
    }

    #[test]
    fn keys_with_wrong_fields_are_refused_by_name() {
        let store = store();
        let refused = |key: NewKey| match admin::create(&store, &key).unwrap_err() {
            Error::InvalidValue { param, .. } => param,
            other => panic!("{other}"),
        };
        assert_eq!(refused(NewKey { name: " ".into(), ..new("a") }), "name");
        assert_eq!(refused(NewKey { project: "x".repeat(65), ..new("a") }), "project");
        assert_eq!(refused(NewKey { weight: 0, ..new("a") }), "weight");
        assert_eq!(refused(NewKey { requests_per_min: Some(0), ..new("a") }), "requests_per_min");
        assert_eq!(refused(NewKey { expires_s: Some(1), ..new("a") }), "expires_at");
        assert!(matches!(admin::revoke(&store, "nobody"), Err(Error::NotFound { .. })));
        for _ in 0..2 {
            admin::create(&store, &new("twin")).unwrap();
        }
        assert!(matches!(admin::revoke(&store, "twin"), Err(Error::InvalidValue { .. })));
        assert!(admin::revoke(&store, "key_1").unwrap().revoked_s.is_some());
    }
}
