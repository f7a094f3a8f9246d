//! Guests of either kind: starting one as the command line says, and taking in whichever comes.
//!
//! The description that travels ahead begins with one byte for the kind, so that a destination
//! needs no option to know what will arrive.

use std::borrow::Cow;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;
use std::{fs, io};

use pageferry::dirty::DirtySource;
use pageferry::memory::{GuestMemory, Layout, MappedMemory};
use pageferry::vm::{DestinationVm, SourceVm, Step, VmError, VmResult};
use pageferry_kvm::DirtyLogMode;
use pageferry_unix::Descriptors;

use super::console;
use super::handover::{self, NothingToTrack, SharedView};
use crate::cli::units::{show_bytes, show_count};
use crate::cli::{Backing, GuestKind, GuestOptions};
use crate::guest::{DestinationGuest, Guest, SelfCheck, SourceGuest, Written};
use crate::machine::{
    Allowance, ArrivalConfig, ArrivingGuest, BootImage, Boots, ConsoleEnds, GuestBacking, GuestConfig, LiveGuest,
    NoRoom, check_room, check_size,
};
use crate::process_guest::{ArrivingProcessGuest, Image, ProcessGuest, Tracking};
use crate::progress::Screen;

/// Why a guest could not be started or taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// A kernel needs a machine.
    #[error("--kernel boots a real machine, which needs KVM: leave out --guest process")]
    KernelNeedsKvm,
    /// A machine needs more than memory.
    #[error(
        "--image fills the memory of a process guest only: leave out {0}, an image cannot run without the state of its CPUs"
    )]
    ImageCannotRun(&'static str),
    /// A file that the user named.
    #[error("cannot read {path}: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    /// A description that begins with an unknown kind.
    #[error(
        "the source sends a guest of a kind that this program does not know ({0:?}): use the same `migrate` on both sides"
    )]
    UnknownKind(Option<u8>),
    /// More memory than the host has.
    #[error("--memory {}{}: {refusal}", show_bytes(*memory), twice(*copies))]
    NoRoom { memory: u64, copies: u64, refusal: NoRoom },
    /// Nothing has arrived.
    #[error("no guest has arrived")]
    NotHere,
}

fn twice(copies: u64) -> &'static str {
    if copies == 2 { ", twice because a demo holds both copies" } else { "" }
}

const NO_KVM: &str = "this host has no /dev/kvm";

/// What Linux is told unless the user says otherwise: the serial console, and to end when it fails.
const LINUX_COMMAND_LINE: &str = "console=ttyS0 reboot=k panic=-1 pci=off";

/// The first byte of the description that travels ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Process,
    Kvm,
}

impl Kind {
    fn to_byte(self) -> u8 {
        match self {
            Self::Process => b'P',
            Self::Kvm => b'K',
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Process, Self::Kvm].into_iter().find(|kind| kind.to_byte() == byte)
    }
}

impl From<Backing> for GuestBacking {
    fn from(backing: Backing) -> Self {
        match backing {
            Backing::Anon => Self::Anonymous,
            Backing::Memfd => Self::Memfd,
            Backing::Huge => Self::HugePages2M,
        }
    }
}

/// A guest that was started.
pub(crate) struct AnySource {
    kind: Kind,
    guest: Box<dyn SourceGuest>,
    handing_over: Option<HandingOver>,
}

/// What becomes of a guest whose memory is handed over.
struct HandingOver {
    /// What the description begins with.
    names: Vec<u8>,
    memory: Arc<SharedView>,
    tracker: NothingToTrack,
}

impl AnySource {
    fn new(kind: Kind, guest: impl SourceGuest + 'static) -> Self {
        Self { kind, guest: Box::new(guest), handing_over: None }
    }

    /// From now on the guest's memory is handed over when it migrates. Returns the descriptors that must reach the destination.
    pub(super) fn hand_memory_over(&mut self) -> VmResult<Vec<OwnedFd>> {
        let memory = self.guest.memory();
        let (names, descriptors) = handover::offer(&*memory)?;
        let memory = Arc::new(SharedView::new(memory)?);
        self.handing_over = Some(HandingOver { names, memory, tracker: NothingToTrack });
        Ok(descriptors)
    }
}

