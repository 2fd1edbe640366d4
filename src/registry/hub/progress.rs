//! Who is told how a download goes.

use indicatif::{ProgressBar, ProgressStyle};

/// Told about one file after the other, and about what is worth knowing between them.
pub trait Progress {
    /// A file starts; `have` of its `total` bytes are there from an earlier attempt. `total` is 0
    /// when the hub does not say.
    fn start(&mut self, file: &str, have: u64, total: u64);
    /// `bytes` more have come.
    fn advance(&mut self, bytes: u64);
    /// The file is complete.
    fn finish(&mut self);
    /// Something that did not stop the work.
    fn warn(&mut self, message: &str);
}

/// A bar per file on the terminal (none where there is no terminal); warnings go to the log.
#[derive(Default)]
pub struct Bars {
    bar: Option<ProgressBar>,
}

impl Progress for Bars {
    fn start(&mut self, file: &str, have: u64, total: u64) {
        let template =
            "{msg:40!} {bar:24} {bytes:>10} / {total_bytes:10} {bytes_per_sec:>12} {eta}";
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total).with_style(style).with_message(file.to_owned());
        bar.set_position(have);
        // The time left is judged by what comes now.
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }

    fn warn(&mut self, message: &str) {
        tracing::warn!("{message}");
    }
}
