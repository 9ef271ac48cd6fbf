//! Requests of the back-end, on the socket that SET_BACKEND_REQ_FD brought.
//!
//! Owns: what was not sent yet, and what was sent and is not answered. Nothing here ever waits for the front-end on the
//! loop's thread, because the front-end may itself be waiting for us on the main channel: an answer is read when the
//! loop finds it.
//!
//! vhost-user specification, "Back-end message types".

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::complaints::{self, Complaints};
use super::event_loop::{EventLoop, Interest, Token};
use crate::error::Error;
use crate::protocol::{
    Answer, BackendMessage, BackendRequest, Flags, Gate, Payload, ProtocolFeatures, U64, VirtioFeatures, VringState,
};
use crate::transport::{Connection, Frame, Received};

/// How long the front-end may take to answer. It may have to ask us something first, and be busy with other devices.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// Requests that wait to be sent or answered.
const MAX_REQUESTS: usize = 64;

/// What the front-end says to a request that it granted.
#[derive(Debug, Default)]
pub struct Granted {
    /// Only SHARED_OBJECT_LOOKUP is answered with a descriptor.
    pub descriptor: Option<OwnedFd>,
}

/// What is said to a driver in-band, about one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notification {
    Call(u16),
    Error(u16),
}

impl Notification {
    fn message(self) -> BackendMessage {
        let state = |index: u16| VringState { index: index.into(), num: 0 };
        match self {
            Self::Call(queue) => BackendMessage::VringCall(state(queue)),
            Self::Error(queue) => BackendMessage::VringErr(state(queue)),
        }
    }
}

/// What to do when a request is answered, or will never be. It runs on the loop's thread, with no lock held.
pub type Then = Box<dyn FnOnce(Result<Granted, Error>) + Send>;

/// Asks the front-end for something, from any thread.
///
/// [`request`](Self::request) returns at once, and calls back on the loop's thread:
///
/// ```ignore
/// let miss = Iotlb { iova, permission, kind: Iotlb::MISS, ..Iotlb::default() };
/// channel.request(BackendMessage::IotlbMsg(miss), Vec::new(), Box::new(move |answer| match answer {
///     Ok(_) => retry(),                          // the front-end has sent its IOTLB_MSG by now
///     Err(error) => log::error!("{error}"),      // refused, late, or the channel is gone
/// }))?;
/// ```
///
/// [`ask`](Self::ask) is the same for threads that are not the loop's: it waits for the answer.
///
/// Requests are sent in the order in which they were made, and answered in that order. While all rings are stopped,
/// nothing is sent: requests wait until one is started. Without REPLY_ACK most are not answered at all; then having been
/// sent counts as granted. A front-end that does not answer in time, or whose answer makes no sense, loses the channel;
/// the session goes on without it.
#[derive(Debug)]
pub struct Channel {
    events: Arc<EventLoop>,
    /// How long an answer may take.
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    connection: Option<Connection>,
    /// Why there is no connection any more.
    over: Option<String>,
    /// The same, to be logged when no lock is held.
    trouble: Option<String>,
    complaints: Complaints,
    features: VirtioFeatures,
    protocol_features: ProtocolFeatures,
    /// All rings are stopped: nothing may be sent.
    suspended: bool,
    /// The configuration changed and nobody was told.
    config_changed: bool,
    /// The socket has no room: it is watched for writing.
    full: bool,
    /// Each is sent when the same one before it was acknowledged: until then the driver has yet to look.
    notifications: BTreeSet<Notification>,
    waiting: VecDeque<Request>,
    sent: VecDeque<Sent>,
    /// What is decided, for the loop's thread to tell.
    done: Vec<Done>,
    /// When the loop wakes up to look for answers that are late.
    timer: Option<Instant>,
}

struct Done {
    then: Then,
    outcome: Result<Granted, Error>,
}

struct Request {
    message: BackendMessage,
    files: Vec<OwnedFd>,
    then: Then,
}

/// A request that will be answered.
struct Sent {
    request: BackendRequest,
    deadline: Instant,
    then: WhenAnswered,
}

enum WhenAnswered {
    Call(Then),
    Notified(Notification),
}

