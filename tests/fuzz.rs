//! What the fuzzers do with their input, done with every input that is kept: those that they thought worth it, and those
//! that found something.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

#[path = "../fuzz/src/lib.rs"]
mod targets;

/// Targets count what the process has open: one at a time.
static TURN: Mutex<()> = Mutex::new(());

fn replay(name: &str) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, target) = targets::TARGETS.iter().find(|(known, _)| *known == name).expect("a target of that name");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "{}: {} inputs", folder.display(), files.len());
    for file in files {
        // What cargo test shows when the target panics.
        println!("{}", file.display());
        target(&std::fs::read(file).unwrap());
    }
}

macro_rules! replay {
    ($($name:ident)+) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })+

        #[test]
        fn every_target_is_replayed() {
            let names: Vec<_> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [$(stringify!($name)),+]);
        }
    };
}

replay! {
    backend codec dirty_log frontend iotlb packed_device packed_driver packed_inflight split_device split_driver
    split_inflight transport
}