/// Starts the guest that the command line asks for. `typing` connects a Linux's console to standard input. This host
/// is to hold so many copies of its memory.
pub(crate) fn start(
    options: &GuestOptions,
    screen: &Arc<Screen>,
    typing: bool,
    copies: u64,
) -> Result<AnySource, VmError> {
    if let Some(file) = &options.image {
        return start_image(file, options, screen, copies);
    }
    check_host(options.memory(), options, copies)?;
    let has_kvm = Path::new("/dev/kvm").exists();
    match options.guest {
        GuestKind::Auto if !has_kvm && options.kernel.is_none() => {
            screen.note(&format!("{NO_KVM}: a process guest takes its place (threads writing tracked memory)"));
            start_process(options, screen)
        }
        GuestKind::Auto | GuestKind::Kvm => start_kvm(options, screen, typing),
        GuestKind::Process => start_process(options, screen),
    }
}

/// A process guest, the only kind that needs no CPU state.
fn start_image(file: &Path, options: &GuestOptions, screen: &Screen, copies: u64) -> Result<AnySource, VmError> {
    match options {
        GuestOptions { guest: GuestKind::Kvm, .. } => return Err(GuestError::ImageCannotRun("--guest kvm").into()),
        GuestOptions { kernel: Some(_), .. } => return Err(GuestError::ImageCannotRun("--kernel").into()),
        _ => {}
    }
    let image = Image::open(file)?;
    let memory = options.memory.unwrap_or(image.least_memory());
    check_host(memory, options, copies)?;
    let params = options.params();
    let guest = ProcessGuest::start(memory, options.backing.into(), tracking(options, screen), params, Some(image))?;
    let vcpus = show_count(params.vcpus, "vCPU");
    screen.note(&format!("process guest: {}, {vcpus}, the image {}", show_bytes(memory), file.display()));
    Ok(AnySource::new(Kind::Process, guest))
}

fn check_host(memory: u64, options: &GuestOptions, copies: u64) -> Result<(), GuestError> {
    let allowance = Allowance { limit: None, overcommit: options.overcommit };
    check_room(memory.saturating_mul(copies), options.backing.into(), allowance).map_err(|refusal| GuestError::NoRoom {
        memory,
        copies,
        refusal,
    })
}

fn start_kvm(options: &GuestOptions, screen: &Arc<Screen>, typing: bool) -> Result<AnySource, VmError> {
    let input =
        if typing && options.kernel.is_some() { Some(io::stdin().as_fd().try_clone_to_owned()?.into()) } else { None };
    check_size(options.memory(), options.kernel.is_none())?;
    let (output, printed) = console::channel();
    let mut guest = LiveGuest::boot(GuestConfig {
        ram_bytes: options.memory(),
        vcpus: options.vcpus,
        backing: options.backing.into(),
        boots: boots(options, screen)?,
        console: ConsoleEnds { input, output: Some(output) },
        dirty_log: DirtyLogMode::default(),
    })?;
    console::show(&guest.handle(), printed, screen)?;
    guest.resume()?;
    Ok(AnySource::new(Kind::Kvm, guest))
}

fn boots(options: &GuestOptions, screen: &Screen) -> Result<Boots, VmError> {
    let Some(kernel) = &options.kernel else {
        let params = options.params();
        screen.note(&format!("KVM guest: {}", options.describe(&params)));
        return Ok(Boots::Payload(params));
    };
    let (memory, vcpus) = (show_bytes(options.memory()), show_count(options.vcpus, "vCPU"));
    screen.note(&format!("KVM guest: {memory}, {vcpus}, booting {}", kernel.display()));
    Ok(Boots::Image(BootImage {
        kernel: Cow::Owned(read(kernel)?),
        initrd: options.initrd.as_deref().map(read).transpose()?,
        command_line: options.cmdline.clone().unwrap_or_else(|| LINUX_COMMAND_LINE.to_owned()),
    }))
}

fn read(path: &Path) -> Result<Vec<u8>, GuestError> {
    fs::read(path).map_err(|source| GuestError::Unreadable { path: path.to_owned(), source })
}

