//! Sending threads: one per lane. A data lane sends encoded batches; the control lane sends the session's
//! messages and, when it has been idle, a sign of life.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select_biased};

use super::lane::NumberedSender;
use super::pace::Pacer;
use super::{Counters, source::SourceEvent};
use crate::encode::{EncodedBatch, LevelChooser};
use crate::error::Error;
use crate::limits::HEARTBEAT;
use crate::wire::Message;

/// A step ends: the lane sends what batches are left, and says so.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndStep(pub(super) u32);

/// What a lane that carries pages works with.
pub(super) struct PageDuty {
    pub(super) batches: Receiver<Box<EncodedBatch>>,
    /// Where sent batches go back to.
    pub(super) free: Sender<Box<EncodedBatch>>,
    pub(super) orders: Receiver<EndStep>,
    pub(super) pacer: Arc<Pacer>,
    pub(super) chooser: Arc<LevelChooser>,
    pub(super) events: Sender<SourceEvent>,
}

/// Sends pages until the channels close.
pub(super) fn run_data_lane(mut lane: NumberedSender, duty: PageDuty) {
    let (orders, batches, events) = (duty.orders.clone(), duty.batches.clone(), duty.events.clone());
    let mut pages = PageSender::new(duty);
    loop {
        let result = select_biased! {
            recv(orders) -> order => match order {
                Ok(order) => pages.end_step(&mut lane, order),
                Err(_) => return,
            },
            recv(batches) -> batch => match batch {
                Ok(batch) => pages.send(&mut lane, batch),
                Err(_) => return,
            },
        };
        if let Err(error) = result {
            // The driver has gone when nobody hears this.
            let _ = events.send(SourceEvent::DataLaneBroken(error));
            return;
        }
    }
}

/// Sends messages, and pages too if there is no other lane, until `messages` closes.
pub(super) fn run_control_lane(
    mut lane: NumberedSender,
    messages: &Receiver<Message>,
    duty: Option<PageDuty>,
) -> Result<(), Error> {
    let (mut orders, mut batches) = (crossbeam_channel::never(), crossbeam_channel::never());
    if let Some(duty) = &duty {
        (orders, batches) = (duty.orders.clone(), duty.batches.clone());
    }
    let mut pages = duty.map(PageSender::new);
    loop {
        select_biased! {
            recv(messages) -> message => match message {
                Ok(message) => lane.send_message(&message)?,
                Err(_) => return Ok(()),
            },
            recv(orders) -> order => match (order, &mut pages) {
                (Ok(order), Some(pages)) => pages.end_step(&mut lane, order)?,
                // No pages any more; messages may still come.
                _ => orders = crossbeam_channel::never(),
            },
            recv(batches) -> batch => match (batch, &mut pages) {
                (Ok(batch), Some(pages)) => pages.send(&mut lane, batch)?,
                _ => batches = crossbeam_channel::never(),
            },
            default(HEARTBEAT) => {
                let received = Counters::read(&lane.counters.progress);
                lane.send_message(&Message::Heartbeat { received })?;
            }
        }
    }
}

/// Sends encoded batches, and measures how the link takes them.
struct PageSender {
    duty: PageDuty,
    idle_since: Instant,
}

impl PageSender {
    fn new(duty: PageDuty) -> Self {
        Self { duty, idle_since: Instant::now() }
    }

    fn send(&mut self, lane: &mut NumberedSender, mut batch: Box<EncodedBatch>) -> Result<(), Error> {
        let began = Instant::now();
        let tally = *batch.tally();
        self.duty.pacer.take(tally.wire_bytes);
        lane.send_parts(&mut batch.seal(lane.sequence), tally.wire_bytes)?;
        // There is room for all batches: this never waits.
        let _ = self.duty.free.send(batch);
        Counters::add(&lane.counters.pages, tally.pages);
        let ended = Instant::now();
        self.duty.chooser.sent(tally.wire_bytes, ended - began, began.saturating_duration_since(self.idle_since));
        self.idle_since = ended;
        Ok(())
    }

    /// All batches of the step are in the channel or with other lanes, which finish theirs before they
    /// end the step too.
    fn end_step(&mut self, lane: &mut NumberedSender, order: EndStep) -> Result<(), Error> {
        while let Ok(batch) = self.duty.batches.try_recv() {
            self.send(lane, batch)?;
        }
        lane.send_message(&Message::StepEnd { step: order.0 })?;
        let _ = self.duty.events.send(SourceEvent::LaneFlushed);
        // Until the next step there is nothing to send: that is no idleness.
        self.idle_since = Instant::now() + Duration::from_secs(3600);
        Ok(())
    }
}
