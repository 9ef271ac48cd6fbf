//! The driver's side of a session and a back-end that it must not trust: answers that are nearly right, requests on the
//! back-end's channel, and used rings that say anything.
//!
//! No call waits beyond its deadline, the end of a session is the end, and a request comes back once, with no more bytes
//! than there was room for.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::{pwrite, write};
use vhost_user::Error;
use vhost_user::frontend::{Completion, Frontend, Memory, Queue, QueueOptions};
use vhost_user::protocol::{
    BackendRequest, Config, Flags, FrontendMessage, FrontendRequest, MemoryTable, Payload, ProtocolFeatures, Region,
    VirtioFeatures, VringAddress, VringState,
};
use vhost_user::transport::{Connection, Received};

use super::support::{Input, borrowed, level, number, strange_descriptor};

/// How long an answer may take that nobody will give.
const TIMEOUT: Duration = Duration::from_millis(1);

/// Of the ring.
const SIZE: u16 = 8;

/// What answers are about, for the most part.
const INDEX: u8 = 0;

pub fn run(input: &[u8]) {
    level(|| {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let mut world = World {
            frontend: Arc::new(Frontend::new(socket.into(), TIMEOUT).unwrap()),
            queue: None,
            rooms: BTreeMap::new(),
            back: BackEnd {
                connection: Connection::new(theirs.into()).unwrap(),
                channel: None,
                regions: Vec::new(),
                ring: None,
                calls: Vec::new(),
            },
            over: false,
        };
        // An input ends where its bytes do, in the middle of whatever.
        let _ = world.play(&mut Input::new(input));
    });
}

struct World {
    frontend: Arc<Frontend>,
    queue: Option<Queue>,
    /// How many bytes each request may be answered with.
    rooms: BTreeMap<u64, usize>,
    back: BackEnd,
    over: bool,
}

/// What the back-end knows.
struct BackEnd {
    connection: Connection,
    channel: Option<Connection>,
    regions: Vec<(Region, OwnedFd)>,
    ring: Option<VringAddress>,
    calls: Vec<OwnedFd>,
}

impl World {
    fn play(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        if input.ratio(7u8, 8u8)? {
            self.shake_hands(input)?;
        }
        while !input.is_empty() {
            match input.int_in_range(0..=11)? {
                0 => self.shake_hands(input)?,
                1 => self.make_a_queue(input)?,
                2 | 3 => self.submit(input)?,
                4..=6 => self.use_the_ring(input)?,
                7 => self.back.ask(input)?,
                8 => drop(self.frontend.next_event(Instant::now() + TIMEOUT)),
                9 => self.back.poke(input)?,
                _ => self.ask(input)?,
            }
            self.collect();
            self.back.listen();
        }
        Ok(())
    }

    fn shake_hands(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        use FrontendRequest as R;
        let features = VirtioFeatures::PROTOCOL_FEATURES.0 | VirtioFeatures::VERSION_1.0 | input.arbitrary::<u64>()?;
        let protocol = if input.arbitrary()? { Frontend::SUPPORTED.0 } else { number(input)? };
        self.back.answer(R::GetFeatures, &features.to_ne_bytes(), input)?;
        self.back.answer(R::GetProtocolFeatures, &protocol.to_ne_bytes(), input)?;
        if ProtocolFeatures(protocol).contains(ProtocolFeatures::MQ) {
            self.back.answer(R::GetQueueNum, &1u64.to_ne_bytes(), input)?;
        }
        let both = ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK;
        if ProtocolFeatures(protocol).contains(both) {
            self.back.answer(R::SetBackendReqFd, &[0; 8], input)?;
        }
        let outcome = self.frontend.handshake(Frontend::SUPPORTED);
        self.judge(outcome.map(drop));
        self.back.listen();
        self.acknowledge(R::SetFeatures, input)?;
        if self.has(ProtocolFeatures::STATUS) {
            self.acknowledge(R::SetStatus, input)?;
            self.back.answer(R::GetStatus, &0xbu64.to_ne_bytes(), input)?;
        }
        let known = VirtioFeatures::EVENT_IDX | VirtioFeatures::INDIRECT_DESC | VirtioFeatures::PROTOCOL_FEATURES;
        let outcome = self.frontend.set_features(features & known.0 | VirtioFeatures::VERSION_1.0);
        self.judge(outcome);
        Ok(())
    }

