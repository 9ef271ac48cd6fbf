//! One queue: a ring, its notifications, and the requests that are under way.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, write};

use super::memory::Allocation;
use super::session::InBand;
use super::{Frontend, Memory, lock};
use crate::error::{Error, RingError};
use crate::memory::Snapshot;
use crate::process::Process;
use crate::protocol::{FrontendMessage, ProtocolFeatures, VirtioFeatures, VringAddress, VringDescriptor, VringState};
use crate::virtqueue::{
    Big, Driver, Element, Indirect, Little, MAX_QUEUE_SIZE, PackedDriver, RingAddresses, RingOptions, SplitDriver, Used,
};

/// Parts of a request begin at multiples of their size, as far as somebody might care: a page, for direct I/O.
const MAX_ALIGNMENT: usize = 4096;
const MIN_ALIGNMENT: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueOptions {
    /// Descriptors: a power of two up to 32768; with RING_PACKED any number up to that.
    pub size: u16,
    /// Where to start: the word of SET_VRING_BASE.
    pub base: u32,
    /// Put requests of several parts into indirect tables, if that was negotiated.
    pub indirect: bool,
    /// Lay the ring out as a legacy driver on a big-endian machine does. Needs CROSS_ENDIAN, and no VERSION_1.
    pub big_endian: bool,
}

/// A ring in the format that was negotiated.
#[derive(Debug)]
pub(super) enum AnyDriver {
    Split(SplitDriver<Little>),
    BigEndian(SplitDriver<Big>),
    Packed(PackedDriver),
}

/// Work on a ring in any format.
macro_rules! on_driver {
    ($driver:expr, $name:ident => $work:expr) => {
        match $driver {
            AnyDriver::Split($name) => $work,
            AnyDriver::BigEndian($name) => $work,
            AnyDriver::Packed($name) => $work,
        }
    };
}
pub(super) use on_driver;

/// A request that the device is done with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What `submit` returned.
    pub token: u64,
    /// How many bytes the device says it wrote, from the start of the writable parts on: these.
    pub data: Vec<u8>,
}

/// The driver's end of one queue. Any number of threads may submit and wait.
///
/// Drop it after the device was reset or the queue stopped: its memory is free again then.
#[derive(Debug)]
pub struct Queue {
    process: Process,
    /// The session of today: a queue may outlive it.
    frontend: Mutex<Arc<Frontend>>,
    memory: Arc<Memory>,
    index: u8,
    addresses: RingAddresses,
    /// What an address that the device gets has more than the guest address of the same byte.
    device_offset: u64,
    /// Whether requests of several parts go into indirect tables.
    indirect: bool,
    big_endian: bool,
    /// Whether notifications are messages.
    in_band: bool,
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
    /// Whether the device is to log what it writes to the ring.
    logged: AtomicBool,
    state: Mutex<State>,
    /// Somebody looked at what the device gave back, or stopped waiting for it.
    looked: Condvar,
}

#[derive(Debug)]
struct State {
    ring: AnyDriver,
    /// Where the ring is.
    _memory: Allocation,
    /// By the descriptor that the chain begins with.
    requests: Box<[Request]>,
    /// Memory of former requests. Most workloads repeat a few sizes, and then nothing is allocated.
    spare: Vec<Allocation>,
    /// Room for the elements of the next request.
    elements: Vec<Element>,
    next_token: u64,
    done: VecDeque<Completion>,
    broken: Option<RingError>,
    /// A thread waits for the device; the others wait for that thread.
    waiting: bool,
    /// How many those others are. To notify nobody is a system call, too.
    others: usize,
}

#[derive(Debug, Default)]
struct Request {
    token: u64,
    /// Nobody knows the token.
    abandoned: bool,
    buffer: Option<Allocation>,
    /// The parts, as they are in `buffer`.
    elements: Vec<Element>,
}

