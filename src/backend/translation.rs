//! What a ring behind an IOMMU waits for, and who waits for it.
//!
//! A ring goes on until it needs an I/O address that nobody has told us. Then it asks, once, and goes on from there when
//! it is told: what it could not take stays in the ring. vhost-user specification, "IOMMU support".

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::error::RingError;
use crate::memory::IovaRange;
use crate::virtqueue::{Chain, Used};

/// How long the front-end may take to say where an I/O address is.
pub(super) const MISS_DEADLINE: Duration = Duration::from_secs(5);

/// An I/O address that a ring cannot go on without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Miss {
    pub iova: u64,
    pub writable: bool,
    /// When the front-end was asked.
    asked: Option<Instant>,
    /// Why it will not tell.
    refused: Option<String>,
}

/// One ring's account of its I/O addresses. Nothing happens in here without an IOMMU.
#[derive(Debug, Default)]
pub(super) struct Translation {
    miss: Option<Miss>,
    /// The ring's own addresses were taken back: it is not touched until they are mapped again.
    is_unmapped: bool,
    /// Somebody has tried to use the ring since: the front-end is not asked for rings that a driver is about to give up.
    is_wanted: bool,
    /// How often the front-end was asked since the last chain that was taken.
    asked_in_vain: usize,
    /// Where the requests in flight have their buffers, by head.
    in_flight: HashMap<u16, Box<[IovaRange]>>,
    /// Somebody waits until no request has its buffers here.
    released: Option<IovaRange>,
}

impl Translation {
    pub fn is_unmapped(&self) -> bool {
        self.is_unmapped
    }

    /// The ring may not be touched.
    pub fn unmap(&mut self) {
        self.is_unmapped = true;
    }

    /// Somebody wants to use the ring. Returns whether it has to be asked for first, and nobody wanted it before.
    pub fn want(&mut self) -> bool {
        self.is_unmapped && !std::mem::replace(&mut self.is_wanted, true)
    }

    pub fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// The ring is mapped, wherever it was.
    pub fn remap(&mut self) {
        self.is_unmapped = false;
        self.is_wanted = false;
    }

    /// The ring cannot go on. Returns whether that is news.
    pub fn set_miss(&mut self, iova: u64, writable: bool) -> bool {
        if self.miss.as_ref().is_some_and(|miss| (miss.iova, miss.writable) == (iova, writable)) {
            return false;
        }
        self.miss = Some(Miss { iova, writable, asked: None, refused: None });
        true
    }

    /// What the front-end has yet to be asked.
    pub fn to_ask(&self) -> Option<(u64, bool)> {
        self.miss.as_ref().filter(|miss| miss.asked.is_none()).map(|miss| (miss.iova, miss.writable))
    }

    /// The front-end was asked just now.
    pub fn set_asked(&mut self, now: Instant) {
        if let Some(miss) = &mut self.miss {
            miss.asked = Some(now);
            self.asked_in_vain += 1;
        }
    }

    /// What was asked before counts as asked just now.
    pub fn extend(&mut self, now: Instant) {
        if let Some(asked) = self.miss.as_mut().and_then(|miss| miss.asked.as_mut()) {
            *asked = now;
        }
    }

    /// The front-end said no to a question, which may be an old one.
    pub fn refuse(&mut self, iova: u64, reason: String) {
        if let Some(miss) = self.miss.as_mut().filter(|miss| miss.iova == iova) {
            miss.refused = Some(reason);
        }
    }

    /// `range` was mapped. Returns whether that is what the ring waits for.
    pub fn update(&mut self, range: IovaRange) -> bool {
        self.miss.take_if(|miss| range.contains(miss.iova)).is_some()
    }

