//! Requests of the back-end, on the socket that SET_BACKEND_REQ_FD brought.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::error::Error;
use crate::protocol::{BackendMessage, Empty, Flags};
use crate::transport::Connection;

/// Sends to the front-end from any thread. It never asks for an acknowledgement, so it never waits: the front-end may
/// itself be waiting for us on the main channel.
#[derive(Debug, Default)]
pub struct Channel {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    connection: Option<Connection>,
    /// All rings are stopped: nothing may be sent.
    suspended: bool,
    /// The configuration changed while it could not be said.
    config_changed: bool,
}

impl Channel {
    /// Use `socket` from now on; `None` when the session ends.
    pub fn connect(&self, socket: Option<OwnedFd>) -> Result<(), Error> {
        let connection = socket.map(Connection::new).transpose()?;
        let mut state = self.lock();
        *state = State { connection, suspended: true, config_changed: false };
        Ok(())
    }

    /// Tell the channel whether any ring runs. A change of the configuration that had to wait is announced now.
    pub fn set_suspended(&self, suspended: bool) {
        let mut state = self.lock();
        state.suspended = suspended;
        if !suspended && state.config_changed {
            state.announce_config();
        }
    }

    /// Announce that the configuration space changed: now, or when a ring runs again.
    pub fn config_changed(&self) {
        let mut state = self.lock();
        if state.suspended {
            state.config_changed = true;
        } else {
            state.announce_config();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn announce_config(&mut self) {
        self.config_changed = false;
        let Some(connection) = &self.connection else { return };
        let message = BackendMessage::ConfigChangeMsg(Empty);
        // A deadline in the past: if the peer has not read what is there, it will find an earlier announcement in it,
        // which says the same. A closed channel has nobody to tell.
        let _ = connection.send(message.request() as u32, Flags::REQUEST, &[], &[], Instant::now());
    }
}
