//! A session and the front-end that it must not trust: messages from the table's grammar in any order, with descriptors
//! of any kind, rings that are written to meanwhile, and memory that disappears.
//!
//! Every message is answered as the table says or ends the session for a reason that it gave; the loop comes to rest;
//! and the next front-end is served.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::fs::ftruncate;
use rustix::io::{dup, pwrite, write};
use rustix::net::{SendFlags, send};
use vhost_user::backend::{
    Channel, ConfigSpace, Event, EventLoop, Extensions, Flow, Hooks, Profile, Run, Session, Taken, Token, Vring,
};
use vhost_user::protocol::{
    Answer, BackendMessage, BackendRequest, CryptoSession, Descriptors, Flags, FrontendMessage, FrontendRequest,
    HEADER_SIZE, Header, Inflight, Info, Iotlb, Layout, Log, LogBase, MAX_PAYLOAD, MemoryTable, Payload,
    ProtocolFeatures, Region, Uuid, VirtioFeatures, VringAddress, VringDescriptor, VringState,
};
use vhost_user::transport::{Connection, Received};
use vhost_user::virtqueue::{Chain, RingLimits, Used};
use vhost_user::{Error, RingError};

use super::support::{Input, borrowed, event, level, memory_file, number, strange_descriptor};

const QUEUES: u16 = 3;
const SIZE: u64 = 0x8000;
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000_0000;

/// Where the parts of a ring of up to 32 entries are, from its start.
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const RING: u64 = 0x1000;
/// Where buffers are.
const BUFFERS: u64 = 0x4000;

/// Turns of the loop in which it has to come to rest.
const TURNS: usize = 1000;

pub fn run(input: &[u8]) {
    level(|| {
        let mut world = World::new();
        // An input ends where its bytes do, in the middle of whatever.
        let _ = world.play(&mut Input::new(input));
        world.end();
        world.serve_a_good_front_end();
    });
}

struct Quiet;

impl Hooks for Quiet {
    fn features_negotiated(&mut self, _features: u64) {}
    fn queue_started(&mut self, _queue: u16) {}
    fn queue_stopping(&mut self, _queue: u16) {}
    fn queue_broke(&mut self, _queue: u16, _error: &RingError) {}
    fn config_written(&mut self, _offset: u32, bytes: &[u8]) -> Result<(), String> {
        if bytes.first() == Some(&0xff) { Err("not this".to_owned()) } else { Ok(()) }
    }
    fn device_reset(&mut self) {}
}

/// A device that has everything.
impl Extensions for Quiet {
    fn send_rarp(&mut self, _mac: [u8; 6]) -> Result<(), String> {
        Ok(())
    }
    fn set_mtu(&mut self, _mtu: u16) -> Result<(), String> {
        Ok(())
    }
    fn create_crypto_session(&mut self, session: &CryptoSession) -> Result<i64, String> {
        if session.operation == 0 { Err("not this".to_owned()) } else { Ok(session.operation as i64) }
    }
    fn close_crypto_session(&mut self, _session: u64) -> Result<(), String> {
        Ok(())
    }
    fn set_gpu_socket(&mut self, _socket: OwnedFd) -> Result<(), String> {
        Ok(())
    }
    fn shared_object(&mut self, uuid: Uuid) -> Result<Option<OwnedFd>, String> {
        Ok((uuid.0[0] == 0).then(|| memory_file(1)))
    }
}

/// A device and its front-end.
struct World {
    events: Arc<EventLoop>,
    vrings: Arc<[Arc<Vring>]>,
    config: Arc<ConfigSpace>,
    channel: Arc<Channel>,
    session: Option<Session>,
    held: Vec<(u16, Arc<Run>, Chain)>,
    /// Requests of the device that were neither granted nor refused.
    asked: Arc<AtomicUsize>,
    /// Whether requests are answered at once.
    prompt: bool,
    front: FrontEnd,
}