    fn make_a_queue(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        use FrontendRequest as R;
        self.queue = None;
        self.rooms.clear();
        let memory = Arc::new(Memory::with_layout(&[(0x10_0000, 0x4000), (0x10_4000, 0x2000)]).unwrap());
        if self.has(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            self.back.answer(R::GetMaxMemSlots, &8u64.to_ne_bytes(), input)?;
            self.acknowledge(R::AddMemReg, input)?;
            self.acknowledge(R::AddMemReg, input)?;
        } else {
            self.acknowledge(R::SetMemTable, input)?;
        }
        let outcome = self.frontend.share(std::slice::from_ref(&memory));
        self.judge(outcome);
        let options = QueueOptions {
            size: SIZE,
            base: number(input)? as u32 & 0xffff,
            indirect: input.arbitrary()?,
            big_endian: false,
        };
        let queue = Queue::new(Arc::clone(&self.frontend), memory, INDEX, options).unwrap();
        for request in [R::SetVringNum, R::SetVringBase, R::SetVringAddr, R::SetVringCall, R::SetVringErr] {
            self.acknowledge(request, input)?;
        }
        self.acknowledge(R::SetVringKick, input)?;
        self.acknowledge(R::SetVringEnable, input)?;
        let outcome = queue.start();
        self.judge(outcome);
        self.queue = Some(queue);
        Ok(())
    }

