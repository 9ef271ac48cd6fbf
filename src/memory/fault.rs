//! SIGBUS: a peer may shrink the file behind a mapping at any time, and the next access must not kill the process.
//!
//! A page that lost its file is replaced by a private zero page, and its region is marked; the session that owns the
//! region sees the mark and ends. A SIGBUS anywhere else goes to whoever handled it before us.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use crate::process::ProcessLock;

/// A mapped range that the handler knows. Never freed, because a handler may be reading it; reused instead.
#[derive(Debug)]
pub(super) struct Watched {
    /// `usize::MAX` while unused.
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    lost: AtomicBool,
    /// Null, or whose pages these are a second time: it loses what is lost here.
    original: AtomicPtr<Watched>,
    next: AtomicPtr<Watched>,
}

static HEAD: AtomicPtr<Watched> = AtomicPtr::new(std::ptr::null_mut());
static FAULTS: AtomicU64 = AtomicU64::new(0);
static REGISTRATION: ProcessLock<()> = ProcessLock::new();
/// The disposition that was there before ours; leaked, because a handler may be reading it.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());
static GAVE_UP: AtomicBool = AtomicBool::new(false);

/// How many pages were lost so far, in the whole process. A change tells a session to look at its own regions.
#[must_use]
pub fn faults_seen() -> u64 {
    FAULTS.load(Ordering::Relaxed)
}

/// Watch `start..end`, whose pages have `page` bytes, and belong to `original`, if that is given.
pub(super) fn watch(start: usize, end: usize, page: usize, original: Option<&'static Watched>) -> &'static Watched {
    let original = original.map_or(std::ptr::null_mut(), |original| std::ptr::from_ref(original).cast_mut());
    let _guard = REGISTRATION.lock();
    install();
    let mut node = HEAD.load(Ordering::Acquire);
    // SAFETY: nodes are leaked boxes, so every pointer in the list stays valid for ever.
    while let Some(watched) = unsafe { node.as_ref() } {
        if watched.start.load(Ordering::Relaxed) == usize::MAX {
            watched.lost.store(false, Ordering::Relaxed);
            watched.original.store(original, Ordering::Relaxed);
            watched.page.store(page, Ordering::Relaxed);
            watched.end.store(end, Ordering::Relaxed);
            watched.start.store(start, Ordering::Release);
            return watched;
        }
        node = watched.next.load(Ordering::Relaxed);
    }
    let watched: &'static Watched = Box::leak(Box::new(Watched {
        start: AtomicUsize::new(start),
        end: AtomicUsize::new(end),
        page: AtomicUsize::new(page),
        lost: AtomicBool::new(false),
        original: AtomicPtr::new(original),
        next: AtomicPtr::new(HEAD.load(Ordering::Relaxed)),
    }));
    HEAD.store(std::ptr::from_ref(watched).cast_mut(), Ordering::Release);
    watched
}

impl Watched {
    /// To be called before the range is unmapped.
    pub(super) fn forget(&self) {
        self.start.store(usize::MAX, Ordering::Release);
    }

    /// Whether a page of the range lost its file.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Put our handler in front, also when somebody (Python's faulthandler, say) has replaced it since.
fn install() {
    // SAFETY: an all-zero sigaction is a valid value (SIG_DFL, no flags, empty mask).
    let mut current: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only asks; `current` is ours to write.
    unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut current) };
    let handler = on_sigbus as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    if current.sa_sigaction == handler as usize {
        return;
    }
    PREVIOUS.store(Box::into_raw(Box::new(current)), Ordering::Release);
    // SAFETY: as above.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    ours.sa_sigaction = handler as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `ours` is initialised, and `on_sigbus` does only what a signal handler may: atomics and two system calls.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, std::ptr::null_mut()) };
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: SA_SIGINFO makes the kernel pass a valid siginfo, and SIGBUS fills in the address.
    let address = unsafe { (*info).si_addr() } as usize;
    let mut node = HEAD.load(Ordering::Acquire);
    // SAFETY: nodes are leaked, see `watch`.
    while let Some(watched) = unsafe { node.as_ref() } {
        let start = watched.start.load(Ordering::Acquire);
        let end = watched.end.load(Ordering::Relaxed);
        if start <= address && address < end && watched.start.load(Ordering::Acquire) == start {
            let page = watched.page.load(Ordering::Relaxed);
            watched.lost.store(true, Ordering::Relaxed);
            // SAFETY: it is null or a node, and nodes are leaked, see `watch`.
            if let Some(original) = unsafe { watched.original.load(Ordering::Relaxed).as_ref() } {
                original.lost.store(true, Ordering::Relaxed);
            }
            FAULTS.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the page lies in a range that `Region` mapped and has not unmapped; replacing it with zeroes
            // changes what the peer's memory says, which we never rely on, and no Rust object lives in it.
            let replaced = unsafe {
                libc::mmap(
                    (address & !(page - 1)) as *mut libc::c_void,
                    page,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if replaced != libc::MAP_FAILED {
                return;
            }
        }
        node = watched.next.load(Ordering::Relaxed);
    }
    // Not ours: let the faulting instruction run again under the previous disposition; and under the default one if it
    // comes back to us, since handlers that chain to each other would go round for ever.
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: `previous` is a leaked box or null; a zeroed sigaction is the default disposition.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        let first_time = !GAVE_UP.swap(true, Ordering::Relaxed);
        let next = if first_time && !previous.is_null() { previous.cast_const() } else { &raw const default };
        libc::sigaction(libc::SIGBUS, next, std::ptr::null_mut());
    }
}