    /// Why the ring cannot go on at all: the front-end refused, or did not answer in time, or has answered `limit` times
    /// without bringing the ring any further.
    pub fn failure(&self, now: Instant, limit: usize) -> Option<RingError> {
        let Miss { iova, writable, asked, refused } = self.miss.as_ref()?;
        let (iova, writable) = (*iova, *writable);
        let reason = match (refused, asked) {
            (Some(reason), _) => reason.clone(),
            (None, Some(asked)) if now.duration_since(*asked) >= MISS_DEADLINE => {
                format!("the front-end has not said where it is for {} seconds", MISS_DEADLINE.as_secs())
            }
            _ if self.asked_in_vain > limit => {
                format!("a single chain needs more than the {limit} mappings that are kept at a time")
            }
            _ => return None,
        };
        Some(RingError::Untranslated { iova, writable, reason })
    }

    /// When [`failure`](Self::failure) should be asked for again.
    pub fn deadline(&self) -> Option<Instant> {
        Some(self.miss.as_ref()?.asked? + MISS_DEADLINE)
    }

    /// Chains were taken.
    pub fn take(&mut self, chains: &[Chain]) {
        self.asked_in_vain = 0;
        self.in_flight.extend(chains.iter().map(|chain| (chain.head(), chain.mapped().into())));
    }

    /// Chains were given back. Returns whether somebody waits for that.
    pub fn complete(&mut self, used: &[Used]) -> bool {
        if self.in_flight.is_empty() {
            return false;
        }
        for entry in used {
            self.in_flight.remove(&entry.head);
        }
        let (in_flight, is_used) = (&self.in_flight, Self::is_used);
        self.released.take_if(|range| !is_used(in_flight, *range)).is_some()
    }

    /// Whether no request in flight has its buffers in `range`. If one has, [`complete`](Self::complete) tells when none
    /// has any more.
    pub fn is_released(&mut self, range: IovaRange) -> bool {
        let is_used = Self::is_used(&self.in_flight, range);
        self.released = is_used.then_some(range);
        !is_used
    }

    fn is_used(in_flight: &HashMap<u16, Box<[IovaRange]>>, range: IovaRange) -> bool {
        in_flight.values().flatten().any(|used| used.overlaps(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than any test asks in vain.
    const LIMIT: usize = 100;

    #[test]
    fn a_question_that_is_not_answered_in_time_is_a_failure_that_names_it() {
        let (mut translation, now) = (Translation::default(), Instant::now());
        assert!(translation.set_miss(0x1234, true));
        assert!(!translation.set_miss(0x1234, true), "it is asked once");
        assert_eq!(translation.to_ask(), Some((0x1234, true)));
        assert_eq!(translation.failure(now + MISS_DEADLINE, LIMIT), None, "nobody was asked yet");
        translation.set_asked(now);
        assert_eq!(translation.to_ask(), None);
        assert_eq!(translation.deadline(), Some(now + MISS_DEADLINE));
        assert_eq!(translation.failure(now, LIMIT), None);
        let text = translation.failure(now + MISS_DEADLINE, LIMIT).unwrap().to_string();
        assert!(
            text.contains("I/O address 0x1234 is not mapped (for writing)") && text.contains("5 seconds"),
            "{text}"
        );
        translation.extend(now + MISS_DEADLINE);
        assert_eq!(translation.failure(now + MISS_DEADLINE, LIMIT), None, "we have not listened until now");
    }

    #[test]
    fn only_what_was_asked_for_is_an_answer() {
        let mut translation = Translation::default();
        translation.set_miss(0x1234, false);
        translation.refuse(0x5678, "an old question".to_owned());
        assert!(!translation.update(IovaRange::new(0x2000, 0x1000).unwrap()));
        assert_eq!(translation.failure(Instant::now(), LIMIT), None);
        assert!(translation.update(IovaRange::new(0x1000, 0x1000).unwrap()));
        assert_eq!(translation.to_ask(), None);
    }

    #[test]
    fn a_chain_that_no_number_of_answers_completes_is_a_failure() {
        let (mut translation, now) = (Translation::default(), Instant::now());
        for page in 0..=LIMIT as u64 {
            assert_eq!(translation.failure(now, LIMIT), None);
            translation.set_miss(page << 12, false);
            translation.set_asked(now);
        }
        let text = translation.failure(now, LIMIT).unwrap().to_string();
        assert!(text.contains("more than the 100 mappings"), "{text}");
    }
}