struct FrontEnd {
    socket: UnixStream,
    connection: Connection,
    /// What was sent and is no whole message yet.
    unfinished: Vec<u8>,
    /// Messages that can only be refused by closing the connection.
    unanswerable: BTreeSet<&'static str>,
    owed: VecDeque<&'static Info>,
    memory: Vec<OwnedFd>,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    /// The other end of the last channel for requests of the back-end.
    channel: Option<UnixStream>,
    available: [u16; QUEUES as usize],
    /// What it did that a session may end for.
    shrank: bool,
    misframed: bool,
}

impl FrontEnd {
    fn connected() -> (Self, UnixStream) {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(socket.try_clone().unwrap().into()).unwrap();
        let queues = || (0..QUEUES).map(|_| event(EventfdFlags::NONBLOCK)).collect();
        let front = Self {
            socket,
            connection,
            unfinished: Vec::new(),
            unanswerable: BTreeSet::new(),
            owed: VecDeque::new(),
            memory: (0..2).map(|_| memory_file(SIZE)).collect(),
            kicks: queues(),
            calls: queues(),
            channel: None,
            available: [0; QUEUES as usize],
            shrank: false,
            misframed: false,
        };
        (front, theirs)
    }

    /// Send bytes as they are, and keep account of what they ask for.
    fn send(&mut self, bytes: &[u8], descriptors: &[OwnedFd]) {
        let whole = bytes.len().min(HEADER_SIZE);
        let header = bytes.first_chunk::<HEADER_SIZE>().map(Header::decode);
        match header.filter(|header| HEADER_SIZE + header.size as usize == bytes.len()) {
            Some(Header { request, flags, size: _ }) if self.unfinished.is_empty() => {
                let deadline = Instant::now() + Duration::from_secs(1);
                let borrowed = borrowed(descriptors);
                let _ = self.connection.send(request, flags, &bytes[whole..], &borrowed, deadline);
            }
            _ => drop(send(&self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)),
        }
        self.unfinished.extend_from_slice(bytes);
    }

    /// What has to be answered of what was sent by now.
    fn account(&mut self, session: &Session) {
        while let Some((head, rest)) = self.unfinished.split_first_chunk::<HEADER_SIZE>() {
            let header = Header::decode(head);
            let row = FrontendRequest::from_id(header.request);
            if header.size as usize > MAX_PAYLOAD {
                self.misframed = true;
                return;
            }
            if rest.len() < header.size as usize {
                return;
            }
            let Ok(request) = row.and_then(|request| header.check_request().map(|()| request)) else {
                self.misframed = true;
                return;
            };
            let need_reply = header.flags.need_reply();
            let answered = match request.info().answer {
                Answer::Ack => need_reply,
                Answer::Reply(_) | Answer::ReplyAndFile(_) => true,
                Answer::ReplyWith(feature, _) => need_reply || session.protocol_features() & feature.0 != 0,
            };
            if answered {
                self.owed.push_back(request.info());
            }
            if request.info().answer != Answer::Ack || !need_reply {
                self.unanswerable.insert(request.name());
            }
            self.unfinished.drain(..HEADER_SIZE + header.size as usize);
        }
    }

    /// Take the answers that came.
    fn hear(&mut self) {
        while let Ok(Received::Frame(frame)) = self.connection.try_receive() {
            let Some(owed) = self.owed.pop_front() else { panic!("an answer that nobody asked for: {frame:?}") };
            assert_eq!((frame.header.request, frame.header.flags), (owed.id, Flags::ANSWER), "{}", owed.name);
            let name = match owed.answer {
                Answer::Ack => "U64",
                Answer::Reply(payload) | Answer::ReplyAndFile(payload) | Answer::ReplyWith(_, payload) => payload,
            };
            let is_answer = Layout::named(name).is_some_and(|layout| (layout.check)(&frame.payload).is_ok());
            let is_status = frame.payload.len() == 8;
            let is_error = frame.payload.is_empty() && owed.name == "GET_CONFIG";
            assert!(is_answer || is_status || is_error, "{}: {} bytes", owed.name, frame.payload.len());
        }
    }

    /// Whether a session may end like this.
    fn explains(&self, end: &Error) -> bool {
        match end {
            Error::Framing(_) => self.misframed,
            Error::Refused { message, .. } => self.unanswerable.contains(message),
            Error::Memory(_) => self.shrank,
            _ => false,
        }
    }
}

