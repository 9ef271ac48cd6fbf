//! The structures that follow a header. Fixed ones are described by their C layout, with the padding spelled out.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::{Field, Shape, Shaped, fields, only, total};

/// A payload type: its bytes, and what the validator asks of every message.
pub trait Payload: Sized {
    /// Name of the structure, for the documentation's table.
    const NAME: &'static str;

    /// What is where in it, for those who show it.
    const FIELDS: &'static [Field];

    /// What is where in it when it has exactly that many bytes.
    const OTHER_FIELDS: Option<(usize, &'static [Field])> = None;

    /// Decode exactly the bytes that came; the error says what was expected.
    fn decode(bytes: &[u8]) -> Result<Self, String>;

    fn encode(&self, out: &mut Vec<u8>);

    /// The queue that the message is about, if it carries an index.
    fn queue(&self) -> Option<u32> {
        None
    }

    /// How many descriptors a `Descriptors::Described` message must carry, by its own words.
    fn described_descriptors(&self) -> usize {
        0
    }
}

macro_rules! fixed_payload {
    (
        $name:ident, $size:literal, $fields:expr
        $(, queue: $queue:expr)? $(, descriptors: $descriptors:expr)? $(, not: $other:literal => $meaning:expr)?
    ) => {
        const _: () = assert!(size_of::<$name>() == $size && total($name::FIELDS) == $size);

        impl Payload for $name {
            const NAME: &'static str = stringify!($name);
            const FIELDS: &'static [Field] = $fields;

            fn decode(bytes: &[u8]) -> Result<Self, String> {
                $(if bytes.len() == $other {
                    return Err(format!("expected {} bytes of payload, got {}: {}", $size, bytes.len(), $meaning));
                })?
                Self::read_from_bytes(bytes)
                    .map_err(|_| format!("expected {} bytes of payload, got {}", $size, bytes.len()))
            }

            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(self.as_bytes());
            }

            $(fn queue(&self) -> Option<u32> {
                let queue: fn(&Self) -> u32 = $queue;
                Some(queue(self))
            })?

            $(fn described_descriptors(&self) -> usize {
                let descriptors: fn(&Self) -> usize = $descriptors;
                descriptors(self)
            })?
        }
    };
}

/// A payload that is too large to be moved around by value.
impl<T: Payload> Payload for Box<T> {
    const NAME: &'static str = T::NAME;
    const FIELDS: &'static [Field] = T::FIELDS;

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        T::decode(bytes).map(Self::new)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        T::encode(self, out);
    }
}

/// No payload at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Empty;

impl Payload for Empty {
    const NAME: &'static str = "Empty";
    const FIELDS: &'static [Field] = &[];

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.is_empty() { Ok(Self) } else { Err(format!("expected no payload, got {} bytes", bytes.len())) }
    }

    fn encode(&self, _out: &mut Vec<u8>) {}
}

/// A payload that no implementation gives a meaning to, whatever its length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ignored;

impl Payload for Ignored {
    const NAME: &'static str = "Ignored";
    const FIELDS: &'static [Field] = &[];

    fn decode(_bytes: &[u8]) -> Result<Self, String> {
        Ok(Self)
    }

    fn encode(&self, _out: &mut Vec<u8>) {}
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct U64(pub u64);
fixed_payload!(U64, 8, &[only("value", 8, Shape::Unsigned)]);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringState {
    pub index: u32,
    pub num: u32,
}
fixed_payload!(VringState, 8, fields!(VringState: index, num), queue: |state| state.index);

/// User addresses of the three parts of a ring. `used` comes before `avail`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringAddress {
    pub index: u32,
    /// Bit 0: log writes to the used ring.
    pub flags: u32,
    pub descriptors: u64,
    pub used: u64,
    pub avail: u64,
    pub log: u64,
}

impl VringAddress {
    /// The flag for writes to the used ring, of which byte `k` is logged as guest address `log + k`.
    pub const LOG_USED: u32 = 1;

    /// Where writes to the used ring are to be logged, if they are.
    #[must_use]
    pub fn used_log(&self) -> Option<u64> {
        (self.flags & Self::LOG_USED != 0).then_some(self.log)
    }
}
fixed_payload!(VringAddress, 40, fields!(VringAddress: index, flags, descriptors, used, avail, log), queue: |address| address.index);

/// The body of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringDescriptor(pub u64);

