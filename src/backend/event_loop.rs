//! One epoll loop: descriptors, timers, and waking it from another thread.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime};

use crate::error::Error;
use crate::process::Process;

/// Whom an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Token {
    /// The connection to the front-end.
    Session,
    /// The connection for requests of our own.
    Channel,
    /// The kick descriptor of a queue.
    Queue(u16),
    /// A descriptor that the device watches.
    Device(u32),
}

impl Token {
    const WAKE: u64 = u64::MAX;
    const TIMER: u64 = u64::MAX - 1;

    fn to_data(self) -> u64 {
        match self {
            Self::Session => 0,
            Self::Queue(index) => 1 << 32 | u64::from(index),
            Self::Device(id) => 2 << 32 | u64::from(id),
            Self::Channel => 3 << 32,
        }
    }

    fn from_data(data: u64) -> Option<Self> {
        match data >> 32 {
            0 => Some(Self::Session),
            1 => Some(Self::Queue(data as u16)),
            2 => Some(Self::Device(data as u32)),
            3 => Some(Self::Channel),
            _ => None,
        }
    }
}

/// What to wait for on a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    pub readable: bool,
    pub writable: bool,
}

impl Interest {
    pub const READABLE: Self = Self { readable: true, writable: false };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.readable);
        flags.set(EventFlags::OUT, self.writable);
        flags
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Ready { token: Token, readable: bool, writable: bool },
    Timer(u64),
}

/// Wakes a loop from any thread.
#[derive(Clone, Debug)]
pub struct Wakeup(Arc<OwnedFd>);

impl Wakeup {
    pub fn wake(&self) {
        // A full counter is a loop that has yet to wake up.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

#[derive(Debug, Default)]
struct Timers {
    next_id: u64,
    /// The same timers in order, and by identity.
    due: BTreeSet<(Instant, u64)>,
    at: HashMap<u64, Instant>,
    /// When the descriptor expires: with the first of them, or before it if one was cancelled.
    armed: Option<Instant>,
}

/// The loop itself. Every method but [`wait`](Self::wait) may be called from any thread. What a forked child asks for does
/// not happen: the descriptors are one for both.
#[derive(Debug)]
pub struct EventLoop {
    process: Process,
    epoll: OwnedFd,
    wakeup: Wakeup,
    /// Expires with the first timer, so that whoever waits for the loop from outside is told of timers too.
    timer: OwnedFd,
    timers: Mutex<Timers>,
    /// Who entered it last.
    thread: Mutex<Option<ThreadId>>,
}

impl EventLoop {
    pub fn new() -> Result<Self, Error> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(Error::os("creating an epoll descriptor"))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(Error::os("creating an eventfd to wake the loop"))?;
        epoll::add(&epoll, &wake, EventData::new_u64(Token::WAKE), EventFlags::IN)
            .map_err(Error::os("watching the loop's own eventfd"))?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
            .map_err(Error::os("creating a timerfd"))?;
        epoll::add(&epoll, &timer, EventData::new_u64(Token::TIMER), EventFlags::IN)
            .map_err(Error::os("watching the loop's own timerfd"))?;
        Ok(Self {
            process: Process::current(),
            epoll,
            wakeup: Wakeup(Arc::new(wake)),
            timer,
            timers: Mutex::default(),
            thread: Mutex::default(),
        })
    }

    /// The calling thread runs the loop from now on.
    pub fn enter(&self) {
        *self.thread() = Some(std::thread::current().id());
    }

    /// Whether the caller is on the thread that runs the loop.
    #[must_use]
    pub fn is_this_thread(&self) -> bool {
        self.process.is_current() && *self.thread() == Some(std::thread::current().id())
    }

    #[must_use]
    pub fn wakeup(&self) -> Wakeup {
        self.wakeup.clone()
    }

    /// Report `descriptor` as `token` while it is ready. It must be forgotten before it is closed.
    pub fn watch(&self, descriptor: impl AsFd, token: Token, interest: Interest) -> Result<(), Error> {
        self.check_process()?;
        epoll::add(&self.epoll, descriptor, EventData::new_u64(token.to_data()), interest.flags())
            .map_err(Error::os("watching a descriptor"))
    }

    /// Report `descriptor` as `token` whenever it becomes readable, or more readable than it was. It must be forgotten before
    /// it is closed.
    pub fn watch_edges(&self, descriptor: impl AsFd, token: Token) -> Result<(), Error> {
        self.check_process()?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&self.epoll, descriptor, EventData::new_u64(token.to_data()), flags)
            .map_err(Error::os("watching a descriptor"))
    }

