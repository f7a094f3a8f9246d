//! How much memory lanes register. The kernel counts it against the limit on locked memory, which is 8 MiB on many
//! hosts: rings are small, and guest memory is registered in windows that come and go.

use std::fs;

use crate::message::{RESERVED_SLOTS, SLOT};
use crate::options::RdmaOptions;

/// Slots for the peer's messages where much is to come: 320 KiB under way, as much as a link of 100 Gbps holds in 25 us.
const MANY_CREDITS: u16 = 20;

/// And where only messages come: with these a frame of two slots still does not wait.
const FEW_CREDITS: u16 = 4;

/// Slots to send from, alike.
const MANY_SLOTS: u16 = 16;
const FEW_SLOTS: u16 = 4;

/// The longest window: long enough that asking for the next one takes no time to speak of.
const LONGEST_WINDOW: u64 = 2 << 20;
const SHORTEST_WINDOW: u64 = 64 << 10;

/// One is written, one is asked for meanwhile; the others save asking again.
const MOST_WINDOWS: u64 = 8;

/// Data lanes, where memory is short.
const FEW_LANES: u64 = 4;

/// Callers that may stand in the door with what a lane needs: strangers, for all that is known.
const MANY_CALLERS: usize = 16;
const FEW_CALLERS: usize = 2;

/// Slots of one end of a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rings {
    pub(crate) send_slots: u16,
    /// Without the reserved ones.
    pub(crate) credits: u16,
}

impl Rings {
    /// For the end that mostly sends, the one that mostly receives, or both (`None`).
    pub(crate) fn new(mostly_sends: Option<bool>) -> Self {
        let (send_slots, credits) = match mostly_sends {
            None => (MANY_SLOTS, MANY_CREDITS),
            Some(true) => (MANY_SLOTS, FEW_CREDITS),
            Some(false) => (FEW_SLOTS, MANY_CREDITS),
        };
        Self { send_slots, credits }
    }

    /// Slots for what comes.
    pub(crate) fn receive_slots(self) -> u16 {
        self.credits + RESERVED_SLOTS
    }

    fn bytes(self) -> u64 {
        u64::from(self.send_slots + self.receive_slots()) * SLOT as u64
    }
}

/// What one side of a migration registers at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Plan {
    /// Control lane included.
    pub(crate) max_lanes: u16,
    /// Windows per lane; 0 where there is no room for any.
    pub(crate) windows: u16,
    /// Bytes of a window, a power of two.
    pub(crate) window: u64,
    /// Callers that have not sent a frame yet.
    pub(crate) callers: usize,
}

impl Plan {
    /// By the options, and the limit of this process.
    pub(crate) fn of(options: &RdmaOptions) -> Self {
        Self::within(options.locked_memory.or_else(locked_memory_limit))
    }

    /// Half of a limit is for rings, the rest for windows; an eighth is left to queues and to others in the process.
    pub(crate) fn within(limit: Option<u64>) -> Self {
        let Some(limit) = limit else {
            return Self {
                max_lanes: pageferry::limits::MAX_LANES + 1,
                windows: MOST_WINDOWS as u16,
                window: LONGEST_WINDOW,
                callers: MANY_CALLERS,
            };
        };
        let (usable, control) = (limit - limit / 8, Rings::new(None).bytes());
        let data = Rings::new(Some(true)).bytes().max(Rings::new(Some(false)).bytes());
        let lanes = ((usable / 2).saturating_sub(control) / data).clamp(1, FEW_LANES);
        let per_lane = usable.saturating_sub(control + lanes * data) / lanes;
        let mut window = LONGEST_WINDOW;
        while window > SHORTEST_WINDOW && 2 * window > per_lane {
            window /= 2;
        }
        let windows = (per_lane / window).min(MOST_WINDOWS) as u16;
        Self { max_lanes: lanes as u16 + 1, windows, window, callers: FEW_CALLERS }
    }
}

/// Bytes that this process may lock, `None` if it may lock all it likes.
pub(crate) fn locked_memory_limit() -> Option<u64> {
    const CAP_IPC_LOCK: u32 = 14;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let field = |text: &str, name: &str| -> Option<String> {
        text.lines().find_map(|line| Some(line.strip_prefix(name)?.split_whitespace().next()?.to_owned()))
    };
    let capabilities = field(&status, "CapEff:").and_then(|mask| u64::from_str_radix(&mask, 16).ok());
    if capabilities.is_some_and(|mask| mask >> CAP_IPC_LOCK & 1 == 1) {
        return None;
    }
    field(&limits, "Max locked memory")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registered(plan: Plan) -> u64 {
        let lanes = u64::from(plan.max_lanes - 1);
        let data = Rings::new(Some(false)).bytes() + u64::from(plan.windows) * plan.window;
        Rings::new(None).bytes() + lanes * data
    }

    #[test]
    fn eight_mebibytes_do_for_several_lanes_with_windows() {
        let plan = Plan::within(Some(8 << 20));
        assert_eq!((plan.max_lanes, plan.windows, plan.window), (5, 2, 512 << 10));
    }

    #[test]
    fn no_plan_registers_more_than_its_limit() {
        for limit in (2 << 20..=512 << 20).step_by(333 << 10) {
            let plan = Plan::within(Some(limit));
            assert!(registered(plan) <= limit, "{limit}: {plan:?}");
            assert!(plan.windows >= 1 || limit < 3 << 20, "{limit}: {plan:?}");
        }
    }

    #[test]
    fn a_tiny_limit_leaves_one_data_lane_and_no_windows() {
        let plan = Plan::within(Some(64 << 10));
        assert_eq!((plan.max_lanes, plan.windows), (2, 0));
    }
}