impl World {
    fn new() -> Self {
        let events = Arc::new(EventLoop::new().unwrap());
        let limits = RingLimits { max_indirect: 16, max_bytes: 1 << 20 };
        let vrings: Arc<[_]> =
            (0..QUEUES).map(|index| Arc::new(Vring::new(index, 32, limits, events.wakeup()))).collect();
        let channel = Arc::new(Channel::new(Arc::clone(&events)));
        events.enter();
        let (front, theirs) = FrontEnd::connected();
        let mut world = Self {
            events,
            vrings,
            config: Arc::new(ConfigSpace::new(vec![7; 24])),
            channel,
            session: None,
            held: Vec::new(),
            asked: Arc::default(),
            prompt: true,
            front,
        };
        world.accept(theirs);
        world
    }

    fn profile() -> Profile {
        let transport_features =
            VirtioFeatures::RING_PACKED | VirtioFeatures::IN_ORDER | VirtioFeatures::ACCESS_PLATFORM;
        let extensions = ProtocolFeatures::RARP
            | ProtocolFeatures::NET_MTU
            | ProtocolFeatures::CRYPTO_SESSION
            | ProtocolFeatures::SHARED_OBJECT;
        Profile {
            device_features: 1 << 5,
            has_config: true,
            extensions,
            transport_features,
            takes_gpu_socket: true,
            ..Profile::default()
        }
    }

    fn accept(&mut self, socket: UnixStream) {
        let (vrings, config) = (Arc::clone(&self.vrings), Arc::clone(&self.config));
        let (channel, events) = (Arc::clone(&self.channel), Arc::clone(&self.events));
        self.session = Some(Session::new(socket.into(), Self::profile(), vrings, config, channel, events).unwrap());
    }

    fn play(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        if input.ratio(3u8, 4u8)? {
            self.set_up(input)?;
        }
        while !input.is_empty() && self.session.is_some() {
            match input.int_in_range(0..=16)? {
                0..=6 => self.send_a_message(input)?,
                7..=9 => self.offer(input)?,
                10 => self.poke(input)?,
                11 => self.prompt = input.arbitrary()?,
                12 => self.complete(input.int_in_range(0..=3)?),
                13 => self.device_asks(input)?,
                14 => self.set_up(input)?,
                15 => self.answer_the_device(input)?,
                _ => self.misbehave(input)?,
            }
            self.turn();
        }
        Ok(())
    }

    // --- What a front-end does --------------------------------------------------------------------------------------

    /// What every front-end does, more or less.
    fn set_up(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        const BITS: [VirtioFeatures; 3] =
            [VirtioFeatures::PROTOCOL_FEATURES, VirtioFeatures::EVENT_IDX, VirtioFeatures::INDIRECT_DESC];
        const RARELY: [VirtioFeatures; 4] = [
            VirtioFeatures::RING_PACKED,
            VirtioFeatures::IN_ORDER,
            VirtioFeatures::ACCESS_PLATFORM,
            VirtioFeatures::LOG_ALL,
        ];
        let mut features = VirtioFeatures::VERSION_1;
        for bit in BITS {
            if input.arbitrary()? {
                features = features | bit;
            }
        }
        if input.ratio(1u8, 8u8)? {
            features = features | *input.choose(&RARELY)?;
        }
        let queue: u16 = input.int_in_range(0..=QUEUES - 1)?;
        for message in Self::greeting(features, queue) {
            let descriptors = self.good_descriptors(&message);
            self.tell(&message, input.ratio(7u8, 8u8)?, &descriptors);
            self.turn();
        }
        Ok(())
    }

