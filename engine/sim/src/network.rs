//! The network: lanes of bytes with delay, bandwidth and a bounded buffer, that stall, break, lose
//! their tail and damage bytes. Order holds within a lane's direction and nowhere else.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use pageferry::transport::LaneRole;
use pageferry::wire::{FrameBuffer, HEADER_LEN, Kind};

use crate::clock::{Clock, Event, HostId};
use crate::fault::{Cut, Fault, Scope, Trigger, Which};

/// A lane's number; a lane that is opened again is another lane.
pub(crate) type LaneId = usize;

/// A direction on a lane.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Way {
    /// Source to destination.
    Out,
    /// Destination to source.
    Back,
}

/// Who dialled, and who was dialled.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum End {
    Source,
    Destination,
}

impl End {
    /// The direction that this end writes.
    pub(crate) fn writes(self) -> Way {
        match self {
            Self::Source => Way::Out,
            Self::Destination => Way::Back,
        }
    }

    /// The direction that this end reads.
    pub(crate) fn reads(self) -> Way {
        match self {
            Self::Source => Way::Back,
            Self::Destination => Way::Out,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

impl Way {
    fn writer(self) -> End {
        match self {
            Self::Out => End::Source,
            Self::Back => End::Destination,
        }
    }

    fn reader(self) -> End {
        self.writer().other()
    }
}

/// How fast and how deep lanes are.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    /// One way, per lane: control lanes take the first, data lane `i` the one at `i + 1`, round and round.
    pub(crate) latency: Vec<Duration>,
    /// Bytes per second, chosen like the latency.
    pub(crate) bandwidth: Vec<u64>,
    /// Longest extra delay of a segment.
    pub(crate) jitter: Duration,
    /// Bytes that a direction holds, read or on the way, before its writer blocks.
    pub(crate) capacity: u64,
}

/// A frame that was sent, for whoever wants to strike at each of them later.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SentFrame {
    pub(crate) number: u64,
    pub(crate) kind: Kind,
    pub(crate) len: u64,
    /// Sent between the guest's last step at the source and the end.
    pub(crate) guest_stands: bool,
}

enum Segment {
    Bytes(Vec<u8>),
    /// The writer has closed.
    End,
    /// A fault strikes when what is before it has arrived.
    Fault(usize),
    /// The lane is cut here.
    Cut(Cut),
}

#[derive(Default)]
struct Pipe {
    on_the_way: VecDeque<(Duration, Segment)>,
    arrived: Vec<u8>,
    free_at: Duration,
    last_arrival: Duration,
    stalled_until: Duration,
    written: u64,
    read: u64,
    /// Nothing that is written arrives any more.
    severed: bool,
    write_error: Option<io::ErrorKind>,
    /// What the reader sees after what has arrived.
    read_end: Option<io::ErrorKind>,
    reader_closed: bool,
}

/// A lane and its two ends.
pub(crate) struct Lane {
    pub(crate) role: LaneRole,
    /// The processes at the source's and the destination's end.
    pub(crate) hosts: [HostId; 2],
    out: Pipe,
    back: Pipe,
}

impl Lane {
    fn pipe(&mut self, way: Way) -> &mut Pipe {
        match way {
            Way::Out => &mut self.out,
            Way::Back => &mut self.back,
        }
    }

    pub(crate) fn host(&self, end: End) -> HostId {
        self.hosts[end as usize]
    }
}

/// A fault that waits for its moment.
struct Armed {
    trigger: Trigger,
    fault: Fault,
    fired: bool,
    /// The lane of the frame that triggered it.
    lane: Option<LaneId>,
}

/// All lanes there ever were.
pub(crate) struct Network {
    link: Link,
    lanes: Vec<Lane>,
    armed: Vec<Armed>,
    /// Connecting is impossible until then.
    down_until: Duration,
    /// A connection attempt fails at once, rather than by its timeout.
    pub(crate) refuses: bool,
    kinds_sent: [u64; 32],
    frames: u64,
    pub(crate) log: Option<Vec<SentFrame>>,
    /// The source's guest has been paused.
    pub(crate) guest_stands: bool,
}

impl Network {
    pub(crate) fn new(link: Link, faults: &[(Trigger, Fault)]) -> Self {
        let armed = faults.iter().map(|&(trigger, fault)| Armed { trigger, fault, fired: false, lane: None }).collect();
        Self {
            link,
            lanes: Vec::new(),
            armed,
            down_until: Duration::ZERO,
            refuses: false,
            kinds_sent: [0; 32],
            frames: 0,
            log: None,
            guest_stands: false,
        }
    }

