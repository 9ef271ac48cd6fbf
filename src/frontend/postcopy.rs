//! Postcopy, from the side that has the pages: a back-end is given each one when it touches it.
//!
//! vhost-user specification, "Migration" (postcopy).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::{Frontend, Memory};
use crate::error::Error;
use crate::memory::Userfault;
use crate::protocol::{Empty, FrontendMessage, MemoryTable, ProtocolFeatures, Region, U64};

const PAGE: u64 = 4096;

/// Guest memory of a back-end that waits for each page that is missing.
#[derive(Debug)]
pub struct LatePages {
    userfault: Userfault,
    /// With the back-end's addresses in place of ours.
    regions: Vec<Region>,
}

impl Frontend {
    /// Share `memories` in a way that whoever touches a missing page of it, on the other side, waits until it is provided.
    /// Nothing may be shared before.
    pub fn share_late(&self, memories: &[Arc<Memory>]) -> Result<LatePages, Error> {
        if !self.protocol_features().contains(ProtocolFeatures::REPLY_ACK) {
            return Err(Error::State("this driver needs REPLY_ACK for postcopy, which was not negotiated".to_owned()));
        }
        if self.protocol_features().contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            return Err(Error::State("postcopy is not possible once CONFIGURE_MEM_SLOTS was negotiated".to_owned()));
        }
        let advise = FrontendMessage::PostcopyAdvise(Empty);
        let (Empty, file) = self.ask_for_file::<Empty>(&advise, &[])?;
        let file = file.ok_or_else(|| self.give_up(&advise, "no descriptor came with the reply"))?;
        self.tell(&FrontendMessage::PostcopyListen(Empty), &[])?;
        let regions = self.send_late_table(memories)?;
        Ok(LatePages { userfault: Userfault::of_peer(file), regions })
    }

    /// Let the back-end use the memory that [`share_late`](Self::share_late) has shared: it is provided from now on.
    pub fn begin_postcopy(&self) -> Result<(), Error> {
        self.tell(&FrontendMessage::SetMemTable(MemoryTable { regions: Vec::new() }), &[])
    }

    /// Every page is there, or never comes: those that are missing are zeroes from now on.
    pub fn end_postcopy(&self) -> Result<(), Error> {
        let message = FrontendMessage::PostcopyEnd(Empty);
        match self.ask::<U64>(&message)? {
            U64(0) => Ok(()),
            U64(code) => Err(Error::Refused {
                message: message.request().name(),
                reason: format!("the back-end refused it with {code:#x}"),
            }),
        }
    }
}

impl LatePages {
    /// The guest address of a page that the back-end waits for, and was not named before.
    pub fn wanted(&self) -> Result<Option<u64>, Error> {
        let Some(address) = self.userfault.next_fault()? else { return Ok(None) };
        let is_in = |region: &&Region| address.checked_sub(region.user_address).is_some_and(|at| at < region.size);
        let region = self.regions.iter().find(is_in);
        let region = region.ok_or_else(|| {
            Error::Framing(format!("the back-end waits for {address:#x}, which is in no region that it told of"))
        })?;
        Ok(Some(region.guest_address + (address - region.user_address)))
    }

    /// Provide whole pages. Returns false if the first one is there already: it stays as it is.
    pub fn provide(&self, guest_address: u64, bytes: &[u8]) -> Result<bool, Error> {
        let length = bytes.len() as u64;
        if !guest_address.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) || length == 0 {
            return Err(Error::State(format!(
                "{length} bytes for guest address {guest_address:#x}: both must be multiples of {PAGE}"
            )));
        }
        let region = self.regions.iter().find(|region| {
            guest_address
                .checked_sub(region.guest_address)
                .is_some_and(|offset| offset < region.size && length <= region.size - offset)
        });
        let region = region.ok_or_else(|| {
            Error::State(format!("{length:#x} bytes at guest address {guest_address:#x} are not in one shared region"))
        })?;
        self.userfault.copy(region.user_address.wrapping_add(guest_address - region.guest_address), bytes)
    }
}

impl AsFd for LatePages {
    /// Readable when there may be a page that is [`wanted`](Self::wanted).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.userfault.as_fd()
    }
}
