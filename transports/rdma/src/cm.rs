//! The connection manager (librdmacm): names, addresses and events of connections.
#![allow(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::ptr::{NonNull, null_mut};
use std::time::Duration;

use rdma_sys::rdma_cm_event_type as kind;
use rdma_sys::{
    ibv_context, rdma_accept, rdma_ack_cm_event, rdma_bind_addr, rdma_cm_event, rdma_cm_id, rdma_conn_param,
    rdma_connect, rdma_create_event_channel, rdma_create_id, rdma_destroy_event_channel, rdma_destroy_id,
    rdma_disconnect, rdma_event_channel, rdma_get_cm_event, rdma_get_src_port, rdma_listen, rdma_migrate_id,
    rdma_port_space, rdma_reject, rdma_resolve_addr, rdma_resolve_route, rdma_set_option,
};
use socket2::SockAddr;

use crate::failure::ConnectFailure;
use crate::sys;

/// Tries after the first one (7 would mean for ever), each after [`ACK_TIMEOUT`]: a peer that is gone is noticed within a second.
const RETRIES: u8 = 6;

/// Time until the device sends again: 4.096 us times two to this power, 67 ms.
const ACK_TIMEOUT: u8 = 14;

/// Times that a message is sent again which finds no slot. Credits see to it that there is one.
const RETRIES_WITHOUT_SLOT: u8 = 3;

