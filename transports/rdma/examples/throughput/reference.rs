//! Plain RDMA writes, by nothing but librdmacm and libibverbs: what the device does at best.
#![allow(unsafe_code)]

use std::io;
use std::mem::zeroed;
use std::net::SocketAddr;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use rdma_sys::{
    ibv_access_flags, ibv_ack_cq_events, ibv_dereg_mr, ibv_get_cq_event, ibv_mr, ibv_poll_cq, ibv_post_send,
    ibv_qp_init_attr, ibv_qp_type, ibv_reg_mr, ibv_req_notify_cq, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc,
    ibv_wr_opcode, rdma_accept, rdma_bind_addr, rdma_cm_id, rdma_conn_param, rdma_connect, rdma_create_id,
    rdma_create_qp, rdma_destroy_id, rdma_destroy_qp, rdma_get_request, rdma_get_src_port, rdma_listen,
    rdma_port_space, rdma_resolve_addr, rdma_resolve_route, rdma_t,
};
use socket2::SockAddr;

/// Writes under way at once.
const DEPTH: usize = 32;

fn checked(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An id that blocks.
fn new_id() -> io::Result<*mut rdma_cm_id> {
    let mut id = null_mut();
    // SAFETY: a place for the id; without a channel, calls block until they are done.
    checked(unsafe { rdma_create_id(null_mut(), &raw mut id, null_mut(), rdma_port_space::RDMA_PS_TCP) })?;
    Ok(id)
}

/// A queue pair with completion queues of its own.
fn new_queue(id: *mut rdma_cm_id) -> io::Result<()> {
    // SAFETY: numbers and pointers, of which zero is a value; the id is alive, and makes what is not given.
    unsafe {
        let mut attributes: ibv_qp_init_attr = zeroed();
        attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
        (attributes.cap.max_send_wr, attributes.cap.max_send_sge) = (DEPTH as u32, 1);
        (attributes.cap.max_recv_wr, attributes.cap.max_recv_sge) = (1, 1);
        checked(rdma_create_qp(id, null_mut(), &raw mut attributes))
    }
}

fn register(id: *mut rdma_cm_id, (start, len): (u64, usize), access: ibv_access_flags) -> io::Result<*mut ibv_mr> {
    // SAFETY: the caller's memory is mapped until the registration ends.
    let registration = unsafe { ibv_reg_mr((*id).pd, start as *mut _, len, access.0 as i32) };
    if registration.is_null() { Err(io::Error::last_os_error()) } else { Ok(registration) }
}

/// Writes one memory into the other, so many bytes at a time; the time from the first write to the last completion. Both are
/// (address, length) of mapped memory.
pub(crate) fn write(address: SocketAddr, from: (u64, usize), to: (u64, usize), batch: usize) -> io::Result<Duration> {
    let listener = new_id()?;
    let local = SockAddr::from(address);
    // SAFETY: live ids, addresses that live through the calls.
    let port = unsafe {
        checked(rdma_bind_addr(listener, local.as_ptr().cast_mut().cast()))?;
        checked(rdma_listen(listener, 1))?;
        u16::from_be(rdma_get_src_port(listener))
    };
    let target = SocketAddr::new(address.ip(), port);
    let listening = listener as usize;
    let accepting = std::thread::spawn(move || -> io::Result<(usize, usize)> {
        let mut id = null_mut();
        // SAFETY: the listener is alive, and used by this thread alone; the parameters live through the call.
        unsafe {
            checked(rdma_get_request(listening as *mut _, &raw mut id))?;
            new_queue(id)?;
            let access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE;
            let registration = register(id, to, access)?;
            let key = (*registration).rkey.to_le_bytes();
            let mut parameters: rdma_conn_param = zeroed();
            (parameters.private_data, parameters.private_data_len) = (key.as_ptr().cast(), 4);
            checked(rdma_accept(id, &raw mut parameters))?;
            Ok((id as usize, registration as usize))
        }
    });
    let id = new_id()?;
    let remote = SockAddr::from(target);
    // SAFETY: live ids, addresses and parameters that live through the calls; the event is there after a blocking connect.
    let (own, key) = unsafe {
        checked(rdma_resolve_addr(id, null_mut(), remote.as_ptr().cast_mut().cast(), 2000))?;
        checked(rdma_resolve_route(id, 2000))?;
        new_queue(id)?;
        let own = register(id, from, ibv_access_flags(0))?;
        let mut parameters: rdma_conn_param = zeroed();
        parameters.retry_count = 6;
        checked(rdma_connect(id, &raw mut parameters))?;
        let said = (*(*id).event).param.conn.private_data.cast::<[u8; 4]>();
        (own, u32::from_le_bytes(*said))
    };
    let (accepted, theirs) = accepting.join().map_err(|_| io::Error::other("the acceptor panicked"))??;
    let began = Instant::now();
    write_all(id, own, from, to, key, batch)?;
    let took = began.elapsed();
    // SAFETY: what was made above, in the reverse order, once.
    unsafe {
        for (id, registration) in [(id, own), (accepted as *mut _, theirs as *mut _)] {
            rdma_destroy_qp(id);
            ibv_dereg_mr(registration);
            rdma_destroy_id(id);
        }
        rdma_destroy_id(listener);
    }
    Ok(took)
}

fn write_all(
    id: *mut rdma_cm_id,
    own: *mut ibv_mr,
    from: (u64, usize),
    to: (u64, usize),
    key: u32,
    batch: usize,
) -> io::Result<()> {
    let (mut posted, mut under_way) = (0, 0);
    while posted < from.1 || under_way > 0 {
        while posted < from.1 && under_way < DEPTH {
            let len = batch.min(from.1 - posted);
            // SAFETY: the queue pair is alive; the piece lies in registered memory; the request lives through the call.
            unsafe {
                let mut piece = ibv_sge { addr: from.0 + posted as u64, length: len as u32, lkey: (*own).lkey };
                let mut request: ibv_send_wr = zeroed();
                (request.opcode, request.num_sge) = (ibv_wr_opcode::IBV_WR_RDMA_WRITE, 1);
                (request.sg_list, request.send_flags) = (&raw mut piece, ibv_send_flags::IBV_SEND_SIGNALED.0);
                request.wr.rdma = rdma_t { remote_addr: to.0 + posted as u64, rkey: key };
                let mut refused = null_mut();
                checked(ibv_post_send((*id).qp, &raw mut request, &raw mut refused))?;
            }
            (posted, under_way) = (posted + len, under_way + 1);
        }
        under_way -= completions(id)?;
    }
    Ok(())
}

/// Waits for some.
fn completions(id: *mut rdma_cm_id) -> io::Result<usize> {
    // SAFETY: queue and channel live as long as the id's queue pair; there is room for what is asked for.
    unsafe {
        let mut found: [ibv_wc; DEPTH] = zeroed();
        let mut count = ibv_poll_cq((*id).send_cq, DEPTH as i32, found.as_mut_ptr());
        if count == 0 {
            checked(ibv_req_notify_cq((*id).send_cq, 0))?;
            count = ibv_poll_cq((*id).send_cq, DEPTH as i32, found.as_mut_ptr());
        }
        if count == 0 {
            let (mut queue, mut context) = (null_mut(), null_mut());
            checked(ibv_get_cq_event((*id).send_cq_channel, &raw mut queue, &raw mut context))?;
            ibv_ack_cq_events(queue, 1);
            count = ibv_poll_cq((*id).send_cq, DEPTH as i32, found.as_mut_ptr());
        }
        match found[..count.max(0) as usize].iter().find(|done| done.status != 0) {
            Some(failed) => Err(io::Error::other(format!("a write failed with status {}", failed.status))),
            None => Ok(count.max(0) as usize),
        }
    }
}
