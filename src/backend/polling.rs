//! When to look for requests for a while, and when to sleep until a kick.
//!
//! A thread that sleeps costs its driver the kick, and the next request the time to wake up. To look for requests instead
//! costs a processor, and pays only if one comes soon: whoever looked in vain lets ever more chances go by before it looks
//! again, up to a thousand. Where requests are far apart there are no chances, and nothing is spent at all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::event_loop::{Event, EventLoop};
use super::vring::Vring;
use crate::error::Error;

/// Looks at the rings between two at the clock.
const LOOKS: u32 = 16;

/// How long descriptors are not looked at because rings are, in one look and in many that find something at once.
const BLIND: Duration = Duration::from_micros(10);
const BLIND_IN_ALL: Duration = Duration::from_micros(100);

/// Whether it has been worth it, of one thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Polling {
    /// How long to look, at most.
    most: Duration,
    /// Looks in vain, less those that were not.
    vain: u32,
    /// Chances to let go by before the next look.
    skip: u32,
    /// When the descriptors were looked at while the rings were.
    looked: Option<Instant>,
}

impl Polling {
    const MOST_VAIN: u32 = 10;

    #[must_use]
    pub fn new(most: Duration) -> Self {
        Self { most, ..Self::default() }
    }

    /// Look for up to `most` from now on. If that is something else than before, nothing is known of its worth.
    pub fn set_most(&mut self, most: Duration) {
        if self.most != most {
            *self = Self::new(most);
        }
    }

    /// Whether the next [`wait`](Self::wait) looks at rings that are `busy`: then nobody need be asked to kick before it.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.skip == 0 && !self.most.is_zero()
    }

    /// Wait until something happens, which is appended to `events`, `timeout` passes or a signal arrives. At the rings that
    /// are `busy` is looked for a while first, if that is due: they were until now, and are not to kick. Returns false if
    /// there is something before that was over.
    pub fn wait(
        &mut self,
        sleep: &EventLoop,
        vrings: &[Arc<Vring>],
        busy: &[u16],
        timeout: Option<Duration>,
        events: &mut Vec<Event>,
    ) -> Result<bool, Error> {
        if !busy.is_empty() {
            // More is known to be waiting, or may come: look at the descriptors, but do not sleep.
            if self.is_due() && timeout.is_none_or(|timeout| !timeout.is_zero()) {
                return self.look(sleep, vrings, busy, events);
            }
            sleep.wait(Some(Duration::ZERO), events)?;
        } else if self.skip > 0 {
            let begin = Instant::now();
            sleep.wait(timeout, events)?;
            self.slept(begin.elapsed());
        } else {
            sleep.wait(timeout, events)?;
        }
        Ok(true)
    }

    fn look(
        &mut self,
        sleep: &EventLoop,
        vrings: &[Arc<Vring>],
        busy: &[u16],
        events: &mut Vec<Event>,
    ) -> Result<bool, Error> {
        let rings = || busy.iter().filter_map(|queue| vrings.get(usize::from(*queue)));
        let begin = Instant::now();
        let mut looked = *self.looked.get_or_insert(begin);
        let mut blind = BLIND_IN_ALL;
        let mut now = begin;
        loop {
            if now - looked >= blind {
                looked = now;
                self.looked = Some(now);
                if sleep.wait(Some(Duration::ZERO), events)? {
                    return Ok(false);
                }
            }
            blind = BLIND;
            for _ in 0..LOOKS {
                if rings().any(|vring| vring.available() > 0) {
                    self.found();
                    return Ok(false);
                }
                std::hint::spin_loop();
            }
            now = Instant::now();
            if now - begin >= self.most {
                self.missed();
                return Ok(true);
            }
        }
    }

    fn found(&mut self) {
        self.vain = self.vain.saturating_sub(1);
    }

    fn missed(&mut self) {
        self.vain = (self.vain + 1).min(Self::MOST_VAIN);
        self.skip = (1 << self.vain) - 1;
    }

    /// A sleep is a chance that was let go by if it was so short that to look may have been better. It was longer than that
    /// would have taken by the time to wake up, which here and there is tens of microseconds.
    fn slept(&mut self, took: Duration) {
        if took < 2 * self.most {
            self.skip = self.skip.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtqueue::RingLimits;

    const MOST: Duration = Duration::from_micros(50);

    /// Wait with one ring that is empty and said to be busy. Returns what `wait` does.
    fn wait_with_a_busy_ring(polling: &mut Polling, sleep: &EventLoop) -> bool {
        let vrings = [Arc::new(Vring::new(0, 16, RingLimits::default(), sleep.wakeup()))];
        polling.wait(sleep, &vrings, &[0], None, &mut Vec::new()).unwrap()
    }

    #[test]
    fn a_look_in_vain_ends_and_the_next_time_there_is_none() {
        let sleep = EventLoop::new().unwrap();
        let mut polling = Polling::new(MOST);
        assert!(wait_with_a_busy_ring(&mut polling, &sleep));
        assert!(!polling.is_due());
        assert!(wait_with_a_busy_ring(&mut polling, &sleep));
    }

    #[test]
    fn who_is_woken_stops_looking_and_takes_it_for_neither() {
        let sleep = EventLoop::new().unwrap();
        let mut polling = Polling::new(Duration::from_secs(3600));
        sleep.wakeup().wake();
        assert!(!wait_with_a_busy_ring(&mut polling, &sleep));
        assert!(polling.is_due());
    }

    /// How often of `sleeps`, which take so long each, there is a look before, if each comes to nothing.
    fn looks_in_vain(sleeps: u32, took: Duration) -> u32 {
        let mut polling = Polling::new(MOST);
        let mut looks = 0;
        for _ in 0..sleeps {
            if polling.is_due() {
                looks += 1;
                polling.missed();
            }
            polling.slept(took);
        }
        looks
    }

    #[test]
    fn a_thread_whose_requests_are_far_apart_looks_once() {
        assert_eq!(looks_in_vain(1_000_000, Duration::from_millis(1)), 1);
    }

    #[test]
    fn who_never_finds_anything_looks_ever_less_often() {
        // 1, 3, 7 … 1023 chances go by.
        assert_eq!(looks_in_vain(2046, Duration::from_micros(20)), 11);
        assert_eq!(looks_in_vain(2046 + 1023 * 100, Duration::from_micros(20)), 111);
    }

    #[test]
    fn who_finds_as_often_as_not_goes_on_and_who_found_much_takes_no_longer_to_give_up() {
        let mut polling = Polling::new(MOST);
        for _ in 0..1000 {
            polling.found();
        }
        polling.missed();
        assert!(!polling.is_due());
        polling.slept(MOST);
        assert!(polling.is_due());
        for _ in 0..1000 {
            polling.found();
            polling.missed();
            polling.slept(MOST);
            assert!(polling.is_due());
        }
    }

    #[test]
    fn who_may_not_look_never_does() {
        let mut polling = Polling::new(Duration::ZERO);
        assert!(!polling.is_due());
        polling.slept(Duration::ZERO);
        assert!(!polling.is_due());
    }
}
