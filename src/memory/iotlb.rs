//! The IOTLB: where I/O addresses are in guest memory, as far as the front-end has told us.
//!
//! With ACCESS_PLATFORM a driver's addresses are those of an IOMMU that the front-end has. What is not in here is asked
//! for (a miss), told (an update), and taken back (an invalidation). vhost-user specification, "IOMMU support".

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Entries that are kept; the oldest goes for the next. 32 MiB if every page has its own.
const CAPACITY: usize = 8192;

/// What is done with a buffer, seen from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

impl Access {
    /// Of a descriptor with or without the flag WRITE.
    #[must_use]
    pub fn to_descriptor(writable: bool) -> Self {
        if writable { Self::Write } else { Self::Read }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "reading",
            Self::Write => "writing",
        })
    }
}

/// What a mapping allows: 1 reading, 2 writing, 3 both, as in the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission(u8);

impl Permission {
    pub const READ: Self = Self(1);
    pub const WRITE: Self = Self(2);
    pub const READ_WRITE: Self = Self(3);

    /// The permission of a message. None if it allows nothing, or is no permission.
    #[must_use]
    pub fn from_bits(bits: u8) -> Option<Self> {
        matches!(bits, 1..=3).then_some(Self(bits))
    }

    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    #[must_use]
    pub fn allows(self, access: Access) -> bool {
        self.0 & Self::from(access).0 != 0
    }
}

impl From<Access> for Permission {
    fn from(access: Access) -> Self {
        match access {
            Access::Read => Self::READ,
            Access::Write => Self::WRITE,
        }
    }
}

/// A range of I/O addresses, which never wraps around and has at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRange {
    first: u64,
    last: u64,
}

impl IovaRange {
    pub const EVERYTHING: Self = Self { first: 0, last: u64::MAX };

    /// `size` addresses from `first` on. None if there is none, or if they wrap around.
    #[must_use]
    pub fn new(first: u64, size: u64) -> Option<Self> {
        let last = first.checked_add(size.checked_sub(1)?)?;
        Some(Self { first, last })
    }

    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    #[must_use]
    pub fn contains(self, iova: u64) -> bool {
        self.first <= iova && iova <= self.last
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.first, self.last)
    }
}

/// Why an I/O address leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmapped {
    /// Nobody said where it is.
    Miss { iova: u64, access: Access },
    /// It is mapped, but not for this.
    Denied { iova: u64, access: Access },
}

/// The cache. Whoever looks something up holds a lock for as long; whoever changes it waits for that.
#[derive(Debug)]
pub struct Iotlb {
    table: RwLock<Table>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Table {
    /// By first address; no two overlap.
    entries: BTreeMap<u64, Entry>,
    /// Of the next entry.
    age: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    last: u64,
    user_address: u64,
    permission: Permission,
    /// Lower is older.
    age: u64,
}

impl Default for Iotlb {
    fn default() -> Self {
        Self::with_capacity(CAPACITY)
    }
}

impl Iotlb {
    /// One that keeps up to `capacity` entries, at least one.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self { table: RwLock::default(), capacity: capacity.max(1) }
    }

    /// How many entries fit.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.read().entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Map `range` to user addresses from `user_address` on, instead of whatever was there. The caller has checked that
    /// those do not wrap around.
    pub fn update(&self, range: IovaRange, user_address: u64, permission: Permission) {
        let mut table = self.write();
        table.cut(range);
        while table.entries.len() >= self.capacity {
            table.drop_oldest();
        }
        let age = table.age;
        table.age += 1;
        table.entries.insert(range.first, Entry { last: range.last, user_address, permission, age });
    }

    /// Forget `range`. What a mapping has outside of it stays.
    pub fn invalidate(&self, range: IovaRange) {
        let mut table = self.write();
        table.cut(range);
        // What was cut out of the middle of an entry left two.
        while table.entries.len() > self.capacity {
            table.drop_oldest();
        }
    }

    /// Keep only mappings to `length` user addresses from some point on that `keep` accepts.
    pub fn retain(&self, keep: impl Fn(u64, u64) -> bool) {
        self.write().entries.retain(|first, entry| {
            // The whole address space has one address more than can be counted, and is nobody's memory.
            (entry.last - first).checked_add(1).is_some_and(|length| keep(entry.user_address, length))
        });
    }

