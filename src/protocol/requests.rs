//! The message table: one row describes a message, and everything that needs to know reads the row.

use super::features::ProtocolFeatures;
use super::payload::{
    Config, CryptoSession, DeviceState, Empty, Ignored, Inflight, Iotlb, LogBase, MemoryTable, Payload, ShmemMap,
    SingleRegion, U64, Uuid, VringAddress, VringArea, VringDescriptor, VringState,
};
use crate::error::Error;

/// How many descriptors a message carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptors {
    None,
    One,
    /// Sent by some front ends, needed by nobody: closed unread.
    AtMostOne,
    /// The payload says how many: one a region, or one unless its "no descriptor" bit is set.
    Described,
}

/// What must have been offered before a peer may send the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    Always,
    /// Bit 30 of the device features.
    ProtocolFeatures,
    Protocol(ProtocolFeatures),
    /// ACCESS_PLATFORM in the negotiated device features.
    AccessPlatform,
    /// The device type is what permits it.
    Gpu,
}

/// What the receiver sends back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A u64, and only if NEED_REPLY asks for it.
    Ack,
    /// Always this payload.
    Reply(&'static str),
    /// Always this payload, and a descriptor if there is one to give.
    ReplyAndFile(&'static str),
    /// This payload if the feature was negotiated, an acknowledgement otherwise.
    ReplyWith(ProtocolFeatures, &'static str),
}

/// Which rings a message concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rings {
    None,
    /// The one whose index is in the payload.
    One,
    All,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    pub id: u32,
    pub name: &'static str,
    pub payload: &'static str,
    pub descriptors: Descriptors,
    pub gate: Gate,
    pub answer: Answer,
    pub rings: Rings,
}

macro_rules! requests {
    (
        $(#[$meta:meta])* $request:ident, $message:ident, $sender:literal;
        $($id:literal => $variant:ident($payload:ty), $name:literal, $descriptors:expr, $gate:expr, $answer:expr, $rings:expr;)+
    ) => {
        #[doc = concat!("The requests of the ", $sender, ", by name.")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $request { $($variant = $id,)+ }

        impl $request {
            /// The table, in the order of the ids.
            pub const TABLE: &'static [Info] = &[$(Info {
                id: $id,
                name: $name,
                payload: <$payload as Payload>::NAME,
                descriptors: $descriptors,
                gate: $gate,
                answer: $answer,
                rings: $rings,
            },)+];

            /// The message with this id, or the error that ends the connection.
            pub fn from_id(id: u32) -> Result<Self, Error> {
                match id {
                    $($id => Ok(Self::$variant),)+
                    _ => Err(Error::Framing(format!(
                        concat!("unknown request {} of the ", $sender, "; the highest known is {}"),
                        id,
                        Self::TABLE[Self::TABLE.len() - 1].id
                    ))),
                }
            }

            #[must_use]
            pub fn info(self) -> &'static Info {
                let row = match self { $(Self::$variant => const { row_of(Self::TABLE, $id) },)+ };
                &Self::TABLE[row]
            }

            #[must_use]
            pub fn name(self) -> &'static str {
                self.info().name
            }
        }

        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum $message { $($variant($payload),)+ }

        impl $message {
            /// Decode the payload of `request` and check that it came with the right number of descriptors.
            pub fn decode(request: $request, payload: &[u8], descriptors: usize) -> Result<Self, Error> {
                let refuse = |reason| Error::Refused { message: request.name(), reason };
                let (message, described) = match request {
                    $($request::$variant => {
                        let payload = <$payload>::decode(payload).map_err(refuse)?;
                        let described = payload.described_descriptors();
                        (Self::$variant(payload), described)
                    })+
                };
                check_descriptors(request.info(), described, descriptors).map_err(refuse)?;
                Ok(message)
            }

            /// Append the payload's bytes; the header is the transport's.
            pub fn encode(&self, out: &mut Vec<u8>) {
                match self { $(Self::$variant(payload) => payload.encode(out),)+ }
            }

            #[must_use]
            pub fn request(&self) -> $request {
                match self { $(Self::$variant(_) => $request::$variant,)+ }
            }

            /// The queue index that the message carries, if it is about one ring.
            #[must_use]
            pub fn queue(&self) -> Option<u32> {
                match self { $(Self::$variant(payload) => payload.queue(),)+ }
            }
        }
    };
}

const fn row_of(table: &[Info], id: u32) -> usize {
    let mut row = 0;
    while table[row].id != id {
        row += 1;
    }
    row
}

