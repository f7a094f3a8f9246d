//! The source's rounds: one batch is planned ahead of the encoders, a step ends when every lane has sent
//! its end, and a round when both of its steps have.

use pageferry::batch::round_of;
use pageferry::dirty::DirtySource;
use pageferry::encode::Tally;
use pageferry::memory::is_zero_portable;
use pageferry::session::SourceInput;
use pageferry::units::{PAGE_SIZE, PageRun};

use super::{SourceHost, Stage};
use crate::scenario::Canary;
use crate::world::Context;

impl SourceHost {
    // ---- planning ----

    pub(super) fn plan(&mut self, ctx: &mut Context) {
        let Some(planner) = &mut self.planner else { return };
        if self.planned.is_some() || self.stage != Stage::Planning {
            return;
        }
        let tracker = &mut self.tracker;
        let mut rearm = |region, first, words: &[u64]| tracker.rearm(region, first, words);
        match planner.next_batch(&mut self.dirty, &mut rearm) {
            Ok(Some(batch)) => self.planned = Some(batch),
            Ok(None) => {
                self.stage = Stage::Encoding;
                self.end_step_if_encoded(ctx);
            }
            Err(source) => {
                self.planner = None;
                self.tell_result(ctx, "re-arm dirty tracking", Err(source));
            }
        }
    }

    pub(super) fn on_encoded(&mut self, ctx: &mut Context, tally: &Tally, deferred: &[PageRun]) {
        self.encoding = self.encoding.saturating_sub(1);
        self.round_tally.add(tally);
        if let Some(planner) = &mut self.planner {
            planner.defer(self.dirty.layout(), deferred);
        }
        self.end_step_if_encoded(ctx);
    }

    fn end_step_if_encoded(&mut self, ctx: &mut Context) {
        let Some(planner) = &self.planner else { return };
        if self.stage != Stage::Encoding || self.encoding > 0 {
            return;
        }
        let step = planner.step();
        self.stage = Stage::Flushing;
        self.flushing = 0;
        for sender in self.senders.iter_mut().filter(|sender| sender.carries_pages()) {
            self.flushing += 1;
            sender.end_step(ctx, step);
        }
        if !round_of(step).1 {
            self.tell(ctx, SourceInput::RoundQueued);
        }
    }

    pub(super) fn abandon_round(&mut self) {
        let Some(planner) = &mut self.planner else { return };
        if round_of(planner.step()).1 || self.stage != Stage::Planning {
            return;
        }
        planner.abandon();
        for run in self.planned.take().into_iter().flat_map(|batch| batch.runs) {
            self.dirty.give_back(run);
            if self.canary == Some(Canary::GivenBackBooked) {
                self.book(run);
            }
        }
    }

    /// The canary: the pages are taken for sent as they are.
    fn book(&self, run: PageRun) {
        let Some((region, first)) = self.memory.layout().locate_run(run) else { return };
        let mut content = [0; PAGE_SIZE];
        for (index, page) in (first..).zip(run.pages()) {
            let read = self.memory.read(region, index * PAGE_SIZE as u64, &mut content).is_ok();
            if read && !is_zero_portable(&content) {
                self.table.swap(page, self.hasher.hash(&content));
            }
        }
    }

    pub(super) fn on_flushed(&mut self, ctx: &mut Context) {
        self.flushing = self.flushing.saturating_sub(1);
        let Some(planner) = &mut self.planner else { return };
        if self.flushing > 0 || self.stage != Stage::Flushing {
            return;
        }
        if planner.begin_copies() {
            self.stage = Stage::Planning;
            self.plan(ctx);
        } else {
            self.codings.spared += planner.spared();
            self.planner = None;
            self.tell(ctx, SourceInput::RoundFlushed(self.round_tally));
        }
    }
}