    /// Look up `length` I/O addresses from `iova` on: `piece` is called with user address and length of each mapping that
    /// they are in, in order, and may refuse to go on.
    pub fn look_up<E: From<Unmapped>>(
        &self,
        mut iova: u64,
        mut length: u64,
        access: Access,
        mut piece: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let table = self.read();
        while length > 0 {
            let Some((first, entry)) = table.entries.range(..=iova).next_back().filter(|(_, entry)| entry.last >= iova)
            else {
                return Err(Unmapped::Miss { iova, access }.into());
            };
            if !entry.permission.allows(access) {
                return Err(Unmapped::Denied { iova, access }.into());
            }
            let here = length.min((entry.last - iova).saturating_add(1));
            piece(entry.user_address + (iova - first), here)?;
            length -= here;
            match iova.checked_add(here) {
                Some(next) => iova = next,
                None if length == 0 => {}
                None => return Err(Unmapped::Miss { iova: 0, access }.into()),
            }
        }
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Remove `range`, leaving what entries have before and after it.
    fn cut(&mut self, range: IovaRange) {
        if let Some((&first, entry)) = self.entries.range_mut(..range.first).next_back()
            && entry.last >= range.first
        {
            let whole = *entry;
            entry.last = range.first - 1;
            self.keep_rest(first, whole, range);
        }
        while let Some((&first, &entry)) = self.entries.range(range.first..=range.last).next() {
            self.entries.remove(&first);
            self.keep_rest(first, entry, range);
        }
    }

    /// Insert what `entry`, which began at `first`, has after `range`.
    fn keep_rest(&mut self, first: u64, entry: Entry, range: IovaRange) {
        if entry.last > range.last {
            let start = range.last + 1;
            self.entries.insert(start, Entry { user_address: entry.user_address + (start - first), ..entry });
        }
    }

    fn drop_oldest(&mut self) {
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.age).map(|(first, _)| *first);
        oldest.and_then(|first| self.entries.remove(&first));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, size: u64) -> IovaRange {
        IovaRange::new(first, size).unwrap()
    }

    fn look_up(iotlb: &Iotlb, iova: u64, length: u64, access: Access) -> Result<Vec<(u64, u64)>, Unmapped> {
        let mut pieces = Vec::new();
        iotlb.look_up(iova, length, access, |address, length| {
            pieces.push((address, length));
            Ok::<_, Unmapped>(())
        })?;
        Ok(pieces)
    }

    #[test]
    fn a_range_over_several_mappings_has_a_piece_in_each() {
        let iotlb = Iotlb::default();
        iotlb.update(range(0x1000, 0x1000), 0x7000, Permission::READ_WRITE);
        iotlb.update(range(0x2000, 0x1000), 0x3000, Permission::READ);
        assert_eq!(look_up(&iotlb, 0x1ff0, 0x20, Access::Read), Ok(vec![(0x7ff0, 0x10), (0x3000, 0x10)]));
        assert_eq!(look_up(&iotlb, 0x1000, 0, Access::Read), Ok(vec![]));
    }

    #[test]
    fn the_first_address_that_is_not_mapped_is_the_one_that_is_missed() {
        let iotlb = Iotlb::default();
        iotlb.update(range(0x1000, 0x1000), 0x7000, Permission::READ_WRITE);
        let miss = |iova| Err(Unmapped::Miss { iova, access: Access::Write });
        assert_eq!(look_up(&iotlb, 0x1fff, 2, Access::Write), miss(0x2000));
        assert_eq!(look_up(&iotlb, 0xfff, 2, Access::Write), miss(0xfff));
        assert_eq!(look_up(&iotlb, 0x1000, u64::MAX, Access::Write), miss(0x2000));
    }

    #[test]
    fn a_mapping_is_used_only_for_what_it_allows() {
        let iotlb = Iotlb::default();
        iotlb.update(range(0x1000, 0x1000), 0x7000, Permission::READ);
        iotlb.update(range(0x2000, 0x1000), 0x7000, Permission::WRITE);
        assert_eq!(look_up(&iotlb, 0x1ff0, 0x10, Access::Read), Ok(vec![(0x7ff0, 0x10)]));
        let denied = |iova, access| Err(Unmapped::Denied { iova, access });
        assert_eq!(look_up(&iotlb, 0x1ff0, 0x10, Access::Write), denied(0x1ff0, Access::Write));
        assert_eq!(look_up(&iotlb, 0x1ff0, 0x20, Access::Read), denied(0x2000, Access::Read));
        assert_eq!(look_up(&iotlb, 0x2000, 0x10, Access::Write), Ok(vec![(0x7000, 0x10)]));
    }