impl Queue {
    /// Make a queue in `memory`, which has to be shared before [`start`](Self::start).
    pub fn new(frontend: Arc<Frontend>, memory: Arc<Memory>, index: u8, options: QueueOptions) -> Result<Self, Error> {
        let QueueOptions { size, base, indirect, big_endian } = options;
        let in_band = frontend.is_in_band();
        let features = frontend.features();
        let ring_options = RingOptions {
            packed: features.contains(VirtioFeatures::RING_PACKED),
            in_order: features.contains(VirtioFeatures::IN_ORDER),
            event_idx: features.contains(VirtioFeatures::EVENT_IDX),
            indirect: features.contains(VirtioFeatures::INDIRECT_DESC),
            big_endian,
        };
        if big_endian && (features.contains(VirtioFeatures::VERSION_1) || ring_options.packed) {
            return Err(Error::State(format!(
                "queue {index} cannot be big-endian: only legacy drivers have such rings; negotiate neither VERSION_1 nor \
                 RING_PACKED"
            )));
        }
        let tells_order = frontend.protocol_features().contains(ProtocolFeatures::CROSS_ENDIAN);
        if big_endian && !tells_order {
            return Err(Error::State(format!(
                "queue {index} cannot be big-endian: the back-end did not offer CROSS_ENDIAN, or it was not negotiated"
            )));
        }
        if size == 0 || size > MAX_QUEUE_SIZE || !size.is_power_of_two() && !ring_options.packed {
            let wants = if ring_options.packed { "packed ring needs 1" } else { "split ring needs a power of two up" };
            return Err(Error::State(format!(
                "queue {index} cannot have {size} entries; a {wants} to {MAX_QUEUE_SIZE}"
            )));
        }
        let entries = u64::from(size);
        let avail = 16 * entries;
        let (used, end) = if ring_options.packed {
            (avail + 4, avail + 8)
        } else {
            let used = (avail + 6 + 2 * entries).next_multiple_of(4);
            (used, used + 6 + 8 * entries)
        };
        let ring_memory = memory.allocate(end, MAX_ALIGNMENT as u64)?;
        let start = frontend.ring_address(ring_memory.address());
        let addresses = RingAddresses { descriptors: start, avail: start + avail, used: start + used };
        let ring = AnyDriver::new(addresses, size, base, ring_options, frontend.view(&memory))
            .map_err(|reason| Error::Ring { queue: index.into(), reason })?;
        let event =
            || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::os("making an eventfd"));
        Ok(Self {
            process: Process::current(),
            device_offset: frontend.device_offset(),
            frontend: Mutex::new(frontend),
            memory,
            index,
            addresses,
            indirect: indirect && ring_options.indirect,
            big_endian,
            in_band,
            kick: event()?,
            call: event()?,
            error: event()?,
            logged: AtomicBool::new(false),
            state: Mutex::new(State {
                ring,
                _memory: ring_memory,
                requests: (0..size).map(|_| Request::default()).collect(),
                spare: Vec::new(),
                elements: Vec::new(),
                next_token: 0,
                done: VecDeque::new(),
                broken: None,
                waiting: false,
                others: 0,
            }),
            looked: Condvar::new(),
        })
    }

    /// Set the ring up, and let the device work on it: from where it stopped, or from the base.
    pub fn start(&self) -> Result<(), Error> {
        let index = u32::from(self.index);
        let (size, base) = {
            let state = lock(&self.state);
            (state.ring.size(), state.ring.base())
        };
        let with = VringDescriptor::new(self.index, true);
        let frontend = self.frontend();
        let tell = |message, descriptors: &[_]| frontend.tell(&message, descriptors);
        tell(FrontendMessage::SetVringNum(VringState { index, num: size.into() }), &[])?;
        tell(FrontendMessage::SetVringBase(VringState { index, num: base }), &[])?;
        if self.big_endian {
            tell(FrontendMessage::SetVringEndian(VringState { index, num: 1 }), &[])?;
        }
        self.set_addresses()?;
        if self.in_band {
            let again = |event: &OwnedFd| {
                event.try_clone().map_err(|source| Error::Os { context: "dup of an eventfd".to_owned(), source })
            };
            frontend.listen_in_band(self.index, InBand { call: again(&self.call)?, error: again(&self.error)? });
        } else {
            tell(FrontendMessage::SetVringCall(with), &[self.call.as_fd()])?;
            tell(FrontendMessage::SetVringErr(with), &[self.error.as_fd()])?;
            tell(FrontendMessage::SetVringKick(with), &[self.kick.as_fd()])?;
        }
        // It starts the ring in-band, and with older back-ends.
        self.kick()?;
        if frontend.features().contains(VirtioFeatures::PROTOCOL_FEATURES) { self.enable(true) } else { Ok(()) }
    }

    /// Let the device mark pages that it writes to as it works on the ring, or not. It may run.
    pub fn log_used(&self, on: bool) -> Result<(), Error> {
        self.logged.store(on, Ordering::Relaxed);
        self.set_addresses()
    }

    fn set_addresses(&self) -> Result<(), Error> {
        let frontend = self.frontend();
        let RingAddresses { descriptors, avail, used } = self.addresses;
        let logged = self.logged.load(Ordering::Relaxed);
        let (flags, log) = if logged { (VringAddress::LOG_USED, used - frontend.ring_address(0)) } else { (0, 0) };
        let [descriptors, avail, used] = [descriptors, avail, used].map(|address| frontend.told_ring_address(address));
        let address = VringAddress { index: self.index.into(), flags, descriptors, used, avail, log };
        frontend.tell(&FrontendMessage::SetVringAddr(address), &[])
    }

    /// Let the device work on the ring, or not. Only a session with protocol features has this.
    pub fn enable(&self, enable: bool) -> Result<(), Error> {
        let state = VringState { index: self.index.into(), num: enable.into() };
        self.frontend().tell(&FrontendMessage::SetVringEnable(state), &[])
    }

    /// Take the ring away from the device, which completes what it has taken first. Returns the base: where it would go
    /// on, and where [`start`](Self::start) lets it.
    pub fn stop(&self) -> Result<u32, Error> {
        if self.frontend().features().contains(VirtioFeatures::PROTOCOL_FEATURES) {
            self.enable(false)?;
        }
        self.ask_base(FrontendMessage::GetVringBase)
    }

    /// The same at once: what the device has taken stays in the in-flight record, and it takes that again when the queue
    /// is started.
    pub fn suspend(&self) -> Result<u32, Error> {
        self.ask_base(FrontendMessage::GetVringBaseSkipDrain)
    }

    fn ask_base(&self, message: fn(VringState) -> FrontendMessage) -> Result<u32, Error> {
        let frontend = self.frontend();
        let message = message(VringState { index: self.index.into(), num: 0 });
        let answer: VringState = frontend.ask(&message)?;
        if answer.index != u32::from(self.index) {
            let (asked, came) = (self.index, answer.index);
            return Err(frontend.give_up(&message, &format!("asked about queue {asked}, was told of {came}")));
        }
        Ok(answer.num)
    }

    /// Notify the device, whether it wants that or not. In-band, this waits for its acknowledgement.
    pub fn kick(&self) -> Result<(), Error> {
        if self.in_band {
            let state = VringState { index: self.index.into(), num: 0 };
            return self.frontend().tell(&FrontendMessage::VringKick(state), &[]);
        }
        self.check_process()?;
        signal(&self.kick);
        Ok(())
    }

    /// Whether notifications are messages: then a kick waits for the device.
    #[must_use]
    pub fn is_in_band(&self) -> bool {
        self.in_band
    }

    /// Submit a request, and kick the device if it wants to be. Returns the token that its completion will carry.
    ///
    /// `readable` is what the device gets, `writable` the sizes of what it may fill. Parts of no bytes are left out.
    ///
    /// In-band the kick may fail, when the request is in the ring already: the device may do it, and nobody hears of that.
    pub fn submit(&self, readable: &[&[u8]], writable: &[usize]) -> Result<u64, Error> {
        let mut state = self.state()?;
        let token = self.add(&mut state, readable, writable)?;
        let kick = state.ring.publish();
        drop(state);
        if kick {
            self.kick().inspect_err(|_| self.abandon(token))?;
        }
        Ok(token)
    }

    /// A completion, if there is one: that of `token`, or whichever came first.
    pub fn poll(&self, token: Option<u64>) -> Result<Option<Completion>, Error> {
        self.take(&mut *self.state()?, token)
    }

    /// A completion, waiting for it until `deadline`.
    pub fn wait(&self, token: Option<u64>, deadline: Instant) -> Result<Completion, Error> {
        let mut state = self.state()?;
        loop {
            if let Some(completion) = self.take(&mut state, token)? {
                return Ok(completion);
            }
            if let Some(token) = token {
                self.check_under_way(&state, token)?;
            }
            state = self.wait_once(state, deadline)?;
        }
    }

    /// Ask for a notification on [`call_descriptor`](Self::call_descriptor), for those who wait there themselves.
    /// Returns whether something came that [`poll`](Self::poll) should look at first.
    pub fn arm(&self) -> Result<bool, Error> {
        // It may not have been notified at all.
        let mut state = self.state()?;
        let _ = read(&self.call, &mut [0; 8]);
        let came = self.on_ring(&mut state, |ring| ring.enable_calls(1))?;
        Ok(came || !state.done.is_empty())
    }

    #[must_use]
    pub fn call_descriptor(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    #[must_use]
    pub fn frontend(&self) -> Arc<Frontend> {
        Arc::clone(&lock(&self.frontend))
    }

    /// Go on in another session, with the requests that are under way: to be followed by [`start`](Self::start).
    ///
    /// The memory has to be shared there, and the same features agreed on.
    pub fn move_to(&self, frontend: Arc<Frontend>) {
        *lock(&self.frontend) = frontend;
    }

    /// Where the ring is: in user addresses, or with an IOMMU in I/O addresses.
    #[must_use]
    pub fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Requests that the device has not given back.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        lock(&self.state).ring.outstanding()
    }

    /// Work on the ring itself, for those who keep account of their requests: such a queue is not submitted to.
    pub(super) fn with_ring<T>(&self, work: impl FnOnce(&mut AnyDriver) -> Result<T, RingError>) -> Result<T, Error> {
        self.on_ring(&mut *self.state()?, work)
    }

    /// Likewise, wait for the device to complete something, until `deadline`: it need not have.
    pub(super) fn wait_for_call(&self, deadline: Instant) -> Result<(), Error> {
        match self.wait_once(self.state()?, deadline) {
            Ok(_) | Err(Error::Timeout(_)) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Let `epoll` report as `token` what [`wait_for_call`](Self::wait_for_call) serves beside calls.
    pub(super) fn watch_other(&self, epoll: &OwnedFd, token: EventData) -> Result<(), Errno> {
        epoll::add(epoll, &self.error, token, EventFlags::IN)?;
        self.frontend().watch(epoll, token)
    }

    /// By which address the device knows memory.
    pub(super) fn device_address(&self, buffer: &Allocation) -> u64 {
        buffer.address() + self.device_offset
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        lock(&self.state).ring.size()
    }

    /// Whether requests of several parts go into indirect tables.
    #[must_use]
    pub fn indirect(&self) -> bool {
        self.indirect
    }

    fn check_process(&self) -> Result<(), Error> {
        if self.process.is_current() { Ok(()) } else { Err(Error::AnotherProcess("the connection to the device")) }
    }

    /// The ring, which a forked child leaves to its parent.
    fn state(&self) -> Result<MutexGuard<'_, State>, Error> {
        self.check_process()?;
        Ok(lock(&self.state))
    }

    fn add(&self, state: &mut State, readable: &[&[u8]], writable: &[usize]) -> Result<u64, Error> {
        let parts = || readable.iter().map(|part| part.len()).chain(writable.iter().copied()).filter(|part| *part > 0);
        let count = parts().count();
        if count == 0 {
            return Err(Error::State(format!(
                "queue {}: a request needs at least one byte, of either kind",
                self.index
            )));
        }
        let indirect = self.indirect && count > 1;
        let needed = if indirect { 1 } else { count };
        if needed > usize::from(state.ring.free()) {
            self.look(state)?;
        }
        if needed > usize::from(state.ring.free()) {
            let (index, free, size) = (self.index, state.ring.free(), state.ring.size());
            return Err(Error::State(format!(
                "queue {index}: a request of {needed} descriptors does not fit; {free} of {size} are free"
            )));
        }
        let table = if indirect { 16 * count } else { 0 };
        let end = parts().try_fold(table, |end, part| {
            u32::try_from(part).ok()?;
            place(end, part).checked_add(part)
        });
        let bytes = end.ok_or_else(|| Error::State(format!("queue {}: the request is too large", self.index)))?;
        let buffer = self.buffer(state, bytes)?;

        let head_of_buffer = self.device_address(&buffer);
        let mut elements = std::mem::take(&mut state.elements);
        elements.clear();
        let mut end = table;
        let sources = readable.iter().map(|part| (part.len(), Some(*part)));
        for (length, source) in sources.chain(writable.iter().map(|length| (*length, None))).filter(|part| part.0 > 0) {
            let start = place(end, length);
            end = start + length;
            if let Some(bytes) = source {
                buffer.write(start, bytes);
            }
            let address = head_of_buffer + start as u64;
            elements.push(Element { address, length: length as u32, writable: source.is_none() });
        }
        let indirect = indirect.then_some(Indirect { table: head_of_buffer, direct: 0 });
        let head = self.on_ring(state, |ring| ring.add(&elements, indirect))?;
        let token = state.next_token;
        state.next_token += 1;
        let request = Request { token, abandoned: false, buffer: Some(buffer), elements };
        state.elements = std::mem::replace(&mut state.requests[usize::from(head)], request).elements;
        Ok(token)
    }

    /// Never tell of a request that nobody knows of.
    fn abandon(&self, token: u64) {
        let mut state = lock(&self.state);
        state.done.retain(|completion| completion.token != token);
        let under_way = state.requests.iter_mut().find(|request| request.buffer.is_some() && request.token == token);
        if let Some(request) = under_way {
            request.abandoned = true;
        }
    }

    /// Memory for a request: what an earlier one had, or new.
    fn buffer(&self, state: &mut State, bytes: usize) -> Result<Allocation, Error> {
        if let Some(at) = state.spare.iter().rposition(|spare| spare.len() >= bytes) {
            return Ok(state.spare.swap_remove(at));
        }
        let alignment = bytes.next_power_of_two().min(MAX_ALIGNMENT) as u64;
        self.memory.allocate(bytes as u64, alignment).or_else(|_| {
            state.spare.clear();
            self.memory.allocate(bytes as u64, alignment)
        })
    }

    /// Take over what the device gave back.
    fn look(&self, state: &mut State) -> Result<(), Error> {
        loop {
            let Some(used) = self.on_ring(state, AnyDriver::pop)? else { return Ok(()) };
            let request = &mut state.requests[usize::from(used.head)];
            let mut data = Vec::with_capacity(used.written as usize);
            if let Some(buffer) = request.buffer.take() {
                for part in request.elements.iter().filter(|part| part.writable) {
                    let length = (part.length as usize).min(used.written as usize - data.len());
                    buffer.read((part.address - self.device_address(&buffer)) as usize, length, &mut data);
                }
                state.spare.push(buffer);
            }
            if !request.abandoned {
                state.done.push_back(Completion { token: request.token, data });
            }
        }
    }

    fn take(&self, state: &mut State, token: Option<u64>) -> Result<Option<Completion>, Error> {
        let looked = self.look(state);
        let at = match token {
            Some(token) => state.done.iter().position(|completion| completion.token == token),
            None => Some(0),
        };
        match at.and_then(|at| state.done.remove(at)) {
            Some(completion) => Ok(Some(completion)),
            None => looked.map(|()| None),
        }
    }

    /// A ring that broke stays broken.
    fn on_ring<T>(
        &self,
        state: &mut State,
        work: impl FnOnce(&mut AnyDriver) -> Result<T, RingError>,
    ) -> Result<T, Error> {
        let result = match &state.broken {
            Some(reason) => Err(reason.clone()),
            None => work(&mut state.ring),
        };
        result.map_err(|reason| {
            state.broken.get_or_insert_with(|| reason.clone());
            Error::Ring { queue: self.index.into(), reason }
        })
    }

    /// Nobody should wait for what cannot come.
    fn check_under_way(&self, state: &State, token: u64) -> Result<(), Error> {
        if state.requests.iter().any(|request| request.buffer.is_some() && request.token == token) {
            return Ok(());
        }
        Err(Error::State(format!("queue {}: there is no request {token} to wait for", self.index)))
    }

    /// Wait for the device to notify, or for the thread that does.
    fn wait_once<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        deadline: Instant,
    ) -> Result<MutexGuard<'a, State>, Error> {
        if state.waiting {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late());
            }
            state.others += 1;
            let mut state = self.looked.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.others -= 1;
            return Ok(state);
        }
        if self.on_ring(&mut state, |ring| ring.enable_calls(1))? {
            return Ok(state);
        }
        state.waiting = true;
        drop(state);
        let outcome = self.frontend().wait([self.call.as_fd(), self.error.as_fd()], deadline);
        let mut state = lock(&self.state);
        state.waiting = false;
        state.ring.disable_calls();
        if state.others > 0 {
            self.looked.notify_all();
        }
        match outcome {
            Ok([_, broken]) => {
                // Either may not have been the one that was signalled.
                let _ = read(&self.call, &mut [0; 8]);
                if broken {
                    // What was done before counts.
                    let _ = self.look(&mut state);
                    state.broken.get_or_insert(RingError::ReportedBroken);
                }
                Ok(state)
            }
            Err(Error::Timeout(_)) => Err(self.late()),
            Err(Error::Closed(text)) => Err(Error::Closed(format!("queue {}: {text}", self.index))),
            Err(other) => Err(other),
        }
    }

    fn late(&self) -> Error {
        Error::Timeout(format!("queue {}: the device did not complete the request in time", self.index))
    }
}