impl Channel {
    /// `events` is the loop that is to call [`on_ready`](Self::on_ready) and [`settle`](Self::settle).
    #[must_use]
    pub fn new(events: Arc<EventLoop>) -> Self {
        Self { events, patience: ANSWER_DEADLINE, state: Mutex::default() }
    }

    /// Ask for something. `then` is called on the loop's thread, never from in here.
    ///
    /// # Errors
    /// The request cannot be made: what it needs was not negotiated, there is no channel, or too many wait already.
    pub fn request(&self, message: BackendMessage, files: Vec<OwnedFd>, then: Then) -> Result<(), Error> {
        let mut state = self.lock();
        state.check(message.request(), files.len())?;
        state.waiting.push_back(Request { message, files, then });
        self.send_waiting(&mut state);
        Ok(())
    }

    /// Ask for something and wait for the answer until `deadline`. Not on the loop's thread, which has to read it.
    pub fn ask(&self, message: BackendMessage, files: Vec<OwnedFd>, deadline: Instant) -> Result<Granted, Error> {
        let name = message.request().name();
        if self.events.is_this_thread() {
            return Err(Error::State(format!(
                "{name}: the thread of the device's loop cannot wait for the answer that it has to read; wait on \
                 another thread, or let yourself be called"
            )));
        }
        let (tell, told) = mpsc::sync_channel(1);
        // Nobody listens any more after the deadline.
        self.request(message, files, Box::new(move |answer| drop(tell.send(answer))))?;
        match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                Err(Error::Timeout(format!("{name}: the front-end did not answer in time")))
            }
            Err(RecvTimeoutError::Disconnected) => Err(Error::Closed(format!("{name}: the device was stopped"))),
        }
    }

    /// Announce that the configuration space changed: now, or when a ring runs again.
    pub fn config_changed(&self) {
        let mut state = self.lock();
        state.config_changed = true;
        self.send_waiting(&mut state);
    }

    /// Whether another request is likely to be accepted: half of the room is left to others.
    pub(super) fn has_room(&self) -> bool {
        let state = self.lock();
        state.waiting.len() + state.sent.len() < MAX_REQUESTS / 2
    }

    /// VRING_CALL or VRING_ERR. It never waits, and is not lost while the channel lives.
    pub fn notify(&self, notification: Notification) {
        let mut state = self.lock();
        state.notifications.insert(notification);
        self.send_waiting(&mut state);
    }

    /// Whether the front-end owes us no answer, and there is nothing that could be said to it now.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let state = self.lock();
        let unsent = !state.waiting.is_empty() || !state.notifications.is_empty() || state.config_changed;
        state.sent.is_empty() && state.done.is_empty() && (state.suspended || state.connection.is_none() || !unsent)
    }

    // --- What the session does ------------------------------------------------------------------------------------

    /// Use `socket` from now on.
    pub(super) fn connect(&self, socket: OwnedFd) -> Result<(), Error> {
        let connection = Connection::new(socket)?;
        let mut state = self.lock();
        self.close(&mut state, "the front-end opened another one");
        self.events.watch(&connection, Token::Channel, Interest::READABLE)?;
        state.connection = Some(connection);
        state.over = None;
        // The session tells otherwise at once if it is so.
        state.suspended = true;
        // The front-end has yet to read it.
        state.config_changed = false;
        Ok(())
    }

    /// The session ended.
    pub(super) fn disconnect(&self) {
        let mut state = self.lock();
        self.close(&mut state, "the session ended");
        state.over = None;
        state.trouble = None;
        state.notifications.clear();
        state.config_changed = false;
        state.suspended = true;
        state.features = VirtioFeatures::default();
        state.protocol_features = ProtocolFeatures::default();
    }

    /// What SET_FEATURES and SET_PROTOCOL_FEATURES accepted.
    pub(super) fn set_negotiated(&self, features: VirtioFeatures, protocol_features: ProtocolFeatures) {
        let mut state = self.lock();
        state.features = features;
        state.protocol_features = protocol_features;
    }

    /// Tell the channel whether all rings are stopped. What had to wait is sent when one is started.
    pub(super) fn set_suspended(&self, suspended: bool) {
        let mut state = self.lock();
        state.suspended = suspended;
        self.send_waiting(&mut state);
    }

    // --- What the loop does ---------------------------------------------------------------------------------------

    /// The socket is ready: read the answers that are there, and send what waits for room.
    pub fn on_ready(&self) {
        let mut state = self.lock();
        loop {
            let Some(connection) = &mut state.connection else { return };
            let result = match connection.try_receive() {
                Ok(Received::Incomplete) => break,
                Ok(Received::Frame(frame)) => state.accept(frame),
                Ok(Received::Closed) => Err(Error::Closed("the front-end closed it".to_owned())),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                self.close(&mut state, &error.to_string());
                // That is how a session ends, as a rule.
                if matches!(error, Error::Closed(_)) {
                    state.trouble = None;
                }
                return;
            }
        }
        self.send_waiting(&mut state);
    }

    /// Give up on answers that are late, and call whoever waits for something that is decided. Once in each turn.
    pub fn settle(&self) {
        let mut state = self.lock();
        if state.sent.front().is_some_and(|oldest| oldest.deadline <= Instant::now())
            && let Some(Sent { request, then, .. }) = state.sent.pop_front()
        {
            let reason = format!("{}: the front-end did not answer in {:?}", request.name(), self.patience);
            self.close(&mut state, &reason);
            if let WhenAnswered::Call(then) = then {
                state.done.insert(0, Done { then, outcome: Err(Error::Timeout(reason)) });
            }
        }
        self.schedule(&mut state);
        let done = std::mem::take(&mut state.done);
        let trouble = state.trouble.take();
        let unsaid = trouble.as_ref().and_then(|_| state.complaints.due(Instant::now()));
        drop(state);
        if let (Some(reason), Some(unsaid)) = (trouble, unsaid) {
            complaints::warn(format_args!("the back-end channel is closed: {reason}"), unsaid);
        }
        for Done { then, outcome } in done {
            then(outcome);
        }
    }

    // --- With the lock held ---------------------------------------------------------------------------------------

    /// Send what may be sent and the socket has room for.
    fn send_waiting(&self, state: &mut State) {
        if let Err(error) = state.send_waiting(self.patience) {
            self.close(state, &error.to_string());
        }
        if let Some(connection) = &state.connection {
            let full = !connection.is_flushed();
            if full != state.full {
                state.full = full;
                let interest = Interest { readable: true, writable: full };
                if let Err(error) = self.events.change(connection, Token::Channel, interest) {
                    self.close(state, &error.to_string());
                }
            }
        }
        self.schedule(state);
        if !state.done.is_empty() {
            self.events.wakeup().wake();
        }
    }

    /// Wake up no later than when the oldest request should have been answered. A timer that is due earlier is left to
    /// expire: it costs one idle turn, and requests that are answered at once need none of their own.
    fn schedule(&self, state: &mut State) {
        state.timer = state.timer.filter(|due| Instant::now() < *due);
        if state.timer.is_none()
            && let Some(oldest) = state.sent.front()
        {
            state.timer = Some(oldest.deadline);
            self.events.add_timer(oldest.deadline);
        }
    }

    /// The channel is of no use any more.
    fn close(&self, state: &mut State, reason: &str) {
        let Some(connection) = state.connection.take() else { return };
        self.events.forget(&connection);
        state.full = false;
        state.trouble = Some(reason.to_owned());
        state.notifications.clear();
        let sent = state.sent.drain(..).filter_map(|Sent { request, then, .. }| match then {
            WhenAnswered::Call(then) => Some((request, then)),
            WhenAnswered::Notified(_) => None,
        });
        let waiting = state.waiting.drain(..).map(|waiting| (waiting.message.request(), waiting.then));
        for (request, then) in sent.chain(waiting) {
            let text = format!("{}: the back-end channel is closed: {reason}", request.name());
            state.done.push(Done { then, outcome: Err(Error::Closed(text)) });
        }
        state.over = Some(reason.to_owned());
        self.events.wakeup().wake();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether a request may be made.
    fn check(&self, request: BackendRequest, descriptors: usize) -> Result<(), Error> {
        let refuse = |reason: String| Err(Error::State(format!("{}: {reason}", request.name())));
        let missing = match request.info().gate {
            Gate::Protocol(feature) => feature.without(self.protocol_features),
            Gate::AccessPlatform if !self.features.contains(VirtioFeatures::ACCESS_PLATFORM) => {
                return refuse("needs the feature ACCESS_PLATFORM, which was not negotiated".to_owned());
            }
            _ => ProtocolFeatures::default(),
        };
        if !missing.is_empty() {
            return refuse(format!("needs the protocol feature {missing}, which was not negotiated"));
        }
        if descriptors > 0 && !self.protocol_features.contains(ProtocolFeatures::BACKEND_SEND_FD) {
            return refuse("needs BACKEND_SEND_FD to carry a descriptor, which was not negotiated".to_owned());
        }
        if let Some(reason) = &self.over {
            return refuse(format!("the back-end channel is closed: {reason}"));
        }
        if self.connection.is_none() {
            return refuse("the front-end opened no back-end channel (SET_BACKEND_REQ_FD)".to_owned());
        }
        let asked = self.sent.iter().filter(|sent| matches!(sent.then, WhenAnswered::Call(_))).count();
        if self.waiting.len() + asked >= MAX_REQUESTS {
            return refuse(format!("{MAX_REQUESTS} requests wait for the front-end already"));
        }
        Ok(())
    }

    fn send_waiting(&mut self, patience: Duration) -> Result<(), Error> {
        let Self { connection: Some(connection), suspended: false, .. } = self else { return Ok(()) };
        while connection.flush()? {
            if std::mem::take(&mut self.config_changed) {
                if self.protocol_features.contains(ProtocolFeatures::CONFIG) {
                    connection.try_send(BackendRequest::ConfigChangeMsg as u32, Flags::REQUEST, &[], Vec::new())?;
                }
                continue;
            }
            let outstanding = |wanted: &Notification| {
                self.sent.iter().any(|sent| matches!(sent.then, WhenAnswered::Notified(n) if n == *wanted))
            };
            if let Some(notification) = self.notifications.iter().copied().find(|wanted| !outstanding(wanted)) {
                self.notifications.remove(&notification);
                let message = notification.message();
                let mut payload = Vec::new();
                message.encode(&mut payload);
                let (request, deadline) = (message.request(), Instant::now() + patience);
                self.sent.push_back(Sent { request, deadline, then: WhenAnswered::Notified(notification) });
                connection.try_send(request as u32, Flags::REQUEST_NEED_REPLY, &payload, Vec::new())?;
                continue;
            }
            let Some(Request { message, files, then }) = self.waiting.pop_front() else { break };
            let request = message.request();
            let acknowledged = self.protocol_features.contains(ProtocolFeatures::REPLY_ACK);
            let (flags, answered) = match request.info().answer {
                Answer::Ack if acknowledged => (Flags::REQUEST_NEED_REPLY, true),
                Answer::Ack => (Flags::REQUEST, false),
                Answer::Reply(_) | Answer::ReplyAndFile(_) | Answer::ReplyWith(..) => (Flags::REQUEST, true),
            };
            let mut payload = Vec::new();
            message.encode(&mut payload);
            if answered {
                let then = WhenAnswered::Call(then);
                self.sent.push_back(Sent { request, deadline: Instant::now() + patience, then });
            } else {
                self.done.push(Done { then, outcome: Ok(Granted::default()) });
            }
            connection.try_send(request as u32, flags, &payload, files)?;
        }
        Ok(())
    }

    /// The answer to the oldest request. An error ends the channel.
    fn accept(&mut self, frame: Frame) -> Result<(), Error> {
        let Some(Sent { request, then, .. }) = self.sent.pop_front() else {
            return Err(Error::Framing(format!("the front-end answered {}, which nobody asked", frame.header.request)));
        };
        let (outcome, over) = match understand(request, frame) {
            Ok(granted) => (Ok(granted), None),
            Err(error @ Error::Refused { .. }) => (Err(error), None),
            Err(error) => (Err(Error::Framing(error.to_string())), Some(error)),
        };
        match (then, outcome) {
            (WhenAnswered::Call(then), outcome) => self.done.push(Done { then, outcome }),
            // A driver that has no such queue has nothing to look at.
            (WhenAnswered::Notified(_), _) => {}
        }
        over.map_or(Ok(()), Err)
    }
}

