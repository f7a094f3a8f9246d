//! Whether this host has the memory that a guest asks for.

use std::fs;

use pageferry::memory::Backing;

const HUGE_PAGE: u64 = 2 << 20;

/// Why a guest's memory is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRoom {
    /// The operator does not allow as much.
    #[error("the guest has {} MiB of memory, this destination allows {} MiB (--max-memory)", needed >> 20, limit >> 20)]
    Limit { needed: u64, limit: u64 },
    /// The host does not have as much.
    #[error(
        "{} MiB of memory are needed, this host has {} MiB available (--overcommit lets a guest start all the same)",
        needed >> 20,
        available >> 20
    )]
    Host { needed: u64, available: u64 },
    /// The host's pool of huge pages does not have as much.
    #[error("{needed} huge pages of 2 MiB are needed, this host has {free} free (vm.nr_hugepages)")]
    HugePages { needed: u64, free: u64 },
}

/// What the operator allows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Allowance {
    /// Most memory of a guest; `None` for what the host has.
    pub(crate) limit: Option<u64>,
    /// More than the host has: for guests that touch little of their memory. Huge pages cannot be overcommitted.
    pub(crate) overcommit: bool,
}

/// Refuses a guest of `needed` bytes that would exceed what the operator allows or this host's memory.
pub(crate) fn check(needed: u64, backing: Backing, allowance: Allowance) -> Result<(), NoRoom> {
    // Without /proc the host cannot be asked; it will refuse by itself.
    let memory_info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    check_against(needed, backing, allowance, &memory_info)
}

fn check_against(needed: u64, backing: Backing, allowance: Allowance, memory_info: &str) -> Result<(), NoRoom> {
    if let Some(limit) = allowance.limit.filter(|&limit| needed > limit) {
        return Err(NoRoom::Limit { needed, limit });
    }
    if backing == Backing::HugePages2M {
        let needed = needed.div_ceil(HUGE_PAGE);
        let free = field(memory_info, "HugePages_Free:").unwrap_or(u64::MAX);
        return if needed > free { Err(NoRoom::HugePages { needed, free }) } else { Ok(()) };
    }
    let available = field(memory_info, "MemAvailable:").map_or(u64::MAX, |kib| kib << 10);
    if needed > available && !allowance.overcommit { Err(NoRoom::Host { needed, available }) } else { Ok(()) }
}

fn field(memory_info: &str, name: &str) -> Option<u64> {
    let rest = memory_info.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "MemTotal:  9999 kB\nMemAvailable:    2048 kB\nHugePages_Free:       3\n";

    fn check_small(needed: u64, backing: Backing, limit: Option<u64>) -> Result<(), NoRoom> {
        check_against(needed, backing, Allowance { limit, overcommit: false }, INFO)
    }

    #[test]
    fn the_nearest_limit_refuses() {
        let anonymous = Backing::Anonymous;
        assert_eq!(check_small(2 << 20, anonymous, None), Ok(()));
        assert_eq!(check_small(3 << 20, anonymous, None), Err(NoRoom::Host { needed: 3 << 20, available: 2 << 20 }));
        assert_eq!(
            check_small(2 << 20, anonymous, Some(1 << 20)),
            Err(NoRoom::Limit { needed: 2 << 20, limit: 1 << 20 })
        );
        assert_eq!(check_small(6 << 20, Backing::HugePages2M, None), Ok(()));
        assert_eq!(check_small(7 << 20, Backing::HugePages2M, None), Err(NoRoom::HugePages { needed: 4, free: 3 }));
    }

    #[test]
    fn a_host_that_says_nothing_refuses_nothing() {
        assert_eq!(check_against(u64::MAX, Backing::Memfd, Allowance::default(), ""), Ok(()));
    }

    #[test]
    fn overcommitment_lifts_only_the_hosts_limit_and_not_for_huge_pages() {
        let check = |needed, backing, limit| {
            check_against(needed, backing, Allowance { limit, overcommit: true }, INFO).is_ok()
        };
        assert!(check(1 << 40, Backing::Anonymous, None));
        assert!(!check(1 << 40, Backing::Anonymous, Some(1 << 30)));
        assert!(!check(1 << 40, Backing::HugePages2M, None));
    }
}
