//! An immutable set of regions, and the translation of addresses into it.

use std::fmt::Write;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::iotlb::{Access, Iotlb, IovaRange, Permission, Unmapped};
use super::part::{Apart, Part};
use super::region::Region;
use crate::error::Error;
use crate::protocol;

/// A contiguous piece of guest memory in this process. It is valid as long as the [`Snapshot`] that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub pointer: NonNull<u8>,
    pub length: usize,
}

// SAFETY: a Segment is an address; using it is unsafe and says what it needs.
unsafe impl Send for Segment {}

/// Call `piece` for each contiguous part of `length` bytes from `offset` on, as far as there are bytes.
pub fn for_range(segments: &[Segment], mut offset: u64, mut length: usize, mut piece: impl FnMut(Segment)) {
    for segment in segments {
        if length == 0 {
            break;
        }
        if offset >= segment.length as u64 {
            offset -= segment.length as u64;
            continue;
        }
        let skip = offset as usize;
        let take = (segment.length - skip).min(length);
        // SAFETY: `skip < segment.length`, so the pointer stays inside the segment.
        piece(Segment { pointer: unsafe { segment.pointer.add(skip) }, length: take });
        offset = 0;
        length -= take;
    }
}

/// A range that is not wholly inside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutsideMemory;

/// Why an address of a driver leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untranslated {
    Outside,
    /// It is in guest memory, but in pieces.
    Scattered(Apart),
    Iommu(Unmapped),
}

impl From<OutsideMemory> for Untranslated {
    fn from(_: OutsideMemory) -> Self {
        Self::Outside
    }
}

impl From<Unmapped> for Untranslated {
    fn from(unmapped: Unmapped) -> Self {
        Self::Iommu(unmapped)
    }
}

/// The guest's memory at one moment, as a device sees it.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// By guest address, without overlaps.
    regions: Box<[Arc<Region>]>,
    directory: Directory,
    /// With ACCESS_PLATFORM the driver's addresses are I/O addresses, and these are where they lead.
    iotlb: Option<Arc<Iotlb>>,
}

impl Snapshot {
    /// Map every region of a SET_MEM_TABLE. Nothing stays mapped if one of them is refused.
    pub fn from_table(regions: &[protocol::Region], files: &[OwnedFd]) -> Result<Self, Error> {
        let mapped = regions.iter().zip(files).map(|(region, file)| Region::map(*region, file).map(Arc::new));
        Self::from_regions(mapped.collect::<Result<_, _>>()?)
    }

    /// This snapshot and one more region.
    pub fn with(&self, region: protocol::Region, file: &OwnedFd) -> Result<Self, Error> {
        let mut regions = self.regions.to_vec();
        regions.push(Arc::new(Region::map(region, file)?));
        Ok(Self::from_regions(regions)?.behind(self.iotlb.clone()))
    }

    /// This snapshot without one region, which is named by its addresses and its size.
    pub fn without(&self, region: &protocol::Region) -> Result<Self, Error> {
        let is_it = |other: &Arc<Region>| {
            let other = other.description();
            other.guest_address == region.guest_address
                && other.user_address == region.user_address
                && other.size == region.size
        };
        let at = self.regions.iter().position(is_it).ok_or_else(|| {
            Error::Memory(format!(
                "no region of {:#x} bytes at guest address {:#x} and user address {:#x}; there are {}",
                region.size,
                region.guest_address,
                region.user_address,
                self.describe()
            ))
        })?;
        let mut regions = self.regions.to_vec();
        regions.remove(at);
        Ok(Self::from_regions(regions)?.behind(self.iotlb.clone()))
    }