    fn greeting(features: VirtioFeatures, queue: u16) -> Vec<FrontendMessage> {
        use FrontendMessage as M;
        let index = u32::from(queue);
        let start = USER + u64::from(queue) * RING;
        let region = |at: u64| Region {
            guest_address: GUEST + at * SIZE,
            size: SIZE,
            user_address: USER + at * SIZE,
            file_offset: 0,
        };
        let with = VringDescriptor::new(queue as u8, true);
        vec![
            M::SetFeatures(vhost_user::protocol::U64(features.0)),
            M::SetMemTable(MemoryTable { regions: vec![region(0), region(1)] }),
            M::SetVringNum(VringState { index, num: 16 }),
            M::SetVringBase(VringState { index, num: 0 }),
            M::SetVringAddr(VringAddress {
                index,
                flags: 0,
                descriptors: start,
                used: start + USED,
                avail: start + AVAIL,
                log: 0,
            }),
            M::SetVringCall(with),
            M::SetVringKick(with),
            M::SetVringEnable(VringState { index, num: 1 }),
        ]
    }

    fn tell(&mut self, message: &FrontendMessage, need_reply: bool, descriptors: &[OwnedFd]) {
        let mut payload = Vec::new();
        message.encode(&mut payload);
        self.tell_bytes(message.request() as u32, need_reply, &payload, descriptors);
    }

    fn tell_bytes(&mut self, request: u32, need_reply: bool, payload: &[u8], descriptors: &[OwnedFd]) {
        let flags = if need_reply { Flags::REQUEST_NEED_REPLY } else { Flags::REQUEST };
        let mut bytes = Vec::new();
        Header { request, flags, size: payload.len() as u32 }.encode(&mut bytes);
        bytes.extend_from_slice(payload);
        self.front.send(&bytes, descriptors);
    }

