//! CPU time that a virtual machine asked for and its host gave to others: what makes a run on a shared machine say more
//! about the neighbours than about a migration.

use std::fs;

/// From this share on a run is marked as disturbed: more than most differences between movers of CPU-bound runs.
pub(crate) const DISTURBING: f64 = 0.05;

/// The clock of all CPUs, in ticks since the start of this machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CpuClock {
    /// Spent, whoever spent it.
    busy: u64,
    /// Asked for, and not had.
    stolen: u64,
}

impl CpuClock {
    /// Nothing where `/proc/stat` does not say it.
    pub(crate) fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// Of the first line: user, nice, system, idle, iowait, irq, softirq, steal; what guests took is part of user and nice
    /// (proc_stat(5)).
    fn parse(text: &str) -> Option<Self> {
        let ticks = text.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = ticks.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let &[user, nice, system, _idle, _waiting, irq, softirq, stolen, ..] = ticks.as_slice() else { return None };
        Some(Self { busy: user + nice + system + irq + softirq, stolen })
    }

    /// How much of the CPU time that was asked for since then the host gave to others, from 0 to 1; nothing if none was
    /// asked for.
    pub(crate) fn stolen_share(self, now: Self) -> Option<f64> {
        let stolen = now.stolen.saturating_sub(self.stolen);
        let asked = now.busy.saturating_sub(self.busy) + stolen;
        (asked > 0).then(|| stolen as f64 / asked as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_of_what_was_asked_for() {
        let before = CpuClock::parse("cpu  100 20 30 4000 7 1 2 50 60 10\ncpu0 1 2 3\n").unwrap();
        let after = CpuClock::parse("cpu  150 20 40 9000 7 1 2 80 60 10\n").unwrap();
        assert_eq!(before, CpuClock { busy: 153, stolen: 50 });
        assert!((before.stolen_share(after).unwrap() - 30.0 / 90.0).abs() < 1e-9);
        assert_eq!(before.stolen_share(before), None);
    }

    #[test]
    fn a_kernel_that_tells_less_is_no_quiet_one() {
        for text in ["", "cpu  1 2 3 4 5 6 7\n", "cpu0 1 2 3 4 5 6 7 8\n", "cpu  a b c\n"] {
            assert_eq!(CpuClock::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn this_machine_has_a_clock_that_runs() {
        let before = CpuClock::now().unwrap();
        let now = CpuClock::now().unwrap();
        assert!(now.busy >= before.busy && now.busy > 0);
    }
}
