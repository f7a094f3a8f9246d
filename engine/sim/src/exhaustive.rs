//! What chance might miss: small migrations in which the fault strikes at every single frame, and at
//! every byte that is sent from the moment when the guest stands still until both sides are done (of the
//! contents of pages, at some).

use std::time::Duration;

use pageferry::config::Verify;
use pageferry::memory::{Layout, Region};
use pageferry::units::PAGE_SIZE;
use pageferry::wire::Kind;

use crate::campaign::{Case, Statistics, run_all};
use crate::fault::{Cut, Fault, Scope, Trigger, Which};
use crate::guest::Mix;
use crate::network::SentFrame;
use crate::run::{RunResult, run};
use crate::scenario::{Pattern, Scenario};

/// A moment after the fault at which everything works again, while the sides still try.
const SOON: Duration = Duration::from_millis(300);

/// One migration and the one thing that goes wrong in it.
struct Strike {
    base: usize,
    name: String,
    trigger: Trigger,
    fault: Fault,
}

/// Runs every case, or every `nth` of them.
pub fn run_exhaustive(nth: usize, watch: impl FnMut(&Statistics)) -> Statistics {
    let bases = bases();
    let strikes: Vec<Strike> = all_strikes(&bases).into_iter().step_by(nth.max(1)).collect();
    let case = |index: u64| {
        let name = strikes[index as usize].name.clone();
        Case { replay: format!("--case {name} -v"), name }
    };
    let strike = |index: u64| run(&strikes[index as usize].scenario(&bases), false, false);
    run_all(strikes.len() as u64, case, strike, watch)
}

/// Runs the case with a name; `None` if there is none.
pub fn run_case(name: &str, print: bool) -> Option<RunResult> {
    let bases = bases();
    let strike = all_strikes(&bases).into_iter().find(|strike| strike.name == name)?;
    Some(run(&strike.scenario(&bases), print, false))
}

impl Strike {
    fn scenario(&self, bases: &[Scenario]) -> Scenario {
        let mut scenario = bases[self.base].clone();
        scenario.name.clone_from(&self.name);
        scenario.faults = vec![(self.trigger, self.fault)];
        scenario
    }
}

// ---- the migrations ----

fn bases() -> [Scenario; 2] {
    let mut single = Scenario::calm("no-lanes", small_layout(&[24]));
    single.config.verify = Verify::Full;
    single.pattern = Pattern { reach: 6, mix: Mix::Touches, ..single.pattern };
    let mut several = Scenario::calm("two-lanes", small_layout(&[65, 3]));
    several.config.lanes = 2;
    several.tracking.manual = true;
    several.pattern = Pattern { writes: 3, reach: 8, mix: Mix::All, ..several.pattern };
    [single, several]
}

fn small_layout(pages: &[u64]) -> Layout {
    let regions = pages.iter().zip(0_u64..);
    let region = |(pages, index): (&u64, u64)| Region::ram(format!("r{index}"), index << 32, pages * PAGE_SIZE as u64);
    Layout::new(regions.map(region).collect()).unwrap_or_default()
}

// ---- the strikes ----

fn all_strikes(bases: &[Scenario]) -> Vec<Strike> {
    let strikes_of = |(index, base): (usize, &Scenario)| {
        let frames = run(base, false, true).frames;
        let at_frames = frames.iter().flat_map(move |frame| strikes_at_frame(index, base, frame));
        let handover = frames.iter().filter(|frame| frame.guest_stands);
        let at_bytes = handover.flat_map(move |frame| strikes_at_bytes(index, base, frame));
        at_frames.chain(at_bytes).collect::<Vec<Strike>>()
    };
    bases.iter().enumerate().flat_map(strikes_of).collect()
}

fn strikes_at_frame(index: usize, base: &Scenario, frame: &SentFrame) -> Vec<Strike> {
    let which = Which::Number(frame.number);
    let moments = [("sent", Trigger::Sent(which)), ("arrived", Trigger::Arrived(which))];
    let strike = |(moment, trigger): (&str, Trigger), (what, fault): (String, Fault)| Strike {
        base: index,
        name: format!("{}/{:?}-{}/{moment}/{what}", base.name, frame.kind, frame.number).to_lowercase(),
        trigger,
        fault,
    };
    moments.into_iter().flat_map(|moment| interruptions().into_iter().map(move |what| strike(moment, what))).collect()
}

fn strikes_at_bytes(index: usize, base: &Scenario, frame: &SentFrame) -> Vec<Strike> {
    let trigger = Trigger::Sent(Which::Number(frame.number));
    let strike = |what: &str, byte: u64, fault: Fault| Strike {
        base: index,
        name: format!("{}/{:?}-{}/byte-{byte}/{what}", base.name, frame.kind, frame.number).to_lowercase(),
        trigger,
        fault,
    };
    let at_byte = |byte: u64| {
        let damage =
            (byte < frame.len).then(|| strike("flip", byte, Fault::Flip { offset: byte, mask: 1 << (byte % 8) }));
        let torn = [("cut", None), ("cut-heals", Some(SOON))].map(|(what, heals_after)| {
            strike(what, byte, Fault::Truncate { bytes: byte, cut: Cut { heals_after, ..cut(Scope::Link) } })
        });
        torn.into_iter().chain(damage)
    };
    (0..=frame.len).filter(|byte| is_telling(frame, *byte)).flat_map(at_byte).collect()
}

/// One byte of a page's content is like another: of those, some.
fn is_telling(frame: &SentFrame, byte: u64) -> bool {
    frame.kind != Kind::Pages || byte < 160 || byte + 4 > frame.len || byte.is_multiple_of(61)
}

/// A cut that both hosts report at once, for ever.
fn cut(scope: Scope) -> Cut {
    Cut { scope, source_notices: Some(Duration::ZERO), destination_notices: Some(Duration::ZERO), heals_after: None }
}

/// Everything that can come between two frames.
fn interruptions() -> Vec<(String, Fault)> {
    let lane = Fault::Cut(cut(Scope::Lane));
    let mut all = vec![("cut-lane".to_owned(), lane)];
    for (healing, heals_after) in [("", None), ("-heals", Some(SOON))] {
        for (who, source, destination) in [
            ("", true, true),
            ("-source-sees", true, false),
            ("-destination-sees", false, true),
            ("-silent", false, false),
        ] {
            let notices = |sees: bool| sees.then_some(Duration::ZERO);
            let (source_notices, destination_notices) = (notices(source), notices(destination));
            let cut = Cut { scope: Scope::Link, source_notices, destination_notices, heals_after };
            all.push((format!("cut-link{who}{healing}"), Fault::Cut(cut)));
        }
        for (ways, out, back) in [("", true, true), ("-out", true, false), ("-back", false, true)] {
            let stall = Fault::Stall { scope: Scope::Link, out, back, lasts: heals_after };
            all.push((format!("stall{ways}{healing}"), stall));
        }
    }
    all.push(("kill".to_owned(), Fault::Kill { restart: false }));
    all.push(("kill-restart".to_owned(), Fault::Kill { restart: true }));
    all.push(("cancel-source".to_owned(), Fault::CancelSource));
    all.push(("cancel-destination".to_owned(), Fault::CancelDestination));
    all.push(("switch-over".to_owned(), Fault::SwitchOver));
    all
}
