use std::collections::VecDeque;

use super::*;

const BATCH: usize = 512 << 10;

/// A link and an encoder as the chooser sees them, batch by batch. The link has a buffer: what is sent now
/// and then leaves as fast as it can be copied there.
struct World {
    chooser: LevelChooser,
    link_ns: f64,
    /// Of level 1.
    ratio: f64,
    encoder_free: f64,
    /// Packing takes so many times what it does with a core of its own.
    hindrance: f64,
    /// When the last batches have left the lane.
    sent: Vec<f64>,
    /// What the chooser will hear of that, when it has happened.
    told: VecDeque<(f64, u64, Duration, Duration)>,
    wire_free: f64,
}

const BUFFER: f64 = 262_144.0;

impl World {
    fn new(link_ns: f64, ratio: f64) -> Self {
        let chooser = LevelChooser::new(Compress::Auto, 1, 1);
        Self {
            chooser,
            link_ns,
            ratio,
            encoder_free: 0.0,
            hindrance: 1.0,
            sent: vec![0.0; 4],
            told: VecDeque::new(),
            wire_free: 0.0,
        }
    }

    fn costs(level: Level) -> (f64, f64) {
        // Other figures than the chooser assumes.
        match level {
            Level::Raw => (0.0, f64::NAN),
            Level::Zstd(-5) => (2.4, 1.15),
            Level::Zstd(1) => (3.1, 1.0),
            Level::Zstd(3) => (5.0, 0.94),
            Level::Zstd(6) => (14.0, 0.90),
            Level::Zstd(9) => (25.0, 0.89),
            Level::Zstd(_) => (90.0, 0.885),
        }
    }

    fn batch(&mut self) -> Level {
        // At most four batches are at work or wait.
        let begin = self.encoder_free.max(self.sent[self.sent.len() - 4]);
        while self.told.front().is_some_and(|sent| sent.0 <= begin)
            && let Some((_, bytes, busy, idle)) = self.told.pop_front()
        {
            self.chooser.sent(bytes, busy, idle);
        }
        let choice = self.chooser.choose(false);
        let outcome = |level: Level| {
            let (ns, relative) = Self::costs(level);
            let ratio = if level == Level::Raw { 1.0 } else { (self.ratio * relative).min(1.0) };
            (ns * self.hindrance * BATCH as f64, (BATCH as f64 * ratio) as usize)
        };
        let (pack, packed) = outcome(choice.level);
        let scan = 0.25 * BATCH as f64;
        self.encoder_free = begin + scan + pack;
        let ns = |ns: f64| Duration::from_nanos(ns as u64);
        self.chooser.encoded(choice.level, BATCH, packed, ns(scan), ns(pack));
        if let Some(level) = choice.trial {
            let (time, tried) = outcome(level);
            self.encoder_free += time;
            self.chooser.tried(choice.level, BATCH, packed, Trial { level, packed: tried, time: ns(time) });
        }
        let lane_free = self.sent[self.sent.len() - 1];
        let start = lane_free.max(self.encoder_free);
        self.wire_free = self.wire_free.max(start) + packed as f64 * self.link_ns;
        let end = (start + packed as f64 * 0.2).max(self.wire_free - BUFFER * self.link_ns);
        self.sent.push(end);
        self.told.push_back((end, packed as u64, ns(end - start), ns(start - lane_free)));
        choice.level
    }

    fn run(&mut self, batches: usize) -> f64 {
        let began = self.wire_free;
        for _ in 0..batches {
            self.batch();
        }
        (self.wire_free - began) / batches as f64
    }

    /// The level in the middle of 21 batches': single ones are made easier, to keep the link busy.
    fn usual_level(&mut self) -> Level {
        let mut levels: [Level; 21] = std::array::from_fn(|_| self.batch());
        levels.sort_unstable();
        levels[10]
    }

    /// Time per batch with one level throughout.
    fn fixed(&self, level: Level) -> f64 {
        let (ns, relative) = Self::costs(level);
        let ratio = if level == Level::Raw { 1.0 } else { (self.ratio * relative).min(1.0) };
        BATCH as f64 * (0.25 + ns).max(ratio * self.link_ns)
    }
}

