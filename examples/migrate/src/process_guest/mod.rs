//! A guest without KVM: threads that write a memory mapping, one for each vCPU.
//!
//! They fill and write it exactly as the guest program under KVM does ([`crate::workload`]), so the
//! same self-check proves the same things; only that their memory is this process' own and writes
//! to it are tracked by the host kernel ([`tracker`]). The machine state is a few counters. Or memory is
//! another machine's, from a file ([`image`]): then they write nothing, and a hash proves it.

mod destination;
mod faults;
mod gate;
mod heart;
mod image;
mod pagemap;
mod populated;
mod ram;
mod source;
mod state;
mod tracker;
mod userfault;
mod vcpus;

pub(crate) use destination::ArrivingProcessGuest;
pub(crate) use image::{Image, ImageError};
pub(crate) use source::ProcessGuest;
pub(crate) use tracker::Tracking;

/// Why a process guest could not be started, saved or taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessGuestError {
    /// Memory of a size that no guest can have.
    #[error("{0} bytes of guest memory are not possible: use a multiple of 4096, and at least 1 MiB")]
    MemorySize(u64),
    /// The engine cannot migrate this layout.
    #[error(transparent)]
    Layout(#[from] pageferry::memory::LayoutError),
    /// The image that memory is to hold.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image is not all in memory yet.
    #[error("the guest's memory is not filled yet")]
    NotFilled,
    /// The host did not give the memory.
    #[error("cannot map {} of guest memory: {source}{hint}", crate::cli::units::show_bytes(*bytes))]
    Map {
        /// How much was asked for.
        bytes: u64,
        /// What the host said.
        source: std::io::Error,
        /// What the operator can do.
        hint: &'static str,
    },
    /// The host did not give a thread.
    #[error("cannot start a thread for vCPU {vcpu}: {source}")]
    Thread {
        /// Which vCPU.
        vcpu: u32,
        /// What the host said.
        source: std::io::Error,
    },
    /// Bytes from the peer that make no sense.
    #[error("the source's {what} cannot be understood ({why}): use the same `migrate` on both sides")]
    Invalid {
        /// Which bytes.
        what: &'static str,
        /// What is wrong with them.
        why: String,
    },
    /// Writes to memory that the host gave cannot be tracked.
    #[error(transparent)]
    Tracking(#[from] pagemap::TrackingError),
    /// A thread of the guest's is gone: a defect of this program.
    #[error("a vCPU thread of the guest has panicked")]
    Dead,
    /// Whoever waited for the guest does not any more.
    #[error("the guest is not waited for any longer")]
    NotAwaited,
    /// No guest is here.
    #[error("no guest has arrived")]
    NotHere,
}

#[cfg(test)]
mod tests {
    use pageferry::memory::{Backing, GuestMemory, RegionId};
    use pageferry::vm::{DestinationVm, SourceVm};

    use super::*;
    use crate::guest::{Guest, SelfCheck};
    use crate::workload::params::{Params, Rate, Writes};

    const MEMORY: u64 = 4 << 20;

    fn params(writes: Writes) -> Params {
        Params { working_set: 1 << 20, rate: Rate::BytesPerSecond(200 << 20), writes, vcpus: 2, ..Params::default() }
    }

    fn started(writes: Writes, tracking: Tracking) -> ProcessGuest {
        let mut guest = ProcessGuest::start(MEMORY, Backing::Anonymous, tracking, params(writes), None).unwrap();
        guest.wait_ready(&|| true).unwrap();
        guest
    }

    fn wait_for_heartbeats(guest: &impl Guest) {
        let until = guest.heartbeats().unwrap() + 20;
        while guest.heartbeats().unwrap() < until {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Moves a paused guest by plain copying.
    fn moved(source: &mut ProcessGuest) -> (ArrivingProcessGuest, std::sync::Arc<dyn GuestMemory>) {
        let mut destination = ArrivingProcessGuest::new(Backing::Memfd, true);
        let (mut config, mut state) = (Vec::new(), Vec::new());
        source.describe(&mut config).unwrap();
        source.save(&mut state).unwrap();
        let from = source.memory();
        let to = destination.prepare(&config, from.layout()).unwrap();
        let mut bytes = vec![0; MEMORY as usize];
        from.read(RegionId(0), 0, &mut bytes).unwrap();
        to.write(RegionId(0), 0, &bytes).unwrap();
        destination.load(&mut state.as_slice()).unwrap();
        (destination, to)
    }

    #[test]
    fn a_guest_that_goes_on_elsewhere_finds_every_byte_right() {
        for (writes, tracking) in [(Writes::Few, Tracking::Kernel), (Writes::Full, Tracking::Faults)] {
            let mut source = started(writes, tracking);
            wait_for_heartbeats(&source);
            source.pause().unwrap();
            let (mut destination, _) = moved(&mut source);
            destination.commit(true).unwrap();
            wait_for_heartbeats(&destination);
            assert!(matches!(destination.self_check().unwrap(), SelfCheck::Ok { .. }));
            wait_for_heartbeats(&destination);
            source.resume().unwrap();
            assert!(matches!(source.self_check().unwrap(), SelfCheck::Ok { .. }));
        }
    }

    #[test]
    fn one_wrong_byte_anywhere_is_found_and_named() {
        let mut source = started(Writes::Few, Tracking::Kernel);
        source.pause().unwrap();
        for address in [0, MEMORY / 2 + 77, MEMORY - 1] {
            let (mut destination, memory) = moved(&mut source);
            let mut byte = [0];
            memory.read(RegionId(0), address, &mut byte).unwrap();
            memory.write(RegionId(0), address, &[byte[0] ^ 1]).unwrap();
            destination.commit(false).unwrap();
            let SelfCheck::Wrong(text) = destination.self_check().unwrap() else { panic!("{address:#x} not found") };
            assert!(text.contains(&format!("page {:#x} ", address / 4096)) && text.contains("1 wrong"), "{text}");
        }
    }

    #[test]
    fn a_guest_made_of_an_image_goes_on_elsewhere_and_finds_a_wrong_byte() {
        let path = std::env::temp_dir().join(format!("image-{}-moves", std::process::id()));
        std::fs::write(&path, [5; 10_000]).unwrap();
        let idle = Params { rate: Rate::BytesPerSecond(0), ..params(Writes::Few) };
        let image = Image::open(&path).unwrap();
        let mut source = ProcessGuest::start(MEMORY, Backing::Anonymous, Tracking::Kernel, idle, Some(image)).unwrap();
        std::fs::remove_file(path).unwrap();
        source.wait_ready(&|| true).unwrap();
        source.pause().unwrap();
        let (mut destination, memory) = moved(&mut source);
        destination.commit(false).unwrap();
        assert_eq!(destination.self_check().unwrap(), SelfCheck::Ok { pages: MEMORY / 4096 });
        memory.write(RegionId(0), 3 << 20, &[1]).unwrap();
        let SelfCheck::Wrong(text) = destination.self_check().unwrap() else { panic!("not found") };
        assert!(text.contains("pages 0x200 to 0x400"), "{text}");
    }

    #[test]
    fn a_write_that_was_not_copied_is_found() {
        let mut source = started(Writes::Few, Tracking::Kernel);
        source.pause().unwrap();
        let mut stale = vec![0; 1 << 20];
        source.memory().read(RegionId(0), 0, &mut stale).unwrap();
        source.resume().unwrap();
        wait_for_heartbeats(&source);
        source.pause().unwrap();
        let (mut destination, memory) = moved(&mut source);
        memory.write(RegionId(0), 0, &stale).unwrap();
        destination.commit(false).unwrap();
        assert!(matches!(source.self_check().unwrap(), SelfCheck::Ok { .. }));
        assert!(matches!(destination.self_check().unwrap(), SelfCheck::Wrong(_)));
    }

    #[test]
    fn impossible_sizes_and_foreign_descriptions_are_refused() {
        let start =
            |memory, backing, tracking| ProcessGuest::start(memory, backing, tracking, params(Writes::Few), None);
        assert!(start(4095, Backing::Anonymous, Tracking::Kernel).is_err());
        let mut destination = ArrivingProcessGuest::new(Backing::Anonymous, false);
        let layout = ram::Ram::layout(MEMORY).unwrap();
        assert!(destination.prepare(b"not a guest", &layout).is_err());
        assert!(destination.self_check().is_err());
    }
}
