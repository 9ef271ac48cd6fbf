//! When to show a driver what is done of a batch of requests that take a while each, and when to notify it.
//!
//! A driver that sleeps takes some time to wake up and to make other requests. If it is notified so long before the batch
//! is over, the device need not wait for it; if it is notified earlier, it has fewer requests to make, and has to be
//! notified more often, which costs the device more than most requests.

use std::time::{Duration, Instant};

/// How long what is done waits before a driver that looks for it sees it.
const GLANCE: Duration = Duration::from_micros(4);

/// Who lets requests wait for as long as this for others wants the driver to see them together.
pub const TOGETHER: Duration = Duration::from_millis(1);

/// What to do with the requests of a batch that are done, before the others are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// A driver that looks for them sees them.
    Quietly,
    /// And one that sleeps is woken.
    Notify,
}

/// How long the driver of a queue takes from a notification to other requests.
#[derive(Debug)]
pub struct Turnaround {
    estimate: Duration,
    /// When it was notified, until there are other requests.
    notified: Option<Instant>,
}

impl Default for Turnaround {
    fn default() -> Self {
        Self { estimate: Duration::from_micros(20), notified: None }
    }
}

impl Turnaround {
    const LEAST: Duration = Duration::from_micros(4);
    const MOST: Duration = Duration::from_micros(100);
    /// Who does not make requests by then has none to make.
    const IDLE: Duration = Duration::from_millis(1);

    /// So many requests that were taken at `taken` are worked on from now on.
    pub fn begin(&mut self, taken: Instant, patience: Duration, requests: usize) -> Lead {
        self.came(taken);
        // Of one by itself nothing is measured.
        let begin = if requests > 1 { Instant::now() } else { taken };
        // A batch has a few hundred requests.
        Lead { patience, begin, notified: begin, requests: requests as u32, done: 0, look_at: 1, led: false }
    }

    /// Another request of a batch is done. `came` tells whether the driver has made others since.
    pub fn after_one(&mut self, lead: &mut Lead, came: impl FnOnce() -> bool) -> Option<Show> {
        lead.done += 1;
        if lead.done < lead.look_at || lead.patience >= TOGETHER {
            return None;
        }
        if lead.requests == 1 {
            // It can be shown no earlier, and says nothing of how long others take.
            return Some(Show::Notify);
        }
        let now = Instant::now();
        if self.notified.is_some() && came() {
            self.came(now);
        }
        let show = lead.look(now, self.estimate);
        if show == Show::Notify {
            self.notified(|| now);
        }
        Some(show)
    }

    /// The driver is notified now.
    pub fn notified(&mut self, now: impl FnOnce() -> Instant) {
        self.notified.get_or_insert_with(now);
    }

    /// There are other requests now.
    fn came(&mut self, now: Instant) {
        let Some(notified) = self.notified.take() else { return };
        let took = now - notified;
        if took < Self::IDLE {
            self.estimate = ((3 * self.estimate + took) / 4).clamp(Self::LEAST, Self::MOST);
        }
    }
}

/// One batch on its way.
#[derive(Debug)]
pub struct Lead {
    patience: Duration,
    begin: Instant,
    notified: Instant,
    requests: u32,
    done: u32,
    /// After how many requests to look at the clock, which costs as much as a small part of one.
    look_at: u32,
    /// Whether the driver was notified early enough.
    led: bool,
}

impl Lead {
    /// Requests between two looks at the clock. A driver that looks at the ring has its cache lines when the next ones are
    /// shown: to get them back costs as much as a small request.
    const MOST_UNSEEN: u32 = 8;

    fn look(&mut self, now: Instant, turnaround: Duration) -> Show {
        let spent = now - self.begin;
        let each = spent / self.done;
        let fit = GLANCE.as_nanos() / each.as_nanos().max(1);
        let rest = self.requests.saturating_sub(self.done);
        // Half of a short batch, after which the driver may be notified, must not be passed by unseen.
        let most = if self.led { Self::MOST_UNSEEN } else { Self::MOST_UNSEEN.min(rest / 2) };
        self.look_at = self.done + (fit as u32).clamp(1, most.max(1));
        let left = each * rest;
        let is_time = !self.led && left <= turnaround && spent >= left;
        if is_time || now - self.notified >= self.patience {
            self.led |= is_time;
            self.notified = now;
            return Show::Notify;
        }
        Show::Quietly
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_micros(200);

    /// After which of `requests`, each of which takes so long, a driver is notified that takes 30 µs to make others.
    fn notified_after(requests: u32, each: Duration, patience: Duration) -> Vec<u32> {
        let mut lead = Turnaround::default().begin(Instant::now(), patience, requests as usize);
        let mut notified = Vec::new();
        for done in 1..=requests {
            lead.done = done;
            let now = lead.begin + each * done;
            if lead.done >= lead.look_at && lead.look(now, Duration::from_micros(30)) == Show::Notify {
                notified.push(done);
            }
        }
        notified
    }

    #[test]
    fn a_driver_is_notified_so_early_that_it_is_back_when_the_batch_is_over() {
        assert_eq!(notified_after(32, Duration::from_micros(2), PATIENCE), [17]);
        assert_eq!(notified_after(64, Duration::from_micros(2), PATIENCE), [49]);
    }

    #[test]
    fn a_short_batch_is_over_before_a_driver_could_be_back_and_half_of_it_has_to_do() {
        assert_eq!(notified_after(32, Duration::from_micros(1), PATIENCE), [17]);
        assert_eq!(notified_after(8, Duration::from_nanos(500), PATIENCE), [4]);
    }

    #[test]
    fn what_is_done_of_a_long_batch_waits_no_longer_than_it_may() {
        let slow = Duration::from_millis(1);
        assert_eq!(notified_after(4, slow, PATIENCE), [1, 2, 3, 4]);
        assert_eq!(notified_after(8, Duration::from_micros(50), PATIENCE), [4, 8]);
    }

    #[test]
    fn who_wants_requests_together_gets_them_together() {
        let mut turnaround = Turnaround::default();
        let mut lead = turnaround.begin(Instant::now(), Duration::from_secs(60), 2);
        assert_eq!(turnaround.after_one(&mut lead, || true), None);
        assert_eq!(turnaround.after_one(&mut lead, || true), None);
    }

    #[test]
    fn how_long_a_driver_takes_is_learned_unless_it_has_nothing_to_do() {
        let mut turnaround = Turnaround::default();
        let begin = Instant::now();
        for _ in 0..32 {
            turnaround.notified(|| begin);
            turnaround.came(begin + Duration::from_micros(60));
        }
        assert!(turnaround.estimate > Duration::from_micros(55), "{:?}", turnaround.estimate);
        turnaround.notified(|| begin);
        turnaround.came(begin + Duration::from_secs(1));
        assert!(turnaround.estimate < Duration::from_micros(61), "{:?}", turnaround.estimate);
    }
}