    fn submit(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let Some(queue) = &self.queue else { return Ok(()) };
        let parts = |input: &mut Input<'_>| -> arbitrary::Result<Vec<usize>> {
            let count = input.int_in_range(0..=3)?;
            (0..count).map(|_| input.int_in_range(0..=700)).collect()
        };
        let (sent, room) = (parts(input)?, parts(input)?);
        let sent: Vec<Vec<u8>> = sent.into_iter().map(|length| vec![0x5a; length]).collect();
        let sent: Vec<&[u8]> = sent.iter().map(Vec::as_slice).collect();
        match queue.submit(&sent, &room) {
            Ok(token) => assert_eq!(self.rooms.insert(token, room.iter().sum()), None, "a token twice"),
            Err(Error::Ring { .. }) => {}
            // In-band, the kick is a message.
            Err(other) => self.judge(Err(other)),
        }
        assert!(self.queue.as_ref().is_some_and(|queue| queue.outstanding() <= SIZE));
        Ok(())
    }

    /// What the device gave back, as far as it can be believed.
    fn collect(&mut self) {
        let Some(queue) = &self.queue else { return };
        loop {
            match queue.poll(None) {
                Ok(Some(Completion { token, data })) => {
                    let room = self.rooms.remove(&token).expect("a request that was not under way");
                    assert!(data.len() <= room, "{} bytes in room for {room}", data.len());
                }
                Ok(None) | Err(Error::Ring { .. } | Error::Closed(_)) => return,
                Err(other) => panic!("{other}"),
            }
        }
    }

    /// One of the requests that a driver makes now and then.
    fn ask(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        use FrontendRequest as R;
        let outcome = match input.int_in_range(0..=6)? {
            0 => {
                self.back.answer(R::GetFeatures, &[0; 8], input)?;
                self.frontend.get_features().map(drop)
            }
            1 => {
                let size = input.int_in_range(0..=40)?;
                let (at, came) = if input.ratio(7u8, 8u8)? { (4, size) } else { (0, input.int_in_range(0..=50)?) };
                let mut answer = Vec::new();
                Config { offset: at, flags: 0, bytes: vec![1; came] }.encode(&mut answer);
                self.back.answer(R::GetConfig, &answer, input)?;
                self.frontend.get_config(4, size).map(|bytes| assert_eq!(bytes.len(), size))
            }
            2 => {
                self.acknowledge(R::SetConfig, input)?;
                self.frontend.set_config(0, &[1, 2, 3])
            }
            3 => {
                self.acknowledge(R::ResetDevice, input)?;
                self.frontend.reset()
            }
            4 => {
                self.back.answer(R::GetStatus, &number(input)?.to_ne_bytes(), input)?;
                self.frontend.status().map(drop)
            }
            5 => {
                self.acknowledge(R::SetVringEnable, input)?;
                let mut answer = Vec::new();
                VringState { index: INDEX.into(), num: number(input)? as u32 }.encode(&mut answer);
                self.back.answer(R::GetVringBase, &answer, input)?;
                let Some(queue) = &self.queue else { return Ok(()) };
                queue.stop().map(drop)
            }
            _ => {
                let row = input.choose(FrontendRequest::TABLE)?;
                let request = FrontendRequest::from_id(row.id).unwrap();
                self.back.answer(request, &[0; 8], input)?;
                let payload = [0; 40];
                let length = input.int_in_range(0..=payload.len())?;
                self.frontend.exchange_payload(request, &payload[..length], &[]).map(drop)
            }
        };
        self.judge(outcome);
        Ok(())
    }

    fn use_the_ring(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let Some(queue) = &self.queue else { return Ok(()) };
        let Some(ring) = self.back.ring else { return Ok(()) };
        let index = self.back.read(ring.used + 2).unwrap_or_default();
        let slot = u64::from(index % SIZE);
        let id = if input.ratio(15u8, 16u8)? { input.int_in_range(0..=SIZE.into())? } else { number(input)? as u32 };
        let length = if input.ratio(7u8, 8u8)? { input.int_in_range(0..=64)? } else { number(input)? as u32 };
        self.back.write(ring.used + 4 + 8 * slot, &[id.to_le_bytes(), length.to_le_bytes()].concat());
        let step = if input.ratio(15u8, 16u8)? { 1 } else { number(input)? as u16 };
        self.back.write(ring.used + 2, &index.wrapping_add(step).to_le_bytes());
        if input.arbitrary()? {
            for call in &self.back.calls {
                let _ = write(call, &1u64.to_ne_bytes());
            }
            let _ = queue.arm();
        }
        Ok(())
    }

    fn acknowledge(&mut self, request: FrontendRequest, input: &mut Input<'_>) -> arbitrary::Result<()> {
        if self.has(ProtocolFeatures::REPLY_ACK) { self.back.answer(request, &[0; 8], input) } else { Ok(()) }
    }

    fn has(&self, feature: ProtocolFeatures) -> bool {
        self.frontend.protocol_features().contains(feature)
    }

    /// After an answer that makes no sense there are no more of them.
    fn judge(&mut self, outcome: Result<(), Error>) {
        match outcome {
            Ok(()) => assert!(!self.over, "a session that is over goes on"),
            // Of our own making, or an answer of which there is nothing more to say.
            Err(Error::State(_) | Error::Refused { .. }) => {}
            Err(Error::Framing(_) | Error::Timeout(_) | Error::Closed(_)) => {
                self.over = true;
                let next = self.frontend.get_features();
                assert!(matches!(&next, Err(Error::State(text)) if text.contains("is over")), "{next:?}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}

impl BackEnd {
    /// Answer a request that has not come yet, more or less as it should be.
    fn answer(&mut self, request: FrontendRequest, payload: &[u8], input: &mut Input<'_>) -> arbitrary::Result<()> {
        let (mut id, mut flags, mut payload) = (request as u32, Flags::ANSWER, payload.to_vec());
        let mut descriptors = Vec::new();
        if input.ratio(1u8, 32u8)? {
            match input.int_in_range(0..=5)? {
                0 => id = number(input)? as u32,
                1 => flags = Flags(number(input)? as u32),
                2 => payload.resize(input.int_in_range(0..=60)?, 1),
                3 => descriptors.push(strange_descriptor(input)?),
                4 => payload.fill(input.arbitrary()?),
                // None at all.
                _ => return Ok(()),
            }
        }
        let _ = self.connection.send(id, flags, &payload, &borrowed(&descriptors), Instant::now() + TIMEOUT);
        Ok(())
    }

    /// Make a request on the channel.
    fn ask(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let row = input.choose(BackendRequest::TABLE)?;
        let id = if input.ratio(7u8, 8u8)? { row.id } else { number(input)? as u32 };
        let flags = if input.ratio(7u8, 8u8)? { Flags(*input.choose(&[1, 9])?) } else { Flags(number(input)? as u32) };
        let payload = vec![input.arbitrary()?; *input.choose(&[0, 8, 16, 24, 32, 40])?];
        let mut descriptors = Vec::new();
        if input.arbitrary()? {
            descriptors.push(strange_descriptor(input)?);
        }
        if let Some(channel) = &self.channel {
            let _ = channel.send(id, flags, &payload, &borrowed(&descriptors), Instant::now());
        }
        Ok(())
    }

    /// Take note of what the front-end sent.
    fn listen(&mut self) {
        while let Ok(Received::Frame(mut frame)) = self.connection.try_receive() {
            let request = FrontendRequest::from_id(frame.header.request).unwrap();
            match FrontendMessage::decode(request, &frame.payload, frame.descriptors.len()) {
                Ok(FrontendMessage::SetMemTable(MemoryTable { regions })) => {
                    self.regions = regions.into_iter().zip(frame.descriptors).collect();
                }
                Ok(FrontendMessage::AddMemReg(added)) => {
                    self.regions.push((added.region, frame.descriptors.remove(0)));
                }
                Ok(FrontendMessage::RemMemReg(removed)) => {
                    self.regions.retain(|(region, _)| region.guest_address != removed.region.guest_address);
                }
                Ok(FrontendMessage::SetVringAddr(address)) => self.ring = Some(address),
                Ok(FrontendMessage::SetVringCall(_) | FrontendMessage::SetVringErr(_)) => {
                    self.calls.append(&mut frame.descriptors);
                }
                Ok(FrontendMessage::SetBackendReqFd(_)) => {
                    self.channel = Some(Connection::new(frame.descriptors.remove(0)).unwrap());
                }
                _ => {}
            }
        }
        // Acknowledgements on the channel, which nobody waits for.
        while let Some(Ok(Received::Frame(_))) = self.channel.as_mut().map(Connection::try_receive) {}
    }

    /// Write anywhere in what is shared.
    fn poke(&mut self, input: &mut Input<'_>) -> arbitrary::Result<()> {
        let at = input.int_in_range(0..=0x5ff8)?;
        let start = self.regions.iter().map(|(region, _)| region.user_address).min().unwrap_or_default();
        let value = number(input)?;
        self.write(start + at, &value.to_le_bytes());
        Ok(())
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        if let Some((file, at)) = self.find(address) {
            let _ = pwrite(file, bytes, at);
        }
    }

    fn read(&self, address: u64) -> Option<u16> {
        let (file, at) = self.find(address)?;
        let mut bytes = [0; 2];
        rustix::io::pread(file, &mut bytes, at).ok()?;
        Some(u16::from_le_bytes(bytes))
    }

    fn find(&self, address: u64) -> Option<(&OwnedFd, u64)> {
        self.regions.iter().find_map(|(region, file)| {
            let at = address.checked_sub(region.user_address).filter(|at| *at < region.size)?;
            Some((file, at))
        })
    }
}
