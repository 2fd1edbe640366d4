//! The lines of an input file, one at a time, and what is wrong with them all together.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use serde_json::Value;

use super::{Executor, Fault, INPUTS_MAX, LINES_MAX, batch};
use crate::error::Error;

/// Errors of one batch; the rest of its file is not looked at.
const ERRORS_MAX: usize = 100;

/// A line and its number, from 1.
pub(super) type Line = (u64, Vec<u8>);

/// Reads lines; those without a word are passed over, and counted.
pub(super) struct Lines {
    file: BufReader<File>,
    number: u64,
    bytes_max: usize,
}

impl Lines {
    /// Of at most so many bytes each; of a longer one comes a little more than that.
    pub(super) fn new(file: File, bytes_max: usize) -> Self {
        Self { file: BufReader::with_capacity(1 << 16, file), number: 0, bytes_max }
    }

    /// The next one.
    pub(super) fn next(&mut self) -> Result<Option<Line>, Error> {
        loop {
            let mut line = Vec::new();
            let limit = self.bytes_max as u64 + 2; // with the two bytes that end it
            let mut part = self.file.by_ref().take(limit);
            let got = part.read_until(b'\n', &mut line);
            if got.map_err(|e| unreadable(&e))? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if line.pop_if(|byte| *byte == b'\n').is_some() {
                line.pop_if(|byte| *byte == b'\r');
            } else if line.len() > self.bytes_max {
                self.skip()?;
            }
            if self.number == 1 && line.starts_with(b"\xef\xbb\xbf") {
                line.drain(..3); // as some editors begin a file
            }
            if !line.trim_ascii().is_empty() {
                return Ok(Some((self.number, line)));
            }
        }
    }

    /// Goes to the end of a line that is too long.
    fn skip(&mut self) -> Result<(), Error> {
        loop {
            let piece = self.file.fill_buf().map_err(|e| unreadable(&e))?;
            let end = piece.iter().position(|byte| *byte == b'\n');
            let (len, ended) = end.map_or((piece.len(), piece.is_empty()), |at| (at + 1, true));
            self.file.consume(len);
            if ended {
                return Ok(());
            }
        }
    }
}

fn unreadable(error: &std::io::Error) -> Error {
    Error::Internal(format!("the input of a batch cannot be read: {error}"))
}

/// What is known of a whole file.
pub(super) struct Survey {
    /// Lines to be run.
    pub total: usize,
    /// The model, where all lines ask the same.
    pub model: Option<String>,
    /// Entries of `errors`; with any the batch is not run.
    pub errors: Vec<Value>,
}

/// Looks at every line.
pub(super) fn survey(
    mut lines: Lines,
    endpoint: &str,
    executor: &dyn Executor,
) -> Result<Survey, Error> {
    let (mut total, mut inputs) = (0, 0);
    let (mut names, mut models) = (HashSet::new(), HashSet::new());
    let mut errors = Vec::new();
    while let Some((number, line)) = lines.next()? {
        total += 1;
        if total > LINES_MAX {
            errors.push(batch::error(Some(number), too_many("requests", LINES_MAX)));
            break;
        }
        let checked = match line.len() > lines.bytes_max {
            true => Err(too_long(lines.bytes_max)),
            false => executor.check(endpoint, &line),
        };
        let fault = match checked {
            Err(fault) => Some(fault),
            Ok(checked) => {
                inputs += checked.inputs;
                models.insert(checked.model);
                match names.insert(checked.custom_id.clone()) {
                    false => Some(twice(&checked.custom_id)),
                    true if inputs > INPUTS_MAX => Some(too_many("inputs", INPUTS_MAX)),
                    true => None,
                }
            }
        };
        errors.extend(fault.map(|fault| batch::error(Some(number), fault)));
        if inputs > INPUTS_MAX {
            break;
        }
        if errors.len() == ERRORS_MAX {
            let message = format!("Lines after {number} were not looked at: too many errors.");
            let fault = Fault { code: "too_many_errors".to_owned(), message, param: None };
            errors.push(batch::error(None, fault));
            break;
        }
    }
    if total == 0 {
        let message = "The file has no request.".to_owned();
        let fault = Fault { code: "empty_file".to_owned(), message, param: None };
        errors.push(batch::error(None, fault));
    }
    let model = models.iter().next().filter(|_| models.len() == 1).cloned();
    Ok(Survey { total, model, errors })
}

fn too_many(what: &str, max: usize) -> Fault {
    let message = format!("A batch has at most {max} {what}.");
    Fault { code: "too_many_tasks".to_owned(), message, param: None }
}

fn too_long(max: usize) -> Fault {
    let message = format!("The line is longer than the limit of {max} bytes.");
    Fault { code: "request_too_large".to_owned(), message, param: None }
}

fn twice(custom_id: &str) -> Fault {
    let message = format!("The custom_id '{custom_id}' is that of an earlier line.");
    let (code, param) = ("duplicate_custom_id".to_owned(), Some("custom_id".to_owned()));
    Fault { code, message, param }
}
