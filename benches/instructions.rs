//! So many batches of so many descriptors through a split ring: for a program that counts instructions.
//!
//!     instructions BATCHES DESCRIPTORS

mod rig;

use std::hint::black_box;
use std::sync::Arc;

use rig::{BATCH, Rig, SIZE};
use vhost_user::virtqueue::{Chain, Little, Ring, RingLimits, RingOptions, SplitRing, Used};

fn main() {
    // Cargo adds an argument of its own.
    let mut numbers = std::env::args().filter_map(|argument| argument.parse().ok());
    let (Some(batches), Some(descriptors)) = (numbers.next(), numbers.next()) else { return };
    let mut rig = Rig::new(descriptors, 1);
    let options = RingOptions { indirect: true, ..RingOptions::default() };
    let ring =
        SplitRing::<Little>::new(Rig::addresses(), SIZE, 0, options, RingLimits::default(), Arc::clone(&rig.memory));
    let mut ring = ring.expect("a ring that is in memory");
    let mut chains: Vec<Chain> = (0..BATCH).map(|_| Chain::default()).collect();
    for _ in 0..batches {
        rig.submit();
        assert_eq!(ring.available(), Ok(BATCH));
        for chain in &mut chains {
            assert!(ring.pop(chain).expect("a good chain"));
        }
        for chain in &chains {
            ring.push_used(Used { head: chain.head(), written: chain.writable() as u32 });
        }
        black_box(ring.publish());
    }
}
