//! One queue of a device, across connections.
//!
//! Owns: the ring's state, what the front-end configured, requests in flight, statistics. A lock is held while chains
//! are taken or given back, a batch at a time; never while a request is processed, and never while anything is logged.
//!
//! vhost-user specification, "Ring states".

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::channel::{Channel, Notification};
use super::event_loop::{EventLoop, Wakeup};
use super::notification::{Call, Kick, Kicked};
use super::translation::Translation;
use crate::error::RingError;
use crate::memory::{DirtyLog, IovaRange, Snapshot};
use crate::process::Process;
use crate::virtqueue::{
    Big, Chain, InflightSlot, Little, PackedRing, Ring, RingAddresses, RingLimits, RingOptions, RingPointers,
    SplitRing, Used, Written,
};

/// Counters of one queue, since the device was made. Those of requests, bytes and kicks change under the ring's lock.
#[derive(Debug, Default)]
pub struct Statistics {
    pub requests: AtomicU64,
    /// Bytes that drivers offered to be read, and bytes that the device wrote.
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
    pub kicks: AtomicU64,
    pub calls: AtomicU64,
    pub calls_suppressed: AtomicU64,
    /// Requests whose handler failed, and rings that broke.
    pub errors: AtomicU64,
    /// How often the front-end was asked where an I/O address is.
    pub iotlb_misses: AtomicU64,
    /// How often it took some back.
    pub iotlb_invalidations: AtomicU64,
}

/// One life of a ring: from its start, or a change of memory, to the next. A request keeps the one it came from.
#[derive(Debug)]
pub struct Run {
    /// Keeps the memory of the request mapped.
    pub snapshot: Arc<Snapshot>,
    generation: u64,
}

/// The outcome of [`Vring::take`].
#[derive(Debug)]
pub enum Taken {
    /// Chains were appended, and this is the run that they belong to.
    Chains(Arc<Run>),
    /// There is nothing now; the driver was asked to kick, or the front-end where something is.
    Nothing,
    /// The ring does not run: it is stopped, disabled, being stopped, or broken.
    NotRunning,
    /// The ring broke just now.
    Broken(RingError),
}

/// The outcome of [`Vring::fill`].
#[derive(Debug)]
pub struct Filled {
    /// Chains that were filled.
    pub count: usize,
    /// The ring broke just now.
    pub broken: Option<RingError>,
}

/// What a vring is doing, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VringStatus {
    Stopped,
    Disabled,
    Running,
    Broken,
}

#[derive(Debug)]
enum State {
    /// Not touching the ring. The next start begins at `base`, the word of SET_VRING_BASE.
    Stopped {
        base: u32,
    },
    Running {
        ring: AnyRing,
        run: Arc<Run>,
    },
    Broken {
        base: u32,
    },
}

/// A ring in one of the formats.
#[derive(Debug)]
enum AnyRing {
    Split(Box<SplitRing<Little>>),
    BigEndian(Box<SplitRing<Big>>),
    Packed(Box<PackedRing>),
}

/// Work on a ring in any format: the one place where they part, once per batch.
macro_rules! on_ring {
    ($ring:expr, $name:ident => $work:expr) => {
        match $ring {
            AnyRing::Split($name) => $work,
            AnyRing::BigEndian($name) => $work,
            AnyRing::Packed($name) => $work,
        }
    };
}

/// What a front-end that migrates the guest wants to know, and where.
#[derive(Clone, Debug, Default)]
pub struct Logging {
    pub(super) log: Option<Arc<DirtyLog>>,
    /// LOG_ALL: what is written to buffers.
    pub(super) buffers: bool,
    /// Told of marks.
    pub(super) call: Option<Arc<Call>>,
}

impl Logging {
    /// Mark what the device may have written to `chains`. Their used entries are not published yet.
    fn mark_buffers(&self, memory: &Snapshot, chains: &[Chain]) -> Marked {
        let Some(log) = self.log.as_ref().filter(|_| self.buffers) else { return Marked::default() };
        let mut marked = Marked::default();
        for chain in chains.iter().filter(|chain| chain.writable() > 0) {
            log.mark_segments(memory, chain.writable_segments());
            marked = Marked(self.call.clone());
        }
        marked
    }

    /// Mark what was written to a ring whose used part is logged at the guest address `used`.
    fn mark_ring(&self, used: Option<u64>, ring: &AnyRing, pieces: &[Written]) -> Marked {
        let (Some(log), Some(used)) = (&self.log, used) else { return Marked::default() };
        for piece in pieces {
            on_ring!(ring, ring => ring.guest_ranges(*piece, used, &mut |address, length| log.mark(address, length)));
        }
        Marked(self.call.clone())
    }

    /// Mark all of a ring: who had it before may have been killed between a store and its mark.
    fn mark_whole_ring(&self, used: Option<u64>, ring: &AnyRing) -> Marked {
        self.mark_ring(used, ring, &on_ring!(ring, ring => ring.whole()))
    }
}

/// Who is to be told of marks, if there are any, after the ring's lock is released.
#[derive(Debug, Default)]
#[must_use]
struct Marked(Option<Arc<Call>>);

impl Marked {
    fn tell(self) {
        if let Some(call) = self.0 {
            call.signal();
        }
    }
}

#[derive(Debug)]
enum KickSource {
    Descriptor(Kick),
    /// The front-end gave no descriptor: the ring has to be looked at.
    Poll,
    /// VRING_KICK tells.
    InBand,
}

