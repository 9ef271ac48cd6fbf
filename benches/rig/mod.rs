#![allow(dead_code, reason = "each benchmark uses a part of it")]

//! A split ring that a driver has filled, over one or more regions of memory.
//!
//! The driver's part of a round is one store: every entry of the available ring names a chain that is there already.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_user::memory::{Snapshot, access};
use vhost_user::protocol::Region;
use vhost_user::virtqueue::{Element, RingAddresses};

pub const SIZE: u16 = 1024;
pub const BATCH: u16 = 256;

/// What a user address has more than the guest address of the same byte.
const USER: u64 = 0x7000_0000_0000;

pub const DESCRIPTORS: u64 = 0x10_0000;
pub const AVAIL: u64 = 0x11_0000;
pub const USED: u64 = 0x12_0000;
const REGION: u64 = 0x100_0000;

/// Flags of a descriptor. Virtio 1.3, section 2.7.5.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The parts of a chain: bytes, and whether the device may write them.
const ONE: [(u32, bool); 1] = [(64, true)];
const THREE: [(u32, bool); 3] = [(16, false), (4096, true), (1, true)];

pub struct Rig {
    pub memory: Arc<Snapshot>,
    files: Vec<OwnedFd>,
    avail: u16,
}

impl Rig {
    /// Chains of 1 or 3 descriptors, whose buffers lie in `regions` regions, now in one and now in another.
    pub fn new(descriptors: usize, regions: u64) -> Self {
        let files: Vec<_> = (0..regions)
            .map(|_| {
                let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memory file");
                ftruncate(&file, REGION).expect("a memory file of 16 MiB");
                file
            })
            .collect();
        let table: Vec<_> = (0..regions).map(region).collect();
        let memory = Arc::new(Snapshot::from_table(&table, &files).expect("memory that can be mapped"));
        let rig = Self { memory, files, avail: 0 };
        let parts: &[(u32, bool)] = if descriptors == 1 { &ONE } else { &THREE };
        let chains = usize::from(SIZE) / parts.len();
        let mut random = 1u64;
        for index in 0..chains * parts.len() {
            let at = index % parts.len();
            let (length, writable) = parts[at];
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let address = (random >> 33) % regions * REGION + 0x20_0000 + index as u64 * 0x2000;
            let flags = if writable { WRITE } else { 0 } | if at + 1 < parts.len() { NEXT } else { 0 };
            let words = [address, u64::from(length) | u64::from(flags) << 32 | (index as u64 + 1) << 48];
            rig.poke(DESCRIPTORS + 16 * index as u64, &words.map(u64::to_le_bytes).concat());
        }
        for entry in 0..usize::from(SIZE) {
            let head = (entry % chains * parts.len()) as u16;
            rig.poke(AVAIL + 4 + 2 * entry as u64, &head.to_le_bytes());
        }
        rig
    }

    /// The regions and their files.
    pub fn regions(&self) -> impl Iterator<Item = (Region, File)> {
        (0..).map(region).zip(&self.files).map(|(region, file)| {
            let file = file.try_clone().expect("a descriptor");
            (region, file.into())
        })
    }

    pub fn addresses() -> RingAddresses {
        RingAddresses { descriptors: USER + DESCRIPTORS, avail: USER + AVAIL, used: USER + USED }
    }

    /// Where a guest address of the first region is in this process.
    pub fn pointer(&self, address: u64) -> *mut u8 {
        self.memory.user_pointer(USER + address, REGION - address).expect("an address of the first region").as_ptr()
    }

    /// The parts of the chain that a driver adds as number `at` of a batch.
    pub fn elements(descriptors: usize, at: u16) -> Vec<Element> {
        let parts: &[(u32, bool)] = if descriptors == 1 { &ONE } else { &THREE };
        let place = |part: usize| 0x20_0000 + (u64::from(at) * 3 + part as u64) * 0x2000;
        let part = |(part, (length, writable)): (usize, &(u32, bool))| Element {
            address: place(part),
            length: *length,
            writable: *writable,
        };
        parts.iter().enumerate().map(part).collect()
    }

    /// Make another batch available.
    pub fn submit(&mut self) {
        self.avail = self.avail.wrapping_add(BATCH);
        // SAFETY: the index is at offset 2 of the available ring, which is mapped as long as `self.memory`, and aligned.
        let index = unsafe { AtomicU16::from_ptr(self.pointer(AVAIL + 2).cast()) };
        index.store(self.avail.to_le(), Ordering::Release);
    }

    fn poke(&self, address: u64, bytes: &[u8]) {
        // SAFETY: everything that is written lies in the first region, far from its end, which `self.memory` keeps mapped.
        unsafe { access::write(self.pointer(address), bytes) }
    }
}

/// The regions are next to each other, as in a guest with memory slots.
fn region(at: u64) -> Region {
    Region { guest_address: at * REGION, size: REGION, user_address: USER + at * REGION, file_offset: 0 }
}
