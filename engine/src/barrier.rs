//! The barrier at the destination (R5, R6): no page of a step is placed before every lane has delivered
//! all of the step before, so an older version never lands on a newer one, and a copy never comes before
//! what it copies. A round has two steps ([`crate::batch`]).

/// What a lane may do with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Handle it now.
    Now,
    /// Hold it back until another lane has ended the open step.
    Wait,
}

/// A frame of a step that cannot be: too far ahead, or over already.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a frame of step {found} came on lane {lane} in step {current}")]
pub struct BarrierError {
    /// The lane.
    pub lane: u16,
    /// The frame's step.
    pub found: u32,
    /// The step that is open.
    pub current: u32,
}

/// Which step is open, and which lanes have ended it.
#[derive(Debug)]
pub struct Barrier {
    current: u32,
    ended: Vec<bool>,
}

impl Barrier {
    /// Step 0 is open on `lanes` lanes.
    pub fn new(lanes: u16) -> Self {
        Self { current: 0, ended: vec![false; lanes.into()] }
    }

    /// The open step; all before it are complete.
    pub fn current(&self) -> u32 {
        self.current
    }

    /// Whether a frame of `step` may be handled on `lane`.
    pub fn enter(&self, lane: u16, step: u32) -> Result<Entry, BarrierError> {
        let ended = *self.ended.get(usize::from(lane)).unwrap_or(&true);
        match step.checked_sub(self.current) {
            Some(0) if !ended => Ok(Entry::Now),
            Some(1) if ended => Ok(Entry::Wait),
            _ => Err(BarrierError { lane, found: step, current: self.current }),
        }
    }

    /// A lane has ended the open step. Returns the step if it is complete now.
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
        let mut barrier = Barrier::new(2);
        assert_eq!(barrier.enter(0, 0), Ok(Entry::Now));
        assert_eq!(barrier.end(0), None);
        assert_eq!(barrier.enter(0, 1), Ok(Entry::Wait));
        assert_eq!(barrier.enter(1, 0), Ok(Entry::Now));
        assert_eq!(barrier.end(1), Some(0));
        assert_eq!(barrier.enter(0, 1), Ok(Entry::Now));
    }

    #[test]
    fn rounds_out_of_order_and_unknown_lanes_are_errors() {
        let mut barrier = Barrier::new(2);
        assert!(barrier.enter(0, 1).is_err());
        assert!(barrier.enter(0, 2).is_err());
        assert!(barrier.enter(7, 0).is_err());
        barrier.end(0);
        assert!(barrier.enter(0, 0).is_err());
        barrier.end(1);
        assert!(barrier.enter(0, 0).is_err());
        assert!(Barrier::new(1).enter(0, u32::MAX).is_err());
    }
}
