//! What the source may put on the wire, checked frame by frame and apart from what becomes of it: every
//! reference names content that the destination holds when it gets there (R5, R6), and a fresh
//! migration knows nothing of an earlier one.

use std::collections::{BTreeMap, BTreeSet};

use pageferry::batch::round_of;
use pageferry::memory::Layout;
use pageferry::units::PageNumber;
use pageferry::wire::pages::{self, Coding, Record};
use pageferry::wire::{HEADER_LEN, Header, Kind};

/// The pages that one source has sent.
pub(crate) struct Audit {
    layout: Layout,
    records: Vec<Record>,
    step: u32,
    /// In which step a page was last sent.
    sent: BTreeMap<PageNumber, u32>,
    /// Pages that were last written past the frames: nobody knows what the destination holds of them.
    unsure: BTreeSet<PageNumber>,
    /// In which step a page was last copied from.
    copied_from: BTreeMap<PageNumber, u32>,
    /// The first broken rule.
    pub(crate) violation: Option<String>,
}

impl Audit {
    pub(crate) fn new(layout: Layout) -> Self {
        let (records, sent, copied_from) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        Self { layout, records, step: 0, sent, unsure: BTreeSet::new(), copied_from, violation: None }
    }

    /// Looks at a frame that the source hands to a lane.
    pub(crate) fn see(&mut self, frame: &[u8]) {
        if let Err(what) = self.check(frame) {
            self.violation.get_or_insert(what);
        }
    }

    fn check(&mut self, frame: &[u8]) -> Result<(), String> {
        let Some((header, body)) = frame.split_at_checked(HEADER_LEN) else { return Ok(()) };
        let header = Header::decode(header).map_err(|error| error.to_string())?;
        if header.kind != Kind::Pages {
            return Ok(());
        }
        let (step, before) = (header.step, self.step);
        if step < before {
            return Err(format!("a frame of step {step} is sent after one of step {before}"));
        }
        self.step = step;
        let mut records = std::mem::take(&mut self.records);
        pages::decode(body, &self.layout, &mut records)
            .map_err(|error| format!("an invalid frame is sent: {error}"))?;
        for record in &records {
            for (index, page) in (0..).zip(record.run.pages()) {
                self.check_page(step, page, index, record.coding)?;
            }
        }
        self.records = records;
        Ok(())
    }

    fn check_page(&mut self, step: u32, page: PageNumber, index: u64, coding: Coding) -> Result<(), String> {
        let (_, copies) = round_of(step);
        let before = self.sent.insert(page, step);
        if before.is_some_and(|before| round_of(before).0 == round_of(step).0) {
            return Err(format!("{page} is sent twice in the round of step {step}"));
        }
        if self.copied_from.get(&page) == Some(&step) {
            return Err(format!("{page} is sent in step {step}, in which it is copied from"));
        }
        let unsure = if coding == Coding::Written { !self.unsure.insert(page) } else { self.unsure.remove(&page) };
        match coding {
            Coding::Written if copies => Err(format!("{page} is written in step {step}, the round's second")),
            Coding::Delta if unsure => Err(format!("{page} is a delta, and was written last")),
            Coding::Copy { .. } if !copies => Err(format!("{page} is a copy in step {step}, the round's first")),
            Coding::Delta | Coding::Pattern if copies => Err(format!("{page} is no copy in step {step}")),
            Coding::Delta if before.is_none() => Err(format!("{page} is a delta, and was never sent")),
            Coding::Copy { from } => self.check_source(step, page, PageNumber(from.0 + index)),
            _ => Ok(()),
        }
    }

    fn check_source(&mut self, step: u32, page: PageNumber, from: PageNumber) -> Result<(), String> {
        self.copied_from.insert(from, step);
        if self.unsure.contains(&from) {
            return Err(format!("{page} is copied from {from}, which was written last"));
        }
        match self.sent.get(&from) {
            Some(sent) if *sent < step => Ok(()),
            sent => Err(format!("{page} is copied from {from} in step {step}, which was last sent in step {sent:?}")),
        }
    }
}
