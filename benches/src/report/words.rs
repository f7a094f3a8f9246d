//! Numbers as people say them.

use crate::study::{End, Guest, Link, Run, Shaper, Writes};

const KIB: f64 = 1024.0;

/// What stands for a number that is not there.
pub(crate) const NOTHING: &str = "–";

/// Three digits that count, without trailing zeros after four: `0.0123`, `1.23`, `85.9`, `240`.
pub(crate) fn digits(value: f64) -> String {
    let size = value.abs();
    let decimals = match size {
        _ if size == 0.0 => 0,
        _ if size >= 99.95 => 0,
        _ if size >= 9.995 => 1,
        _ if size >= 0.9995 => 2,
        // As many zeros as it starts with, and three digits.
        _ => (2.0 - size.log10().floor()).min(9.0) as usize,
    };
    format!("{value:.decimals$}")
}

/// `850 µs`, `24.0 ms`, `85.9 s`, `240 s`.
pub(crate) fn seconds(value: f64) -> String {
    match value {
        _ if !value.is_finite() => NOTHING.to_owned(),
        _ if value == 0.0 => "0 s".to_owned(),
        _ if value < 999.5e-6 => format!("{} µs", digits(value * 1e6)),
        _ if value < 0.9995 => format!("{} ms", digits(value * 1e3)),
        _ => format!("{} s", digits(value)),
    }
}

/// `0 B`, `4.00 KiB`, `719 MiB`, `1.20 GiB`.
pub(crate) fn bytes(value: f64) -> String {
    if !value.is_finite() {
        return NOTHING.to_owned();
    }
    let (mut value, mut unit) = (value, 0);
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= KIB;
        unit += 1;
    }
    let text = digits(value);
    let whole = (value.fract() == 0.0).then(|| format!("{value:.0}"));
    format!("{} {}", whole.unwrap_or(text), units[unit])
}

/// `100 Mbit/s`, `1 Gbit/s`.
pub(crate) fn bits(per_second: f64) -> String {
    let (value, unit) = match per_second {
        _ if !per_second.is_finite() => return NOTHING.to_owned(),
        _ if per_second >= 1e9 => (per_second / 1e9, "Gbit/s"),
        _ if per_second >= 1e6 => (per_second / 1e6, "Mbit/s"),
        _ => (per_second / 1e3, "kbit/s"),
    };
    let text = if value.fract() == 0.0 { format!("{value:.0}") } else { digits(value) };
    format!("{text} {unit}")
}

/// `0.34×`.
pub(crate) fn ratio(value: f64) -> String {
    if value.is_finite() { format!("{}×", digits(value)) } else { NOTHING.to_owned() }
}

/// Without zeros behind the point.
pub(crate) fn trimmed(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

/// What a share is of all, such as `94 %`.
pub(crate) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{} %", trimmed(&digits(share * 100.0))) } else { NOTHING.to_owned() }
}

/// What the content of a guest is called that no codec can shorten.
pub(crate) const INCOMPRESSIBLE: &str = "incompressible";

/// `1 GiB, idle`, `1 GiB, 60 MiB/s of whole-page writes over 256 MiB`.
pub(crate) fn guest(guest: &Guest) -> String {
    let (mut size, rate) = (bytes(guest.bytes as f64), bytes(guest.dirty_bytes_per_second as f64));
    if guest.content == INCOMPRESSIBLE {
        size += " that nobody can pack";
    }
    let writes = match guest.writes {
        Writes::Idle => return format!("{size}, idle"),
        Writes::FewBytes => format!("a few bytes written in {rate}/s of pages"),
        Writes::WholePages => format!("{rate}/s of whole-page writes"),
    };
    format!("{size}, {writes} over {}", bytes(guest.working_set as f64))
}

/// `100 Mbit/s`, `an unshaped link`, `1 Gbit/s and 20 ms`.
pub(crate) fn link(link: &Link) -> String {
    let rate = link.bits_per_second.map_or_else(|| "an unshaped link".to_owned(), |rate| bits(rate as f64));
    if link.rtt_ms > 0.0 { format!("{rate} and {} ms", count(link.rtt_ms)) } else { rate }
}

/// `1 link`, `3 links`.
pub(crate) fn plural(count: usize, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

/// A whole number as it is, any other with a digit behind the point.
pub(crate) fn count(value: f64) -> String {
    match value {
        _ if !value.is_finite() => NOTHING.to_owned(),
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        _ => format!("{value:.1}"),
    }
}

pub(crate) fn shaper(shaper: Shaper) -> &'static str {
    match shaper {
        Shaper::TokenBucket => "the kernel's token bucket between two network namespaces",
        Shaper::Nothing => "nothing: two network namespaces, as fast as the machine can",
        Shaper::Relay => "a relay program on loopback, which costs CPU time of its own",
    }
}

/// What proved that the memory arrived, or that nothing did.
pub(crate) fn proof(run: &Run) -> String {
    use crate::study::Proof;
    let words = run.verified.iter().map(|proof| match proof {
        Proof::Digest => "digests",
        Proof::GuestCheck => "the guest's check",
        Proof::Memory => "comparison of memory",
        Proof::Alive => "alive only",
    });
    let all: Vec<&str> = words.collect();
    if all.is_empty() { "not verified".to_owned() } else { all.join(", ") }
}

pub(crate) fn end(run: &Run) -> String {
    match &run.end {
        End::Completed => "completed".to_owned(),
        End::GivenUp => "given up".to_owned(),
        End::Failed(words) if words.is_empty() => "failed".to_owned(),
        End::Failed(words) => format!("failed: {words}"),
    }
}

/// A name as short as it is still clear beside others of its kind.
pub(crate) fn short(mover: &str) -> &str {
    mover.strip_prefix("qemu-").filter(|rest| !rest.is_empty()).unwrap_or(mover)
}

/// At most so many letters; what is cut off shows.
pub(crate) fn cut(text: &str, letters: usize) -> String {
    if text.chars().count() <= letters {
        return text.to_owned();
    }
    text.chars().take(letters.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        let words = [85.94, 240.2, 0.0241, 0.000_85, 0.0, 1.0, 0.9996, f64::NAN].map(seconds);
        assert_eq!(words, ["85.9 s", "240 s", "24.1 ms", "850 µs", "0 s", "1.00 s", "1.00 s", "–"]);
        let words = [0.0, 4096.0, 1_073_741_824.0, 1.2 * 1_073_741_824.0, 753_664_000.0].map(bytes);
        assert_eq!(words, ["0 B", "4 KiB", "1 GiB", "1.20 GiB", "719 MiB"]);
        assert_eq!([1e8, 1e9, 2.5e9, 9.413e8].map(bits), ["100 Mbit/s", "1 Gbit/s", "2.50 Gbit/s", "941 Mbit/s"]);
        assert_eq!((digits(99.96), digits(9.996), digits(123_456.7)), ("100".into(), "10.0".into(), "123457".into()));
    }

    #[test]
    fn long_names_are_cut_visibly() {
        assert_eq!((cut("äbcdef", 4), cut("äbcd", 4)), ("äbc…".to_owned(), "äbcd".to_owned()));
        assert_eq!((short("qemu-plain"), short("ours"), short("qemu-")), ("plain", "ours", "qemu-"));
    }
}
