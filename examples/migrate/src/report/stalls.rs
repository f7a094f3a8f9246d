//! How long the guest's heart stood still, and when.

use serde::{Deserialize, Serialize};

/// The longest time between two heartbeats in each part of the guest's life; `null` for a part that this side cannot
/// tell of, or a guest that has no heart.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct GuestStalls {
    /// Since the guest was ready, until the migration began: what its host does to it anyway.
    pub(crate) before: Option<f64>,
    /// While the migration ran, the standstill included.
    pub(crate) during: Option<f64>,
    /// Since then, on the side that has the guest.
    pub(crate) after: Option<f64>,
}

impl GuestStalls {
    /// The longest of what the migration may have caused.
    pub(crate) fn longest(&self) -> Option<f64> {
        [self.during, self.after].into_iter().flatten().reduce(f64::max)
    }

    /// Adds what the other side knows.
    pub(crate) fn merge(&mut self, other: &Self) {
        let most = |a: Option<f64>, b: Option<f64>| [a, b].into_iter().flatten().reduce(f64::max);
        self.before = most(self.before, other.before);
        self.during = most(self.during, other.during);
        self.after = most(self.after, other.after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_before_is_no_fault_of_the_migration() {
        let mut stalls = GuestStalls { before: Some(50.0), during: None, after: None };
        assert_eq!(stalls.longest(), None);
        stalls.merge(&GuestStalls { before: None, during: Some(7.0), after: Some(9.0) });
        assert_eq!(stalls, GuestStalls { before: Some(50.0), during: Some(7.0), after: Some(9.0) });
        assert_eq!(stalls.longest(), Some(9.0));
    }
}
