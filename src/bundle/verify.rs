//! Reads a bundle again and compares. It may come from anywhere, so nothing in it is trusted: no
//! path leaves the folder, no link is followed, and a model is opened only where all of its files
//! are what the manifest says they are named.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hearth_models::weights::Weights;
use ring::digest;

use super::layout::{below, entries, open_model};
use super::manifest::{FileEntry, MANIFEST, Manifest, Part, hex};
use super::{BundleError, CHUNK_BYTES, names};
use crate::registry::OpenModel;

/// Left by file managers on every stick that they see.
const LEFT_BY_SYSTEMS: [&str; 3] = [".DS_Store", "Thumbs.db", "desktop.ini"];

/// A bundle whose manifest has been read and is sound.
#[derive(Debug)]
pub struct Bundle {
    folder: PathBuf,
    manifest: Manifest,
    sha256: String,
}

/// One thing that is wrong, with the path in the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The manifest has it, the folder does not.
    Missing(String),
    /// It is not what the manifest says; why.
    Changed(String, String),
    /// The folder has it, the manifest does not.
    Extra(String),
    /// A link or a device where a file should be.
    NotAFile(String),
    /// It cannot be read, or a model or an adapter cannot be opened; why.
    Unreadable(String, String),
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Every model and adapter that opens, and what it is.
    pub opened: Vec<(String, String)>,
    /// Everything that is wrong.
    pub problems: Vec<Problem>,
    /// Files of file managers, which change nothing.
    pub ignored: Vec<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names come from a folder that somebody else may have written.
        let shown = |path: &str| path.escape_debug().to_string();
        match self {
            Self::Missing(path) => write!(f, "missing     {}", shown(path)),
            Self::Changed(path, why) => write!(f, "changed     {} ({why})", shown(path)),
            Self::Extra(path) => write!(f, "extra       {}", shown(path)),
            Self::NotAFile(path) => write!(f, "not a file  {}", shown(path)),
            Self::Unreadable(path, why) => write!(f, "unreadable  {}: {why}", shown(path)),
        }
    }
}

impl Problem {
    fn path(&self) -> &str {
        match self {
            Self::Missing(path) | Self::Extra(path) | Self::NotAFile(path) => path,
            Self::Changed(path, _) | Self::Unreadable(path, _) => path,
        }
    }
}

impl Bundle {
    /// Reads the manifest and refuses one that names a file outside the folder.
    pub fn open(folder: &Path) -> Result<Self, BundleError> {
        let (manifest, sha256) = Manifest::read(folder)?;
        Ok(Self { folder: folder.to_owned(), manifest, sha256 })
    }

    /// What it says it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the manifest, which stands for the whole bundle.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Reads every file. `progress` is told bytes as they are read.
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<Report, BundleError> {
        let mut report = Report::default();
        for file in &self.manifest.files {
            report.problems.extend(self.check(file, progress)?);
        }
        self.find_extra(&mut report)?;
        for model in &self.manifest.models {
            self.open_part(model, &mut report, |path| {
                open_model(path).map(|model| describe(&model)).map_err(|e| e.to_string())
            })?;
        }
        for adapter in &self.manifest.adapters {
            self.open_part(adapter, &mut report, |path| {
                let weights = Weights::open(path).map_err(|e| e.to_string())?;
                Ok(format!("adapter, {} tensors", weights.len()))
            })?;
        }
        Ok(report)
    }

    fn check(
        &self,
        entry: &FileEntry,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Option<Problem>, BundleError> {
        let path = names::inside(&self.folder, &entry.path)?;
        let name = entry.path.clone();
        if self.has_link(&path) {
            return Ok(Some(Problem::NotAFile(name)));
        }
        let bytes = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_file() => meta.len(),
            Ok(_) => return Ok(Some(Problem::NotAFile(name))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(Some(Problem::Missing(name)));
            }
            Err(e) => return Ok(Some(Problem::Unreadable(name, e.to_string()))),
        };
        if bytes != entry.bytes {
            let why = format!("{bytes} bytes instead of {}", entry.bytes);
            return Ok(Some(Problem::Changed(name, why)));
        }
        Ok(match sha256(&path, progress) {
            Ok(found) if found == entry.sha256 => None,
            Ok(_) => Some(Problem::Changed(name, "its SHA-256 is another".to_owned())),
            Err(e) => Some(Problem::Unreadable(name, e.to_string())),
        })
    }

