//! The device's side of a session: the message state machine, its vrings, and the event loop that drives both.
//!
//! | file | owns |
//! |---|---|
//! | `session` | one connection: what was negotiated, and what each message does |
//! | `vring` | one queue across connections: its state, requests in flight, statistics |
//! | `translation` | what a ring behind an IOMMU waits for |
//! | `lead` | when a driver sees what is done of a batch, and when it is notified |
//! | `polling` | when to look for requests, and when to sleep until a kick |
//! | `notification` | kick, call and error descriptors, whatever kind the peer sent |
//! | `guard` | writes to a peer's descriptor that do not come back |
//! | `channel` | requests of the back-end, made from any thread, and their answers |
//! | `config` | the bytes of the configuration space |
//! | `device_state` | the device's own state on its way to another back-end, or from one |
//! | `postcopy` | guest memory whose pages come when they are touched |
//! | `extensions` | messages that only some devices take |
//! | `complaints` | how many lines of a log a peer is worth |
//! | `event_loop` | epoll, timers, and waking the loop from elsewhere |
//!
//! Everything runs on the thread that runs the loop, except what says otherwise. Nothing here knows of Python.

mod channel;
mod complaints;
mod config;
mod device_state;
mod event_loop;
mod extensions;
mod guard;
mod lead;
mod notification;
mod polling;
mod postcopy;
mod session;
mod translation;
mod vring;

pub use channel::{Channel, Granted, Notification, Then};
pub use complaints::Complaints;
pub use config::ConfigSpace;
pub use device_state::Direction;
pub use event_loop::{Event, EventLoop, Interest, Token, Wakeup};
pub use extensions::Extensions;
pub use lead::{Lead, Show, TOGETHER, Turnaround};
pub use polling::Polling;
pub use session::{Flow, Hooks, Profile, Session};
pub use vring::{Filled, Run, Statistics, Taken, Vring, VringStatus};

#[cfg(test)]
mod tests;
