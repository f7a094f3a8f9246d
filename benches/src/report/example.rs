//! Studies that nobody measured: what the model expects, with noise that is the same every time.

use crate::machine::Machine;
use crate::study::model::{DOWNTIME_SECONDS, Expected, expect};
use crate::study::{
    Cost, End, Engine, FORMAT, Guest, Link, Mover, Proof, Remaining, Run, Shaper, Stage, Stalls, Study, Writes,
};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const LIMIT_SECONDS: f64 = 240.0;

/// Runs of ours over one link, that took these times.
pub(crate) fn small(seconds: &[f64]) -> Study {
    let mut study = empty(vec![link("100mbit", Some(100_000_000))], vec![guest("idle", Writes::Idle, 0, 0)]);
    study.movers = vec![mover("ours", Engine::Pageferry)];
    let mut noise = Noise(7);
    for (turn, seconds) in (1..).zip(seconds) {
        let mut run = run(&study.links[0], &study.guests[0], &study.movers[0], turn, &mut noise);
        let slower = seconds / run.seconds;
        run.seconds = *seconds;
        run.remaining.iter_mut().for_each(|left| left.seconds *= slower);
        study.runs.push(run);
    }
    study
}

/// Every guest over every link by every mover, three times.
pub(crate) fn full() -> Study {
    let links = vec![
        link("100mbit", Some(100_000_000)),
        link("1gbit", Some(1_000_000_000)),
        Link { shaper: Shaper::Nothing, ..link("unshaped", None) },
    ];
    let guests = vec![
        guest("idle", Writes::Idle, 0, 0),
        guest("few20", Writes::FewBytes, 20 * MIB, 128 * MIB),
        guest("few60", Writes::FewBytes, 60 * MIB, 128 * MIB),
        guest("full20", Writes::WholePages, 20 * MIB, 256 * MIB),
        guest("full60", Writes::WholePages, 60 * MIB, 256 * MIB),
        guest("full200", Writes::WholePages, 200 * MIB, 256 * MIB),
    ];
    let mut study = empty(links, guests);
    study.movers = vec![
        mover("ours", Engine::Pageferry),
        mover("qemu-plain", Engine::Qemu),
        mover("qemu-multifd-4", Engine::Qemu),
        mover("qemu-multifd-4-zstd", Engine::Qemu),
        mover("qemu-xbzrle", Engine::Qemu),
    ];
    fill(&mut study, 3);
    study.remarks.push(crate::study::Remark {
        link: "unshaped".to_owned(),
        guest: "idle".to_owned(),
        quantity: "cpu".to_owned(),
        against: None,
        text: "digests of both sides cost time that QEMU does not spend".to_owned(),
    });
    study
}

/// One turn over a relay, ended early, with a failure, a mover that is missing, and names to trip over.
pub(crate) fn awkward() -> Study {
    let name = "idle <&\"quoted\"> guest";
    let links =
        vec![Link { shaper: Shaper::Relay, rtt_ms: 20.0, goodputs: vec![], ..link("10mbit", Some(10_000_000)) }];
    let mut study = empty(links, vec![guest(name, Writes::Idle, 0, 0), guest("f<i>", Writes::WholePages, GIB, GIB)]);
    study.movers = vec![
        mover("ours", Engine::Pageferry),
        mover("ours-one-lane", Engine::Pageferry),
        mover("qemu-<b>bold&</b>", Engine::Qemu),
        mover("qemu-with-a-very-long-name-that-fits-nowhere-at-all", Engine::Qemu),
        mover("qemu-quick", Engine::Qemu),
    ];
    fill(&mut study, 1);
    study.runs.retain(|run| (run.guest.as_str(), run.mover.as_str()) != ("f<i>", "qemu-quick"));
    study.runs[0].end = End::Failed("the peer said: \"<no> & goodbye\"".to_owned());
    study.runs[0].remaining.truncate(1);
    study.runs[1].verified = vec![Proof::Alive];
    study.runs[2].verified.clear();
    study.runs[4].seconds = 0.02;
    study.runs[4].downtime_ms = Some(0.05);
    study.runs[4].remaining = vec![Remaining { seconds: 0.0, bytes: GIB, round: 0 }];
    study.runs[5].stages.clear();
    study.notes.push("it's a <note> & more".to_owned());
    study.interrupted = true;
    study
}

