//! The device (libibverbs): the queue pair of a lane, and what is done with it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rdma_sys::{
    ibv_access_flags, ibv_ack_cq_events, ibv_comp_channel, ibv_cq, ibv_create_comp_channel, ibv_create_cq,
    ibv_destroy_comp_channel, ibv_destroy_cq, ibv_get_cq_event, ibv_modify_qp, ibv_poll_cq, ibv_post_recv,
    ibv_post_send, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_cap, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_recv_wr,
    ibv_req_notify_cq, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wc_status, ibv_wr_opcode, rdma_create_qp,
    rdma_destroy_qp, rdma_t,
};

use crate::cm::Id;
use crate::failure::ConnectFailure;
use crate::message::SLOT;
use crate::registered::{Domain, Registration, Ring, Window};
use crate::sys;

/// Bytes of a cell, from which messages are sent that are no fragments.
pub(crate) const CELL: usize = 64;

/// Cells of a lane.
pub(crate) const CELLS: usize = 8;

/// In the number of a work request: it is a receive, of the slot in the other bits.
const RECEIVE: u64 = 1 << 63;

/// Completions fetched at once.
const BATCH: usize = 16;

/// Where a message stands that is to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Slot(u16),
    Cell(usize),
}

/// Sizes of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) send_slots: u16,
    pub(crate) receive_slots: u16,
    /// Work requests of the sending side, all together.
    pub(crate) depth: u32,
}

/// Something is done, or has failed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Completion {
    /// A message of so many bytes is in the slot.
    Received { slot: u16, len: usize },
    /// All work up to this number is done.
    Done(u64),
    /// The device's status for some work.
    Failed(Status),
}

/// What the device says when something failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Status {
    /// No answer, after all tries.
    NoAnswer,
    /// The peer does not let us write there.
    WriteRefused,
    /// Given up because something before it failed, or the connection ended.
    Flushed,
    Other(u32),
}

/// Where to write at the peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Remote {
    pub(crate) address: u64,
    pub(crate) key: u32,
}

/// A queue pair, its completions, and its ring.
pub(crate) struct Queue {
    cq: NonNull<ibv_cq>,
    channel: NonNull<ibv_comp_channel>,
    sizes: Sizes,
    key: u32,
    // Dropped in this order, after the queue pair.
    _registration: Registration,
    ring: Ring,
    domain: Arc<Domain>,
}

