//! One connection: what was negotiated, and what each message does.
//!
//! vhost-user specification, "Front-end message types" and "Ring states".

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{Channel, Granted};
use super::complaints::Complaints;
use super::config::ConfigSpace;
use super::device_state::{Direction, Transfer};
use super::event_loop::{EventLoop, Interest, Token};
use super::extensions::{Extensions, mac_of, mtu_of};
use super::notification::{Call, Kick};
use super::postcopy::Postcopy;
use super::vring::{Logging, Vring};
use crate::error::{Error, RingError};
use crate::memory::{Access, DirtyLog, IovaRange, Permission, Snapshot, Userfault, faults_seen};
use crate::protocol::{
    Answer, BackendMessage, Config, Empty, Flags, FrontendMessage, FrontendRequest, Gate, Inflight, Iotlb, LogBase,
    MemoryTable, Payload, ProtocolFeatures, Rings, ShmemConfig, SingleRegion, U64, VirtioFeatures, VringAddress,
    VringState,
};
use crate::transport::{Connection, Frame, Received};
use crate::virtqueue::{Format, InflightBuffer, RingAddresses, RingOptions};

/// How long the front-end may take to read a reply that its socket has no room for.
const SEND_DEADLINE: Duration = Duration::from_secs(3);

/// How long a driver that takes a queue away without GET_VRING_BASE waits for requests in flight. User-Mode Linux
/// holds a spinlock in the meantime.
const QUIESCE_DEADLINE: Duration = Duration::from_secs(1);

/// How long the end of a session waits for requests in flight, so that a front-end that comes back finds each one
/// either finished or untouched.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// Messages that are handled before others get their turn.
const BATCH: usize = 64;

/// How often somebody is told that GET_VRING_BASE is still waiting.
pub(super) const DRAIN_REMINDER: Duration = Duration::from_secs(5);

/// Regions that ADD_MEM_REG may add up to: what libvhost-user answers, and QEMU's own limit nearly.
const MAX_MEMORY_SLOTS: usize = 509;

/// Transport features that some front ends take without asking; they cost nothing.
const TAKEN_WITHOUT_ASKING: VirtioFeatures =
    VirtioFeatures(VirtioFeatures::INDIRECT_DESC.0 | VirtioFeatures::EVENT_IDX.0 | VirtioFeatures::VERSION_1.0);

/// What a device offers.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Bits of the device type, as in GET_FEATURES.
    pub device_features: u64,
    /// Those of the transport and the rings that the device asks for, because some front ends take them unseen.
    pub transport_features: VirtioFeatures,
    /// Whether the device has a configuration space.
    pub has_config: bool,
    /// What the device implements itself, beside what every device has.
    pub extensions: ProtocolFeatures,
    /// Whether the device is one that takes GPU_SET_SOCKET, for which there is no feature.
    pub takes_gpu_socket: bool,
    /// The shared memory regions of the device, for GET_SHMEM_CONFIG.
    pub shared_memory: Arc<ShmemConfig>,
}

impl Profile {
    /// The answer to GET_FEATURES.
    #[must_use]
    pub fn features(&self) -> VirtioFeatures {
        VirtioFeatures(self.device_features)
            | self.transport_features
            | TAKEN_WITHOUT_ASKING
            | VirtioFeatures::PROTOCOL_FEATURES
            | VirtioFeatures::LOG_ALL
    }

    /// The answer to GET_PROTOCOL_FEATURES. Only what is implemented is offered: QEMU accepts bits it has no code for.
    #[must_use]
    pub fn protocol_features(&self) -> ProtocolFeatures {
        let always = ProtocolFeatures::MQ
            | ProtocolFeatures::LOG_SHMFD
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::BACKEND_REQ
            | ProtocolFeatures::RESET_DEVICE
            | ProtocolFeatures::CONFIGURE_MEM_SLOTS
            | ProtocolFeatures::STATUS
            | ProtocolFeatures::DEVICE_STATE
            | ProtocolFeatures::GPA_ADDRESSES
            | ProtocolFeatures::INFLIGHT_SHMFD
            | ProtocolFeatures::GET_VRING_BASE_INFLIGHT
            | ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN;
        let config = if self.has_config { ProtocolFeatures::CONFIG } else { ProtocolFeatures::default() };
        let with_files = ProtocolFeatures::HOST_NOTIFIER | ProtocolFeatures::SHARED_OBJECT | ProtocolFeatures::SHMEM;
        let files = if (self.extensions.0 & with_files.0) != 0 {
            ProtocolFeatures::BACKEND_SEND_FD
        } else {
            ProtocolFeatures::default()
        };
        let offered = always | config | files | self.extensions;
        if !offered.contains(ProtocolFeatures::PAGEFAULT) {
            offered
        } else if Userfault::is_available() {
            // They do not go together, and QEMU takes everything that it is offered.
            offered.without(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
        } else {
            offered.without(ProtocolFeatures::PAGEFAULT)
        }
    }
}

/// What a session tells the device. Called on the loop's thread, with no lock held.
pub trait Hooks: Extensions {
    /// SET_FEATURES was accepted.
    fn features_negotiated(&mut self, features: u64);
    /// The queue may be worked on from now on.
    fn queue_started(&mut self, queue: u16);
    /// The queue is about to be stopped, or is lost already: what is held should be completed.
    fn queue_stopping(&mut self, queue: u16);
    /// The queue broke, with the reason. It is stopped; the others go on.
    fn queue_broke(&mut self, queue: u16, error: &RingError);
    /// SET_CONFIG. An error refuses the message.
    fn config_written(&mut self, offset: u32, bytes: &[u8]) -> Result<(), String>;
    /// The driver reset the device.
    fn device_reset(&mut self);
    /// SET_DEVICE_STATE_FD: begin to write the device's state to `file`, or to read it from there, on another thread,
    /// which wakes the loop at the end. An error refuses the message.
    fn begin_transfer(&mut self, _direction: Direction, _file: OwnedFd) -> Result<(), String> {
        Err("the device has no state to move".to_owned())
    }
    /// What became of the transfer that was begun, once it is over.
    fn transferred(&mut self) -> Option<Result<(), String>> {
        None
    }
    /// Nobody waits for the transfer any more: it should end soon.
    fn abandon_transfer(&mut self) {}
}

/// Whether a session goes on.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    Continue,
    /// The connection is over, and everything it configured is forgotten.
    Ended,
}