fn check_descriptors(info: &Info, described: usize, came: usize) -> Result<(), String> {
    let expected = match info.descriptors {
        Descriptors::None => 0,
        Descriptors::One => 1,
        Descriptors::AtMostOne => came.min(1),
        Descriptors::Described => described,
    };
    if came == expected { Ok(()) } else { Err(format!("expected {expected} descriptors, got {came}")) }
}

use Answer::{Ack, Reply, ReplyAndFile, ReplyWith};
use Gate::{AccessPlatform, Always, Gpu, Protocol};

type P = ProtocolFeatures;
type D = Descriptors;
type R = Rings;

requests! {
    /// A message from the front-end, decoded.
    FrontendRequest, FrontendMessage, "front-end";
    // id  variant(payload), name, descriptors, offered with, answer, rings
    1  => GetFeatures(Empty), "GET_FEATURES", D::None, Always, Reply("U64"), R::None;
    2  => SetFeatures(U64), "SET_FEATURES", D::None, Always, Ack, R::All;
    3  => SetOwner(Empty), "SET_OWNER", D::None, Always, Ack, R::None;
    4  => ResetOwner(Empty), "RESET_OWNER", D::None, Always, Ack, R::All;
    5  => SetMemTable(MemoryTable), "SET_MEM_TABLE", D::Described, Always, Ack, R::All;
    6  => SetLogBase(LogBase), "SET_LOG_BASE", D::Described, Always, ReplyWith(P::LOG_SHMFD, "Log"), R::All;
    7  => SetLogFd(Ignored), "SET_LOG_FD", D::One, Always, Ack, R::All;
    8  => SetVringNum(VringState), "SET_VRING_NUM", D::None, Always, Ack, R::One;
    9  => SetVringAddr(VringAddress), "SET_VRING_ADDR", D::None, Always, Ack, R::One;
    10 => SetVringBase(VringState), "SET_VRING_BASE", D::None, Always, Ack, R::One;
    11 => GetVringBase(VringState), "GET_VRING_BASE", D::None, Always, Reply("VringState"), R::One;
    12 => SetVringKick(VringDescriptor), "SET_VRING_KICK", D::Described, Always, Ack, R::One;
    13 => SetVringCall(VringDescriptor), "SET_VRING_CALL", D::Described, Always, Ack, R::One;
    14 => SetVringErr(VringDescriptor), "SET_VRING_ERR", D::Described, Always, Ack, R::One;
    15 => GetProtocolFeatures(Empty), "GET_PROTOCOL_FEATURES", D::None, Gate::ProtocolFeatures, Reply("U64"), R::None;
    16 => SetProtocolFeatures(U64), "SET_PROTOCOL_FEATURES", D::None, Gate::ProtocolFeatures, Ack, R::None;
    17 => GetQueueNum(Empty), "GET_QUEUE_NUM", D::None, Protocol(P::MQ), Reply("U64"), R::None;
    18 => SetVringEnable(VringState), "SET_VRING_ENABLE", D::None, Gate::ProtocolFeatures, Ack, R::One;
    19 => SendRarp(U64), "SEND_RARP", D::None, Protocol(P::RARP), Ack, R::None;
    20 => NetSetMtu(U64), "NET_SET_MTU", D::None, Protocol(P::NET_MTU), Ack, R::None;
    21 => SetBackendReqFd(Empty), "SET_BACKEND_REQ_FD", D::One, Protocol(P::BACKEND_REQ), Ack, R::None;
    22 => IotlbMsg(Iotlb), "IOTLB_MSG", D::None, AccessPlatform, Reply("U64"), R::All;
    23 => SetVringEndian(VringState), "SET_VRING_ENDIAN", D::None, Protocol(P::CROSS_ENDIAN), Ack, R::One;
    24 => GetConfig(Config), "GET_CONFIG", D::None, Protocol(P::CONFIG), Reply("Config"), R::None;
    25 => SetConfig(Config), "SET_CONFIG", D::None, Protocol(P::CONFIG), Ack, R::None;
    26 => CreateCryptoSession(Box<CryptoSession>), "CREATE_CRYPTO_SESSION", D::None, Protocol(P::CRYPTO_SESSION), Reply("CryptoSession"), R::None;
    27 => CloseCryptoSession(U64), "CLOSE_CRYPTO_SESSION", D::None, Protocol(P::CRYPTO_SESSION), Ack, R::None;
    28 => PostcopyAdvise(Empty), "POSTCOPY_ADVISE", D::None, Protocol(P::PAGEFAULT), ReplyAndFile("Empty"), R::None;
    29 => PostcopyListen(Empty), "POSTCOPY_LISTEN", D::None, Protocol(P::PAGEFAULT), Ack, R::None;
    30 => PostcopyEnd(Empty), "POSTCOPY_END", D::None, Protocol(P::PAGEFAULT), Reply("U64"), R::None;
    31 => GetInflightFd(Inflight), "GET_INFLIGHT_FD", D::None, Protocol(P::INFLIGHT_SHMFD), ReplyAndFile("Inflight"), R::None;
    32 => SetInflightFd(Inflight), "SET_INFLIGHT_FD", D::One, Protocol(P::INFLIGHT_SHMFD), Ack, R::All;
    33 => GpuSetSocket(Empty), "GPU_SET_SOCKET", D::One, Gpu, Ack, R::None;
    34 => ResetDevice(Empty), "RESET_DEVICE", D::None, Protocol(P::RESET_DEVICE), Ack, R::All;
    35 => VringKick(VringState), "VRING_KICK", D::None, Protocol(P::INBAND_NOTIFICATIONS), Ack, R::One;
    36 => GetMaxMemSlots(Empty), "GET_MAX_MEM_SLOTS", D::None, Protocol(P::CONFIGURE_MEM_SLOTS), Reply("U64"), R::None;
    37 => AddMemReg(SingleRegion), "ADD_MEM_REG", D::One, Protocol(P::CONFIGURE_MEM_SLOTS), Ack, R::All;
    38 => RemMemReg(SingleRegion), "REM_MEM_REG", D::AtMostOne, Protocol(P::CONFIGURE_MEM_SLOTS), Ack, R::All;
    39 => SetStatus(U64), "SET_STATUS", D::None, Protocol(P::STATUS), Ack, R::None;
    40 => GetStatus(Empty), "GET_STATUS", D::None, Protocol(P::STATUS), Reply("U64"), R::None;
    41 => GetSharedObject(Uuid), "GET_SHARED_OBJECT", D::None, Protocol(P::SHARED_OBJECT), ReplyAndFile("Empty"), R::None;
    42 => SetDeviceStateFd(DeviceState), "SET_DEVICE_STATE_FD", D::One, Protocol(P::DEVICE_STATE), ReplyAndFile("U64"), R::None;
    43 => CheckDeviceState(Empty), "CHECK_DEVICE_STATE", D::None, Protocol(P::DEVICE_STATE), Reply("U64"), R::None;
    44 => GetShmemConfig(Empty), "GET_SHMEM_CONFIG", D::None, Protocol(P::SHMEM), Reply("ShmemConfig"), R::None;
    45 => GetVringBaseSkipDrain(VringState), "GET_VRING_BASE_SKIP_DRAIN", D::None, Protocol(P::GET_VRING_BASE_SKIP_DRAIN), Reply("VringState"), R::One;
}

