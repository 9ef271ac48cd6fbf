//! Guest memory whose pages come only when they are touched, while the guest runs already.
//!
//! The thread that touches a missing page waits in the kernel until the front-end has provided it. If the front-end goes
//! away meanwhile, nobody on that thread can notice: hence another one, which does nothing else.
//!
//! vhost-user specification, "Migration" (postcopy).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, write};

use crate::error::Error;
use crate::memory::{Region, Snapshot, Userfault};
use crate::process::Process;

/// What the front-end has said of it.
#[derive(Debug, Default)]
pub(super) enum Postcopy {
    #[default]
    Off,
    /// POSTCOPY_ADVISE came.
    Advised(Userfault),
    /// POSTCOPY_LISTEN came: memory is provided page by page.
    Listening { guard: Guard, pending: Option<Snapshot> },
}

impl Postcopy {
    /// Returns what the front-end provides pages by.
    pub(super) fn advise(&mut self) -> Result<OwnedFd, Error> {
        if !matches!(self, Self::Off) {
            return Err(Error::State("it came before; the next one comes after POSTCOPY_END".to_owned()));
        }
        let userfault = Userfault::open()?;
        let copy = userfault.try_clone()?;
        *self = Self::Advised(userfault);
        Ok(copy)
    }

    /// From now on memory is provided by the front-end that is connected by `socket`.
    pub(super) fn listen(&mut self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        match std::mem::take(self) {
            Self::Advised(userfault) => {
                *self = Self::Listening { guard: Guard::new(userfault, socket)?, pending: None };
                Ok(())
            }
            other => {
                *self = other;
                Err(Error::State("POSTCOPY_ADVISE has to come before, and this only once".to_owned()))
            }
        }
    }

    pub(super) fn is_listening(&self) -> bool {
        matches!(self, Self::Listening { .. })
    }

    /// Make missing pages of `memory` wait for the front-end. It is not in use before [`go`](Self::go).
    pub(super) fn prepare(&mut self, memory: Snapshot) -> Result<(), Error> {
        let Self::Listening { guard, pending } = self else {
            return Err(Error::State("POSTCOPY_LISTEN has to come before".to_owned()));
        };
        *pending = None;
        guard.register(memory.regions())?;
        *pending = Some(memory);
        Ok(())
    }

    /// The front-end is ready to provide pages of this memory.
    pub(super) fn go(&mut self) -> Option<Snapshot> {
        match self {
            Self::Listening { pending, .. } => pending.take(),
            _ => None,
        }
    }

    /// Every page is there.
    pub(super) fn end(&mut self) {
        if let Self::Listening { guard, .. } = std::mem::take(self) {
            guard.end();
        }
    }

    /// Whether the front-end went away before that.
    pub(super) fn is_abandoned(&self) -> bool {
        matches!(self, Self::Listening { guard, .. } if guard.shared.is_abandoned.load(Ordering::Acquire))
    }
}

/// Sees to it that nobody waits for a page that nobody provides.
#[derive(Debug)]
pub(super) struct Guard {
    process: Process,
    shared: Arc<Shared>,
    quit: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    userfault: Userfault,
    /// Mapped as long as they are here.
    regions: Mutex<Vec<Arc<Region>>>,
    is_abandoned: AtomicBool,
}

impl Guard {
    fn new(userfault: Userfault, socket: BorrowedFd<'_>) -> Result<Self, Error> {
        let os = |context: &str| {
            let context = context.to_owned();
            move |source| Error::Os { context, source }
        };
        let socket = socket.try_clone_to_owned().map_err(os("dup of the socket"))?;
        let quit =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::os("making an eventfd"))?;
        let quit = Arc::new(quit);
        let shared = Arc::new(Shared { userfault, regions: Mutex::default(), is_abandoned: AtomicBool::new(false) });
        let (watched, until) = (Arc::clone(&shared), Arc::clone(&quit));
        let thread = thread::Builder::new()
            .name("vhost-user postcopy".to_owned())
            .spawn(move || {
                if is_gone(&socket, &until) {
                    watched.abandon();
                }
            })
            .map_err(os("starting a thread"))?;
        Ok(Self { process: Process::current(), shared, quit, thread: Some(thread) })
    }

    fn register(&self, regions: &[Arc<Region>]) -> Result<(), Error> {
        let mut registered = self.shared.regions.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody else has are not in use any more.
        registered.retain(|region| Arc::strong_count(region) > 1);
        for region in regions {
            self.shared.userfault.register(region.pages())?;
            registered.push(Arc::clone(region));
        }
        drop(registered);
        if self.shared.is_abandoned.load(Ordering::Acquire) {
            self.shared.abandon();
        }
        Ok(())
    }

    fn end(mut self) {
        self.stop();
        let mut regions = self.shared.regions.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.shared.is_abandoned.load(Ordering::Acquire) {
            for region in regions.drain(..) {
                if let Err(error) = self.shared.userfault.unregister(region.pages()) {
                    log::error!("{error}");
                }
            }
        }
    }

    fn stop(&mut self) {
        // An eventfd has room for a first one.
        let _ = write(&self.quit, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that watches the front-end panicked");
        }
    }
}

impl Drop for Guard {
    /// What is registered still never comes: requests that outlive the session must not wait for it.
    fn drop(&mut self) {
        if !self.process.is_current() {
            // The pages are those of the parent, and so is the thread.
            return;
        }
        self.stop();
        self.shared.abandon();
    }
}

impl Shared {
    fn abandon(&self) {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_abandoned.store(true, Ordering::Release);
        let mut failures = Vec::new();
        for region in regions.drain(..) {
            failures.extend(self.userfault.poison(region.pages()).err());
            failures.extend(self.userfault.unregister(region.pages()).err());
        }
        // Not before: whoever waits for a page may hold what a logger needs.
        failures.iter().for_each(|error| log::error!("{error}"));
    }
}

/// Wait until the other end of `socket` is closed, or for `quit`. Returns whether it was the former.
fn is_gone(socket: &OwnedFd, quit: &OwnedFd) -> bool {
    loop {
        let mut ends = [PollFd::new(socket, PollFlags::RDHUP), PollFd::new(quit, PollFlags::IN)];
        match poll(&mut ends, None) {
            Ok(_) if !ends[1].revents().is_empty() => return false,
            Ok(_) if !ends[0].revents().is_empty() => return true,
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                log::error!("poll: {errno}");
                return true;
            }
        }
    }
}
