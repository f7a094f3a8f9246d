//! Sending threads: one per lane. A data lane sends encoded batches; the control lane sends the session's
//! messages and, when it has been idle, a sign of life.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select_biased};

use super::Counters;
use super::lane::NumberedSender;
use super::pace::Pacer;
use super::source::{Parcel, SourceEvent, Work};
use crate::batch::Batch;
use crate::encode::{EncodedBatch, Encoder, LevelChooser};
use crate::error::Error;
use crate::limits::HEARTBEAT;
use crate::wire::Message;

/// A step ends: the lane sends what batches are left, and says so.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndStep(pub(super) u32);

/// What a lane that carries pages works with.
pub(super) struct PageDuty {
    pub(super) batches: Receiver<Parcel>,
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
            recv(batches) -> parcel => match parcel {
                Ok(parcel) => pages.send_parcel(&mut lane, parcel),
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
            recv(batches) -> parcel => match (parcel, &mut pages) {
                (Ok(parcel), Some(pages)) => pages.send_parcel(&mut lane, parcel)?,
                _ => batches = crossbeam_channel::never(),
            },
            default(HEARTBEAT) => {
                let received = Counters::read(&lane.counters.progress);
                lane.send_message(&Message::Heartbeat { received })?;
            }
        }
    }
}

/// Sends batches, and measures how the link takes them.
struct PageSender {
    duty: PageDuty,
    idle_since: Instant,
    /// For batches that this lane encodes itself, always into the same buffer: it stays in the cache.
    encoder: Option<Encoder>,
    own: EncodedBatch,
}

impl PageSender {
    fn new(duty: PageDuty) -> Self {
        let mut sender = Self { duty, idle_since: Instant::now(), encoder: None, own: EncodedBatch::default() };
        sender.rest();
        sender
    }

    /// Until the next step there is nothing to send: that is no idleness.
    fn rest(&mut self) {
        self.idle_since = Instant::now() + Duration::from_secs(3600);
    }

    fn send_parcel(&mut self, lane: &mut NumberedSender, parcel: Parcel) -> Result<(), Error> {
        match parcel {
            Parcel::Encoded(mut batch) => {
                self.send(lane, &mut batch)?;
                // There is room for all batches: this never waits.
                let _ = self.duty.free.send(batch);
                Ok(())
            }
            Parcel::Plain(batch, permission, work) => {
                let event = self.encode_and_send(lane, &batch, &work)?;
                let _ = self.duty.free.send(permission);
                let _ = self.duty.events.send(event);
                Ok(())
            }
        }
    }

    fn encode_and_send(
        &mut self,
        lane: &mut NumberedSender,
        batch: &Batch,
        work: &Arc<Work>,
    ) -> Result<SourceEvent, Error> {
        let encoder = self.encoder.get_or_insert_with(|| work.encoder());
        let mut own = std::mem::take(&mut self.own);
        let encoded = match work.encode(encoder, batch, &mut own) {
            Ok(encoded) => encoded,
            // What is wrong with our own memory is no lane's fault.
            Err(error) => return Ok(SourceEvent::EncodingFailed(error.into())),
        };
        if !own.is_empty() {
            self.send(lane, &mut own)?;
        }
        self.own = own;
        Ok(SourceEvent::Encoded(encoded))
    }

    fn send(&mut self, lane: &mut NumberedSender, batch: &mut EncodedBatch) -> Result<(), Error> {
        let began = Instant::now();
        let tally = *batch.tally();
        self.duty.pacer.take(tally.wire_bytes);
        lane.write_pages(batch.written())?;
        lane.send_parts(&mut batch.seal(lane.sequence), tally.wire_bytes)?;
        Counters::add(&lane.counters.pages, tally.pages);
        let ended = Instant::now();
        self.duty.chooser.sent(tally.wire_bytes, ended - began, began.saturating_duration_since(self.idle_since));
        self.idle_since = ended;
        Ok(())
    }

    /// All batches of the step are in the channel or with other lanes, which finish theirs before they
    /// end the step too.
    fn end_step(&mut self, lane: &mut NumberedSender, order: EndStep) -> Result<(), Error> {
        while let Ok(parcel) = self.duty.batches.try_recv() {
            self.send_parcel(lane, parcel)?;
        }
        lane.send_message(&Message::StepEnd { step: order.0 })?;
        let _ = self.duty.events.send(SourceEvent::LaneFlushed);
        self.rest();
        Ok(())
    }
}
