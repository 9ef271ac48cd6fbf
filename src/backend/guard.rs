//! Writes to a peer's descriptor that do not come back.
//!
//! Whether a write to an eventfd waits is up to a flag that the peer shares and may change at any moment, and so may it fill
//! the counter. To ask before each write would cost as much as the write, and the answer could be out of date. So nobody
//! asks: a thread looks now and then for a write that is still under way, and empties the counter, which lets it end. The
//! peer is not written to any more. The thread is there as long as somebody may write.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::io::{ReadWriteFlags, preadv2, write};

use crate::process::ProcessLock;

/// Between two looks. A write that is under way at both of them does not come back.
const INTERVAL: Duration = Duration::from_millis(250);

/// A descriptor that may be written to.
#[derive(Debug)]
pub(super) struct Guarded {
    descriptor: OwnedFd,
    /// Writes, by any thread.
    begun: AtomicU64,
    ended: AtomicU64,
    /// Those that had ended at the last look, if one was under way then.
    seen: AtomicU64,
    is_given_up: AtomicBool,
}

const NOTHING_UNDER_WAY: u64 = u64::MAX;

#[derive(Debug, Default)]
struct Guard {
    watched: Vec<Weak<Guarded>>,
    is_running: bool,
}

/// A child that is forked has no such thread, until it starts one for its own descriptors.
static GUARD: ProcessLock<Guard> = ProcessLock::new();

impl Guarded {
    pub(super) fn new(descriptor: OwnedFd) -> Arc<Self> {
        let guarded = Arc::new(Self {
            descriptor,
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            seen: AtomicU64::new(NOTHING_UNDER_WAY),
            is_given_up: AtomicBool::new(false),
        });
        let mut guard = GUARD.lock();
        guard.watched.push(Arc::downgrade(&guarded));
        if !guard.is_running {
            let thread = std::thread::Builder::new().name("vhost-user guard".to_owned());
            // The next descriptor tries again.
            guard.is_running = thread.spawn(run).is_ok();
        }
        guarded
    }

    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.descriptor
    }

    /// Write `bytes`, once. Whoever cannot be told has no use for it.
    pub(super) fn write(&self, bytes: &[u8]) {
        if self.is_given_up.load(Ordering::Relaxed) {
            return;
        }
        self.begun.fetch_add(1, Ordering::Relaxed);
        let _ = write(&self.descriptor, bytes);
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn look(&self) {
        // In this order: what ends in between is not taken for something under way.
        let ended = self.ended.load(Ordering::Acquire);
        let is_under_way = self.begun.load(Ordering::Acquire) != ended;
        let seen = self.seen.swap(if is_under_way { ended } else { NOTHING_UNDER_WAY }, Ordering::Relaxed);
        if is_under_way && seen == ended {
            self.is_given_up.store(true, Ordering::Relaxed);
            let _ = preadv2(&self.descriptor, &mut [IoSliceMut::new(&mut [0; 8])], u64::MAX, ReadWriteFlags::NOWAIT);
        }
    }
}

fn run() {
    while let Some(watched) = still_watched() {
        watched.iter().for_each(|guarded| guarded.look());
        drop(watched);
        std::thread::sleep(INTERVAL);
    }
}

/// Those that somebody may write to. If there are none, the thread has to end.
fn still_watched() -> Option<Vec<Arc<Guarded>>> {
    let mut guard = GUARD.lock();
    guard.watched.retain(|guarded| guarded.strong_count() > 0);
    guard.is_running = !guard.watched.is_empty();
    guard.is_running.then(|| guard.watched.iter().filter_map(Weak::upgrade).collect())
}
