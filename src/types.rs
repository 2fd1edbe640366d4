//! Names that every room shares. A leaf: imports nothing of ours.
//!
//! A token id stays a plain `u32` because tokenizers, kernels and models all speak in slices of
//! them; everything that is easily taken for something else is a newtype.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Index of a token in the model's vocabulary.
pub type TokenId = u32;

/// One sequence inside one engine. Never reused while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// One block of KV storage (a fixed number of consecutive tokens of one sequence).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Which requests of a tenant go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// When there is nothing else to do for the tenant.
    Flex,
    /// As most.
    #[default]
    Default,
    /// Before the tenant's others.
    Priority,
}

/// Whose keys and values may be lent to whom: sequences of one scope share the prefixes that they
/// have in common, others never do. (Every loaded model has a pool of its own.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CacheScope {
    /// Generation of the adapter that runs on the model; 0 without one.
    pub adapter: u64,
    /// The tenant, where tenants are isolated from each other; 0 where they share.
    pub tenant: u64,
}

/// Whose objects a request may see. Every stored object belongs to exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProjectId(pub i64);

impl ProjectId {
    /// The project of whoever needs no key, or has one that stands in no table.
    pub const DEFAULT: Self = Self(1);
}

/// Whose request it is, as far as sharing the machine goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Requests of one id share a place in the queue. 0 is everybody without a key of their own.
    pub id: u64,
    /// Share beside other tenants that want the machine too.
    pub weight: u32,
    /// Requests of it that run at once, or stand aside; more wait.
    pub max_running: Option<usize>,
    /// Seconds after which one that was not begun is told so, where the server does not say less.
    pub queue_timeout_s: Option<u32>,
    /// Requests of one project find each other's prompts in the prefix cache, and nobody else's.
    pub project: ProjectId,
    /// Nobody waits for its answers: everybody else's requests go first.
    pub background: bool,
}

impl Tenant {
    /// Keys of the table count from 1 up, those of the command line from the top down.
    const APART: u64 = 1 << 62;

    /// The same key's work in the background, which has a place of its own in the queue.
    pub fn in_background(self) -> Self {
        Self { id: self.id ^ Self::APART, queue_timeout_s: None, background: true, ..self }
    }

    /// The key that it is, whether or not somebody waits.
    pub fn key(&self) -> u64 {
        if self.background { self.id ^ Self::APART } else { self.id }
    }

    /// How many of a waiting room's places it leaves to others, when so many are its own: an eighth
    /// is for those of whom nobody is here yet, and work in the background fills a quarter. Those
    /// without a key are one tenant, and may be the only one.
    pub fn leaves(&self, places: usize, own: usize) -> usize {
        match own {
            0 => 0,
            _ if self.background => places - places / 4,
            _ if self.id != 0 => places / 8,
            _ => 0,
        }
    }

    /// Number of its key in the table; `None` for whoever came without one of it.
    pub fn row(self) -> Option<i64> {
        i64::try_from(self.key()).ok().filter(|id| *id > 0)
    }
}

impl Default for Tenant {
    fn default() -> Self {
        let project = ProjectId::DEFAULT;
        Self {
            id: 0,
            weight: 1,
            max_running: None,
            queue_timeout_s: None,
            project,
            background: false,
        }
    }
}

/// How long a model that nobody asks for stays in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepAlive {
    /// This long after its last request.
    For(Duration),
    /// Until its memory is needed for another.
    Forever,
}

impl KeepAlive {
    /// Any negative number is for ever. `None` for what is no length of time.
    pub fn from_secs(seconds: f64) -> Option<Self> {
        match seconds < 0.0 {
            true => Some(Self::Forever),
            false => Duration::try_from_secs_f64(seconds).ok().map(Self::For),
        }
    }
}

impl FromStr for KeepAlive {
    type Err = &'static str;

    /// `300`, `5m`, `1h30m`, `250ms`, `-1`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const UNITS: [(&str, f64); 4] = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        let told = "is not seconds, nor a time such as 90s, 5m or 1h30m, nor -1 for ever";
        let (sign, mut rest) = text.strip_prefix('-').map_or((1.0, text), |rest| (-1.0, rest));
        if let Ok(seconds) = rest.parse::<u32>() {
            return Self::from_secs(sign * f64::from(seconds)).ok_or(told);
        }
        if rest.is_empty() {
            return Err(told);
        }
        let mut seconds = 0.0;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(told)?;
            let (number, after) = rest.split_at(digits);
            let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
            let (unit, after) = after.split_at(letters);
            let unit = UNITS.iter().find(|(name, _)| *name == unit).ok_or(told)?.1;
            seconds += number.parse::<f64>().map_err(|_| told)? * unit;
            rest = after;
        }
        Self::from_secs(sign * seconds).ok_or(told)
    }
}

impl fmt::Display for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(time) => write!(f, "{}s", time.as_secs_f64()),
            Self::Forever => f.write_str("-1"),
        }
    }
}

/// Seconds of Unix time.
pub fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seq-{}", self.0)
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
    /// The answer is calls of tools.
    ToolCalls,
}

impl FinishReason {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// Sampling fields as a client, or a model's generation config, gives them.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "the fields of the sampler's parameters, optional")]
pub struct SamplingOverrides {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<usize>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Vec<(TokenId, f32)>,
    pub seed: Option<u64>,
}

/// What was known of the queue when a request came in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Sequences whose turn comes before.
    pub position: usize,
    /// How long that takes, as fast as it goes; `None` where it has to wait and no answer is over
    /// yet.
    pub wait: Option<Duration>,
}

/// Tokens that a request used. All counts are tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of the prompt whose KV came out of the prefix cache.
    pub cached: usize,
    /// Tokens generated, the stop token included.
    pub completion: usize,
}

/// Where the time of a request went, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// From submission to the first step that computed a token of it.
    pub queue_ms: f64,
    /// From there to the first generated token.
    pub prefill_ms: f64,
    /// From there to the last one.
    pub decode_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_to_stay_are_read_as_people_write_them() {
        let time = |ms: u64| Ok(KeepAlive::For(Duration::from_millis(ms)));
        let cases = [
            ("0", time(0)),
            ("300", time(300_000)),
            ("5m", time(300_000)),
            ("1h30m", time(5_400_000)),
            ("1.5h", time(5_400_000)),
            ("250ms", time(250)),
            ("-1", Ok(KeepAlive::Forever)),
            ("-5m", Ok(KeepAlive::Forever)),
        ];
        for (text, want) in cases {
            assert_eq!(text.parse(), want, "{text}");
        }
        for bad in ["", "-", "5 m", "m", "5x", "1..5s", "soon", "--1", "1e400h", "5m3"] {
            assert!(bad.parse::<KeepAlive>().is_err(), "{bad}");
        }
        assert!(KeepAlive::from_secs(f64::NAN).is_none());
        assert!(KeepAlive::from_secs(1e300).is_none());
    }
}