impl VringDescriptor {
    const NO_DESCRIPTOR: u64 = 1 << 8;
    const PARTS: &'static [(&'static str, u64)] = &[("index", 0xff), ("no_descriptor", Self::NO_DESCRIPTOR)];

    #[must_use]
    pub fn new(queue: u8, with_descriptor: bool) -> Self {
        Self(u64::from(queue) | if with_descriptor { 0 } else { Self::NO_DESCRIPTOR })
    }

    /// Whether a descriptor comes along; without one the ring is polled, or not notified.
    #[must_use]
    pub fn has_descriptor(self) -> bool {
        self.0 & Self::NO_DESCRIPTOR == 0
    }
}
// The bits above the index and the flag are zero in every known front end; a set one makes the index out of range.
fixed_payload!(VringDescriptor, 8, &[only("", 8, Shape::Bits(VringDescriptor::PARTS))],
    queue: |body| u32::try_from(body.0 & !Self::NO_DESCRIPTOR).unwrap_or(u32::MAX),
    descriptors: |body| usize::from(body.has_descriptor()));

impl Shaped for VringDescriptor {
    const SHAPE: Shape = Shape::Bits(Self::PARTS);
}

/// A piece of guest memory that the front-end shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Region {
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front-end has it in its own address space: a name, never dereferenced.
    pub user_address: u64,
    /// Where it begins in the file that came with it.
    pub file_offset: u64,
}
fixed_payload!(Region, 32, fields!(Region: guest_address, size, user_address, file_offset));

impl Region {
    /// What it means when a region has 40 bytes.
    const OF_XEN: &'static str = "regions of 40 bytes belong to XEN_MMAP, which was not offered";
}

impl Shaped for Region {
    const SHAPE: Shape = Shape::Structure(Self::FIELDS);
}

/// SET_MEM_TABLE: a whole address space, one descriptor for each region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryTable {
    pub regions: Vec<Region>,
}

impl MemoryTable {
    pub const MAX_REGIONS: usize = 8;
}

impl Payload for MemoryTable {
    const NAME: &'static str = "MemoryTable";
    const FIELDS: &'static [Field] = &[
        only("count", 4, Shape::Unsigned),
        Field { name: "padding", offset: 4, size: 4, shape: Shape::Padding },
        Field { name: "regions", offset: 8, size: 0, shape: Shape::Structures(Region::FIELDS) },
    ];

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Some((head, rest)) = bytes.split_at_checked(8) else {
            return Err(format!("expected at least 8 bytes of payload, got {}", bytes.len()));
        };
        let (count, _padding) = u32::read_from_prefix(head).map_err(|_| "the region count is cut off".to_owned())?;
        let count = count as usize;
        if count > Self::MAX_REGIONS {
            return Err(format!("{count} regions; at most {} are allowed", Self::MAX_REGIONS));
        }
        if count > 0 && rest.len() == count * 40 {
            return Err(format!("{count} regions in {} bytes: {}", bytes.len(), Region::OF_XEN));
        }
        // User-Mode Linux before 6.13 always sends the bytes of two regions: more than needed is accepted.
        if rest.len() < count * size_of::<Region>() {
            return Err(format!("{count} regions need {} bytes of payload, got {}", 8 + count * 32, bytes.len()));
        }
        let regions =
            rest.chunks_exact(size_of::<Region>()).take(count).map(Region::decode).collect::<Result<_, _>>()?;
        Ok(Self { regions })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.regions.len() as u32).to_ne_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(self.regions.as_bytes());
    }

    fn described_descriptors(&self) -> usize {
        self.regions.len()
    }
}

/// ADD_MEM_REG and REM_MEM_REG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SingleRegion {
    pub padding: u64,
    pub region: Region,
}
fixed_payload!(SingleRegion, 40, fields!(SingleRegion: padding, region), not: 48 => Region::OF_XEN);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Log {
    pub size: u64,
    pub offset: u64,
}
fixed_payload!(Log, 16, fields!(Log: size, offset));

/// SET_LOG_BASE: a shared file with LOG_SHMFD, an address that means nothing to another process without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogBase {
    Shared(Log),
    Address(u64),
}

impl Payload for LogBase {
    const NAME: &'static str = "LogBase";
    const FIELDS: &'static [Field] = Log::FIELDS;
    const OTHER_FIELDS: Option<(usize, &'static [Field])> = Some((8, &[only("address", 8, Shape::Unsigned)]));

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        match bytes.len() {
            16 => Log::decode(bytes).map(Self::Shared),
            8 => U64::decode(bytes).map(|address| Self::Address(address.0)),
            other => Err(format!("expected 16 or 8 bytes of payload, got {other}")),
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Shared(log) => log.encode(out),
            Self::Address(address) => U64(*address).encode(out),
        }
    }

