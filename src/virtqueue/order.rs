//! IN_ORDER, device side: requests that are done early wait for those before them.
//!
//! Virtio 1.3, sections 2.7.9 and 2.8.9.

use std::collections::VecDeque;

use super::chain::Used;

/// The chains that the driver waits for, in the order in which it made them available.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// With what was written, once a chain is done.
    chains: VecDeque<(u16, Option<u32>)>,
}

impl Order {
    pub(super) fn taken(&mut self, head: u16) {
        self.chains.push_back((head, None));
    }

    /// The chain that was taken last was put back.
    pub(super) fn put_back(&mut self) {
        self.chains.pop_back();
    }

    /// A chain is done: `give` those that may be given back by now.
    pub(super) fn done(&mut self, used: Used, mut give: impl FnMut(Used)) {
        if let Some((_, written)) = self.chains.iter_mut().find(|chain| **chain == (used.head, None)) {
            *written = Some(used.written);
        }
        while let Some(&(head, Some(written))) = self.chains.front() {
            self.chains.pop_front();
            give(Used { head, written });
        }
    }

    /// Chains that the driver waits for, whether they are done or not.
    pub(super) fn waiting(&self) -> u16 {
        // Fewer than the ring has entries.
        self.chains.len() as u16
    }
}
