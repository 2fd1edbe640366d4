//! One file into the cache, continued where an earlier attempt stopped.

use super::cache::{RepoCache, create_parent};
use super::client::{Client, FileHead};
use super::progress::Progress;
use super::{HubError, HubId};
use ring::digest;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use ureq::http::StatusCode;

const CHUNK_BYTES: usize = 256 * 1024;

/// Makes sure that a file of a commit is in the cache and returns its path.
pub(super) fn file(
    client: &Client<'_>,
    cache: &RepoCache,
    id: &HubId,
    commit: &str,
    name: &str,
    progress: &mut dyn Progress,
) -> Result<PathBuf, HubError> {
    if let Some(path) = cache.file(commit, name) {
        return Ok(path);
    }
    let head = client.head(id, commit, name)?;
    if !cache.blob(&head.etag).is_file() {
        Download { client, cache, id, commit, name, head: &head }.run(progress)?;
    }
    cache.link(commit, name, &head.etag)
}

struct Download<'a> {
    client: &'a Client<'a>,
    cache: &'a RepoCache,
    id: &'a HubId,
    commit: &'a str,
    name: &'a str,
    head: &'a FileHead,
}

/// How one request for bytes ended.
enum Outcome {
    Complete,
    /// The connection broke, for this reason.
    Broken(String),
}

impl Download<'_> {
    fn run(&self, progress: &mut dyn Progress) -> Result<(), HubError> {
        let partial = self.cache.incomplete(&self.head.etag);
        create_parent(&partial)?;
        let io = |e| HubError::io(&partial, e);
        // Not truncated: what an earlier attempt brought is kept.
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(&partial);
        let mut out = open.map_err(io)?;
        let mut have = out.metadata().map_err(io)?.len();
        if self.head.len.is_some_and(|len| have > len) {
            have = 0;
        }
        progress.start(self.name, have, self.head.len.unwrap_or(0));
        let mut fruitless = 0;
        // Without a known size, an empty remainder is found out by asking for it.
        while self.head.len != Some(have) {
            let before = have;
            match self.request(&mut out, &mut have, &partial, progress)? {
                Outcome::Complete => break,
                Outcome::Broken(reason) => {
                    fruitless = if have > before { 0 } else { fruitless + 1 };
                    if fruitless >= self.client.attempts() {
                        return Err(self.client.unreachable(reason));
                    }
                    std::thread::sleep(self.client.pause(fruitless));
                }
            }
        }
        out.set_len(have).and_then(|()| out.sync_all()).map_err(io)?;
        drop(out);
        self.verify(&partial, have)?;
        let blob = self.cache.blob(&self.head.etag);
        match fs::rename(&partial, &blob) {
            // Another process has finished the same file.
            Err(_) if blob.is_file() => {}
            other => other.map_err(|e| HubError::io(&blob, e))?,
        }
        progress.finish();
        Ok(())
    }

    /// Asks for everything from `have` on and writes what comes.
    fn request(
        &self,
        out: &mut File,
        have: &mut u64,
        partial: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Outcome, HubError> {
        let answer = match self.client.get(self.id, self.commit, self.name, *have) {
            Err(HubError::Unreachable { reason, .. }) => return Ok(Outcome::Broken(reason)),
            other => other?,
        };
        match answer.status() {
            StatusCode::RANGE_NOT_SATISFIABLE if self.head.len.is_none() => {
                return Ok(Outcome::Complete);
            }
            StatusCode::PARTIAL_CONTENT if starts_at(answer.headers(), *have) => {}
            // The whole file, or a part that was not asked for: from the start then.
            StatusCode::OK => self.restart(have, progress),
            _ => {
                self.restart(have, progress);
                return Ok(Outcome::Broken(format!("status {} for a range", answer.status())));
            }
        }
        let io = |e| HubError::io(partial, e);
        out.seek(SeekFrom::Start(*have)).map_err(io)?;
        let mut body = answer.into_body().into_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let len = match body.read(&mut chunk) {
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Outcome::Broken(e.to_string())),
            };
            if len == 0 {
                break;
            }
            out.write_all(&chunk[..len]).map_err(io)?;
            *have += len as u64;
            progress.advance(len as u64);
            if self.head.len.is_some_and(|total| *have > total) {
                return self.damaged(partial, format!("more than its {} bytes came", self.total()));
            }
        }
        match self.head.len {
            Some(total) if *have < total => Ok(Outcome::Broken("the connection ended".to_owned())),
            _ => Ok(Outcome::Complete),
        }
    }

    fn restart(&self, have: &mut u64, progress: &mut dyn Progress) {
        if *have > 0 {
            *have = 0;
            progress.start(self.name, 0, self.total());
        }
    }

    fn total(&self) -> u64 {
        self.head.len.unwrap_or(0)
    }

    /// Large files are named by their SHA-256, so a wrong byte anywhere is found.
    fn verify(&self, partial: &Path, have: u64) -> Result<(), HubError> {
        let etag = &self.head.etag;
        if self.head.len.is_some_and(|len| len != have) {
            return self.damaged(partial, format!("{have} bytes instead of {}", self.total()));
        }
        if etag.len() != 64 || !etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(());
        }
        let found = sha256_hex(partial).map_err(|e| HubError::io(partial, e))?;
        if found.eq_ignore_ascii_case(etag) {
            return Ok(());
        }
        self.damaged(partial, format!("its SHA-256 is {found} instead of {etag}"))
    }

    fn damaged<T>(&self, partial: &Path, reason: String) -> Result<T, HubError> {
        let _ = fs::remove_file(partial);
        Err(HubError::Damaged { file: format!("{}/{}", self.id.repo, self.name), reason })
    }
}

/// Whether `Content-Range: bytes 5-9/10` starts where it was asked to.
fn starts_at(headers: &ureq::http::HeaderMap, start: u64) -> bool {
    let range = headers.get("content-range").and_then(|value| value.to_str().ok());
    let first = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next());
    first.and_then(|first| first.parse().ok()) == Some(start)
}

fn sha256_hex(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut context = digest::Context::new(&digest::SHA256);
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            len => context.update(&chunk[..len]),
        }
    }
    Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}
