//! What goes into a bundle, and where: decided and checked before a byte is written.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use hearth_models::weights::{Format, Weights};

use super::manifest::{Manifest, Part};
use super::platform::Binary;
use super::{BundleError, names, texts};
use crate::registry::{self, LoadError, OpenModel, builtin};

/// FAT32 holds files shorter than this.
const FAT32_BYTES: u64 = 4 << 30;
/// What may stand beside SafeTensors weights and goes along: a list, so that nothing does that was
/// not meant to.
const COMPANIONS: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
];

/// What to put into a bundle.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// In the order in which they will be served; at least one.
    pub models: Vec<ModelSource>,
    /// Adapter files and folders.
    pub adapters: Vec<PathBuf>,
    /// Programs, one for each platform at most.
    pub binaries: Vec<Binary>,
}

/// A model to put into a bundle.
#[derive(Clone, Debug)]
pub struct ModelSource {
    /// The id that clients will name; `None` is the name of its file or folder.
    pub id: Option<String>,
    /// Where it is.
    pub origin: Origin,
}

/// Where a model is.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A file or a folder, as `serve` takes it.
    Path(PathBuf),
    /// The one that the binary carries.
    Builtin(&'static [u8]),
}

/// A bundle that could be written.
#[derive(Debug)]
pub struct Plan {
    /// Its manifest, without files.
    pub(super) manifest: Manifest,
    pub(super) files: Vec<Planned>,
}

/// One file of a bundle to be.
#[derive(Debug)]
pub(super) struct Planned {
    /// Its place, with `/` between names.
    pub(super) path: String,
    pub(super) content: Content,
    pub(super) bytes: u64,
    /// Gets the permission to be run.
    pub(super) is_program: bool,
}

#[derive(Debug)]
pub(super) enum Content {
    File(PathBuf),
    Bytes(Cow<'static, [u8]>),
}

impl Planned {
    fn file(path: String, file: &Path) -> Result<Self, BundleError> {
        let bytes = fs::metadata(file).map_err(|e| BundleError::io(file, e))?.len();
        Ok(Self { path, content: Content::File(file.to_owned()), bytes, is_program: false })
    }

    fn bytes(path: String, content: impl Into<Cow<'static, [u8]>>) -> Self {
        let content = content.into();
        let bytes = content.len() as u64;
        Self { path, content: Content::Bytes(content), bytes, is_program: false }
    }

    fn program(self) -> Self {
        Self { is_program: true, ..self }
    }
}

impl Plan {
    /// Opens every model as `serve` would, lists the files and checks their names.
    pub fn new(contents: &Contents) -> Result<Self, BundleError> {
        let mut files = Vec::new();
        let (mut models, mut adapters, mut binaries) = (Vec::new(), Vec::new(), Vec::new());
        let mut ids = BTreeSet::new();
        for model in &contents.models {
            let part = add_model(&mut files, model)?;
            if !ids.insert(part.id.clone()) {
                return Err(BundleError::Twice(part.id));
            }
            models.push(part);
        }
        for adapter in &contents.adapters {
            adapters.push(add_adapter(&mut files, adapter)?);
        }
        for binary in &contents.binaries {
            let (path, id) = (binary.place(), binary.platform.to_owned());
            files.push(Planned::file(path.clone(), &binary.path)?.program());
            binaries.push(Part { id, path });
            let (name, text) = binary.script();
            files.push(Planned::bytes(name, text.into_bytes()).program());
        }
        let manifest = Manifest::new(models, adapters, binaries);
        let config = texts::config(&manifest);
        files.push(Planned::bytes(texts::CONFIG.to_owned(), config.into_bytes()));
        let readme = texts::readme(&manifest, &contents.binaries);
        files.push(Planned::bytes(texts::README.to_owned(), readme.into_bytes()));
        let paths = || files.iter().map(|file| file.path.as_str());
        paths().try_for_each(names::check)?;
        names::check_distinct(paths().chain([super::MANIFEST]))?;
        Ok(Self { manifest, files })
    }

