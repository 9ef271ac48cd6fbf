//! IN_ORDER: what is done early is held back, and one entry may stand for several chains.

use super::*;

const IN_ORDER: RingOptions = RingOptions { in_order: true, ..EVENT_IDX };

#[test]
fn what_is_done_early_is_given_back_in_the_order_of_the_driver() {
    for options in formats(IN_ORDER) {
        let mut rig = Rig::new(8, 65_533, options);
        let heads: Vec<_> = (0..5).map(|_| rig.submit(&[writable(DATA, 9)], None)).collect();
        heads.iter().for_each(|_| drop(rig.take()));
        assert!(!rig.complete(heads[3], 3), "nobody can see it");
        assert!(!rig.complete(heads[1], 1));
        assert_eq!((rig.driver.pop(), rig.device.in_flight()), (Ok(None), 3));
        assert!(rig.complete(heads[0], 0));
        let _call = rig.complete(heads[2], 2);
        for (written, head) in (0..4).zip(&heads) {
            assert_eq!(rig.driver.pop(), Ok(Some(Used { head: *head, written })));
        }
        assert_eq!(rig.driver.pop(), Ok(None));
        rig.complete(heads[4], 4);
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head: heads[4], written: 4 })));
        assert_eq!((rig.driver.free(), rig.device.in_flight()), (8, 0));
    }
}

#[test]
fn a_chain_that_was_put_back_holds_nothing_back() {
    for options in formats(IN_ORDER) {
        let mut rig = Rig::new(8, 0, options);
        let heads: Vec<_> = (0..2).map(|_| rig.submit(&[writable(DATA, 9)], None)).collect();
        heads.iter().for_each(|_| drop(rig.take()));
        assert!(rig.device.unpop(heads[1]));
        rig.complete(heads[0], 0);
        assert_eq!(rig.take().head(), heads[1]);
        rig.complete(heads[1], 1);
        for (written, head) in (0..).zip(heads) {
            assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written })));
        }
    }
}

#[test]
fn what_is_held_back_takes_room_in_the_ring() {
    let mut rig = Rig::new(4, 0, IN_ORDER);
    let heads: Vec<_> = (0..4).map(|_| rig.submit(&[writable(DATA, 1)], None)).collect();
    heads.iter().for_each(|_| drop(rig.take()));
    rig.complete(heads[1], 0);
    rig.poke(AVAIL + 2, &5u16.to_le_bytes());
    assert_eq!(rig.device.available(), Err(RingError::IndexJump { from: 4, to: 5, free: 0 }));
    rig.complete(heads[0], 0);
    assert_eq!(rig.device.available(), Ok(1));
}

#[test]
fn a_split_ring_in_order_is_used_in_the_order_of_its_descriptors() {
    let mut rig = Rig::new(4, 0, IN_ORDER);
    for heads in [[0, 1], [3, 0], [2, 3], [1, 2]] {
        let first = rig.submit(&[writable(DATA, 1)], None);
        let second = rig.submit(&[writable(DATA, 1), writable(DATA, 1)], None);
        assert_eq!([first, second], heads);
        for head in heads {
            assert_eq!(rig.take().head(), head);
            rig.complete(head, 0);
            assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written: 0 })));
        }
    }
}

#[test]
fn one_entry_of_a_split_ring_may_stand_for_several_chains() {
    let mut rig = Rig::new(4, 65_534, IN_ORDER);
    let heads: Vec<_> = (0..4).map(|at| rig.submit(&[writable(DATA, 10 + at)], None)).collect();
    // The first three at once: entry 2 names the third, and the index is three further.
    rig.poke(USED + 4 + 2 * 8, &[&u32::from(heads[2]).to_le_bytes()[..], &5u32.to_le_bytes()].concat());
    rig.poke(USED + 2, &65_534u16.wrapping_add(3).to_le_bytes());
    for (head, written) in [(heads[0], 10), (heads[1], 11), (heads[2], 5)] {
        assert_eq!(rig.driver.pop(), Ok(Some(Used { head, written })));
    }
    assert_eq!((rig.driver.pop(), rig.driver.outstanding(), rig.driver.free()), (Ok(None), 1, 3));
    // The next is where the index says.
    rig.poke(USED + 4 + 8, &[&u32::from(heads[3]).to_le_bytes()[..], &6u32.to_le_bytes()].concat());
    rig.poke(USED + 2, &65_534u16.wrapping_add(4).to_le_bytes());
    assert_eq!(rig.driver.pop(), Ok(Some(Used { head: heads[3], written: 6 })));
}

#[test]
fn the_driver_refuses_a_batch_that_the_used_index_does_not_tell_of() {
    let mut rig = Rig::new(4, 0, IN_ORDER);
    let heads: Vec<_> = (0..3).map(|_| rig.submit(&[writable(DATA, 1)], None)).collect();
    rig.poke(USED + 4, &u32::from(heads[2]).to_le_bytes());
    rig.poke(USED + 2, &2u16.to_le_bytes());
    assert_eq!(rig.driver.pop(), Err(RingError::UsedBatch { head: heads[2], batch: 3, done: 2 }));
    assert_eq!((rig.driver.outstanding(), rig.driver.free()), (3, 1));
}

#[test]
fn one_descriptor_of_a_packed_ring_may_stand_for_several_chains() {
    const USED_IN_FIRST_ROUND: u16 = 1 << 7 | 1 << 15;
    let mut rig = Rig::new(5, 0, RingOptions { packed: true, ..IN_ORDER });
    let pair = [writable(DATA, 10), writable(DATA, 10)];
    let heads = [rig.submit(&pair[..1], None), rig.submit(&pair, None), rig.submit(&pair[..1], None)];
    rig.describe(DESCRIPTORS, 0, 0, 7, heads[1], USED_IN_FIRST_ROUND);
    assert_eq!(rig.driver.base(), 0x8003_8003);
    assert_eq!(rig.driver.enable_calls(1), Ok(true));
    assert_eq!(rig.driver.pop(), Ok(Some(Used { head: heads[0], written: 10 })));
    assert_eq!(rig.driver.enable_calls(1), Ok(true), "there is more of the batch");
    assert_eq!(rig.driver.pop(), Ok(Some(Used { head: heads[1], written: 7 })));
    assert_eq!((rig.driver.pop(), rig.driver.outstanding(), rig.driver.free()), (Ok(None), 1, 4));
    rig.describe(DESCRIPTORS, 3, 0, 8, heads[2], USED_IN_FIRST_ROUND);
    assert_eq!(rig.driver.pop(), Ok(Some(Used { head: heads[2], written: 8 })));
}