    fn from_regions(mut regions: Vec<Arc<Region>>) -> Result<Self, Error> {
        let ends = |start: u64, size: u64| start + size;
        regions.sort_by_key(|region| region.description().user_address);
        for pair in regions.windows(2) {
            let (first, second) = (pair[0].description(), pair[1].description());
            if ends(first.user_address, first.size) > second.user_address {
                return Err(overlap("user", first.user_address, second.user_address));
            }
        }
        regions.sort_by_key(|region| region.start());
        for pair in regions.windows(2) {
            if pair[0].end() > pair[1].start() {
                return Err(overlap("guest", pair[0].start(), pair[1].start()));
            }
        }
        let directory = Directory::new(&regions);
        Ok(Self { regions: regions.into_boxed_slice(), directory, iotlb: None })
    }

    /// The same memory, behind an IOMMU or in front of it.
    #[must_use]
    pub fn behind(&self, iotlb: Option<Arc<Iotlb>>) -> Self {
        let regions = self.regions.clone();
        Self { directory: Directory::new(&regions), regions, iotlb }
    }

    /// Forget what the IOTLB says of memory that is not there.
    pub fn forget_lost_mappings(&self) {
        if let Some(iotlb) = &self.iotlb {
            iotlb.retain(|user_address, length| self.user_pointer(user_address, length).is_some());
        }
    }

    /// Where I/O addresses lead, if the driver's addresses are such.
    #[inline]
    #[must_use]
    pub fn iotlb(&self) -> Option<&Arc<Iotlb>> {
        self.iotlb.as_ref()
    }

