//! Names that every file system of a USB stick can hold, and paths that stay inside the bundle.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::BundleError;

/// UTF-16 units of one name on FAT32 and exFAT.
const NAME_LEN_MAX: usize = 255;
/// Windows opens a device under these names, whatever ending follows.
const DEVICES: [&str; 6] = ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"];

/// A path of the manifest as a path of this machine: relative, downwards, of portable names.
pub(super) fn inside(folder: &Path, path: &str) -> Result<PathBuf, BundleError> {
    check(path)?;
    Ok(path.split('/').fold(folder.to_owned(), |folder, name| folder.join(name)))
}

/// Every part of `path` is a name that FAT32, exFAT, Windows, macOS and Linux all accept.
pub(super) fn check(path: &str) -> Result<(), BundleError> {
    let wrong = |why: &str| {
        let why = format!("{why}; FAT32, exFAT or Windows could not hold it");
        Err(BundleError::Name { path: path.escape_debug().to_string(), why })
    };
    for name in path.split('/') {
        let stem = name.split('.').next().unwrap_or(name).trim_end().to_uppercase();
        let numbered = |kind| {
            let number = stem.strip_prefix(kind).map(|n| n.chars().collect::<Vec<_>>());
            matches!(number.as_deref(), Some(['0'..='9' | '¹' | '²' | '³']))
        };
        if name.is_empty() || name == "." || name == ".." {
            return wrong("a name in it is empty or leads elsewhere");
        }
        if name.chars().any(|c| c.is_control() || "<>:\"\\|?*".contains(c)) {
            return wrong("a name in it has one of the characters < > : \" \\ | ? *");
        }
        if name.ends_with(['.', ' ']) || name.starts_with(' ') {
            return wrong("a name in it begins with a space, or ends with a space or a dot");
        }
        if DEVICES.contains(&stem.as_str()) || numbered("COM") || numbered("LPT") {
            return wrong("a name in it is a device of Windows");
        }
        if name.encode_utf16().count() > NAME_LEN_MAX {
            return wrong("a name in it is longer than 255 characters");
        }
    }
    Ok(())
}

/// No two of them are one file where case does not count, and none is a folder of another.
pub(super) fn check_distinct<'a>(paths: impl Iterator<Item = &'a str>) -> Result<(), BundleError> {
    let mut seen = BTreeMap::new();
    for path in paths {
        if let Some(other) = seen.insert(path.to_lowercase(), path) {
            return Err(BundleError::Collision(other.to_owned(), path.to_owned()));
        }
    }
    for (lower, path) in &seen {
        let folders = lower.match_indices('/').map(|(at, _)| &lower[..at]);
        if let Some(file) = folders.filter_map(|folder| seen.get(folder)).next() {
            return Err(BundleError::Collision((*file).to_owned(), (*path).to_owned()));
        }
    }
    Ok(())
}

/// A folder's name for a model's id: `Qwen/Qwen3-0.6B:Q8_0` becomes `Qwen-Qwen3-0.6B-Q8_0`.
pub(super) fn folder_of(id: &str) -> String {
    let plain = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    let name: String = id.chars().map(plain).collect();
    let name = name.trim_matches(['.', '-']);
    match name.is_empty() || check(name).is_err() {
        true => format!("model-{name}"),
        false => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portable_names_pass_and_others_say_why() {
        for good in
            ["a", "a/b.gguf", "模型/教科書.gguf", "com", "com10", "a b", ".x", "x..y", "COMA"]
        {
            assert!(check(good).is_ok(), "{good}");
        }
        let long = "x".repeat(256);
        for bad in [
            "",
            "/a",
            "a/",
            "a//b",
            "..",
            "a/../b",
            "./a",
            "a\\b",
            "c:a",
            "a?",
            "a\u{7}",
            "a.",
            "a ",
            " a",
            "con",
            "Nul.txt",
            "COM1",
            "lpt9.gguf",
            "COM¹",
            "aux .x",
            &long,
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_manifest_cannot_leave_the_folder() {
        let folder = Path::new("bundle");
        assert_eq!(inside(folder, "a/b").unwrap(), folder.join("a").join("b"));
        for bad in ["../x", "/etc/passwd", "a/../../x", "C:\\x", "\\\\host\\x", "a/./b"] {
            assert!(inside(folder, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn collisions_are_found_where_case_does_not_count() {
        let distinct = |paths: &[&str]| check_distinct(paths.iter().copied());
        assert!(distinct(&["a", "b/a", "b/c"]).is_ok());
        for bad in [&["a/X", "a/x"][..], &["Ä", "ä"], &["a", "A/b"], &["m/a.b/c", "m/A.b"]] {
            assert!(distinct(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ids_become_folders() {
        for (id, folder) in [
            ("hearth-tiny", "hearth-tiny"),
            ("Qwen/Qwen3-0.6B:Q8_0", "Qwen-Qwen3-0.6B-Q8_0"),
            ("教師 1", "教師-1"),
            ("nul", "model-nul"),
            ("..", "model-"),
        ] {
            assert_eq!(folder_of(id), folder);
            assert!(check(folder).is_ok(), "{folder}");
        }
    }
}