// SAFETY: libibverbs may be used from any thread.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Queue {
    /// Makes the queue pair of a connection; receives may be posted at once.
    pub(crate) fn new(id: &Arc<Id>, sizes: Sizes) -> Result<Self, ConnectFailure> {
        let domain = Domain::new(Arc::clone(id))?;
        let bytes = (usize::from(sizes.send_slots) + usize::from(sizes.receive_slots)) * SLOT + CELLS * CELL;
        let ring = Ring::new(bytes).map_err(|error| ConnectFailure::Host { what: "a ring", error })?;
        // SAFETY: the ring is dropped after the registration: at the end of this function, or by the fields' order.
        let registration = unsafe { domain.register(ring.start, bytes, ibv_access_flags::IBV_ACCESS_LOCAL_WRITE) };
        let registration = registration.map_err(|error| ConnectFailure::of_resources("a ring", bytes, error))?;
        let key = registration.keys().0;
        let failed = |what| ConnectFailure::of_resources(what, 0, io::Error::last_os_error());
        let device = id.device().ok_or_else(|| failed("the device"))?;
        // SAFETY: the device lives as long as the id.
        let channel = NonNull::new(unsafe { ibv_create_comp_channel(device.as_ptr()) });
        let channel = channel.ok_or_else(|| failed("a completion channel"))?;
        let entries = sizes.depth as i32 + i32::from(sizes.receive_slots);
        // SAFETY: device and channel are alive.
        let cq = unsafe { ibv_create_cq(device.as_ptr(), entries, null_mut(), channel.as_ptr(), 0) };
        let Some(cq) = NonNull::new(cq) else {
            let failure = failed("a completion queue");
            // SAFETY: made above, and in use by nobody.
            unsafe { ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(failure);
        };
        let mut attributes = ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: cq.as_ptr(),
            recv_cq: cq.as_ptr(),
            srq: null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: sizes.depth,
                max_recv_wr: u32::from(sizes.receive_slots),
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: id, domain and queue are alive and of one device.
        let made = unsafe { rdma_create_qp(id.raw(), domain.raw(), &raw mut attributes) };
        if made != 0 {
            let failure = failed("a queue pair");
            // SAFETY: made above, and in use by nobody.
            unsafe { (ibv_destroy_cq(cq.as_ptr()), ibv_destroy_comp_channel(channel.as_ptr())) };
            return Err(failure);
        }
        let queue = Self { cq, channel, sizes, key, _registration: registration, ring, domain };
        sys::set_nonblocking(queue.fd())
            .map_err(|error| ConnectFailure::Host { what: "a completion channel", error })?;
        Ok(queue)
    }

    pub(crate) fn id(&self) -> &Arc<Id> {
        &self.domain.id
    }

    /// Where windows are opened that this queue pair may use.
    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// Becomes readable when something is completed after [`arm`](Self::arm).
    pub(crate) fn fd(&self) -> RawFd {
        // SAFETY: the channel lives as long as `self`.
        unsafe { self.channel.as_ref() }.fd
    }

    fn offset(&self, place: Place) -> usize {
        let slots = |count: u16| usize::from(count) * SLOT;
        match place {
            Place::Slot(slot) => slots(slot),
            Place::Cell(cell) => slots(self.sizes.send_slots) + slots(self.sizes.receive_slots) + cell * CELL,
        }
    }

    fn receive_offset(&self, slot: u16) -> usize {
        (usize::from(self.sizes.send_slots) + usize::from(slot)) * SLOT
    }

    /// Writes into a place to send from.
    pub(crate) fn put(&self, place: Place, at: usize, bytes: &[u8]) {
        self.ring.put(self.offset(place) + at, bytes);
    }

    /// Reads what was received.
    pub(crate) fn get(&self, slot: u16, at: usize, into: &mut [u8]) {
        self.ring.get(self.receive_offset(slot) + at, into);
    }

    /// Lets the next message come into a slot.
    pub(crate) fn post_receive(&self, slot: u16) -> io::Result<()> {
        let address = self.ring.at(self.receive_offset(slot), SLOT).as_ptr() as u64;
        let mut piece = ibv_sge { addr: address, length: SLOT as u32, lkey: self.key };
        let mut request =
            ibv_recv_wr { wr_id: RECEIVE | u64::from(slot), next: null_mut(), sg_list: &raw mut piece, num_sge: 1 };
        let mut refused = null_mut();
        // SAFETY: the request lives through the call, which copies it; the slot lives until the queue pair is gone.
        posted(unsafe { ibv_post_recv(self.qp(), &raw mut request, &raw mut refused) })
    }

    /// Sends the first bytes of a place.
    pub(crate) fn post_send(&self, number: u64, place: Place, len: usize, signaled: bool) -> io::Result<()> {
        let address = self.ring.at(self.offset(place), len).as_ptr() as u64;
        let mut piece = ibv_sge { addr: address, length: len as u32, lkey: self.key };
        self.post(number, ibv_wr_opcode::IBV_WR_SEND, Some(&mut piece), None, signaled)
    }

    /// Writes a part of a window into the peer's memory. The window must stay open until this is done; where it
    /// does not, the device refuses and the lane breaks.
    pub(crate) fn post_write(
        &self,
        number: u64,
        window: &Window,
        offset: u64,
        len: u32,
        remote: Remote,
        signaled: bool,
    ) -> io::Result<()> {
        let (addr, lkey) = window.local(offset);
        let mut piece = ibv_sge { addr, length: len, lkey };
        self.post(number, ibv_wr_opcode::IBV_WR_RDMA_WRITE, Some(&mut piece), Some(remote), signaled)
    }

    /// Writes nothing, nowhere: its completion says that the peer's device is there.
    pub(crate) fn post_probe(&self, number: u64) -> io::Result<()> {
        self.post(number, ibv_wr_opcode::IBV_WR_RDMA_WRITE, None, Some(Remote { address: 0, key: 0 }), true)
    }

    fn post(
        &self,
        number: u64,
        opcode: ibv_wr_opcode::Type,
        piece: Option<&mut ibv_sge>,
        remote: Option<Remote>,
        signaled: bool,
    ) -> io::Result<()> {
        // SAFETY: numbers and pointers, of which zero is a value; what is in use for this opcode is set below.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = number;
        request.opcode = opcode;
        request.num_sge = i32::from(piece.is_some());
        request.sg_list = piece.map_or(null_mut(), |piece| piece);
        request.send_flags = if signaled { ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
        if let Some(Remote { address, key }) = remote {
            request.wr.rdma = rdma_t { remote_addr: address, rkey: key };
        }
        let mut refused = null_mut();
        // SAFETY: request and piece live through the call, which copies them. The piece lies in registered memory;
        // should its registration end before the work is done, the device refuses it.
        posted(unsafe { ibv_post_send(self.qp(), &raw mut request, &raw mut refused) })
    }

    /// Fetches completions; fewer than asked for when there are no more.
    pub(crate) fn poll(&self, each: &mut dyn FnMut(Completion)) -> io::Result<usize> {
        // SAFETY: numbers, of which zero is a value.
        let mut found: [ibv_wc; BATCH] = unsafe { std::mem::zeroed() };
        // SAFETY: room for as many as are asked for; the queue lives as long as `self`.
        let count = unsafe { ibv_poll_cq(self.cq.as_ptr(), BATCH as i32, found.as_mut_ptr()) };
        let count = usize::try_from(count).map_err(|_| io::Error::other("the completion queue is broken"))?;
        for done in &found[..count] {
            each(match done.status {
                ibv_wc_status::IBV_WC_SUCCESS if done.wr_id & RECEIVE != 0 => {
                    Completion::Received { slot: done.wr_id as u16, len: done.byte_len as usize }
                }
                ibv_wc_status::IBV_WC_SUCCESS => Completion::Done(done.wr_id),
                ibv_wc_status::IBV_WC_RETRY_EXC_ERR | ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR => {
                    Completion::Failed(Status::NoAnswer)
                }
                ibv_wc_status::IBV_WC_REM_ACCESS_ERR => Completion::Failed(Status::WriteRefused),
                ibv_wc_status::IBV_WC_WR_FLUSH_ERR => Completion::Failed(Status::Flushed),
                other => Completion::Failed(Status::Other(other)),
            });
        }
        Ok(count)
    }

    /// Lets [`fd`](Self::fd) become readable with the next completion. One that is there already does not count: poll after this.
    pub(crate) fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue lives as long as `self`.
        posted(unsafe { ibv_req_notify_cq(self.cq.as_ptr(), 0) })
    }

    /// Makes [`fd`](Self::fd) unreadable again.
    pub(crate) fn take_events(&self) {
        let (mut queue, mut context) = (null_mut(), null_mut());
        // SAFETY: a live channel, which does not block, and places for what it gives out.
        while unsafe { ibv_get_cq_event(self.channel.as_ptr(), &raw mut queue, &raw mut context) } == 0 {
            // SAFETY: once per event.
            unsafe { ibv_ack_cq_events(queue, 1) };
        }
    }

    /// Stops the queue pair: nothing is sent, received or written by the peer any more.
    pub(crate) fn stop(&self) -> io::Result<()> {
        // SAFETY: numbers and structures of numbers, of which zero is a value.
        let mut attributes: ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        // SAFETY: the attributes live through the call.
        posted(unsafe { ibv_modify_qp(self.qp(), &raw mut attributes, ibv_qp_attr_mask::IBV_QP_STATE.0 as i32) })
    }

    fn qp(&self) -> *mut rdma_sys::ibv_qp {
        // SAFETY: the id is alive, and has its queue pair until `drop`.
        unsafe { (*self.domain.id.raw()).qp }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: made by `new`, in the reverse order; all events are acknowledged. Nothing reaches the ring after this.
        unsafe {
            rdma_destroy_qp(self.domain.id.raw());
            ibv_destroy_cq(self.cq.as_ptr());
            ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}

/// What functions of verbs return: 0 or an error's number.
fn posted(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result.saturating_abs())) }
}