/// One run of ours, and nothing to compare it with.
pub(crate) fn alone() -> Study {
    small(&[85.4])
}

/// Nothing was measured yet.
pub(crate) fn nothing() -> Study {
    let mut study = small(&[]);
    study.interrupted = true;
    study.links[0].goodputs.clear();
    study
}

pub(crate) fn all() -> [(&'static str, Study); 5] {
    [
        ("full", full()),
        ("awkward", awkward()),
        ("alone", alone()),
        ("nothing", nothing()),
        ("small", small(&[3.0, 1.0])),
    ]
}

fn fill(study: &mut Study, turns: u32) {
    let mut noise = Noise(42);
    for link in &study.links {
        for turn in 1..=turns {
            for guest in &study.guests {
                for mover in &study.movers {
                    let run = run(link, guest, mover, turn, &mut noise);
                    study.runs.push(run);
                }
            }
        }
    }
}

fn empty(links: Vec<Link>, guests: Vec<Guest>) -> Study {
    let machine = Machine {
        date: "2026-11-22".to_owned(),
        cpu: "Example(R) CPU <2>".to_owned(),
        cpus: 2,
        memory_gib: 23.5,
        kernel: "6.18.0".to_owned(),
        tcp_congestion_control: "bbr".to_owned(),
        transparent_huge_pages: "madvise".to_owned(),
        load_before: 0.4,
        optimised_build: true,
        kvm: None,
    };
    Study {
        format: FORMAT,
        preset: "custom".to_owned(),
        command: "pageferry-bench harness --preset quick".to_owned(),
        machine,
        links,
        guests,
        movers: Vec::new(),
        runs: Vec::new(),
        copies: Vec::new(),
        remarks: Vec::new(),
        notes: vec!["no number of this was measured".to_owned()],
        interrupted: false,
    }
}

fn link(name: &str, bits_per_second: Option<u64>) -> Link {
    let payload = bits_per_second.map_or(2.1e9, |bits| bits as f64 / 8.0 * 0.94);
    let goodputs = vec![payload, payload * 0.99, payload * 1.01];
    Link { name: name.to_owned(), bits_per_second, rtt_ms: 0.0, shaper: Shaper::TokenBucket, goodputs }
}

fn guest(name: &str, writes: Writes, dirty_bytes_per_second: u64, working_set: u64) -> Guest {
    let content = "30 % zero, 10 % duplicate, 40 % text-like, 20 % random pages".to_owned();
    let (name, bytes, runs) = (name.to_owned(), GIB, true);
    Guest { name, bytes, content, writes, dirty_bytes_per_second, working_set, runs }
}

fn mover(name: &str, engine: Engine) -> Mover {
    let version = if engine == Engine::Qemu { "7.2.19" } else { "0.1.0" };
    Mover { name: name.to_owned(), engine, version: version.to_owned(), settings: format!("settings of {name}") }
}

/// Numbers that look random: xorshift, from a seed.
struct Noise(u64);

impl Noise {
    /// From 0.95 to 1.05.
    fn factor(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        0.95 + 0.1 * ((self.0 >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

/// How many bytes of a page a mover sends, and what CPU time a GiB of guest memory costs it.
fn character(mover: &Mover, guest: &Guest) -> (f64, f64) {
    let few = guest.writes == Writes::FewBytes;
    match mover.name.as_str() {
        name if name.starts_with("ours") => (if few { 0.1 } else { 0.36 }, 2.4),
        name if name.contains("zstd") => (0.41, 6.5),
        name if name.contains("xbzrle") => (if few { 0.3 } else { 0.7 }, 2.2),
        _ => (0.7, 1.4),
    }
}

fn run(link: &Link, guest: &Guest, mover: &Mover, turn: u32, noise: &mut Noise) -> Run {
    let (share, cpu) = character(mover, guest);
    let rate = link.payload_rate() / share * noise.factor();
    let expected = expect(guest, rate, DOWNTIME_SECONDS);
    let (seconds, downtime, rounds, end) = match expected {
        Expected::Ends { seconds, downtime_seconds, rounds, .. } => {
            (seconds, downtime_seconds + 0.004, rounds, End::Completed)
        }
        Expected::Never { downtime_seconds } if mover.engine == Engine::Pageferry && link.name == "1gbit" => {
            (60.0 + downtime_seconds, downtime_seconds, 30, End::Completed)
        }
        Expected::Never { .. } => (LIMIT_SECONDS, 0.0, 20, End::GivenUp),
    };
    let completed = end == End::Completed;
    let wire_bytes = (seconds * rate * share) as u64;
    let cost = |part: f64, noise: &mut Noise| Cost {
        cpu_seconds: (cpu * (wire_bytes as f64 / GIB as f64) * part / share.sqrt() + 0.1) * noise.factor(),
        peak_rss_bytes: GIB + 190 * MIB,
        beside_guest_bytes: (mover.engine == Engine::Pageferry).then_some(190 * MIB),
    };
    Run {
        link: link.name.clone(),
        guest: guest.name.clone(),
        mover: mover.name.clone(),
        turn,
        end,
        seconds,
        downtime_ms: completed.then_some(downtime * 1e3 * noise.factor()),
        stalls: Stalls {
            before_ms: Some(4.0 * noise.factor()),
            during_ms: completed.then_some((downtime * 1e3 + 9.0) * noise.factor()),
            after_ms: completed.then_some(5.0 * noise.factor()),
        },
        rounds: u64::from(rounds),
        remaining: remaining(guest, rate, seconds, completed),
        wire_bytes,
        source: cost(0.7, noise),
        destination: cost(0.3, noise),
        throttle_percent: 0.0,
        guest_bytes_per_second: (guest.dirty_bytes_per_second > 0)
            .then_some(guest.dirty_bytes_per_second as f64 * 0.98 * noise.factor()),
        in_postcopy: Some(false),
        stolen_share: Some(0.002 * noise.factor()),
        verified: if completed { vec![Proof::Digest, Proof::GuestCheck] } else { Vec::new() },
        stages: stages(mover, wire_bytes, share),
    }
}

fn remaining(guest: &Guest, rate: f64, ends: f64, completed: bool) -> Vec<Remaining> {
    const STEPS: u32 = 12;
    let (mut points, mut starts, mut left) = (Vec::new(), 0.0, guest.bytes as f64);
    for round in 0..200 {
        let takes = (left / rate).min(ends - starts);
        for step in 0..=STEPS {
            let part = takes * f64::from(step) / f64::from(STEPS);
            points.push(Remaining { seconds: starts + part, bytes: (left - part * rate).max(0.0) as u64, round });
        }
        starts += takes;
        left = (guest.dirty_bytes_per_second as f64 * takes).min(guest.working_set as f64);
        if starts >= ends - 1e-6 || left < 1.0 {
            break;
        }
    }
    if completed {
        points.push(Remaining { seconds: ends, bytes: 0, round: 200 });
    }
    points
}

fn stages(mover: &Mover, sent: u64, share: f64) -> Vec<Stage> {
    if mover.engine == Engine::Qemu {
        return Vec::new();
    }
    let all = sent as f64 / share;
    let saved = all - sent as f64;
    let parts =
        [("zero", 0.45), ("unchanged", 0.01), ("pattern", 0.0), ("delta", 0.1), ("duplicate", 0.14), ("packing", 0.3)];
    let parts = parts.into_iter().map(|(name, part)| (name, (saved * part) as u64));
    parts.chain([("sent", sent)]).map(|(name, bytes)| Stage { name: name.to_owned(), bytes }).collect()
}
