//! Sending threads: one per lane. A data lane encodes the batches it sends; the control lane sends
//! the session's messages and, when it has been idle, a sign of life.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, select_biased};

use super::lane::NumberedSender;
use super::pace::Pacer;
use super::{Counters, source::SourceEvent};
use crate::batch::Batch;
use crate::encode::{EncodedBatch, Encoder, Tally};
use crate::error::Error;
use crate::limits::HEARTBEAT;
use crate::wire::Message;

/// A round ends: the lane sends what batches are left, and says so.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndRound(pub(super) u32);

/// What a lane that carries pages works with.
pub(super) struct PageDuty {
    pub(super) batches: Receiver<Batch>,
    pub(super) orders: Receiver<EndRound>,
    pub(super) encoder: Encoder,
    pub(super) pacer: Arc<Pacer>,
    pub(super) events: Sender<SourceEvent>,
}

/// Sends pages until the channels close.
pub(super) fn run_data_lane(mut lane: NumberedSender, duty: PageDuty) {
    let (orders, batches, events) = (duty.orders.clone(), duty.batches.clone(), duty.events.clone());
    let mut pages = PageSender::new(duty);
    loop {
        let result = select_biased! {
            recv(orders) -> order => match order {
                Ok(order) => pages.end_round(&mut lane, order),
                Err(_) => return,
            },
            recv(batches) -> batch => match batch {
                Ok(batch) => pages.send(&mut lane, &batch),
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
                (Ok(order), Some(pages)) => pages.end_round(&mut lane, order)?,
                // No pages any more; messages may still come.
                _ => orders = crossbeam_channel::never(),
            },
            recv(batches) -> batch => match (batch, &mut pages) {
                (Ok(batch), Some(pages)) => pages.send(&mut lane, &batch)?,
                _ => batches = crossbeam_channel::never(),
            },
            default(HEARTBEAT) => {
                let received = Counters::read(&lane.counters.progress);
                lane.send_message(&Message::Heartbeat { received })?;
            }
        }
    }
}

/// Encodes and sends batches, and keeps the tally of the open round.
struct PageSender {
    duty: PageDuty,
    encoded: EncodedBatch,
    tally: Tally,
}

impl PageSender {
    fn new(duty: PageDuty) -> Self {
        Self { duty, encoded: EncodedBatch::default(), tally: Tally::default() }
    }

    fn send(&mut self, lane: &mut NumberedSender, batch: &Batch) -> Result<(), Error> {
        self.duty.encoder.encode(batch, &mut self.encoded)?;
        let tally = *self.encoded.tally();
        self.duty.pacer.take(tally.wire_bytes);
        lane.send_parts(&mut self.encoded.seal(lane.sequence), tally.wire_bytes)?;
        self.tally.add(&tally);
        Counters::add(&lane.counters.pages, tally.pages);
        Counters::add(&lane.counters.zero_pages, tally.zero_pages);
        Ok(())
    }

    /// All batches of the round are in the channel or with other lanes, which finish theirs before
    /// they end the round too.
    fn end_round(&mut self, lane: &mut NumberedSender, order: EndRound) -> Result<(), Error> {
        while let Ok(batch) = self.duty.batches.try_recv() {
            self.send(lane, &batch)?;
        }
        lane.send_message(&Message::RoundEnd { round: order.0 })?;
        let tally = std::mem::take(&mut self.tally);
        let _ = self.duty.events.send(SourceEvent::LaneFlushed(tally));
        Ok(())
    }
}