    /// By guest address.
    #[must_use]
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// How many regions there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Bytes of guest memory.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.description().size).sum()
    }

    /// A region whose file shrank while it was mapped, if there is one.
    #[must_use]
    pub fn lost_region(&self) -> Option<protocol::Region> {
        self.regions.iter().find(|region| region.is_lost()).map(|region| region.description())
    }

    /// Where `address..address + length` is, if that can be told at once: it has bytes, they are in one region, and there
    /// is no IOMMU.
    #[inline]
    #[must_use]
    pub fn direct_piece(&self, address: u64, length: u64) -> Option<Segment> {
        if self.iotlb.is_none() { self.directory.piece(address, length) } else { None }
    }

    /// Call `segment` for each contiguous piece of `address..address + length`, in order. An empty range is nowhere and
    /// is always good.
    #[inline]
    pub fn pieces(&self, address: u64, length: u64, mut segment: impl FnMut(Segment)) -> Result<(), OutsideMemory> {
        if let Some(piece) = self.directory.piece(address, length) {
            segment(piece);
            return Ok(());
        }
        self.pieces_slowly(address, length, &mut segment)
    }

    #[inline(never)]
    fn pieces_slowly(
        &self,
        mut address: u64,
        mut length: u64,
        segment: &mut dyn FnMut(Segment),
    ) -> Result<(), OutsideMemory> {
        if length == 0 {
            return Ok(());
        }
        if address.checked_add(length).is_none() {
            return Err(OutsideMemory);
        }
        let spans = &self.directory.spans;
        let first = spans.partition_point(|span| span.end() <= address);
        for span in &spans[first..] {
            let piece = span.piece_of(address, length).ok_or(OutsideMemory)?;
            segment(piece);
            address += piece.length as u64;
            length -= piece.length as u64;
            if length == 0 {
                return Ok(());
            }
        }
        Err(OutsideMemory)
    }

    /// Call `segment` for each contiguous piece of `address..address + length`, in order, where `address` is one that the
    /// driver gave to the device: [`pieces`](Self::pieces), unless there is an IOMMU.
    #[inline]
    pub fn resolve(
        &self,
        address: u64,
        length: u64,
        access: Access,
        mut segment: impl FnMut(Segment),
    ) -> Result<(), Untranslated> {
        match &self.iotlb {
            None => Ok(self.pieces(address, length, segment)?),
            Some(iotlb) => self.resolve_mapped(iotlb, address, length, access, &mut |_, piece| segment(piece)),
        }
    }

    #[inline(never)]
    fn resolve_mapped(
        &self,
        iotlb: &Iotlb,
        iova: u64,
        length: u64,
        access: Access,
        segment: &mut dyn FnMut(&Arc<Region>, Segment),
    ) -> Result<(), Untranslated> {
        // Pages that follow each other in a region, too, are one segment.
        let mut last: Option<(u64, &Arc<Region>, Segment)> = None;
        iotlb.look_up(iova, length, access, |user_address, length| {
            let (region, pointer) = self.find_user(user_address, length).ok_or(Untranslated::Outside)?;
            match &mut last {
                Some((end, same, segment)) if *end == user_address && Arc::ptr_eq(same, region) => {
                    segment.length += length as usize;
                    *end += length;
                }
                _ => {
                    let next = (user_address + length, region, Segment { pointer, length: length as usize });
                    if let Some((_, region, done)) = last.replace(next) {
                        segment(region, done);
                    }
                }
            }
            Ok::<_, Untranslated>(())
        })?;
        if let Some((_, region, done)) = last {
            segment(region, done);
        }
        Ok(())
    }

    /// Where `length` bytes of a ring are, at least one, by the kind of address that SET_VRING_ADDR has: user addresses of
    /// one region, unless there is an IOMMU.
    pub fn ring_part(&self, address: u64, length: u64, access: Access) -> Result<Part, Untranslated> {
        let mut pieces = Vec::new();
        match &self.iotlb {
            None => {
                let (region, pointer) = self.find_user(address, length).ok_or(Untranslated::Outside)?;
                pieces.push((Arc::clone(region), Segment { pointer, length: length as usize }));
            }
            Some(iotlb) => self.resolve_mapped(iotlb, address, length, access, &mut |region, segment| {
                pieces.push((Arc::clone(region), segment));
            })?,
        }
        Part::new(&pieces).map_err(Untranslated::Scattered)
    }

    /// Take over a message that maps I/O addresses, and return these. The error says what is wrong with it.
    pub fn map(&self, message: &protocol::Iotlb) -> Result<IovaRange, String> {
        let protocol::Iotlb { iova, size, user_address, permission, .. } = *message;
        let iotlb = self.iotlb.as_ref().ok_or("there is no IOMMU")?;
        let range = IovaRange::new(iova, size)
            .ok_or_else(|| format!("{size:#x} addresses from {iova:#x} on are none, or wrap around"))?;
        let permission = Permission::from_bits(permission)
            .ok_or_else(|| format!("the permission {permission} is not 1 (read), 2 (write) or 3 (both)"))?;
        if self.user_pointer(user_address, size).is_none() {
            return Err(format!(
                "{size:#x} bytes at user address {user_address:#x} are not inside one region of guest memory ({})",
                self.describe_user()
            ));
        }
        iotlb.update(range, user_address, permission);
        Ok(range)
    }

    /// The pointer for `length` bytes at a user address of the front-end, if one region holds them all.
    #[must_use]
    pub fn user_pointer(&self, user_address: u64, length: u64) -> Option<NonNull<u8>> {
        self.find_user(user_address, length).map(|(_, pointer)| pointer)
    }

    fn find_user(&self, user_address: u64, length: u64) -> Option<(&Arc<Region>, NonNull<u8>)> {
        self.regions.iter().find_map(|region| {
            let description = region.description();
            let offset = user_address.checked_sub(description.user_address)?;
            if offset >= description.size || length > description.size - offset {
                return None;
            }
            // SAFETY: `offset < size` was checked just above.
            Some((region, unsafe { region.pointer(offset) }))
        })
    }

    /// The guest address of a byte of this snapshot.
    #[must_use]
    pub fn guest_address(&self, pointer: NonNull<u8>) -> Option<u64> {
        self.regions.iter().find_map(|region| Some(region.start() + region.offset_of(pointer)?))
    }

    /// The guest addresses that exist, for errors.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for region in self.regions.iter().take(8) {
            let separator = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{separator}{:#x}..{:#x}", region.start(), region.end());
        }
        match self.regions.len() {
            0 => "none was shared yet".to_owned(),
            count if count > 8 => format!("{text} and {} more", count - 8),
            _ => text,
        }
    }

    /// The same for user addresses.
    #[must_use]
    pub fn describe_user(&self) -> String {
        let mut text = String::new();
        for region in self.regions.iter().take(8) {
            let separator = if text.is_empty() { "" } else { ", " };
            let start = region.description().user_address;
            let _ = write!(text, "{separator}{start:#x}..{:#x}", start + region.description().size);
        }
        if text.is_empty() { "none was shared yet".to_owned() } else { text }
    }
}

