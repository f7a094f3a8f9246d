//! The demo's destination must not outlive the demo.
#![allow(unsafe_code)]

use std::io;

/// Has the kernel end this process when the one with this id, which started it, ends.
pub(super) fn end_with(parent: u32) -> io::Result<()> {
    // SAFETY: sets a flag of this process; the arguments are plain numbers.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // It may have ended before the kernel was asked: then somebody else is the parent by now.
    if std::os::unix::process::parent_id() != parent {
        return Err(io::Error::other("the process that started this one has ended already"));
    }
    Ok(())
}
