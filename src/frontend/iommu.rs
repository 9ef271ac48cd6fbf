//! The driver's IOMMU: what a device is told when it asks where an I/O address is.
//!
//! Guest memory is mapped as a whole when it is shared, at I/O addresses that are no guest addresses, and a device is told
//! of it page by page, when it asks. vhost-user specification, "IOMMU support".

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::lock;
use crate::memory::{Access, Iotlb, IovaRange, Permission, Unmapped};
use crate::protocol;

/// What the I/O address of a byte has more than its guest address, unless it is mapped elsewhere.
pub const IO_OFFSET: u64 = 0xff00_0000_0000;

/// What an answer to a question is about.
const PAGE: u64 = 4096;

/// Questions that are not answered yet. A device has one for each queue.
const MAX_QUESTIONS: usize = 1024;

/// A miss, and whether its sender wants to know that it was answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub iova: u64,
    pub need_reply: bool,
}

#[derive(Debug)]
pub(super) struct Iommu {
    /// Everything that is mapped, be the device told or not.
    table: Arc<Iotlb>,
    questions: Mutex<VecDeque<Question>>,
    asked: AtomicU64,
}

impl Default for Iommu {
    fn default() -> Self {
        let table = Arc::new(Iotlb::with_capacity(usize::MAX));
        Self { table, questions: Mutex::default(), asked: AtomicU64::default() }
    }
}

impl Iommu {
    pub fn table(&self) -> &Arc<Iotlb> {
        &self.table
    }

    /// How often a device has asked.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Keep a question until somebody can answer it. False if there are too many.
    pub fn ask(&self, question: Question) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut questions = lock(&self.questions);
        let has_room = questions.len() < MAX_QUESTIONS;
        if has_room {
            questions.push_back(question);
        }
        has_room
    }

    pub fn has_questions(&self) -> bool {
        !lock(&self.questions).is_empty()
    }

    pub fn next_question(&self) -> Option<Question> {
        lock(&self.questions).pop_front()
    }

    /// What a device is told that asks for `iova`: the page that it is on, as far as it is mapped in one piece. None if it
    /// is not mapped.
    pub fn answer(&self, iova: u64) -> Option<protocol::Iotlb> {
        let allows = |access| self.first_piece(iova, 1, access).is_some();
        let bits = [Access::Read, Access::Write].into_iter().filter(|access| allows(*access));
        let permission = bits.fold(0, |bits, access| bits | Permission::from(access).bits());
        let access = if allows(Access::Read) { Access::Read } else { Access::Write };
        let page = iova - iova % PAGE;
        // A mapping need not begin with a page.
        let is_mapped = self.first_piece(page, iova - page + 1, access).is_some_and(|(_, length)| length > iova - page);
        let start = if is_mapped { page } else { iova };
        let (user_address, size) = self.first_piece(start, PAGE - start % PAGE, access)?;
        Some(protocol::Iotlb {
            iova: start,
            size,
            user_address,
            permission,
            kind: protocol::Iotlb::UPDATE,
            padding: [0; 6],
        })
    }

    /// Where the first of `length` I/O addresses leads, and how many of them follow it there.
    fn first_piece(&self, iova: u64, length: u64, access: Access) -> Option<(u64, u64)> {
        let mut first = None;
        // That it goes on elsewhere, or not at all, is no matter.
        let _ = self.table.look_up(iova, length, access, |user_address, length| {
            first.get_or_insert((user_address, length));
            Ok::<_, Unmapped>(())
        });
        first
    }

    /// Map all of a region.
    pub fn map_region(&self, region: protocol::Region) {
        if let Some(range) = IovaRange::new(region.guest_address + IO_OFFSET, region.size) {
            self.table.update(range, region.user_address, Permission::READ_WRITE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_of_the_page_that_it_asks_for_and_of_no_more() {
        let iommu = Iommu::default();
        iommu.table.update(IovaRange::new(0x1000, 0x3000).unwrap(), 0x7000, Permission::READ);
        let told = iommu.answer(0x2345).unwrap();
        assert_eq!((told.iova, told.size, told.user_address, told.permission), (0x2000, 0x1000, 0x8000, 1));
        assert_eq!(iommu.answer(0x4000), None);
    }

    #[test]
    fn a_mapping_need_not_be_of_whole_pages() {
        let iommu = Iommu::default();
        iommu.table.update(IovaRange::new(0x1100, 0x200).unwrap(), 0x7000, Permission::READ_WRITE);
        let told = iommu.answer(0x1180).unwrap();
        assert_eq!((told.iova, told.size, told.user_address, told.permission), (0x1180, 0x180, 0x7080, 3));
    }
}
