//! Messages that only some devices take.
//!
//! vhost-user specification, "Front-end message types".

use std::os::fd::{BorrowedFd, OwnedFd};

use super::{Frontend, Reply, lock};
use crate::error::Error;
use crate::protocol::{CryptoSession, Empty, FrontendMessage, ShmemConfig, U64, Uuid};

impl Frontend {
    /// Let a network device announce the guest's address.
    pub fn send_rarp(&self, mac: [u8; 6]) -> Result<(), Error> {
        let mut payload = [0; 8];
        payload[..6].copy_from_slice(&mac);
        self.tell(&FrontendMessage::SendRarp(U64(u64::from_ne_bytes(payload))), &[])
    }

    /// Tell a network device its MTU.
    pub fn set_mtu(&self, mtu: u64) -> Result<(), Error> {
        self.tell(&FrontendMessage::NetSetMtu(U64(mtu)), &[])
    }

    /// Create a session of a crypto device. Returns its number.
    pub fn create_crypto_session(&self, operation: u64, parameters: [u8; 1056]) -> Result<u64, Error> {
        let asked = Box::new(CryptoSession { operation, parameters, session: 0 });
        let message = FrontendMessage::CreateCryptoSession(asked);
        let answer: CryptoSession = self.ask(&message)?;
        u64::try_from(answer.session).map_err(|_| Error::Refused {
            message: message.request().name(),
            reason: format!("the back-end made no session: {}", answer.session),
        })
    }

    pub fn close_crypto_session(&self, session: u64) -> Result<(), Error> {
        self.tell(&FrontendMessage::CloseCryptoSession(U64(session)), &[])
    }

    /// Give a device that draws a socket to draw on.
    pub fn set_gpu_socket(&self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        self.tell(&FrontendMessage::GpuSetSocket(Empty), &[socket])
    }

    /// The file of an object that the back-end shares, if it has it.
    pub fn get_shared_object(&self, uuid: Uuid) -> Result<Option<OwnedFd>, Error> {
        let message = FrontendMessage::GetSharedObject(uuid);
        self.check_gate(&message)?;
        let Reply { payload, file } = self.exchange(&message, &[])?.unwrap_or_default();
        // The file is all of the answer. libvhost-user sends the request's payload back.
        if !payload.is_empty() && payload != uuid.0 {
            return Err(self.give_up(&message, "the answer is about another object"));
        }
        Ok(file)
    }

    /// Ask for the sizes of the device's shared memory regions, once: they do not change.
    pub(super) fn ask_for_shared_memory(&self) -> Result<(), Error> {
        let message = FrontendMessage::GetShmemConfig(Empty);
        let ShmemConfig { regions, sizes, .. } = self.ask(&message)?;
        let sizes: Vec<_> = (0..=u8::MAX).zip(sizes).filter(|(_, size)| *size > 0).collect();
        if regions as usize != sizes.len() {
            return Err(self.give_up(&message, &format!("{regions} regions announced, {} have a size", sizes.len())));
        }
        let page = rustix::param::page_size() as u64;
        if let Some((region, size)) = sizes.iter().find(|(_, size)| size % page != 0) {
            return Err(self.give_up(&message, &format!("region {region} has {size} bytes, no multiple of {page}")));
        }
        lock(&self.windows).set_regions(&sizes);
        Ok(())
    }
}