fn understand(request: BackendRequest, mut frame: Frame) -> Result<Granted, Error> {
    let name = request.name();
    let wrong = |reason: String| Err(Error::Framing(format!("{name}: the answer makes no sense: {reason}")));
    frame.header.check_reply(request as u32, name)?;
    if let Some(defect) = frame.defect {
        return wrong(defect);
    }
    let U64(code) = match U64::decode(&frame.payload) {
        Ok(code) => code,
        Err(reason) => return wrong(reason),
    };
    let descriptor = frame.descriptors.pop();
    let expected = usize::from(code == 0 && matches!(request.info().answer, Answer::ReplyAndFile(_)));
    let came = usize::from(descriptor.is_some()) + frame.descriptors.len();
    if came != expected {
        return wrong(format!("it has {came} descriptors, expected {expected}"));
    }
    if code != 0 {
        return Err(Error::Refused { message: name, reason: format!("the front-end refused it with {code:#x}") });
    }
    Ok(Granted { descriptor })
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("message", &self.message).finish_non_exhaustive()
    }
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sent").field("request", &self.request).finish_non_exhaustive()
    }
}

impl fmt::Debug for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Done").field("outcome", &self.outcome).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::protocol::{Empty, Uuid};

    const SOON: Duration = Duration::from_secs(60);

    /// A channel whose rings run, what the front-end has of it, and what became of requests.
    struct Bench {
        events: Arc<EventLoop>,
        channel: Arc<Channel>,
        peer: Connection,
        outcomes: mpsc::Receiver<(u8, Result<Granted, Error>)>,
        tell: mpsc::Sender<(u8, Result<Granted, Error>)>,
    }

    impl Bench {
        fn new(protocol_features: ProtocolFeatures) -> Self {
            Self::with_patience(protocol_features, SOON)
        }

        fn with_patience(protocol_features: ProtocolFeatures, patience: Duration) -> Self {
            let events = Arc::new(EventLoop::new().unwrap());
            let channel = Channel { events: Arc::clone(&events), patience, state: Mutex::default() };
            let (ours, theirs) = UnixStream::pair().unwrap();
            channel.set_negotiated(
                VirtioFeatures::default(),
                protocol_features | ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::SHARED_OBJECT,
            );
            channel.connect(ours.into()).unwrap();
            channel.set_suspended(false);
            let (tell, outcomes) = mpsc::channel();
            let peer = Connection::new(theirs.into()).unwrap();
            Self { events, channel: Arc::new(channel), peer, outcomes, tell }
        }

        fn request(&self, number: u8) -> Result<(), Error> {
            let tell = self.tell.clone();
            let then = Box::new(move |outcome| tell.send((number, outcome)).unwrap());
            self.channel.request(add(number), Vec::new(), then)
        }

        fn receive(&mut self) -> Frame {
            self.peer.receive(Instant::now() + SOON).unwrap()
        }

        fn answer(&mut self, request: u32, flags: u32, payload: &[u8]) {
            assert!(self.peer.try_send(request, Flags(flags), payload, Vec::new()).unwrap());
        }

        /// Turns of the loop, until a request is decided.
        fn next(&self) -> (u8, Result<Granted, Error>) {
            loop {
                if let Ok(outcome) = self.outcomes.try_recv() {
                    return outcome;
                }
                turn(&self.events, &self.channel, SOON);
            }
        }
    }

    fn add(number: u8) -> BackendMessage {
        BackendMessage::SharedObjectAdd(Uuid([number; 16]))
    }

    fn turn(events: &EventLoop, channel: &Channel, timeout: Duration) {
        let mut happened = Vec::new();
        events.wait(Some(timeout), &mut happened).unwrap();
        if happened.iter().any(|event| matches!(event, super::super::Event::Ready { token: Token::Channel, .. })) {
            channel.on_ready();
        }
        channel.settle();
    }

    const ADD: u32 = BackendRequest::SharedObjectAdd as u32;
    const LOOKUP: u32 = BackendRequest::SharedObjectLookup as u32;
    const OK: [u8; 8] = [0; 8];

    #[test]
    fn answers_belong_to_requests_in_the_order_in_which_they_were_made() {
        let mut bench = Bench::new(ProtocolFeatures::REPLY_ACK);
        for number in 1..=3 {
            bench.request(number).unwrap();
            let frame = bench.receive();
            assert_eq!((frame.header.request, frame.header.flags), (ADD, Flags::REQUEST_NEED_REPLY));
            assert_eq!(frame.payload, [number; 16]);
        }
        assert!(!bench.channel.is_idle());
        bench.answer(ADD, 0x5, &OK);
        bench.answer(ADD, 0x5, &7u64.to_ne_bytes());
        bench.answer(ADD, 0xd, &OK);
        assert!(matches!(bench.next(), (1, Ok(_))));
        let (number, refused) = bench.next();
        assert_eq!(number, 2);
        assert_eq!(refused.unwrap_err().to_string(), "BACKEND_SHARED_OBJECT_ADD: the front-end refused it with 0x7");
        assert!(matches!(bench.next(), (3, Ok(_))));
        assert!(bench.channel.is_idle());
    }

    #[test]
    fn an_answer_that_makes_no_sense_ends_the_channel_and_every_request() {
        let nonsense: [(u32, u32, &[u8], &str); 4] = [
            (LOOKUP, 0x5, &OK, "expected a reply to request 6"),
            (ADD, 0x1, &OK, "flags 0x5"),
            (ADD, 0x5, &[0; 4], "the answer makes no sense"),
            (ADD, 0x5, &[], "the answer makes no sense"),
        ];
        for (request, flags, payload, expected) in nonsense {
            let mut bench = Bench::new(ProtocolFeatures::REPLY_ACK);
            bench.request(1).unwrap();
            bench.request(2).unwrap();
            bench.answer(request, flags, payload);
            let (number, error) = bench.next();
            assert_eq!(number, 1);
            let text = error.unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
            assert!(matches!(bench.next(), (2, Err(Error::Closed(_)))));
            let text = bench.request(3).unwrap_err().to_string();
            assert!(text.contains("the back-end channel is closed") && text.contains(expected), "{text}");
            bench.receive();
            bench.receive();
            assert!(matches!(bench.peer.try_receive(), Ok(Received::Closed)));
        }
    }

    #[test]
    fn an_answer_that_nobody_asked_for_ends_the_channel() {
        let mut bench = Bench::new(ProtocolFeatures::REPLY_ACK);
        bench.answer(ADD, 0x5, &OK);
        turn(&bench.events, &bench.channel, SOON);
        assert!(bench.request(1).unwrap_err().to_string().contains("which nobody asked"));
    }

    #[test]
    fn only_a_lookup_is_answered_with_a_descriptor() {
        let mut bench = Bench::new(ProtocolFeatures::REPLY_ACK);
        let object = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let tell = bench.tell.clone();
        let then = Box::new(move |outcome| tell.send((0, outcome)).unwrap());
        bench.channel.request(BackendMessage::SharedObjectLookup(Uuid::default()), Vec::new(), then).unwrap();
        assert_eq!(bench.receive().header.flags, Flags::REQUEST);
        assert!(bench.peer.try_send(LOOKUP, Flags::ANSWER, &OK, vec![object()]).unwrap());
        assert!(bench.next().1.unwrap().descriptor.is_some());

        bench.request(1).unwrap();
        assert!(bench.peer.try_send(ADD, Flags::ANSWER, &OK, vec![object()]).unwrap());
        assert!(bench.next().1.unwrap_err().to_string().contains("it has 1 descriptors, expected 0"));
    }

    #[test]
    fn a_front_end_that_does_not_answer_loses_the_channel_at_the_deadline() {
        let bench = Bench::with_patience(ProtocolFeatures::REPLY_ACK, Duration::from_millis(20));
        bench.request(1).unwrap();
        bench.request(2).unwrap();
        assert!(matches!(bench.next(), (1, Err(Error::Timeout(text))) if text.contains("did not answer in 20ms")));
        assert!(matches!(bench.next(), (2, Err(Error::Closed(_)))));
        assert!(bench.request(3).is_err());
    }

    #[test]
    fn nothing_is_sent_while_every_ring_is_stopped() {
        let mut bench = Bench::new(ProtocolFeatures::CONFIG);
        bench.channel.set_suspended(true);
        bench.channel.config_changed();
        bench.request(1).unwrap();
        assert!(matches!(bench.peer.try_receive(), Ok(Received::Incomplete)));
        bench.channel.set_suspended(false);
        assert_eq!(bench.receive().header.request, BackendRequest::ConfigChangeMsg as u32);
        assert_eq!(bench.receive().header.request, ADD);
        assert!(matches!(bench.peer.try_receive(), Ok(Received::Incomplete)));
    }

    #[test]
    fn without_acknowledgements_a_request_that_was_sent_counts_as_granted() {
        let mut bench = Bench::new(ProtocolFeatures::default());
        bench.request(1).unwrap();
        assert_eq!(bench.receive().header.flags, Flags::REQUEST);
        assert!(matches!(bench.next(), (1, Ok(_))));
    }

    #[test]
    fn what_was_not_negotiated_is_not_asked() {
        let bench = Bench::new(ProtocolFeatures::REPLY_ACK);
        let file = || vec![eventfd(0, EventfdFlags::CLOEXEC).unwrap()];
        let refused = |message, files| bench.channel.request(message, files, Box::new(|_| ())).unwrap_err().to_string();
        assert!(refused(BackendMessage::ConfigChangeMsg(Empty), vec![]).contains("needs the protocol feature CONFIG"));
        assert!(refused(BackendMessage::IotlbMsg(Default::default()), vec![]).contains("ACCESS_PLATFORM"));
        assert!(refused(add(1), file()).contains("BACKEND_SEND_FD"));
        bench.channel.disconnect();
        assert!(refused(add(1), vec![]).contains("SHARED_OBJECT, which was not negotiated"));
    }

    #[test]
    fn requests_that_nobody_answers_do_not_pile_up_and_reach_a_slow_reader_whole() {
        let mut bench = Bench::new(ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIG);
        // The socket is full, and the change of the configuration waits for room.
        while bench.channel.lock().connection.as_ref().unwrap().is_flushed() {
            bench.channel.config_changed();
        }
        for number in 0..MAX_REQUESTS {
            bench.request(number as u8).unwrap();
        }
        assert!(bench.request(0).unwrap_err().to_string().contains("64 requests wait"));
        let mut numbers = Vec::new();
        while numbers.len() < MAX_REQUESTS {
            match bench.peer.try_receive().unwrap() {
                Received::Frame(frame) if frame.header.request == ADD => numbers.push(frame.payload[0]),
                Received::Frame(_) => {}
                Received::Incomplete => turn(&bench.events, &bench.channel, SOON),
                Received::Closed => panic!("closed"),
            }
        }
        assert_eq!(numbers, (0..MAX_REQUESTS as u8).collect::<Vec<_>>());
    }

    #[test]
    fn another_thread_may_wait_for_the_answer_and_the_loop_s_may_not() {
        let mut bench = Bench::new(ProtocolFeatures::REPLY_ACK);
        bench.events.enter();
        let error = bench.channel.ask(add(0), Vec::new(), Instant::now() + SOON).unwrap_err();
        assert!(error.to_string().contains("cannot wait for the answer"), "{error}");

        let channel = Arc::clone(&bench.channel);
        let asking = std::thread::spawn(move || channel.ask(add(1), Vec::new(), Instant::now() + SOON));
        bench.receive();
        bench.answer(ADD, 0x5, &OK);
        while !asking.is_finished() {
            turn(&bench.events, &bench.channel, Duration::from_millis(5));
        }
        assert!(asking.join().unwrap().is_ok());

        let channel = Arc::clone(&bench.channel);
        let asking = std::thread::spawn(move || channel.ask(add(2), Vec::new(), Instant::now()));
        assert!(matches!(asking.join().unwrap(), Err(Error::Timeout(_))));
    }

    #[test]
    fn the_end_of_the_session_tells_everybody_who_waits() {
        let bench = Bench::new(ProtocolFeatures::REPLY_ACK);
        bench.request(1).unwrap();
        bench.channel.set_suspended(true);
        bench.request(2).unwrap();
        bench.channel.disconnect();
        assert!(matches!(bench.next(), (1, Err(Error::Closed(text))) if text.contains("the session ended")));
        assert!(matches!(bench.next(), (2, Err(Error::Closed(_)))));
    }

    #[test]
    fn descriptors_go_with_their_own_message() {
        let mut bench = Bench::new(ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_SEND_FD);
        let file = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let copy = file.as_fd().try_clone_to_owned().unwrap();
        bench.channel.request(add(1), vec![copy], Box::new(|_| ())).unwrap();
        bench.request(2).unwrap();
        assert_eq!(bench.receive().descriptors.len(), 1);
        assert_eq!(bench.receive().descriptors.len(), 0);
    }
}