    /// Whether something on the way to a file is a link.
    fn has_link(&self, path: &Path) -> bool {
        let below = path.ancestors().take_while(|part| *part != self.folder);
        below.into_iter().any(Path::is_symlink)
    }

    /// Everything in the folder that the manifest does not have.
    fn find_extra(&self, report: &mut Report) -> Result<(), BundleError> {
        let known: BTreeSet<&str> = self.manifest.files.iter().map(|f| f.path.as_str()).collect();
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            for entry in entries(&folder)? {
                let meta = fs::symlink_metadata(&entry).map_err(|e| BundleError::io(&entry, e))?;
                // A name that is no text is in no manifest either.
                let name = below(&self.folder, &entry)
                    .unwrap_or_else(|_| entry.to_string_lossy().into_owned());
                let last = name.rsplit('/').next().unwrap_or(&name);
                if meta.is_dir() {
                    folders.push(entry);
                } else if name == MANIFEST || known.contains(name.as_str()) {
                } else if meta.is_file()
                    && (LEFT_BY_SYSTEMS.contains(&last) || last.starts_with("._"))
                {
                    report.ignored.push(name);
                } else {
                    report.problems.push(Problem::Extra(name));
                }
            }
        }
        Ok(())
    }

    /// Opens a part with `open`, unless something in its folder is not a file of the manifest: an
    /// opened folder is read by name, and a link or a device must not be.
    fn open_part(
        &self,
        part: &Part,
        report: &mut Report,
        open: impl Fn(&Path) -> Result<String, String>,
    ) -> Result<(), BundleError> {
        let path = names::inside(&self.folder, &part.path)?;
        let folder = match self.manifest.files.iter().any(|file| file.path == part.path) {
            true => part.path.rsplit_once('/').map_or("", |(folder, _)| folder),
            false => &part.path,
        };
        let is_strange = |problem: &Problem| {
            let inside = problem.path().strip_prefix(folder).is_some_and(|p| p.starts_with('/'));
            inside && !matches!(problem, Problem::Changed(..))
        };
        if report.problems.iter().any(is_strange) {
            let why = "not opened, because its files are not those of the manifest".to_owned();
            report.problems.push(Problem::Unreadable(part.path.clone(), why));
            return Ok(());
        }
        match open(&path) {
            Ok(what) => report.opened.push((part.id.clone(), what)),
            Err(why) => report.problems.push(Problem::Unreadable(part.path.clone(), why)),
        }
        Ok(())
    }
}

fn describe(model: &OpenModel) -> String {
    let (config, weights) = (model.file().config(), model.file().weights());
    let parameters: u64 = weights.infos().map(|(_, info)| info.elements() as u64).sum();
    let mut types = std::collections::BTreeMap::<&str, usize>::new();
    for (_, info) in weights.infos() {
        *types.entry(info.ty.name()).or_default() += info.len_bytes();
    }
    let main = types.into_iter().max_by_key(|(_, bytes)| *bytes).map_or("", |(name, _)| name);
    format!(
        "{}, {} layers, {:.1} M parameters in {main}, context {} tokens",
        config.family,
        config.layer_count,
        parameters as f64 / 1e6,
        config.context_len
    )
}

fn sha256(path: &Path, progress: &mut dyn FnMut(u64)) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut context = digest::Context::new(&digest::SHA256);
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(hex(context.finish().as_ref())),
            Ok(len) => {
                context.update(&chunk[..len]);
                progress(len as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