/// What is to be done when requests in flight are finished.
#[derive(Debug)]
pub(super) enum Then {
    ReplyVringBase {
        request: FrontendRequest,
        queue: u16,
    },
    Acknowledge {
        request: FrontendRequest,
        need_reply: bool,
    },
    ReplyFeatures,
    Reset {
        request: FrontendRequest,
        need_reply: bool,
    },
    /// Of an IOTLB_MSG that took back a range.
    Unmapped(IovaRange),
    /// The answer to CHECK_DEVICE_STATE.
    ReplyTransfer,
    End(Option<Error>),
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) queues: Vec<u16>,
    pub(super) since: Instant,
    pub(super) deadline: Option<Instant>,
    pub(super) timer: u64,
    pub(super) then: Then,
}

/// A front-end that does not read what we say: nothing more is read from it until it does.
#[derive(Debug)]
struct Stalled {
    deadline: Instant,
    timer: u64,
}

/// A connection with a front-end.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    profile: Profile,
    vrings: Arc<[Arc<Vring>]>,
    config: Arc<ConfigSpace>,
    channel: Arc<Channel>,
    pub(super) events: Arc<EventLoop>,
    memory: Arc<Snapshot>,
    logging: Logging,
    inflight: Option<InflightBuffer>,
    pub(super) transfer: Transfer,
    postcopy: Postcopy,
    features: Option<VirtioFeatures>,
    protocol_features: ProtocolFeatures,
    status: u8,
    /// Which queues the device was told of as started.
    started: Vec<bool>,
    pub(super) waiting: Option<Waiting>,
    stalled: Option<Stalled>,
    /// Whether any ring has been without a kick descriptor.
    lacks_kicks: bool,
    /// Queues that were started and should be looked at without waiting for a kick.
    ready: VecDeque<u16>,
    faults: u64,
    /// When rings behind an IOMMU are looked at again.
    translation_timer: Option<Instant>,
    pub(super) complaints: Complaints,
}

impl Session {
    /// Serve the front-end at the other end of `socket`.
    pub fn new(
        socket: OwnedFd,
        profile: Profile,
        vrings: Arc<[Arc<Vring>]>,
        config: Arc<ConfigSpace>,
        channel: Arc<Channel>,
        events: Arc<EventLoop>,
    ) -> Result<Self, Error> {
        let connection = Connection::new(socket)?;
        events.watch(&connection, Token::Session, Interest::READABLE)?;
        Ok(Self {
            connection,
            profile,
            started: vec![false; vrings.len()],
            vrings,
            config,
            channel,
            events,
            memory: Arc::default(),
            logging: Logging::default(),
            inflight: None,
            transfer: Transfer::default(),
            postcopy: Postcopy::default(),
            features: None,
            protocol_features: ProtocolFeatures::default(),
            status: 0,
            waiting: None,
            stalled: None,
            lacks_kicks: false,
            ready: VecDeque::new(),
            faults: faults_seen(),
            translation_timer: None,
            complaints: Complaints::default(),
        })
    }

    /// The socket is ready: finish what was to be said, and handle messages that are there.
    pub fn on_ready(&mut self, hooks: &mut dyn Hooks) -> Result<Flow, Error> {
        if self.is_ending() {
            return Ok(Flow::Continue);
        }
        match self.connection.flush() {
            Ok(true) => self.unstall(),
            Ok(false) => return Ok(Flow::Continue),
            Err(error) => return self.end(hooks, Some(error)),
        }
        // Nothing is read while the front-end waits for an answer. It is told of here that nobody waits any more.
        if self.waiting.is_some() && self.connection.is_hung_up() {
            return self.end(hooks, None);
        }
        for _ in 0..BATCH {
            if self.waiting.is_some() || self.stalled.is_some() {
                break;
            }
            match self.connection.try_receive() {
                Ok(Received::Incomplete) => return Ok(Flow::Continue),
                Ok(Received::Closed) => return self.end(hooks, None),
                Ok(Received::Frame(frame)) => {
                    if let Err(error) = self.handle(frame, hooks) {
                        return self.end(hooks, Some(error));
                    }
                }
                Err(error) => return self.end(hooks, Some(error)),
            }
            self.settle(hooks);
        }
        Ok(Flow::Continue)
    }

    /// Something that the session may wait for has happened, or its timer is due, or guest memory was taken away under us.
    /// Cheap if nothing of that is so.
    pub fn resume(&mut self, hooks: &mut dyn Hooks) -> Result<Flow, Error> {
        if !self.is_ending()
            && let Err(error) = self.check_memory()
        {
            return self.end(hooks, Some(error));
        }
        if self.stalled.as_ref().is_some_and(|stalled| stalled.deadline <= Instant::now()) {
            let error = Error::Timeout(format!(
                "the front-end has read none of our answers for {} seconds",
                SEND_DEADLINE.as_secs()
            ));
            return self.end(hooks, Some(error));
        }
        self.ask_for_translations(hooks);
        if let Some(complaint) = self.logging.log.as_ref().and_then(|log| log.complaint()) {
            self.complaints.warn(complaint);
        }
        self.look_at_transfer(hooks);
        let Some(waiting) = &self.waiting else { return Ok(Flow::Continue) };
        let transferring = matches!(waiting.then, Then::ReplyTransfer) && self.is_transferring();
        let is_idle = |queue| match waiting.then {
            Then::Unmapped(range) => self.vring(queue).is_released(range),
            _ => self.vring(queue).drain(),
        };
        let busy: Vec<u16> = waiting.queues.iter().copied().filter(|queue| !is_idle(*queue)).collect();
        let now = Instant::now();
        if (transferring || !busy.is_empty()) && waiting.deadline.is_none_or(|deadline| now < deadline) {
            if waiting.deadline.is_none() && now - waiting.since >= DRAIN_REMINDER {
                self.remind(now);
            }
            return Ok(Flow::Continue);
        }
        for queue in busy {
            let held = self.vring(queue).in_flight();
            if let Then::Unmapped(range) = waiting.then {
                log::warn!(
                    "queue {queue}: the driver took the I/O addresses {range} away while the device held {held} requests, \
                     at least one of which is there; what is written to it now may be in other use"
                );
            } else if self.vring(queue).is_recorded() && !matches!(waiting.then, Then::Reset { .. }) {
                log::info!("queue {queue}: {held} requests stay in the front-end's record of what is in flight");
            } else {
                log::warn!(
                    "queue {queue}: the driver took it away while the device held {held} requests; complete what you \
                     hold when the queue stops"
                );
            }
        }
        let Some(waiting) = self.waiting.take() else { return Ok(Flow::Continue) };
        self.events.cancel_timer(waiting.timer);
        let result = match waiting.then {
            Then::End(error) => {
                self.forget_everything();
                return error.map_or(Ok(Flow::Ended), Err);
            }
            then => self.after_drain(then, &waiting.queues, hooks),
        };
        if let Err(error) = result {
            return self.end(hooks, Some(error));
        }
        self.watch_connection();
        self.settle(hooks);
        self.on_ready(hooks)
    }