    /// The descriptors that a good front-end sends with a message.
    fn good_descriptors(&mut self, message: &FrontendMessage) -> Vec<OwnedFd> {
        let queue = usize::from(message.queue().unwrap_or(0) as u16 % QUEUES);
        let copy = |descriptor: &OwnedFd| dup(descriptor).unwrap();
        match message {
            FrontendMessage::SetMemTable(table) => {
                self.front.memory.iter().cycle().take(table.regions.len()).map(copy).collect()
            }
            FrontendMessage::SetVringKick(body) if body.has_descriptor() => vec![copy(&self.front.kicks[queue])],
            FrontendMessage::SetVringCall(body) | FrontendMessage::SetVringErr(body) if body.has_descriptor() => {
                vec![copy(&self.front.calls[queue])]
            }
            FrontendMessage::SetBackendReqFd(_) => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                self.front.channel = Some(ours);
                vec![theirs.into()]
            }
            FrontendMessage::SetLogBase(_) | FrontendMessage::SetInflightFd(_) | FrontendMessage::SetLogFd(_) => {
                vec![copy(&self.front.memory[1])]
            }
            message => match message.request().info().descriptors {
                Descriptors::One => vec![copy(&self.front.memory[0])],
                _ => Vec::new(),
            },
        }
    }

    /// A row of the table, with a payload that is nearly right.
    fn send_a_message(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let info = input.choose(FrontendRequest::TABLE)?;
        let payload = payload_of(info, input)?;
        let request = FrontendRequest::from_id(info.id).unwrap();
        // With the number that the payload asks for, if there is one.
        let message = (0..=MemoryTable::MAX_REGIONS)
            .find_map(|count| FrontendMessage::decode(request, &payload, count).ok())
            .filter(|_| !input.ratio(1u8, 16u8).unwrap_or(true));
        let mut descriptors = message.map(|message| self.good_descriptors(&message)).unwrap_or_default();
        if input.ratio(1u8, 6u8)? {
            if let Some(last) = descriptors.last_mut() {
                *last = strange_descriptor(input)?;
            } else {
                descriptors.push(strange_descriptor(input)?);
            }
        }
        self.tell_bytes(info.id, input.ratio(3u8, 4u8)?, &payload, &descriptors);
        Ok(())
    }

    /// Make a chain available, which may be malformed, and kick.
    fn offer(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let queue = input.int_in_range(0..=usize::from(QUEUES) - 1)?;
        let ring = queue as u64 * RING;
        let head: u16 = input.int_in_range(0..=15)?;
        let count: u16 = input.int_in_range(1..=4)?;
        for at in 0..count {
            let near = GUEST + BUFFERS + input.int_in_range(0..=2 * SIZE - BUFFERS)?;
            let address = if input.ratio(7u8, 8u8)? { near } else { number(input)? };
            let length = if input.ratio(7u8, 8u8)? { input.int_in_range(0..=600)? } else { number(input)? as u32 };
            let last = at + 1 == count;
            let usual = if last { 0 } else { 1 } | if input.arbitrary()? { 2 } else { 0 };
            let flags: u16 = if input.ratio(7u8, 8u8)? { usual } else { input.int_in_range(0..=7)? };
            let index = (head + at) % 16;
            let next = if input.ratio(15u8, 16u8)? { (index + 1) % 16 } else { input.arbitrary()? };
            let mut descriptor = Vec::new();
            descriptor.extend_from_slice(&address.to_le_bytes());
            descriptor.extend_from_slice(&length.to_le_bytes());
            descriptor.extend_from_slice(&flags.to_le_bytes());
            descriptor.extend_from_slice(&next.to_le_bytes());
            self.front.write(0, ring + 16 * u64::from(index), &descriptor);
        }
        let slot = u64::from(self.front.available[queue] % 16);
        self.front.write(0, ring + AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        let step = if input.ratio(15u8, 16u8)? { 1 } else { number(input)? as u16 };
        self.front.available[queue] = self.front.available[queue].wrapping_add(step);
        let available = self.front.available[queue];
        self.front.write(0, ring + AVAIL + 2, &available.to_le_bytes());
        write(&self.front.kicks[queue], &1u64.to_ne_bytes()).unwrap();
        Ok(())
    }

    fn poke(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let at = input.int_in_range(0..=SIZE - 8)?;
        let value = number(input)?.to_le_bytes();
        self.front.write(input.int_in_range(0..=1)?, at, &value);
        Ok(())
    }

    fn misbehave(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        match input.int_in_range(0..=4)? {
            0 => {
                let length = input.int_in_range(1..=24)?;
                let bytes = input.bytes(length.min(input.len()))?.to_vec();
                self.front.send(&bytes, &[]);
            }
            1 => {
                // Nearly a message.
                let flags = Flags(number(input)? as u32);
                let mut bytes = Vec::new();
                let size = number(input)? as u32;
                Header { request: number(input)? as u32, flags, size }.encode(&mut bytes);
                self.front.send(&bytes, &[]);
            }
            2 => {
                self.front.shrank = true;
                let file = &self.front.memory[input.int_in_range(0..=1)?];
                ftruncate(file, input.int_in_range(0..=SIZE)?).unwrap();
            }
            3 => {
                self.end();
                self.reconnect();
            }
            _ => {
                // Gone without a word.
                self.front.misframed |= !self.front.unfinished.is_empty();
                rustix::net::shutdown(&self.front.socket, rustix::net::Shutdown::Both).unwrap();
            }
        }
        Ok(())
    }

    /// The device changes its configuration, or makes a request.
    fn device_asks(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let offset = input.int_in_range(0..=30)?;
        let fits = offset < 24;
        assert_eq!(self.config.write(offset, &[1]).is_ok(), fits);
        self.channel.config_changed();
        let row = input.choose(BackendRequest::TABLE)?;
        let request = BackendRequest::from_id(row.id).unwrap();
        let payload = [input.arbitrary()?; 64];
        let files = usize::from(input.arbitrary::<bool>()?);
        let message =
            (0..=payload.len()).find_map(|size| BackendMessage::decode(request, &payload[..size], files).ok());
        let Some(message) = message else { return Ok(()) };
        let files = (0..files).map(|_| memory_file(0)).collect();
        let asked = Arc::clone(&self.asked);
        self.asked.fetch_add(1, Ordering::Relaxed);
        let then = Box::new(move |_| {
            asked.fetch_sub(1, Ordering::Relaxed);
        });
        if self.channel.request(message, files, then).is_err() {
            self.asked.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// On the channel, more or less what the device waits for.
    fn answer_the_device(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let Some(channel) = self.front.channel.take() else { return Ok(()) };
        let row = input.choose(BackendRequest::TABLE)?;
        let flags = if input.ratio(7u8, 8u8)? { Flags::ANSWER } else { Flags(number(input)? as u32) };
        let payload = vec![input.arbitrary()?; if input.ratio(7u8, 8u8)? { 8 } else { input.int_in_range(0..=20)? }];
        let mut descriptors = Vec::new();
        if input.ratio(1u8, 4u8)? {
            descriptors.push(strange_descriptor(input)?);
        }
        let connection = Connection::new(channel.try_clone().unwrap().into()).unwrap();
        let _ = connection.send(row.id, flags, &payload, &borrowed(&descriptors), Instant::now());
        if !input.ratio(1u8, 8u8)? {
            self.front.channel = Some(channel);
        }
        Ok(())
    }

    // --- What the device does ---------------------------------------------------------------------------------------

    /// Let the loop come to rest, and look at the answers.
    fn turn(&mut self) {
        if let Some(session) = &self.session {
            self.front.account(session);
        }
        self.settle();
        self.front.hear();
        if self.session.is_some() && !self.front.owed.is_empty() {
            // It waits for what the device holds.
            self.complete(usize::MAX);
            self.settle();
            self.front.hear();
            assert!(self.session.is_none() || self.front.owed.is_empty(), "no answer to {:?}", self.front.owed);
        }
        if self.session.is_none() {
            // What was not answered by its end never will be.
            self.front.owed.clear();
        }
    }

    fn settle(&mut self) {
        let mut events = Vec::new();
        for _ in 0..TURNS {
            self.events.wait(Some(Duration::ZERO), &mut events).unwrap();
            let happened = std::mem::take(&mut events);
            let mut busy = !happened.is_empty();
            for event in happened {
                match event {
                    Event::Ready { token: Token::Session, .. } => {
                        self.with_session(|session| session.on_ready(&mut Quiet))
                    }
                    Event::Ready { token: Token::Queue(queue), .. } => {
                        self.with_session(|session| {
                            session.on_kick(queue, &mut Quiet);
                            Ok(Flow::Continue)
                        });
                        self.process(queue);
                    }
                    Event::Ready { token: Token::Channel, .. } => self.channel.on_ready(),
                    Event::Ready { .. } | Event::Timer(_) => {}
                }
            }
            self.channel.settle();
            self.with_session(|session| session.resume(&mut Quiet));
            let polled = self.session.as_ref().map(Session::polled_queues).unwrap_or_default();
            for queue in polled {
                busy |= self.process(queue);
            }
            if !busy {
                return;
            }
        }
        panic!("the loop does not come to rest");
    }

    fn with_session(&mut self, action: impl FnOnce(&mut Session) -> Result<Flow, Error>) {
        let Some(mut session) = self.session.take() else { return };
        match action(&mut session) {
            Ok(Flow::Continue) => {
                let ready: Vec<_> = std::iter::from_fn(|| session.next_ready()).collect();
                self.session = Some(session);
                for queue in ready {
                    self.process(queue);
                }
            }
            Ok(Flow::Ended) => {}
            Err(error) => assert!(self.front.explains(&error), "{error}"),
        }
    }

    /// Whether there was anything to do.
    fn process(&mut self, queue: u16) -> bool {
        let mut chains = Vec::new();
        let vring = Arc::clone(&self.vrings[usize::from(queue)]);
        match vring.take(8, &mut chains, &mut Vec::new()) {
            Taken::Chains(run) => {
                assert!(!chains.is_empty());
                self.held.extend(chains.into_iter().map(|chain| (queue, Arc::clone(&run), chain)));
                if self.prompt {
                    self.complete(usize::MAX);
                }
                self.process(queue);
                true
            }
            Taken::Nothing | Taken::NotRunning => false,
            Taken::Broken(error) => {
                self.with_session(|session| {
                    session.queue_broke(queue, &error, &mut Quiet);
                    Ok(Flow::Continue)
                });
                true
            }
        }
    }

    /// Answer up to `count` requests backwards, the last one first.
    fn complete(&mut self, count: usize) {
        for _ in 0..count.min(self.held.len()) {
            let Some((queue, run, chain)) = self.held.pop() else { return };
            let mut bytes = vec![0; chain.readable().min(0x1_0000) as usize];
            // SAFETY: `run` holds the snapshot under which the chain was taken.
            let read = unsafe { chain.read(0, &mut bytes) };
            assert_eq!(read, bytes.len());
            bytes.reverse();
            // SAFETY: as above.
            let written = unsafe { chain.write(0, &bytes) };
            assert_eq!(written as u64, chain.writable().min(read as u64));
            let vring = &self.vrings[usize::from(queue)];
            let used = Used { head: chain.head(), written: written as u32 };
            vring.complete(&run, &[used], &[chain]);
        }
    }

    // --- Ends -------------------------------------------------------------------------------------------------------

    fn end(&mut self) {
        self.with_session(|session| session.end(&mut Quiet, None));
        self.complete(usize::MAX);
        self.settle();
        assert!(self.session.is_none(), "the session does not end");
        assert_eq!(self.asked.load(Ordering::Relaxed), 0, "the device was not told what became of a request");
        for vring in self.vrings.iter() {
            assert_eq!((vring.in_flight(), vring.available()), (0, 0));
        }
    }

    fn reconnect(&mut self) {
        let (front, theirs) = FrontEnd::connected();
        self.front = front;
        self.accept(theirs);
    }

    fn serve_a_good_front_end(&mut self) {
        self.reconnect();
        self.prompt = true;
        let features = VirtioFeatures::VERSION_1 | VirtioFeatures::PROTOCOL_FEATURES;
        for message in Self::greeting(features, 1) {
            let descriptors = self.good_descriptors(&message);
            self.tell(&message, true, &descriptors);
            self.turn();
        }
        let request = [(GUEST + BUFFERS).to_le_bytes(), [3, 0, 0, 0, 1, 0, 1, 0]].concat();
        let answer = [(GUEST + BUFFERS + 16).to_le_bytes(), [9, 0, 0, 0, 2, 0, 0, 0]].concat();
        self.front.write(0, RING, &[request, answer].concat());
        self.front.write(0, BUFFERS, b"abc");
        self.front.write(0, RING + AVAIL + 2, &[1, 0, 0, 0]);
        write(&self.front.kicks[1], &1u64.to_ne_bytes()).unwrap();
        self.turn();
        assert_eq!(self.front.read(BUFFERS + 16, 3), b"cba");
        assert_eq!(self.front.read(RING + USED + 2, 10), [1, 0, 0, 0, 0, 0, 3, 0, 0, 0]);
        self.end();
    }
}

impl FrontEnd {
    fn write(&self, file: usize, at: u64, bytes: &[u8]) {
        // A file that was cut off grows again; what was mapped of it stays lost.
        pwrite(self.memory[file].as_fd(), bytes, at).unwrap();
    }

    fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        rustix::io::pread(self.memory[0].as_fd(), &mut bytes, at).unwrap();
        bytes
    }
}

/// The fields of a message, each of them right, or at some edge.
fn payload_of(info: &Info, input: &mut Input<'_>) -> arbitrary::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match info.payload {
        "U64" => {
            let profile = World::profile();
            let known = [profile.features().0, profile.protocol_features().0, 0, 1, VirtioFeatures::VERSION_1.0];
            let value = if input.arbitrary()? { *input.choose(&known)? } else { number(input)? };
            bytes.extend_from_slice(&value.to_ne_bytes());
        }
        "VringState" => {
            let num = if input.arbitrary()? { *input.choose(&[0, 1, 4, 16, 32, 64])? } else { number(input)? as u32 };
            VringState { index: index(input)?, num }.encode(&mut bytes);
        }
        "VringAddress" => {
            let start = USER + RING * input.int_in_range(0..=15)?;
            let mut part = |offset| {
                Ok(match input.int_in_range(0..=15)? {
                    0 => number(input)?,
                    1 => USER + input.int_in_range(0..=2 * SIZE)?,
                    _ => start + offset,
                })
            };
            let (descriptors, avail, used) = (part(0)?, part(AVAIL)?, part(USED)?);
            let (index, flags, log) = (index(input)?, input.int_in_range(0..=1)?, number(input)?);
            VringAddress { index, flags, descriptors, used, avail, log }.encode(&mut bytes);
        }
        "VringDescriptor" => {
            let without = if input.ratio(1u8, 4u8)? { 0x100 } else { 0 };
            let high = if input.ratio(1u8, 16u8)? { number(input)? << 9 } else { 0 };
            bytes.extend_from_slice(&(u64::from(index(input)?) | without | high).to_ne_bytes());
        }
        "MemoryTable" => {
            let regions = (0..input.int_in_range(0..=3)?).map(|at| region(at, input)).collect::<Result<Vec<_>, _>>()?;
            MemoryTable { regions }.encode(&mut bytes);
        }
        "SingleRegion" => {
            bytes.extend_from_slice(&[0; 8]);
            region(input.int_in_range(0..=3)?, input)?.encode(&mut bytes);
        }
        "Config" => {
            let length = input.int_in_range(0..=40)?;
            let size = if input.ratio(7u8, 8u8)? { length } else { number(input)? as u32 };
            for word in [number(input)? as u32, size, input.int_in_range(0..=1)?] {
                bytes.extend_from_slice(&word.to_ne_bytes());
            }
            bytes.resize(bytes.len() + length as usize, input.arbitrary()?);
        }
        "Inflight" => {
            let file_offset = if input.ratio(7u8, 8u8)? { 0 } else { number(input)? };
            let size = if input.ratio(7u8, 8u8)? { SIZE } else { number(input)? };
            let queues = if input.ratio(7u8, 8u8)? { QUEUES } else { number(input)? as u16 };
            let queue_size = if input.ratio(7u8, 8u8)? { 16 } else { number(input)? as u16 };
            Inflight { size, offset: file_offset, queues, queue_size, padding: 0 }.encode(&mut bytes);
        }
        "LogBase" => {
            let size = if input.ratio(7u8, 8u8)? { 0x1000 } else { number(input)? };
            let offset = if input.ratio(7u8, 8u8)? { 0 } else { number(input)? };
            LogBase::Shared(Log { size, offset }).encode(&mut bytes);
        }
        "Iotlb" => {
            let near = USER + input.int_in_range(0..=2 * SIZE)?;
            let iova = if input.ratio(7u8, 8u8)? { near } else { number(input)? };
            let size = if input.ratio(7u8, 8u8)? { SIZE } else { number(input)? };
            let user_address = if input.ratio(7u8, 8u8)? { USER } else { number(input)? };
            let (permission, kind) = (input.int_in_range(0..=4)?, input.int_in_range(0..=7)?);
            Iotlb { iova, size, user_address, permission, kind, padding: [0; 6] }.encode(&mut bytes);
        }
        other => {
            // Field by field, as the layout says.
            let layout = Layout::named(other).unwrap();
            for field in layout.fields {
                let value = number(input)?.to_ne_bytes();
                bytes.extend((0..field.size).map(|at| value.get(at).copied().unwrap_or_default()));
            }
        }
    }
    if input.ratio(1u8, 32u8)? {
        bytes.resize(input.int_in_range(0..=bytes.len() + 9)?, 0);
    }
    Ok(bytes)
}

fn index(input: &mut Input<'_>) -> arbitrary::Result<u32> {
    Ok(if input.ratio(15u8, 16u8)? { input.int_in_range(0..=u32::from(QUEUES))? } else { number(input)? as u32 })
}

fn region(at: u64, input: &mut Input<'_>) -> arbitrary::Result<Region> {
    let mut right =
        Region { guest_address: GUEST + at * SIZE, size: SIZE, user_address: USER + at * SIZE, file_offset: 0 };
    match input.int_in_range(0..=15)? {
        0 => right.guest_address = number(input)?,
        1 => right.size = number(input)?,
        2 => right.user_address = number(input)?,
        3 => right.file_offset = number(input)?,
        4 => (right.size, right.file_offset) = (0x1ff1, 0x1008),
        _ => {}
    }
    Ok(right)
}