requests! {
    /// A message from the back-end, decoded.
    BackendRequest, BackendMessage, "back-end";
    1  => IotlbMsg(Iotlb), "BACKEND_IOTLB_MSG", D::None, AccessPlatform, Ack, R::None;
    2  => ConfigChangeMsg(Empty), "BACKEND_CONFIG_CHANGE_MSG", D::None, Protocol(P::CONFIG), Ack, R::None;
    3  => VringHostNotifierMsg(VringArea), "BACKEND_VRING_HOST_NOTIFIER_MSG", D::Described, Protocol(P::HOST_NOTIFIER), Ack, R::One;
    4  => VringCall(VringState), "BACKEND_VRING_CALL", D::None, Protocol(P::INBAND_NOTIFICATIONS), Ack, R::One;
    5  => VringErr(VringState), "BACKEND_VRING_ERR", D::None, Protocol(P::INBAND_NOTIFICATIONS), Ack, R::One;
    6  => SharedObjectAdd(Uuid), "BACKEND_SHARED_OBJECT_ADD", D::None, Protocol(P::SHARED_OBJECT), Ack, R::None;
    7  => SharedObjectRemove(Uuid), "BACKEND_SHARED_OBJECT_REMOVE", D::None, Protocol(P::SHARED_OBJECT), Ack, R::None;
    8  => SharedObjectLookup(Uuid), "BACKEND_SHARED_OBJECT_LOOKUP", D::None, Protocol(P::SHARED_OBJECT), ReplyAndFile("U64"), R::None;
    9  => ShmemMap(ShmemMap), "BACKEND_SHMEM_MAP", D::One, Protocol(P::SHMEM), Ack, R::None;
    10 => ShmemUnmap(ShmemMap), "BACKEND_SHMEM_UNMAP", D::None, Protocol(P::SHMEM), Ack, R::None;
}
