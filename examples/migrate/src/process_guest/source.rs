//! The process guest at the source.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pageferry::dirty::DirtySource;
use pageferry::memory::{Backing, GuestMemory};
use pageferry::vm::{SourceVm, VmResult};

use super::ProcessGuestError;
use super::image::Image;
use super::ram::Ram;
use super::state::{Description, bytes_of};
use super::tracker::{ProcessTracker, Tracking};
use super::vcpus::Vcpus;
use crate::guest::{Guest, SelfCheck, Written};
use crate::workload::params::Params;

/// A process guest that runs here and can be migrated away.
#[derive(Debug)]
pub(crate) struct ProcessGuest {
    params: Params,
    vcpus: Vcpus,
    tracker: ProcessTracker,
    running: bool,
}

impl ProcessGuest {
    /// Starts one, whose memory comes from the image if there is one. Where faults tell its writes, anonymous memory is a memfd.
    pub(crate) fn start(
        memory: u64,
        backing: Backing,
        tracking: Tracking,
        params: Params,
        image: Option<Image>,
    ) -> Result<Self, ProcessGuestError> {
        if let Some(image) = &image {
            image.check_fits(memory)?;
        }
        let backing = match (tracking, backing) {
            (Tracking::Faults, Backing::Anonymous) => Backing::Memfd,
            _ => backing,
        };
        let ram = Ram::map(Ram::layout(memory)?, backing)?;
        let tracker = ProcessTracker::new(ram.memory(), tracking)?;
        let vcpus = Vcpus::boot(ram.clone(), params, image)?;
        vcpus.release();
        Ok(Self { params, vcpus, tracker, running: true })
    }
}

impl SourceVm for ProcessGuest {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.tracker.memory()
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        &mut self.tracker
    }

    fn describe(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        Ok(out.write_all(&bytes_of(&Description::of(&self.params, self.vcpus.image_hashes()?))?)?)
    }

    fn is_running(&self) -> bool {
        self.running
    }

    fn pause(&mut self) -> VmResult<()> {
        self.vcpus.hold();
        self.running = false;
        Ok(())
    }

    fn resume(&mut self) -> VmResult<()> {
        self.vcpus.release();
        self.running = true;
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> VmResult<()> {
        self.vcpus.throttle(percent);
        Ok(())
    }

    fn save(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        Ok(out.write_all(&bytes_of(&self.vcpus.save())?)?)
    }

    fn state_bytes_estimate(&self) -> u64 {
        64 + 10 * u64::from(self.params.vcpus)
    }
}

impl Guest for ProcessGuest {
    fn wait_ready(&mut self, go_on: &dyn Fn() -> bool) -> VmResult<()> {
        Ok(self.vcpus.wait_ready(go_on)?)
    }

    fn ended(&self) -> Option<String> {
        self.vcpus.ended()
    }

    fn heartbeats(&self) -> Option<u64> {
        Some(self.vcpus.heart().beats())
    }

    fn written(&self) -> Option<Written> {
        Some(self.vcpus.written())
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.vcpus.heart().reset();
        Ok(())
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        Ok(Some(self.vcpus.heart().longest_gap()))
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        self.vcpus.hold();
        let answer = self.vcpus.check();
        if self.running {
            self.vcpus.release();
        }
        Ok(answer)
    }
}