#[derive(Debug)]
struct Inner {
    max_size: u16,
    /// Unknown until SET_VRING_NUM, which may come last.
    size: Option<u16>,
    addresses: Option<RingAddresses>,
    /// The guest address at which writes to the used ring are logged, if they are.
    used_log: Option<u64>,
    logging: Logging,
    options: RingOptions,
    limits: RingLimits,
    /// Where the ring has its in-flight record, if the front-end gave memory for one.
    record: Option<InflightSlot>,
    /// A ring with a source of kicks is started, in the specification's words.
    kick: Option<KickSource>,
    call: Option<Arc<Call>>,
    error: Option<Arc<Call>>,
    /// What is used for lack of a descriptor, if that was negotiated: for calls, and for errors.
    in_band: Option<(Arc<Call>, Arc<Call>)>,
    enabled: bool,
    /// The front-end may be gone without having said so: nothing is touched until it kicks or sets up the ring.
    parked: bool,
    /// Nothing is taken while somebody waits for what is in flight.
    draining: bool,
    state: State,
    /// Completed while the ring may not be touched; published when it may again.
    held: Vec<Used>,
    /// Room for a chain that is filled at once.
    scratch: Chain,
    translation: Translation,
}

/// A queue. All methods may be called from any thread. In a forked child it is stopped for good.
#[derive(Debug)]
pub struct Vring {
    process: Process,
    index: u16,
    inner: Mutex<Inner>,
    /// The current run's; written under the lock, read without it.
    generation: AtomicU64,
    /// Told when the last request in flight is done and somebody waits for that.
    wakeup: Wakeup,
    /// Who hears of its kicks, if that is not the session's loop.
    worker: Option<Arc<EventLoop>>,
    pub statistics: Statistics,
}

impl Vring {
    #[must_use]
    pub fn new(index: u16, max_size: u16, limits: RingLimits, wakeup: Wakeup) -> Self {
        let inner = Inner {
            max_size,
            size: None,
            addresses: None,
            used_log: None,
            logging: Logging::default(),
            options: RingOptions::default(),
            limits,
            record: None,
            kick: None,
            call: None,
            error: None,
            in_band: None,
            enabled: false,
            parked: false,
            draining: false,
            state: State::Stopped { base: 0 },
            held: Vec::new(),
            scratch: Chain::default(),
            translation: Translation::default(),
        };
        Self {
            process: Process::current(),
            index,
            inner: Mutex::new(inner),
            generation: AtomicU64::new(0),
            wakeup,
            worker: None,
            statistics: Statistics::default(),
        }
    }

    /// The same, with kicks that `worker` is to hear of, and not the session's loop.
    #[must_use]
    pub fn kicking(self, worker: Arc<EventLoop>) -> Self {
        Self { worker: Some(worker), ..self }
    }

    /// Whether another loop than the session's hears of its kicks.
    #[must_use]
    pub fn has_worker(&self) -> bool {
        self.worker.is_some()
    }

