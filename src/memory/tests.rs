use std::os::fd::OwnedFd;
use std::sync::Arc;

use proptest::prelude::{any, prop_assert_eq, proptest};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::protocol;

fn file(size: u64) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    file
}

fn region(guest_address: u64, size: u64, file_offset: u64) -> protocol::Region {
    protocol::Region { guest_address, size, user_address: guest_address + 0x7000_0000_0000, file_offset }
}

fn refusal(regions: &[protocol::Region], file_size: u64) -> String {
    let files: Vec<_> = regions.iter().map(|_| file(file_size)).collect();
    Snapshot::from_table(regions, &files).unwrap_err().to_string()
}

fn segments(snapshot: &Snapshot, address: u64, length: u64) -> Result<Vec<usize>, OutsideMemory> {
    let mut lengths = Vec::new();
    snapshot.pieces(address, length, |segment| lengths.push(segment.length))?;
    Ok(lengths)
}

#[test]
fn what_is_written_through_a_region_is_in_its_file_at_its_offset() {
    let file = file(0x4000);
    let snapshot = Snapshot::from_table(&[region(0x10_0000, 0x1234, 0x1abc)], std::slice::from_ref(&file)).unwrap();
    snapshot
        .pieces(0x10_0010, 5, |segment| {
            // SAFETY: the segment is valid as long as the snapshot, which outlives this closure.
            unsafe { access::write(segment.pointer.as_ptr(), b"hello") }
        })
        .unwrap();
    let mut bytes = [0; 5];
    rustix::io::pread(&file, &mut bytes, 0x1abc + 0x10).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn a_range_over_adjacent_regions_gives_a_segment_in_each() {
    let (low, high) = (region(0x1000, 0x1000, 0), region(0x2000, 0x1000, 0));
    let snapshot = Snapshot::from_table(&[high, low], &[file(0x1000), file(0x1000)]).unwrap();
    assert_eq!(segments(&snapshot, 0x1ff0, 0x20), Ok(vec![0x10, 0x10]));
    assert_eq!(segments(&snapshot, 0x1000, 0x2000), Ok(vec![0x1000, 0x1000]));
    assert_eq!(segments(&snapshot, 0x1000, 0x2001), Err(OutsideMemory));
}

#[test]
fn a_range_that_leaves_memory_by_one_byte_is_outside() {
    let snapshot = Snapshot::from_table(&[region(0x1000, 0x1000, 0)], &[file(0x1000)]).unwrap();
    assert_eq!(segments(&snapshot, 0x1fff, 1), Ok(vec![1]));
    assert_eq!(segments(&snapshot, 0x1fff, 2), Err(OutsideMemory));
    assert_eq!(segments(&snapshot, 0xfff, 2), Err(OutsideMemory));
    assert_eq!(segments(&snapshot, 0x2000, 1), Err(OutsideMemory));
    assert_eq!(segments(&snapshot, u64::MAX, 2), Err(OutsideMemory));
    assert_eq!(segments(&snapshot, 0x1000, u64::MAX), Err(OutsideMemory));
    assert_eq!(segments(&snapshot, 0, 0), Ok(vec![]));
}

#[test]
fn a_user_address_is_found_only_if_one_region_holds_the_whole_range() {
    let snapshot =
        Snapshot::from_table(&[region(0x1000, 0x1000, 0), region(0x2000, 0x1000, 0)], &[file(0x1000), file(0x1000)])
            .unwrap();
    assert!(snapshot.user_pointer(0x7000_0000_1800, 0x800).is_some());
    assert!(snapshot.user_pointer(0x7000_0000_1800, 0x801).is_none());
    assert!(snapshot.user_pointer(0x7000_0000_0fff, 1).is_none());
    assert!(snapshot.user_pointer(0x7000_0000_1800, u64::MAX).is_none());
}

#[test]
fn impossible_regions_are_refused_with_what_is_wrong() {
    assert!(refusal(&[region(0, 0, 0)], 0x1000).contains("no bytes"));
    assert!(refusal(&[region(0x1000, 0x2000, 0)], 0x1000).contains("its file, which has 0x1000"));
    assert!(refusal(&[region(0x1000, 0x1000, 1)], 0x1000).contains("its file"));
    assert!(refusal(&[region(0x1000, 0x1000, u64::MAX - 1)], 0x1000).contains("no file can hold"));
    let wraps = protocol::Region { guest_address: u64::MAX, size: 0x1000, user_address: 0, file_offset: 0 };
    assert!(refusal(&[wraps], 0x1000).contains("end of the address space"));
    let wraps = protocol::Region { guest_address: 0, size: 0x1000, user_address: u64::MAX - 1, file_offset: 0 };
    assert!(refusal(&[wraps], 0x1000).contains("end of the address space"));
    assert!(refusal(&[region(0x1000, 0x1000, 0), region(0x1fff, 0x1000, 0)], 0x1000).contains("overlap"));
    let alias = protocol::Region { guest_address: 0x9000, ..region(0x1000, 0x1000, 0) };
    assert!(refusal(&[region(0x1000, 0x1000, 0), alias], 0x1000).contains("user addresses"));
}

#[test]
fn a_region_is_removed_by_its_addresses_and_size() {
    let (first, second) = (region(0x1000, 0x1000, 0), region(0x2000, 0x1000, 0));
    let snapshot = Snapshot::from_table(&[first], &[file(0x1000)]).unwrap();
    let snapshot = snapshot.with(second, &file(0x1000)).unwrap();
    assert_eq!((snapshot.len(), snapshot.size()), (2, 0x2000));
    let wrong = protocol::Region { size: 0x800, ..first };
    assert!(snapshot.without(&wrong).is_err());
    let ignoring_offset = protocol::Region { file_offset: 77, ..first };
    let snapshot = snapshot.without(&ignoring_offset).unwrap();
    assert_eq!(segments(&snapshot, 0x1000, 1), Err(OutsideMemory));
    assert_eq!(segments(&snapshot, 0x2000, 1), Ok(vec![1]));
}

#[test]
fn memory_outlives_the_table_that_brought_it_as_long_as_a_snapshot_holds_it() {
    let old = Snapshot::from_table(&[region(0x1000, 0x1000, 0)], &[file(0x1000)]).unwrap();
    let new = old.without(&region(0x1000, 0x1000, 0)).unwrap();
    assert!(new.is_empty());
    assert_eq!(segments(&old, 0x1000, 0x1000), Ok(vec![0x1000]));
}

#[test]
fn a_file_that_shrinks_under_its_mapping_marks_the_region_and_spares_the_process() {
    let file = file(0x3000);
    let snapshot = Snapshot::from_table(&[region(0x1000, 0x3000, 0)], std::slice::from_ref(&file)).unwrap();
    let before = faults_seen();
    ftruncate(&file, 0x1000).unwrap();
    let mut bytes = [1; 100];
    snapshot
        .pieces(0x3000, 100, |segment| {
            // SAFETY: the segment is valid as long as the snapshot, which outlives this closure.
            unsafe { access::read(segment.pointer.as_ptr(), &mut bytes) }
        })
        .unwrap();
    assert_eq!(bytes, [0; 100]);
    assert!(faults_seen() > before);
    assert_eq!(snapshot.lost_region().map(|region| region.guest_address), Some(0x1000));
}

#[test]
fn every_address_is_found_whether_or_not_regions_begin_at_multiples_of_anything() {
    let page = 0x1000;
    for layout in [
        &[(0, 1), (1, 1), (2, 4), (6, 2)][..],
        &[(0, 4), (8, 4), (16, 1)],
        &[(3, 1), (5, 2), (7, 1), (0x10_0000, 3)],
        // So far apart that many share a granule.
        &[(1, 1), (2, 1), (4, 1), (0x10_0000_0001, 1), (0x10_0000_0002, 1)],
    ] {
        let regions: Vec<_> = layout.iter().map(|(start, pages)| region(start * page, pages * page, 0)).collect();
        let files: Vec<_> = regions.iter().map(|region| file(region.size)).collect();
        let snapshot = Snapshot::from_table(&regions, &files).unwrap();
        let holds =
            |address: u64| regions.iter().any(|region| address.wrapping_sub(region.guest_address) < region.size);
        for region in &regions {
            for address in [region.guest_address, region.guest_address + region.size] {
                for address in [address.wrapping_sub(1), address, address + 1] {
                    let found = segments(&snapshot, address, 1);
                    assert_eq!(found, if holds(address) { Ok(vec![1]) } else { Err(OutsideMemory) }, "{address:#x}");
                }
            }
            let user = region.user_address + region.size - 1;
            let mut host = None;
            snapshot.pieces(region.guest_address + region.size - 1, 1, |piece| host = Some(piece.pointer)).unwrap();
            assert_eq!(host, snapshot.user_pointer(user, 1), "another byte than the region's last");
        }
    }
}

// --- Behind an IOMMU --------------------------------------------------------------------------------------------------

/// A region of two pages, and another one right after it, behind an IOMMU that knows nothing yet.
fn behind_an_iommu() -> Snapshot {
    let (low, high) = (region(0x1000, 0x2000, 0), region(0x3000, 0x1000, 0));
    let snapshot = Snapshot::from_table(&[low, high], &[file(0x2000), file(0x1000)]).unwrap();
    snapshot.behind(Some(Arc::new(Iotlb::default())))
}

fn message(iova: u64, size: u64, user_address: u64, permission: u8) -> protocol::Iotlb {
    protocol::Iotlb { iova, size, user_address, permission, kind: 2, padding: [0; 6] }
}

fn resolved(snapshot: &Snapshot, iova: u64, length: u64, access: Access) -> Result<Vec<usize>, Untranslated> {
    let mut lengths = Vec::new();
    snapshot.resolve(iova, length, access, |segment| lengths.push(segment.length))?;
    Ok(lengths)
}

#[test]
fn an_io_address_leads_to_the_memory_that_it_is_mapped_to() {
    let snapshot = behind_an_iommu();
    snapshot.map(&message(0xa000, 0x1000, 0x7000_0000_2000, 3)).unwrap();
    let mut pointer = None;
    snapshot.resolve(0xa010, 1, Access::Write, |segment| pointer = Some(segment.pointer)).unwrap();
    assert_eq!(pointer, snapshot.user_pointer(0x7000_0000_2010, 1));
    assert_eq!(snapshot.ring_part(0xa010, 0xff0, Access::Read).unwrap().pointer(), pointer.unwrap());
    // Without the IOMMU it is a guest address, where nothing is.
    assert_eq!(resolved(&snapshot.behind(None), 0xa010, 1, Access::Write), Err(Untranslated::Outside));
}

#[test]
fn pages_that_follow_each_other_in_a_region_are_one_segment() {
    let snapshot = behind_an_iommu();
    for (iova, user) in [(0xa000, 0x1000), (0xb000, 0x2000), (0xc000, 0x3000), (0xd000, 0x1000)] {
        snapshot.map(&message(iova, 0x1000, 0x7000_0000_0000 + user, 3)).unwrap();
    }
    assert_eq!(resolved(&snapshot, 0xa000, 0x4000, Access::Read), Ok(vec![0x2000, 0x1000, 0x1000]));
}

/// Lead I/O addresses from 0xa000 on to these user pages, one after the other.
fn scatter(snapshot: &Snapshot, pages: &[u64]) {
    for (at, page) in pages.iter().enumerate() {
        snapshot.map(&message(0xa000 + at as u64 * 0x1000, 0x1000, 0x7000_0000_0000 + page, 3)).unwrap();
    }
}

#[test]
fn a_part_of_a_ring_on_scattered_pages_is_in_one_piece_here_and_is_the_same_memory() {
    let (low, high) = (file(0x4000), file(0x1000));
    // The first region begins with the second page of its file.
    let regions = [region(0x1000, 0x2000, 0x1000), region(0x3000, 0x1000, 0)];
    let files = [low.try_clone().unwrap(), high.try_clone().unwrap()];
    let snapshot = Snapshot::from_table(&regions, &files).unwrap().behind(Some(Arc::new(Iotlb::default())));
    scatter(&snapshot, &[0x3000, 0x2000, 0x1000]);
    let part = snapshot.ring_part(0xaff0, 0x1020, Access::Write).unwrap();
    let bytes: Vec<u8> = (0..0x1020).map(|at| at as u8 ^ (at >> 8) as u8).collect();
    // SAFETY: the part is that long, and outlives the call.
    unsafe { access::write(part.pointer().as_ptr(), &bytes) };
    let mut seen = vec![0; 0x1020];
    for (file, offset, range) in [(&high, 0xff0, 0..0x10), (&low, 0x2000, 0x10..0x1010), (&low, 0x1000, 0x1010..0x1020)]
    {
        rustix::io::pread(file, &mut seen[range], offset).unwrap();
    }
    assert_eq!(seen, bytes);
    rustix::io::pwrite(&low, b"hello", 0x2000).unwrap();
    let mut hello = [0; 5];
    // SAFETY: as above.
    unsafe { access::read(part.pointer().as_ptr().add(0x10), &mut hello) };
    assert_eq!(&hello, b"hello");
    let ranges = |offset, length| {
        let mut ranges = Vec::new();
        part.guest_ranges(offset, length, |start, length| ranges.push((start, length)));
        ranges
    };
    assert_eq!(ranges(0, 0x1020), [(0x3ff0, 0x10), (0x2000, 0x1000), (0x1000, 0x10)]);
    assert_eq!(ranges(0x0f, 2), [(0x3fff, 1), (0x2000, 1)]);
    assert_eq!(ranges(0x10, 0x1000), [(0x2000, 0x1000)]);
    assert_eq!(ranges(0x101f, 1), [(0x100f, 1)]);
    assert_eq!(ranges(0x1020, 1), []);
    assert_eq!(ranges(5, 0), []);
}

#[test]
fn a_scattered_part_outlives_the_snapshot_that_it_came_from() {
    let snapshot = behind_an_iommu();
    scatter(&snapshot, &[0x2000, 0x1000]);
    let part = snapshot.ring_part(0xa000, 0x2000, Access::Write).unwrap();
    drop(snapshot);
    // SAFETY: the part is that long, and outlives the call.
    unsafe { access::write(part.pointer().as_ptr(), &[1; 0x2000]) };
}

#[test]
fn only_whole_pages_are_put_side_by_side() {
    let snapshot = behind_an_iommu();
    // Two halves of a page that come from two pages; and a page that is in the middle of two.
    snapshot.map(&message(0xa000, 0x800, 0x7000_0000_1000, 3)).unwrap();
    snapshot.map(&message(0xa800, 0x800, 0x7000_0000_2800, 3)).unwrap();
    snapshot.map(&message(0xb000, 0x1000, 0x7000_0000_1800, 3)).unwrap();
    for (iova, length) in [(0xa000, 0x1000), (0xaffc, 8)] {
        let refused = snapshot.ring_part(iova, length, Access::Read).unwrap_err();
        assert_eq!(refused, Untranslated::Scattered(Apart::NotPages));
    }
    assert!(snapshot.ring_part(0xa800, 0x800, Access::Read).is_ok());
}

#[test]
fn a_page_that_is_lost_where_it_is_mapped_a_second_time_is_lost_to_its_region() {
    let shrinking = file(0x2000);
    let regions = [region(0x1000, 0x1000, 0), region(0x8000, 0x2000, 0)];
    let files = [file(0x1000), shrinking.try_clone().unwrap()];
    let snapshot = Snapshot::from_table(&regions, &files).unwrap().behind(Some(Arc::new(Iotlb::default())));
    scatter(&snapshot, &[0x9000, 0x1000, 0x8000]);
    let part = snapshot.ring_part(0xa000, 0x3000, Access::Read).unwrap();
    let seen = faults_seen();
    ftruncate(&shrinking, 0x1000).unwrap();
    let mut bytes = [1; 0x3000];
    // SAFETY: the part is that long, and outlives the call.
    unsafe { access::read(part.pointer().as_ptr(), &mut bytes) };
    assert_eq!(bytes, [0; 0x3000]);
    assert!(faults_seen() > seen);
    assert_eq!(snapshot.lost_region().map(|region| region.guest_address), Some(0x8000));
}

#[test]
fn a_mapping_that_cannot_be_is_refused_with_what_is_wrong() {
    let snapshot = behind_an_iommu();
    let refusal = |iova, size, user, permission| snapshot.map(&message(iova, size, user, permission)).unwrap_err();
    assert!(refusal(0xa000, 0, 0x7000_0000_1000, 3).contains("are none, or wrap around"));
    assert!(refusal(u64::MAX, 2, 0x7000_0000_1000, 3).contains("are none, or wrap around"));
    assert!(refusal(0xa000, 0x1000, 0x7000_0000_1000, 0).contains("permission 0"));
    assert!(refusal(0xa000, 0x1000, 0x7000_0000_1000, 4).contains("permission 4"));
    assert!(refusal(0xa000, 0x2001, 0x7000_0000_1000, 3).contains("not inside one region"));
    assert!(refusal(0xa000, 0x1000, u64::MAX, 3).contains("not inside one region"));
    assert!(snapshot.iotlb().unwrap().is_empty());
    assert!(snapshot.behind(None).map(&message(0xa000, 0x1000, 0x7000_0000_1000, 3)).is_err());
}

#[test]
fn what_is_mapped_to_memory_that_goes_away_is_missed() {
    let snapshot = behind_an_iommu();
    snapshot.map(&message(0xa000, 0x1000, 0x7000_0000_1000, 3)).unwrap();
    snapshot.map(&message(0xb000, 0x1000, 0x7000_0000_3000, 3)).unwrap();
    let without = snapshot.without(&region(0x3000, 0x1000, 0)).unwrap();
    without.forget_lost_mappings();
    assert_eq!(resolved(&without, 0xa000, 0x10, Access::Read), Ok(vec![0x10]));
    let missed = Unmapped::Miss { iova: 0xb000, access: Access::Read };
    assert_eq!(resolved(&without, 0xb000, 0x10, Access::Read), Err(Untranslated::Iommu(missed)));
}

fn bits(file: &OwnedFd, offset: u64, bytes: usize) -> Vec<u64> {
    let mut log = vec![0; bytes];
    rustix::io::pread(file, &mut log, offset).unwrap();
    (0..bytes as u64 * 8).filter(|page| log[(page / 8) as usize] & 1 << (page % 8) != 0).collect()
}

proptest! {
    #[test]
    fn the_log_has_a_mark_for_each_page_that_a_range_touches_and_for_no_other(
        ranges in proptest::collection::vec((0u64..0x60_000, 0u64..0x9000), 1..6), size in 1u64..12, offset in 0u64..5000,
    ) {
        let file = file(offset + size + 8);
        let log = DirtyLog::map(protocol::Log { size, offset }, &file).unwrap();
        let touched = |page: u64| ranges.iter().any(|(start, length)| {
            *length > 0 && start / PAGE_SIZE <= page && page <= (start + length - 1) / PAGE_SIZE
        });
        for (start, length) in &ranges {
            log.mark(*start, *length);
        }
        let expected: Vec<u64> = (0..size * 8).filter(|page| touched(*page)).collect();
        prop_assert_eq!(bits(&file, offset, size as usize + 8), expected);
        prop_assert_eq!(log.complaint().is_some(), (size * 8..0x100).any(touched));
        prop_assert_eq!(log.complaint(), None);
    }

    #[test]
    fn a_range_anywhere_in_the_address_space_leaves_the_bytes_behind_the_log_alone(
        start in any::<u64>(), length in any::<u64>(),
    ) {
        let file = file(PAGE_SIZE);
        DirtyLog::map(protocol::Log { size: 1, offset: 0 }, &file).unwrap().mark(start, length);
        prop_assert_eq!(bits(&file, 1, PAGE_SIZE as usize - 1), Vec::<u64>::new());
    }
}

#[test]
fn no_mark_is_lost_to_a_front_end_that_clears_the_log_meanwhile() {
    let file = file(PAGE_SIZE);
    let log = DirtyLog::map(protocol::Log { size: 1, offset: 0 }, &file).unwrap();
    let theirs = Mapping::new(&file, 0, 1, "the same log").unwrap();
    std::thread::scope(|scope| {
        // Each marks the pages of one bit, over and over; every mark is seen by one look.
        let marker = scope.spawn(|| (0..100_000u64).for_each(|round| log.mark(round % 8 * PAGE_SIZE, 1)));
        let mut seen = 0;
        // SAFETY: the byte is in the mapping, which outlives this; the other side uses it as an atomic as well.
        let byte = unsafe { std::sync::atomic::AtomicU8::from_ptr(theirs.start().as_ptr()) };
        while !marker.is_finished() {
            seen |= byte.swap(0, std::sync::atomic::Ordering::AcqRel);
        }
        assert_eq!(seen | byte.load(std::sync::atomic::Ordering::Acquire), 0xff);
    });
}

#[test]
fn a_pointer_is_translated_back_to_its_guest_address() {
    let snapshot = Snapshot::from_table(
        &[region(0x1000, 0x1000, 0x40), region(0x10_0000, 0x2000, 0)],
        &[file(0x2000), file(0x2000)],
    )
    .unwrap();
    for address in [0x1000, 0x1fff, 0x10_0000, 0x10_1fff] {
        let mut back = None;
        snapshot.pieces(address, 1, |segment| back = snapshot.guest_address(segment.pointer)).unwrap();
        assert_eq!(back, Some(address));
    }
    assert_eq!(snapshot.guest_address(std::ptr::NonNull::dangling()), None);
}

/// Guest memory of which no page is there.
fn late_region(pages: u64) -> Arc<Region> {
    Arc::new(Region::map(region(0x10_0000, pages * 0x1000, 0), file(pages * 0x1000)).unwrap())
}

fn byte_at(region: &Region, offset: u64) -> u8 {
    let mut byte = [0];
    // SAFETY: the offset is inside the region, which the caller holds.
    unsafe { access::read(region.pointer(offset).as_ptr(), &mut byte) };
    byte[0]
}

fn wait_for_fault(userfault: &Userfault) -> u64 {
    let mut ready = [rustix::event::PollFd::new(userfault, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut ready, None), Ok(1));
    userfault.next_fault().unwrap().unwrap()
}

/// None where the system does not let this process have one: postcopy is not offered there either.
fn userfault() -> Option<Userfault> {
    if !Userfault::is_available() {
        eprintln!("this process may not open a userfaultfd: nothing is tested of it");
        return None;
    }
    Some(Userfault::open().unwrap())
}

#[test]
fn whoever_touches_a_missing_page_waits_until_it_is_provided() {
    let Some(userfault) = userfault() else { return };
    let region = late_region(3);
    userfault.register(region.pages()).unwrap();
    let start = region.host().addr().get() as u64;
    let reader = std::thread::spawn({
        let region = Arc::clone(&region);
        move || (byte_at(&region, 0x1005), byte_at(&region, 0x2005))
    });
    assert_eq!(wait_for_fault(&userfault), start + 0x1000);
    assert!(userfault.copy(start + 0x1000, &[7; 0x2000]).unwrap());
    assert_eq!(reader.join().unwrap(), (7, 7));
    assert!(!userfault.copy(start + 0x1000, &[8; 0x1000]).unwrap(), "a page that is there stays");
    assert_eq!(byte_at(&region, 0x1005), 7);
    userfault.unregister(region.pages()).unwrap();
    assert_eq!(byte_at(&region, 0), 0);
    assert!(!region.is_lost());
}

#[test]
fn a_page_that_is_to_be_mapped_a_second_time_is_waited_for() {
    let Some(userfault) = userfault() else { return };
    let snapshot = behind_an_iommu();
    scatter(&snapshot, &[0x3000, 0x1000]);
    let late = Arc::clone(&snapshot.regions()[0]);
    userfault.register(late.pages()).unwrap();
    let reader = std::thread::spawn(move || {
        let part = snapshot.ring_part(0xa000, 0x2000, Access::Write).unwrap();
        let mut byte = [0];
        // SAFETY: the part is that long, and outlives the call.
        unsafe { access::read(part.pointer().as_ptr().add(0x1005), &mut byte) };
        byte[0]
    });
    let start = late.host().addr().get() as u64;
    assert_eq!(wait_for_fault(&userfault), start);
    assert!(userfault.copy(start, &[7; 0x1000]).unwrap());
    assert_eq!(reader.join().unwrap(), 7);
}

#[test]
fn a_page_that_never_comes_is_lost_and_in_a_system_call_an_error() {
    let Some(userfault) = userfault() else { return };
    let region = late_region(4);
    userfault.register(region.pages()).unwrap();
    let start = region.host().addr().get() as u64;
    assert!(userfault.copy(start + 0x1000, &[7; 0x1000]).unwrap());
    let (zeroes, seen) = (file(0x1000), faults_seen());
    let reader = std::thread::spawn({
        let region = Arc::clone(&region);
        move || byte_at(&region, 0x2000)
    });
    wait_for_fault(&userfault);
    userfault.poison(region.pages()).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
    assert!(region.is_lost() && faults_seen() > seen);
    assert_eq!(byte_at(&region, 0x1000), 7, "what was there is there");
    // SAFETY: the page is inside the region; what a reader finds in it is up to the file.
    let result = unsafe {
        libc::pwrite(std::os::fd::AsRawFd::as_raw_fd(&zeroes), region.pointer(0x3000).as_ptr().cast(), 0x1000, 0)
    };
    assert_eq!((result, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
}

#[test]
fn pages_of_files_on_a_disk_cannot_be_waited_for() {
    let path = std::env::temp_dir().join(format!("late-{}", std::process::id()));
    let disk = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    disk.set_len(0x1000).unwrap();
    if rustix::fs::fstatfs(&disk).unwrap().f_type == 0x0102_1994 {
        return; // A temporary directory in memory.
    }
    let Some(userfault) = userfault() else { return };
    let region = Region::map(region(0, 0x1000, 0), &disk).unwrap();
    assert!(userfault.register(region.pages()).unwrap_err().to_string().contains("waiting for"));
}