/// What translation needs of a region, and nothing else: a few of them share a cache line.
#[derive(Debug)]
struct Span {
    start: u64,
    size: u64,
    host: NonNull<u8>,
}

impl Span {
    /// It was checked that there is such an address.
    fn end(&self) -> u64 {
        self.start + self.size
    }

    /// All of `address..address + length`, if there are bytes and the region holds them.
    #[inline]
    fn piece(&self, address: u64, length: u64) -> Option<Segment> {
        let offset = address.wrapping_sub(self.start);
        if offset >= self.size || length > self.size - offset || length == 0 {
            return None;
        }
        // SAFETY: `offset < size` was checked just above, and the snapshot keeps all bytes of the region mapped.
        Some(Segment { pointer: unsafe { self.host.add(offset as usize) }, length: length as usize })
    }

    /// The part of `address..address + length` that the region holds, if it holds the first byte.
    fn piece_of(&self, address: u64, length: u64) -> Option<Segment> {
        let offset = address.wrapping_sub(self.start);
        if offset >= self.size {
            return None;
        }
        let length = length.min(self.size - offset) as usize;
        // SAFETY: `offset < size` was checked just above, and the snapshot keeps all bytes of the region mapped.
        Some(Segment { pointer: unsafe { self.host.add(offset as usize) }, length })
    }
}

/// Granules of the address space that a directory may have.
const MAX_GRANULES: u64 = 4096;

/// Where to look for an address, without trying one region after the other: which one a buffer is in is nothing that a
/// processor can predict.
#[derive(Debug, Default)]
struct Directory {
    /// By guest address, without overlaps.
    spans: Box<[Span]>,
    /// Where the first one begins.
    start: u64,
    /// The address space from there on is divided into granules of two to the power of this.
    shift: u32,
    /// For each granule, the first span that ends behind its start. If regions begin at multiples of a granule, it is the
    /// one that is looked for; if not, the others are found slowly.
    granules: Box<[u16]>,
}

// SAFETY: a Directory is address ranges. It hands out raw pointers, and what is read or written through them is shared
// with another process in any case.
unsafe impl Send for Directory {}
// SAFETY: as above; no method changes the Directory.
unsafe impl Sync for Directory {}

impl Directory {
    fn new(regions: &[Arc<Region>]) -> Self {
        let spans: Box<[_]> = regions
            .iter()
            .map(|region| Span { start: region.start(), size: region.description().size, host: region.host() })
            .collect();
        let (Some(first), Some(last)) = (spans.first(), spans.last()) else { return Self::default() };
        let start = first.start;
        let extent = last.end() - start;
        let aligned = spans.iter().map(|span| (span.start - start).trailing_zeros()).min().unwrap_or(0).min(63);
        let fewest = (0..63).find(|shift| (extent - 1) >> shift < MAX_GRANULES).unwrap_or(63);
        let shift = aligned.max(fewest);
        let granules = (0..=(extent - 1) >> shift)
            .map(|granule| spans.partition_point(|span| span.end() - start <= granule << shift) as u16)
            .collect();
        Self { start, shift, granules, spans }
    }

    /// All of `address..address + length`, if it is found to be in one region.
    #[inline]
    fn piece(&self, address: u64, length: u64) -> Option<Segment> {
        let granule = address.wrapping_sub(self.start) >> self.shift;
        let at = self.granules.get(usize::try_from(granule).ok()?)?;
        self.spans.get(usize::from(*at))?.piece(address, length)
    }
}

fn overlap(kind: &str, first: u64, second: u64) -> Error {
    Error::Memory(format!("the regions at {kind} addresses {first:#x} and {second:#x} overlap"))
}
