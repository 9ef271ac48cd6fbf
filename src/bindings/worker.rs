//! A thread that works on some queues of a device, beside the device's own.
//!
//! Owns: the loop that hears of the kicks of its queues, which of them to look at, and what their requests are worked on
//! with. The session, and with it all that starts or stops a queue, stays on the device's thread, which hands over the
//! queues that are to be looked at for another reason than a kick.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;

use super::backend::{Backend, Caller, Worked};
use super::batch::Workspace;
use crate::backend::{Event, EventLoop, Polling, Token};
use crate::error::Error;
use crate::memory::faults_seen;

#[derive(Debug)]
pub(super) struct Worker {
    events: Arc<EventLoop>,
    handed_over: Mutex<BTreeSet<u16>>,
    stopping: AtomicBool,
}

impl Worker {
    pub(super) fn new() -> Result<Self, Error> {
        let events = Arc::new(EventLoop::new()?);
        Ok(Self { events, handed_over: Mutex::default(), stopping: AtomicBool::new(false) })
    }

    pub(super) fn events(&self) -> &Arc<EventLoop> {
        &self.events
    }

    /// Look at `queue`, soon. From any thread.
    pub(super) fn hand_over(&self, queue: u16) {
        self.handed_over().insert(queue);
        self.events.wakeup().wake();
    }

    /// End, after the batch that is being worked on. From any thread.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.events.wakeup().wake();
    }

    /// Work until [`stop`](Self::stop). Exceptions that mean the end go to the device's thread.
    pub(super) fn run(&self, py: Python<'_>, backend: &Backend) -> Result<(), Error> {
        let mut workspaces: BTreeMap<u16, Workspace> = BTreeMap::new();
        let mut events = Vec::new();
        let mut due: Vec<u16> = Vec::new();
        let mut polling = Polling::new(backend.busy_poll());
        let mut faults = faults_seen();
        loop {
            let looked = py.detach(|| polling.wait(&self.events, backend.vrings(), &due, None, &mut events))?;
            if self.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            for event in events.drain(..) {
                if let Event::Ready { token: Token::Queue(queue), .. } = event {
                    backend.kicked(queue, &self.events);
                    due.push(queue);
                }
            }
            due.extend(std::mem::take(&mut *self.handed_over()));
            due.sort_unstable();
            due.dedup();
            let mut caller = Caller::new(backend, py, polling.is_due());
            // Only a look that finds nothing asks the driver to kick.
            due.retain(|queue| {
                let waits =
                    !looked && backend.vrings().get(usize::from(*queue)).is_some_and(|vring| vring.available() == 0);
                waits || caller.work(*queue, workspaces.entry(*queue).or_default()) == Worked::More
            });
            if let Some(error) = caller.into_fatal() {
                backend.end_with(error);
            }
            if !self.events.process().is_current() {
                return Ok(());
            }
            // Guest memory was taken away under a handler, which only a session can end for.
            if std::mem::replace(&mut faults, faults_seen()) != faults {
                backend.wake();
            }
        }
    }

    fn handed_over(&self) -> MutexGuard<'_, BTreeSet<u16>> {
        self.handed_over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
