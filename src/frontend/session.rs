//! One connection to a back-end: requests and their answers, and the requests that the back-end makes itself.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, read, write};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};

use super::iommu::{IO_OFFSET, Iommu, Question};
use super::windows::Windows;
use super::{DirtyLog, Memory, lock};
use crate::error::Error;
use crate::memory::{IovaRange, Permission, Snapshot};
use crate::process::Process;
use crate::protocol::{
    Answer, BackendMessage, BackendRequest, Config, DeviceState, Empty, Flags, FrontendMessage, FrontendRequest, Gate,
    Ignored, Inflight, Iotlb, LogBase, MemoryTable, Payload, ProtocolFeatures, Region, SingleRegion, U64,
    VirtioFeatures,
};
use crate::transport::{Connection, Frame, Received};

/// Bits of the device status. Virtio 1.3, section 2.1.
const ACKNOWLEDGE_DRIVER: u8 = 1 | 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// Events that nobody asked for are kept up to this number; a back-end that sends more loses its channel.
const MAX_EVENTS: usize = 1024;

/// Descriptors that anybody waits for, with the sockets of the session.
const MOST: usize = 4;

/// How often somebody who waits is asked whether to go on.
const SLICE: Duration = Duration::from_millis(50);

/// The driver's end of a session.
///
/// An answer that is late or makes no sense ends it, because what comes next could not be told apart from what should
/// have come before; a refusal does not.
#[derive(Debug)]
pub struct Frontend {
    process: Process,
    main: Mutex<Main>,
    /// The socket of `main`, to wait for without taking the lock.
    socket: OwnedFd,
    timeout: Duration,
    patience: OnceLock<Patience>,
    features: AtomicU64,
    protocol: AtomicU64,
    /// The back-end's memory, kept as long as it may use it.
    shared: Mutex<Vec<(Region, Arc<Memory>)>>,
    channel: Mutex<Option<Arc<Channel>>>,
    /// What VRING_CALL and VRING_ERR signal, by queue.
    in_band: Mutex<HashMap<u32, InBand>>,
    pub(super) windows: Mutex<Windows>,
    iommu: Iommu,
    events: Mutex<VecDeque<Event>>,
    /// Counts `events`.
    event_count: OwnedFd,
}

/// Whether a wait is to go on.
struct Patience(Box<dyn Fn() -> bool + Send + Sync>);

impl fmt::Debug for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Patience")
    }
}

#[derive(Debug)]
struct Main {
    connection: Connection,
    /// Why the session is over.
    over: Option<String>,
}

/// Eventfds that a queue waits for, whoever signals them.
#[derive(Debug)]
pub(super) struct InBand {
    pub call: OwnedFd,
    pub error: OwnedFd,
}

/// The socket on which the back-end makes requests.
#[derive(Debug)]
struct Channel {
    connection: Mutex<Connection>,
    /// The same socket, to wait for without taking the lock.
    socket: OwnedFd,
}

/// What came back for a request.
#[derive(Debug, Default)]
pub struct Reply {
    pub payload: Vec<u8>,
    /// Of a request that may be answered with a descriptor.
    pub file: Option<OwnedFd>,
}

/// Memory in which a back-end notes what it has begun: to be given to the next one if this one dies.
#[derive(Debug)]
pub struct InflightRecord {
    pub file: OwnedFd,
    pub description: Inflight,
}

/// What a back-end can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Device and transport features.
    pub features: u64,
    pub protocol: ProtocolFeatures,
    /// As the back-end counts them: network devices may count pairs.
    pub queues: Option<u64>,
}

/// What a back-end says unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The configuration space has to be read again.
    ConfigChanged,
    /// VRING_HOST_NOTIFIER_MSG, and of which queue.
    HostNotifier(String),
    /// SHARED_OBJECT_ADD or SHARED_OBJECT_REMOVE, and the object.
    SharedObject(String),
    /// SHMEM_MAP or SHMEM_UNMAP, and where.
    SharedMemory(String),
    /// A request that cannot be served, or is malformed. The back-end was told if it wanted to know.
    Refused(String),
    /// There will be no more of them.
    ChannelClosed(String),
}

impl Frontend {
    /// The protocol features that this side makes use of.
    pub const SUPPORTED: ProtocolFeatures = ProtocolFeatures(
        ProtocolFeatures::MQ.0
            | ProtocolFeatures::REPLY_ACK.0
            | ProtocolFeatures::BACKEND_REQ.0
            | ProtocolFeatures::CONFIG.0
            | ProtocolFeatures::CROSS_ENDIAN.0
            | ProtocolFeatures::RESET_DEVICE.0
            | ProtocolFeatures::CONFIGURE_MEM_SLOTS.0
            | ProtocolFeatures::STATUS.0
            | ProtocolFeatures::GPA_ADDRESSES.0
            | ProtocolFeatures::RARP.0
            | ProtocolFeatures::INBAND_NOTIFICATIONS.0
            | ProtocolFeatures::NET_MTU.0
            | ProtocolFeatures::CRYPTO_SESSION.0
            | ProtocolFeatures::INFLIGHT_SHMFD.0
            | ProtocolFeatures::GET_VRING_BASE_INFLIGHT.0
            | ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN.0
            | ProtocolFeatures::BACKEND_SEND_FD.0
            | ProtocolFeatures::HOST_NOTIFIER.0
            | ProtocolFeatures::SHARED_OBJECT.0
            | ProtocolFeatures::SHMEM.0
            | ProtocolFeatures::LOG_SHMFD.0
            | ProtocolFeatures::DEVICE_STATE.0
            | ProtocolFeatures::PAGEFAULT.0,
    );