#[test]
fn the_chosen_level_is_nearly_as_good_as_the_best_fixed_one_on_any_link() {
    for (link_ns, ratio) in [
        (0.3, 0.4),
        (1.0, 0.4),
        (4.0, 0.3),
        (8.0, 0.2),
        (8.0, 0.3),
        (8.0, 0.45),
        (8.0, 1.0),
        (83.0, 0.4),
        (83.0, 0.7),
        (166.0, 0.5),
        (83.0, 1.0),
    ] {
        let mut world = World::new(link_ns, ratio);
        let time = world.run(400);
        let best = LADDER.iter().map(|(level, _, _)| world.fixed(*level)).fold(f64::INFINITY, f64::min);
        assert!(time < best * 1.08, "link {link_ns} ns/B, ratio {ratio}: {} of the best", time / best);
        assert!(time < world.fixed(Level::Raw) * 1.03, "link {link_ns} ns/B, ratio {ratio}");
    }
}

#[test]
fn it_follows_a_link_that_changes_and_content_that_changes() {
    let mut world = World::new(8.0, 0.4);
    world.run(200);
    assert!(world.usual_level() > Level::Zstd(-5));
    world.link_ns = 0.3;
    world.run(600);
    assert_eq!(world.usual_level(), Level::Raw);
    (world.link_ns, world.ratio) = (83.0, 1.0);
    world.run(200);
    world.ratio = 0.4;
    world.run(200);
    assert!(world.usual_level() >= Level::Zstd(6));
}

#[test]
fn encoders_that_had_to_wait_for_a_core_pack_again_when_they_need_not() {
    for (before, during) in [(0, 20), (0, 100), (200, 30), (200, 300)] {
        let mut world = World::new(8.0, 0.4);
        world.run(before);
        world.hindrance = 10.0;
        world.run(during);
        world.hindrance = 1.0;
        world.run(150);
        assert!(world.usual_level() > Level::Raw, "hindered after {before} batches for {during}");
        let (time, best) = (world.run(200), world.fixed(Level::Zstd(1)));
        assert!(time < best * 1.1, "hindered after {before} batches for {during}: {}", time / best);
    }
}

#[test]
fn a_single_wait_for_a_core_does_not_end_packing() {
    let mut world = World::new(8.0, 0.4);
    world.run(200);
    world.hindrance = 30.0;
    world.batch();
    world.hindrance = 1.0;
    assert!(world.usual_level() > Level::Raw);
}

#[test]
fn at_the_strongest_level_there_is_no_stronger_one_to_try() {
    let chooser = LevelChooser::new(Compress::Auto, 1, 1);
    chooser.lock().rung = LADDER.len() - 1;
    // A link of 10 Mbps, and each level worth what it costs.
    chooser.lock().link_ns = 800.0;
    chooser.lock().relative = std::array::from_fn(|rung| 1.0 - rung as f64 / 20.0);
    let choices: Vec<Choice> = (0..2 * TRIAL_EVERY.1).map(|_| chooser.choose(false)).collect();
    assert!(choices.iter().all(|choice| choice.level == Level::Zstd(15)), "{choices:?}");
    assert!(choices.iter().any(|choice| choice.trial == Some(Level::Zstd(12))));
}

#[test]
fn while_the_guest_stands_still_nothing_is_packed_hard_or_tried() {
    let mut world = World::new(83.0, 0.4);
    world.run(200);
    assert!(world.usual_level() >= Level::Zstd(6));
    for _ in 0..2 * TRIAL_EVERY.1 {
        let choice = world.chooser.choose(true);
        assert!(choice.level <= Level::Zstd(1) && choice.trial.is_none(), "{choice:?}");
    }
}

#[test]
fn a_fixed_choice_stays() {
    let chooser = LevelChooser::new(Compress::Level(99), 1, 1);
    assert_eq!(chooser.choose(false).level, Level::Zstd(crate::encode::MAX_LEVEL));
    assert_eq!(LevelChooser::new(Compress::Off, 1, 1).choose(false).level, Level::Raw);
}

#[test]
fn who_does_not_pack_has_time_to_keep_pages_on_a_link_of_a_gigabit() {
    for (compress, admits) in [(Compress::Off, true), (Compress::Level(1), false)] {
        let chooser = LevelChooser::new(compress, 1, 1);
        chooser.lock().link_ns = 8.0;
        assert_eq!(chooser.choose(false).admits, admits, "{compress:?}");
    }
}

#[test]
fn duplicates_are_looked_for_unless_the_link_is_as_fast_as_memory() {
    for (link_ns, seeks) in [(0.3, false), (8.0, true), (83.0, true)] {
        let mut world = World::new(link_ns, 0.5);
        world.run(100);
        assert_eq!(world.chooser.choose(false).seeks, seeks, "{link_ns} ns a byte");
    }
}