    /// Size of everything but the manifest.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Files that FAT32, the usual file system of small USB sticks, cannot hold.
    pub fn too_long_for_fat32(&self) -> impl Iterator<Item = &str> {
        self.files.iter().filter(|file| file.bytes >= FAT32_BYTES).map(|file| file.path.as_str())
    }
}

fn add_model(files: &mut Vec<Planned>, model: &ModelSource) -> Result<Part, BundleError> {
    let path = match &model.origin {
        Origin::Builtin(bytes) => {
            let id = model.id.clone().unwrap_or_else(|| builtin::NAME.to_owned());
            let path = format!("models/{}/{}.gguf", names::folder_of(&id), builtin::NAME);
            files.push(Planned::bytes(path.clone(), *bytes));
            return Ok(Part { id, path });
        }
        Origin::Path(path) => path,
    };
    let opened = open_model(path)?;
    let id = model.id.clone().unwrap_or_else(|| opened.name());
    let folder = format!("models/{}", names::folder_of(&id));
    let weights = opened.file().weights();
    let beside = weights.path().parent().unwrap_or(Path::new("")).to_owned();
    let mut sources: BTreeSet<PathBuf> = weights.files().map(Path::to_owned).collect();
    sources.insert(weights.path().to_owned());
    if weights.format() == Format::SafeTensors {
        let companions = COMPANIONS.iter().map(|name| beside.join(name));
        sources.extend(companions.chain(licences(&beside)?).filter(|path| path.is_file()));
    }
    for source in &sources {
        let place = format!("{folder}/{}", below(&beside, source)?);
        files.push(Planned::file(place, source)?);
    }
    Ok(Part { id, path: format!("{folder}/{}", below(&beside, weights.path())?) })
}

/// Opens a model and its tokenizer, and loads nothing.
pub(super) fn open_model(path: &Path) -> Result<OpenModel, LoadError> {
    let file = hearth_models::open(path);
    let file = file.map_err(|source| LoadError::Model { path: path.to_owned(), source })?;
    registry::open(file)
}

/// Weights may be given away with their licence only.
fn licences(folder: &Path) -> Result<Vec<PathBuf>, BundleError> {
    let all = entries(folder)?.into_iter();
    let is_licence = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        ["LICENSE", "LICENCE", "NOTICE"].iter().any(|word| name.starts_with(word))
    };
    Ok(all.filter(is_licence).collect())
}

fn add_adapter(files: &mut Vec<Planned>, given: &Path) -> Result<Part, BundleError> {
    let wrong = |why: String| BundleError::Adapter { path: given.to_owned(), why };
    let whole = fs::canonicalize(given).map_err(|e| BundleError::io(given, e))?;
    let name = whole.file_name().ok_or_else(|| wrong("has no name".to_owned()))?;
    let id = name.to_str().ok_or_else(|| wrong("its name is not text".to_owned()))?.to_owned();
    let path = format!("adapters/{id}");
    if whole.is_file() {
        Weights::open(&whole).map_err(|e| wrong(e.to_string()))?;
        files.push(Planned::file(path.clone(), &whole)?);
        return Ok(Part { id, path });
    }
    if !whole.join("adapter_config.json").is_file() {
        return Err(wrong("it has no adapter_config.json, so it is no adapter".to_owned()));
    }
    Weights::open(&whole).map_err(|e| wrong(e.to_string()))?;
    let mut folders = vec![whole.clone()];
    while let Some(folder) = folders.pop() {
        for entry in entries(&folder)? {
            if entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
                continue;
            }
            match (entry.is_file(), entry.is_symlink()) {
                (true, _) => {
                    let place = format!("{path}/{}", below(&whole, &entry)?);
                    files.push(Planned::file(place, &entry)?);
                }
                (false, false) if entry.is_dir() => folders.push(entry),
                _ => return Err(wrong(format!("`{}` is no file", entry.display()))),
            }
        }
    }
    Ok(Part { id, path })
}

/// What is in a folder, sorted.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>, BundleError> {
    let io = |e| BundleError::io(folder, e);
    let entries = fs::read_dir(folder).map_err(io)?.map(|entry| Ok(entry.map_err(io)?.path()));
    let mut entries = entries.collect::<Result<Vec<_>, BundleError>>()?;
    entries.sort();
    Ok(entries)
}

/// `file` as seen from `folder`, with `/` between names.
pub(super) fn below(folder: &Path, file: &Path) -> Result<String, BundleError> {
    let name = || file.display().to_string();
    let path = file.strip_prefix(folder).map_err(|_| BundleError::Name {
        path: name(),
        why: format!("it does not lie in {}", folder.display()),
    })?;
    let text = path.iter().map(|part| part.to_str()).collect::<Option<Vec<_>>>();
    let why = "its name is not text".to_owned();
    Ok(text.ok_or_else(|| BundleError::Name { path: name(), why })?.join("/"))
}
