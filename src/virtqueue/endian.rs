//! The byte order of a ring: little-endian, but for those of legacy drivers on big-endian machines.
//!
//! It is a type, so that a ring of the usual order has no trace of the other one. Virtio 1.3, section 2.7.3.

use std::fmt::Debug;

/// A byte order. Each conversion goes either way.
pub trait Endian: Copy + Debug + Send + Sync + 'static {
    fn u16(value: u16) -> u16;
    fn u32(value: u32) -> u32;
    fn u64(value: u64) -> u64;

    /// The length, the flags and the link that are in the second word of a descriptor.
    fn unpack(word: u64) -> (u32, u16, u16);

    /// The reverse of [`unpack`](Self::unpack).
    fn pack(length: u32, flags: u16, link: u16) -> u64;
}

#[derive(Clone, Copy, Debug)]
pub struct Little;

#[derive(Clone, Copy, Debug)]
pub struct Big;

impl Endian for Little {
    #[inline]
    fn u16(value: u16) -> u16 {
        value.to_le()
    }

    #[inline]
    fn u32(value: u32) -> u32 {
        value.to_le()
    }

    #[inline]
    fn u64(value: u64) -> u64 {
        value.to_le()
    }

    #[inline]
    fn unpack(word: u64) -> (u32, u16, u16) {
        let word = u64::from_le(word);
        (word as u32, (word >> 32) as u16, (word >> 48) as u16)
    }

    #[inline]
    fn pack(length: u32, flags: u16, link: u16) -> u64 {
        (u64::from(length) | u64::from(flags) << 32 | u64::from(link) << 48).to_le()
    }
}

impl Endian for Big {
    #[inline]
    fn u16(value: u16) -> u16 {
        value.to_be()
    }

    #[inline]
    fn u32(value: u32) -> u32 {
        value.to_be()
    }

    #[inline]
    fn u64(value: u64) -> u64 {
        value.to_be()
    }

    #[inline]
    fn unpack(word: u64) -> (u32, u16, u16) {
        let word = u64::from_be(word);
        ((word >> 32) as u32, (word >> 16) as u16, word as u16)
    }

    #[inline]
    fn pack(length: u32, flags: u16, link: u16) -> u64 {
        (u64::from(length) << 32 | u64::from(flags) << 16 | u64::from(link)).to_be()
    }
}