impl AnyDriver {
    fn new(
        addresses: RingAddresses,
        size: u16,
        base: u32,
        options: RingOptions,
        snapshot: Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        Ok(if options.packed {
            Self::Packed(PackedDriver::new(addresses, size, base, options, snapshot)?)
        } else if options.big_endian {
            Self::BigEndian(SplitDriver::new(addresses, size, base, options, snapshot)?)
        } else {
            Self::Split(SplitDriver::new(addresses, size, base, options, snapshot)?)
        })
    }

    fn size(&self) -> u16 {
        on_driver!(self, ring => ring.size())
    }

    fn free(&self) -> u16 {
        on_driver!(self, ring => ring.free())
    }

    fn outstanding(&self) -> u16 {
        on_driver!(self, ring => ring.outstanding())
    }

    fn base(&self) -> u32 {
        on_driver!(self, ring => ring.base())
    }

    fn add(&mut self, elements: &[Element], indirect: Option<Indirect>) -> Result<u16, RingError> {
        on_driver!(self, ring => ring.add(elements, indirect))
    }

    pub(super) fn publish(&mut self) -> bool {
        on_driver!(self, ring => ring.publish())
    }

    fn pop(&mut self) -> Result<Option<Used>, RingError> {
        on_driver!(self, ring => ring.pop())
    }

    pub(super) fn disable_calls(&mut self) {
        on_driver!(self, ring => ring.disable_calls());
    }

    pub(super) fn enable_calls(&mut self, count: u16) -> Result<bool, RingError> {
        on_driver!(self, ring => ring.enable_calls(count))
    }
}

/// Where a part of `length` bytes begins that comes after `end`.
pub(super) fn place(end: usize, length: usize) -> usize {
    end.next_multiple_of(length.next_power_of_two().clamp(MIN_ALIGNMENT, MAX_ALIGNMENT))
}

/// The counter of an eventfd that nobody reads is full at some time: then it is signalled in any case.
fn signal(event: &OwnedFd) {
    let _ = write(event, &1u64.to_ne_bytes());
}