    /// Take over a connected AF_UNIX stream socket. `timeout` is how long an answer may take.
    pub fn new(socket: OwnedFd, timeout: Duration) -> Result<Self, Error> {
        let again =
            socket.try_clone().map_err(|source| Error::Os { context: "dup of the socket".to_owned(), source })?;
        Ok(Self {
            process: Process::current(),
            main: Mutex::new(Main { connection: Connection::new(socket)?, over: None }),
            socket: again,
            timeout,
            patience: OnceLock::new(),
            features: AtomicU64::default(),
            protocol: AtomicU64::default(),
            shared: Mutex::default(),
            channel: Mutex::default(),
            in_band: Mutex::default(),
            windows: Mutex::default(),
            iommu: Iommu::default(),
            events: Mutex::default(),
            event_count: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE)
                .map_err(Error::os("making an eventfd"))?,
        })
    }

    /// Ask `goes_on` from time to time, on every thread that waits for the back-end, whether it is to wait on.
    pub fn set_patience(&self, goes_on: impl Fn() -> bool + Send + Sync + 'static) {
        let first = self.patience.set(Patience(Box::new(goes_on)));
        debug_assert!(first.is_ok(), "it is set once");
    }

    /// End the session. Whoever waits for the back-end is told.
    pub fn close(&self) {
        // A socket that is not connected any more is closed enough.
        // The child of a fork has another descriptor of the same socket, which its parent goes on with.
        if self.is_forked() {
            return;
        }
        let _ = shutdown(&self.socket, Shutdown::Both);
        lock(&self.main).over.get_or_insert_with(|| "it was closed on this side".to_owned());
    }

    /// Whether this is a child that was forked from the process that drives the device.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        !self.process.is_current()
    }

    fn check_process(&self) -> Result<(), Error> {
        if self.is_forked() { Err(Error::AnotherProcess("the connection to the device")) } else { Ok(()) }
    }

    /// The socket to the back-end, for those who send what no message is.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Everything up to where the features of the device are chosen. Of the protocol features that are offered, those
    /// in `protocol` are taken.
    pub fn handshake(&self, protocol: ProtocolFeatures) -> Result<Offer, Error> {
        self.tell(&FrontendMessage::SetOwner(Empty), &[])?;
        let mut offer = Offer { features: self.get_features()?, ..Offer::default() };
        if VirtioFeatures(offer.features).contains(VirtioFeatures::PROTOCOL_FEATURES) {
            offer.protocol = ProtocolFeatures(self.ask::<U64>(&FrontendMessage::GetProtocolFeatures(Empty))?.0);
            self.set_protocol_features(ProtocolFeatures(offer.protocol.0 & protocol.0 & Self::SUPPORTED.0))?;
        }
        let negotiated = self.protocol_features();
        if negotiated.contains(ProtocolFeatures::MQ) {
            offer.queues = Some(self.ask::<U64>(&FrontendMessage::GetQueueNum(Empty))?.0);
        }
        if negotiated.contains(ProtocolFeatures::SHMEM) {
            self.ask_for_shared_memory()?;
        }
        if negotiated.contains(ProtocolFeatures::BACKEND_REQ) {
            self.open_channel()?;
        }
        Ok(offer)
    }

    pub fn get_features(&self) -> Result<u64, Error> {
        Ok(self.ask::<U64>(&FrontendMessage::GetFeatures(Empty))?.0)
    }

    /// Choose the device's features, and bit 30 where rings are to be enabled one by one. With STATUS the device has to
    /// agree.
    pub fn set_features(&self, features: u64) -> Result<(), Error> {
        self.tell(&FrontendMessage::SetFeatures(U64(features)), &[])?;
        self.features.store(features, Ordering::Relaxed);
        if self.protocol_features().contains(ProtocolFeatures::STATUS) {
            self.set_status(ACKNOWLEDGE_DRIVER | FEATURES_OK)?;
            let status = self.status()?;
            if status & FEATURES_OK == 0 {
                return Err(Error::Refused {
                    message: "SET_FEATURES",
                    reason: format!("the device does not accept {features:#x}: its status is {status:#x}"),
                });
            }
        }
        Ok(())
    }

    /// What was chosen by [`set_features`](Self::set_features).
    #[must_use]
    pub fn features(&self) -> VirtioFeatures {
        VirtioFeatures(self.features.load(Ordering::Relaxed))
    }

    pub fn set_protocol_features(&self, features: ProtocolFeatures) -> Result<(), Error> {
        self.tell(&FrontendMessage::SetProtocolFeatures(U64(features.0)), &[])?;
        self.protocol.store(features.0, Ordering::Relaxed);
        Ok(())
    }

    #[must_use]
    pub fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures(self.protocol.load(Ordering::Relaxed))
    }

    /// Tell the device that the driver is ready, if the back-end wants to know.
    pub fn set_driver_ok(&self) -> Result<(), Error> {
        if !self.protocol_features().contains(ProtocolFeatures::STATUS) {
            return Ok(());
        }
        self.set_status(ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK)
    }

    pub fn set_status(&self, status: u8) -> Result<(), Error> {
        self.tell(&FrontendMessage::SetStatus(U64(status.into())), &[])
    }

    pub fn status(&self) -> Result<u8, Error> {
        Ok(self.ask::<U64>(&FrontendMessage::GetStatus(Empty))?.0 as u8)
    }

    /// Bring the device back to its initial state. Its queues have to be started again.
    pub fn reset(&self) -> Result<(), Error> {
        if self.protocol_features().contains(ProtocolFeatures::RESET_DEVICE) {
            self.tell(&FrontendMessage::ResetDevice(Empty), &[])?;
        } else if self.protocol_features().contains(ProtocolFeatures::STATUS) {
            self.set_status(0)?;
        } else {
            return Err(Error::State("a reset needs RESET_DEVICE or STATUS, and neither was negotiated".to_owned()));
        }
        lock(&self.windows).unmap_all();
        Ok(())
    }

    /// Read `size` bytes of the configuration space.
    pub fn get_config(&self, offset: u32, size: usize) -> Result<Vec<u8>, Error> {
        let message = FrontendMessage::GetConfig(Config { offset, flags: 0, bytes: check_config_size(vec![0; size])? });
        self.check_gate(&message)?;
        let payload = self.exchange(&message, &[])?.unwrap_or_default().payload;
        let refused = |reason: &str| Error::Refused { message: message.request().name(), reason: reason.to_owned() };
        if payload.is_empty() {
            return Err(refused("the back-end answered with an error"));
        }
        let config = Config::decode(&payload).map_err(|reason| self.give_up(&message, &reason))?;
        if config.bytes.is_empty() && size != 0 {
            return Err(refused("the back-end answered with no bytes"));
        }
        if (config.offset, config.bytes.len()) != (offset, size) {
            let (came, at) = (config.bytes.len(), config.offset);
            return Err(self.give_up(&message, &format!("asked for {size} bytes at {offset}, got {came} at {at}")));
        }
        Ok(config.bytes)
    }

    /// Write to the configuration space.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        let bytes = check_config_size(bytes.to_vec())?;
        self.tell(&FrontendMessage::SetConfig(Config { offset, flags: 0, bytes }), &[])
    }

    /// Have the back-end make a record of what is in flight, for `queues` queues of `queue_size` entries. It is not in use
    /// before [`set_inflight`](Self::set_inflight).
    pub fn get_inflight(&self, queues: u16, queue_size: u16) -> Result<InflightRecord, Error> {
        let message = FrontendMessage::GetInflightFd(Inflight { queues, queue_size, ..Inflight::default() });
        self.check_gate(&message)?;
        let Reply { payload, file } = self.exchange(&message, &[])?.unwrap_or_default();
        let wrong = |reason: &str| self.give_up(&message, &format!("the reply makes no sense: {reason}"));
        let description = Inflight::decode(&payload).map_err(|reason| wrong(&reason))?;
        if (description.queues, description.queue_size) != (queues, queue_size) || description.size == 0 {
            let Inflight { queues: came, queue_size: of, size, .. } = description;
            return Err(wrong(&format!(
                "asked for {queues} queues of {queue_size} entries, got {size} bytes for {came} queues of {of}"
            )));
        }
        match file {
            Some(file) => Ok(InflightRecord { file, description }),
            None => Err(wrong("no descriptor came with it")),
        }
    }

    /// Have the back-end use this record for the rings that are started from now on, and begin with what it finds there.
    pub fn set_inflight(&self, record: &InflightRecord) -> Result<(), Error> {
        self.tell(&FrontendMessage::SetInflightFd(record.description), &[record.file.as_fd()])
    }

    /// Share `memories`, and nothing else any more. With CONFIGURE_MEM_SLOTS, those that are shared already are left
    /// alone, and queues in them never notice.
    pub fn share(&self, memories: &[Arc<Memory>]) -> Result<(), Error> {
        let mut shared = lock(&self.shared);
        let wanted: Vec<(Region, &Arc<Memory>, BorrowedFd<'_>)> = memories
            .iter()
            .flat_map(|memory| memory.regions().map(move |(region, file)| (self.describe(region), memory, file)))
            .collect();
        if self.is_behind_iommu() {
            wanted.iter().for_each(|(region, ..)| self.iommu.map_region(*region));
        }
        let slots = self.protocol_features().contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        let most = if slots {
            self.ask::<U64>(&FrontendMessage::GetMaxMemSlots(Empty))?.0
        } else {
            MemoryTable::MAX_REGIONS as u64
        };
        if wanted.len() as u64 > most {
            return Err(Error::State(format!("{} regions to share; the back-end takes {most}", wanted.len())));
        }
        if !slots {
            let (regions, files): (Vec<_>, Vec<_>) = wanted.iter().map(|(region, _, file)| (*region, *file)).unzip();
            self.tell(&FrontendMessage::SetMemTable(MemoryTable { regions }), &files)?;
            *shared = wanted.into_iter().map(|(region, memory, _)| (region, Arc::clone(memory))).collect();
            return Ok(());
        }
        let is_same = |(region, memory): &(Region, Arc<Memory>), other: &(Region, &Arc<Memory>, BorrowedFd<'_>)| {
            *region == other.0 && Arc::ptr_eq(memory, other.1)
        };
        while let Some(at) = shared.iter().position(|old| !wanted.iter().any(|new| is_same(old, new))) {
            self.tell(&FrontendMessage::RemMemReg(SingleRegion { padding: 0, region: shared[at].0 }), &[])?;
            shared.remove(at);
        }
        for new in wanted {
            if !shared.iter().any(|old| is_same(old, &new)) {
                self.tell(&FrontendMessage::AddMemReg(SingleRegion { padding: 0, region: new.0 }), &[new.2])?;
                shared.push((new.0, Arc::clone(new.1)));
            }
        }
        Ok(())
    }

    /// Send the table of `memories` whose pages come later. Returns it with the back-end's addresses.
    pub(super) fn send_late_table(&self, memories: &[Arc<Memory>]) -> Result<Vec<Region>, Error> {
        let mut shared = lock(&self.shared);
        if !shared.is_empty() {
            return Err(Error::State("memory is shared already; postcopy has to begin before".to_owned()));
        }
        let wanted: Vec<(Region, &Arc<Memory>, BorrowedFd<'_>)> = memories
            .iter()
            .flat_map(|memory| memory.regions().map(move |(region, file)| (self.describe(region), memory, file)))
            .collect();
        if wanted.is_empty() || wanted.len() > MemoryTable::MAX_REGIONS {
            let (came, most) = (wanted.len(), MemoryTable::MAX_REGIONS);
            return Err(Error::State(format!("{came} regions to share; for postcopy there have to be 1 to {most}")));
        }
        if self.is_behind_iommu() {
            wanted.iter().for_each(|(region, ..)| self.iommu.map_region(*region));
        }
        let (regions, files): (Vec<_>, Vec<_>) = wanted.iter().map(|(region, _, file)| (*region, *file)).unzip();
        let message = FrontendMessage::SetMemTable(MemoryTable { regions: regions.clone() });
        let Reply { payload, .. } = self.exchange(&message, &files)?.unwrap_or_default();
        let told = MemoryTable::decode(&payload)
            .map_err(|reason| self.give_up(&message, &format!("the reply makes no sense: {reason}")))?;
        let keys = |regions: &[Region]| regions.iter().map(|it| (it.guest_address, it.size)).collect::<Vec<_>>();
        if keys(&told.regions) != keys(&regions) {
            return Err(self.give_up(&message, "the reply is of other regions than the request"));
        }
        *shared = wanted.into_iter().map(|(region, memory, _)| (region, Arc::clone(memory))).collect();
        Ok(told.regions)
    }

    // --- Kinds of addresses -----------------------------------------------------------------------------------------

    /// Whether the device gets I/O addresses.
    pub(super) fn is_behind_iommu(&self) -> bool {
        self.features().contains(VirtioFeatures::ACCESS_PLATFORM)
    }

    /// What an address that the device gets in a ring has more than the guest address of the same byte.
    pub(super) fn device_offset(&self) -> u64 {
        if self.is_behind_iommu() { IO_OFFSET } else { 0 }
    }

    /// Guest memory by the addresses that the device gets.
    pub(super) fn view(&self, memory: &Memory) -> Arc<Snapshot> {
        if self.is_behind_iommu() {
            Arc::new(memory.snapshot().behind(Some(Arc::clone(self.iommu.table()))))
        } else {
            Arc::clone(memory.snapshot())
        }
    }

    /// Where a ring at a guest address is, in this process: by I/O addresses, or by user addresses.
    pub(super) fn ring_address(&self, guest_address: u64) -> u64 {
        if self.is_behind_iommu() { guest_address + IO_OFFSET } else { Memory::user_address(guest_address) }
    }

    /// What SET_VRING_ADDR says of an address that [`ring_address`](Self::ring_address) returned.
    pub(super) fn told_ring_address(&self, address: u64) -> u64 {
        if self.has_guest_addresses() && !self.is_behind_iommu() { address - Memory::user_address(0) } else { address }
    }

    /// A region as the back-end is told of it.
    fn describe(&self, region: Region) -> Region {
        let user_address = if self.has_guest_addresses() { region.guest_address } else { region.user_address };
        Region { user_address, ..region }
    }

    fn has_guest_addresses(&self) -> bool {
        self.protocol_features().contains(ProtocolFeatures::GPA_ADDRESSES)
    }

    // --- The IOMMU --------------------------------------------------------------------------------------------------

    /// Map I/O addresses to guest memory, instead of whatever was there: the device is told when it asks. What it was told
    /// before has to be taken back by [`unmap`](Self::unmap).
    pub fn map(&self, iova: u64, guest_address: u64, size: u64, permission: Permission) -> Result<(), Error> {
        self.check_iommu()?;
        let range = io_range(iova, size)?;
        let user_address = if self.has_guest_addresses() { guest_address } else { Memory::user_address(guest_address) };
        if user_address.checked_add(size).is_none() {
            return Err(Error::State(format!("{size:#x} bytes at guest address {guest_address:#x} wrap around")));
        }
        self.iommu.table().update(range, user_address, permission);
        Ok(())
    }

    /// Take I/O addresses back, and wait until the device does not use them any more.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.check_iommu()?;
        self.iommu.table().invalidate(io_range(iova, size)?);
        self.invalidate(iova, size)
    }

    /// Make the device forget what it was told of I/O addresses, which stay mapped.
    pub fn invalidate(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.check_iommu()?;
        io_range(iova, size)?;
        self.tell_iotlb(Iotlb { iova, size, kind: Iotlb::INVALIDATE, ..Iotlb::default() })
    }

    /// How often the device has asked where an I/O address is.
    #[must_use]
    pub fn iotlb_misses(&self) -> u64 {
        self.iommu.asked()
    }

    fn check_iommu(&self) -> Result<(), Error> {
        if self.is_behind_iommu() {
            return Ok(());
        }
        Err(Error::State("there is no IOMMU: ACCESS_PLATFORM was not negotiated".to_owned()))
    }

    fn tell_iotlb(&self, message: Iotlb) -> Result<(), Error> {
        let message = FrontendMessage::IotlbMsg(message);
        match self.ask::<U64>(&message)? {
            U64(0) => Ok(()),
            U64(code) => Err(Error::Refused {
                message: message.request().name(),
                reason: format!("the back-end refused it with {code:#x}"),
            }),
        }
    }

    /// Keep a miss for [`answer_questions`](Self::answer_questions). False if the frame is something else.
    fn keep_question(&self, frame: &Frame) -> bool {
        let is_miss = frame.header.request == BackendRequest::IotlbMsg as u32 && self.is_behind_iommu();
        let message = match Iotlb::decode(&frame.payload) {
            Ok(message) if is_miss && message.kind == Iotlb::MISS && frame.defect.is_none() => message,
            _ => return false,
        };
        self.iommu.ask(Question { iova: message.iova, need_reply: frame.header.flags.need_reply() })
    }

    /// Tell the device what it has asked for. While somebody waits for an answer on the main channel this is put off until
    /// that has come: then that thread does it.
    fn answer_questions(&self) {
        while self.iommu.has_questions() {
            let mut main = match self.main.try_lock() {
                Ok(main) => main,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            while let Some(question) = self.iommu.next_question() {
                self.answer_question(&mut main, question);
            }
        }
    }

    fn answer_question(&self, main: &mut Main, question: Question) {
        let told = self.iommu.answer(question.iova).is_some_and(|update| {
            let mut payload = Vec::new();
            update.encode(&mut payload);
            let answer = self.exchange_alone(main, FrontendRequest::IotlbMsg, &payload, &[]);
            matches!(answer, Ok(Some(answer)) if answer.payload == 0u64.to_ne_bytes())
        });
        let channel = lock(&self.channel).clone();
        if let Some(channel) = channel.filter(|_| question.need_reply) {
            let code = u64::from(!told).to_ne_bytes();
            let connection = lock(&channel.connection);
            let deadline = Instant::now() + self.timeout;
            // A channel that does not take it is found to be broken when it is read.
            let _ = connection.send(BackendRequest::IotlbMsg as u32, Flags::ANSWER, &code, &[], deadline);
        }
    }

    // --- Events -----------------------------------------------------------------------------------------------------

    /// Let the back-end mark pages in `log` from now on, and in no other: when this returns, the log of before is final.
    pub fn set_log(&self, log: &DirtyLog) -> Result<(), Error> {
        if !self.protocol_features().contains(ProtocolFeatures::LOG_SHMFD) {
            return Err(Error::State("a dirty log needs LOG_SHMFD, which was not negotiated".to_owned()));
        }
        let (description, file) = log.description();
        // What is in the answer, back-ends disagree on.
        self.exchange(&FrontendMessage::SetLogBase(LogBase::Shared(description)), &[file]).map(drop)
    }

    /// Let the back-end write to an eventfd after it has marked something.
    pub fn set_log_descriptor(&self, event: BorrowedFd<'_>) -> Result<(), Error> {
        self.tell(&FrontendMessage::SetLogFd(Ignored), &[event])
    }

    /// LOG_ALL: whether pages are marked that requests are answered in. It may change while queues run.
    pub fn log_buffers(&self, on: bool) -> Result<(), Error> {
        let features = self.features().without(VirtioFeatures::LOG_ALL);
        let features = if on { features | VirtioFeatures::LOG_ALL } else { features };
        self.tell(&FrontendMessage::SetFeatures(U64(features.0)), &[])?;
        self.features.store(features.0, Ordering::Relaxed);
        Ok(())
    }

    /// Let the back-end write the device's state to `file`, or read it from there, while every queue is stopped. Returns
    /// the descriptor that the back-end wants to use instead, if it has one.
    pub fn transfer_state(&self, save: bool, file: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Error> {
        let state = DeviceState { direction: u32::from(!save), phase: 0 };
        let message = FrontendMessage::SetDeviceStateFd(state);
        let (U64(answer), own) = self.ask_for_file::<U64>(&message, &[file])?;
        let (error, no_descriptor) = (answer & 0xff, answer & 0x100 != 0);
        if error != 0 {
            let reason = format!("the back-end refused it with {error:#x}");
            return Err(Error::Refused { message: message.request().name(), reason });
        }
        if own.is_some() == no_descriptor {
            return Err(self.give_up(&message, &format!("the answer {answer:#x} contradicts its descriptors")));
        }
        Ok(own)
    }

    /// Wait until the back-end is done with the device's state.
    pub fn check_state(&self) -> Result<(), Error> {
        let message = FrontendMessage::CheckDeviceState(Empty);
        match self.ask::<U64>(&message)? {
            U64(0) => Ok(()),
            U64(code) => Err(Error::Refused {
                message: message.request().name(),
                reason: format!("the back-end failed with {code:#x}"),
            }),
        }
    }

    /// The next event, waiting for it until `deadline`. None if there was none.
    pub fn next_event(&self, deadline: Instant) -> Result<Option<Event>, Error> {
        loop {
            self.check_process()?;
            if read(&self.event_count, &mut [0; 8]).is_ok() {
                return Ok(lock(&self.events).pop_front());
            }
            match self.wait([self.event_count.as_fd()], deadline) {
                Ok(_) => {}
                Err(Error::Timeout(_)) => return Ok(None),
                Err(other) => return Err(other),
            }
        }
    }

    /// Send any message at any time, and return what comes back, if something has to.
    ///
    /// This is for those who want to see what a back-end makes of it; the other methods keep to the protocol.
    pub fn exchange(&self, message: &FrontendMessage, descriptors: &[BorrowedFd<'_>]) -> Result<Option<Reply>, Error> {
        let mut payload = Vec::new();
        message.encode(&mut payload);
        self.exchange_payload(message.request(), &payload, descriptors)
    }

    /// The same with a payload that need not make sense.
    pub fn exchange_payload(
        &self,
        request: FrontendRequest,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Option<Reply>, Error> {
        self.check_process()?;
        let outcome = self.exchange_alone(&mut lock(&self.main), request, payload, descriptors);
        self.answer_questions();
        outcome
    }

    fn exchange_alone(
        &self,
        main: &mut Main,
        request: FrontendRequest,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Option<Reply>, Error> {
        let name = request.name();
        if let Some(reason) = &main.over {
            return Err(Error::State(format!("{name}: the session is over ({reason})")));
        }
        self.talk(&mut main.connection, request, payload, descriptors).map_err(|error| {
            let error = match error {
                Error::Framing(text) => Error::Framing(format!("{name}: {text}")),
                Error::Timeout(text) => Error::Timeout(format!("{name}: {text}")),
                Error::Closed(text) => Error::Closed(format!("{name}: {text}")),
                other => other,
            };
            main.over = Some(error.to_string());
            error
        })
    }

    fn talk(
        &self,
        connection: &mut Connection,
        request: FrontendRequest,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Option<Reply>, Error> {
        let deadline = Instant::now() + self.timeout;
        let acknowledged = self.protocol_features().contains(ProtocolFeatures::REPLY_ACK);
        let (flags, answered) = match request.info().answer {
            Answer::Ack if acknowledged => (Flags::REQUEST_NEED_REPLY, true),
            Answer::ReplyWith(feature, _) if !self.protocol_features().contains(feature) => (Flags::REQUEST, false),
            Answer::Ack => (Flags::REQUEST, false),
            // Back-ends of rust-vmm answer it only if they are asked to.
            Answer::Reply(_) if acknowledged && request == FrontendRequest::PostcopyEnd => {
                (Flags::REQUEST_NEED_REPLY, true)
            }
            Answer::Reply(_) | Answer::ReplyAndFile(_) | Answer::ReplyWith(..) => (Flags::REQUEST, true),
        };
        connection.send(request as u32, flags, payload, descriptors, deadline)?;
        if !answered {
            return Ok(None);
        }
        let mut frame = loop {
            match connection.try_receive()? {
                Received::Frame(frame) => break frame,
                Received::Closed => return Err(Error::Closed("the back-end closed the connection".to_owned())),
                Received::Incomplete => self.wait([self.socket.as_fd()], deadline)?,
            };
        };
        frame.header.check_reply(request as u32, "reply")?;
        if let Some(defect) = frame.defect {
            return Err(Error::Framing(format!("the reply is broken: {defect}")));
        }
        let most = usize::from(matches!(request.info().answer, Answer::ReplyAndFile(_)));
        if frame.descriptors.len() > most {
            let came = frame.descriptors.len();
            let expected = if most == 0 { "none" } else { "at most one" };
            return Err(Error::Framing(format!("the reply has {came} descriptors, expected {expected}")));
        }
        Ok(Some(Reply { payload: frame.payload, file: frame.descriptors.pop() }))
    }

    /// Send a request that is answered with an `R`.
    pub(super) fn ask<R: Payload>(&self, message: &FrontendMessage) -> Result<R, Error> {
        self.ask_for_file(message, &[]).map(|(reply, _)| reply)
    }

    /// Send a request that is answered with an `R`, and maybe with a descriptor.
    pub(super) fn ask_for_file<R: Payload>(
        &self,
        message: &FrontendMessage,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(R, Option<OwnedFd>), Error> {
        self.check_gate(message)?;
        let Reply { payload, file } = self.exchange(message, descriptors)?.unwrap_or_default();
        let reply = R::decode(&payload);
        let reply = reply.map_err(|reason| self.give_up(message, &format!("the reply makes no sense: {reason}")))?;
        Ok((reply, file))
    }

    /// Send a request that is at most acknowledged.
    pub(super) fn tell(&self, message: &FrontendMessage, descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.check_gate(message)?;
        let Some(Reply { payload, .. }) = self.exchange(message, descriptors)? else { return Ok(()) };
        match U64::decode(&payload) {
            Ok(U64(0)) => Ok(()),
            Ok(U64(code)) => Err(Error::Refused {
                message: message.request().name(),
                reason: format!("the back-end refused it with {code:#x}"),
            }),
            Err(reason) => Err(self.give_up(message, &format!("the acknowledgement makes no sense: {reason}"))),
        }
    }

    pub(super) fn check_gate(&self, message: &FrontendMessage) -> Result<(), Error> {
        match message.request().info().gate {
            Gate::Protocol(feature) if !self.protocol_features().contains(feature) => {
                let name = message.request().name();
                Err(Error::State(format!("{name} needs the protocol feature {feature}, which was not negotiated")))
            }
            _ => Ok(()),
        }
    }

    /// End the session over an answer to `message`.
    pub(super) fn give_up(&self, message: &FrontendMessage, reason: &str) -> Error {
        let error = Error::Framing(format!("{}: {reason}", message.request().name()));
        lock(&self.main).over = Some(error.to_string());
        error
    }

    /// Wait until one of `wanted` can be read; each of them is in the answer. The back-end's requests are served
    /// meanwhile.
    pub(super) fn wait<const N: usize>(
        &self,
        wanted: [BorrowedFd<'_>; N],
        deadline: Instant,
    ) -> Result<[bool; N], Error> {
        self.check_process()?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(Error::Timeout("the back-end did not answer in time".to_owned()));
            }
            let channel = lock(&self.channel).clone();
            let sockets = [PollFd::new(&self.socket, PollFlags::RDHUP)].into_iter();
            let sockets = sockets.chain(channel.iter().map(|channel| PollFd::new(&channel.socket, PollFlags::IN)));
            let wanted = wanted.iter().map(|descriptor| PollFd::from_borrowed_fd(*descriptor, PollFlags::IN));
            let mut ready: [_; MOST] = std::array::from_fn(|_| PollFd::new(&self.socket, PollFlags::empty()));
            const { assert!(N + 2 <= MOST) };
            let count = ready.iter_mut().zip(wanted.chain(sockets)).map(|(to, from)| *to = from).count();
            let ready = &mut ready[..count];
            let patience = self.patience.get();
            let slice = if patience.is_some() { left.min(SLICE) } else { left };
            let timeout = Timespec { tv_sec: slice.as_secs() as i64, tv_nsec: i64::from(slice.subsec_nanos()) };
            match poll(ready, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => match patience {
                    Some(Patience(goes_on)) if !goes_on() => return Err(Error::Interrupted),
                    _ => continue,
                },
                Ok(_) => {}
                Err(errno) => return Err(Error::os("waiting for the back-end")(errno)),
            }
            let is_ready = |at: usize| ready.get(at).is_some_and(|descriptor| !descriptor.revents().is_empty());
            let came = std::array::from_fn(is_ready);
            if let Some(channel) = channel.as_ref().filter(|_| is_ready(N + 1)) {
                self.serve(channel);
                self.answer_questions();
            }
            if came.contains(&true) {
                return Ok(came);
            }
            if is_ready(N) {
                return Err(Error::Closed("the back-end closed the connection".to_owned()));
            }
        }
    }

    /// Let `epoll` report as `token` what [`wait`](Self::wait) serves or ends for.
    pub(super) fn watch(&self, epoll: &OwnedFd, token: EventData) -> Result<(), Errno> {
        epoll::add(epoll, &self.socket, token, EventFlags::RDHUP)?;
        match &*lock(&self.channel) {
            Some(channel) => epoll::add(epoll, &channel.socket, token, EventFlags::IN),
            None => Ok(()),
        }
    }

    fn open_channel(&self) -> Result<(), Error> {
        let made = Error::os("making a socket pair for the back-end's requests");
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(made)?;
        self.tell(&FrontendMessage::SetBackendReqFd(Empty), &[theirs.as_fd()])?;
        let again = ours.try_clone().map_err(|source| Error::Os { context: "dup of a socket".to_owned(), source })?;
        let connection = Mutex::new(Connection::new(ours)?);
        *lock(&self.channel) = Some(Arc::new(Channel { connection, socket: again }));
        Ok(())
    }

    /// Serve what is there, at most one request: the caller has a deadline to look at.
    fn serve(&self, channel: &Arc<Channel>) {
        let mut connection = lock(&channel.connection);
        let outcome = match connection.try_receive() {
            Ok(Received::Incomplete) => return,
            Ok(Received::Frame(frame)) if self.keep_question(&frame) => return,
            Ok(Received::Frame(frame)) => self.answer(&connection, frame),
            Ok(Received::Closed) => Err(Error::Closed("the back-end closed it".to_owned())),
            Err(error) => Err(error),
        };
        let event = match outcome {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(error) => {
                // Nobody else replaced it: a channel is opened once.
                *lock(&self.channel) = None;
                Event::ChannelClosed(error.to_string())
            }
        };
        let mut events = lock(&self.events);
        // Who has not heard of one change of the configuration does not need to hear of two.
        if events.back() != Some(&event) {
            events.push_back(event);
            // It cannot fail: the counter has room for 2^64 - 2.
            let _ = write(&self.event_count, &1u64.to_ne_bytes());
        }
    }

    /// Answer a request. Returns what there is to tell about it, if anything.
    fn answer(&self, connection: &Connection, frame: Frame) -> Result<Option<Event>, Error> {
        frame.header.check_request()?;
        if lock(&self.events).len() >= MAX_EVENTS {
            return Err(Error::Framing(format!("more than {MAX_EVENTS} requests that nobody looked at")));
        }
        let header = frame.header;
        let (event, file) = match self.understand(frame) {
            Ok(Served::Told(event)) => (event, None),
            Ok(Served::Found(file)) => (None, Some(file)),
            Err(error) => (Some(Event::Refused(error.to_string())), None),
        };
        let asked = header.flags.need_reply() && self.protocol_features().contains(ProtocolFeatures::REPLY_ACK);
        if asked || header.request == BackendRequest::SharedObjectLookup as u32 {
            let code = u64::from(matches!(event, Some(Event::Refused(_)))).to_ne_bytes();
            let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
            connection.send(header.request, Flags::ANSWER, &code, &files, Instant::now() + self.timeout)?;
        }
        Ok(event)
    }

    fn understand(&self, frame: Frame) -> Result<Served, Error> {
        use BackendMessage as M;
        let request = BackendRequest::from_id(frame.header.request)?;
        let refused = |reason: String| Error::Refused { message: request.name(), reason };
        if let Some(defect) = frame.defect {
            return Err(refused(defect));
        }
        let message = BackendMessage::decode(request, &frame.payload, frame.descriptors.len())?;
        if let Gate::Protocol(feature) = request.info().gate
            && !self.protocol_features().contains(feature)
        {
            return Err(refused("it was not negotiated".to_owned()));
        }
        if !frame.descriptors.is_empty() && !self.protocol_features().contains(ProtocolFeatures::BACKEND_SEND_FD) {
            return Err(refused("a descriptor needs BACKEND_SEND_FD, which was not negotiated".to_owned()));
        }
        let queue = message.queue().unwrap_or(0);
        let file = frame.descriptors.first();
        let mut windows = lock(&self.windows);
        let told = |kind: fn(String) -> Event| move |which| Some(kind(which));
        let event = match (message, file) {
            (M::ConfigChangeMsg(_), _) => Ok(Some(Event::ConfigChanged)),
            (M::VringCall(_), _) => self.notify(queue, |queue| &queue.call).map(|()| None),
            (M::VringErr(_), _) => self.notify(queue, |queue| &queue.error).map(|()| None),
            (M::VringHostNotifierMsg(area), file) => {
                windows.set_notifier(queue, &area, file).map(told(Event::HostNotifier))
            }
            (M::SharedObjectAdd(uuid), _) => windows.add_object(uuid).map(told(Event::SharedObject)),
            (M::SharedObjectRemove(uuid), _) => windows.remove_object(uuid).map(told(Event::SharedObject)),
            (M::SharedObjectLookup(uuid), _) => {
                return windows.look_up_object(uuid).map(Served::Found).map_err(refused);
            }
            (M::ShmemMap(asked), Some(file)) => windows.map(&asked, file).map(told(Event::SharedMemory)),
            (M::ShmemUnmap(asked), _) => windows.unmap(&asked).map(told(Event::SharedMemory)),
            _ => Err("it was not negotiated".to_owned()),
        };
        event.map(Served::Told).map_err(refused)
    }

    fn notify(&self, queue: u32, which: impl FnOnce(&InBand) -> &OwnedFd) -> Result<(), String> {
        let queues = lock(&self.in_band);
        let queue = queues.get(&queue).ok_or_else(|| format!("queue {queue} takes no notifications in-band"))?;
        // A counter that is full is signalled in any case.
        let _ = write(which(queue), &1u64.to_ne_bytes());
        Ok(())
    }

    /// Notify a queue in-band from now on.
    pub(super) fn listen_in_band(&self, queue: u8, notified: InBand) {
        lock(&self.in_band).insert(queue.into(), notified);
    }

    /// Whether notifications are messages.
    pub(super) fn is_in_band(&self) -> bool {
        self.protocol_features().contains(ProtocolFeatures::INBAND_NOTIFICATIONS)
    }
}

/// What came of a request of the back-end.
enum Served {
    /// What there is to tell about it, if anything.
    Told(Option<Event>),
    /// The file that it asked for.
    Found(OwnedFd),
}

fn check_config_size(bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
    if bytes.len() > Config::MAX_BYTES {
        let most = Config::MAX_BYTES;
        return Err(Error::State(format!("{} bytes of configuration; a message carries at most {most}", bytes.len())));
    }
    Ok(bytes)
}

fn io_range(iova: u64, size: u64) -> Result<IovaRange, Error> {
    IovaRange::new(iova, size)
        .ok_or_else(|| Error::State(format!("{size:#x} addresses from {iova:#x} on are none, or wrap around")))
}
