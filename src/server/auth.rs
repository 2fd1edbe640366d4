//! API keys: whoever has configured some wants one of them in `Authorization: Bearer ...`.
//!
//! Deliberately absent: projects, roles and limits, which are a room of their own.

use std::hash::{BuildHasher, RandomState};

use axum::http::{HeaderMap, header};

use super::error::ApiError;

/// The keys that open `/v1`. None configured: it is open.
///
/// Keys are compared by a keyed hash first and byte by byte only where the hashes agree, and never
/// with an early exit, so the time taken says nothing about how much of a guess was right.
pub(super) struct Keys {
    hasher: RandomState,
    keys: Vec<(u64, String)>,
}

impl Keys {
    pub(super) fn new(keys: Vec<String>) -> Self {
        let hasher = RandomState::new();
        let keys = keys.into_iter().map(|key| (hasher.hash_one(&key), key)).collect();
        Self { hasher, keys }
    }

    /// Lets a request pass, or says what is wrong with its key.
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.keys.is_empty() {
            return Ok(());
        }
        match bearer(headers) {
            Some(key) if self.knows(key) => Ok(()),
            Some(_) => Err(ApiError::unauthorized("Incorrect API key provided.")),
            None => Err(ApiError::unauthorized(
                "You didn't provide an API key. Send it in the header \
                 'Authorization: Bearer YOUR_KEY'.",
            )),
        }
    }

    fn knows(&self, given: &str) -> bool {
        let hash = self.hasher.hash_one(given);
        self.keys.iter().fold(false, |known, (h, key)| known | (*h == hash && key == given))
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn without_keys_everybody_may_in() {
        assert!(Keys::new(vec![]).check(&HeaderMap::new()).is_ok());
        assert!(Keys::new(vec![]).check(&with("Bearer anything")).is_ok());
    }

    #[test]
    fn with_keys_only_their_bearers() {
        let keys = Keys::new(vec!["sk-one".into(), "sk-two".into()]);
        for good in ["Bearer sk-one", "Bearer sk-two", "bearer sk-two"] {
            assert!(keys.check(&with(good)).is_ok(), "{good}");
        }
        for bad in ["Bearer sk-on", "Bearer sk-onee", "Bearer ", "Bearer", "Basic sk-one", "sk-one"]
        {
            let error = keys.check(&with(bad)).unwrap_err();
            assert_eq!((error.status.as_u16(), error.code), (401, Some("invalid_api_key")));
        }
        assert!(keys.check(&HeaderMap::new()).unwrap_err().message.contains("didn't provide"));
    }
}
