//! The steps of a round: batches are planned, encoded, and handed to the lanes, which are told when a step is over.

use super::super::send::EndStep;
use super::Encoded;
use super::drive::Driver;
use crate::batch::round_of;
use crate::encode::EncodedBatch;
use crate::error::Error;
use crate::session::SourceInput;

/// How far the open step of a round is.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Stage {
    /// There may be more to plan.
    #[default]
    Planning,
    /// All is planned, not all encoded.
    Encoding,
    /// The lanes were told to end the step.
    Flushing,
}

impl Driver<'_> {
    /// Keeps one batch planned while a step is open.
    pub(super) fn plan(&mut self) {
        let Some(planner) = &mut self.planner else { return };
        if self.planned.is_some() || self.stage != Stage::Planning {
            return;
        }
        let tracker = self.vm.dirty();
        let mut rearm = |region, first, words: &[u64]| tracker.rearm(region, first, words);
        match planner.next_batch(&mut self.dirty, &mut rearm) {
            Ok(Some(batch)) => self.planned = Some(batch),
            Ok(None) => {
                self.stage = Stage::Encoding;
                self.end_step_if_encoded();
            }
            Err(source) => {
                self.planner = None;
                self.tell(SourceInput::Failed(Error::Vm { what: "re-arm dirty tracking", source }));
            }
        }
    }

    pub(super) fn encode(&mut self, buffer: Box<EncodedBatch>) {
        let Some(batch) = self.planned.take() else { return };
        let Some(encoders) = &self.encoders else {
            return self.tell(SourceInput::Failed(Error::Bug("a batch before there were encoders".to_owned())));
        };
        self.encoding += 1;
        encoders.encode(batch, buffer);
    }

    pub(super) fn on_encoded(&mut self, encoded: &Encoded) {
        self.encoding = self.encoding.saturating_sub(1);
        self.round_tally.add(&encoded.tally);
        self.stages.add(&encoded.tally.stages);
        if let Some(planner) = &mut self.planner {
            planner.defer(self.dirty.layout(), &encoded.deferred);
        }
        self.end_step_if_encoded();
    }

    /// Once all batches of a step are with the lanes, the lanes are told that these were all.
    fn end_step_if_encoded(&mut self) {
        let Some(planner) = &self.planner else { return };
        if self.stage != Stage::Encoding || self.encoding > 0 {
            return;
        }
        let step = planner.step();
        self.stage = Stage::Flushing;
        self.flushing = self.orders.len();
        for lane in &self.orders {
            let _ = lane.send(EndStep(step));
        }
        if !round_of(step).1 {
            self.tell(SourceInput::RoundQueued);
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
        }
    }

    /// The duplicates follow when every lane has sent what they refer to; then the round is over.
    pub(super) fn on_flushed(&mut self) {
        self.flushing = self.flushing.saturating_sub(1);
        let Some(planner) = &mut self.planner else { return };
        if self.flushing > 0 || self.stage != Stage::Flushing {
            return;
        }
        if planner.begin_copies() {
            self.stage = Stage::Planning;
            self.plan();
        } else {
            self.round_tally.stages.spared_pages = planner.spared();
            self.stages.spared_pages += planner.spared();
            self.planner = None;
            self.tell(SourceInput::RoundFlushed(self.round_tally));
        }
    }
}