    fn described_descriptors(&self) -> usize {
        usize::from(matches!(self, Self::Shared(_)))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Iotlb {
    pub iova: u64,
    pub size: u64,
    pub user_address: u64,
    pub permission: u8,
    pub kind: u8,
    pub padding: [u8; 6],
}
impl Iotlb {
    /// Kinds: where is it (the back-end asks), it is there, it is there no more, it may not be used like that.
    pub const MISS: u8 = 1;
    pub const UPDATE: u8 = 2;
    pub const INVALIDATE: u8 = 3;
    pub const ACCESS_FAIL: u8 = 4;
}
fixed_payload!(Iotlb, 32, fields!(Iotlb: iova, size, user_address, permission, kind, padding));

/// GET_CONFIG and SET_CONFIG, in both directions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    pub offset: u32,
    pub flags: u32,
    pub bytes: Vec<u8>,
}

impl Config {
    const HEAD: usize = 12;
    /// Bytes of configuration space that one message can carry.
    pub const MAX_BYTES: usize = super::MAX_PAYLOAD - Self::HEAD;
}

impl Payload for Config {
    const NAME: &'static str = "Config";
    const FIELDS: &'static [Field] = &[
        only("offset", 4, Shape::Unsigned),
        Field { name: "size", offset: 4, size: 4, shape: Shape::Unsigned },
        Field { name: "flags", offset: 8, size: 4, shape: Shape::Unsigned },
        Field { name: "bytes", offset: Self::HEAD, size: 0, shape: Shape::Bytes },
    ];

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Some((head, data)) = bytes.split_at_checked(Self::HEAD) else {
            return Err(format!("expected at least {} bytes of payload, got {}", Self::HEAD, bytes.len()));
        };
        let [offset, size, flags] = <[u32; 3]>::read_from_bytes(head).map_err(|_| "the head is cut off".to_owned())?;
        if size as usize != data.len() {
            return Err(format!("announces {size} bytes of configuration, carries {}", data.len()));
        }
        Ok(Self { offset, flags, bytes: data.to_vec() })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice([self.offset, self.bytes.len() as u32, self.flags].as_bytes());
        out.extend_from_slice(&self.bytes);
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringArea {
    pub queue: VringDescriptor,
    pub size: u64,
    pub offset: u64,
}
fixed_payload!(VringArea, 24, fields!(VringArea: queue, size, offset),
    queue: |area| area.queue.queue().unwrap_or(u32::MAX),
    descriptors: |area| area.queue.described_descriptors());

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Inflight {
    pub size: u64,
    pub offset: u64,
    pub queues: u16,
    pub queue_size: u16,
    pub padding: u32,
}
fixed_payload!(Inflight, 24, fields!(Inflight: size, offset, queues, queue_size, padding));

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Uuid(pub [u8; 16]);
fixed_payload!(Uuid, 16, &[only("uuid", 16, Shape::Bytes)]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let separator = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{separator}{byte:02x}")?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceState {
    /// 0 saves, 1 loads.
    pub direction: u32,
    /// 0: all rings are stopped.
    pub phase: u32,
}
fixed_payload!(DeviceState, 8, fields!(DeviceState: direction, phase));

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ShmemMap {
    pub region: u8,
    pub padding: [u8; 7],
    pub file_offset: u64,
    pub region_offset: u64,
    pub size: u64,
    pub flags: u64,
}
impl ShmemMap {
    /// In `flags`: the mapping may be written to.
    pub const WRITABLE: u64 = 1;
}

fixed_payload!(ShmemMap, 40, fields!(ShmemMap: region, padding, file_offset, region_offset, size, flags));

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ShmemConfig {
    pub regions: u32,
    pub padding: u32,
    pub sizes: [u64; 256],
}
fixed_payload!(ShmemConfig, 2056, fields!(ShmemConfig: regions, padding, sizes));

impl ShmemConfig {
    /// Regions of these sizes, in bytes, by their index; 0 where there is none.
    #[must_use]
    pub fn new(sizes: [u64; 256]) -> Self {
        let regions = sizes.iter().filter(|size| **size > 0).count() as u32;
        Self { regions, padding: 0, sizes }
    }
}

impl Default for ShmemConfig {
    fn default() -> Self {
        Self::new([0; 256])
    }
}

/// CREATE_CRYPTO_SESSION. The union in the middle is the device's to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CryptoSession {
    pub operation: u64,
    pub parameters: [u8; 1056],
    pub session: i64,
}
fixed_payload!(CryptoSession, 1072, fields!(CryptoSession: operation, parameters, session));