fn start_process(options: &GuestOptions, screen: &Screen) -> Result<AnySource, VmError> {
    if options.kernel.is_some() {
        return Err(GuestError::KernelNeedsKvm.into());
    }
    let params = options.params();
    let tracking = tracking(options, screen);
    let guest = ProcessGuest::start(options.memory(), options.backing.into(), tracking, params, None)?;
    screen.note(&format!("process guest: {}", options.describe(&params)));
    Ok(AnySource::new(Kind::Process, guest))
}

/// How the writes of a process guest are tracked.
fn tracking(options: &GuestOptions, screen: &Screen) -> Tracking {
    let tracking = options.tracker.tracking();
    if tracking == Tracking::Faults {
        screen.note("the process guest's writes are tracked by faults, its memory is a memfd that is mapped twice");
    }
    tracking
}

impl SourceVm for AnySource {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        match &self.handing_over {
            Some(handing_over) => Arc::clone(&handing_over.memory) as _,
            None => self.guest.memory(),
        }
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        match &mut self.handing_over {
            Some(handing_over) => &mut handing_over.tracker,
            None => self.guest.dirty(),
        }
    }

    fn describe(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        if let Some(handing_over) = &self.handing_over {
            out.write_all(&handing_over.names)?;
        }
        out.write_all(&[self.kind.to_byte()])?;
        self.guest.describe(out)
    }

    fn is_running(&self) -> bool {
        self.guest.is_running()
    }

    fn pause(&mut self) -> VmResult<()> {
        self.guest.pause()
    }

    fn resume(&mut self) -> VmResult<()> {
        self.guest.resume()
    }

    fn throttle(&mut self, percent: u8) -> VmResult<()> {
        self.guest.throttle(percent)
    }

    fn save(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        self.guest.save(out)
    }

    fn state_bytes_estimate(&self) -> u64 {
        self.guest.state_bytes_estimate()
    }

    fn step(&mut self, step: Step) -> VmResult<()> {
        self.guest.step(step)
    }
}

impl Guest for AnySource {
    fn wait_ready(&mut self, go_on: &dyn Fn() -> bool) -> VmResult<()> {
        self.guest.wait_ready(go_on)
    }

    fn ended(&self) -> Option<String> {
        self.guest.ended()
    }

    fn heartbeats(&self) -> Option<u64> {
        self.guest.heartbeats()
    }

    fn written(&self) -> Option<Written> {
        self.guest.written()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.guest.reset_stall()
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        self.guest.longest_stall()
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        self.guest.self_check()
    }
}

/// What a destination gives a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// What its memory is made of.
    pub(crate) backing: Backing,
    /// How much memory.
    pub(crate) allowance: Allowance,
    /// Touch all memory before the first page comes.
    pub(crate) prefault: bool,
}

/// A place for a guest of either kind.
pub(crate) struct AnyDestination {
    place: Place,
    screen: Arc<Screen>,
    guest: Option<Box<dyn DestinationGuest>>,
    /// The guest's, which lives as long as it does.
    memory: Option<Weak<dyn GuestMemory>>,
    offered: bool,
    /// Where memory that is handed over comes.
    descriptors: Option<Descriptors>,
}

impl AnyDestination {
    /// An empty place.
    pub(crate) fn new(place: Place, screen: Arc<Screen>) -> Self {
        Self { place, screen, guest: None, memory: None, offered: false, descriptors: None }
    }

    /// Also takes a guest whose memory comes as descriptors.
    pub(crate) fn taking(mut self, descriptors: Option<Descriptors>) -> Self {
        self.descriptors = descriptors;
        self
    }

    /// Whether a source has ever described a guest, taken in or refused.
    pub(crate) fn was_offered(&self) -> bool {
        self.offered
    }

    /// The guest's memory, while one is here.
    pub(crate) fn memory(&self) -> Option<Arc<dyn GuestMemory>> {
        self.memory.as_ref()?.upgrade()
    }

