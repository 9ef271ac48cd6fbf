//! So many batches of chains of so many descriptors through a ring: for a program that counts instructions.
//!
//!     instructions split|packed BATCHES DESCRIPTORS
//!
//! What is to be counted is [`serve`]: the device's part.

mod rig;

use std::hint::black_box;
use std::sync::Arc;

use rig::{BATCH, Rig, SIZE};
use vhost_user::virtqueue::{
    Chain, Driver, Little, PackedDriver, PackedRing, Ring, RingLimits, RingOptions, SplitDriver, SplitRing, Used,
};

fn main() {
    let mut arguments = std::env::args().skip(1);
    // Cargo runs it without these.
    let (Some(format), Some(batches), Some(descriptors)) =
        (arguments.next(), number(&mut arguments), number(&mut arguments))
    else {
        return;
    };
    let options = RingOptions { packed: format == "packed", indirect: true, ..RingOptions::default() };
    if options.packed {
        run::<PackedRing, PackedDriver>(batches, descriptors, options);
    } else {
        run::<SplitRing<Little>, SplitDriver<Little>>(batches, descriptors, options);
    }
}

fn number(arguments: &mut impl Iterator<Item = String>) -> Option<usize> {
    arguments.next()?.parse().ok()
}

fn run<R: Ring, D: Driver>(batches: usize, descriptors: usize, options: RingOptions) {
    let rig = Rig::new(descriptors, 1);
    let driver = D::new(Rig::addresses(), SIZE, 0, options, Arc::clone(&rig.memory));
    let mut driver = driver.expect("a ring that is in memory");
    let limits = RingLimits::default();
    let ring = R::new(Rig::addresses(), SIZE, driver.base(), options, limits, Arc::clone(&rig.memory));
    let mut ring = ring.expect("a ring that is in memory");
    let mut chains: Vec<Chain> = (0..BATCH).map(|_| Chain::default()).collect();
    let mut used = Vec::with_capacity(BATCH.into());
    for _ in 0..batches {
        for at in 0..BATCH {
            driver.add(&Rig::elements(descriptors, at), None).expect("room for a chain");
        }
        black_box(driver.publish());
        serve(&mut ring, &mut chains, &mut used);
        for _ in 0..BATCH {
            driver.pop().expect("a good device").expect("a chain that was given back");
        }
    }
}

#[inline(never)]
fn serve<R: Ring>(ring: &mut R, chains: &mut [Chain], used: &mut Vec<Used>) {
    assert_eq!(ring.look(), Ok(true));
    assert_eq!(ring.take(chains), Ok(BATCH.into()));
    used.clear();
    used.extend(chains.iter().map(|chain| Used { head: chain.head(), written: chain.writable() as u32 }));
    ring.fill_used(used);
    black_box(ring.publish());
}