    // ---- faults ----

    /// Schedules the faults that come by the clock.
    pub(crate) fn arm(&self, clock: &mut Clock) {
        for (index, armed) in self.armed.iter().enumerate() {
            if let Trigger::At(at) = armed.trigger {
                clock.at(at, Event::Fault(index));
            }
        }
    }

    /// A fault whose moment has come; `None` if it is over already.
    pub(crate) fn take_fault(&mut self, index: usize) -> Option<(Fault, Option<LaneId>)> {
        let armed = self.armed.get_mut(index)?;
        if std::mem::replace(&mut armed.fired, true) {
            return None;
        }
        Some((armed.fault, armed.lane))
    }

    /// Faults that have struck.
    pub(crate) fn struck(&self) -> impl Iterator<Item = Fault> {
        self.armed.iter().filter(|armed| armed.fired).map(|armed| armed.fault)
    }

    /// How many frames of a kind were sent.
    pub(crate) fn sent(&self, kind: Kind) -> u64 {
        self.kinds_sent[kind as usize % 32]
    }

    /// From here on nothing goes wrong any more, and what was silent is dead.
    pub(crate) fn heal(&mut self, clock: &mut Clock) {
        self.armed.iter_mut().for_each(|armed| armed.trigger = Trigger::At(Duration::MAX));
        self.armed.retain(|armed| armed.fired);
        self.down_until = Duration::ZERO;
        for id in 0..self.lanes.len() {
            if [Way::Out, Way::Back].into_iter().any(|way| self.lanes[id].pipe(way).stalled_until > clock.now) {
                self.cut_lane(clock, id, Some(Duration::ZERO), Some(Duration::ZERO));
            }
        }
    }

    pub(crate) fn is_down(&self, now: Duration) -> bool {
        now < self.down_until
    }

    /// When connecting may work again.
    pub(crate) fn down_until(&self) -> Duration {
        self.down_until
    }

    pub(crate) fn cut(&mut self, clock: &mut Clock, cut: Cut, lane: Option<LaneId>) {
        if cut.scope == Scope::Link {
            let until = cut.heals_after.map_or(Duration::MAX, |after| clock.now.saturating_add(after));
            self.down_until = self.down_until.max(until);
        }
        for id in self.in_scope(cut.scope, lane) {
            self.cut_lane(clock, id, cut.source_notices, cut.destination_notices);
        }
    }

    pub(crate) fn stall(
        &mut self,
        clock: &mut Clock,
        scope: Scope,
        ways: &[Way],
        lasts: Option<Duration>,
        lane: Option<LaneId>,
    ) {
        let until = lasts.map_or(Duration::MAX, |lasts| clock.now.saturating_add(lasts));
        for id in self.in_scope(scope, lane) {
            for &way in ways {
                let pipe = self.lanes[id].pipe(way);
                pipe.stalled_until = pipe.stalled_until.max(until);
                if until < Duration::MAX {
                    clock.at(until, Event::Unstall(id, way));
                }
            }
        }
    }

    fn in_scope(&self, scope: Scope, lane: Option<LaneId>) -> Vec<LaneId> {
        let chosen = |id: &LaneId| match (scope, lane) {
            (Scope::Lane, Some(lane)) => *id == lane,
            (Scope::Role(role), _) => self.lanes[*id].role == role,
            (Scope::Link, _) | (Scope::Lane, None) => true,
        };
        (0..self.lanes.len()).filter(chosen).collect()
    }

    fn cut_lane(&mut self, clock: &mut Clock, id: LaneId, source: Option<Duration>, destination: Option<Duration>) {
        clock.note("network", ("cut", id), || format!("lane {id} is cut"));
        for way in [Way::Out, Way::Back] {
            let pipe = self.lanes[id].pipe(way);
            pipe.severed = true;
            pipe.on_the_way.clear();
        }
        for (end, notices) in [(End::Source, source), (End::Destination, destination)] {
            if let Some(after) = notices {
                clock.after(after, Event::Notice(id, end));
            }
        }
    }

    // ---- lanes ----

    pub(crate) fn open(&mut self, role: LaneRole, source: HostId, destination: HostId) -> LaneId {
        self.lanes.push(Lane { role, hosts: [source, destination], out: Pipe::default(), back: Pipe::default() });
        self.lanes.len() - 1
    }

    pub(crate) fn lane(&self, id: LaneId) -> &Lane {
        &self.lanes[id]
    }

    /// Time for a connection to be made.
    pub(crate) fn round_trip(&self, role: LaneRole) -> Duration {
        self.latency(role) * 2
    }