    #[test]
    fn the_end_of_the_address_space_is_an_end() {
        assert_eq!(IovaRange::new(0, 0), None);
        assert_eq!(IovaRange::new(u64::MAX, 2), None);
        let iotlb = Iotlb::default();
        iotlb.update(range(u64::MAX - 0xfff, 0x1000), 0x7000, Permission::READ);
        assert_eq!(look_up(&iotlb, u64::MAX, 1, Access::Read), Ok(vec![(0x7fff, 1)]));
        let around = Unmapped::Miss { iova: 0, access: Access::Read };
        assert_eq!(look_up(&iotlb, u64::MAX, 2, Access::Read), Err(around));
        iotlb.invalidate(range(u64::MAX, 1));
        assert_eq!(look_up(&iotlb, u64::MAX - 1, 1, Access::Read), Ok(vec![(0x7ffe, 1)]));
        iotlb.update(IovaRange::EVERYTHING, 0, Permission::READ_WRITE);
        assert_eq!(look_up(&iotlb, 0x1234, 1, Access::Read), Ok(vec![(0x1234, 1)]));
        iotlb.invalidate(IovaRange::EVERYTHING);
        assert!(iotlb.is_empty());
    }

    #[test]
    fn the_oldest_mapping_goes_when_there_is_no_room() {
        let iotlb = Iotlb::with_capacity(3);
        for page in 0..1000 {
            iotlb.update(range(page << 12, 0x1000), page << 12, Permission::READ);
            assert!(iotlb.len() <= 3);
        }
        assert!(look_up(&iotlb, 996 << 12, 1, Access::Read).is_err());
        assert!(look_up(&iotlb, 997 << 12, 1, Access::Read).is_ok());
        iotlb.invalidate(range((998 << 12) + 1, 1));
        assert_eq!(iotlb.len(), 3, "a hole makes two of one");
    }

    #[test]
    fn mappings_to_memory_that_is_gone_are_dropped() {
        let iotlb = Iotlb::default();
        iotlb.update(range(0x1000, 0x1000), 0x7000, Permission::READ);
        iotlb.update(range(0x2000, 0x1000), 0x3000, Permission::READ);
        iotlb.retain(|address, length| address == 0x3000 && length == 0x1000);
        assert!(look_up(&iotlb, 0x1000, 1, Access::Read).is_err());
        assert!(look_up(&iotlb, 0x2000, 1, Access::Read).is_ok());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Update(u64, u64, u64, u8),
        Invalidate(u64, u64),
    }

    /// Ranges that often overlap, some of them at the very end of the address space.
    fn step() -> impl Strategy<Value = Step> {
        let place = (0..48u64, 1..16u64, any::<bool>())
            .prop_map(|(first, size, high)| if high { (u64::MAX - 63 + first, size) } else { (first, size) });
        prop_oneof![
            3 => (place.clone(), 0..1000u64, 1..=3u8).prop_map(|((first, size), user, bits)| Step::Update(first, size, user * 100, bits)),
            1 => place.prop_map(|(first, size)| Step::Invalidate(first, size)),
        ]
    }

    proptest! {
        /// What is mapped is what a table of single addresses says.
        #[test]
        fn it_agrees_with_a_table_of_single_addresses(steps in prop::collection::vec(step(), 0..60)) {
            let iotlb = Iotlb::default();
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Update(first, size, user, bits) => {
                        iotlb.update(range(first, size), user, Permission::from_bits(bits).unwrap());
                        model.extend((0..size).map(|at| (first + at, (user + at, bits))));
                    }
                    Step::Invalidate(first, size) => {
                        iotlb.invalidate(range(first, size));
                        model.retain(|iova, _| *iova < first || *iova - first >= size);
                    }
                }
                let mut before = None;
                for (first, entry) in &iotlb.read().entries {
                    prop_assert!(before.is_none_or(|before| before < *first) && *first <= entry.last);
                    before = Some(entry.last);
                }
                for iova in (0..64).chain(u64::MAX - 63..=u64::MAX) {
                    for access in [Access::Read, Access::Write] {
                        let expected = match model.get(&iova) {
                            None => Err(Unmapped::Miss { iova, access }),
                            Some((_, bits)) if bits & Permission::from(access).bits() == 0 => {
                                Err(Unmapped::Denied { iova, access })
                            }
                            Some((user, _)) => Ok(vec![(*user, 1)]),
                        };
                        prop_assert_eq!(look_up(&iotlb, iova, 1, access), expected);
                    }
                }
            }
        }
    }
}
