//! Random names for requests and objects: `chatcmpl-...`, `cmpl-...`, `req_...`.
//!
//! SipHash with the process's random keys over a counter: never repeats by accident and tells an
//! outsider nothing. Not a secret: nothing may be authorised by knowing one.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// `prefix` and 32 random hexadecimal digits.
pub(super) fn random(prefix: &str) -> String {
    static KEYS: OnceLock<[RandomState; 2]> = OnceLock::new();
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let [high, low] = KEYS.get_or_init(|| [RandomState::new(), RandomState::new()]);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}{:016x}{:016x}", high.hash_one(n), low.hash_one(n))
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_have_their_prefix_and_differ() {
        let names: std::collections::HashSet<_> =
            (0..1000).map(|_| super::random("chatcmpl-")).collect();
        assert_eq!(names.len(), 1000);
        assert!(names.iter().all(|name| name.len() == 41 && name.starts_with("chatcmpl-")));
    }
}
