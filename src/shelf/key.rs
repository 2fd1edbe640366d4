//! Names of what is kept: everything that makes a block's keys and values what they are.

use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use ring::digest::{Context, SHA256};

use super::file::VERSION;
use crate::kv::Chain;
use crate::types::{CacheScope, TokenId};

/// SHA-256 of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

/// Longer parts are hashed in pieces of this, side by side, and count as the hashes of these.
const PIECE: usize = 1 << 20;
/// No disk gives more threads something to read.
const THREADS_MAX: usize = 8;

impl Digest {
    /// Of everything that is told. Whoever tells long parts tells how long they are.
    pub fn of(tell: impl FnOnce(&mut dyn FnMut(&[u8]))) -> Self {
        let mut hash = Context::new(&SHA256);
        tell(&mut |bytes| match bytes.len() <= PIECE {
            true => hash.update(bytes),
            false => of_pieces(bytes).iter().for_each(|digest| hash.update(&digest.0)),
        });
        Self::finished(hash)
    }

    fn finished(hash: Context) -> Self {
        let mut digest = Self::default();
        digest.0.copy_from_slice(hash.finish().as_ref());
        digest
    }

    /// Of parts, each with its length, so that no two lists have the same.
    pub fn of_parts(parts: &[&[u8]]) -> Self {
        Self::of(|listener| {
            for part in parts {
                listener(&(part.len() as u64).to_le_bytes());
                listener(part);
            }
        })
    }

    /// In hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}"); // a String takes everything
            text
        })
    }
}

/// Of each piece, on as many threads as there are processors.
fn of_pieces(bytes: &[u8]) -> Vec<Digest> {
    let pieces: Vec<&[u8]> = bytes.chunks(PIECE).collect();
    let (next, digests) = (AtomicUsize::new(0), Mutex::new(vec![Digest::default(); pieces.len()]));
    let work = || {
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(place) else { break };
            let mut hash = Context::new(&SHA256);
            hash.update(piece);
            digests.lock().unwrap_or_else(PoisonError::into_inner)[place] = Digest::finished(hash);
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    thread::scope(|scope| {
        for _ in 1..threads.min(pieces.len()) {
            // Without it there is one fewer.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    digests.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// A model as far as its keys and values go: its content, what computes it and how they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelKey(pub(super) Digest);

impl ModelKey {
    /// `realm` is whose tenants are meant: their numbers are those of one database.
    pub fn new(content: Digest, layout: &str, realm: &str) -> Self {
        let (version, program) = (VERSION.to_le_bytes(), env!("CARGO_PKG_VERSION"));
        let texts = [program, layout, realm].map(str::as_bytes);
        let [program, layout, realm] = texts;
        Self(Digest::of_parts(&[&version, program, &content.0, layout, realm]))
    }

    /// What stands before every text of a scope. The number of an adapter is of this process only,
    /// so its content is given.
    pub fn root(&self, scope: CacheScope, adapter: Option<Digest>) -> Digest {
        let tenant = scope.tenant.to_le_bytes();
        match adapter {
            None => Digest::of_parts(&[&self.0.0, &tenant]),
            Some(adapter) => Digest::of_parts(&[&self.0.0, &tenant, &adapter.0]),
        }
    }
}

/// One block, exactly.
#[derive(Clone, Copy, Debug)]
pub struct Label<'a> {
    /// The model.
    pub model: ModelKey,
    /// Its root for the block's scope.
    pub root: Digest,
    /// The text before it.
    pub before: Chain,
    /// Blocks before it.
    pub depth: usize,
    /// Its own text.
    pub text: &'a [TokenId],
}

/// What a block's file is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    pub(super) model: [u8; 8],
    pub(super) block: Digest,
}

impl Name {
    /// Of the last block of a text.
    pub fn new(model: ModelKey, root: Digest, text: Chain) -> Self {
        let block = Digest::of_parts(&[&root.0, text.as_bytes()]);
        Self { model: folder_of(model), block }
    }
}

/// The first bytes of the key: the folder of a model.
pub(super) fn folder_of(model: ModelKey) -> [u8; 8] {
    let mut folder = [0; 8];
    folder.copy_from_slice(&model.0.0[..8]);
    folder
}

impl Label<'_> {
    /// What its file is called.
    pub fn name(&self) -> Name {
        Name::new(self.model, self.root, self.before.then(self.text))
    }
}
