//! What a bundle says it is: `manifest.json`. Written last, read with suspicion.

use std::fs;
use std::io::Read;
use std::path::Path;

use ring::digest;
use serde::{Deserialize, Serialize};

use super::{BundleError, names};

/// The manifest's name in the bundle.
pub const MANIFEST: &str = "manifest.json";
/// The layout that this program writes and reads.
const FORMAT: u32 = 1;
/// A longer manifest is not one of ours.
const BYTES_MAX: u64 = 16 << 20;

/// Everything that is in a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the layout.
    pub format: u32,
    /// Version of the program that wrote it.
    pub hearth: String,
    /// In the order in which they are served.
    pub models: Vec<Part>,
    /// Adapters; the configuration serves them where there is one model.
    pub adapters: Vec<Part>,
    /// One program for each platform; the id is the platform's name.
    pub binaries: Vec<Part>,
    /// Every file but the manifest.
    pub files: Vec<FileEntry>,
}

/// A model, an adapter or a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name for people and clients.
    pub id: String,
    /// The file to open, or a folder of files; `/` between names.
    pub path: String,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Where it lies in the bundle, with `/` between names.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Of its bytes, 64 lower-case hexadecimal digits.
    pub sha256: String,
}

impl Manifest {
    pub(super) fn new(models: Vec<Part>, adapters: Vec<Part>, binaries: Vec<Part>) -> Self {
        let hearth = env!("CARGO_PKG_VERSION").to_owned();
        Self { format: FORMAT, hearth, models, adapters, binaries, files: Vec::new() }
    }

    /// Size of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }

    pub(super) fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self);
        text.expect("strings and numbers are JSON; this is a bug") + "\n"
    }

    /// Reads and checks the manifest of a bundle; also its SHA-256.
    pub(super) fn read(folder: &Path) -> Result<(Self, String), BundleError> {
        let path = folder.join(MANIFEST);
        let io = |e| BundleError::io(&path, e);
        let meta = fs::symlink_metadata(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => BundleError::NoBundle(folder.to_owned()),
            _ => io(e),
        })?;
        if !meta.is_file() {
            return Err(BundleError::Manifest(format!("`{MANIFEST}` is not a regular file")));
        }
        let mut text = Vec::new();
        let file = fs::File::open(&path).map_err(io)?;
        file.take(BYTES_MAX + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > BYTES_MAX {
            return Err(BundleError::Manifest(format!("it is longer than {BYTES_MAX} bytes")));
        }
        let sha256 = hex(digest::digest(&digest::SHA256, &text).as_ref());
        Ok((Self::parse(&text)?, sha256))
    }

    fn parse(text: &[u8]) -> Result<Self, BundleError> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let wrong = |what: String| BundleError::Manifest(what);
        let version: Version = serde_json::from_slice(text).map_err(|e| wrong(e.to_string()))?;
        if version.format != FORMAT {
            let format = version.format;
            return Err(wrong(format!("its format is {format}, and this program knows {FORMAT}")));
        }
        let manifest: Self = serde_json::from_slice(text).map_err(|e| wrong(e.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Every path stays inside, names one file, and is not the manifest's.
    pub(super) fn check(&self) -> Result<(), BundleError> {
        let parts = [&self.models, &self.adapters, &self.binaries];
        let paths = self.files.iter().map(|file| file.path.as_str());
        for path in paths.clone().chain(parts.into_iter().flatten().map(|p| p.path.as_str())) {
            names::check(path)?;
        }
        names::check_distinct(paths.chain([MANIFEST]))?;
        let is_digest = |text: &str| {
            text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        if let Some(file) = self.files.iter().find(|file| !is_digest(&file.sha256)) {
            return Err(BundleError::Manifest(format!("`{}` has no SHA-256", file.path)));
        }
        for part in parts.into_iter().flatten() {
            let folder = format!("{}/", part.path);
            let holds = |f: &FileEntry| f.path == part.path || f.path.starts_with(&folder);
            if !self.files.iter().any(holds) {
                let what = format!("`{}` is none of its files", part.path);
                return Err(BundleError::Manifest(what));
            }
        }
        Ok(())
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let part = |id: &str, path: &str| Part { id: id.into(), path: path.into() };
        let file = |path: &str| FileEntry { path: path.into(), bytes: 3, sha256: "0a".repeat(32) };
        Manifest {
            files: vec![file("models/a/a.gguf"), file("adapters/x/w")],
            ..Manifest::new(
                vec![part("a", "models/a/a.gguf")],
                vec![part("x", "adapters/x")],
                vec![],
            )
        }
    }

    fn refused(change: impl Fn(&mut Manifest)) -> String {
        let mut changed = manifest();
        change(&mut changed);
        Manifest::parse(changed.to_json().as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn it_reads_what_it_writes() {
        let manifest = manifest();
        assert_eq!(Manifest::parse(manifest.to_json().as_bytes()).unwrap(), manifest);
        assert_eq!(manifest.bytes(), 6);
    }

    #[test]
    fn a_hostile_one_is_refused() {
        assert!(refused(|m| m.files[0].path = "../../x".into()).contains("../../x"));
        assert!(refused(|m| m.models[0].path = "/etc/passwd".into()).contains("/etc/passwd"));
        assert!(refused(|m| m.files[1].path = "MODELS/a/A.gguf".into()).contains("MODELS"));
        assert!(refused(|m| m.files[1].path = "Manifest.json".into()).contains("Manifest"));
        assert!(refused(|m| m.files[0].sha256 = "0A".repeat(32)).contains("SHA-256"));
        assert!(refused(|m| m.models[0].path = "models/b".into()).contains("models/b"));
        assert!(refused(|m| m.format = 2).contains("format is 2"));
        assert!(Manifest::parse(b"[]").is_err() && Manifest::parse(b"{\"format\":1}").is_err());
    }
}