    fn latency(&self, role: LaneRole) -> Duration {
        self.link.latency[slot(role) % self.link.latency.len()]
    }

    /// Ends a lane from one end.
    pub(crate) fn close(&mut self, clock: &mut Clock, id: LaneId, end: End) {
        let latency = self.latency(self.lanes[id].role);
        let lane = &mut self.lanes[id];
        let reads = lane.pipe(end.reads());
        if std::mem::replace(&mut reads.reader_closed, true) {
            return;
        }
        reads.read_end.get_or_insert(io::ErrorKind::UnexpectedEof);
        let writes = lane.pipe(end.writes());
        writes.write_error.get_or_insert(io::ErrorKind::BrokenPipe);
        if !writes.severed {
            let arrival = writes.last_arrival.max(clock.now + latency);
            writes.last_arrival = arrival;
            writes.on_the_way.push_back((arrival, Segment::End));
            clock.at(arrival, Event::Deliver(id, end.writes()));
        }
        clock.after(Duration::ZERO, Event::Readable(id, end));
        clock.after(Duration::ZERO, Event::Writable(id, end));
    }

    /// A process has died: its host's kernel ends its lanes.
    pub(crate) fn close_all_of(&mut self, clock: &mut Clock, host: HostId) {
        for id in 0..self.lanes.len() {
            for end in [End::Source, End::Destination] {
                if self.lanes[id].host(end) == host {
                    self.close(clock, id, end);
                }
            }
        }
    }

    // ---- bytes ----

