//! Memory that the device may reach (libibverbs): windows of guest memory, and the rings of a lane.
//!
//! Each lane has a protection domain of its own, so that a window's key is good on that lane and on no other.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use pageferry::memory::{GuestMemory, RegionId, Transfer};
use rdma_sys::{ibv_access_flags, ibv_alloc_pd, ibv_dealloc_pd, ibv_dereg_mr, ibv_mr, ibv_pd, ibv_reg_mr};

use crate::cm::Id;
use crate::failure::ConnectFailure;
use crate::message::Refusal;

/// What may use registered memory together.
pub(crate) struct Domain {
    raw: NonNull<ibv_pd>,
    /// Holds the device.
    pub(crate) id: Arc<Id>,
}

// SAFETY: libibverbs may be used from any thread.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(crate) fn new(id: Arc<Id>) -> Result<Arc<Self>, ConnectFailure> {
        let what = "a protection domain";
        let device = id.device().ok_or(ConnectFailure::Host { what, error: io::ErrorKind::NotConnected.into() })?;
        // SAFETY: the device lives as long as the id.
        let raw = NonNull::new(unsafe { ibv_alloc_pd(device.as_ptr()) });
        let raw = raw.ok_or_else(|| ConnectFailure::of_resources(what, 0, io::Error::last_os_error()))?;
        Ok(Arc::new(Self { raw, id }))
    }

    pub(crate) fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    /// # Safety
    ///
    /// The memory must stay mapped until the registration is dropped, and no reference may be made into it.
    pub(crate) unsafe fn register(
        self: &Arc<Self>,
        start: NonNull<u8>,
        len: usize,
        access: ibv_access_flags,
    ) -> io::Result<Registration> {
        // SAFETY: the caller's promise; the domain is alive.
        let raw = unsafe { ibv_reg_mr(self.raw.as_ptr(), start.as_ptr().cast(), len, access.0 as i32) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Registration { raw: Some(raw), _domain: Arc::clone(self) })
    }

    /// Gives the device a run of a region, for its own reading or for the peer's writing.
    pub(crate) fn open_window(
        self: &Arc<Self>,
        memory: &Arc<dyn GuestMemory>,
        region: RegionId,
        start: u64,
        len: u64,
        access: Access,
    ) -> Result<Window, WindowFailure> {
        let described = memory.layout().region(region).filter(|region| region.transfer == Transfer::Copy);
        let mapped = memory.window(region).ok_or(WindowFailure::OutOfBounds)?;
        let most = described.map_or(0, |region| region.len).min(mapped.len as u64);
        let inside = len > 0 && start.checked_add(len).is_some_and(|end| end <= most);
        if !inside {
            return Err(WindowFailure::OutOfBounds);
        }
        // SAFETY: inside the mapping, as was just checked.
        let first = unsafe { mapped.start.add(start as usize) };
        let access = match access {
            Access::Read => ibv_access_flags(0),
            Access::PeerWrites => ibv_access_flags::IBV_ACCESS_LOCAL_WRITE | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE,
        };
        // SAFETY: `GuestMemory` promises that it stays mapped, and that nobody makes references into it; the window
        // holds it for longer than the registration.
        let registration = unsafe { self.register(first, len as usize, access) };
        let registration = registration.map_err(|error| WindowFailure::Host { wanted: len, error })?;
        Ok(Window { region, start, len, address: first.as_ptr() as u64, registration, _memory: Arc::clone(memory) })
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: made by `new`; everything made in it holds it.
        unsafe { ibv_dealloc_pd(self.raw.as_ptr()) };
    }
}

/// Memory that the device may reach while this lives.
pub(crate) struct Registration {
    raw: Option<NonNull<ibv_mr>>,
    _domain: Arc<Domain>,
}

// SAFETY: libibverbs may be used from any thread.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Registration {
    pub(crate) fn keys(&self) -> (u32, u32) {
        // SAFETY: the registration is there until it is ended.
        self.raw.map_or((0, 0), |raw| unsafe { (raw.as_ref().lkey, raw.as_ref().rkey) })
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(raw) = self.raw.take() else { return Ok(()) };
        // SAFETY: made by `register`, ended once.
        match unsafe { ibv_dereg_mr(raw.as_ptr()) } {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// A run of guest memory that the device may reach.
pub(crate) struct Window {
    pub(crate) region: RegionId,
    pub(crate) start: u64,
    pub(crate) len: u64,
    address: u64,
    registration: Registration,
    /// Keeps it mapped. Dropped after the registration: fields go in order.
    _memory: Arc<dyn GuestMemory>,
}

/// Who may do what with a window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    /// The own device reads.
    Read,
    /// The peer writes.
    PeerWrites,
}

impl Window {
    /// The address of its first byte and the key, as a peer needs them.
    pub(crate) fn address_and_key(&self) -> (u64, u32) {
        (self.address, self.registration.keys().1)
    }

    /// Where a place in it is, and the key, for the own device.
    pub(crate) fn local(&self, offset: u64) -> (u64, u32) {
        (self.address + (offset - self.start), self.registration.keys().0)
    }

    pub(crate) fn contains(&self, region: RegionId, offset: u64) -> bool {
        self.region == region && (self.start..self.start + self.len).contains(&offset)
    }

    /// Ends it: when this returns well, the device does not reach the memory any more.
    pub(crate) fn close(mut self) -> io::Result<()> {
        self.registration.end()
    }
}

/// Why a window could not be opened.
#[derive(Debug)]
pub(crate) enum WindowFailure {
    OutOfBounds,
    Host { wanted: u64, error: io::Error },
}

impl WindowFailure {
    /// What to tell the peer.
    pub(crate) fn refusal(&self) -> Refusal {
        match self {
            Self::OutOfBounds => Refusal::OutOfBounds,
            Self::Host { error, .. } => match error.raw_os_error() {
                Some(libc::ENOMEM | libc::EAGAIN) => Refusal::LockedMemory,
                _ => Refusal::Host,
            },
        }
    }
}

/// Bytes in rings: slots to send from, slots to receive into, and cells to send small messages from.
pub(crate) struct Ring {
    pub(crate) start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory, reached by copies only.
unsafe impl Send for Ring {}
// SAFETY: as above; who may use which slot when is the lane's business, and a mistake there mixes bytes up, no more.
unsafe impl Sync for Ring {}

impl Ring {
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        let layout = Layout::from_size_align(bytes.next_multiple_of(4096), 4096).map_err(io::Error::other)?;
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        Ok(Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)), layout })
    }

    pub(crate) fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.layout.size()), "a place outside of the ring");
        // SAFETY: inside the allocation, as was just checked.
        unsafe { self.start.add(offset) }
    }

    pub(crate) fn put(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: `at` has checked the place; `bytes` is a reference, and none is ever made into the ring.
        unsafe { self.at(offset, bytes.len()).copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) }
    }

    pub(crate) fn get(&self, offset: usize, into: &mut [u8]) {
        // SAFETY: as in `put`, the other way round.
        unsafe { self.at(offset, into.len()).copy_to_nonoverlapping(NonNull::from(&mut *into).cast(), into.len()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
