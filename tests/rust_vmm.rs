//! Against the crates of rust-vmm: their front-end with our session, their back-end with our front-end, and a device on
//! their rings with our driver.
//!
//! Every message that the crate `vhost` has is sent once, with fields that differ from each other, and what arrived is
//! compared with what was said.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMMap, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, BackendReqHandler, Frontend as TheirFrontend, FrontendReqHandler, GpuBackend, HandlerResult,
    Result as TheirResult, VhostUserBackendReqHandlerMut, VhostUserFrontend, VhostUserFrontendReqHandler,
    VhostUserFrontendReqHandlerMut,
};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user::backend::{
    self, Channel, ConfigSpace, Direction, EventLoop, Extensions, Flow, Hooks, Profile, Session, Taken, Token, Vring,
};
use vhost_user::frontend::{DirtyLog, Frontend, Memory, Queue, QueueOptions};
use vhost_user::protocol::{BackendMessage, ProtocolFeatures, ShmemConfig, ShmemMap, Uuid, VirtioFeatures};
use vhost_user::virtqueue::{RingLimits, Used};
use vhost_user::{Error, RingError};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{ByteValued, Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const PATIENCE: Duration = Duration::from_secs(30);
const OBJECT: [u8; 16] = *b"sixteen bytes id";
const CONFIGURATION: &[u8] = b"configuration";
const STATE: &[u8] = b"what the device knows";
const FEATURES: u64 =
    VirtioFeatures::VERSION_1.0 | VirtioFeatures::INDIRECT_DESC.0 | VirtioFeatures::PROTOCOL_FEATURES.0;
const BUFFER: u64 = 0x8000;

/// What one end heard, in the order in which it came.
#[derive(Clone, Debug, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

impl Heard {
    fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

fn file_with(content: &[u8]) -> File {
    let descriptor = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(descriptor);
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

fn content(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn shared_message(uuid: [u8; 16]) -> VhostUserSharedMsg {
    let mut message = VhostUserSharedMsg::default();
    message.as_mut_slice().copy_from_slice(&uuid);
    message
}

// Our session.

/// A device that answers with what it was asked, backwards.
struct Reverse {
    channel: Arc<Channel>,
    heard: Heard,
    wakeup: backend::Wakeup,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Option<Error>>>,
}

struct Ears {
    heard: Heard,
    wakeup: backend::Wakeup,
    transferred: bool,
}

impl Extensions for Ears {
    fn set_gpu_socket(&mut self, _socket: OwnedFd) -> Result<(), String> {
        self.heard.note("gpu socket");
        Ok(())
    }

    fn shared_object(&mut self, uuid: Uuid) -> Result<Option<OwnedFd>, String> {
        Ok((uuid.0 == OBJECT).then(|| file_with(b"object").into()))
    }
}

impl Hooks for Ears {
    fn features_negotiated(&mut self, features: u64) {
        self.heard.note(format!("features {features:#x}"));
    }

    fn queue_started(&mut self, queue: u16) {
        self.heard.note(format!("queue {queue} started"));
    }

    fn queue_stopping(&mut self, queue: u16) {
        self.heard.note(format!("queue {queue} stopping"));
    }

    fn queue_broke(&mut self, queue: u16, error: &RingError) {
        self.heard.note(format!("queue {queue} broke: {error}"));
    }

    fn config_written(&mut self, offset: u32, bytes: &[u8]) -> Result<(), String> {
        self.heard.note(format!("config {offset} {}", String::from_utf8_lossy(bytes)));
        Ok(())
    }

    fn device_reset(&mut self) {
        self.heard.note("reset");
    }

    fn begin_transfer(&mut self, direction: Direction, file: OwnedFd) -> Result<(), String> {
        let mut file = File::from(file);
        let mut state = Vec::new();
        match direction {
            Direction::Save => file.write_all(STATE).unwrap(),
            Direction::Load => drop(file.read_to_end(&mut state).unwrap()),
        }
        self.heard.note(format!("{direction:?} {}", String::from_utf8_lossy(&state)));
        self.transferred = true;
        self.wakeup.wake();
        Ok(())
    }

    fn transferred(&mut self) -> Option<Result<(), String>> {
        std::mem::take(&mut self.transferred).then_some(Ok(()))
    }
}

impl Reverse {
    fn serve(socket: UnixStream) -> Self {
        let events = Arc::new(EventLoop::new().unwrap());
        let (wakeup, heard, over) = (events.wakeup(), Heard::default(), Arc::new(AtomicBool::new(false)));
        let vrings: Arc<[_]> =
            (0..2).map(|index| Arc::new(Vring::new(index, 256, RingLimits::default(), events.wakeup()))).collect();
        let channel = Arc::new(Channel::new(events.clone()));
        let mut sizes = [0; 256];
        (sizes[0], sizes[7]) = (0x1000, 0x20_0000);
        let profile = Profile {
            has_config: true,
            extensions: ProtocolFeatures::SHARED_OBJECT | ProtocolFeatures::SHMEM,
            takes_gpu_socket: true,
            shared_memory: Arc::new(ShmemConfig::new(sizes)),
            ..Profile::default()
        };
        let config = Arc::new(ConfigSpace::new(CONFIGURATION.to_vec()));
        let mut session =
            Session::new(socket.into(), profile, vrings.clone(), config, channel.clone(), events.clone()).unwrap();
        let mut ears = Ears { heard: heard.clone(), wakeup: events.wakeup(), transferred: false };
        let (stop, answers) = (over.clone(), channel.clone());
        let thread = thread::spawn(move || {
            let mut happened = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                events.wait(Some(Duration::from_millis(500)), &mut happened).unwrap();
                for event in happened.drain(..) {
                    let outcome = match event {
                        backend::Event::Ready { token: Token::Session, .. } => session.on_ready(&mut ears),
                        backend::Event::Ready { token: Token::Queue(queue), .. } => {
                            session.on_kick(queue, &mut ears);
                            Ok(Flow::Continue)
                        }
                        backend::Event::Ready { token: Token::Channel, .. } => {
                            answers.on_ready();
                            Ok(Flow::Continue)
                        }
                        _ => Ok(Flow::Continue),
                    };
                    match outcome {
                        Ok(Flow::Continue) => {}
                        Ok(Flow::Ended) => return None,
                        Err(error) => return Some(error),
                    }
                }
                answers.settle();
                match session.resume(&mut ears) {
                    Ok(Flow::Continue) => {}
                    Ok(Flow::Ended) => return None,
                    Err(error) => return Some(error),
                }
                while session.next_ready().is_some() {}
                vrings.iter().for_each(|vring| reverse(vring));
            }
            None
        });
        Self { channel, heard, wakeup, over, thread: Some(thread) }
    }

    /// Wait for the end of the session. It must be a good one.
    fn finish(mut self) {
        let error = self.thread.take().unwrap().join().unwrap();
        assert!(error.is_none(), "{}", error.unwrap());
    }
}

impl Drop for Reverse {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.wakeup.wake();
        // Whoever panics already shows why.
        self.thread.take().map(JoinHandle::join);
    }
}

fn reverse(vring: &Vring) {
    let (mut chains, mut spare) = (Vec::new(), Vec::new());
    while let Taken::Chains(run) = vring.take(16, &mut chains, &mut spare) {
        while let Some(chain) = chains.pop() {
            let mut bytes = vec![0; chain.readable() as usize];
            // SAFETY: `run` holds the snapshot under which the chain was taken.
            unsafe { chain.read(0, &mut bytes) };
            bytes.reverse();
            // SAFETY: as above.
            let written = unsafe { chain.write(0, &bytes) } as u32;
            vring.complete(&run, &[Used { head: chain.head(), written }], &[chain]);
        }
    }
}

/// Their front-end, connected to our session, as far as where rings are set up.
fn their_front_end() -> (TheirFrontend, Reverse) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let device = Reverse::serve(ours);
    let mut front_end = TheirFrontend::from_stream(theirs, 2);
    front_end.set_owner().unwrap();
    assert_eq!(front_end.get_features().unwrap() & FEATURES, FEATURES);
    let offered = front_end.get_protocol_features().unwrap();
    front_end.set_features(FEATURES).unwrap();
    front_end.set_protocol_features(offered).unwrap();
    front_end.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(front_end.get_queue_num().unwrap(), 2);
    assert_eq!(device.heard.take(), [format!("features {FEATURES:#x}")]);
    (front_end, device)
}

fn describe(memory: &Memory) -> Vec<VhostUserMemoryRegionInfo> {
    let info =
        |(region, file): (vhost_user::protocol::Region, std::os::fd::BorrowedFd<'_>)| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.guest_address,
            memory_size: region.size,
            userspace_addr: region.user_address,
            mmap_offset: region.file_offset,
            mmap_handle: file.as_raw_fd(),
        };
    memory.regions().map(info).collect()
}

/// Ring addresses in guest memory, from 0 on; the request's buffers follow at `BUFFER`.
fn ring_at(queue: u64) -> VringConfigData {
    let base = Memory::user_address(queue * 0x2000);
    VringConfigData {
        queue_max_size: 256,
        queue_size: 16,
        flags: 0,
        desc_table_addr: base,
        avail_ring_addr: base + 0x400,
        used_ring_addr: base + 0x800,
        log_addr: None,
    }
}

/// Submit what is to be reversed, on queue 0 at `at`, and wait for the answer.
fn request(memory: &Memory, at: u16, kick: &EventFd, call: &EventFd) -> Vec<u8> {
    let data = format!("request {at}");
    let length = data.len() as u32;
    memory.write(BUFFER, data.as_bytes()).unwrap();
    let descriptor = |address: u64, flags: u16, next: u16| {
        [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    memory.write(0, &[descriptor(BUFFER, 1, 1), descriptor(BUFFER + 0x100, 2, 0)].concat()).unwrap();
    memory.write(0x400 + 4 + 2 * u64::from(at % 16), &0u16.to_le_bytes()).unwrap();
    memory.write(0x400 + 2, &(at + 1).to_le_bytes()).unwrap();
    kick.write(1).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while call.read().is_err() {
        assert!(Instant::now() < deadline, "the device did not answer");
        thread::sleep(Duration::from_millis(1));
    }
    let (mut index, mut answer) = ([0; 2], vec![0; data.len()]);
    memory.read(0x800 + 2, &mut index).unwrap();
    assert_eq!(u16::from_le_bytes(index), at + 1);
    memory.read(BUFFER + 0x100, &mut answer).unwrap();
    answer
}

/// The handles of a queue that their front-end has started.
fn start(front_end: &mut TheirFrontend, queue: usize, base: u16) -> (EventFd, EventFd, EventFd) {
    let [kick, call, error] = std::array::from_fn(|_| EventFd::new(EFD_NONBLOCK).unwrap());
    front_end.set_vring_num(queue, 16).unwrap();
    front_end.set_vring_addr(queue, &ring_at(queue as u64)).unwrap();
    front_end.set_vring_base(queue, base).unwrap();
    front_end.set_vring_call(queue, &call).unwrap();
    front_end.set_vring_err(queue, &error).unwrap();
    front_end.set_vring_kick(queue, &kick).unwrap();
    front_end.set_vring_enable(queue, true).unwrap();
    (kick, call, error)
}

#[test]
fn their_front_end_works_our_rings() {
    let (mut front_end, device) = their_front_end();
    let memory = Memory::with_layout(&[(0, 0x1_0000), (0x10_0000, 0x1_0000)]).unwrap();
    front_end.set_mem_table(&describe(&memory)).unwrap();

    let (kick, call, _error) = start(&mut front_end, 0, 0);
    let _other = start(&mut front_end, 1, 0);
    let answers: Vec<_> = (0..40).map(|at| request(&memory, at, &kick, &call)).collect();
    assert_eq!(answers[39], b"93 tseuqer");
    assert_eq!(front_end.get_vring_base(0).unwrap(), 40);
    assert_eq!(front_end.get_vring_base(1).unwrap(), 0);
    assert_eq!(device.heard.take(), ["queue 0 started", "queue 1 started", "queue 0 stopping", "queue 1 stopping"]);

    let (kick, call, _error) = start(&mut front_end, 0, 40);
    assert_eq!(request(&memory, 40, &kick, &call), b"04 tseuqer");
    front_end.reset_device().unwrap();
    front_end.reset_owner().unwrap();
    assert_eq!(device.heard.take(), ["queue 0 started", "queue 0 stopping", "reset"]);
    drop(front_end);
    device.finish();
}

#[test]
fn their_front_end_changes_memory_by_slots() {
    let (mut front_end, device) = their_front_end();
    let memory = Memory::with_layout(&[(0, 0x1_0000), (0x10_0000, 0x1_0000)]).unwrap();
    let regions = describe(&memory);

    assert_eq!(front_end.get_max_mem_slots().unwrap(), 509);
    front_end.add_mem_region(&regions[0]).unwrap();
    front_end.add_mem_region(&regions[1]).unwrap();
    let (kick, call, _error) = start(&mut front_end, 0, 0);
    front_end.remove_mem_region(&regions[1]).unwrap();
    assert_eq!(request(&memory, 0, &kick, &call), b"0 tseuqer");

    front_end.add_mem_region(&regions[0]).unwrap_err();
    assert_eq!(request(&memory, 1, &kick, &call), b"1 tseuqer", "a refused message has ended something");
    drop(front_end);
    device.finish();
}

#[test]
fn their_front_end_reads_and_writes_our_configuration() {
    let (mut front_end, device) = their_front_end();
    let (said, bytes) = front_end.get_config(6, 7, VhostUserConfigFlags::empty(), &[0; 7]).unwrap();
    let (offset, size) = (said.offset, said.size);
    assert_eq!((offset, size, &bytes[..]), (6, 7, &b"uration"[..]));
    front_end.set_config(3, VhostUserConfigFlags::WRITABLE, b"xyz").unwrap();
    assert_eq!(device.heard.take(), ["config 3 xyz"]);
    drop(front_end);
    device.finish();
}

#[test]
fn their_front_end_migrates_our_device() {
    let (mut front_end, device) = their_front_end();
    let memory = Memory::with_layout(&[(0, 0x1_0000)]).unwrap();
    front_end.set_mem_table(&describe(&memory)).unwrap();
    let mut map = File::from(rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    map.set_len(0x2000).unwrap();
    let marked = EventFd::new(EFD_NONBLOCK).unwrap();

    front_end.set_features(FEATURES | VirtioFeatures::LOG_ALL.0).unwrap();
    let region = VhostUserDirtyLogRegion { mmap_size: 0x1000, mmap_offset: 0x1000, mmap_handle: map.as_raw_fd() };
    front_end.set_log_base(0, Some(region)).unwrap();
    front_end.set_log_fd(marked.as_raw_fd()).unwrap();
    let (kick, call, _error) = start(&mut front_end, 0, 0);
    request(&memory, 0, &kick, &call);
    front_end.get_vring_base(0).unwrap();
    let marks = content(&mut map);
    assert_eq!((marks[0x1000], marks[0x1001]), (0, 1 << (BUFFER / 0x1000 - 8)), "the page of the answer alone");
    assert!(marked.read().is_ok());

    let mut state = file_with(b"");
    let end = OwnedFd::from(state.try_clone().unwrap());
    let own = front_end.set_device_state_fd(VhostTransferStateDirection::SAVE, VhostTransferStatePhase::STOPPED, end);
    assert!(own.unwrap().is_none());
    front_end.check_device_state().unwrap();
    assert_eq!(content(&mut state), STATE);
    state.rewind().unwrap();
    front_end
        .set_device_state_fd(VhostTransferStateDirection::LOAD, VhostTransferStatePhase::STOPPED, state.into())
        .unwrap();
    front_end.check_device_state().unwrap();
    let heard = device.heard.take();
    assert_eq!(heard[heard.len() - 2..], ["Save ".to_owned(), format!("Load {}", String::from_utf8_lossy(STATE))]);
    drop(front_end);
    device.finish();
}

#[test]
fn their_front_end_keeps_our_record_of_what_is_in_flight() {
    let (mut front_end, device) = their_front_end();
    let asked = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: 2, queue_size: 16 };
    let (record, file) = front_end.get_inflight_fd(&asked).unwrap();
    let (size, queues, entries) = (record.mmap_size, record.num_queues, record.queue_size);
    assert_eq!((queues, entries), (2, 16));
    assert!(file.metadata().unwrap().len() >= size);
    front_end.set_inflight_fd(&record, file.as_raw_fd()).unwrap();
    drop(front_end);
    device.finish();
}

#[derive(Default)]
struct TheirEars(Heard);

impl VhostUserFrontendReqHandlerMut for TheirEars {
    fn handle_config_change(&mut self) -> HandlerResult<u64> {
        self.0.note("config changed");
        Ok(0)
    }

    fn shared_object_add(&mut self, uuid: &VhostUserSharedMsg) -> HandlerResult<u64> {
        self.0.note(format!("add {}", String::from_utf8_lossy(uuid.as_slice())));
        Ok(0)
    }

    fn shared_object_remove(&mut self, uuid: &VhostUserSharedMsg) -> HandlerResult<u64> {
        self.0.note(format!("remove {}", String::from_utf8_lossy(uuid.as_slice())));
        Ok(0)
    }

    fn shmem_map(&mut self, asked: &VhostUserMMap, file: &dyn AsRawFd) -> HandlerResult<u64> {
        assert!(file.as_raw_fd() >= 0);
        self.0.note(format!("map {}", mapping(asked)));
        Ok(0)
    }

    fn shmem_unmap(&mut self, asked: &VhostUserMMap) -> HandlerResult<u64> {
        self.0.note(format!("unmap {}", mapping(asked)));
        Err(std::io::Error::from_raw_os_error(libc::EINVAL))
    }
}

fn mapping(asked: &VhostUserMMap) -> String {
    let (file, region, length, flags) = (asked.fd_offset, asked.shm_offset, asked.len, asked.flags);
    format!("{} {file:#x} {region:#x} {length:#x} {flags}", asked.shmid)
}

const MAP: ShmemMap =
    ShmemMap { region: 7, padding: [0; 7], file_offset: 0x3000, region_offset: 0x4000, size: 0x5000, flags: 1 };

#[test]
fn their_front_end_grants_what_our_device_asks_for() {
    let (mut front_end, device) = their_front_end();
    let shared = front_end.get_shmem_config().unwrap();
    assert_eq!((shared.nregions, shared.memory_sizes[0], shared.memory_sizes[7]), (2, 0x1000, 0x20_0000));

    let ears = TheirEars::default();
    let heard = ears.0.clone();
    let mut requests = FrontendReqHandler::new(Arc::new(Mutex::new(ears))).unwrap();
    requests.set_reply_ack_flag(true);
    front_end.set_backend_request_fd(&requests.get_tx_raw_fd()).unwrap();
    let memory = Memory::with_layout(&[(0, 0x1_0000)]).unwrap();
    front_end.set_mem_table(&describe(&memory)).unwrap();
    let _queue = start(&mut front_end, 0, 0);
    let serve = thread::spawn(move || (0..5).for_each(|_| drop(requests.handle_request())));

    let ask = |message, files| device.channel.ask(message, files, Instant::now() + PATIENCE);
    device.channel.config_changed();
    ask(BackendMessage::SharedObjectAdd(Uuid(OBJECT)), Vec::new()).unwrap();
    ask(BackendMessage::ShmemMap(MAP), vec![file_with(b"").into()]).unwrap();
    let refused = ask(BackendMessage::ShmemUnmap(MAP), Vec::new());
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    ask(BackendMessage::SharedObjectRemove(Uuid(OBJECT)), Vec::new()).unwrap();
    serve.join().unwrap();
    let map = "7 0x3000 0x4000 0x5000 1";
    let object = String::from_utf8_lossy(&OBJECT);
    assert_eq!(
        heard.take(),
        [
            "config changed".to_owned(),
            format!("add {object}"),
            format!("map {map}"),
            format!("unmap {map}"),
            format!("remove {object}"),
        ]
    );
    drop(front_end);
    device.finish();
}

#[test]
fn their_front_end_gets_our_shared_objects() {
    let (mut front_end, device) = their_front_end();
    let mut file = front_end.get_shared_object(&shared_message(OBJECT)).unwrap();
    assert_eq!(content(&mut file), b"object");
    front_end.get_shared_object(&shared_message(*b"something else..")).unwrap_err();
    // Nothing of the answers is left over.
    assert_eq!(front_end.get_queue_num().unwrap(), 2);
    drop(front_end);
    device.finish();
}

// Their back-end.

/// Notes what it is told.
#[derive(Default)]
struct TheirDevice {
    heard: Heard,
    requests: Arc<Mutex<Option<Backend>>>,
    /// Protocol features that it does not offer, of those that the crate knows.
    without: ProtocolFeatures,
}

impl TheirDevice {
    fn note(&self, what: impl Into<String>) -> TheirResult<()> {
        self.heard.note(what);
        Ok(())
    }
}

fn region(region: &VhostUserMemoryRegion) -> String {
    let (guest, size, user, offset) =
        (region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset);
    format!("{guest:#x} {size:#x} {user:#x} {offset:#x}")
}

impl VhostUserBackendReqHandlerMut for TheirDevice {
    fn set_owner(&mut self) -> TheirResult<()> {
        self.note("owner")
    }

    fn reset_owner(&mut self) -> TheirResult<()> {
        self.note("no owner")
    }

    fn reset_device(&mut self) -> TheirResult<()> {
        self.note("reset")
    }

    fn get_features(&mut self) -> TheirResult<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> TheirResult<()> {
        self.note(format!("features {features:#x}"))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _listening: Option<bool>,
    ) -> TheirResult<Option<Vec<u64>>> {
        assert_eq!(files.len(), regions.len());
        let regions: Vec<_> = regions.iter().map(region).collect();
        self.note(format!("table {}", regions.join(", "))).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> TheirResult<()> {
        self.note(format!("num {index} {num}"))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> TheirResult<()> {
        let flags = flags.bits();
        self.note(format!("addr {index} {flags} {descriptor:#x} {available:#x} {used:#x} {log:#x}"))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> TheirResult<()> {
        self.note(format!("base {index} {base}"))
    }

    fn get_vring_base(&mut self, index: u32) -> TheirResult<VhostUserVringState> {
        self.note(format!("base of {index}"))?;
        Ok(VhostUserVringState::new(index, 0x1234))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> TheirResult<()> {
        self.note(format!("kick {index} {}", file.is_some()))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> TheirResult<()> {
        self.note(format!("call {index} {}", file.is_some()))
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> TheirResult<()> {
        self.note(format!("err {index} {}", file.is_some()))
    }

    fn get_protocol_features(&mut self) -> TheirResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_truncate(!self.without.0))
    }

    fn set_protocol_features(&mut self, features: u64) -> TheirResult<()> {
        self.note(format!("protocol features {}", ProtocolFeatures(features)))
    }

    fn get_queue_num(&mut self) -> TheirResult<u64> {
        Ok(3)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> TheirResult<()> {
        self.note(format!("enable {index} {enable}"))
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> TheirResult<Vec<u8>> {
        let range = offset as usize..(offset + size) as usize;
        CONFIGURATION.get(range).map(<[u8]>::to_vec).ok_or(vhost::vhost_user::Error::InvalidParam)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], flags: VhostUserConfigFlags) -> TheirResult<()> {
        self.note(format!("config {offset} {} {}", String::from_utf8_lossy(bytes), flags.bits()))
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        backend.set_reply_ack_flag(true);
        backend.set_shared_object_flag(true);
        backend.set_shmem_flag(true);
        *self.requests.lock().unwrap() = Some(backend);
    }

    fn set_gpu_socket(&mut self, _screen: GpuBackend) -> TheirResult<()> {
        self.note("gpu socket")
    }

    fn get_shared_object(&mut self, uuid: VhostUserSharedMsg) -> TheirResult<File> {
        if uuid.as_slice() == OBJECT { Ok(file_with(b"object")) } else { Err(vhost::vhost_user::Error::InvalidParam) }
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> TheirResult<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        self.note(format!("inflight for {queues} of {size}"))?;
        Ok((VhostUserInflight { mmap_size: 0x2000, mmap_offset: 0x1000, ..*asked }, file_with(&[0; 0x3000])))
    }

    fn set_inflight_fd(&mut self, record: &VhostUserInflight, _file: File) -> TheirResult<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *record;
        self.note(format!("inflight {mmap_size:#x} {mmap_offset:#x} {num_queues} {queue_size}"))
    }

    fn get_max_mem_slots(&mut self) -> TheirResult<u64> {
        Ok(32)
    }

    fn add_mem_region(
        &mut self,
        added: &VhostUserSingleMemoryRegion,
        _file: File,
        _listening: Option<bool>,
    ) -> TheirResult<Option<u64>> {
        self.note(format!("add {}", region(added))).map(|()| None)
    }

    fn remove_mem_region(&mut self, removed: &VhostUserSingleMemoryRegion) -> TheirResult<()> {
        self.note(format!("remove {}", region(removed)))
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        mut file: File,
    ) -> TheirResult<Option<File>> {
        match direction {
            VhostTransferStateDirection::SAVE => file.write_all(STATE).unwrap(),
            VhostTransferStateDirection::LOAD => {
                let mut state = Vec::new();
                file.read_to_end(&mut state).unwrap();
                self.note(format!("load {}", String::from_utf8_lossy(&state)))?;
            }
        }
        Ok(None)
    }

    fn check_device_state(&mut self) -> TheirResult<()> {
        self.note("check")
    }

    fn get_shmem_config(&mut self) -> TheirResult<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(2, &[0x1000, 0, 0x20_0000]))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, _file: File) -> TheirResult<()> {
        let (size, offset) = (log.mmap_size, log.mmap_offset);
        self.note(format!("log {size:#x} {offset:#x}"))
    }
}

/// Our front-end, connected to their back-end, which lacks some protocol features.
fn our_front_end(without: ProtocolFeatures) -> (Arc<Frontend>, Heard, Arc<Mutex<Option<Backend>>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = TheirDevice { without, ..TheirDevice::default() };
    let (heard, requests) = (device.heard.clone(), device.requests.clone());
    let mut handler = BackendReqHandler::from_stream(theirs, Arc::new(Mutex::new(device)));
    // It ends with its socket.
    thread::spawn(move || while handler.handle_request().is_ok() {});
    let front_end = Arc::new(Frontend::new(ours.into(), PATIENCE).unwrap());
    let offer = front_end.handshake(Frontend::SUPPORTED).unwrap();
    assert_eq!((offer.features, offer.queues), (FEATURES, Some(3)));
    front_end.set_features(FEATURES).unwrap();
    let told = heard.take();
    assert_eq!(told.first().unwrap(), "owner");
    assert_eq!(told.last().unwrap(), &format!("features {FEATURES:#x}"));
    (front_end, heard, requests)
}

/// What their crate has no messages for.
const UNKNOWN: ProtocolFeatures = ProtocolFeatures(
    ProtocolFeatures::RARP.0
        | ProtocolFeatures::NET_MTU.0
        | ProtocolFeatures::CROSS_ENDIAN.0
        | ProtocolFeatures::CRYPTO_SESSION.0
        | ProtocolFeatures::PAGEFAULT.0
        | ProtocolFeatures::HOST_NOTIFIER.0
        | ProtocolFeatures::INBAND_NOTIFICATIONS.0
        | ProtocolFeatures::STATUS.0
        | ProtocolFeatures::XEN_MMAP.0
        | ProtocolFeatures::GET_VRING_BASE_INFLIGHT.0
        | ProtocolFeatures::GPA_ADDRESSES.0,
);

fn without(features: ProtocolFeatures) -> ProtocolFeatures {
    UNKNOWN | features
}

#[test]
fn our_front_end_sets_their_rings_up() {
    let (front_end, heard, _) = our_front_end(without(ProtocolFeatures::CONFIGURE_MEM_SLOTS));
    let memory = Arc::new(Memory::with_layout(&[(0, 0x1_0000), (0x10_0000, 0x2_0000)]).unwrap());
    front_end.share(std::slice::from_ref(&memory)).unwrap();
    let regions: Vec<_> = memory
        .regions()
        .map(|(it, _)| format!("{:#x} {:#x} {:#x} {:#x}", it.guest_address, it.size, it.user_address, it.file_offset))
        .collect();
    assert_eq!(heard.take(), [format!("table {}", regions.join(", "))]);

    let options = QueueOptions { size: 16, base: 5, indirect: true, big_endian: false };
    let queue = Queue::new(front_end.clone(), memory, 1, options).unwrap();
    queue.start().unwrap();
    assert_eq!(queue.stop().unwrap(), 0x1234);
    let at = queue.addresses();
    let mut told = heard.take();
    told.sort();
    assert_eq!(
        told,
        [
            format!("addr 1 0 {:#x} {:#x} {:#x} 0x0", at.descriptors, at.avail, at.used),
            "base 1 5".to_owned(),
            "base of 1".to_owned(),
            "call 1 true".to_owned(),
            "enable 1 false".to_owned(),
            "enable 1 true".to_owned(),
            "err 1 true".to_owned(),
            "kick 1 true".to_owned(),
            "num 1 16".to_owned(),
        ]
    );
    front_end.reset().unwrap();
    assert_eq!(heard.take(), ["reset"]);
}

#[test]
fn our_front_end_changes_their_memory_by_slots() {
    let (front_end, heard, _) = our_front_end(UNKNOWN);
    let memory = Arc::new(Memory::with_layout(&[(0x10_0000, 0x2_0000)]).unwrap());
    let (it, _) = memory.regions().next().unwrap();
    let region = format!("{:#x} {:#x} {:#x} {:#x}", it.guest_address, it.size, it.user_address, it.file_offset);
    front_end.share(std::slice::from_ref(&memory)).unwrap();
    front_end.share(&[]).unwrap();
    assert_eq!(heard.take(), [format!("add {region}"), format!("remove {region}")]);
}

#[test]
fn our_front_end_reads_and_writes_their_configuration() {
    let (front_end, heard, _) = our_front_end(UNKNOWN);
    assert_eq!(front_end.get_config(6, 7).unwrap(), b"uration");
    front_end.set_config(3, b"xyz").unwrap();
    assert_eq!(heard.take(), ["config 3 xyz 0"]);
    let refused = front_end.get_config(6, 100).unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    assert_eq!(front_end.get_config(0, 1).unwrap(), b"c", "a refused message has ended the session");
}

#[test]
fn our_front_end_migrates_their_device() {
    let (front_end, heard, _) = our_front_end(UNKNOWN);
    let log = DirtyLog::new(0x1_0000).unwrap();
    front_end.set_log(&log).unwrap();
    assert_eq!(heard.take(), ["log 0x2000 0x0"]);

    let mut state = file_with(b"");
    assert!(front_end.transfer_state(true, state.as_fd()).unwrap().is_none());
    front_end.check_state().unwrap();
    assert_eq!(content(&mut state), STATE);
    state.rewind().unwrap();
    assert!(front_end.transfer_state(false, state.as_fd()).unwrap().is_none());
    front_end.check_state().unwrap();
    assert_eq!(heard.take(), ["check", &format!("load {}", String::from_utf8_lossy(STATE)), "check"]);
}

#[test]
fn our_front_end_keeps_their_record_of_what_is_in_flight() {
    let (front_end, heard, _) = our_front_end(UNKNOWN);
    let record = front_end.get_inflight(2, 64).unwrap();
    front_end.set_inflight(&record).unwrap();
    assert_eq!(heard.take(), ["inflight for 2 of 64", "inflight 0x2000 0x1000 2 64"]);
}

#[test]
fn our_front_end_gets_their_shared_objects_and_gives_them_a_screen() {
    let (front_end, heard, _) = our_front_end(UNKNOWN);
    let mut file = File::from(front_end.get_shared_object(Uuid(OBJECT)).unwrap().unwrap());
    assert_eq!(content(&mut file), b"object");
    assert!(front_end.get_shared_object(Uuid([1; 16])).unwrap().is_none());
    let (screen, _other) = UnixStream::pair().unwrap();
    front_end.set_gpu_socket(screen.as_fd()).unwrap();
    assert_eq!(heard.take(), ["gpu socket"]);
}

#[test]
fn our_front_end_grants_what_their_device_asks_for() {
    let (front_end, _, requests) = our_front_end(UNKNOWN);
    assert_eq!(front_end.shared_memory(), [(0, 0x1000), (2, 0x20_0000)]);
    let backend = requests.lock().unwrap().clone().unwrap();
    let asks = thread::spawn(move || {
        let object = shared_message(OBJECT);
        let file = file_with(&[7; 0x3000]);
        let map =
            VhostUserMMap { shmid: 2, fd_offset: 0x1000, shm_offset: 0x4000, len: 0x2000, ..VhostUserMMap::default() };
        let outside = VhostUserMMap { shm_offset: 0x20_0000, ..map };
        let outcomes = [
            backend.shared_object_add(&object),
            backend.shared_object_remove(&object),
            backend.shared_object_remove(&object),
            backend.shmem_map(&map, &file),
            backend.shmem_map(&outside, &file),
        ];
        (outcomes.map(|outcome| outcome.is_ok()), backend, map)
    });
    let deadline = Instant::now() + PATIENCE;
    while !asks.is_finished() {
        assert!(Instant::now() < deadline, "a request is not answered");
        front_end.next_event(Instant::now() + Duration::from_millis(50)).unwrap();
    }
    let (outcomes, backend, map) = asks.join().unwrap();
    assert_eq!(outcomes, [true, true, false, true, false]);
    let mut bytes = [0; 4];
    front_end.read_shared_memory(2, 0x4000, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4]);

    let unmaps = thread::spawn(move || backend.shmem_unmap(&map).is_ok());
    while !unmaps.is_finished() {
        assert!(Instant::now() < deadline, "a request is not answered");
        front_end.next_event(Instant::now() + Duration::from_millis(50)).unwrap();
    }
    assert!(unmaps.join().unwrap());
    assert!(front_end.mappings(2).is_empty());
}

// A device on their rings.

/// Answers with what it was asked, backwards.
struct TheirReverse(GuestMemoryAtomic<GuestMemoryMmap>);

impl VhostUserBackendMut for TheirReverse {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        FEATURES | VirtioFeatures::EVENT_IDX.0
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        CONFIGURATION[offset as usize..][..size as usize].to_vec()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> std::io::Result<()> {
        self.0 = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> std::io::Result<()> {
        let memory = self.0.memory();
        let mut vring = vrings[usize::from(queue)].get_mut();
        while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(&*memory) {
            let head = chain.head_index();
            let (mut asked, mut written) = (Vec::new(), 0);
            for descriptor in chain {
                let mut piece = vec![0; descriptor.len() as usize];
                if descriptor.is_write_only() {
                    asked.reverse();
                    memory.write_slice(&asked, descriptor.addr()).map_err(std::io::Error::other)?;
                    written += asked.len() as u32;
                } else {
                    memory.read_slice(&mut piece, descriptor.addr()).map_err(std::io::Error::other)?;
                    asked.append(&mut piece);
                }
            }
            vring.add_used(head, written).map_err(std::io::Error::other)?;
        }
        vring.signal_used_queue()
    }
}

#[test]
fn our_driver_works_their_rings() {
    let folder = std::env::temp_dir().join(format!("vhost-user-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("socket");
    let mut listener = vhost::vhost_user::Listener::new(&path, true).unwrap();
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let device = Arc::new(RwLock::new(TheirReverse(memory.clone())));
    let mut daemon = VhostUserDaemon::new("reverse".to_owned(), device, memory).unwrap();
    let connecting = thread::spawn({
        let path = path.clone();
        move || UnixStream::connect(path).unwrap()
    });
    daemon.start(&mut listener).unwrap();
    let socket = connecting.join().unwrap();

    let front_end = Arc::new(Frontend::new(socket.into(), PATIENCE).unwrap());
    let offer = front_end.handshake(Frontend::SUPPORTED).unwrap();
    assert_eq!(offer.queues, Some(2));
    front_end.set_features(offer.features & !VirtioFeatures::LOG_ALL.0).unwrap();
    assert_eq!(front_end.get_config(0, 6).unwrap(), b"config");
    let memory = Arc::new(Memory::with_layout(&[(0, 0x10_0000), (0x20_0000, 0x10_0000)]).unwrap());
    front_end.share(std::slice::from_ref(&memory)).unwrap();
    for (index, indirect) in [(0, false), (1, true)] {
        let options = QueueOptions { size: 16, base: 0, indirect, big_endian: false };
        let queue = Queue::new(front_end.clone(), memory.clone(), index, options).unwrap();
        queue.start().unwrap();
        for at in 0..100 {
            let asked = format!("request {at}");
            let token = queue.submit(&[b"re", &asked.as_bytes()[2..]], &[asked.len()]).unwrap();
            queue.kick().unwrap();
            let completion = queue.wait(Some(token), Instant::now() + PATIENCE).unwrap();
            assert_eq!(completion.data, asked.bytes().rev().collect::<Vec<_>>());
        }
        assert_eq!(queue.stop().unwrap(), 100);
    }
    front_end.close();
    // They report the end of a connection as an error.
    let _ = daemon.wait();
    std::fs::remove_dir_all(&folder).unwrap();
}
