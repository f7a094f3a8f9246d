//! The round barrier at the destination (R5): no page of a round is placed before every lane has
//! delivered all of the round before, so an older version never lands on a newer one.

/// What a lane may do with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Handle it now.
    Now,
    /// Hold it back until another lane has ended the current round.
    Wait,
}

/// A frame of a round that cannot be: too far ahead, or over already.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a frame of round {found} came on lane {lane} in round {current}")]
pub struct BarrierError {
    /// The lane.
    pub lane: u16,
    /// The frame's round.
    pub found: u32,
    /// The round that is open.
    pub current: u32,
}

/// Which round is open, and which lanes have ended it.
#[derive(Debug)]
pub struct RoundBarrier {
    current: u32,
    ended: Vec<bool>,
}

impl RoundBarrier {
    /// Round 0 is open on `lanes` lanes.
    pub fn new(lanes: u16) -> Self {
        Self { current: 0, ended: vec![false; lanes.into()] }
    }

    /// The open round; all before it are complete.
    pub fn current(&self) -> u32 {
        self.current
    }

    /// Whether a frame of `round` may be handled on `lane`.
    pub fn enter(&self, lane: u16, round: u32) -> Result<Entry, BarrierError> {
        let ended = *self.ended.get(usize::from(lane)).unwrap_or(&true);
        match round.checked_sub(self.current) {
            Some(0) if !ended => Ok(Entry::Now),
            Some(1) if ended => Ok(Entry::Wait),
            _ => Err(BarrierError { lane, found: round, current: self.current }),
        }
    }

    /// A lane has ended the open round. Returns the round if it is complete now.
    pub fn end(&mut self, lane: u16) -> Option<u32> {
        if let Some(ended) = self.ended.get_mut(usize::from(lane)) {
            *ended = true;
        }
        if !self.ended.iter().all(|&ended| ended) {
            return None;
        }
        self.ended.fill(false);
        let complete = self.current;
        self.current = self.current.saturating_add(1);
        Some(complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_lane_waits_for_the_slow_one() {
        let mut barrier = RoundBarrier::new(2);
        assert_eq!(barrier.enter(0, 0), Ok(Entry::Now));
        assert_eq!(barrier.end(0), None);
        assert_eq!(barrier.enter(0, 1), Ok(Entry::Wait));
        assert_eq!(barrier.enter(1, 0), Ok(Entry::Now));
        assert_eq!(barrier.end(1), Some(0));
        assert_eq!(barrier.enter(0, 1), Ok(Entry::Now));
    }

    #[test]
    fn rounds_out_of_order_and_unknown_lanes_are_errors() {
        let mut barrier = RoundBarrier::new(2);
        assert!(barrier.enter(0, 1).is_err());
        assert!(barrier.enter(0, 2).is_err());
        assert!(barrier.enter(7, 0).is_err());
        barrier.end(0);
        assert!(barrier.enter(0, 0).is_err());
        barrier.end(1);
        assert!(barrier.enter(0, 0).is_err());
        assert!(RoundBarrier::new(1).enter(0, u32::MAX).is_err());
    }
}
