//! The device's own state, on its way to another back-end or from one, while every ring is stopped.
//!
//! vhost-user specification, "Migrating back-end state".

use std::os::fd::OwnedFd;
use std::time::Instant;

use super::session::{DRAIN_REMINDER, Done, Hooks, Session, Then, Waiting};
use crate::error::Error;
use crate::protocol::{DeviceState, FrontendRequest, U64};

/// In the answer to SET_DEVICE_STATE_FD: the back-end has no descriptor of its own for it.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// Which way the state goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Save,
    Load,
}

/// How far it is.
#[derive(Debug, Default)]
pub(super) enum Transfer {
    #[default]
    None,
    /// Somebody else moves it, and wakes the loop at the end.
    UnderWay,
    Done(Result<(), String>),
}

impl Session {
    /// SET_DEVICE_STATE_FD.
    pub(super) fn begin_transfer(
        &mut self,
        state: DeviceState,
        file: OwnedFd,
        hooks: &mut dyn Hooks,
    ) -> Result<Done, Error> {
        let begun = self.direction_of(state).and_then(|direction| hooks.begin_transfer(direction, file));
        match begun {
            Ok(()) => {
                self.transfer = Transfer::UnderWay;
                self.reply(FrontendRequest::SetDeviceStateFd, U64(NO_DESCRIPTOR))
            }
            Err(reason) => {
                let name = FrontendRequest::SetDeviceStateFd.name();
                self.complaints.warn(format_args!("refused: {name}: {reason}"));
                self.refuse_transfer()
            }
        }
    }

    /// The answer to a SET_DEVICE_STATE_FD of which nothing comes.
    pub(super) fn refuse_transfer(&mut self) -> Result<Done, Error> {
        self.reply(FrontendRequest::SetDeviceStateFd, U64(NO_DESCRIPTOR | 1))
    }

    fn direction_of(&self, state: DeviceState) -> Result<Direction, String> {
        if matches!(self.transfer, Transfer::UnderWay) {
            return Err("the last transfer is still under way".to_owned());
        }
        if let Some(queue) = self.started_queue() {
            return Err(format!("queue {queue} is started; stop every queue with GET_VRING_BASE first"));
        }
        match (state.direction, state.phase) {
            (0, 0) => Ok(Direction::Save),
            (1, 0) => Ok(Direction::Load),
            (0 | 1, phase) => Err(format!("phase {phase} is unknown; 0 is the only one, with every queue stopped")),
            (direction, _) => Err(format!("direction {direction} is neither 0 (save) nor 1 (load)")),
        }
    }

    /// CHECK_DEVICE_STATE: answered when the transfer is over.
    pub(super) fn check_transfer(&mut self) -> Result<Done, Error> {
        if matches!(self.transfer, Transfer::UnderWay) {
            let since = Instant::now();
            let timer = self.events.add_timer(since + DRAIN_REMINDER);
            let then = Then::ReplyTransfer;
            self.waiting = Some(Waiting { queues: Vec::new(), since, deadline: None, timer, then });
            self.watch_connection();
            return Ok(Done::Answered);
        }
        self.answer_check()
    }

    /// Answer CHECK_DEVICE_STATE.
    pub(super) fn answer_check(&mut self) -> Result<Done, Error> {
        let outcome = match std::mem::take(&mut self.transfer) {
            Transfer::Done(outcome) => outcome,
            Transfer::None | Transfer::UnderWay => Err("there was no transfer".to_owned()),
        };
        if let Err(reason) = &outcome {
            self.complaints.warn(format_args!("{}: {reason}", FrontendRequest::CheckDeviceState.name()));
        }
        self.reply(FrontendRequest::CheckDeviceState, U64(outcome.is_err().into()))
    }

    /// Take over what became of the transfer, if it is over by now.
    pub(super) fn look_at_transfer(&mut self, hooks: &mut dyn Hooks) {
        if matches!(self.transfer, Transfer::UnderWay)
            && let Some(outcome) = hooks.transferred()
        {
            self.transfer = Transfer::Done(outcome);
            // Queues that were started meanwhile.
            self.settle(hooks);
        }
    }

    /// The session ends, and nobody waits for the transfer any more.
    pub(super) fn abandon_transfer(&mut self, hooks: &mut dyn Hooks) {
        if matches!(std::mem::take(&mut self.transfer), Transfer::UnderWay) {
            hooks.abandon_transfer();
        }
    }

    /// Whether the state is being moved: no queue runs meanwhile.
    pub(super) fn is_transferring(&self) -> bool {
        matches!(self.transfer, Transfer::UnderWay)
    }
}
