//! Payloads field by field, for those who show messages whatever is in them: a tracer, a dissector.
//!
//! Where a field is and how wide it is comes from the structures themselves. Nothing here refuses anything: bytes that
//! are cut off give the fields that are there.

use super::payload::{
    Config, CryptoSession, DeviceState, Empty, Ignored, Inflight, Iotlb, Log, LogBase, MemoryTable, Payload,
    ShmemConfig, ShmemMap, SingleRegion, U64, Uuid, VringAddress, VringArea, VringDescriptor, VringState,
};

/// What a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Unsigned,
    Signed,
    Bytes,
    /// Numbers of 64 bits, one after the other.
    Words,
    /// A number that is several: the name and the mask of each.
    Bits(&'static [(&'static str, u64)]),
    /// A structure in the structure.
    Structure(&'static [Field]),
    /// As many structures as the first field says, and there are bytes for.
    Structures(&'static [Field]),
    /// Nothing that anybody reads.
    Padding,
}

/// A field of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: &'static str,
    /// In bytes, from the begin of the structure.
    pub offset: usize,
    /// In bytes; 0: all that follow.
    pub size: usize,
    pub shape: Shape,
}

/// A payload type.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// As the message table spells it.
    pub name: &'static str,
    pub fields: &'static [Field],
    /// Other fields, when the payload has exactly as many bytes as this says.
    pub other: Option<(usize, &'static [Field])>,
    /// What is wrong with these bytes as such a payload.
    pub check: fn(&[u8]) -> Result<(), String>,
}

/// The value of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Bytes(Vec<u8>),
    List(Vec<Value>),
    Structure(Vec<(&'static str, Value)>),
}

impl Layout {
    /// Every payload that a row of the message tables names, for a message or for its answer.
    pub const ALL: &'static [Self] = &[
        Self::of::<Empty>(),
        Self::of::<Ignored>(),
        Self::of::<U64>(),
        Self::of::<VringState>(),
        Self::of::<VringAddress>(),
        Self::of::<VringDescriptor>(),
        Self::of::<MemoryTable>(),
        Self::of::<SingleRegion>(),
        Self::of::<LogBase>(),
        Self::of::<Log>(),
        Self::of::<Iotlb>(),
        Self::of::<Config>(),
        Self::of::<VringArea>(),
        Self::of::<Inflight>(),
        Self::of::<Uuid>(),
        Self::of::<DeviceState>(),
        Self::of::<ShmemMap>(),
        Self::of::<ShmemConfig>(),
        Self::of::<CryptoSession>(),
    ];

    const fn of<T: Payload>() -> Self {
        Self { name: T::NAME, fields: T::FIELDS, other: T::OTHER_FIELDS, check: |bytes| T::decode(bytes).map(drop) }
    }

    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::ALL.iter().find(|layout| layout.name == name)
    }

    /// The fields of these bytes that are there as a whole, and what is left over.
    #[must_use]
    pub fn read<'a>(&self, bytes: &'a [u8]) -> (Vec<(&'static str, Value)>, &'a [u8]) {
        let fields = match self.other {
            Some((size, fields)) if size == bytes.len() => fields,
            _ => self.fields,
        };
        let end =
            fields.iter().map(|field| if field.size == 0 { bytes.len() } else { field.offset + field.size }).max();
        (read(fields, bytes), &bytes[end.unwrap_or(0).min(bytes.len())..])
    }
}

fn read(fields: &[Field], bytes: &[u8]) -> Vec<(&'static str, Value)> {
    let whole = |field: &Field| {
        let rest = bytes.get(field.offset..)?;
        if field.size == 0 { Some(rest) } else { rest.get(..field.size) }
    };
    let mut values = Vec::new();
    for field in fields {
        let Some(bytes) = whole(field) else { break };
        match field.shape {
            Shape::Unsigned => values.push((field.name, Value::Unsigned(number(bytes)))),
            Shape::Signed => values.push((field.name, Value::Signed(number(bytes) as i64))),
            Shape::Bytes => values.push((field.name, Value::Bytes(bytes.to_vec()))),
            Shape::Words => {
                let words = bytes.chunks_exact(8).map(|word| Value::Unsigned(number(word)));
                values.push((field.name, Value::List(words.collect())));
            }
            Shape::Bits(parts) => values.extend(parts.iter().map(|(name, mask)| {
                let part = (number(bytes) & mask) >> mask.trailing_zeros();
                (*name, Value::Unsigned(part))
            })),
            Shape::Structure(fields) => values.push((field.name, Value::Structure(read(fields, bytes)))),
            Shape::Structures(fields) => {
                let count = match values.first() {
                    Some((_, Value::Unsigned(count))) => *count as usize,
                    _ => 0,
                };
                let structures = bytes.chunks_exact(total(fields)).take(count);
                let structures = structures.map(|bytes| Value::Structure(read(fields, bytes)));
                values.push((field.name, Value::List(structures.collect())));
            }
            Shape::Padding => {}
        }
    }
    values
}