    /// Change what is waited for.
    pub fn change(&self, descriptor: impl AsFd, token: Token, interest: Interest) -> Result<(), Error> {
        self.check_process()?;
        epoll::modify(&self.epoll, descriptor, EventData::new_u64(token.to_data()), interest.flags())
            .map_err(Error::os("watching a descriptor for something else"))
    }

    /// Stop watching. Forgetting what is not watched is fine.
    pub fn forget(&self, descriptor: impl AsFd) {
        if self.process.is_current() {
            let _ = epoll::delete(&self.epoll, descriptor);
        }
    }

    /// Report a timer once, at `at`. Returns its identity.
    pub fn add_timer(&self, at: Instant) -> u64 {
        let mut timers = self.timers();
        let id = timers.next_id;
        timers.next_id += 1;
        timers.due.insert((at, id));
        timers.at.insert(id, at);
        if timers.armed.is_none_or(|armed| at < armed) {
            timers.armed = Some(at);
            self.arm(at);
        }
        id
    }

    pub fn cancel_timer(&self, id: u64) {
        let mut timers = self.timers();
        if let Some(at) = timers.at.remove(&id) {
            timers.due.remove(&(at, id));
        }
    }

    /// Wait until something happens, `timeout` passes or a signal arrives; then append what happened. Returns whether
    /// something did, or another thread woke the loop.
    pub fn wait(&self, timeout: Option<Duration>, events: &mut Vec<Event>) -> Result<bool, Error> {
        self.check_process()?;
        let timeout =
            timeout.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        let mut space = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        let (ready, _) = match epoll::wait(&self.epoll, &mut space, timeout.as_ref()) {
            Ok(ready) => ready,
            Err(Errno::INTR) => return Ok(false),
            Err(errno) => return Err(Error::os("waiting for events")(errno)),
        };
        let happened = !ready.is_empty();
        for event in ready {
            let (flags, data) = (event.flags, event.data.u64());
            if let Some(token) = Token::from_data(data) {
                let failed = flags.intersects(EventFlags::ERR | EventFlags::HUP);
                let readable = failed || flags.contains(EventFlags::IN);
                let writable = failed || flags.contains(EventFlags::OUT);
                events.push(Event::Ready { token, readable, writable });
            } else if data == Token::TIMER {
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.collect_timers(events);
            } else {
                let _ = rustix::io::read(&*self.wakeup.0, &mut [0; 8]);
            }
        }
        Ok(happened)
    }

    /// The process that runs this loop.
    #[must_use]
    pub fn process(&self) -> Process {
        self.process
    }

    fn check_process(&self) -> Result<(), Error> {
        if self.process.is_current() { Ok(()) } else { Err(Error::AnotherProcess("the device that is being served")) }
    }

    fn collect_timers(&self, events: &mut Vec<Event>) {
        let mut timers = self.timers();
        timers.armed = None;
        while let Some((at, id)) = timers.due.first().copied() {
            if at > Instant::now() {
                timers.armed = Some(at);
                self.arm(at);
                break;
            }
            timers.due.pop_first();
            timers.at.remove(&id);
            events.push(Event::Timer(id));
        }
    }

    fn arm(&self, at: Instant) {
        if !self.process.is_current() {
            return;
        }
        // Zero would disarm it.
        let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        if let Err(errno) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            log::error!("setting a timer failed: {errno}");
        }
    }

    fn thread(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn timers(&self) -> MutexGuard<'_, Timers> {
        self.timers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for EventLoop {
    /// Readable while something has happened: one loop can wait for another.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(events: &EventLoop) -> Vec<Event> {
        let mut happened = Vec::new();
        while happened.is_empty() {
            events.wait(Some(Duration::from_secs(5)), &mut happened).unwrap();
        }
        happened
    }

    #[test]
    fn timers_are_told_of_in_their_order_and_those_that_were_cancelled_leave_nothing() {
        let events = EventLoop::new().unwrap();
        let now = Instant::now();
        let later = events.add_timer(now + Duration::from_millis(20));
        let first = events.add_timer(now + Duration::from_millis(10));
        for _ in 0..1000 {
            events.cancel_timer(events.add_timer(now + Duration::from_secs(3600)));
            events.cancel_timer(events.add_timer(now));
        }
        assert_eq!(events.timers().due.len(), 2);
        let happened: Vec<_> = std::iter::repeat_with(|| wait(&events)).flatten().take(2).collect();
        assert_eq!(happened, [Event::Timer(first), Event::Timer(later)]);
        events.cancel_timer(first);
        assert!(events.timers().due.is_empty() && events.timers().at.is_empty());
    }
}
