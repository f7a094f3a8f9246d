//! The demo's destination must not outlive the demo.
#![allow(unsafe_code)]

use std::io;

/// Has the kernel end this process when the one that started it ends.
pub(super) fn end_with_parent() -> io::Result<()> {
    // SAFETY: sets a flag of this process; the arguments are plain numbers.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if std::os::unix::process::parent_id() == 1 {
        return Err(io::Error::other("the process that started this one has ended already"));
    }
    Ok(())
}