/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_ACK_TIMEOUT` of rdma_cma.h.
const OPTION_ID: i32 = 0;
const OPTION_ACK_TIMEOUT: i32 = 3;

/// Why a peer says no by itself: no such service, in the numbers of the InfiniBand specification.
pub(crate) const NO_SUCH_SERVICE: i32 = 8;

/// Where events of connections come.
struct Channel(NonNull<rdma_event_channel>);

// SAFETY: librdmacm may be used from any thread; a channel is nothing but a descriptor.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    fn open() -> Result<Self, ConnectFailure> {
        // SAFETY: takes nothing.
        let raw = unsafe { rdma_create_event_channel() };
        let channel = Self(NonNull::new(raw).ok_or_else(|| ConnectFailure::of_device(io::Error::last_os_error()))?);
        sys::set_nonblocking(channel.fd()).map_err(|error| ConnectFailure::Host { what: "an event channel", error })?;
        Ok(channel)
    }

    fn fd(&self) -> RawFd {
        // SAFETY: the channel lives as long as `self`.
        unsafe { self.0.as_ref() }.fd
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: made by `open`; whatever used it (`Id`) is gone before its field is dropped.
        unsafe { rdma_destroy_event_channel(self.0.as_ptr()) }
    }
}

/// One connection, or one listener, with events of its own.
pub(crate) struct Id {
    raw: NonNull<rdma_cm_id>,
    channel: Channel,
}

// SAFETY: librdmacm and the kernel synchronise calls on an id; the fields read here are constant once they are set.
unsafe impl Send for Id {}
// SAFETY: as above.
unsafe impl Sync for Id {}

/// What happened to a connection.
pub(crate) enum Event {
    AddressResolved,
    RouteResolved,
    /// Somebody calls, with this to say.
    Request(Id, Vec<u8>),
    /// The peer agrees, with this to say.
    Established(Vec<u8>),
    /// The peer does not, for a reason of the specification, with this to say.
    Rejected(i32, Vec<u8>),
    /// Address, route or connection failed.
    Failed(io::Error),
    Disconnected,
    Other,
}

fn checked(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn millis(timeout: Duration) -> i32 {
    timeout.as_millis().clamp(1, i32::MAX as u128) as i32
}

impl Id {
    pub(crate) fn new() -> Result<Self, ConnectFailure> {
        let channel = Channel::open()?;
        let mut raw = null_mut();
        // SAFETY: a live channel, and a place for the id.
        let made =
            unsafe { rdma_create_id(channel.0.as_ptr(), &raw mut raw, null_mut(), rdma_port_space::RDMA_PS_TCP) };
        checked(made).map_err(ConnectFailure::of_device)?;
        let raw = NonNull::new(raw).ok_or_else(|| ConnectFailure::of_device(io::Error::last_os_error()))?;
        Ok(Self { raw, channel })
    }

    /// Takes over a caller's id, which came with an event of another channel.
    fn adopt(raw: NonNull<rdma_cm_id>) -> Result<Self, ConnectFailure> {
        let adopt = || {
            let channel = Channel::open()?;
            // SAFETY: both live; all events of the id so far are acknowledged, or this would wait for ever.
            checked(unsafe { rdma_migrate_id(raw.as_ptr(), channel.0.as_ptr()) })
                .map_err(|error| ConnectFailure::Host { what: "an event channel for a caller", error })?;
            Ok(channel)
        };
        match adopt() {
            Ok(channel) => Ok(Self { raw, channel }),
            Err(error) => {
                // SAFETY: nobody else knows the id.
                unsafe { rdma_destroy_id(raw.as_ptr()) };
                Err(error)
            }
        }
    }

    /// Becomes readable when there is an event.
    pub(crate) fn fd(&self) -> RawFd {
        self.channel.fd()
    }

    pub(crate) fn raw(&self) -> *mut rdma_cm_id {
        self.raw.as_ptr()
    }

    /// The device, once the address is known.
    pub(crate) fn device(&self) -> Option<NonNull<ibv_context>> {
        // SAFETY: the id lives as long as `self`.
        NonNull::new(unsafe { self.raw.as_ref() }.verbs)
    }

    pub(crate) fn resolve_address(
        &self,
        source: Option<SocketAddr>,
        target: SocketAddr,
        timeout: Duration,
    ) -> io::Result<()> {
        let (source, target) = (source.map(SockAddr::from), SockAddr::from(target));
        let source = source.as_ref().map_or(null_mut(), |address| address.as_ptr().cast_mut().cast());
        // SAFETY: addresses are only read, and alive through the call.
        checked(unsafe { rdma_resolve_addr(self.raw(), source, target.as_ptr().cast_mut().cast(), millis(timeout)) })
    }

    pub(crate) fn resolve_route(&self, timeout: Duration) -> io::Result<()> {
        // SAFETY: a live id.
        checked(unsafe { rdma_resolve_route(self.raw(), millis(timeout)) })
    }

    pub(crate) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let address = SockAddr::from(address);
        // SAFETY: the address is only read, and alive through the call.
        checked(unsafe { rdma_bind_addr(self.raw(), address.as_ptr().cast_mut().cast()) })
    }

    pub(crate) fn listen(&self, backlog: i32) -> io::Result<()> {
        // SAFETY: a live id.
        checked(unsafe { rdma_listen(self.raw(), backlog) })
    }

    pub(crate) fn local_port(&self) -> u16 {
        // SAFETY: a live id.
        u16::from_be(unsafe { rdma_get_src_port(self.raw()) })
    }

    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        // SAFETY: librdmacm keeps a whole `sockaddr_storage` there, whose family says how much of it counts.
        let storage = unsafe { self.raw.as_ref().route.addr.dst_addr_union.dst_storage };
        // SAFETY: as above; what is no address of the internet's families comes out as `None`.
        unsafe { SockAddr::new(std::mem::transmute_copy(&storage), size_of_val(&storage) as _) }.as_socket()
    }

    /// The queue pair must be there already.
    pub(crate) fn connect(&self, private: &[u8]) -> io::Result<()> {
        self.set_ack_timeout();
        let mut parameters = parameters(private);
        // SAFETY: the parameters and what they point to live through the call, which copies them.
        checked(unsafe { rdma_connect(self.raw(), &raw mut parameters) })
    }

    /// The queue pair must be there already.
    pub(crate) fn accept(&self, private: &[u8]) -> io::Result<()> {
        self.set_ack_timeout();
        let mut parameters = parameters(private);
        // SAFETY: the parameters and what they point to live through the call, which copies them.
        checked(unsafe { rdma_accept(self.raw(), &raw mut parameters) })
    }

    /// Turns a caller away.
    pub(crate) fn reject(&self, private: &[u8]) {
        // SAFETY: the bytes live through the call. Where it fails the caller is gone.
        unsafe { rdma_reject(self.raw(), private.as_ptr().cast(), private.len() as u8) };
    }

    /// Breaks the connection off: what was not acknowledged yet is lost.
    pub(crate) fn disconnect(&self) {
        // SAFETY: a live id. Where it fails there is no connection.
        unsafe { rdma_disconnect(self.raw()) };
    }

    fn set_ack_timeout(&self) {
        let mut timeout = ACK_TIMEOUT;
        // SAFETY: one byte, alive through the call. Kernels before 5.2 do not know it and use their own.
        unsafe { rdma_set_option(self.raw(), OPTION_ID, OPTION_ACK_TIMEOUT, (&raw mut timeout).cast(), 1) };
    }

    /// The next event, if there is one.
    pub(crate) fn next_event(&self) -> io::Result<Option<Event>> {
        let mut raw = null_mut();
        // SAFETY: a live channel, and a place for the event.
        if let Err(error) = checked(unsafe { rdma_get_cm_event(self.channel.0.as_ptr(), &raw mut raw) }) {
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        // SAFETY: the call has given out an event, which lives until it is acknowledged below.
        let event = unsafe { &*raw };
        let (what, status, caller, private) = (event.event, event.status, event.id, private_data(event));
        // SAFETY: once per event, after its last use.
        unsafe { rdma_ack_cm_event(raw) };
        Ok(Some(match what {
            kind::RDMA_CM_EVENT_ADDR_RESOLVED => Event::AddressResolved,
            kind::RDMA_CM_EVENT_ROUTE_RESOLVED => Event::RouteResolved,
            kind::RDMA_CM_EVENT_CONNECT_REQUEST => {
                match NonNull::new(caller).map(Self::adopt) {
                    Some(Ok(id)) => Event::Request(id, private),
                    // The caller hears that it was turned away.
                    Some(Err(_)) | None => Event::Other,
                }
            }
            kind::RDMA_CM_EVENT_ESTABLISHED => Event::Established(private),
            kind::RDMA_CM_EVENT_REJECTED => Event::Rejected(status, private),
            kind::RDMA_CM_EVENT_ADDR_ERROR
            | kind::RDMA_CM_EVENT_ROUTE_ERROR
            | kind::RDMA_CM_EVENT_CONNECT_ERROR
            | kind::RDMA_CM_EVENT_UNREACHABLE => Event::Failed(io::Error::from_raw_os_error(status.saturating_abs())),
            kind::RDMA_CM_EVENT_DISCONNECTED | kind::RDMA_CM_EVENT_DEVICE_REMOVAL => Event::Disconnected,
            _ => Event::Other,
        }))
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: made by librdmacm, destroyed once; all events are acknowledged, and whatever was made with it holds it.
        unsafe { rdma_destroy_id(self.raw()) };
    }
}

fn parameters(private: &[u8]) -> rdma_conn_param {
    rdma_conn_param {
        private_data: private.as_ptr().cast(),
        private_data_len: private.len() as u8,
        // Nobody reads from the other's memory.
        responder_resources: 0,
        initiator_depth: 0,
        flow_control: 1,
        retry_count: RETRIES,
        rnr_retry_count: RETRIES_WITHOUT_SLOT,
        srq: 0,
        qp_num: 0,
    }
}

/// What the peer says with an event that has room for it.
fn private_data(event: &rdma_cm_event) -> Vec<u8> {
    match event.event {
        kind::RDMA_CM_EVENT_CONNECT_REQUEST | kind::RDMA_CM_EVENT_ESTABLISHED | kind::RDMA_CM_EVENT_REJECTED => {}
        _ => return Vec::new(),
    }
    // SAFETY: for these events the parameters of a connection are filled in.
    let (data, len) = unsafe { (event.param.conn.private_data, event.param.conn.private_data_len) };
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: librdmacm keeps that many bytes until the event is acknowledged.
    unsafe { std::slice::from_raw_parts(data.cast::<u8>(), usize::from(len)) }.to_vec()
}