    /// Writes a whole frame. `false` means that the writer is blocked until [`is_written`](Self::is_written).
    pub(crate) fn write(&mut self, clock: &mut Clock, id: LaneId, end: End, frame: Vec<u8>) -> io::Result<bool> {
        let way = end.writes();
        if let Some(kind) = self.lanes[id].pipe(way).write_error {
            return Err(kind.into());
        }
        let len = frame.len() as u64;
        let segments = self.strike(clock, id, frame);
        let role = self.lanes[id].role;
        let (latency, jitter) = (self.latency(role), self.link.jitter);
        let bandwidth = self.link.bandwidth[slot(role) % self.link.bandwidth.len()];
        let pipe = self.lanes[id].pipe(way);
        pipe.written += len;
        for segment in segments {
            if pipe.severed {
                break;
            }
            let bytes = if let Segment::Bytes(bytes) = &segment { bytes.len() as u64 } else { 0 };
            let sending = Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(bandwidth)) as u64);
            pipe.free_at = pipe.free_at.max(clock.now) + sending;
            let extra = Duration::from_nanos(clock.random.below(jitter.as_nanos() as u64 + 1));
            pipe.last_arrival = pipe.last_arrival.max(pipe.free_at + latency + extra);
            pipe.on_the_way.push_back((pipe.last_arrival, segment));
            clock.at(pipe.last_arrival, Event::Deliver(id, way));
        }
        self.is_written(id, end)
    }

    /// Whether all that was written is in the buffers.
    pub(crate) fn is_written(&mut self, id: LaneId, end: End) -> io::Result<bool> {
        let capacity = self.link.capacity;
        let pipe = self.lanes[id].pipe(end.writes());
        match pipe.write_error {
            Some(kind) => Err(kind.into()),
            None => Ok(pipe.written - pipe.read <= capacity),
        }
    }

    /// Cuts a frame into segments, with the faults that strike at it.
    fn strike(&mut self, clock: &mut Clock, id: LaneId, mut frame: Vec<u8>) -> Vec<Segment> {
        let number = self.frames;
        self.frames += 1;
        let kind = frame[4];
        let sent = &mut self.kinds_sent[usize::from(kind) % 32];
        let nth = *sent;
        *sent += 1;
        self.record(number, &frame);
        let matches = |which: Which| match which {
            Which::Number(wanted) => wanted == number,
            Which::Kind(wanted, wanted_nth) => wanted as u8 == kind && wanted_nth == nth,
        };
        let mut behind = Vec::new();
        for (index, armed) in self.armed.iter_mut().enumerate().filter(|(_, armed)| !armed.fired) {
            let (Trigger::Sent(which) | Trigger::Arrived(which)) = armed.trigger else { continue };
            if !matches(which) {
                continue;
            }
            armed.lane = Some(id);
            match armed.fault {
                Fault::Flip { offset, mask } => {
                    let at = (offset % frame.len() as u64) as usize;
                    frame[at] ^= mask;
                    armed.fired = true;
                    clock.note("network", ("flip", id, at), || format!("byte {at} of a frame on lane {id} is damaged"));
                }
                Fault::Truncate { bytes, cut } => {
                    frame.truncate((bytes % (frame.len() as u64 + 1)) as usize);
                    behind.push(Segment::Cut(cut));
                    armed.fired = true;
                }
                _ if matches!(armed.trigger, Trigger::Arrived(_)) => behind.push(Segment::Fault(index)),
                _ => clock.after(Duration::ZERO, Event::Fault(index)),
            }
        }
        let mut segments = vec![];
        if frame.len() > HEADER_LEN && clock.random.chance(20) {
            let at = clock.random.within(1..=frame.len() as u64 - 1) as usize;
            let rest = frame.split_off(at);
            segments.push(Segment::Bytes(frame));
            frame = rest;
        }
        segments.push(Segment::Bytes(frame));
        segments.extend(behind);
        segments
    }

    fn record(&mut self, number: u64, frame: &[u8]) {
        if let Some(log) = &mut self.log {
            if let Ok(header) = pageferry::wire::Header::decode(&frame[..HEADER_LEN]) {
                let (len, guest_stands) = (frame.len() as u64, self.guest_stands);
                log.push(SentFrame { number, kind: header.kind, len, guest_stands });
            }
        }
    }

    /// What is due on a direction arrives.
    pub(crate) fn deliver(&mut self, clock: &mut Clock, id: LaneId, way: Way) {
        let pipe = self.lanes[id].pipe(way);
        let due = pipe.on_the_way.front().is_some_and(|(at, _)| *at <= clock.now);
        if !due || pipe.stalled_until > clock.now {
            return;
        }
        let Some((_, segment)) = pipe.on_the_way.pop_front() else { return };
        match segment {
            Segment::Bytes(bytes) if pipe.reader_closed => {
                // Nobody reads there any more: the writer is told.
                drop(bytes);
                let latency = self.latency(self.lanes[id].role);
                clock.after(latency, Event::Notice(id, way.writer()));
            }
            Segment::Bytes(bytes) => {
                pipe.arrived.extend_from_slice(&bytes);
                clock.after(Duration::ZERO, Event::Readable(id, way.reader()));
            }
            Segment::End => {
                pipe.read_end.get_or_insert(io::ErrorKind::UnexpectedEof);
                clock.after(Duration::ZERO, Event::Readable(id, way.reader()));
            }
            Segment::Fault(index) => clock.after(Duration::ZERO, Event::Fault(index)),
            Segment::Cut(cut) => {
                self.cut(clock, cut, Some(id));
                self.cut_lane(clock, id, cut.source_notices, cut.destination_notices);
            }
        }
    }

    pub(crate) fn unstall(&mut self, clock: &mut Clock, id: LaneId, way: Way) {
        let pipe = self.lanes[id].pipe(way);
        for (at, _) in &pipe.on_the_way {
            clock.at(*at, Event::Deliver(id, way));
        }
    }

    /// One end learns that the lane is dead.
    pub(crate) fn notice(&mut self, clock: &mut Clock, id: LaneId, end: End) {
        let lane = &mut self.lanes[id];
        lane.pipe(end.reads()).read_end.get_or_insert(io::ErrorKind::ConnectionReset);
        lane.pipe(end.writes()).write_error.get_or_insert(io::ErrorKind::ConnectionReset);
        clock.after(Duration::ZERO, Event::Readable(id, end));
        clock.after(Duration::ZERO, Event::Writable(id, end));
    }

    /// Reads the next frame as a stream lane does; `false` when it is not there yet.
    pub(crate) fn read(
        &mut self,
        clock: &mut Clock,
        id: LaneId,
        end: End,
        frame: &mut FrameBuffer,
    ) -> io::Result<bool> {
        let way = end.reads();
        let pipe = self.lanes[id].pipe(way);
        if pipe.arrived.len() >= HEADER_LEN {
            frame.prepare(HEADER_LEN)?.copy_from_slice(&pipe.arrived[..HEADER_LEN]);
            let len = HEADER_LEN + frame.announced_body()?;
            if pipe.arrived.len() >= len {
                frame.extend(len - HEADER_LEN)?.copy_from_slice(&pipe.arrived[HEADER_LEN..len]);
                pipe.arrived.drain(..len);
                pipe.read += len as u64;
                clock.after(Duration::ZERO, Event::Writable(id, way.writer()));
                return Ok(true);
            }
        }
        match pipe.read_end {
            Some(kind) => Err(kind.into()),
            None => Ok(false),
        }
    }
}

fn slot(role: LaneRole) -> usize {
    match role {
        LaneRole::Data(index) => usize::from(index) + 1,
        _ => 0,
    }
}