    /// Takes a guest whose memory is here already.
    fn prepare_handed_over(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        let (memory, config) = handover::take(config, layout, self.descriptors.as_ref())?;
        // It takes nothing that was not taken before; but the operator's limit counts.
        let needed = layout.regions().iter().map(|region| region.len).sum();
        let allowance = Allowance { overcommit: true, ..self.place.allowance };
        check_room(needed, Backing::Memfd.into(), allowance)?;
        let layout = memory.layout().clone();
        let memory = self.prepare_kind(config, &layout, Some(memory))?;
        self.screen.note("the guest's memory was handed over: nothing is copied");
        Ok(Arc::new(SharedView::new(memory)?))
    }

    fn prepare_kind(
        &mut self,
        config: &[u8],
        layout: &Layout,
        given: Option<Arc<MappedMemory>>,
    ) -> VmResult<Arc<dyn GuestMemory>> {
        let Some((&kind, config)) = config.split_first() else {
            return Err(GuestError::UnknownKind(None).into());
        };
        match Kind::from_byte(kind) {
            Some(Kind::Process) => self.prepare_process(config, layout, given),
            Some(Kind::Kvm) => self.prepare_kvm(config, layout, given),
            None => Err(GuestError::UnknownKind(Some(kind)).into()),
        }
    }

    fn prepare_process(
        &mut self,
        config: &[u8],
        layout: &Layout,
        given: Option<Arc<MappedMemory>>,
    ) -> VmResult<Arc<dyn GuestMemory>> {
        let mut guest = if let Some(memory) = given {
            ArrivingProcessGuest::with_memory(memory)
        } else {
            let needed = layout.regions().iter().map(|region| region.len).sum();
            check_room(needed, self.place.backing.into(), self.place.allowance)?;
            ArrivingProcessGuest::new(self.place.backing.into(), self.place.prefault)
        };
        let memory = guest.prepare(config, layout)?;
        self.guest = Some(Box::new(guest));
        Ok(memory)
    }

    fn prepare_kvm(
        &mut self,
        config: &[u8],
        layout: &Layout,
        given: Option<Arc<MappedMemory>>,
    ) -> VmResult<Arc<dyn GuestMemory>> {
        let Place { backing, allowance, prefault } = self.place;
        let backing = Some(if given.is_some() { GuestBacking::Memfd } else { backing.into() });
        let (output, printed) = console::channel();
        let console = ConsoleEnds { output: Some(output), input: None };
        let mut guest = ArrivingGuest::new(ArrivalConfig { allowance, backing, prefault, memory: given, console });
        let memory = guest.prepare(config, layout)?;
        if let Some(handle) = guest.handle() {
            console::show(&handle, printed, &self.screen)?;
        }
        self.guest = Some(Box::new(guest));
        Ok(memory)
    }

    fn here(&mut self) -> Result<&mut dyn DestinationGuest, GuestError> {
        match &mut self.guest {
            Some(guest) => Ok(guest.as_mut()),
            None => Err(GuestError::NotHere),
        }
    }
}

impl DestinationVm for AnyDestination {
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        self.offered = true;
        let memory = match config.split_first() {
            Some((&handover::MARK, config)) => self.prepare_handed_over(config, layout)?,
            _ => self.prepare_kind(config, layout, None)?,
        };
        self.memory = Some(Arc::downgrade(&memory));
        Ok(memory)
    }

    fn load(&mut self, state: &mut dyn io::Read) -> VmResult<()> {
        self.here()?.load(state)
    }

    fn commit(&mut self, run: bool) -> VmResult<()> {
        self.here()?.commit(run)
    }

    fn abort(&mut self) {
        if let Some(mut guest) = self.guest.take() {
            guest.abort();
        }
    }

    fn takes_shared_memory(&self) -> bool {
        self.descriptors.is_some()
    }
}

impl Guest for AnyDestination {
    fn wait_ready(&mut self, go_on: &dyn Fn() -> bool) -> VmResult<()> {
        self.here()?.wait_ready(go_on)
    }

    fn ended(&self) -> Option<String> {
        self.guest.as_ref()?.ended()
    }

    fn heartbeats(&self) -> Option<u64> {
        self.guest.as_ref()?.heartbeats()
    }

    fn written(&self) -> Option<Written> {
        self.guest.as_ref()?.written()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.here()?.reset_stall()
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        self.here()?.longest_stall()
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        self.here()?.self_check()
    }
}
