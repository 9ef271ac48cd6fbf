//! Lines about what a peer or a driver did, which must not be able to fill a log with them.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Lines that are logged at once.
const BURST: u32 = 20;

/// Between two lines after those.
const INTERVAL: Duration = Duration::from_secs(1);

/// Logs the first lines, and then one in a second, which says how many there were in between.
#[derive(Debug)]
pub struct Complaints {
    left: u32,
    last: Instant,
    unsaid: u64,
}

impl Default for Complaints {
    fn default() -> Self {
        Self { left: BURST, last: Instant::now(), unsaid: 0 }
    }
}

impl Complaints {
    pub(super) fn warn(&mut self, what: impl Display) {
        if let Some(unsaid) = self.due(Instant::now()) {
            warn(what, unsaid);
        }
    }

    /// Whether a line may be logged at `now`, and how many were not since the last one.
    pub fn due(&mut self, now: Instant) -> Option<u64> {
        let later = now.saturating_duration_since(self.last) >= INTERVAL;
        if self.left == 0 && !later {
            self.unsaid += 1;
            return None;
        }
        self.left = self.left.saturating_sub(1);
        self.last = now;
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// Log a line that is due, after `unsaid` others that were not.
pub(super) fn warn(what: impl Display, unsaid: u64) {
    match unsaid {
        0 => log::warn!("{what}"),
        _ => log::warn!("{what} (and {unsaid} warnings before it that were not logged)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_warnings_becomes_one_line_a_second_that_counts_them() {
        let mut complaints = Complaints::default();
        let start = complaints.last;
        let logged = |complaints: &mut Complaints, at: Duration, count: usize| {
            (0..count).filter_map(|_| complaints.due(start + at)).collect::<Vec<_>>()
        };
        assert_eq!(logged(&mut complaints, Duration::ZERO, 1000), [0; BURST as usize]);
        assert_eq!(logged(&mut complaints, Duration::from_millis(999), 10), [0; 0]);
        assert_eq!(logged(&mut complaints, Duration::from_secs(1), 10), [1000 - u64::from(BURST) + 10]);
        assert_eq!(logged(&mut complaints, Duration::from_secs(3), 1), [9]);
    }
}
