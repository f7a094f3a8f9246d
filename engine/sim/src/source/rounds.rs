//! The source's rounds: batches are planned one ahead of the sending threads, and a round ends when
//! every thread has sent its end.

use pageferry::batch::Batch;
use pageferry::dirty::DirtySource;
use pageferry::encode::Tally;
use pageferry::session::SourceInput;

use super::SourceHost;
use crate::world::Context;

impl SourceHost {
    // ---- planning ----

    pub(super) fn plan(&mut self, ctx: &mut Context) {
        let Some(planner) = &mut self.planner else { return };
        if self.planned.is_some() {
            return;
        }
        let tracker = &mut self.tracker;
        let mut rearm = |region, first, words: &[u64]| tracker.rearm(region, first, words);
        match planner.next_batch(&mut self.dirty, &mut rearm) {
            Ok(Some(batch)) => self.planned = Some(batch),
            Ok(None) => self.end_planning(ctx),
            Err(source) => {
                self.planner = None;
                self.tell_result(ctx, "re-arm dirty tracking", Err(source));
            }
        }
    }

    pub(super) fn end_planning(&mut self, ctx: &mut Context) {
        self.planner = None;
        let round = self.session.round();
        self.flushed = Tally::default();
        self.flushing = 0;
        for sender in self.senders.iter_mut().filter(|sender| sender.carries_pages()) {
            self.flushing += 1;
            sender.order(ctx, round);
        }
        self.tell(ctx, SourceInput::RoundQueued);
    }

    pub(super) fn abandon_round(&mut self, ctx: &mut Context) {
        if self.planner.is_none() {
            return;
        }
        let waiting: Vec<Batch> = self.planned.take().into_iter().chain(self.shared.batches.drain(..)).collect();
        for run in waiting.into_iter().flat_map(|batch| batch.runs) {
            self.dirty.give_back(run);
        }
        self.end_planning(ctx);
    }

    pub(super) fn on_flushed(&mut self, ctx: &mut Context, tally: &Tally) {
        self.flushed.add(tally);
        self.flushing = self.flushing.saturating_sub(1);
        if self.flushing == 0 {
            self.tell(ctx, SourceInput::RoundFlushed(self.flushed));
        }
    }
}
