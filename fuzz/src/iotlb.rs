//! An IOTLB beside a list of what was said to it: a lookup finds what was said last, or nothing.

use vhost_user::memory::{Access, Iotlb, IovaRange, Permission, Unmapped};

use super::support::{Input, number};

pub fn run(input: &[u8]) {
    // An input ends where its bytes do, in the middle of whatever.
    let _ = play(&mut Input::new(input));
}

/// What was said of a range: where it leads, if anywhere.
type Said = (u64, u64, Option<(u64, u8)>);

fn play(input: &mut Input<'_>) -> arbitrary::Result<()> {
    let capacity = input.int_in_range(1..=64)?;
    let iotlb = Iotlb::with_capacity(capacity);
    let mut said: Vec<Said> = Vec::new();
    let start = if input.arbitrary()? { 0 } else { u64::MAX - 0xff };
    while !input.is_empty() {
        let near = start + input.int_in_range(0..=0xff)?;
        let first = if input.ratio(15u8, 16u8)? { near } else { number(input)? };
        let size = if input.ratio(15u8, 16u8)? { input.int_in_range(0..=0x40)? } else { number(input)? };
        match (IovaRange::new(first, size), input.int_in_range(0..=2)?) {
            (None, _) => assert!(size == 0 || first.checked_add(size - 1).is_none()),
            (Some(range), 0) => {
                let bits: u8 = input.int_in_range(0..=4)?;
                let Some(permission) = Permission::from_bits(bits) else {
                    assert!(bits == 0 || bits == 4);
                    continue;
                };
                let user = input.int_in_range(0..=u64::MAX - size)?;
                iotlb.update(range, user, permission);
                said.push((first, first + (size - 1), Some((user, bits))));
            }
            (Some(range), 1) => {
                iotlb.invalidate(range);
                said.push((first, first + (size - 1), None));
            }
            _ => {
                let access = if input.arbitrary()? { Access::Read } else { Access::Write };
                look_up(&iotlb, &said, first, size.min(0x100), access);
            }
        }
        assert!(iotlb.len() <= capacity);
    }
    Ok(())
}

fn look_up(iotlb: &Iotlb, said: &[Said], first: u64, size: u64, access: Access) {
    let mut next = first;
    let mut left = size;
    let outcome = iotlb.look_up(first, size, access, |user, length| {
        assert!(length > 0 && length <= left, "more than was asked for");
        for at in [0, length - 1] {
            let iova = next + at;
            let last = said.iter().rev().find(|(first, last, _)| *first <= iova && iova <= *last);
            let (from, _, Some((to, bits))) = last.expect("nobody said where that is") else {
                panic!("{iova:#x} was taken back")
            };
            assert_eq!(user + at, to + (iova - from));
            assert_ne!(bits & access_bit(access), 0, "that was not allowed");
        }
        next = next.wrapping_add(length);
        left -= length;
        Ok::<_, Unmapped>(())
    });
    assert_eq!(outcome.is_ok(), left == 0);
}

fn access_bit(access: Access) -> u8 {
    match access {
        Access::Read => 1,
        Access::Write => 2,
    }
}