    /// Whether the session only waits for requests in flight.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        matches!(&self.waiting, Some(Waiting { then: Then::End(_), .. }))
    }

    /// A queue that should be looked at although nobody kicked it.
    pub fn next_ready(&mut self) -> Option<u16> {
        self.ready.pop_front()
    }

    /// The kick descriptor of a queue became readable. The queue should be looked at afterwards.
    pub fn on_kick(&mut self, queue: u16, hooks: &mut dyn Hooks) {
        let Some(vring) = self.vrings.get(usize::from(queue)) else { return };
        vring.on_kick(|kick| self.kicks_of(vring).forget(kick));
        if !self.started[usize::from(queue)] && self.waiting.is_none() {
            self.settle(hooks);
        }
    }

    /// The queue broke while the device took chains from it.
    pub fn queue_broke(&mut self, queue: u16, error: &RingError, hooks: &mut dyn Hooks) {
        hooks.queue_broke(queue, error);
        self.settle(hooks);
    }

    /// The rings that have to be looked at because their front-end gave no kick descriptor.
    #[must_use]
    pub fn polled_queues(&self) -> Vec<u16> {
        if !self.lacks_kicks {
            return Vec::new();
        }
        self.vrings.iter().filter(|vring| vring.needs_polling()).map(|vring| vring.index()).collect()
    }

    /// An error if guest memory was taken away under us. Cheap unless something was lost somewhere.
    fn check_memory(&mut self) -> Result<(), Error> {
        let faults = faults_seen();
        if faults == self.faults {
            return Ok(());
        }
        self.faults = faults;
        if self.logging.log.as_ref().is_some_and(|log| log.is_lost()) {
            return Err(Error::Memory(
                "the front-end shrank the file behind its dirty log while it was in use".to_owned(),
            ));
        }
        if self.inflight.as_ref().is_some_and(InflightBuffer::is_lost) {
            return Err(Error::Memory(
                "the front-end shrank the file of the in-flight record while it was in use".to_owned(),
            ));
        }
        match self.memory.lost_region() {
            None => Ok(()),
            Some(_) if self.postcopy.is_abandoned() => {
                Err(Error::Memory("the front-end went away before all of guest memory was there (postcopy)".to_owned()))
            }
            Some(region) => Err(Error::Memory(format!(
                "the front-end shrank the file behind the {:#x} bytes of guest memory at {:#x} while they were in use",
                region.size, region.guest_address
            ))),
        }
    }

    /// What SET_FEATURES accepted, if it came.
    #[must_use]
    pub fn features(&self) -> Option<u64> {
        self.features.map(|features| features.0)
    }

    #[must_use]
    pub fn protocol_features(&self) -> u64 {
        self.protocol_features.0
    }

    // --- Messages -------------------------------------------------------------------------------------------------

    fn handle(&mut self, frame: Frame, hooks: &mut dyn Hooks) -> Result<(), Error> {
        self.check_memory()?;
        frame.header.check_request()?;
        let request = FrontendRequest::from_id(frame.header.request)?;
        let need_reply = frame.header.flags.need_reply();
        log::debug!(
            "<- {} ({} bytes, {} descriptors{})",
            request.name(),
            frame.payload.len(),
            frame.descriptors.len(),
            if need_reply { ", wants an answer" } else { "" }
        );
        match self.decode(request, frame).and_then(|(message, files)| self.apply(message, files, need_reply, hooks)) {
            Ok(Done::Answered) => Ok(()),
            Ok(Done::Acknowledge) => self.acknowledge(request, need_reply, 0),
            Err(error) => self.refuse(request, need_reply, error),
        }
    }

    fn decode(&self, request: FrontendRequest, frame: Frame) -> Result<(FrontendMessage, Vec<OwnedFd>), Error> {
        let refuse = |reason| Err(Error::Refused { message: request.name(), reason });
        if let Some(defect) = frame.defect {
            return refuse(defect);
        }
        let message = FrontendMessage::decode(request, &frame.payload, frame.descriptors.len())?;
        let info = request.info();
        if let Gate::Protocol(feature) = info.gate
            && !self.profile.protocol_features().contains(feature)
        {
            return refuse(format!("needs the protocol feature {feature}, which this device did not offer"));
        }
        if info.gate == Gate::AccessPlatform && !self.has(VirtioFeatures::ACCESS_PLATFORM) {
            return refuse("needs the feature ACCESS_PLATFORM, which was not negotiated".to_owned());
        }
        if info.gate == Gate::Gpu && !self.profile.takes_gpu_socket {
            return refuse("this device does not draw by itself: it takes no socket for that".to_owned());
        }
        if info.rings == Rings::One
            && let Some(queue) = message.queue()
            && queue as usize >= self.vrings.len()
        {
            return refuse(format!("queue {queue} does not exist; the device has {}", self.vrings.len()));
        }
        Ok((message, frame.descriptors))
    }

    fn apply(
        &mut self,
        message: FrontendMessage,
        mut files: Vec<OwnedFd>,
        need_reply: bool,
        hooks: &mut dyn Hooks,
    ) -> Result<Done, Error> {
        use FrontendMessage as M;
        let request = message.request();
        let refuse = |reason: String| Error::Refused { message: request.name(), reason };
        // The queue's index was checked against the table's row.
        let queue = message.queue().unwrap_or(0) as u16;
        match message {
            M::GetFeatures(Empty) => {
                // Without SET_VRING_ENABLE this is all that User-Mode Linux sends before it takes the rings away.
                let running = self.active_queues();
                if running.is_empty() || self.has(VirtioFeatures::PROTOCOL_FEATURES) {
                    return self.reply(request, U64(self.profile.features().0));
                }
                return self.wait_for(running, Some(QUIESCE_DEADLINE), Then::ReplyFeatures, hooks);
            }
            M::SetFeatures(U64(bits)) => self.set_features(VirtioFeatures(bits), hooks).map_err(refuse)?,
            M::SetOwner(Empty) => {}
            M::ResetOwner(Empty) => {
                // Obsolete. Some meant it to disable the rings, others to forget everything; what was configured stays, or
                // else a connection that goes on would be lost.
                let (queues, then) = (self.all_queues(), Then::Acknowledge { request, need_reply });
                return self.wait_for(queues, Some(QUIESCE_DEADLINE), then, hooks);
            }
            M::PostcopyAdvise(Empty) => {
                let userfault = self.postcopy.advise().map_err(|error| refuse(error.to_string()))?;
                return self.reply_with(request, Empty, Some(userfault));
            }
            M::PostcopyListen(Empty) => self.listen_postcopy().map_err(refuse)?,
            M::PostcopyEnd(Empty) => {
                self.postcopy.end();
                return self.reply(request, U64(0));
            }
            M::SetMemTable(table) if self.postcopy.is_listening() => {
                let Some(told) = self.set_late_memory(table, &files).map_err(refuse)? else {
                    return Ok(Done::Acknowledge);
                };
                return self.reply(request, told);
            }
            M::SetMemTable(MemoryTable { regions }) => {
                let memory = Snapshot::from_table(&regions, &files).map_err(|error| refuse(error.to_string()))?;
                self.set_memory(memory.behind(self.memory.iotlb().cloned())).map_err(refuse)?;
            }
            M::AddMemReg(SingleRegion { region, .. }) => {
                if self.memory.len() >= MAX_MEMORY_SLOTS {
                    return Err(refuse(format!("all {MAX_MEMORY_SLOTS} memory slots are taken")));
                }
                let file = files.swap_remove(0);
                let memory = self.memory.with(region, &file).map_err(|error| refuse(error.to_string()))?;
                self.set_memory(memory).map_err(refuse)?;
            }
            M::RemMemReg(SingleRegion { region, .. }) => {
                let memory = self.memory.without(&region).map_err(|error| refuse(error.to_string()))?;
                self.set_memory(memory).map_err(refuse)?;
            }
            M::SetVringNum(VringState { num, .. }) => self.vring(queue).set_size(num).map_err(refuse)?,
            M::SetVringBase(VringState { num, .. }) => self.vring(queue).set_base(num).map_err(refuse)?,
            M::SetVringEndian(VringState { num, .. }) => self.set_vring_endian(queue, num).map_err(refuse)?,
            M::SetVringAddr(address @ VringAddress { descriptors, avail, used, .. }) => {
                let addresses = RingAddresses { descriptors, avail, used };
                self.vring(queue).set_addresses(addresses, address.used_log()).map_err(refuse)?;
            }
            M::GetVringBase(_) => return self.stop_vring(request, queue, self.suspends_always(), hooks),
            M::GetVringBaseSkipDrain(_) => return self.stop_vring(request, queue, true, hooks),
            M::GetInflightFd(Inflight { queues, queue_size, .. }) => {
                let format = self.check_inflight(queues).map_err(refuse)?;
                let created = InflightBuffer::create(format, queues, queue_size);
                let (file, description) = created.map_err(|error| refuse(error.to_string()))?;
                return self.reply_with(request, description, Some(file));
            }
            M::SetInflightFd(description) => {
                let format = self.check_inflight(description.queues).map_err(refuse)?;
                self.set_inflight(&files.swap_remove(0), &description, format).map_err(refuse)?;
            }
            M::SetVringKick(_) => {
                let events = Arc::clone(self.kicks_of(self.vring(queue)));
                let mut watched = Ok(());
                self.lacks_kicks |= files.is_empty();
                self.vring(queue).set_kick(
                    files.pop(),
                    |old| events.forget(old),
                    |new| watched = events.watch_edges(new, Token::Queue(queue)),
                );
                watched.map_err(|error| refuse(error.to_string()))?;
                self.ready.push_back(queue);
                self.look_at_sharers();
            }
            // It is acknowledged first and looked at after that: the front-end waits for us, and not for its requests.
            M::VringKick(_) => {
                if !self.protocol_features.contains(ProtocolFeatures::INBAND_NOTIFICATIONS) {
                    return Err(refuse("INBAND_NOTIFICATIONS was not negotiated".to_owned()));
                }
                self.vring(queue).kick_in_band();
                self.ready.push_back(queue);
            }
            M::SetVringCall(_) => self.vring(queue).set_call(files.pop()),
            M::SetVringErr(_) => self.vring(queue).set_error(files.pop()),
            M::SetVringEnable(VringState { num, .. }) => match num {
                0 => {
                    let then = Then::Acknowledge { request, need_reply };
                    return self.wait_for(vec![queue], Some(QUIESCE_DEADLINE), then, hooks);
                }
                1 => self.vring(queue).set_enabled(true),
                other => return Err(refuse(format!("queue {queue}: {other} is neither 0 (disable) nor 1 (enable)"))),
            },
            M::GetProtocolFeatures(Empty) => return self.reply(request, U64(self.profile.protocol_features().0)),
            M::SetProtocolFeatures(U64(bits)) => {
                self.set_protocol_features(ProtocolFeatures(bits)).map_err(refuse)?;
            }
            M::GetQueueNum(Empty) => return self.reply(request, U64(self.vrings.len() as u64)),
            M::SetBackendReqFd(Empty) => {
                self.channel.connect(files.swap_remove(0)).map_err(|error| refuse(error.to_string()))?;
            }
            M::GetConfig(Config { offset, flags, bytes }) => {
                let bytes = self.config.read(offset as usize, bytes.len());
                return self.reply(request, Config { offset, flags, bytes });
            }
            M::SetConfig(Config { offset, bytes, .. }) => hooks.config_written(offset, &bytes).map_err(refuse)?,
            M::ResetDevice(Empty) => {
                let queues = self.all_queues();
                return self.wait_for(queues, Some(QUIESCE_DEADLINE), Then::Reset { request, need_reply }, hooks);
            }
            M::GetMaxMemSlots(Empty) => return self.reply(request, U64(MAX_MEMORY_SLOTS as u64)),
            M::SetStatus(U64(status)) => {
                self.status = u8::try_from(status).map_err(|_| refuse(format!("{status:#x} has more than 8 bits")))?;
                if status == 0 {
                    // QEMU has stopped every ring by now; what the front-end configured stays.
                    hooks.device_reset();
                }
            }
            M::GetStatus(Empty) => return self.reply(request, U64(u64::from(self.status))),
            M::SendRarp(U64(mac)) => hooks.send_rarp(mac_of(mac)).map_err(refuse)?,
            M::NetSetMtu(U64(mtu)) => mtu_of(mtu).and_then(|mtu| hooks.set_mtu(mtu)).map_err(refuse)?,
            M::CreateCryptoSession(session) => return self.create_crypto_session(*session, hooks),
            M::CloseCryptoSession(U64(session)) => hooks.close_crypto_session(session).map_err(refuse)?,
            M::GpuSetSocket(Empty) => hooks.set_gpu_socket(files.swap_remove(0)).map_err(refuse)?,
            M::GetSharedObject(uuid) => return self.get_shared_object(uuid, hooks),
            M::GetShmemConfig(Empty) => return self.reply(request, *self.profile.shared_memory),
            M::IotlbMsg(message) => {
                return match self.on_iotlb_message(&message).map_err(refuse)? {
                    true => self.reply(request, U64(0)),
                    false => Ok(Done::Answered),
                };
            }
            M::SetLogBase(LogBase::Shared(log)) if self.protocol_features.contains(ProtocolFeatures::LOG_SHMFD) => {
                let file = files.swap_remove(0);
                let map = DirtyLog::map(log, &file).map_err(|error| refuse(error.to_string()))?;
                self.set_logging(Logging { log: Some(Arc::new(map)), ..self.logging.clone() });
                return self.reply(request, log);
            }
            M::SetLogBase(_) => {
                return Err(refuse("a log that is not shared cannot be written to; negotiate LOG_SHMFD".to_owned()));
            }
            M::SetDeviceStateFd(state) => return self.begin_transfer(state, files.swap_remove(0), hooks),
            M::CheckDeviceState(Empty) => return self.check_transfer(),
            M::SetLogFd(_) => {
                let call = files.pop().map(|descriptor| Arc::new(Call::new(descriptor)));
                self.set_logging(Logging { call, ..self.logging.clone() });
            }
        }
        Ok(Done::Acknowledge)
    }

    fn set_protocol_features(&mut self, features: ProtocolFeatures) -> Result<(), String> {
        let unknown = features.without(self.profile.protocol_features());
        if unknown.contains(ProtocolFeatures::XEN_MMAP) {
            return Err(format!(
                "{unknown} was not offered: guest memory is mapped from files here, and Xen's needs its own devices"
            ));
        }
        if !unknown.is_empty() {
            return Err(format!("{unknown} was not offered"));
        }
        features.check_requirements()?;
        self.protocol_features = features;
        self.tell_channel();
        let in_band = features.contains(ProtocolFeatures::INBAND_NOTIFICATIONS).then_some(&self.channel);
        self.vrings.iter().for_each(|vring| vring.set_in_band(in_band));
        Ok(())
    }

    fn set_features(&mut self, features: VirtioFeatures, hooks: &mut dyn Hooks) -> Result<(), String> {
        // QEMU offers RING_RESET to its drivers by itself, and its vhost-user-gpu passes it on. Nothing is asked of a
        // device by it: a ring that is reset is stopped, and set up again.
        let unknown = features.without(self.profile.features()).without(VirtioFeatures::RING_RESET);
        if !unknown.is_empty() {
            return Err(format!("{unknown} was not offered"));
        }
        let options = RingOptions {
            packed: features.contains(VirtioFeatures::RING_PACKED),
            in_order: features.contains(VirtioFeatures::IN_ORDER),
            event_idx: features.contains(VirtioFeatures::EVENT_IDX),
            indirect: features.contains(VirtioFeatures::INDIRECT_DESC),
            big_endian: false,
        };
        // Every other one is little-endian whatever was said.
        let may_be_big = is_legacy(features);
        let options_of = |vring: &Vring| RingOptions { big_endian: may_be_big && vring.is_big_endian(), ..options };
        self.vrings.iter().try_for_each(|vring| vring.check_options(options_of(vring)))?;
        self.set_iommu(features.contains(VirtioFeatures::ACCESS_PLATFORM))?;
        // QEMU's cryptodev-vhost-user never enables the rings of a crypto device.
        let begins_enabled = !features.contains(VirtioFeatures::PROTOCOL_FEATURES)
            || self.protocol_features.contains(ProtocolFeatures::CRYPTO_SESSION);
        for vring in self.vrings.iter() {
            vring.set_options(options_of(vring));
            if begins_enabled {
                vring.set_enabled(true);
            }
        }
        self.set_logging(Logging { buffers: features.contains(VirtioFeatures::LOG_ALL), ..self.logging.clone() });
        let logging_alone = self.features.is_some_and(|old| (old.0 ^ features.0) == VirtioFeatures::LOG_ALL.0);
        self.features = Some(features);
        self.tell_channel();
        // A migration that begins or fails is no business of the device.
        if !logging_alone {
            hooks.features_negotiated(features.without(VirtioFeatures::LOG_ALL).0);
        }
        Ok(())
    }

    /// Only rings of legacy drivers have a byte order to choose.
    fn set_vring_endian(&self, queue: u16, order: u32) -> Result<(), String> {
        let big_endian = match order {
            0 => false,
            1 => true,
            other => return Err(format!("queue {queue}: {other} is neither 0 (little-endian) nor 1 (big-endian)")),
        };
        match self.features {
            None => Err("it comes before SET_FEATURES, which says whether the driver is a legacy one".to_owned()),
            Some(features) if is_legacy(features) => self.vring(queue).set_big_endian(big_endian),
            Some(_) => {
                Err("VERSION_1 or RING_PACKED was negotiated, and then every ring is little-endian; it is for legacy \
                     drivers only"
                    .to_owned())
            }
        }
    }

    /// When this returns, nothing is marked in the log of before any more.
    fn set_logging(&mut self, logging: Logging) {
        self.logging = logging;
        for vring in self.vrings.iter() {
            vring.set_logging(&self.logging);
        }
    }

    fn set_memory(&mut self, memory: Snapshot) -> Result<(), String> {
        memory.forget_lost_mappings();
        self.vrings.iter().try_for_each(|vring| vring.check_memory(&memory))?;
        let memory = Arc::new(memory);
        for vring in self.vrings.iter() {
            vring.set_memory(&memory);
        }
        self.memory = memory;
        Ok(())
    }

    fn listen_postcopy(&mut self) -> Result<(), String> {
        if !self.memory.is_empty() {
            return Err("memory is set already; this has to come before".to_owned());
        }
        self.postcopy.listen(self.connection.as_fd()).map_err(|error| error.to_string())
    }

    /// Prepare memory whose pages come later, and say where it is in this process; or, when the front-end answers that with
    /// a table of nothing, put it to use.
    fn set_late_memory(&mut self, table: MemoryTable, files: &[OwnedFd]) -> Result<Option<MemoryTable>, String> {
        let MemoryTable { mut regions } = table;
        if regions.is_empty() {
            let memory = self.postcopy.go().ok_or("no memory waits for this acknowledgement")?;
            return self.set_memory(memory).map(|()| None);
        }
        let memory = Snapshot::from_table(&regions, files).map_err(|error| error.to_string())?;
        for region in &mut regions {
            let pointer = memory.user_pointer(region.user_address, 1).ok_or("a region is not where it should be")?;
            region.user_address = pointer.addr().get() as u64;
        }
        let memory = memory.behind(self.memory.iotlb().cloned());
        self.postcopy.prepare(memory).map_err(|error| error.to_string())?;
        Ok(Some(MemoryTable { regions }))
    }

    // --- The IOMMU --------------------------------------------------------------------------------------------------

    /// Put memory behind an IOMMU that knows nothing yet, or in front of it. While a ring runs it stays as it is.
    fn set_iommu(&mut self, on: bool) -> Result<(), String> {
        let is_on = self.memory.iotlb().is_some();
        if !self.active_queues().is_empty() {
            let message = "ACCESS_PLATFORM cannot change while a ring runs";
            return if on == is_on { Ok(()) } else { Err(message.to_owned()) };
        }
        // A front-end tells of invalidations only while rings run: what it has mapped before may be gone.
        if on || is_on { self.set_memory(self.memory.behind(on.then(Arc::default))) } else { Ok(()) }
    }

    /// Returns whether the answer is due now.
    fn on_iotlb_message(&mut self, message: &Iotlb) -> Result<bool, String> {
        match message.kind {
            Iotlb::UPDATE => self.map(message).map(|()| true),
            Iotlb::INVALIDATE => self.unmap(message),
            kind => Err(format!(
                "the kind {kind} is neither {} (update) nor {} (invalidate)",
                Iotlb::UPDATE,
                Iotlb::INVALIDATE
            )),
        }
    }

    fn map(&mut self, message: &Iotlb) -> Result<(), String> {
        let range = self.memory.map(message)?;
        let waited: Vec<u16> =
            self.all_queues().into_iter().filter(|queue| self.vring(*queue).on_mapped(range)).collect();
        self.ready.extend(waited);
        Ok(())
    }

    /// Forget a range, and answer when no request has its buffers there.
    fn unmap(&mut self, message: &Iotlb) -> Result<bool, String> {
        let Iotlb { iova, size, .. } = *message;
        // 2^64 addresses are one more than can be said.
        let range = if (iova, size) == (0, 0) { Some(IovaRange::EVERYTHING) } else { IovaRange::new(iova, size) };
        let range = range.ok_or_else(|| format!("{size:#x} addresses from {iova:#x} on are none, or wrap around"))?;
        if let Some(iotlb) = self.memory.iotlb() {
            iotlb.invalidate(range);
        }
        self.vrings.iter().for_each(|vring| vring.on_unmapped(range));
        let queues: Vec<u16> =
            self.all_queues().into_iter().filter(|queue| !self.vring(*queue).is_released(range)).collect();
        let is_released = queues.is_empty();
        if !is_released {
            self.wait_until(queues, Some(QUIESCE_DEADLINE), Then::Unmapped(range));
        }
        Ok(is_released)
    }

    /// Ask the front-end for what rings cannot go on without, and give up on those that it does not help.
    fn ask_for_translations(&mut self, hooks: &mut dyn Hooks) {
        if self.memory.iotlb().is_none() {
            return;
        }
        let now = Instant::now();
        for queue in self.all_queues() {
            // While the front-end waits for us we read nothing of what it says.
            if self.waiting.is_some() {
                self.vring(queue).extend_translation(now);
            } else if let Err(error) = self.vring(queue).check_translation(now) {
                hooks.queue_broke(queue, &error);
                self.settle(hooks);
            }
            if self.channel.has_room()
                && let Some((iova, writable)) = self.vring(queue).ask(now)
            {
                self.send_miss(queue, iova, writable);
            }
        }
        // One timer is enough: it is set again when it expires.
        self.translation_timer = self.translation_timer.filter(|due| now < *due);
        let deadlines = self.vrings.iter().filter_map(|vring| vring.translation_deadline());
        if self.translation_timer.is_none()
            && let Some(first) = deadlines.min()
        {
            self.translation_timer = Some(first);
            self.events.add_timer(first);
        }
    }

    fn send_miss(&self, queue: u16, iova: u64, writable: bool) {
        let permission = Permission::from(Access::to_descriptor(writable)).bits();
        let miss = Iotlb { iova, permission, kind: Iotlb::MISS, ..Iotlb::default() };
        let vring = Arc::clone(&self.vrings[usize::from(queue)]);
        // Where it is comes on the main channel, before the front-end agrees to have told.
        let then = move |answer: Result<Granted, Error>| {
            if let Err(error) = answer {
                vring.refuse_translation(iova, error.to_string());
            }
        };
        let sent = self.channel.request(BackendMessage::IotlbMsg(miss), Vec::new(), Box::new(then));
        if let Err(error) = sent {
            self.vring(queue).refuse_translation(iova, error.to_string());
            self.events.wakeup().wake();
        }
    }

    /// For which format a record has to be that comes now.
    fn check_inflight(&self, queues: u16) -> Result<Format, String> {
        if usize::from(queues) > self.vrings.len() {
            return Err(format!("it is for {queues} queues; the device has {}", self.vrings.len()));
        }
        match self.features {
            None => Err("it comes before SET_FEATURES, which says whether rings are split or packed".to_owned()),
            Some(features) if features.contains(VirtioFeatures::RING_PACKED) => Ok(Format::Packed),
            Some(_) => Ok(Format::Split),
        }
    }

    fn set_inflight(&mut self, file: &OwnedFd, description: &Inflight, format: Format) -> Result<(), String> {
        if let Some(vring) = self.vrings.iter().find(|vring| vring.is_active()) {
            return Err(format!("queue {} is running; stop it with GET_VRING_BASE first", vring.index()));
        }
        let buffer = InflightBuffer::map(file, description, format)?;
        for vring in self.vrings.iter() {
            vring.set_record(buffer.slot(vring.index()));
        }
        self.inflight = Some(buffer);
        Ok(())
    }

    // --- Waiting for requests in flight -----------------------------------------------------------------------------

    /// Stop taking from `queues`, and do `then` when nothing of theirs is in flight, or at the deadline.
    fn wait_for(
        &mut self,
        queues: Vec<u16>,
        deadline: Option<Duration>,
        then: Then,
        hooks: &mut dyn Hooks,
    ) -> Result<Done, Error> {
        for queue in &queues {
            self.tell_stopping(*queue, hooks);
        }
        let idle = self.drain(&queues);
        if idle {
            return self.after_drain(then, &queues, hooks).map(|()| Done::Answered);
        }
        self.wait_until(queues, deadline, then);
        Ok(Done::Answered)
    }

    fn wait_until(&mut self, queues: Vec<u16>, deadline: Option<Duration>, then: Then) {
        let since = Instant::now();
        let deadline = deadline.map(|after| since + after);
        let timer = self.events.add_timer(deadline.unwrap_or(since + DRAIN_REMINDER));
        self.waiting = Some(Waiting { queues, since, deadline, timer, then });
        self.watch_connection();
    }

    /// Answer with the ring's base when nothing is in flight, or, `at_once`, leave what is in flight to the record.
    fn stop_vring(
        &mut self,
        request: FrontendRequest,
        queue: u16,
        at_once: bool,
        hooks: &mut dyn Hooks,
    ) -> Result<Done, Error> {
        let then = Then::ReplyVringBase { request, queue };
        // Without a record nobody would ever hear of what is in flight.
        if !at_once || !self.vring(queue).is_recorded() {
            return self.wait_for(vec![queue], None, then, hooks);
        }
        self.tell_stopping(queue, hooks);
        self.after_drain(then, &[queue], hooks).map(|()| Done::Answered)
    }

    /// Whether the front-end takes up what is in flight when a ring stops, and has no message to say when it would.
    fn suspends_always(&self) -> bool {
        self.protocol_features.contains(ProtocolFeatures::GET_VRING_BASE_INFLIGHT)
            && !self.protocol_features.contains(ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN)
    }

    fn after_drain(&mut self, then: Then, queues: &[u16], hooks: &mut dyn Hooks) -> Result<(), Error> {
        match then {
            Then::ReplyVringBase { request, queue } => {
                let events = self.kicks_of(self.vring(queue));
                let base = self.vring(queue).stop(|kick: &Kick| events.forget(kick));
                self.look_at_sharers();
                // The last one: nothing is sent after the answer.
                self.suspend_channel();
                let state = VringState { index: u32::from(queue), num: base };
                self.reply(request, state).map(drop)
            }
            Then::Acknowledge { request, need_reply } => {
                for queue in queues {
                    self.vring(*queue).set_enabled(false);
                    self.vring(*queue).undrain();
                }
                self.acknowledge(request, need_reply, 0)
            }
            Then::ReplyFeatures => {
                for queue in queues {
                    self.vring(*queue).park();
                }
                self.reply(FrontendRequest::GetFeatures, U64(self.profile.features().0)).map(drop)
            }
            Then::Reset { request, need_reply } => {
                for queue in queues {
                    self.vring(*queue).reset();
                }
                self.status = 0;
                hooks.device_reset();
                self.acknowledge(request, need_reply, 0)
            }
            Then::Unmapped(_) => self.reply(FrontendRequest::IotlbMsg, U64(0)).map(drop),
            Then::ReplyTransfer => self.answer_check().map(drop),
            Then::End(_) => Ok(()),
        }
    }

    /// End the session, because of `error` or because we want to: now, or when what is in flight is done and published.
    pub fn end(&mut self, hooks: &mut dyn Hooks, error: Option<Error>) -> Result<Flow, Error> {
        if self.is_ending() {
            return Ok(Flow::Continue);
        }
        if let Some(waiting) = self.waiting.take() {
            self.events.cancel_timer(waiting.timer);
        }
        self.unstall();
        self.abandon_transfer(hooks);
        self.events.forget(&self.connection);
        let queues = self.active_queues();
        for queue in self.all_queues() {
            self.tell_stopping(queue, hooks);
        }
        let idle = self.drain(&queues);
        if idle {
            self.forget_everything();
            return error.map_or(Ok(Flow::Ended), Err);
        }
        let since = Instant::now();
        let deadline = since + END_DEADLINE;
        let timer = self.events.add_timer(deadline);
        self.waiting = Some(Waiting { queues, since, deadline: Some(deadline), timer, then: Then::End(error) });
        Ok(Flow::Continue)
    }

    fn forget_everything(&mut self) {
        self.events.forget(&self.connection);
        for vring in self.vrings.iter() {
            vring.disconnect(|kick| self.kicks_of(vring).forget(kick));
        }
        self.channel.disconnect();
        self.inflight = None;
        self.postcopy = Postcopy::default();
        self.memory = Arc::default();
        self.logging = Logging::default();
    }

    fn remind(&mut self, now: Instant) {
        let Some(waiting) = &mut self.waiting else { return };
        waiting.since = now;
        waiting.timer = self.events.add_timer(now + DRAIN_REMINDER);
        for queue in waiting.queues.clone() {
            log::warn!(
                "queue {queue}: the front-end waits (GET_VRING_BASE) for {} requests that the device has not completed",
                self.vring(queue).in_flight()
            );
        }
    }

    /// Nothing is read from the front-end while it waits for us, or we for it.
    pub(super) fn watch_connection(&self) {
        let writable = self.stalled.is_some();
        let interest = Interest { readable: self.waiting.is_none() && !writable, writable };
        if let Err(error) = self.events.change(&self.connection, Token::Session, interest) {
            log::error!("{error}");
        }
    }

    // --- Rings ------------------------------------------------------------------------------------------------------

    /// A kick descriptor was given up, and with it kicks that had not been heard of: another ring may have the same one.
    fn look_at_sharers(&mut self) {
        self.ready.extend(self.active_queues());
    }

    /// Start what can be started, and tell the device what became of its queues.
    pub(super) fn settle(&mut self, hooks: &mut dyn Hooks) {
        for queue in self.all_queues() {
            if !self.is_transferring()
                && let Err(error) = self.vring(queue).try_start(&self.memory)
            {
                hooks.queue_broke(queue, &error);
            }
            let active = self.vring(queue).is_active();
            if active && !self.started[usize::from(queue)] && self.waiting.is_none() {
                self.started[usize::from(queue)] = true;
                hooks.queue_started(queue);
                self.ready.push_back(queue);
            } else if !active {
                self.tell_stopping(queue, hooks);
            }
        }
        self.suspend_channel();
    }

    /// While every ring is stopped, nothing is sent to the front-end.
    fn suspend_channel(&self) {
        self.channel.set_suspended(self.started_queue().is_none());
    }

    /// A queue that the front-end has started, and not stopped.
    pub(super) fn started_queue(&self) -> Option<u16> {
        self.vrings.iter().find(|vring| vring.is_started()).map(|vring| vring.index())
    }

    fn tell_channel(&self) {
        self.channel.set_negotiated(self.features.unwrap_or_default(), self.protocol_features);
    }

    fn tell_stopping(&mut self, queue: u16, hooks: &mut dyn Hooks) {
        if std::mem::take(&mut self.started[usize::from(queue)]) {
            hooks.queue_stopping(queue);
        }
    }

    /// The loop that hears of the kicks of a queue.
    fn kicks_of<'a>(&'a self, vring: &'a Vring) -> &'a Arc<EventLoop> {
        vring.worker().unwrap_or(&self.events)
    }

    fn vring(&self, queue: u16) -> &Vring {
        &self.vrings[usize::from(queue)]
    }

    fn all_queues(&self) -> Vec<u16> {
        self.vrings.iter().map(|vring| vring.index()).collect()
    }

    /// Take nothing more from `queues`. Returns whether nothing of theirs is in flight.
    fn drain(&self, queues: &[u16]) -> bool {
        let busy = queues.iter().filter(|queue| !self.vring(**queue).drain()).count();
        busy == 0
    }

    fn active_queues(&self) -> Vec<u16> {
        self.vrings.iter().filter(|vring| vring.is_active()).map(|vring| vring.index()).collect()
    }

    fn has(&self, feature: VirtioFeatures) -> bool {
        self.features.is_some_and(|features| features.contains(feature))
    }

    // --- Answers ----------------------------------------------------------------------------------------------------

    pub(super) fn reply(&mut self, request: FrontendRequest, payload: impl Payload) -> Result<Done, Error> {
        self.reply_with(request, payload, None)
    }

    pub(super) fn reply_with(
        &mut self,
        request: FrontendRequest,
        payload: impl Payload,
        file: Option<OwnedFd>,
    ) -> Result<Done, Error> {
        let mut bytes = Vec::new();
        payload.encode(&mut bytes);
        log::debug!("-> {} ({} bytes, {} descriptors)", request.name(), bytes.len(), usize::from(file.is_some()));
        let files = file.into_iter().collect();
        if !self.connection.try_send(request as u32, Flags::ANSWER, &bytes, files)? && self.stalled.is_none() {
            let deadline = Instant::now() + SEND_DEADLINE;
            self.stalled = Some(Stalled { deadline, timer: self.events.add_timer(deadline) });
            self.watch_connection();
        }
        Ok(Done::Answered)
    }

    fn unstall(&mut self) {
        if let Some(stalled) = self.stalled.take() {
            self.events.cancel_timer(stalled.timer);
            self.watch_connection();
        }
    }

    /// Answer whoever asked for it, whether or not REPLY_ACK was negotiated: QEMU and User-Mode Linux count on that.
    fn acknowledge(&mut self, request: FrontendRequest, need_reply: bool, status: u64) -> Result<(), Error> {
        if need_reply { self.reply(request, U64(status)).map(drop) } else { Ok(()) }
    }

    /// Refuse one message: by an answer if one is expected, by closing the connection if there is no other way to say it.
    fn refuse(&mut self, request: FrontendRequest, need_reply: bool, error: Error) -> Result<(), Error> {
        if !matches!(error, Error::Refused { .. }) {
            return Err(error);
        }
        // QEMU asks for a shared object without saying for which.
        if matches!(request, FrontendRequest::GetConfig | FrontendRequest::GetSharedObject) {
            self.complaints.warn(error);
            return self.reply(request, Empty).map(drop);
        }
        if request == FrontendRequest::SetDeviceStateFd {
            self.complaints.warn(format_args!("refused: {error}"));
            return self.refuse_transfer().map(drop);
        }
        if request == FrontendRequest::IotlbMsg {
            self.complaints.warn(format_args!("refused: {error}"));
            return self.reply(request, U64(1)).map(drop);
        }
        let has_own_reply = match request.info().answer {
            Answer::Ack => false,
            Answer::Reply(_) | Answer::ReplyAndFile(_) => true,
            Answer::ReplyWith(feature, _) => self.protocol_features.contains(feature),
        };
        if need_reply && !has_own_reply {
            self.complaints.warn(format_args!("refused: {error}"));
            return self.acknowledge(request, true, 1);
        }
        Err(error)
    }
}

/// Whether the rings of a driver that accepted `features` have its machine's byte order. Virtio 1.3, section 2.7.3.
fn is_legacy(features: VirtioFeatures) -> bool {
    !features.contains(VirtioFeatures::VERSION_1) && !features.contains(VirtioFeatures::RING_PACKED)
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// What is left to do for a message that was applied.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// A reply was sent, or will be.
    Answered,
    Acknowledge,
}
