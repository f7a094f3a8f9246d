//! The reference: memory to memory over one TCP connection with nothing but `write` and `read`.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use pageferry::memory::Window;

use crate::sys;

/// Sends all of the memory and waits for the other side's word that it has it.
pub(crate) fn send(stream: &mut TcpStream, memory: Window, chunk: usize) -> io::Result<()> {
    let mut sent = 0;
    while sent < memory.len {
        sent += sys::write_from(stream, memory, sent, chunk)?;
    }
    stream.read_exact(&mut [0])
}

/// Receives all of the memory and says so.
pub(crate) fn receive(stream: &mut TcpStream, memory: Window, chunk: usize) -> io::Result<()> {
    let mut received = 0;
    while received < memory.len {
        match sys::read_into(stream, memory, received, chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => received += read,
        }
    }
    stream.write_all(&[1])
}
