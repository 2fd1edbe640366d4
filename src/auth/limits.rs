//! How much a key may use in a minute: one bucket of requests, one of tokens.
//!
//! A bucket holds a minute's worth, is refilled evenly, and a request passes while something is in
//! it. A request is counted when it comes, a token when it is computed, because nobody knows before
//! how long an answer will be; so the tokens of running answers can take a bucket below zero, and
//! the next request waits until the debt is paid. Time is passed in. Counts live in memory: a
//! restart fills the buckets.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;

const MINUTE: Duration = Duration::from_secs(60);

/// The buckets of one key.
#[derive(Debug)]
pub struct Limiter {
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    per_min: u32,
    level: f64,
    at: Instant,
}

/// What a client is told about one bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// In a minute.
    pub limit: u32,
    /// Left now.
    pub remaining: u32,
    /// Until the bucket is full again.
    pub reset: Duration,
}

impl Limiter {
    /// Full buckets.
    pub fn new(requests_per_min: Option<u32>, tokens_per_min: Option<u32>, now: Instant) -> Self {
        let bucket = |per_min: u32| Bucket { per_min, level: per_min.into(), at: now };
        let (requests, tokens) = (requests_per_min.map(bucket), tokens_per_min.map(bucket));
        Self { buckets: Mutex::new(Buckets { requests, tokens }) }
    }

    /// Counts a request, or says when to come back.
    pub fn request(&self, now: Instant) -> Result<(), Error> {
        let Buckets { requests, tokens } = &mut *self.buckets();
        // Neither is taken from before both agree.
        for (bucket, unit, least) in [(&mut *requests, "requests", 1.0), (tokens, "tokens", 0.001)]
        {
            let Some(bucket) = bucket else { continue };
            bucket.fill(now);
            if bucket.level < least {
                let standing = bucket.standing();
                let (limit, used) = (standing.limit, standing.limit - standing.remaining);
                let retry_after = bucket.time_for(least - bucket.level);
                return Err(Error::RateLimited { unit, limit, used, retry_after });
            }
        }
        if let Some(requests) = requests {
            requests.level -= 1.0;
        }
        Ok(())
    }

    /// Counts tokens that were computed.
    pub fn tokens(&self, count: usize, now: Instant) {
        if let Some(bucket) = &mut self.buckets().tokens {
            bucket.fill(now);
            bucket.level -= count as f64;
        }
    }

    /// Requests and tokens as they stand.
    pub fn standing(&self, now: Instant) -> [Option<Standing>; 2] {
        let Buckets { requests, tokens } = &mut *self.buckets();
        [requests, tokens].map(|bucket| {
            let bucket = bucket.as_mut()?;
            bucket.fill(now);
            Some(bucket.standing())
        })
    }

    /// Whoever panicked in here left numbers that are whole.
    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bucket {
    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        let full = f64::from(self.per_min);
        self.level = (self.level + full * passed.as_secs_f64() / MINUTE.as_secs_f64()).min(full);
        self.at = self.at.max(now);
    }

    fn time_for(&self, count: f64) -> Duration {
        MINUTE.mul_f64(count.max(0.0) / f64::from(self.per_min))
    }

    fn standing(&self) -> Standing {
        Standing {
            limit: self.per_min,
            remaining: self.level.max(0.0) as u32,
            reset: self.time_for(f64::from(self.per_min) - self.level),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(limiter: &Limiter, now: Instant) -> Option<(&'static str, Duration)> {
        match limiter.request(now) {
            Ok(()) => None,
            Err(Error::RateLimited { unit, retry_after, .. }) => Some((unit, retry_after)),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_minute_has_so_many_requests_and_each_comes_back_in_its_time() {
        let start = Instant::now();
        let limiter = Limiter::new(Some(4), None, start);
        for left in [3, 2, 1, 0] {
            assert_eq!(wait(&limiter, start), None);
            let standing = limiter.standing(start)[0].unwrap();
            assert_eq!((standing.limit, standing.remaining), (4, left));
            assert_eq!(standing.reset, Duration::from_secs(15 * (4 - u64::from(left))));
        }
        assert_eq!(wait(&limiter, start), Some(("requests", Duration::from_secs(15))));
        let almost = start + Duration::from_millis(14_900);
        assert!(wait(&limiter, almost).is_some());
        assert_eq!(wait(&limiter, start + Duration::from_secs(15)), None);
        assert!(limiter.standing(start)[1].is_none());
    }

    #[test]
    fn a_debt_of_tokens_is_paid_before_the_next_request() {
        let start = Instant::now();
        let limiter = Limiter::new(None, Some(600), start);
        assert_eq!(wait(&limiter, start), None);
        limiter.tokens(900, start);
        let standing = limiter.standing(start)[1].unwrap();
        assert_eq!((standing.remaining, standing.reset), (0, Duration::from_secs(90)));
        let (unit, after) = wait(&limiter, start).unwrap();
        assert_eq!((unit, after.as_secs()), ("tokens", 30));
        // What it was told is true.
        assert_eq!(wait(&limiter, start + after + Duration::from_millis(1)), None);
    }

    #[test]
    fn a_bucket_is_never_more_than_full_and_a_clock_that_goes_back_changes_nothing() {
        let start = Instant::now();
        let limiter = Limiter::new(Some(2), None, start);
        let later = start + Duration::from_secs(3600);
        assert_eq!(limiter.standing(later)[0].unwrap().remaining, 2);
        assert!(wait(&limiter, later).is_none() && wait(&limiter, later).is_none());
        assert!(wait(&limiter, start).is_some());
        assert_eq!(limiter.standing(start)[0].unwrap().remaining, 0);
    }

    #[test]
    fn a_refused_request_counts_nothing() {
        let start = Instant::now();
        let limiter = Limiter::new(Some(5), Some(10), start);
        limiter.tokens(20, start);
        for _ in 0..3 {
            assert_eq!(wait(&limiter, start).unwrap().0, "tokens");
        }
        assert_eq!(limiter.standing(start)[0].unwrap().remaining, 5);
    }
}