/// A number of up to 8 bytes, in the host's order.
fn number(bytes: &[u8]) -> u64 {
    let order: &mut dyn Iterator<Item = &u8> =
        if cfg!(target_endian = "little") { &mut bytes.iter().rev() } else { &mut bytes.iter() };
    order.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The members of a structure, with the offsets and sizes that the compiler gave them.
macro_rules! fields {
    ($structure:ident: $($field:ident),+ $(,)?) => {
        &[$($crate::protocol::layout::Field {
            name: stringify!($field),
            offset: std::mem::offset_of!($structure, $field),
            size: $crate::protocol::layout::size_of_member(|it: &$structure| &it.$field),
            shape: if $crate::protocol::layout::is_padding(stringify!($field)) {
                Shape::Padding
            } else {
                $crate::protocol::layout::shape_of_member(|it: &$structure| &it.$field)
            },
        }),+]
    };
}
pub(super) use fields;

/// A structure with one member that has no name.
pub(super) const fn only(name: &'static str, size: usize, shape: Shape) -> Field {
    Field { name, offset: 0, size, shape }
}

pub(super) const fn size_of_member<S, F>(_member: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

pub(super) const fn shape_of_member<S, F: Shaped>(_member: fn(&S) -> &F) -> Shape {
    F::SHAPE
}

/// Structures name what nobody reads.
pub(super) const fn is_padding(name: &str) -> bool {
    matches!(name.as_bytes(), b"padding")
}

/// Bytes of all these fields together.
pub(super) const fn total(fields: &[Field]) -> usize {
    let (mut total, mut at) = (0, 0);
    while at < fields.len() {
        total += fields[at].size;
        at += 1;
    }
    total
}

/// What a member of this type holds.
pub(super) trait Shaped {
    const SHAPE: Shape;
}

macro_rules! shapes {
    ($($type:ty => $shape:ident;)+) => {
        $(impl Shaped for $type {
            const SHAPE: Shape = Shape::$shape;
        })+
    };
}

shapes! {
    u8 => Unsigned;
    u16 => Unsigned;
    u32 => Unsigned;
    u64 => Unsigned;
    i64 => Signed;
    [u64; 256] => Words;
}

impl<const N: usize> Shaped for [u8; N] {
    const SHAPE: Shape = Shape::Bytes;
}

#[cfg(test)]
mod tests {
    use super::super::{Answer, BackendRequest, FrontendRequest};
    use super::*;

    #[test]
    fn every_payload_of_the_tables_has_a_layout() {
        for info in FrontendRequest::TABLE.iter().chain(BackendRequest::TABLE) {
            let answer = match info.answer {
                Answer::Ack => "U64",
                Answer::Reply(payload) | Answer::ReplyAndFile(payload) | Answer::ReplyWith(_, payload) => payload,
            };
            for name in [info.payload, answer] {
                assert!(Layout::named(name).is_some(), "{}: {name}", info.name);
            }
        }
    }

    #[test]
    fn fields_that_are_cut_off_are_left_out() {
        let layout = Layout::named("VringState").unwrap();
        let bytes = [&3u32.to_ne_bytes()[..], &256u32.to_ne_bytes(), b"more"].concat();
        let (index, num) = (("index", Value::Unsigned(3)), ("num", Value::Unsigned(256)));
        assert_eq!(layout.read(&bytes[..7]), (vec![index.clone()], &[][..]));
        assert_eq!(layout.read(&bytes), (vec![index, num], &b"more"[..]));
    }

    #[test]
    fn a_table_has_the_regions_that_it_counts() {
        let layout = Layout::named("MemoryTable").unwrap();
        let table = |count: u32, room| [&count.to_ne_bytes()[..], &[0; 4], &vec![0; room]].concat();
        let regions = |bytes: &[u8]| match &layout.read(bytes).0[..] {
            [("count", _), ("regions", Value::List(regions))] => regions.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(regions(&table(1, 64)), 1);
        assert_eq!(regions(&table(2, 64)), 2);
        assert_eq!(regions(&table(u32::MAX, 64)), 2);
        assert_eq!(regions(&table(2, 63)), 1);
    }

    #[test]
    fn a_payload_with_two_forms_is_told_by_its_size() {
        let layout = Layout::named("LogBase").unwrap();
        let names = |size| layout.read(&vec![0; size]).0.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(8), ["address"]);
        assert_eq!(names(16), ["size", "offset"]);
    }
}