    /// The loop that hears of its kicks, if it is not the session's.
    pub(super) fn worker(&self) -> Option<&Arc<EventLoop>> {
        self.worker.as_ref()
    }

    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Whether this is the process that serves it, and no child that was forked from that.
    #[inline]
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.process.is_current()
    }

    #[must_use]
    pub fn status(&self) -> VringStatus {
        if !self.is_ours() {
            return VringStatus::Stopped;
        }
        let inner = self.lock();
        match &inner.state {
            State::Stopped { .. } => VringStatus::Stopped,
            State::Broken { .. } => VringStatus::Broken,
            State::Running { .. } if inner.enabled => VringStatus::Running,
            State::Running { .. } => VringStatus::Disabled,
        }
    }

    // --- Requests -------------------------------------------------------------------------------------------------

    /// Take up to `max` chains, in the driver's order, appending them to `chains`; chains that `spare` holds are used
    /// again. Empty only after the driver was asked to kick.
    pub fn take(&self, max: usize, chains: &mut Vec<Chain>, spare: &mut Vec<Chain>) -> Taken {
        if !self.is_ours() {
            return Taken::NotRunning;
        }
        let mut inner = self.lock();
        if !inner.may_process() {
            self.want(&mut inner);
            return Taken::NotRunning;
        }
        let Inner { state, logging, used_log, translation, .. } = &mut *inner;
        let State::Running { ring, run } = state else { return Taken::NotRunning };
        let taken = on_ring!(ring, ring => take_from(&mut **ring, max, chains, spare));
        // It did or did not ask for kicks, in the used ring.
        let written = on_ring!(ring, ring => ring.kick_suppression());
        let marked = logging.mark_ring(*used_log, ring, &[written]);
        let taken = match taken {
            Ok(0) => Taken::Nothing,
            Ok(count) => {
                let chains = &chains[chains.len() - count..];
                let readable: u64 = chains.iter().map(Chain::readable).sum();
                if run.snapshot.iotlb().is_some() {
                    translation.take(chains);
                }
                count_locked(&self.statistics.requests, count as u64);
                count_locked(&self.statistics.bytes_read, readable);
                Taken::Chains(Arc::clone(run))
            }
            Err(RingError::NotMapped { iova, writable }) => {
                if translation.set_miss(iova, writable) {
                    self.wakeup.wake();
                }
                Taken::Nothing
            }
            Err(error) => {
                self.break_down(&mut inner);
                Taken::Broken(error)
            }
        };
        drop(inner);
        marked.tell();
        taken
    }

    /// If there is something to take, do nothing and return true. Otherwise notify the driver of what was given back, as
    /// [`notify`](Self::notify) does, and ask it to `kick`, if that is wanted. Returns whether something came meanwhile.
    pub fn conclude(&self, kick: bool) -> bool {
        if !self.is_ours() {
            return false;
        }
        let mut inner = self.lock();
        let may_process = inner.may_process();
        if !may_process {
            self.want(&mut inner);
        }
        let Inner { state, logging, used_log, .. } = &mut *inner;
        let State::Running { ring, .. } = state else { return false };
        // What is wrong with the ring comes up again when something is taken.
        if may_process && on_ring!(ring, ring => ring.look()) == Ok(true) {
            return true;
        }
        let wanted = on_ring!(ring, ring => ring.decide());
        let (mut came, mut marked) = (false, Marked::default());
        if kick && may_process {
            came = on_ring!(ring, ring => ring.enable_kicks()).unwrap_or(true);
            let written = on_ring!(ring, ring => ring.kick_suppression());
            marked = logging.mark_ring(*used_log, ring, &[written]);
        }
        let call = wanted.map(|wanted| if wanted { inner.call.clone() } else { None });
        drop(inner);
        self.announce(Some(Published { call, marked }));
        came
    }

    /// Take up to `max` chains, one after the other, let `fill` write to each and say how many bytes, and give them back
    /// together. A chain of which it says None stays the driver's, and is the last. `fill` must not wait for anything.
    pub fn fill(&self, max: usize, mut fill: impl FnMut(&Chain) -> Option<u32>) -> Filled {
        if !self.is_ours() {
            return Filled { count: 0, broken: None };
        }
        let mut inner = self.lock();
        if !inner.may_process() {
            self.want(&mut inner);
            return Filled { count: 0, broken: None };
        }
        let Inner { state, logging, used_log, translation, scratch, .. } = &mut *inner;
        let State::Running { ring, run } = state else { return Filled { count: 0, broken: None } };
        let (mut count, mut read, mut written) = (0, 0, 0);
        let mut marked = Marked::default();
        let outcome = on_ring!(ring, ring => fill_from(&mut **ring, max, scratch, |chain| {
            let bytes = fill(chain)?;
            marked = logging.mark_buffers(&run.snapshot, std::slice::from_ref(chain));
            count += 1;
            read += chain.readable();
            written += u64::from(bytes);
            Some(bytes)
        }));
        // It did or did not ask for kicks, in the used ring.
        let suppression = on_ring!(ring, ring => ring.kick_suppression());
        let marked_ring = logging.mark_ring(*used_log, ring, &[suppression]);
        let broken = match outcome {
            // What came before the broken chain is good, and the error comes up again.
            Ok(()) | Err(_) if count > 0 => None,
            Ok(()) => None,
            Err(RingError::NotMapped { iova, writable }) => {
                if translation.set_miss(iova, writable) {
                    self.wakeup.wake();
                }
                None
            }
            Err(error) => Some(error),
        };
        let published = if count > 0 { inner.publish(&[], true) } else { None };
        if broken.is_some() {
            self.break_down(&mut inner);
        }
        count_locked(&self.statistics.requests, count as u64);
        count_locked(&self.statistics.bytes_read, read);
        count_locked(&self.statistics.bytes_written, written);
        drop(inner);
        marked.tell();
        marked_ring.tell();
        self.announce(published);
        Filled { count, broken }
    }

    /// Give `chains` back to the driver, each with its entry of `used`, and notify it if it wants that. Those of an
    /// earlier run are forgotten: nobody waits for them any more. Returns whether they were taken.
    pub fn complete(&self, run: &Run, used: &[Used], chains: &[Chain]) -> bool {
        self.give_back(run, used, chains, true)
    }

    /// The same, and leave it to [`notify`](Self::notify), which must follow soon, to notify the driver.
    pub fn complete_quietly(&self, run: &Run, used: &[Used], chains: &[Chain]) -> bool {
        self.give_back(run, used, chains, false)
    }

    /// Notify the driver of what was given back, if it wants that and has not been.
    pub fn notify(&self) {
        if !self.is_ours() {
            return;
        }
        let mut inner = self.lock();
        let State::Running { ring, .. } = &mut inner.state else { return };
        let Some(wanted) = on_ring!(ring, ring => ring.decide()) else { return };
        let call = if wanted { inner.call.clone() } else { None };
        drop(inner);
        self.call(call);
    }

    fn give_back(&self, run: &Run, used: &[Used], chains: &[Chain], notify: bool) -> bool {
        debug_assert_eq!(used.len(), chains.len());
        if !self.is_ours() {
            return false;
        }
        let mut inner = self.lock();
        // Also for an earlier run: its memory was written to. And before anything is published, under the lock that a
        // change of the log takes as well: whoever swaps the log finds every mark in one or the other.
        let marked = inner.logging.mark_buffers(&run.snapshot, chains);
        let taken = run.generation == self.generation.load(Ordering::Relaxed);
        let released = taken && inner.translation.complete(used);
        let mut published = None;
        if taken && inner.may_touch() {
            published = inner.publish(used, notify);
        } else if taken {
            inner.held.extend_from_slice(used);
            self.want(&mut inner);
        }
        let drained = taken && inner.draining && inner.is_idle();
        if taken {
            count_locked(&self.statistics.bytes_written, used.iter().map(|entry| u64::from(entry.written)).sum());
        }
        drop(inner);
        marked.tell();
        if !taken {
            return false;
        }
        self.announce(published);
        if drained || released {
            self.wakeup.wake();
        }
        true
    }

    /// Count a request whose handler failed, or that nobody answered.
    pub fn count_error(&self) {
        self.statistics.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether requests of `run` may still be worked on, here. False once the driver that made them is gone.
    #[must_use]
    pub fn is_current(&self, run: &Run) -> bool {
        run.generation == self.generation.load(Ordering::Relaxed) && self.is_ours()
    }

    /// Chains that the device has taken and not given back.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        if !self.is_ours() {
            return 0;
        }
        let inner = self.lock();
        match &inner.state {
            State::Running { ring, .. } => usize::from(ring.in_flight()) - inner.held.len(),
            _ => 0,
        }
    }

    /// Chains that the driver has made available and nobody has taken.
    #[must_use]
    pub fn available(&self) -> usize {
        if !self.is_ours() {
            return 0;
        }
        let mut inner = self.lock();
        if !inner.may_process() {
            self.want(&mut inner);
            return 0;
        }
        match &mut inner.state {
            State::Running { ring, .. } => on_ring!(ring, ring => ring.available()).map_or(0, usize::from),
            _ => 0,
        }
    }

    // --- What the session does ------------------------------------------------------------------------------------

    /// The kick descriptor became readable. One that will never be useful again is handed to `retire`.
    pub fn on_kick(&self, retire: impl FnOnce(&Kick)) {
        if !self.is_ours() {
            return;
        }
        let mut inner = self.lock();
        let Some(KickSource::Descriptor(kick)) = &mut inner.kick else { return };
        match kick.consume() {
            Kicked::Yes => {
                inner.parked = false;
                count_locked(&self.statistics.kicks, 1);
            }
            Kicked::No => {}
            Kicked::Dead => retire(kick),
        }
    }

    /// Whether the ring runs and has no descriptor that would tell of kicks.
    #[must_use]
    pub fn needs_polling(&self) -> bool {
        let inner = self.lock();
        matches!((&inner.kick, &inner.state), (Some(KickSource::Poll), State::Running { .. })) && inner.enabled
    }

    /// Whether the ring is started, in the specification's words: its kicks may come. It need not be enabled.
    #[must_use]
    pub(super) fn is_started(&self) -> bool {
        let inner = self.lock();
        inner.kick.is_some() && !inner.parked
    }

    /// Whether the device works on the ring at present.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.lock().is_active()
    }

    /// SET_VRING_NUM.
    pub(super) fn set_size(&self, size: u32) -> Result<(), String> {
        let mut inner = self.lock();
        inner.refuse_if_active()?;
        let max = inner.max_size;
        let packed = inner.options.packed;
        match u16::try_from(size) {
            Ok(size) if (size.is_power_of_two() || packed && size > 0) && size <= max => {
                inner.size = Some(size);
                self.stop_here(&mut inner);
                Ok(())
            }
            _ if packed => {
                Err(format!("queue {} asked for {size} entries; a packed ring needs 1 to {max}", self.index))
            }
            _ => Err(format!(
                "queue {} asked for {size} entries; a split ring needs a power of two up to {max}",
                self.index
            )),
        }
    }

    /// SET_VRING_BASE.
    pub(super) fn set_base(&self, base: u32) -> Result<(), String> {
        let mut inner = self.lock();
        inner.refuse_if_active()?;
        if !inner.options.packed && base > u32::from(u16::MAX) {
            return Err(format!("queue {} asked for base {base:#x}; a split ring has 16 bits", self.index));
        }
        self.stop_here(&mut inner);
        inner.state = State::Stopped { base };
        Ok(())
    }

    /// SET_VRING_ENDIAN, of a legacy driver.
    pub(super) fn set_big_endian(&self, big_endian: bool) -> Result<(), String> {
        let mut inner = self.lock();
        inner.refuse_if_active()?;
        self.stop_here(&mut inner);
        inner.options.big_endian = big_endian;
        Ok(())
    }

    /// Whether the ring is big-endian: SET_VRING_ENDIAN said so.
    #[must_use]
    pub fn is_big_endian(&self) -> bool {
        self.lock().options.big_endian
    }

    /// SET_INFLIGHT_FD: from the next start on, the ring keeps a record of what is in flight, and begins with what it
    /// finds there.
    pub(super) fn set_record(&self, record: Option<InflightSlot>) {
        let mut inner = self.lock();
        self.stop_here(&mut inner);
        inner.record = record;
    }

    /// Whether what is in flight when the ring stops will be found by whoever starts it again.
    pub(super) fn is_recorded(&self) -> bool {
        self.lock().record.is_some()
    }

    /// SET_VRING_ADDR. A running ring goes on where it is, at its new addresses. Writes to the used ring are logged from
    /// the guest address `used_log` on.
    pub(super) fn set_addresses(&self, addresses: RingAddresses, used_log: Option<u64>) -> Result<(), String> {
        let mut inner = self.lock();
        addresses.check_alignment(inner.options.packed)?;
        if !inner.is_active() {
            self.stop_here(&mut inner);
        } else if let State::Running { ring, run } = &mut inner.state {
            match ring.relocate(addresses, &run.snapshot) {
                Ok(()) => {}
                Err(RingError::NotMapped { .. }) => inner.translation.unmap(),
                Err(error) => return Err(error.to_string()),
            }
        }
        inner.addresses = Some(addresses);
        inner.used_log = used_log;
        Ok(())
    }

    /// SET_VRING_KICK: the ring is started, and looks at what is already there. The old source is handed to `retire`
    /// before it is closed, and the new one to `watch`.
    pub(super) fn set_kick(&self, descriptor: Option<OwnedFd>, retire: impl FnOnce(&Kick), watch: impl FnOnce(&Kick)) {
        let mut inner = self.lock();
        if let Some(KickSource::Descriptor(old)) = &inner.kick {
            retire(old);
        }
        let source = descriptor.map_or(KickSource::Poll, |descriptor| KickSource::Descriptor(Kick::new(descriptor)));
        if let KickSource::Descriptor(kick) = &source {
            watch(kick);
        }
        inner.kick = Some(source);
        inner.parked = false;
        if let State::Broken { base } = inner.state {
            inner.state = State::Stopped { base };
        }
    }

    /// SET_VRING_CALL. Whoever listens on a new descriptor may have missed what the old one said.
    pub(super) fn set_call(&self, descriptor: Option<OwnedFd>) {
        let mut inner = self.lock();
        let in_band = inner.in_band.as_ref().map(|(call, _)| Arc::clone(call));
        let call = descriptor.map(|descriptor| Arc::new(Call::new(descriptor))).or(in_band);
        inner.call.clone_from(&call);
        let runs = matches!(inner.state, State::Running { .. });
        drop(inner);
        if let Some(call) = call.filter(|_| runs) {
            call.signal();
        }
    }

    /// SET_VRING_ERR.
    pub(super) fn set_error(&self, descriptor: Option<OwnedFd>) {
        let mut inner = self.lock();
        let in_band = inner.in_band.as_ref().map(|(_, error)| Arc::clone(error));
        inner.error = descriptor.map(|descriptor| Arc::new(Call::new(descriptor))).or(in_band);
    }

    /// Whether notifications go over `channel` where no descriptor was given: INBAND_NOTIFICATIONS was negotiated.
    pub(super) fn set_in_band(&self, channel: Option<&Arc<Channel>>) {
        let mut inner = self.lock();
        let call = |notification| {
            channel.map(|channel| Arc::new(Call::Message { channel: Arc::clone(channel), notification }))
        };
        let in_band = call(Notification::Call(self.index)).zip(call(Notification::Error(self.index)));
        let is_message = |call: &Option<Arc<Call>>| !matches!(call.as_deref(), Some(Call::Descriptor(_)));
        let (ours, errors) = in_band.clone().unzip();
        if is_message(&inner.call) {
            inner.call = ours;
        }
        if is_message(&inner.error) {
            inner.error = errors;
        }
        inner.in_band = in_band;
    }

    /// VRING_KICK: the ring is started, if it was not, and looked at.
    pub(super) fn kick_in_band(&self) {
        let mut inner = self.lock();
        inner.kick.get_or_insert(KickSource::InBand);
        inner.parked = false;
        count_locked(&self.statistics.kicks, 1);
    }

    /// SET_VRING_ENABLE, or SET_FEATURES without PROTOCOL_FEATURES.
    pub(super) fn set_enabled(&self, enabled: bool) {
        let mut inner = self.lock();
        inner.enabled = enabled;
        if enabled {
            inner.draining = false;
            inner.parked = false;
        }
    }

    /// Nothing is touched until the next kick or set-up.
    pub(super) fn park(&self) {
        let mut inner = self.lock();
        inner.parked = true;
        inner.draining = false;
    }

    /// Whether SET_FEATURES may bring `options`.
    pub(super) fn check_options(&self, options: RingOptions) -> Result<(), String> {
        let inner = self.lock();
        if inner.is_active() && inner.options != options {
            return Err(format!("queue {} is running; its ring features cannot change now", self.index));
        }
        Ok(())
    }

    /// Use `options`, which [`check_options`](Self::check_options) has accepted, from the next start on.
    pub(super) fn set_options(&self, options: RingOptions) {
        let mut inner = self.lock();
        if inner.options != options {
            self.stop_here(&mut inner);
            inner.options = options;
        }
    }

    /// Log as `logging` says from now on. When this returns, nothing is marked in the log of before any more.
    pub(super) fn set_logging(&self, logging: &Logging) {
        let mut inner = self.lock();
        let old = std::mem::replace(&mut inner.logging, logging.clone());
        // QEMU hands the log over when it has started the rings again.
        let marked = match &inner.state {
            State::Running { ring, .. } if old.log.is_none() => inner.logging.mark_whole_ring(inner.used_log, ring),
            _ => Marked::default(),
        };
        drop(inner);
        marked.tell();
        // The last one to let go of a log unmaps it: not with the lock.
        drop(old);
    }

    /// Start the ring if everything it needs is there, or publish what had to wait until it may be touched again.
    pub(super) fn try_start(&self, snapshot: &Arc<Snapshot>) -> Result<(), RingError> {
        let mut inner = self.lock();
        if !inner.enabled || inner.parked || inner.kick.is_none() {
            return Ok(());
        }
        if let Err(error) = inner.remap() {
            self.break_down(&mut inner);
            return Err(error);
        }
        let may_touch = inner.may_touch();
        let Inner { state, size, addresses, options, limits, translation, record, logging, used_log, .. } = &mut *inner;
        match state {
            State::Broken { .. } => Ok(()),
            State::Running { .. } => {
                let published = if may_touch { inner.publish_held() } else { None };
                drop(inner);
                self.announce(published);
                Ok(())
            }
            State::Stopped { base } => {
                let (Some(addresses), Some(size)) = (*addresses, *size) else { return Ok(()) };
                if snapshot.is_empty() {
                    return Ok(());
                }
                let base = *base;
                let started = AnyRing::start(addresses, size, base, *options, *limits, snapshot)
                    .and_then(|ring| if let Some(record) = record { ring.recover(record) } else { Ok(ring) });
                match started {
                    Ok(ring) => {
                        let marked = logging.mark_whole_ring(*used_log, &ring);
                        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
                        let run = Arc::new(Run { snapshot: Arc::clone(snapshot), generation });
                        *state = State::Running { ring, run };
                        drop(inner);
                        marked.tell();
                        Ok(())
                    }
                    Err(RingError::NotMapped { iova, writable }) => {
                        translation.set_miss(iova, writable);
                        Ok(())
                    }
                    Err(error) => {
                        self.break_down(&mut inner);
                        Err(error)
                    }
                }
            }
        }
    }

    /// Whether the ring could go on over `snapshot`; one that is not active need not.
    pub(super) fn check_memory(&self, snapshot: &Snapshot) -> Result<(), String> {
        let inner = self.lock();
        match &inner.state {
            State::Running { ring, .. } if inner.is_active() => match ring.resolve(snapshot) {
                Ok(_) | Err(RingError::NotMapped { .. }) => Ok(()),
                Err(error) => Err(format!("queue {} is running: {error}", self.index)),
            },
            _ => Ok(()),
        }
    }

    /// Go on over `snapshot`, which [`check_memory`](Self::check_memory) has accepted. Requests in flight keep the old.
    pub(super) fn set_memory(&self, snapshot: &Arc<Snapshot>) {
        let mut inner = self.lock();
        let Inner { state, translation, .. } = &mut *inner;
        if let State::Running { ring, run } = state {
            match ring.resolve(snapshot) {
                Ok(pointers) => ring.move_to(pointers, Arc::clone(snapshot)),
                Err(RingError::NotMapped { .. }) => translation.unmap(),
                Err(_) => return self.stop_here(&mut inner),
            }
            *run = Arc::new(Run { snapshot: Arc::clone(snapshot), generation: run.generation });
        }
    }

    // --- Behind an IOMMU --------------------------------------------------------------------------------------------

    /// Somebody needs the ring, whose addresses may have been taken back: the loop asks for them.
    fn want(&self, inner: &mut Inner) {
        if inner.is_active() && inner.translation.want() {
            self.wakeup.wake();
        }
    }

    /// What the front-end has to be asked for: an I/O address, and whether it is to be written to. It counts as asked.
    pub(super) fn ask(&self, now: Instant) -> Option<(u64, bool)> {
        let mut inner = self.lock();
        // What is wrong comes up again when the ring is started.
        let _ = inner.remap();
        let question = inner.translation.to_ask()?;
        inner.translation.set_asked(now);
        self.statistics.iotlb_misses.fetch_add(1, Ordering::Relaxed);
        Some(question)
    }

    /// The front-end will not say where `iova` is.
    pub(super) fn refuse_translation(&self, iova: u64, reason: String) {
        self.lock().translation.refuse(iova, reason);
    }

    /// Break the ring if the front-end refused to say, or did not say in time, what it needs to know.
    pub(super) fn check_translation(&self, now: Instant) -> Result<(), RingError> {
        let mut inner = self.lock();
        let limit = match &inner.state {
            State::Running { run, .. } => run.snapshot.iotlb().map_or(0, |iotlb| iotlb.capacity()),
            _ => usize::MAX,
        };
        match inner.translation.failure(now, limit) {
            None => Ok(()),
            Some(error) => {
                self.break_down(&mut inner);
                Err(error)
            }
        }
    }

    /// The front-end has had no chance to say anything until now.
    pub(super) fn extend_translation(&self, now: Instant) {
        self.lock().translation.extend(now);
    }

    /// When [`check_translation`](Self::check_translation) is to be called.
    pub(super) fn translation_deadline(&self) -> Option<Instant> {
        self.lock().translation.deadline()
    }

    /// `range` was mapped. Returns whether the ring has waited for that.
    pub(super) fn on_mapped(&self, range: IovaRange) -> bool {
        let mut inner = self.lock();
        inner.translation.update(range) || inner.translation.is_unmapped()
    }

    /// `range` was taken back: a ring that is there is not touched until it is mapped again.
    pub(super) fn on_unmapped(&self, range: IovaRange) {
        self.statistics.iotlb_invalidations.fetch_add(1, Ordering::Relaxed);
        let mut inner = self.lock();
        let Inner { state, size, addresses, options, translation, .. } = &mut *inner;
        if let (State::Running { .. }, Some(size), Some(addresses)) = (state, size, addresses)
            && addresses.overlap(*size, *options, range)
        {
            translation.unmap();
        }
    }

    /// Whether no request in flight has its buffers in `range`. If one has, the loop is woken when none has any more.
    pub(super) fn is_released(&self, range: IovaRange) -> bool {
        self.lock().translation.is_released(range)
    }

    // --- The end ----------------------------------------------------------------------------------------------------

    /// Take nothing more. Returns whether nothing is in flight; if something is, the loop is woken when it is done.
    pub(super) fn drain(&self) -> bool {
        let mut inner = self.lock();
        inner.draining = true;
        inner.is_idle()
    }

    /// Take chains again.
    pub(super) fn undrain(&self) {
        self.lock().draining = false;
    }

    /// GET_VRING_BASE, after the drain: publish what had to wait, and stop. The descriptors go to `retire` first.
    ///
    /// What is in flight nevertheless stays in the record, and is nobody's any more.
    pub(super) fn stop(&self, retire: impl FnOnce(&Kick)) -> u32 {
        let mut inner = self.lock();
        let _ = inner.remap();
        let lost = if inner.translation.is_unmapped() { inner.held.len() } else { 0 };
        let published = if lost == 0 { inner.publish_held() } else { None };
        let base = self.forget_run(&mut inner, retire);
        drop(inner);
        if lost > 0 {
            log::warn!(
                "queue {}: the front-end stops it while its addresses are not mapped: the driver cannot be told of {lost} \
                 completed requests",
                self.index
            );
        }
        self.announce(published);
        base
    }

    /// RESET_DEVICE: disabled, and at the beginning again. What was configured stays.
    pub(super) fn reset(&self) {
        let mut inner = self.lock();
        self.stop_here(&mut inner);
        if let Some(record) = &inner.record {
            record.clear();
        }
        inner.state = State::Stopped { base: 0 };
        inner.enabled = false;
    }

    /// The connection is gone: everything that was configured is forgotten.
    pub(super) fn disconnect(&self, retire: impl FnOnce(&Kick)) {
        let mut inner = self.lock();
        self.forget_run(&mut inner, retire);
        inner.state = State::Stopped { base: 0 };
        inner.record = None;
        inner.options.big_endian = false;
        inner.addresses = None;
        inner.used_log = None;
        inner.logging = Logging::default();
        inner.size = None;
        inner.call = None;
        inner.error = None;
        inner.in_band = None;
        inner.enabled = false;
    }

    fn forget_run(&self, inner: &mut Inner, retire: impl FnOnce(&Kick)) -> u32 {
        self.stop_here(inner);
        let base = match inner.state {
            State::Stopped { base } | State::Broken { base } => base,
            State::Running { ref ring, .. } => ring.base(),
        };
        inner.state = State::Stopped { base };
        if let Some(KickSource::Descriptor(old)) = &inner.kick {
            retire(old);
        }
        inner.kick = None;
        inner.call = inner.in_band.as_ref().map(|(call, _)| Arc::clone(call));
        base
    }

    /// Stop without asking anybody. Requests in flight belong to a run that is over.
    fn stop_here(&self, inner: &mut Inner) {
        if let State::Running { ring, .. } = &inner.state {
            inner.state = State::Stopped { base: ring.base() };
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
        inner.held.clear();
        inner.translation = Translation::default();
        inner.draining = false;
        inner.parked = false;
    }

    fn break_down(&self, inner: &mut Inner) {
        self.stop_here(inner);
        if let State::Stopped { base } = inner.state {
            inner.state = State::Broken { base };
        }
        if let Some(error) = &inner.error {
            error.signal();
        }
        self.statistics.errors.fetch_add(1, Ordering::Relaxed);
    }

    fn announce(&self, published: Option<Published>) {
        let Some(Published { call, marked }) = published else { return };
        marked.tell();
        if let Some(call) = call {
            self.call(call);
        }
    }

    /// Notify the driver, or count that it does not want to be.
    fn call(&self, call: Option<Arc<Call>>) {
        // Counted first: whoever sees the signal finds it in the statistics.
        match call {
            Some(call) => {
                self.statistics.calls.fetch_add(1, Ordering::Relaxed);
                call.signal();
            }
            None => _ = self.statistics.calls_suppressed.fetch_add(1, Ordering::Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn may_touch(&self) -> bool {
        self.enabled && !self.parked && !self.translation.is_unmapped()
    }

    fn may_process(&self) -> bool {
        self.may_touch() && !self.draining
    }

    fn is_active(&self) -> bool {
        self.enabled && !self.parked && matches!(self.state, State::Running { .. })
    }

    /// Find a ring again whose addresses were taken back; if somebody wants it, ask for the first of them that is missing.
    fn remap(&mut self) -> Result<(), RingError> {
        let (State::Running { ring, run }, Some(addresses)) = (&mut self.state, self.addresses) else { return Ok(()) };
        if !self.translation.is_unmapped() {
            return Ok(());
        }
        match ring.relocate(addresses, &run.snapshot) {
            Ok(()) => self.translation.remap(),
            Err(RingError::NotMapped { iova, writable }) => {
                if self.translation.is_wanted() {
                    self.translation.set_miss(iova, writable);
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether the device holds nothing that it has not completed.
    fn is_idle(&self) -> bool {
        match &self.state {
            State::Running { ring, .. } => usize::from(ring.in_flight()) == self.held.len(),
            _ => true,
        }
    }

    /// Show `used` to the driver, if the ring runs.
    fn publish(&mut self, used: &[Used], notify: bool) -> Option<Published> {
        let State::Running { ring, .. } = &mut self.state else { return None };
        let pieces = on_ring!(ring, ring => show_on(&mut **ring, used));
        let wanted = if notify { on_ring!(ring, ring => ring.decide()) } else { None };
        let call = wanted.map(|wanted| if wanted { self.call.clone() } else { None });
        Some(Published { call, marked: self.logging.mark_ring(self.used_log, ring, &pieces) })
    }

    /// Show the driver what had to wait until the ring may be touched.
    fn publish_held(&mut self) -> Option<Published> {
        if self.held.is_empty() {
            return None;
        }
        let held = std::mem::take(&mut self.held);
        self.publish(&held, true)
    }

    fn refuse_if_active(&self) -> Result<(), String> {
        if self.is_active() { Err("the ring is running; stop it with GET_VRING_BASE first".to_owned()) } else { Ok(()) }
    }
}

impl AnyRing {
    fn start(
        addresses: RingAddresses,
        size: u16,
        base: u32,
        options: RingOptions,
        limits: RingLimits,
        snapshot: &Arc<Snapshot>,
    ) -> Result<Self, RingError> {
        let snapshot = Arc::clone(snapshot);
        Ok(if options.packed {
            Self::Packed(Box::new(Ring::new(addresses, size, base, options, limits, snapshot)?))
        } else if options.big_endian {
            Self::BigEndian(Box::new(Ring::new(addresses, size, base, options, limits, snapshot)?))
        } else {
            Self::Split(Box::new(Ring::new(addresses, size, base, options, limits, snapshot)?))
        })
    }

    fn recover(self, record: &InflightSlot) -> Result<Self, RingError> {
        match self {
            Self::Split(ring) => ring.recover(record).map(|ring| Self::Split(Box::new(ring))),
            Self::BigEndian(ring) => ring.recover(record).map(|ring| Self::BigEndian(Box::new(ring))),
            Self::Packed(ring) => ring.recover(record).map(|ring| Self::Packed(Box::new(ring))),
        }
    }

    fn resolve(&self, snapshot: &Snapshot) -> Result<RingPointers, RingError> {
        on_ring!(self, ring => ring.resolve(snapshot))
    }

    fn move_to(&mut self, pointers: RingPointers, snapshot: Arc<Snapshot>) {
        on_ring!(self, ring => ring.move_to(pointers, snapshot));
    }

    fn relocate(&mut self, addresses: RingAddresses, snapshot: &Arc<Snapshot>) -> Result<(), RingError> {
        on_ring!(self, ring => ring.relocate(addresses, snapshot))
    }

    fn base(&self) -> u32 {
        on_ring!(self, ring => ring.base())
    }

    fn in_flight(&self) -> u16 {
        on_ring!(self, ring => ring.in_flight())
    }
}

/// Add to a counter that nobody changes without the ring's lock.
fn count_locked(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// Whom to tell that used entries were published, after the ring's lock is released.
#[derive(Debug)]
#[must_use]
struct Published {
    /// None if that was not decided; nothing in it if the driver does not want to be notified.
    call: Option<Option<Arc<Call>>>,
    marked: Marked,
}

/// Show `used` to the driver. Returns what was written to.
fn show_on(ring: &mut impl Ring, used: &[Used]) -> [Written; 3] {
    ring.fill_used(used);
    let pieces = ring.unpublished();
    ring.show();
    pieces
}

/// Whether there is something to take. If not, the driver was asked to kick.
fn has_come(ring: &mut impl Ring) -> Result<bool, RingError> {
    Ok(ring.look()? || ring.enable_kicks()?)
}

fn take_from(
    ring: &mut impl Ring,
    max: usize,
    chains: &mut Vec<Chain>,
    spare: &mut Vec<Chain>,
) -> Result<usize, RingError> {
    if !has_come(ring)? {
        return Ok(0);
    }
    ring.disable_kicks();
    let mut taken = 0;
    while taken < max {
        let room = ring.room(taken).min(max - taken);
        let start = chains.len();
        chains.extend((0..room).map(|_| spare.pop().unwrap_or_default()));
        let found = ring.take(&mut chains[start..]);
        let count = found.as_ref().map_or(0, |count| *count);
        spare.extend(chains.drain(start + count..));
        taken += count;
        match found {
            Ok(count) if count == room && room > 0 => {}
            // What came before a broken chain is good: it is worked on first, and the error comes up again.
            Err(error) if taken == 0 => return Err(error),
            _ => break,
        }
    }
    Ok(taken)
}

/// Take up to `max` chains into `scratch`, one after the other. What `fill` says of each is filled in, but not published.
fn fill_from(
    ring: &mut impl Ring,
    max: usize,
    scratch: &mut Chain,
    mut fill: impl FnMut(&Chain) -> Option<u32>,
) -> Result<(), RingError> {
    if max == 0 || !has_come(ring)? {
        return Ok(());
    }
    ring.disable_kicks();
    for _ in 0..max {
        if !ring.pop(scratch)? {
            break;
        }
        let head = scratch.head();
        match fill(scratch) {
            Some(written) => ring.push_used(Used { head, written }),
            None => {
                // It was taken just now.
                let _ = ring.unpop(head);
                break;
            }
        }
    }
    Ok(())
}
