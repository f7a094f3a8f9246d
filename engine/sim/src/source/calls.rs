//! The source's calls into the VM: each takes time, can fail by plan, and changes the guest at its
//! beginning or at its end.

use std::time::Duration;

use pageferry::Error;
use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::encode::populated_runs;
use pageferry::limits::STATE_CHUNK;
use pageferry::session::{SourceAction, SourceInput};
use pageferry::vm::{Step, VmResult};
use pageferry::wire::Message;

use super::{Heard, SourceHost, state_of};
use crate::clock::Event;
use crate::fault::Call;
use crate::guest::lock;
use crate::verify;
use crate::world::Context;

impl SourceHost {
    /// A call into the VM. What it does to the guest happens at its end, or at its beginning.
    pub(super) fn begin_call(&mut self, ctx: &mut Context, action: SourceAction) -> bool {
        let lasts = Duration::from_nanos(self.random.below(self.vm.longest_call.as_nanos() as u64 + 1));
        let early = matches!(action, SourceAction::StartTracking)
            || (matches!(action, SourceAction::Harvest(_)) && self.random.chance(50));
        let result = if early { self.call(ctx, &action) } else { None };
        if early && result.is_none() {
            return true;
        }
        self.work = Some((action, result));
        ctx.clock.after(lasts, Event::Work(self.id));
        false
    }

    pub(crate) fn on_work_done(&mut self, ctx: &mut Context) {
        let Some((action, result)) = self.work.take() else { return };
        let input = match (result, &action) {
            (Some(SourceInput::Tracking { .. }), _) => Some(self.mark_populated()),
            (Some(input), _) => Some(input),
            (None, action) => self.call(ctx, action),
        };
        if let Some(input) = input {
            self.tell(ctx, input);
        }
        self.go_on(ctx);
    }

    pub(super) fn call(&mut self, ctx: &mut Context, action: &SourceAction) -> Option<SourceInput> {
        match action {
            SourceAction::StartTracking => Some(or_failed("start dirty tracking", self.start_tracking())),
            SourceAction::Harvest(point) => Some(or_failed("report dirty pages", self.harvest(*point))),
            SourceAction::Throttle(percent) => {
                let mut guest = lock(&self.guest);
                let throttled = guest.attempt(Call::Throttle).is_ok();
                if throttled || *percent == 0 {
                    guest.source.throttle = *percent;
                }
                Some(if throttled { SourceInput::Throttled } else { SourceInput::ThrottleRefused })
            }
            SourceAction::Pause => {
                ctx.network.guest_stands = true;
                Some(or_failed("pause the guest", self.pause()))
            }
            SourceAction::Save => Some(or_failed("save the machine state", self.save(ctx))),
            SourceAction::Step(step) => self.step(*step),
            SourceAction::Resume => {
                let result = self.resume(ctx);
                result.err().map(|source| SourceInput::Failed(Error::Vm { what: "resume the guest", source }))
            }
            SourceAction::StopTracking => {
                // The contract says that this may fail without consequences.
                let _ = self.tracker.stop();
                None
            }
            _ => None,
        }
    }

    pub(super) fn start_tracking(&mut self) -> VmResult<SourceInput> {
        lock(&self.guest).attempt(Call::Begin)?;
        let layout = self.memory.layout().clone();
        self.tracker.start(&layout)?;
        Ok(SourceInput::Tracking { dirty_pages: 0 })
    }

    pub(super) fn mark_populated(&mut self) -> SourceInput {
        let layout = self.memory.layout().clone();
        for run in populated_runs(&*self.memory, u64::MAX) {
            if let Some((region, first)) = layout.locate_run(run) {
                self.dirty.mark_range(region, first..first + run.count);
            }
        }
        self.dirty.take_writes();
        let dirty_pages = self.dirty.dirty_pages();
        self.start_encoders(dirty_pages);
        SourceInput::Tracking { dirty_pages }
    }

    pub(super) fn harvest(&mut self, point: Point) -> VmResult<SourceInput> {
        self.tracker.harvest(point, &mut self.dirty)?;
        if let Some(planner) = &mut self.planner {
            let tracker = &mut self.tracker;
            let mut rearm = |region, first, words: &[u64]| tracker.rearm(region, first, words);
            planner.watch_ahead(&mut self.dirty, &mut rearm)?;
        }
        if let Some(encoders) = &self.encoders {
            encoders.shared.bases.note_dirty(|page| self.dirty.dirty().contains(page));
        }
        Ok(SourceInput::Harvested { dirty_pages: self.dirty.dirty_pages(), writes: self.dirty.take_writes() })
    }

    pub(super) fn pause(&mut self) -> VmResult<SourceInput> {
        let mut guest = lock(&self.guest);
        guest.attempt(Call::Pause)?;
        guest.source.runs = false;
        Ok(SourceInput::Paused)
    }

    pub(super) fn save(&mut self, ctx: &mut Context) -> VmResult<SourceInput> {
        let state = {
            let mut guest = lock(&self.guest);
            guest.attempt(Call::Save)?;
            guest.write_as_device(self.vm.save_writes);
            state_of(guest.counter, self.vm.state_len)
        };
        for piece in state.chunks(STATE_CHUNK) {
            self.send(ctx, Message::State(piece.to_vec()));
        }
        Ok(SourceInput::Saved { bytes: state.len() as u64, waited: Duration::ZERO })
    }

    pub(super) fn step(&mut self, step: Step) -> Option<SourceInput> {
        let mut guest = lock(&self.guest);
        match step {
            Step::BeforeHandover => {
                let result = guest.attempt(Call::BeforeHandover).map(|()| {
                    guest.source.locks = false;
                    SourceInput::StepDone
                });
                Some(or_failed("release the guest's resources", result))
            }
            Step::Aborted => {
                guest.source.locks = true;
                None
            }
            _ => None,
        }
    }

    pub(super) fn resume(&mut self, ctx: &mut Context) -> VmResult<()> {
        let mut guest = lock(&self.guest);
        guest.attempt(Call::Resume)?;
        guest.resume_source();
        ctx.clock.after(Duration::ZERO, Event::Guest);
        Ok(())
    }

    pub(crate) fn on_verified(&mut self, ctx: &mut Context) {
        let digest = verify::digest(&*self.memory, &self.hasher);
        self.hear(ctx, Heard::Hashed(digest));
    }
}

fn or_failed(what: &'static str, result: VmResult<SourceInput>) -> SourceInput {
    result.unwrap_or_else(|source| SourceInput::Failed(Error::Vm { what, source }))
}
