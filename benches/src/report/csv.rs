//! Every run as a line of comma-separated values, after RFC 4180. Units stand in the names of the columns.

use crate::study::{End, Engine, Proof, Run, Shaper, Study, Writes};

type Column = (&'static str, fn(&Study, &Run) -> String);

const STAGES: [&str; 7] = ["zero", "unchanged", "pattern", "delta", "duplicate", "packing", "sent"];

const COLUMNS: [Column; 35] = [
    ("link", |_, run| run.link.clone()),
    ("link_bits_per_second", |study, run| of_link(study, run, |link| option(link.bits_per_second))),
    ("link_rtt_ms", |study, run| of_link(study, run, |link| number(link.rtt_ms))),
    ("link_payload_bytes_per_second", |study, run| of_link(study, run, |link| number(link.payload_rate()))),
    ("link_shaper", |study, run| of_link(study, run, |link| shaper(link.shaper).to_owned())),
    ("guest", |_, run| run.guest.clone()),
    ("guest_bytes", |study, run| of_guest(study, run, |guest| guest.bytes.to_string())),
    ("guest_content", |study, run| of_guest(study, run, |guest| guest.content.clone())),
    ("writes", |study, run| of_guest(study, run, |guest| writes(guest.writes).to_owned())),
    ("dirty_bytes_per_second", |study, run| of_guest(study, run, |guest| guest.dirty_bytes_per_second.to_string())),
    ("working_set_bytes", |study, run| of_guest(study, run, |guest| guest.working_set.to_string())),
    ("mover", |_, run| run.mover.clone()),
    ("engine", |study, run| of_mover(study, run, |mover| engine(mover.engine).to_owned())),
    ("version", |study, run| of_mover(study, run, |mover| mover.version.clone())),
    ("turn", |_, run| run.turn.to_string()),
    ("end", |_, run| end(run).to_owned()),
    ("failure", |_, run| if let End::Failed(words) = &run.end { words.clone() } else { String::new() }),
    ("verified", |_, run| run.verified.iter().map(|proof| proof_name(*proof)).collect::<Vec<_>>().join("+")),
    ("total_seconds", |_, run| number(run.seconds)),
    ("downtime_ms", |_, run| run.downtime_ms.map_or_else(String::new, number)),
    ("stall_before_ms", |_, run| run.stalls.before_ms.map_or_else(String::new, number)),
    ("stall_during_ms", |_, run| run.stalls.during_ms.map_or_else(String::new, number)),
    ("stall_after_ms", |_, run| run.stalls.after_ms.map_or_else(String::new, number)),
    ("rounds", |_, run| run.rounds.to_string()),
    ("wire_bytes", |_, run| run.wire_bytes.to_string()),
    ("source_cpu_seconds", |_, run| number(run.source.cpu_seconds)),
    ("destination_cpu_seconds", |_, run| number(run.destination.cpu_seconds)),
    ("source_peak_rss_bytes", |_, run| run.source.peak_rss_bytes.to_string()),
    ("destination_peak_rss_bytes", |_, run| run.destination.peak_rss_bytes.to_string()),
    ("source_beside_guest_bytes", |_, run| option(run.source.beside_guest_bytes)),
    ("destination_beside_guest_bytes", |_, run| option(run.destination.beside_guest_bytes)),
    ("throttle_percent", |_, run| number(run.throttle_percent)),
    ("guest_bytes_per_second", |_, run| run.guest_bytes_per_second.map_or_else(String::new, number)),
    ("stolen_share", |_, run| run.stolen_share.map_or_else(String::new, number)),
    ("interrupted_study", |study, _| study.interrupted.to_string()),
];

/// The header and a line for every run.
pub(crate) fn csv(study: &Study) -> String {
    let stages = STAGES.map(|stage| format!("stage_{stage}_bytes"));
    let header = COLUMNS.iter().map(|(name, _)| (*name).to_owned()).chain(stages);
    let mut lines = vec![line(header)];
    lines.extend(study.runs.iter().map(|run| {
        let stages =
            STAGES.map(|stage| option(run.stages.iter().find(|found| found.name == stage).map(|found| found.bytes)));
        line(COLUMNS.iter().map(|(_, value)| value(study, run)).chain(stages))
    }));
    lines.concat()
}

fn line(fields: impl Iterator<Item = String>) -> String {
    fields.map(|field| quoted(&field)).collect::<Vec<_>>().join(",") + "\r\n"
}

fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

/// Nothing for what is no number.
fn number(value: f64) -> String {
    if value.is_finite() { value.to_string() } else { String::new() }
}

fn option(value: Option<u64>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

fn of_link(study: &Study, run: &Run, part: fn(&crate::study::Link) -> String) -> String {
    study.links.iter().find(|link| link.name == run.link).map_or_else(String::new, part)
}

fn of_guest(study: &Study, run: &Run, part: fn(&crate::study::Guest) -> String) -> String {
    study.guests.iter().find(|guest| guest.name == run.guest).map_or_else(String::new, part)
}

fn of_mover(study: &Study, run: &Run, part: fn(&crate::study::Mover) -> String) -> String {
    study.movers.iter().find(|mover| mover.name == run.mover).map_or_else(String::new, part)
}

fn shaper(shaper: Shaper) -> &'static str {
    match shaper {
        Shaper::TokenBucket => "token_bucket",
        Shaper::Nothing => "nothing",
        Shaper::Relay => "relay",
    }
}

fn writes(writes: Writes) -> &'static str {
    match writes {
        Writes::Idle => "idle",
        Writes::FewBytes => "few_bytes",
        Writes::WholePages => "whole_pages",
    }
}

fn engine(engine: Engine) -> &'static str {
    match engine {
        Engine::Pageferry => "pageferry",
        Engine::Qemu => "qemu",
    }
}

fn end(run: &Run) -> &'static str {
    match run.end {
        End::Completed => "completed",
        End::GivenUp => "given_up",
        End::Failed(_) => "failed",
    }
}

fn proof_name(proof: Proof) -> &'static str {
    match proof {
        Proof::Digest => "digest",
        Proof::GuestCheck => "guest_check",
        Proof::Memory => "memory",
        Proof::Alive => "alive",
    }
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn every_run_is_a_line_with_as_many_fields_as_the_header() {
        let study = example::full();
        let text = csv(&study);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), study.runs.len() + 1);
        let fields = |line: &str| {
            let mut quoted = false;
            let commas = line.chars().filter(|letter| {
                quoted ^= *letter == '"';
                *letter == ',' && !quoted
            });
            commas.count()
        };
        assert!(lines.iter().all(|line| fields(line) == fields(lines[0])), "{}", lines[1]);
        assert!(!text.contains("NaN") && !text.contains("inf"));
    }

    #[test]
    fn quotes_and_commas_are_kept() {
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
        let text = csv(&example::awkward());
        assert!(text.contains("\"the peer said: \"\"<no> & goodbye\"\"\""), "{text}");
    }
}
