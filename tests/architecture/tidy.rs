//! Habits that a machine can check: short lines, functions and files, and words that never ship.
//!
//! Lengths have ratchets: what is too long today stands in a table with its exact length. It fails
//! when it grows, and asks for a lower number when it shrinks.

use super::source::Source;
use super::{assert_lawful, house, root};

const COLUMNS_MAX: usize = 100;
const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 500;

/// Today's long functions: `path name` -> lines. Only ever shorter.
pub const LONG_FUNCTIONS: &[(&str, usize)] = &[];

/// Today's long files: `path` -> lines. Only ever shorter.
pub const LONG_FILES: &[(&str, usize)] = &[];

/// Words that never ship: macros, and methods that panic without saying why.
const NEVER_SHIPS: [&[&str]; 4] =
    [&["dbg", "!"], &["todo", "!"], &["unimplemented", "!"], &[".", "unwrap", "(", ")"]];

#[test]
fn lines_fit() {
    assert_lawful(long_lines(&house()));
}

#[test]
fn functions_fit_on_a_screen() {
    assert_lawful(ratchet(FUNCTION_LINES_MAX, &function_lengths(&house()), LONG_FUNCTIONS));
}

#[test]
fn files_stay_small() {
    let lengths: Vec<(String, usize)> =
        house().iter().map(|s| (s.path.clone(), s.text.lines().count())).collect();
    assert_lawful(ratchet(FILE_LINES_MAX, &lengths, LONG_FILES));
}

#[test]
fn nothing_unfinished_ships() {
    assert_lawful(unfinished(&house()));
}

#[test]
fn every_file_says_what_it_is() {
    assert_lawful(undocumented(&house()));
}

#[test]
fn no_machine_is_named() {
    let mut found = Vec::new();
    let manifests = ["Cargo.toml", "kernels/Cargo.toml", "models/Cargo.toml", "deny.toml"];
    for path in manifests {
        let text = std::fs::read_to_string(root().join(path)).unwrap();
        found.extend(machine_paths(&Source::new(path, &text)));
    }
    found.extend(house().iter().flat_map(machine_paths));
    assert_lawful(found);
}

pub fn long_lines(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        for (line, columns) in (1..).zip(source.text.lines().map(|l| l.chars().count())) {
            if columns > COLUMNS_MAX {
                found.push(format!("{}:{line}: {columns} columns", source.path));
            }
        }
    }
    found
}

/// `path name` and lines of every function; of two with one name in one file, the longer.
pub fn function_lengths(sources: &[Source]) -> Vec<(String, usize)> {
    let mut lengths: Vec<(String, usize)> = Vec::new();
    for source in sources {
        for function in source.functions() {
            let name = format!("{} {}", source.path, function.name);
            match lengths.iter_mut().find(|(known, _)| *known == name) {
                Some((_, lines)) => *lines = function.lines.max(*lines),
                None => lengths.push((name, function.lines)),
            }
        }
    }
    lengths
}

/// Lengths beyond `max` that are not in the table, or that differ from it.
pub fn ratchet(max: usize, lengths: &[(String, usize)], table: &[(&str, usize)]) -> Vec<String> {
    let mut found = Vec::new();
    for (name, lines) in lengths {
        let known = table.iter().find(|(known, _)| known == name).map(|(_, lines)| *lines);
        match known {
            None if *lines > max => found.push(format!("{name}: {lines} lines, at most {max}")),
            Some(was) if *lines > was => found.push(format!("{name}: {lines} lines, was {was}")),
            Some(was) if *lines <= max => {
                found.push(format!("{name}: {lines} lines: well done, strike out its row ({was})"));
            }
            Some(was) if *lines < was => {
                found.push(format!("{name}: {lines} lines: well done, lower its row from {was}"));
            }
            _ => {}
        }
    }
    let gone = table.iter().filter(|(known, _)| lengths.iter().all(|(name, _)| name != known));
    found.extend(gone.map(|(name, _)| format!("{name}: is gone, strike out its row")));
    found
}

pub fn unfinished(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        let tokens = source.shipped();
        let words: Vec<&str> = tokens.iter().map(|t| t.text.as_str()).collect();
        for (at, token) in tokens.iter().enumerate() {
            if let Some(word) = NEVER_SHIPS.iter().find(|word| words[at..].starts_with(word)) {
                found.push(format!("{}:{}: {}", source.path, token.line, word.concat()));
            }
        }
    }
    found
}

pub fn undocumented(sources: &[Source]) -> Vec<String> {
    let silent = |s: &&Source| !s.text.starts_with("//! ");
    let say = |s: &Source| format!("{}: begins without `//!`", s.path);
    sources.iter().filter(silent).map(say).collect()
}

/// Folders of somebody's machine. `/home/me` is nobody.
pub fn machine_paths(source: &Source) -> Vec<String> {
    let folders = ["work", "root", "home", "Users"].map(|name| format!("/{name}/"));
    let hit = |line: &str| {
        let line = line.replace(&format!("{}me", folders[2]), "");
        folders.iter().any(|folder| line.contains(folder))
    };
    let lines = (1..).zip(source.text.lines()).filter(|(_, line)| hit(line));
    lines.map(|(at, _)| format!("{}:{at}: a path of a machine", source.path)).collect()
}
