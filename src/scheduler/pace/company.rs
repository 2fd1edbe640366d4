//! Whether somebody else may come in at any moment: others were here lately. Who is alone and stays
//! alone computes a little faster in long steps, but a newcomer waits for the end of one.

use std::time::Duration;

/// Others are expected for so long after they were here.
const MEMORY: Duration = Duration::from_secs(600);

/// Who was here last, and until when others are expected.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Company {
    last: Option<u64>,
    until: Option<Duration>,
}

impl Company {
    /// These tenants are here now. Whether others are expected.
    pub fn see(&mut self, here: impl Iterator<Item = u64>, now: Duration) -> bool {
        for tenant in here {
            if self.last.replace(tenant).is_some_and(|last| last != tenant) {
                self.until = now.checked_add(MEMORY);
            }
        }
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_here_lately_may_come_again() {
        let (mut company, s) = (Company::default(), Duration::from_secs);
        assert!(!company.see([0].into_iter(), s(0)));
        assert!(!company.see([].into_iter(), s(1)));
        assert!(!company.see([0].into_iter(), s(10_000)), "always the same");
        assert!(company.see([7].into_iter(), s(10_001)), "one after the other");
        assert!(company.see([7].into_iter(), s(10_600)));
        assert!(!company.see([7].into_iter(), s(10_601)), "alone for ten minutes");
        assert!(company.see([0, 7].into_iter(), s(10_602)), "both at once");
    }
}
