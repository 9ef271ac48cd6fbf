//! Messages that only some devices take, each behind a feature that the device offers by implementing it.
//!
//! vhost-user specification, "Front-end message types".

use std::os::fd::OwnedFd;

use super::session::{Done, Session};
use crate::error::Error;
use crate::protocol::{CryptoSession, Empty, FrontendRequest, Uuid};

/// The smallest and the largest MTU of a network device. Virtio 1.3, section 5.1.4.1.
const MTU: std::ops::RangeInclusive<u64> = 68..=65535;

/// What CREATE_CRYPTO_SESSION answers if there is no session.
const NO_SESSION: i64 = -1;

/// What a device is asked to do beyond what every device can. An error refuses the message. Called on the loop's thread,
/// with no lock held, and only if the profile says that the device implements it.
pub trait Extensions {
    /// SEND_RARP: tell the network where this address is now.
    fn send_rarp(&mut self, _mac: [u8; 6]) -> Result<(), String> {
        not_implemented()
    }

    /// NET_SET_MTU.
    fn set_mtu(&mut self, _mtu: u16) -> Result<(), String> {
        not_implemented()
    }

    /// CREATE_CRYPTO_SESSION. Returns the number by which the driver names the session, which is not negative.
    fn create_crypto_session(&mut self, _session: &CryptoSession) -> Result<i64, String> {
        not_implemented()
    }

    /// CLOSE_CRYPTO_SESSION.
    fn close_crypto_session(&mut self, _session: u64) -> Result<(), String> {
        not_implemented()
    }

    /// GPU_SET_SOCKET: what is to be shown goes there.
    fn set_gpu_socket(&mut self, _socket: OwnedFd) -> Result<(), String> {
        not_implemented()
    }

    /// GET_SHARED_OBJECT: the file of the object, if the device has it.
    fn shared_object(&mut self, _uuid: Uuid) -> Result<Option<OwnedFd>, String> {
        not_implemented()
    }
}

fn not_implemented<T>() -> Result<T, String> {
    Err("the device does not implement it".to_owned())
}

/// The address in SEND_RARP: the first bytes of its payload.
pub(super) fn mac_of(payload: u64) -> [u8; 6] {
    let bytes = payload.to_ne_bytes();
    std::array::from_fn(|at| bytes[at])
}

/// The MTU in NET_SET_MTU.
pub(super) fn mtu_of(payload: u64) -> Result<u16, String> {
    let fits = u16::try_from(payload).ok().filter(|_| MTU.contains(&payload));
    fits.ok_or_else(|| format!("an MTU is from {} to {} bytes, not {payload}", MTU.start(), MTU.end()))
}

impl Session {
    /// The session comes back with its number, or with a negative one if there is none.
    pub(super) fn create_crypto_session(
        &mut self,
        asked: CryptoSession,
        device: &mut dyn Extensions,
    ) -> Result<Done, Error> {
        let outcome = device.create_crypto_session(&asked).and_then(|session| match session {
            0.. => Ok(session),
            negative => Err(format!("the device numbered the session {negative}")),
        });
        let session = outcome.unwrap_or_else(|reason| {
            let name = FrontendRequest::CreateCryptoSession.name();
            self.complaints.warn(format_args!("refused: {name}: {reason}"));
            NO_SESSION
        });
        self.reply(FrontendRequest::CreateCryptoSession, CryptoSession { session, ..asked })
    }

    /// The file is the answer, or no file if the device does not have the object.
    pub(super) fn get_shared_object(&mut self, uuid: Uuid, device: &mut dyn Extensions) -> Result<Done, Error> {
        let file = device.shared_object(uuid).unwrap_or_else(|reason| {
            let name = FrontendRequest::GetSharedObject.name();
            self.complaints.warn(format_args!("refused: {name}: {reason}"));
            None
        });
        self.reply_with(FrontendRequest::GetSharedObject, Empty, file)
    }
}
