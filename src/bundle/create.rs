//! Writes a bundle: beside its target first, under its name when it is whole.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use ring::digest;

use super::layout::{Content, Plan, Planned, entries};
use super::manifest::{FileEntry, MANIFEST, Manifest, hex};
use super::{BundleError, CHUNK_BYTES, names};

/// For folders, the manifest and what the file system writes beside the bytes of files.
const OVERHEAD_BYTES: u64 = 16 << 20;

impl Plan {
    /// Makes the bundle. `progress` is told bytes as they are written, [`Plan::bytes`] in all.
    /// With `force`, a bundle that is at `target` is replaced. Returns the manifest and its
    /// SHA-256.
    pub fn write(
        self,
        target: &Path,
        force: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(Manifest, String), BundleError> {
        let target = Target::check(target, force)?;
        if let Some(free) = free_bytes(&target.parent)? {
            let needed = self.bytes() + OVERHEAD_BYTES;
            if needed > free {
                return Err(BundleError::Space { path: target.parent, needed, free });
            }
        }
        let half = Half::create(target.sibling("partial"), force)?;
        let Self { mut manifest, files } = self;
        for file in &files {
            manifest.files.push(write_file(&half.path, file, progress)?);
        }
        let text = manifest.to_json();
        let sha256 = hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
        let path = half.path.join(MANIFEST);
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(|e| BundleError::io(&path, e))?;
        target.take(half)?;
        Ok((manifest, sha256))
    }
}

/// Copies and hashes in one pass.
fn write_file(
    folder: &Path,
    planned: &Planned,
    progress: &mut dyn FnMut(u64),
) -> Result<FileEntry, BundleError> {
    let path = names::inside(folder, &planned.path)?;
    let io = |e| BundleError::io(&path, e);
    fs::create_dir_all(path.parent().unwrap_or(folder)).map_err(io)?;
    let mut out = File::create_new(&path).map_err(io)?;
    let (mut context, mut written) = (digest::Context::new(&digest::SHA256), 0);
    let mut write = |bytes: &[u8]| {
        context.update(bytes);
        written += bytes.len() as u64;
        progress(bytes.len() as u64);
        out.write_all(bytes).map_err(|e| BundleError::io(&path, e))
    };
    match &planned.content {
        Content::Bytes(bytes) => bytes.chunks(CHUNK_BYTES).try_for_each(&mut write)?,
        Content::File(source) => {
            let read_error = |e| BundleError::io(source, e);
            let mut file = File::open(source).map_err(read_error)?;
            let mut chunk = vec![0; CHUNK_BYTES];
            loop {
                match file.read(&mut chunk) {
                    Ok(0) => break,
                    Ok(len) => write(&chunk[..len])?,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(read_error(e)),
                }
            }
            if written != planned.bytes {
                return Err(BundleError::Changed(source.clone()));
            }
        }
    }
    // A stick is pulled out early.
    out.sync_all().map_err(io)?;
    if planned.is_program {
        allow_to_run(&path).map_err(io)?;
    }
    let sha256 = hex(context.finish().as_ref());
    Ok(FileEntry { path: planned.path.clone(), bytes: written, sha256 })
}

#[cfg(unix)]
fn allow_to_run(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn allow_to_run(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// Bytes that may be written into a folder; `None` where the system is not asked.
fn free_bytes(folder: &Path) -> Result<Option<u64>, BundleError> {
    #[cfg(unix)]
    {
        let told = rustix::fs::statvfs(folder).map_err(|e| BundleError::io(folder, e.into()))?;
        Ok(Some(told.f_bavail.saturating_mul(told.f_frsize)))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        Ok(None)
    }
}

/// Where the bundle will be.
struct Target {
    path: PathBuf,
    parent: PathBuf,
    name: String,
    /// What lies there gives way.
    occupied: bool,
}

impl Target {
    fn check(path: &Path, force: bool) -> Result<Self, BundleError> {
        let wrong = |why: &str| BundleError::Target { path: path.to_owned(), why: why.to_owned() };
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| wrong("give a folder in it that the bundle will be"))?;
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        fs::create_dir_all(&parent).map_err(|e| BundleError::io(&parent, e))?;
        let occupied = match fs::symlink_metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(e) => return Err(BundleError::io(path, e)),
            Ok(meta) if !meta.is_dir() => return Err(wrong("it is there and is no folder")),
            Ok(_) if is_mount_point(path, &parent) => {
                return Err(wrong("this is a whole disk; give a folder in it"));
            }
            Ok(_) => !entries(path)?.is_empty(),
        };
        let is_bundle = path.join(MANIFEST).is_file();
        match (occupied, force) {
            (true, false) => Err(wrong("it is there and not empty; --force replaces a bundle")),
            (true, true) if !is_bundle => {
                Err(wrong("it is there and no bundle; --force replaces only a bundle"))
            }
            _ => Ok(Self { path: path.to_owned(), parent, name: name.to_owned(), occupied }),
        }
    }

    fn sibling(&self, ending: &str) -> PathBuf {
        self.parent.join(format!("{}.{ending}", self.name))
    }

    /// The finished folder gets its name.
    fn take(&self, half: Half) -> Result<(), BundleError> {
        let io = |e| BundleError::io(&self.path, e);
        let old = self.sibling("old");
        if self.occupied {
            fs::rename(&self.path, &old).map_err(io)?;
        } else if self.path.exists() {
            fs::remove_dir(&self.path).map_err(io)?;
        }
        half.finish(&self.path)?;
        if self.occupied {
            fs::remove_dir_all(&old).map_err(|e| BundleError::io(&old, e))?;
        }
        Ok(())
    }
}

/// A folder of another disk than the one it lies in cannot be had by renaming.
#[cfg(unix)]
fn is_mount_point(path: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let disk = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    disk(path) != disk(parent)
}

#[cfg(not(unix))]
fn is_mount_point(_path: &Path, _parent: &Path) -> bool {
    false
}

/// A bundle that is being written; gone again when it is not finished.
struct Half {
    path: PathBuf,
    is_finished: bool,
}

impl Half {
    fn create(path: PathBuf, force: bool) -> Result<Self, BundleError> {
        if force && path.is_dir() {
            fs::remove_dir_all(&path).map_err(|e| BundleError::io(&path, e))?;
        }
        match fs::create_dir(&path) {
            Ok(()) => Ok(Self { path, is_finished: false }),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let why = "is left from an interrupted `bundle create`, or one is at work; \
                    remove it, or use --force";
                Err(BundleError::Target { path, why: why.to_owned() })
            }
            Err(e) => Err(BundleError::io(&path, e)),
        }
    }

    fn finish(mut self, target: &Path) -> Result<(), BundleError> {
        fs::rename(&self.path, target).map_err(|e| BundleError::io(target, e))?;
        self.is_finished = true;
        Ok(())
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        if !self.is_finished {
            // It says what it is by its name, whether or not it can be removed.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
