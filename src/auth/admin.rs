//! Making and revoking keys.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};

use crate::error::Error;
use crate::store::{KeyRow, NewKey, Store};
use crate::types::unix_now_s;

/// Every key that we make begins so.
pub const PREFIX: &str = "sk-hearth-";
/// Names of keys and projects are for people and lists.
const NAME_CHARS_MAX: usize = 64;

/// A new key. This is the only time that it is seen: the table has its hash.
#[derive(Debug)]
pub struct Created {
    /// What clients send.
    pub secret: String,
    /// What the table has.
    pub row: KeyRow,
}

/// Makes a key.
///
/// # Errors
/// A field of `new` is empty, too long, zero or in the past, by its name.
pub fn create(store: &Store, new: &NewKey) -> Result<Created, Error> {
    check(new)?;
    let mut random = [0; 32];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|_| Error::Internal("the system has no randomness".to_owned()))?;
    let secret = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(random));
    let hint = &secret[secret.len() - 4..];
    let row = store.write(|tx| -> Result<_, Error> {
        let id = tx.insert_key(new, &hash(&secret), hint, unix_now_s())?;
        tx.key(id)?.ok_or_else(|| Error::Internal("the new key is not there".to_owned()))
    })?;
    Ok(Created { secret, row })
}

/// All keys that ever were, oldest first.
pub fn list(store: &Store) -> Result<Vec<KeyRow>, Error> {
    store.read(|tx| Ok(tx.keys()?))
}

/// Revokes the key that is named `key_<number>`, or whose name is unique among those not revoked.
pub fn revoke(store: &Store, which: &str) -> Result<KeyRow, Error> {
    let missing = || Error::NotFound { what: "API key", id: which.to_owned() };
    store.write(|tx| {
        let rows = tx.keys()?;
        let by_id = rows.iter().find(|row| id_of(row) == which);
        let by_name = || {
            let mut named = rows.iter().filter(|r| r.key.name == which && r.revoked_s.is_none());
            match (named.next(), named.next()) {
                (Some(_), Some(_)) => {
                    let message = format!("There are several keys named '{which}'; use the id.");
                    Err(Error::invalid("key", message))
                }
                (found, _) => found.ok_or_else(missing),
            }
        };
        let id = by_id.map_or_else(by_name, Ok)?.id;
        tx.revoke_key(id, unix_now_s())?;
        tx.key(id)?.ok_or_else(missing)
    })
}

/// What a key is called outside.
pub fn id_of(row: &KeyRow) -> String {
    format!("key_{}", row.id)
}

/// What the table has of a key.
pub(super) fn hash(secret: &str) -> [u8; 32] {
    let digest = digest(&SHA256, secret.as_bytes());
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes; this is a bug")
}

fn check(new: &NewKey) -> Result<(), Error> {
    for (param, text) in [("name", &new.name), ("project", &new.project)] {
        let len = text.chars().count();
        if text.trim().is_empty() || len > NAME_CHARS_MAX || text.contains(char::is_control) {
            let message =
                format!("Invalid '{param}': expected 1 to {NAME_CHARS_MAX} printable characters.");
            return Err(Error::invalid(param, message));
        }
    }
    let limits = [
        ("weight", Some(new.weight)),
        ("max_running", new.max_running),
        ("requests_per_min", new.requests_per_min),
        ("tokens_per_min", new.tokens_per_min),
        ("queue_timeout_s", new.queue_timeout_s),
    ];
    if let Some((param, _)) = limits.iter().find(|(_, limit)| *limit == Some(0)) {
        return Err(Error::invalid(*param, format!("Invalid '{param}': must be at least 1.")));
    }
    if new.expires_s.is_some_and(|expires_s| expires_s <= unix_now_s()) {
        return Err(Error::invalid("expires_at", "Invalid 'expires_at': that is in the past."));
    }
    Ok(())
}
