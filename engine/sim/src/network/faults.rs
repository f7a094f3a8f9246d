//! What the network does to lanes when a fault strikes, and how it heals.

use std::time::Duration;

use pageferry::wire::Kind;

use super::{End, LaneId, Network, Way};
use crate::clock::{Clock, Event};
use crate::fault::{Cut, Fault, Scope, Trigger};

impl Network {
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

    pub(super) fn in_scope(&self, scope: Scope, lane: Option<LaneId>) -> Vec<LaneId> {
        let chosen = |id: &LaneId| match (scope, lane) {
            (Scope::Lane, Some(lane)) => *id == lane,
            (Scope::Role(role), _) => self.lanes[*id].role == role,
            (Scope::Link, _) | (Scope::Lane, None) => true,
        };
        (0..self.lanes.len()).filter(chosen).collect()
    }

    pub(super) fn cut_lane(
        &mut self,
        clock: &mut Clock,
        id: LaneId,
        source: Option<Duration>,
        destination: Option<Duration>,
    ) {
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
}
