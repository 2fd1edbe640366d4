//! Programs by platform: what a file is, by its first bytes, and how it is started.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::BundleError;

/// Platforms that a bundle can start on.
pub const PLATFORMS: [&str; 6] = [
    "linux-x86_64",
    "linux-aarch64",
    "macos-x86_64",
    "macos-aarch64",
    "windows-x86_64",
    "windows-aarch64",
];

/// A program for one platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    /// One of [`PLATFORMS`].
    pub platform: &'static str,
    /// The file.
    pub path: PathBuf,
}

impl Binary {
    /// Reads `PATH` or `PLATFORM=PATH`; the file itself must be a program of that platform.
    pub fn parse(text: &str) -> Result<Self, BundleError> {
        let named = text.split_once('=').and_then(|(name, path)| {
            PLATFORMS.into_iter().find(|platform| *platform == name).map(|p| (p, path))
        });
        let (asked, path) = named.map_or((None, text), |(name, path)| (Some(name), path));
        let path = PathBuf::from(path);
        let wrong = |why: String| BundleError::Binary { path: path.clone(), why };
        if !path.is_file() {
            let known = PLATFORMS.join(", ");
            return Err(wrong(format!("is not a file; give PATH or PLATFORM=PATH, of {known}")));
        }
        let found = platform_of(&path)?;
        match (asked, found) {
            (Some(asked), Some(found)) if asked != found => {
                Err(wrong(format!("is a program for {found}, not for {asked}")))
            }
            (_, Some(platform)) => Ok(Self { platform, path }),
            (_, None) => Err(wrong(format!("is no program for one of {}", PLATFORMS.join(", ")))),
        }
    }

    /// The program that runs.
    pub fn this() -> Result<Self, BundleError> {
        let path = std::env::current_exe().map_err(|e| BundleError::io(Path::new("hearth"), e))?;
        Self::parse(&path.to_string_lossy())
    }

    /// Its place in the bundle.
    pub(super) fn place(&self) -> String {
        let ending = if self.platform.starts_with("windows") { ".exe" } else { "" };
        format!("bin/{}/hearth{ending}", self.platform)
    }

    /// Name and text of the script that serves the bundle with it.
    pub(super) fn script(&self) -> (String, String) {
        let (platform, binary) = (self.platform, self.place());
        match platform.split('-').next() {
            Some("windows") => (
                format!("start-{platform}.cmd"),
                include_str!("start.cmd")
                    .replace("@BINARY@", &binary.replace('/', "\\"))
                    .replace("\r\n", "\n")
                    .replace('\n', "\r\n"),
            ),
            // A double click in the Finder runs a .command file.
            Some("macos") => (format!("start-{platform}.command"), sh(&binary)),
            _ => (format!("start-{platform}.sh"), sh(&binary)),
        }
    }
}

fn sh(binary: &str) -> String {
    include_str!("start.sh").replace("@BINARY@", binary)
}

/// The platform that a program was built for: ELF, Mach-O or PE, by its first bytes.
fn platform_of(path: &Path) -> Result<Option<&'static str>, BundleError> {
    let io = |e| BundleError::io(path, e);
    let mut head = Vec::new();
    File::open(path).map_err(io)?.take(4096).read_to_end(&mut head).map_err(io)?;
    Ok(platform_of_head(&head))
}

fn platform_of_head(head: &[u8]) -> Option<&'static str> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(*head.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(*head.get(at..)?.first_chunk()?));
    // ELF, 64 bits, little-endian.
    if head.starts_with(b"\x7fELF\x02\x01") {
        return match u16_at(18)? {
            62 => Some("linux-x86_64"),
            183 => Some("linux-aarch64"),
            _ => None,
        };
    }
    // Mach-O, 64 bits.
    if u32_at(0)? == 0xfeed_facf {
        return match u32_at(4)? {
            0x0100_0007 => Some("macos-x86_64"),
            0x0100_000c => Some("macos-aarch64"),
            _ => None,
        };
    }
    if head.starts_with(b"MZ") {
        let at = u32_at(0x3c)? as usize;
        return match (head.get(at..)?.starts_with(b"PE\0\0"), u16_at(at + 4)?) {
            (true, 0x8664) => Some("windows-x86_64"),
            (true, 0xaa64) => Some("windows-aarch64"),
            _ => None,
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; 256];
        for (at, bytes) in parts {
            head[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn programs_are_told_apart() {
        let elf = |machine: u8| head(&[(0, b"\x7fELF\x02\x01"), (18, &[machine, 0])]);
        let mach = |cpu: u8| head(&[(0, b"\xcf\xfa\xed\xfe"), (4, &[cpu, 0, 0, 1])]);
        let pe = |machine: &[u8]| {
            head(&[(0, b"MZ"), (0x3c, &[0x80]), (0x80, b"PE\0\0"), (0x84, machine)])
        };
        for (head, platform) in [
            (elf(62), Some("linux-x86_64")),
            (elf(183), Some("linux-aarch64")),
            (elf(3), None),
            (mach(7), Some("macos-x86_64")),
            (mach(12), Some("macos-aarch64")),
            (pe(&[0x64, 0x86]), Some("windows-x86_64")),
            (pe(&[0x64, 0xaa]), Some("windows-aarch64")),
            (pe(&[0x4c, 0x01]), None),
            (head(&[(0, b"MZ"), (0x3c, &[0xff, 0xff, 0xff, 0xff])]), None),
            (b"#!/bin/sh\n".to_vec(), None),
            (b"\x7fEL".to_vec(), None),
        ] {
            assert_eq!(platform_of_head(&head), platform);
        }
    }

    #[test]
    fn a_platform_that_is_not_the_programs_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a=b.exe");
        std::fs::write(&path, head(&[(0, b"\x7fELF\x02\x01"), (18, &[62, 0])])).unwrap();
        let parse = |text: String| Binary::parse(&text).map_err(|e| e.to_string());
        let path = path.to_str().unwrap();
        assert_eq!(parse(path.to_owned()).unwrap().platform, "linux-x86_64");
        assert_eq!(parse(format!("linux-x86_64={path}")).unwrap().path, Path::new(path));
        let error = parse(format!("macos-aarch64={path}")).unwrap_err();
        assert!(error.contains("linux-x86_64, not for macos-aarch64"), "{error}");
        let error = parse(format!("amiga-m68k={path}")).unwrap_err();
        assert!(error.contains("is not a file") && error.contains("windows-x86_64"), "{error}");
    }

    #[test]
    fn scripts_belong_to_their_platform() {
        let script = |platform| Binary { platform, path: PathBuf::new() }.script();
        let (name, text) = script("linux-x86_64");
        assert!(name == "start-linux-x86_64.sh" && text.starts_with("#!/bin/sh\n"), "{name}");
        assert!(text.contains("bin/linux-x86_64/hearth") && text.contains("HF_HUB_OFFLINE=1"));
        let (name, text) = script("windows-x86_64");
        assert_eq!(name, "start-windows-x86_64.cmd");
        assert!(text.contains("bin\\windows-x86_64\\hearth.exe") && !text.contains("@B"), "{text}");
        assert!(
            text.lines().count() > 3 && text.matches('\n').count() == text.matches("\r\n").count()
        );
        assert_eq!(script("macos-aarch64").0, "start-macos-aarch64.command");
    }
}
